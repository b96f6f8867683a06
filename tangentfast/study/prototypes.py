"""A frozen classification head made of class means: no head is trained, so all learning is in τ."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PrototypeHead"]


class PrototypeHead(nn.Module):
    """Cosine similarity to class means, times `scale`: the part CLIP's text head plays elsewhere.

    With μ the mean of all features and u(z) = (z − μ)/‖z − μ‖, the logits are
    scale · ⟨u(z), p_c⟩, p_c the normalised mean of u over the images of class c. As with
    prototypical networks (Snell et al. 2017, arXiv:1703.05175), but fixed once computed.
    """

    center: Tensor
    prototypes: Tensor

    def __init__(self, features: Tensor, labels: Tensor, scale: float = 10.0) -> None:
        """The head of one task.

        Args:
            features: float [N, D], those of the *base* network on the training split.
            labels: int64 [N], every class 0..max at least once.
            scale: the inverse temperature.

        Raises:
            ValueError: shapes that do not fit, or a class without an image.
        """
        super().__init__()
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"PrototypeHead: features should be [N, D] and labels [N], are "
                f"{list(features.shape)} and {list(labels.shape)}"
            )
        counts = labels.bincount()
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(f"PrototypeHead: every class needs an image, {empty} have none")
        center = features.mean(0)
        units = F.normalize(features - center, dim=1)
        sums = units.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, units)
        self.register_buffer("center", center)
        self.register_buffer("prototypes", F.normalize(sums, dim=1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., D] → logits [..., C]."""
        return self.scale * F.normalize(features - self.center, dim=-1) @ self.prototypes.T
