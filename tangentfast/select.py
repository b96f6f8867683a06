"""Which parameters are trained: "all", "attention", globs, names, or a callable."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool]

# How libraries name the projections of one attention module: those of queries, keys and values, and
# that of the output. All of one row's inputs must be there for the row to apply.
_INPUTS = (
    ("in_proj",),
    ("qkv",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv_proj",),
    ("query_key_value",),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q", "kv"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("query_proj", "key_proj", "value_proj"),
)
_OUTPUTS = ("out_proj", "o_proj", "proj", "c_proj", "o", "out_lin", "to_out.0", "to_out", "out")
_PARENT_OUTPUT = (
    "output.dense"  # BERT, ViT, DINOv2, Swin: beside the module that has query, key, value
)


def select(model: nn.Module, params: Selection) -> list[str]:
    """Names of the selected parameters, in the order of ``model.named_parameters()``.

    Args:
        model: any module. Tied parameters count once, under their first name.
        params: ``"all"``: every floating-point parameter; ``"attention"``: the weights W_q, W_k,
            W_v, W_o of every attention module and nothing else (Jin et al. 2024, arXiv:2407.07089),
            as nn.MultiheadAttention, open_clip, timm, Hugging Face and torchvision name them; a
            glob or a name, or several; or ``callable(name, parameter) -> bool``.

    Raises:
        ValueError: a name or glob that matches no parameter, or a selection that is empty.
        TypeError: a selection of another type.
    """
    named = dict(model.named_parameters())
    if params == "all":
        chosen = {n for n, p in named.items() if p.is_floating_point()}
    elif params == "attention":
        chosen = _attention(model)
        if not chosen:
            raise ValueError(
                'params="attention": no attention module was recognised in '
                f"{type(model).__name__}. Name the weights by globs instead, such as "
                'params=["*.attn.*.weight"].'
            )
    elif callable(params):
        chosen = {n for n, p in named.items() if params(n, p)}
    elif isinstance(params, Iterable):
        chosen = set()
        for pattern in [params] if isinstance(params, str) else params:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"params: expected names or globs, got {type(pattern).__name__} in the list."
                )
            found = {n for n in named if n == pattern or fnmatchcase(n, pattern)}
            if not found:
                close = difflib.get_close_matches(pattern, named, 3, 0.4)
                raise ValueError(
                    f"params: {pattern!r} matches no parameter of {type(model).__name__}"
                    + (f"; close names: {', '.join(close)}" if close else "")
                    + '. Expected "all", "attention", a name or a glob.'
                )
            chosen |= found
    else:
        raise TypeError(
            f"params: expected a string, a list of them or a callable, got {type(params).__name__}."
        )
    integer = [n for n in chosen if not named[n].is_floating_point()]
    if integer:
        raise ValueError(f"params: {integer[0]!r} is {named[integer[0]].dtype}; expected floats.")
    if not chosen:
        raise ValueError(f"params: nothing of {type(model).__name__} was selected.")
    return [n for n in named if n in chosen]


def describe(params: Selection) -> str:
    """The selection in words, for reports and files."""
    if isinstance(params, str):
        return params
    if callable(params):
        return getattr(params, "__qualname__", "callable")
    return ", ".join(params)


def train_only(model: nn.Module, params: Selection) -> list[nn.Parameter]:
    """Let only the selected parameters of an ordinary model require grad, and freeze the rest, in
    place.

    With ``params="attention"`` this is the non-linear regime of Jin et al. (2024,
    arXiv:2407.07089).

    Returns:
        The trained parameters, for an optimizer.

    Raises:
        ValueError, TypeError: as `select`; the model is then unchanged.
    """
    chosen = set(select(model, params))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [p for n, p in model.named_parameters() if n in chosen]


def _attention(model: nn.Module) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    chosen: set[str] = set()

    def take(owner: nn.Module, weights: Iterable[str]) -> None:
        for weight in weights:
            parameter = getattr(owner, weight, None)
            if isinstance(parameter, nn.Parameter) and id(parameter) in names:
                chosen.add(names[id(parameter)])

    for path, module in model.named_modules():
        if (
            "in_proj_weight" in module._parameters
        ):  # nn.MultiheadAttention and those written after it
            take(module, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
            inputs: tuple[str, ...] | None = ()
        else:
            inputs = next((row for row in _INPUTS if all(_linear(module, n) for n in row)), None)
        if inputs is None:
            continue
        output = next((o for o in map(lambda n: _linear(module, n), _OUTPUTS) if o), None)
        if output is None and "." in path:
            output = _linear(model.get_submodule(path.rpartition(".")[0]), _PARENT_OUTPUT)
        if output is None:
            continue
        for name in inputs:
            take(_linear(module, name), ("weight",))  # type: ignore[arg-type]
        take(output, ("weight",))
    return chosen


def _linear(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at `path` if it is a linear map: a module with a two-dimensional weight."""
    try:
        found = module.get_submodule(path)
    except AttributeError:
        return None
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, nn.Parameter) and weight.dim() in (2, 4) else None
