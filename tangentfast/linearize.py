"""The linearized model: f_lin(x; τ) = f(x; θ0) + J(x) τ, trained by an ordinary backward.

Ortiz-Jimenez, Favero, Frossard (2023), arXiv:2305.12827. ∂L/∂τ = J(x)ᵀ ∂L/∂f_lin is the reverse
pass of the original network at θ0 with the loss gradient taken at the linearized output: the primal
carries the graph, the tangent none.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from tangentfast import sharding
from tangentfast.anchor import SUFFIX, anchor, release
from tangentfast.dual import Dual
from tangentfast.fingerprint import Base, fingerprint
from tangentfast.inplace import version
from tangentfast.passes import Pass, running
from tangentfast.select import Selection, describe, select
from tangentfast.task_vector import TaskVector


class LinearizedModel(nn.Module):
    """A network replaced by its first-order expansion at θ0; made by `linearize`.

    An ordinary module: same call signature and output structure as the original, every
    floating-point tensor of the output linearized. ``parameters()`` are the trained τ. θ0 is shared
    with the original model, which stays usable; changing θ0 in place afterwards is an error at the
    next call.
    """

    base: Base
    selection: str

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        selection: str,
        base: Base,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, sites = _shared_copy(model, names, dtype)
        self.base = base
        self.selection = selection
        self._sites: list[tuple[str, nn.Module, str]] = sites
        self._trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self.train(model.training)
        self._remember()

    @property
    def tau(self) -> dict[str, nn.Parameter]:
        """τ by the original model's parameter names: ``lin.tau["visual.proj"].grad``."""
        return {name: m._parameters[own + SUFFIX] for name, m, own in self._sites}  # type: ignore[misc]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters τ, and only those; θ0 is in ``model.parameters()``."""
        taus = {id(tau) for tau in self.tau.values()} if recurse else set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if id(parameter) in taus:
                yield name, parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f(x; θ0) + J(x) τ.

        Raises:
            RuntimeError: θ0 was changed in place; an input requires grad; something in the network
                cannot be linearized exactly (the message names operation, module and remedy).
        """
        self._check_base()
        recording = torch.is_grad_enabled()
        if recording and any(
            isinstance(x, Tensor) and x.requires_grad for x in _leaves(args, kwargs)
        ):
            raise RuntimeError(
                "linearized model: an input requires grad, but the backward of a linearized model "
                "gives gradients to τ alone. Expected inputs without grad: detach() them, or use "
                "tangentfast.jvp for derivatives by the input."
            )
        if not recording:
            args, kwargs = tree_map(_detached, (args, kwargs))
        trained = recording and any(tau.requires_grad for tau in self.tau.values())
        sharded = sharding.keep_duals(self.model)
        # A sharded block's parameters are gathered and freed: copies would outlive them.
        casts = None if sharded else self._casts
        pass_ = Pass(1, self.model, strict=True, anchors=True, recording=trained, casts=casts)
        try:
            with running(pass_):
                out = self.model(*args, **kwargs)
        finally:
            self._fallbacks.update(pass_.fallbacks)
        return tree_map(_linearized, out)

    def task_vector(self) -> TaskVector:
        """τ as a `TaskVector`: a copy, with θ0's fingerprint and the selection."""
        tensors = {name: _whole(tau).detach().clone() for name, tau in self.tau.items()}
        return TaskVector(tensors, base=self.base, selection=self.selection)

    def materialize(self) -> nn.Module:
        """The ordinary, non-linear model at θ0 + τ: new tensors, the original class, nothing
        shared.
        """
        memo: dict[int, Any] = {id(tau): tau for tau in self.parameters()}
        model: nn.Module = copy.deepcopy(self.model, memo)
        settled: dict[int, nn.Parameter] = {}

        def settle(theta0: Tensor, tau: Tensor) -> nn.Parameter:
            if id(theta0) not in settled:  # a tied parameter stays tied
                settled[id(theta0)] = nn.Parameter((theta0 + tau.to(theta0.dtype)).detach())
            return settled[id(theta0)]

        for module in model.modules():
            release(module, settle)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        return model

    def report(self) -> str:
        """What is trained, and which operations took the exact but slower fallback so far."""
        taus = self.tau.values()
        total = sum(p.numel() for p in self.model.parameters()) - sum(t.numel() for t in taus)
        lines = [
            f"LinearizedModel of {self.base.name} [{self.base.fingerprint[:12]}]",
            f"  trained: {sum(t.numel() for t in taus):,} of {total:,} parameters in {len(taus)} "
            f"tensors ({self.selection})",
        ]
        lines += [
            f"  fallback: {op} in {where}, {n} ×" for (op, where), n in self._fallbacks.items()
        ]
        if not self._fallbacks:
            lines.append("  fallback: none; every operation had a rule")
        return "\n".join(lines)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's; θ0 in the state dict is written to the shared θ0."""
        result = super().load_state_dict(*args, **kwargs)
        self._remember()
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda()
        result = super()._apply(*args, **kwargs)
        self._remember()
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_seen", "_casts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remember()

    def _remember(self) -> None:
        """Note where θ0 is and how often it was written, to notice a change."""
        self._casts = WeakTensorKeyDictionary()
        self._seen = [
            (name, weakref.ref(m._parameters[own]), m, own, version(m._parameters[own]))  # type: ignore[arg-type]
            for name, m, own in self._sites
        ]

    def _check_base(self) -> None:
        for name, known, module, own, seen in self._seen:
            theta0 = known()
            # A sharded model has other parameter objects, which are rewritten by each gather.
            if theta0 is None or module._parameters[own] is not theta0 or version(theta0) == seen:
                continue
            raise RuntimeError(
                f"linearized model: θ0 of {name!r} was changed in place after linearize, so that "
                "τ no longer belongs to it. Expected θ0 to stay as it was: linearize again, or "
                "linearize copy.deepcopy(model)."
            )


