"""The rules: how each torch function acts on dual numbers. One file a kind of function.

`RULES` is the whole table; importing this package fills it.
"""

from tangentfast.rules import (  # noqa: F401  (imported for what they register)
    attention,
    complex,
    elementwise,
    linear,
    losses,
    norm,
    random,
    reduction,
    sampling,
    shape,
    state,
)
from tangentfast.rules.registry import RULES

__all__ = ["RULES"]
