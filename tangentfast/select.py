"""Which parameters are trained: "all", "attention", globs, names, or a callable."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool]

# How libraries name W_q, W_k, W_v and W_o in an attention module: which of q, k, v and o a part
# projects to, and the names of its submodule, or of its parameter where it is one. A part is taken
# if it is a linear map, or a wrapper of one. Fused ones stand in a row of their own.
_NAMES = {
    "q": "q q_proj query to_q wq Wq q_lin query_proj project_q projection_query queries linear_q "
    "q_linear q_head q_attn q_proj_weight q_a_proj q_b_proj q_gate_proj q_content_proj q_pos_proj "
    "q_pos_sine_proj to_query add_q_proj query_global layout_query w2e_query e2w_query e2e_query "
    "linear_q_points receptance experts.input_linear",
    "k": "k k_proj key to_k wk Wk k_lin key_proj project_k projection_key linear_k k_linear k_head "
    "k_proj.linear k_proj_weight k_content_proj k_pos_proj to_key add_k_proj key_global layout_key "
    "key_protein key_structure key_msa",
    "v": "v v_proj value to_v wv Wv v_lin value_proj project_v projection_value linear_v v_linear "
    "v_head v_proj.linear v_proj_weight add_v_proj value_global layout_value value_protein "
    "value_structure value_msa v_gate v_proj_current v_proj_delayed values_vision_proj "
    "values_text_proj",
    "qk": "qk query_key attn attn_proj sampling_offsets attention_weights vision_proj text_proj",
    "kv": "kv to_kv wkv Wkv kv_proj keys_values kv_a_proj_with_mqa kv_b_proj linear_kv "
    "linear_kv_points",
    "qkv": "qkv qkv_proj Wqkv to_qkv query_key_value queries_keys_values c_attn in_proj_weight "
    "qkvs qkv_linear att_proj in_proj_qkv in_proj_qkvz pwise in_proj",
    "o": "proj out_proj o_proj o out out_lin to_out c_proj dense output output_proj projection "
    "proj_out wo Wo linear_out linear_o o_a_proj o_b_proj to_add_out layout_output post_attention "
    "post_proj post attention_out projection_layer project merge final linear out_vision_proj "
    "out_text_proj output_projection.o_proj o_proj.linear experts.output_linear",
}
_PARTS = {name: role for role, names in _NAMES.items() for name in names.split()}
_AMBIGUOUS = ("in_proj",)  # Mamba's, too: taken in a class that is called attention

_CALLED = re.compile(r"attn|attention|msa$|mha$", re.IGNORECASE)
_OTHERWISE = re.compile(r"Output$|MLP|FeedForward|Adapter|ChannelAttn|SplitAttn|SelectiveKernel")


def select(model: nn.Module, params: Selection) -> list[str]:
    """Names of the selected parameters, in the order of ``model.named_parameters()``.

    Args:
        model: any module. Tied parameters count once, under their first name.
        params: ``"all"``: every floating-point or complex parameter; ``"attention"``: the weights
            W_q, W_k, W_v, W_o of every attention module and nothing else (Jin et al. 2024,
            arXiv:2407.07089), as nn.MultiheadAttention, open_clip, timm, Hugging Face and
            torchvision name them; a glob or a name, or several; or
            ``callable(name, parameter) -> bool``.

    Raises:
        ValueError: a name or glob that matches no parameter, a selection that is empty, or an
            attention module whose projections are not recognised by their names.
        TypeError: a selection of another type.
    """
    named = dict(model.named_parameters())
    if params == "all":
        chosen = {n for n, p in named.items() if _has_derivative(p)}
    elif params == "attention":
        chosen = _attention(model)
    elif callable(params):
        chosen = {n for n, p in named.items() if params(n, p)}
    elif isinstance(params, Iterable):
        chosen = set()
        for pattern in [params] if isinstance(params, str) else params:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"params: expected names or globs, got {type(pattern).__name__} in the list."
                )
            matches = {n for n in named if n == pattern or fnmatchcase(n, pattern)}
            if not matches:
                close = difflib.get_close_matches(pattern, named, 3, 0.4)
                raise ValueError(
                    f"params: {pattern!r} matches no parameter of {type(model).__name__}"
                    + (f"; close names: {', '.join(close)}" if close else "")
                    + '. Expected "all", "attention", a name or a glob.'
                )
            chosen |= matches
    else:
        raise TypeError(
            f"params: expected a string, a list of them or a callable, got {type(params).__name__}."
        )
    integer = [n for n in chosen if not _has_derivative(named[n])]
    if integer:
        raise ValueError(f"params: {integer[0]!r} is {named[integer[0]].dtype}; expected floats.")
    if not chosen:
        raise ValueError(f"params: nothing of {type(model).__name__} was selected.")
    return [n for n in named if n in chosen]


def _has_derivative(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


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
    """The weights of every attention module.

    Raises:
        ValueError: there is none, or one that is called so, or a part of one, was not recognised.
    """
    modules = dict(model.named_modules())
    known = {path: weights for path in modules if (weights := _projections(modules, path))}
    chosen = {id(w) for weights in known.values() for w in weights}
    missed = _missed(modules, known, chosen)
    if known and not missed:
        return {n for n, p in model.named_parameters() if id(p) in chosen}
    name = type(model).__name__
    if known:
        what = f"of {len(known) + len(missed)} attention modules of {name} {len(missed)} were not "
    else:
        what = f"no attention module was recognised in {name}"
    if missed:
        some = ", ".join(f"{type(modules[p]).__name__} {p!r}" for p in missed[:3])
        what += f"recognised by the names of their projections: {some}" if known else f" ({some})"
        what += ", …" if len(missed) > 3 else ""
    raise ValueError(
        f'params="attention": {what}. Name the weights by globs instead, such as '
        'params=["*.attn.*.weight"].'
    )


def _projections(modules: Mapping[str, nn.Module], path: str) -> list[Tensor]:
    """The weights W_q, W_k, W_v, W_o of the module at `path`; none if it is no attention."""
    module, (above, _, own) = modules[path], path.rpartition(".")
    parts = {n: w for n in _named(module) if (w := _weights(module, n))}
    if not _is_called(module):
        parts = {n: w for n, w in parts.items() if n not in _AMBIGUOUS}
    inputs = {letter for n in parts for letter in _PARTS[n]} - {"o"}
    if not inputs:
        return []
    if path and not any(_PARTS[n] == "o" for n in parts):
        # BERT, Swin: W_o is beside the module that has query, key and value
        parent = modules[above]
        around = _is_called(parent) or _CALLED.search(above.rpartition(".")[2])
        for n in _named(parent):
            if _PARTS[n] == "o" and (around or _CALLED.search(n)):
                parts[n] = _weights(parent, n)
    # Other modules have parts with some of these names, but hardly all.
    complete = inputs == set("qkv") and any(w for n, w in parts.items() if _PARTS[n] == "o")
    if not complete and not _is_called(module) and not _CALLED.search(own):
        return []
    return [w for weights in parts.values() for w in weights]


def _missed(
    modules: Mapping[str, nn.Module], known: Mapping[str, list[Tensor]], chosen: Container[int]
) -> list[str]:
    """Modules that are called attention, and parts of the table in those of `known`, that have
    linear maps of which none was chosen.
    """

    def left(module: nn.Module) -> int:
        maps = _maps(module)
        return 0 if any(id(w) in chosen for w in maps) else len(maps)

    missed: list[str] = []
    for path in known:
        module = modules[path]
        parts = [n for n in _named(module) if "." not in n and n not in module._parameters]
        if any(part is not None and left(part) for part in map(module._modules.get, parts)):
            missed.append(path)
    inside = tuple(f"{path}." if path else "" for path in known)
    for path, module in modules.items():
        # one linear map is a gate or a score, such as there are in convolutional networks
        if _is_called(module) and left(module) > 1 and not (inside and path.startswith(inside)):
            missed.append(path)
    return [p for p in missed if not any(q != p and q.startswith(p) for q in missed)]


def _is_called(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(_CALLED.search(name)) and not _OTHERWISE.search(name)


def _named(module: nn.Module) -> list[str]:
    """The names of the table that may be in a module."""
    own = module._modules.keys() | module._parameters.keys()
    return [n for n in _PARTS if n.partition(".")[0] in own] if own else []


def _weights(module: nn.Module, path: str) -> list[Tensor]:
    """The weight of the linear map at `path`: one of its own parameters, a submodule, or what a
    submodule (or each one of a list) wraps.
    """
    own = module._parameters.get(path)
    if own is not None:  # `query` alone is what a pooling has learnt to ask, and no map
        maps = path.endswith("weight") or {"q", "k", "v"} <= module._parameters.keys()
        return [own] if maps and own.dim() > 1 else []
    try:
        part = module.get_submodule(path)
    except AttributeError:
        return []
    if (weight := _map(part)) is not None:
        return [weight]
    if _is_called(part):
        return []
    wrapped = [_maps(one) for one in (part if isinstance(part, nn.ModuleList) else [part])]
    return [] if any(len(w) > 1 for w in wrapped) else [w for ws in wrapped for w in ws]


def _maps(module: nn.Module) -> list[Tensor]:
    """The weights of all linear maps in a module."""
    return [w for m in module.modules() if (w := _map(m)) is not None]


def _map(module: nn.Module) -> Tensor | None:
    """The weight of a linear map: a matrix, several of them, or 1x1 kernels; else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
        return None
    if isinstance(module, (nn.Embedding, nn.LayerNorm, nn.RMSNorm)):
        return None
    convolution = weight.dim() > 3 or hasattr(module, "kernel_size")
    return weight if not convolution or all(n == 1 for n in weight.shape[2:]) else None