def linearize(
    model: nn.Module,
    params: Selection = "all",
    *,
    at: Mapping[str, Tensor] | None = None,
    name: str | None = None,
    primal_dtype: torch.dtype | None = None,
) -> LinearizedModel:
    """Replace a model by its first-order Taylor expansion around its present parameters θ0.

    f_lin(x; τ) = f(x; θ0) + J(x) τ; τ starts at zero and is what is trained (arXiv:2305.12827).

    Args:
        model: any module of torch operations. It is neither changed nor copied: the result shares
            θ0 and the buffers with it.
        params: what τ covers: ``"all"``, ``"attention"`` (W_q, W_k, W_v, W_o of every attention
            module), a glob or name, several of them, or ``callable(name, parameter) -> bool``.
        at: where τ starts instead of zero: a TaskVector or a mapping of parameter names to tensors
            of the parameters' shapes (post-hoc linearization of a fine-tuned model).
        name: how task vectors call this base; the class name of `model` by default.
        primal_dtype: the floating dtype of θ0, of floating buffers and so of what is computed;
            τ and its gradients keep the parameters' own. ``torch.bfloat16`` beside float32
            parameters is mixed precision without autocast: θ0 is cast once, here, and not shared.
            Inputs are to be given in it. `materialize` gives θ0 as cast, plus τ: add the task
            vector to the original model instead.

    Returns:
        A LinearizedModel. Training and evaluation mode are the model's.

    Raises:
        ValueError, TypeError: a selection or `at` that does not fit the model, or a model that
            cannot be linearized as it is built (the message says why and what to do).
    """
    if isinstance(model, (torch.jit.ScriptModule, LinearizedModel)):
        raise TypeError(
            f"linearize: expected an ordinary nn.Module, got {type(model).__name__}; "
            "pass the original Python module."
        )
    if primal_dtype is not None and not primal_dtype.is_floating_point:
        raise TypeError(f"linearize: primal_dtype is {primal_dtype}, expected a floating one.")
    names = select(model, params)
    named = dict(model.named_parameters())
    start = {} if at is None else dict(at)
    for key, tensor in start.items():
        if key not in names:
            raise ValueError(
                f"linearize: at[{key!r}] is not among the {len(names)} parameters of "
                f"params={describe(params)!r}; select it, or leave it out."
            )
        if tensor.shape != named[key].shape:
            raise ValueError(
                f"linearize: at[{key!r}] has shape {tuple(tensor.shape)}, "
                f"the parameter has {tuple(named[key].shape)}."
            )
    base = Base(name or type(model).__name__, fingerprint({n: named[n] for n in names}))
    lin = LinearizedModel(model, names, describe(params), base, primal_dtype)
    with torch.no_grad():
        for key, tensor in start.items():
            lin.tau[key].copy_(tensor)
    return lin


