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
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tangentfast import dispatch, hooks  # noqa: F401 (`dispatch` is what torch calls on duals)
from tangentfast._torch import compiled_original, version
from tangentfast.anchor import anchor, anchored, release, theta0_of
from tangentfast.arguments import constant
from tangentfast.dual import Dual
from tangentfast.fingerprint import Base, checksum
from tangentfast.leftovers import Leftovers
from tangentfast.passes import Anchors, Pass, check_no_transform, is_narrow, running
from tangentfast.select import Selection, describe, select
from tangentfast.task_vector import TaskVector
from tangentfast.trees import tensors, tree_map


class LinearizedModel(nn.Module):
    """A network replaced by its first-order expansion at θ0; made by `linearize`.

    An ordinary module: same call signature and output structure as the original, every floating or
    complex tensor of the output linearized. ``parameters()`` are the trained τ, here and in a model
    that has this one as a part; θ0 is `theta0`. It is shared with the original model, which stays
    usable; changing its values in place afterwards is an error at the next call.
    """

    base: Base
    selection: str
    narrow: bool

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        selection: str,
        base: Base,
        dtype: torch.dtype | None = None,
        narrow: bool = False,
    ):
        super().__init__()
        self._anchors = Anchors()
        self.model, self._sites = _shared_copy(model, names, dtype, self._anchors)
        self.base = base
        self.selection = selection
        self.narrow = narrow
        self._trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        self._fallbacks: Counter[tuple[str, str]] = Counter()
        self.training = model.training  # every submodule keeps its own mode
        self.register_load_state_dict_post_hook(_after_loading)
        self._remember()

    @property
    def tau(self) -> dict[str, nn.Parameter]:
        """τ by the original model's parameter names: ``lin.tau["visual.proj"].grad``."""
        return {name: anchored(module)[own][1] for name, module, own in self._sites}

    @property
    def theta0(self) -> dict[str, nn.Parameter]:
        """θ0, frozen, by the original model's parameter names; all of it, trained or not."""
        return {name: parameter for name, _, _, parameter in places(self.model)}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters τ, and only those; θ0 is `theta0`."""
        taus = {id(tau) for tau in self.tau.values()}
        for name, parameter in super().named_parameters(*args, **kwargs):
            if id(parameter) in taus:  # torch.jit modules show their constants, too
                yield name, parameter

    @torch.compiler.disable  # dual numbers are not traced: the model runs as it is written
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """f(x; θ0) + J(x) τ.

        Raises:
            RuntimeError: θ0 was changed in place; an input requires grad; something in the network
                cannot be linearized exactly (the message names operation, module and remedy).
        """
        check_no_transform()
        self._check_base()
        hooks.carry_duals()
        recording = torch.is_grad_enabled()
        if recording and any(x.requires_grad for x in tensors((args, kwargs))):
            raise RuntimeError(
                "linearized model: an input requires grad, but the backward of a linearized model "
                "gives gradients to τ alone. Expected inputs without grad: detach() them, or use "
                "tangentfast.jvp for derivatives by the input."
            )
        if not recording:
            args, kwargs = tree_map(Tensor.detach, (args, kwargs))
        trained = recording and any(tau.requires_grad for tau in self.tau.values())
        # A sharded block's parameters are gathered and freed: copies would outlive them.
        casts = None if hooks.sharded(self.model) else self._casts
        pass_ = Pass(1, self.model, True, self._anchors, trained, casts, self.narrow)
        leftovers = Leftovers(self.model)
        try:
            with running(pass_):
                out = self.model(*args, **kwargs)
            out = tree_map(lambda x: _linearized(x, pass_), out)
            for name, module, own in self._sites:
                if casts is not None and id(anchored(module)[own][0]) not in pass_.read:
                    leftovers.check_read(name)
        finally:
            self._fallbacks.update(pass_.fallbacks)
            if pass_.handles.alive():
                leftovers.restore()
        return out

    def task_vector(self) -> TaskVector:
        """τ as a `TaskVector`: a copy, with θ0's fingerprint and the selection."""
        self._check_base()
        taus = {name: _whole(tau).detach().clone() for name, tau in self.tau.items()}
        return TaskVector(taus, base=self.base, selection=self.selection)

    def materialize(self) -> nn.Module:
        """The ordinary, non-linear model at θ0 + τ: new tensors, the original class, nothing
        shared.

        Raises:
            RuntimeError: θ0 was changed in place.
        """
        self._check_base()
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
        total = sum(p.numel() for p in self.theta0.values())
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

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda()
        result = super()._apply(*args, **kwargs)
        self._remember()
        return result

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise NotImplementedError(
            "DataParallel copies the tensors of a linearized model apart, θ0 from τ. Use "
            "DistributedDataParallel, as torch advises for every model."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_seen", "_casts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remember()

    def _remember(self) -> None:
        """Note where θ0 is, how often it was written and what it holds, to notice a change."""
        self._casts = WeakTensorKeyDictionary()
        self._seen = [
            (name, weakref.ref(p), module, own, version(p), checksum(p))
            for name, module, own, p in places(self.model)
            if not isinstance(module, torch.jit.ScriptModule)  # gives new objects at each reading
        ]

    def _check_base(self) -> None:
        for i, (name, known, module, own, seen, held) in enumerate(self._seen):
            theta0 = known()
            # A sharded model has other parameter objects, which are rewritten by each gather.
            if theta0 is None or theta0 is not dict.get(module._parameters, own):
                continue
            if version(theta0) == seen:
                continue
            if held is not None and checksum(theta0) == held:  # the same values written again
                self._seen[i] = name, known, module, own, version(theta0), held
                continue
            raise RuntimeError(
                f"linearized model: θ0 of {name!r} was changed in place after linearize, so that "
                "τ no longer belongs to it. Expected θ0 to stay as it was: linearize again, or "
                "linearize copy.deepcopy(model)."
            )


def _after_loading(lin: LinearizedModel, _: Any) -> None:
    """θ0 of a loaded state dict is θ0 from now on."""
    before = [place[-1] for place in lin._seen]
    lin._remember()
    if before != [place[-1] for place in lin._seen]:
        trained = {name: anchored(module)[own][0] for name, module, own in lin._sites}
        lin.base = Base.of(lin.base.name, trained)


def linearize(
    model: nn.Module,
    params: Selection = "all",
    *,
    at: Mapping[str, Tensor] | None = None,
    name: str | None = None,
    primal_dtype: torch.dtype | None = None,
    tangent_dtype: torch.dtype | None = None,
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
        tangent_dtype: ``torch.bfloat16``: the tangents' products of linear layers and patch
            embeddings round their float32 operands to bfloat16 (sums are float32 on a CPU). y =
            f(x; θ0) and its derivative, which gradients are, stay what they were; J τ is off by a
            few 1e-3 (docs/benchmarks.md).

    Returns:
        A LinearizedModel. Training and evaluation mode are the model's.

    Raises:
        ValueError, TypeError: a selection or `at` that does not fit the model, or a model that
            cannot be linearized as it is built (the message says why and what to do).
    """
    model = compiled_original(model)
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
    base = Base.of(name or type(model).__name__, {n: named[n] for n in names})
    narrow = is_narrow(tangent_dtype, "linearize")
    lin = LinearizedModel(model, names, describe(params), base, primal_dtype, narrow)
    with torch.no_grad():
        for key, tensor in start.items():
            lin.tau[key].copy_(tensor)
    return lin


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, its name there, parameter) of a model, tied ones once; θ0 where linearized."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for own, parameter in theta0_of(module).items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{own}" if path else own, module, own, parameter


def _shared_copy(
    model: nn.Module, names: list[str], dtype: torch.dtype | None, anchors: Anchors
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
    for module in model.modules():
        # Computed from parameters outside of forward: a constant, as torch.func has it. Pruning and
        # the older weight norm compute theirs anew in each forward.
        memo.update({id(x): x.detach() for x in tensors(vars(module)) if not x.is_leaf})
    try:
        shared: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"linearize: {type(model).__name__} cannot be copied ({error}). Expected copy.deepcopy "
            "to work: the modules are copied, the parameters are shared."
        ) from error
    sites = []
    for path, module in shared.named_modules(remove_duplicate=True):
        if isinstance(module, torch.jit.ScriptModule):
            for parameter in module.parameters():  # a copy; compiled code reads it by itself
                parameter.detach_()
            continue
        if not module._parameters:
            continue
        own = {n: taus[id(p)] for n, p in module._parameters.items() if id(p) in taus}
        anchor(module, own, anchors)
        prefix = f"{path}." if path else ""
        sites += [(prefix + n, module, n) for n in own if prefix + n in wanted]
    return shared, sites


def _check_structure(model: nn.Module, names: set[str]) -> None:
    """Refuse modules that reach a trained parameter past their own attribute."""
    trained = {id(p) for n, p in model.named_parameters() if n in names}
    for path, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted and any(id(p) in trained for p in module.parameters()):
            raise ValueError(
                f"linearize: {path!r} is compiled by torch.jit, where trained parameters cannot "
                "carry a tangent. Pass the original Python module, or leave it out of params."
            )
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


def _whole(tensor: Tensor) -> Tensor:
    """A sharded (DTensor) parameter gathered; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def _linearized(x: Tensor, pass_: Pass) -> Tensor:
    if type(x) is Dual:
        (tangent,) = x.tangents
        y = x.primal if tangent is None else x.primal + tangent
        return y if pass_.recording or not y.requires_grad else y.detach()
    return constant(x, pass_, "linearized model: an output") if x.requires_grad else x
