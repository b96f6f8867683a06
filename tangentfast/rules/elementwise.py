"""Elementwise functions.

The Jacobian of y_i = f(x_i) is diagonal, so JVP and VJP are one function: PyTorch's own backward
kernel, applied to the tangent, is the JVP, exact and in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tangentfast.ops.activation import activation_jvp
from tangentfast.rules.registry import Jvp, fused, jointly, rule

aten = torch.ops.aten
Derivative = Callable[[Tensor, Tensor, Tensor], Tensor]  # (dx, x, y) -> dy


def _along(dx: Tensor, direction: Tensor) -> Tensor:
    """The part of dx along a direction in the complex plane, or on the real line."""
    return (dx * direction.conj()).real if direction.is_complex() else dx * direction


UNARY: dict[str, Derivative] = {
    "exp": lambda dx, x, y: dx * y,
    "exp2": lambda dx, x, y: dx * y * math.log(2),
    "expm1": lambda dx, x, y: torch.addcmul(dx, dx, y),
    "log": lambda dx, x, y: dx / x,
    "log2": lambda dx, x, y: dx / (x * math.log(2)),
    "log10": lambda dx, x, y: dx / (x * math.log(10)),
    "log1p": lambda dx, x, y: dx / (x + 1),
    "sqrt": lambda dx, x, y: dx / (2 * y),
    "rsqrt": lambda dx, x, y: dx * y.pow(3) * -0.5,
    "square": lambda dx, x, y: dx * x * 2,
    "reciprocal": lambda dx, x, y: -dx * y * y,
    "sin": lambda dx, x, y: dx * x.cos(),
    "cos": lambda dx, x, y: -dx * x.sin(),
    "tan": lambda dx, x, y: torch.addcmul(dx, dx * y, y),
    "sinh": lambda dx, x, y: dx * x.cosh(),
    "cosh": lambda dx, x, y: dx * x.sinh(),
    "asin": lambda dx, x, y: dx * (1 - x * x).rsqrt(),
    "acos": lambda dx, x, y: -dx * (1 - x * x).rsqrt(),
    "atan": lambda dx, x, y: dx / (1 + x * x),
    "erf": lambda dx, x, y: dx * torch.exp(-x * x) * (2 / math.sqrt(math.pi)),
    "erfc": lambda dx, x, y: dx * torch.exp(-x * x) * (-2 / math.sqrt(math.pi)),
    "abs": lambda dx, x, y: _along(dx, x.sgn()),
    "absolute": lambda dx, x, y: _along(dx, x.sgn()),
    "tanh": lambda dx, x, y: aten.tanh_backward(dx, y),
    "sigmoid": lambda dx, x, y: aten.sigmoid_backward(dx, y),
    "expit": lambda dx, x, y: aten.sigmoid_backward(dx, y),
    "softsign": lambda dx, x, y: dx / (1 + x.abs()).square(),
    "tanhshrink": lambda dx, x, y: dx * x.tanh().square(),
    "logsigmoid": lambda dx, x, y: dx * torch.sigmoid(-x),
    "nan_to_num": lambda dx, x, y: dx * torch.isfinite(x),
}

# torch's backward kernels take the conjugate of the slope, and two functions are not of x alone.
REAL = {"tanh", "sigmoid", "expit", "softsign", "logsigmoid", "nan_to_num"}

# With the parameters after the first; the derivative gets all but `inplace`.
PARAMETRIC: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "relu": ("inplace=False", lambda dx, x, y: aten.threshold_backward(dx, y, 0)),
    "relu6": ("inplace=False", lambda dx, x, y: aten.hardtanh_backward(dx, x, 0, 6)),
    "mish": ("inplace=False", lambda dx, x, y: aten.mish_backward(dx, x)),
    "hardswish": ("inplace=False", lambda dx, x, y: aten.hardswish_backward(dx, x)),
    "hardsigmoid": ("inplace=False", lambda dx, x, y: aten.hardsigmoid_backward(dx, x)),
    "selu": (
        "inplace=False",
        lambda dx, x, y: aten.elu_backward(
            dx, 1.6732632423543772, 1.0507009873554805, 1.0, False, x
        ),
    ),
    "elu": (
        "alpha=1.0 inplace=False",
        lambda dx, x, y, alpha: aten.elu_backward(dx, alpha, 1, 1, False, x),
    ),
    "celu": (
        "alpha=1.0 inplace=False",
        lambda dx, x, y, alpha: aten.elu_backward(dx, alpha, 1, 1 / alpha, False, x),
    ),
    "leaky_relu": (
        "negative_slope=0.01 inplace=False",
        lambda dx, x, y, slope: aten.leaky_relu_backward(dx, x, slope, False),
    ),
    "threshold": (
        "threshold value inplace=False",
        lambda dx, x, y, threshold, value: aten.threshold_backward(dx, x, threshold),
    ),
    "hardtanh": (
        "min_val=-1.0 max_val=1.0 inplace=False",
        lambda dx, x, y, low, high: aten.hardtanh_backward(dx, x, low, high),
    ),
    "softplus": (
        "beta=1 threshold=20",
        lambda dx, x, y, beta, threshold: aten.softplus_backward(dx, x, beta, threshold),
    ),
}


def _unary(
    name: str, derivative: Callable[..., Tensor], parameters: str = "", complex: bool = False
) -> None:
    count = len(parameters.replace("inplace=False", "").split())

    @rule(name, complex=complex, parameters="input " + parameters, itself=True)
    def unary(function: Callable[..., Any], input: Tensor, *rest: Any) -> tuple[Tensor, Jvp]:
        options = rest[:count]
        y = function(input, *options)
        return y, lambda dx: derivative(dx, input, y, *options)


for _name, _derivative in UNARY.items():
    _unary(_name, _derivative, complex=_name not in REAL)
for _name, (_parameters, _derivative) in PARAMETRIC.items():
    _unary(_name, _derivative, _parameters)


def _first(tangents: Sequence[Any]) -> list[Any]:
    """Of each tangent's arguments the first."""
    return [row and row[0] for row in tangents]


