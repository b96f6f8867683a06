"""Which handles share memory, and that those which died are forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from tangentfast.dual import Dual, make_dual
from tangentfast.passes import Pass


def handle(x: Tensor, pass_: Pass) -> Dual:
    return make_dual(x, [torch.ones_like(x)], pass_)


def test_handles_of_one_memory() -> None:
    pass_ = Pass(1)
    x, other = torch.zeros(4), torch.zeros(4)
    whole, row, alone = handle(x, pass_), handle(x[1:], pass_), handle(other, pass_)
    assert {id(h) for h in pass_.handles.of(x)} == {id(whole), id(row)}
    late = handle(x[:2], pass_)  # after the others were sorted
    assert {id(h) for h in pass_.handles.of(x[3:])} == {id(whole), id(row), id(late)}
    del row
    assert {id(h) for h in pass_.handles.of(x)} == {id(whole), id(late)}
    assert [id(h) for h in pass_.handles.of(other)] == [id(alone)]
    assert pass_.handles.of(torch.zeros(4)) == []


def test_the_dead_are_forgotten() -> None:
    """A long loop on dual numbers holds no more than those that live, sorted by a write or not."""
    pass_ = Pass(1)
    x = torch.zeros(4)
    held = handle(x, pass_)
    for i in range(5000):
        handle(torch.zeros(1), pass_)
        if i % 7 == 0:
            assert len(pass_.handles.of(x)) == 1
    assert len(pass_.handles._all()) < 2000
    assert pass_.handles.alive()
    del held
    assert not pass_.handles.alive()
