"""Elementwise functions.

The Jacobian of y_i = f(x_i) is diagonal, so JVP and VJP are one function: PyTorch's own backward
kernel, applied to the tangent, is the JVP, exact and in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tangentfast.ops.activation import activation_jvp
from tangentfast.rules.registry import Jvp, add, functions, fused, rule

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

# The same with an `inplace` argument.
UNARY_INPLACE: dict[str, Derivative] = {
    "relu": lambda dx, x, y: aten.threshold_backward(dx, y, 0),
    "relu6": lambda dx, x, y: aten.hardtanh_backward(dx, x, 0, 6),
    "mish": lambda dx, x, y: aten.mish_backward(dx, x),
    "hardswish": lambda dx, x, y: aten.hardswish_backward(dx, x),
    "hardsigmoid": lambda dx, x, y: aten.hardsigmoid_backward(dx, x),
    "selu": lambda dx, x, y: aten.elu_backward(
        dx, 1.6732632423543772, 1.0507009873554805, 1.0, False, x
    ),
}


def _unary(function: Callable[..., Any], derivative: Derivative, complex: bool) -> None:
    @rule(function, complex=complex)
    def unary(input: Tensor) -> tuple[Tensor, Jvp]:
        y = function(input)
        return y, lambda dx: derivative(dx, input, y)


def _unary_inplace(function: Callable[..., Any], derivative: Derivative) -> None:
    @rule(function)
    def unary(input: Tensor, inplace: bool = False) -> tuple[Tensor, Jvp]:
        y = function(input)
        return y, lambda dx, *_: derivative(dx, input, y)


for _name, _derivative in UNARY.items():
    for _function in functions(_name):
        _unary(_function, _derivative, _name not in REAL)
for _name, _derivative in UNARY_INPLACE.items():
    for _function in functions(_name):
        _unary_inplace(_function, _derivative)


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


@rule("leaky_relu")
def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> tuple[Tensor, Jvp]:
    return (
        F.leaky_relu(input, negative_slope),
        lambda dx, *_: aten.leaky_relu_backward(dx, input, negative_slope, False),
    )


@rule("elu")
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> tuple[Tensor, Jvp]:
    return F.elu(input, alpha), lambda dx, *_: aten.elu_backward(dx, alpha, 1, 1, False, input)


@rule("celu")
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> tuple[Tensor, Jvp]:
    return (
        F.celu(input, alpha),
        lambda dx, *_: aten.elu_backward(dx, alpha, 1, 1 / alpha, False, input),
    )


@rule("threshold")
def threshold(
    input: Tensor, threshold: float, value: float, inplace: bool = False
) -> tuple[Tensor, Jvp]:
    return (
        F.threshold(input, threshold, value),
        lambda dx, *_: aten.threshold_backward(dx, input, threshold),
    )


@rule("hardtanh")
def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Tensor, Jvp]:
    return (
        F.hardtanh(input, min_val, max_val),
        lambda dx, *_: aten.hardtanh_backward(dx, input, min_val, max_val),
    )


@rule("softplus")
def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> tuple[Tensor, Jvp]:
    return (
        F.softplus(input, beta, threshold),
        lambda dx, *_: aten.softplus_backward(dx, input, beta, threshold),
    )


@rule("add", complex=True)
def add_(input: Any, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, dother: Tensor | None, _: None) -> Tensor | None:
        return add(dx, dother if dother is None or alpha == 1 else alpha * dother)

    return torch.add(input, other, alpha=alpha), jvp


@rule("sub", "subtract", complex=True)
def sub(input: Any, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, dother: Tensor | None, _: None) -> Tensor | None:
        if dx is None or dother is None:
            return dx if dother is None else -alpha * dother
        return torch.sub(dx, dother, alpha=alpha)

    return torch.sub(input, other, alpha=alpha), jvp


@rule("mul", "multiply", complex=True)
def mul(input: Any, other: Any) -> tuple[Tensor, Jvp]:
    def jvp(dx: Tensor | None, dother: Tensor | None) -> Tensor:
        if dx is None or dother is None:
            return input * dother if dx is None else dx * other
        return torch.addcmul(dx * other, input, dother)

    return torch.mul(input, other), jvp


@rule("div", "divide", "true_divide", complex=True)
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
def pow(input: Any, exponent: Any) -> tuple[Tensor, Jvp]:
    y = torch.pow(input, exponent)

    def jvp(dx: Tensor | None, dexponent: Tensor | None) -> Tensor | None:
        through_base = None
        if dx is not None:
            slope = exponent * torch.pow(input, exponent - 1)
            # 0 * 0^-1 is 0 here: a constant power 0 has no slope anywhere.
            zero_power = exponent == 0
            if isinstance(zero_power, Tensor):
                slope = torch.where(zero_power, 0, slope)
            elif zero_power:
                slope = torch.zeros_like(input)
            through_base = dx * slope
        if dexponent is None:
            return through_base
        base = torch.as_tensor(input, dtype=y.dtype, device=y.device)
        # y log(base), with 0^p log 0 = 0 as autograd has it
        slope = torch.where((base == 0) & (y == 0), 0, y * base.log())
        return add(through_base, dexponent * slope)

    return y, jvp


@rule(Tensor.__rsub__, complex=True)
def reversed_sub(self: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = sub(other, self)
    return y, lambda dx, dother: jvp(dother, dx, None)


@rule(Tensor.__rdiv__, Tensor.__rtruediv__, complex=True)
def reversed_div(self: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = div(other, self)
    return y, lambda dx, dother: jvp(dother, dx)


@rule(Tensor.__rpow__, complex=True)
def reversed_pow(self: Tensor, other: Any) -> tuple[Tensor, Jvp]:
    y, jvp = pow(torch.as_tensor(other, dtype=self.dtype, device=self.device), self)
    return y, lambda dx, dother: jvp(dother, dx)


@rule("rsub", complex=True)
def rsub(input: Tensor, other: Any, alpha: float = 1) -> tuple[Tensor, Jvp]:
    y, jvp = sub(other, input, alpha)
    return y, lambda dx, dother, _: jvp(dother, dx, None)


@rule("addcmul", complex=True)
def addcmul(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1
) -> tuple[Tensor, Jvp]:
    def jvp(dx: Any, da: Any, db: Any, _: None) -> Tensor | None:
        products = add(
            None if da is None else da * tensor2 * value,
            None if db is None else tensor1 * db * value,
        )
        return add(dx, products)

    return torch.addcmul(input, tensor1, tensor2, value=value), jvp


@rule("addcdiv", complex=True)
def addcdiv(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1
) -> tuple[Tensor, Jvp]:
    def jvp(dx: Any, da: Any, db: Any, _: None) -> Tensor | None:
        quotients = add(
            None if da is None else da * value / tensor2,
            None if db is None else -value * tensor1 * db / tensor2.square(),
        )
        return add(dx, quotients)

    return torch.addcdiv(input, tensor1, tensor2, value=value), jvp


@rule("lerp", complex=True)
def lerp(input: Tensor, end: Tensor, weight: Any) -> tuple[Tensor, Jvp]:
    def jvp(dx: Any, dend: Any, dweight: Any) -> Tensor | None:
        moved = add(
            None if dx is None else dx * (1 - weight), None if dend is None else dend * weight
        )
        return add(moved, None if dweight is None else dweight * (end - input))

    return torch.lerp(input, end, weight), jvp


def _tied(function: Callable[..., Tensor], *operands: Any) -> tuple[Tensor, Jvp]:
    """A choice among operands: the slopes of torch's own backward; versions share a tie unlike."""
    y = function(*operands)

    def jvp(*tangents: Tensor | None) -> Tensor | None:
        moving = [i for i, d in enumerate(tangents) if d is not None]
        again = list(operands)
        with torch.enable_grad():
            for i in moving:
                again[i] = operands[i].expand(y.shape).detach().requires_grad_()
            total = function(*again).sum()
        slopes = torch.autograd.grad(total, [again[i] for i in moving])
        dy = None
        for i, slope in zip(moving, slopes, strict=True):
            dy = add(dy, tangents[i] * slope)  # type: ignore[operator]
        return dy

    return y, jvp


@rule("clamp", "clip")
def clamp(input: Tensor, min: Any = None, max: Any = None) -> tuple[Tensor, Jvp]:
    return _tied(torch.clamp, input, min, max)


@rule("clamp_min")
def clamp_min(input: Tensor, min: Any) -> tuple[Tensor, Jvp]:
    return _tied(torch.clamp_min, input, min)


@rule("clamp_max")
def clamp_max(input: Tensor, max: Any) -> tuple[Tensor, Jvp]:
    return _tied(torch.clamp_max, input, max)


def _chosen(function: Callable[..., Any]) -> None:
    @rule(function)
    def choose(input: Tensor, other: Tensor) -> tuple[Tensor, Jvp]:
        return _tied(function, input, other)


for _function in functions("maximum", "minimum", "fmax", "fmin"):
    _chosen(_function)