@fused("gelu")
def gelu(
    tangents: Any, input: Tensor, approximate: str = "none"
) -> tuple[Tensor, list[Any]] | None:
    kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None if kind is None else activation_jvp(input, kind, _first(tangents))


@fused("silu")
def silu(tangents: Any, input: Tensor, inplace: bool = False) -> tuple[Tensor, list[Any]]:
    return activation_jvp(input, "silu", _first(tangents))


@rule("add", complex=True)
def add_(input: Any, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp, Jvp]:
    y = torch.add(input, other, alpha=alpha)
    return y, lambda dx: dx, lambda dother: dother if alpha == 1 else alpha * dother


# Both tangents in one pass over memory.
@jointly("sub", "subtract", complex=True)
def sub(input: Any, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, dother: Tensor | None, _: None = None) -> Tensor | None:
        if dx is None or dother is None:
            return dx if dother is None else -alpha * dother
        return torch.sub(dx, dother, alpha=alpha)

    return torch.sub(input, other, alpha=alpha), jvp


@jointly("mul", "multiply", complex=True)
def mul(input: Any, other: Any) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, dother: Tensor | None) -> Tensor:
        if dx is None or dother is None:
            return input * dother if dx is None else dx * other
        return torch.addcmul(dx * other, input, dother)

    return torch.mul(input, other), jvp


@jointly("div", "divide", "true_divide", complex=True)
def div(input: Any, other: Any, rounding_mode: str | None = None) -> tuple[Tensor, Jvp]:
    y = torch.div(input, other, rounding_mode=rounding_mode)

    def jvp(dx: Tensor | None, dother: Tensor | None, _: None = None) -> Tensor | None:
        if rounding_mode is not None:
            return None
        if dother is None:
            return dx / other
        return (-y * dother if dx is None else dx - y * dother) / other

    return y, jvp