def _shared_copy(
    model: nn.Module, names: list[str], dtype: torch.dtype | None
) -> tuple[nn.Module, list[tuple[str, nn.Module, str]]]:
    """The module tree anew, on the same memory unless cast to `dtype`: frozen aliases of θ0, and τ
    beside the trained ones.
    """
    _check_structure(model, set(names))

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None or not t.is_floating_point() else t.to(dtype)

    memo: dict[int, Any] = {id(b): cast(b) for b in model.buffers()}
    taus: dict[int, nn.Parameter] = {}
    wanted = dict.fromkeys(names)
    for parameter_name, parameter in model.named_parameters():
        # Where nothing is cast it shares memory and version.
        alias = nn.Parameter(cast(parameter.detach()), requires_grad=False)
        memo[id(parameter)] = alias
        if parameter_name in wanted:
            taus[id(alias)] = nn.Parameter(torch.zeros_like(parameter, requires_grad=False))
    try:
        shared: nn.Module = copy.deepcopy(model, memo)
    except RuntimeError as error:
        raise ValueError(
            f"linearize: {type(model).__name__} keeps a tensor that was computed from its "
            f"parameters outside of forward ({error}). Compute it in forward; for weight norm use "
            "torch.nn.utils.parametrizations.weight_norm."
        ) from error
    sites = []
    for path, module in shared.named_modules(remove_duplicate=True):
        own = {n: taus[id(p)] for n, p in module._parameters.items() if id(p) in taus}
        if not own:
            continue
        anchor(module, own)
        prefix = f"{path}." if path else ""
        sites += [(prefix + n, module, n) for n in own if prefix + n in wanted]
    return shared, sites


def _check_structure(model: nn.Module, names: set[str]) -> None:
    """Refuse modules that reach a trained parameter past their own attribute."""
    trained = {id(p) for n, p in model.named_parameters() if n in names}
    for path, module in model.named_modules():
        own = {id(p) for p in module._parameters.values() if p is not None}
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            hidden = [t for t in tree_leaves(value) if isinstance(t, Tensor) and id(t) in trained]
            if hidden:
                raise ValueError(
                    f"linearize: {type(module).__name__} {path!r} reads trained parameters through "
                    f"{attribute!r}, where they cannot carry a tangent"
                    + (" (recurrent layers do)" if id(hidden[0]) in own else "")
                    + ". Leave them out of params, or read them as attributes in forward."
                )


def _leaves(*trees: Any) -> list[Any]:
    return tree_leaves(trees)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _whole(tensor: Tensor) -> Tensor:
    """A sharded (DTensor) parameter gathered; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def _linearized(x: Any) -> Any:
    if type(x) is Dual:
        (tangent,) = x.tangents
        return x.primal if tangent is None else x.primal + tangent
    if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point():
        raise RuntimeError(
            "linearized model: an output depends on the trained parameters but has lost its "
            "tangent. Expected every operation to be a torch function: replace the custom "
            "autograd.Function or extension that computes it."
        )
    return x