@rule("pow", "__pow__", complex=True)  # x ** 2 is not Tensor.pow
def pow(input: Any, exponent: Any) -> tuple[Tensor, Jvp, Jvp]:
    y = torch.pow(input, exponent)

    def by_base(dx: Tensor) -> Tensor:
        slope = exponent * torch.pow(input, exponent - 1)
        # 0 * 0^-1 is 0 here: a constant power 0 has no slope anywhere.
        zero_power = exponent == 0
        if isinstance(zero_power, Tensor):
            slope = torch.where(zero_power, 0, slope)
        elif zero_power:
            slope = torch.zeros_like(input)
        return dx * slope

    def by_exponent(dexponent: Tensor) -> Tensor:
        base = torch.as_tensor(input, dtype=y.dtype, device=y.device)
        # y log(base), with 0^p log 0 = 0 as autograd has it
        return dexponent * torch.where((base == 0) & (y == 0), 0, y * base.log())

    return y, by_base, by_exponent


@jointly(Tensor.__rsub__, complex=True)
def reversed_sub(self: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = sub(other, self)
    return y, lambda dx, dother: jvp(dother, dx)


@jointly(Tensor.__rdiv__, Tensor.__rtruediv__, complex=True)
def reversed_div(self: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = div(other, self)
    return y, lambda dx, dother: jvp(dother, dx)


@rule(Tensor.__rpow__, complex=True)
def reversed_pow(self: Tensor, other: Any) -> tuple[Tensor, Jvp, Jvp]:
    y, by_other, by_self = pow(torch.as_tensor(other, dtype=self.dtype, device=self.device), self)
    return y, by_self, by_other


@jointly("rsub", complex=True)
def rsub(input: Tensor, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp]:
    y, jvp = sub(other, input, alpha)
    return y, lambda dx, dother, _: jvp(dother, dx)


@rule("addcmul", complex=True)
def addcmul(input: Tensor, tensor1: Any, tensor2: Any, value: float = 1) -> tuple[Any, ...]:
    return (
        torch.addcmul(input, tensor1, tensor2, value=value),
        lambda dx: dx,
        lambda da: da * tensor2 * value,
        lambda db: tensor1 * db * value,
    )


@rule("addcdiv", complex=True)
def addcdiv(input: Tensor, tensor1: Any, tensor2: Any, value: float = 1) -> tuple[Any, ...]:
    return (
        torch.addcdiv(input, tensor1, tensor2, value=value),
        lambda dx: dx,
        lambda da: da * value / tensor2,
        lambda db: -value * tensor1 * db / tensor2.square(),
    )


@rule("lerp", complex=True)
def lerp(input: Tensor, end: Tensor, weight: Any) -> tuple[Any, ...]:
    return (
        torch.lerp(input, end, weight),
        lambda dx: dx * (1 - weight),
        lambda dend: dend * weight,
        lambda dweight: dweight * (end - input),
    )


def _tied(parameters: str, *names: str) -> None:
    """A choice among operands: the slopes of torch's own backward; versions share a tie unlike."""

    @rule(*names, parameters=parameters, itself=True)
    def choose(function: Callable[..., Any], *operands: Any) -> tuple[Any, ...]:
        y = function(*operands)

        def by(i: int) -> Jvp:
            def jvp(dx: Tensor) -> Tensor:
                again = list(operands)
                again[i] = operands[i].expand(y.shape).detach().requires_grad_()
                with torch.enable_grad():
                    total = function(*again).sum()
                return dx * torch.autograd.grad(total, again[i])[0]

            return jvp

        return y, *map(by, range(len(operands)))


_tied("input min=None max=None", "clamp", "clip")
_tied("input min", "clamp_min")
_tied("input max", "clamp_max")
_tied("input other", "maximum", "minimum", "fmax", "fmin")
