"""Signals while merge_ writes: base is old or new as a whole, and the signal is never lost."""

from __future__ import annotations

import linecache
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tangentfast import interrupts
from tangentfast.interrupts import held
from tangentfast.merge import merge_
from tangentfast.ops import merge as op
from tangentfast.ops.backend import load_native

ROOT = Path(__file__).parent.parent
BACKENDS = ["reference", *(["native"] if load_native()[0] is not None else [])]
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")


class Told(Exception):
    """What a handler of these tests raises."""


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    """Three signals that raise `Told`, delivered at once; those of before afterwards."""
    monkeypatch.setattr(interrupts, "DELAY", 0.02)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours: dict[int, Any] = {}
    for number in SIGNALS:

        def tell(came: int, _: object) -> None:
            raise Told(came)

        ours[number] = tell
        signal.signal(number, tell)
    try:
        yield ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        interrupts._pending.clear()


def installed() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def await_told(number: int) -> None:
    with pytest.raises(Told) as told:
        time.sleep(5)
    assert told.value.args == (number,)


# The block --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number: int, handlers: dict[int, Any]) -> None:
    done = []
    with held():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        done.append(1)
    assert installed() == handlers
    await_told(number)
    assert done
    time.sleep(0.05)  # once
    assert not interrupts._pending


def test_several_signals_all_come(handlers: dict[int, Any]) -> None:
    came = []
    for number in SIGNALS:
        signal.signal(number, lambda n, _: came.append(n))
    with held():
        for number in reversed(SIGNALS):
            os.kill(os.getpid(), number)
        assert came == []
    deadline = time.monotonic() + 5
    while len(came) < len(SIGNALS) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(came) == sorted(SIGNALS)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_handlers_after_an_error(error: type[BaseException], handlers: dict[int, Any]) -> None:
    def fail() -> None:
        assert all(installed()[n] is not handlers[n] for n in SIGNALS)
        os.kill(os.getpid(), signal.SIGTERM)
        raise error

    with pytest.raises(error), held():
        fail()
    assert installed() == handlers
    await_told(signal.SIGTERM)


def test_a_block_within_a_block(handlers: dict[int, Any]) -> None:
    with held():
        outer = installed()
        with held():
            os.kill(os.getpid(), signal.SIGINT)
        assert installed() == outer
        time.sleep(0.06)  # longer than the delay: the inner end starts none
        with pytest.raises(ValueError), held():  # noqa: PT011
            raise ValueError
        assert installed() == outer
    assert installed() == handlers
    await_told(signal.SIGINT)


def test_the_next_block_is_stopped_before_it_begins(
    handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with held():
        os.kill(os.getpid(), signal.SIGINT)
        interrupts._come_due()  # a timer of an earlier block, while this one runs
    monkeypatch.setattr(interrupts, "DELAY", 1e6)
    entered = []
    with pytest.raises(Told), held():
        entered.append(1)
    assert entered == []
    assert installed() == handlers
    with held():
        entered.append(1)
    assert entered == [1]


def test_other_threads_hold_nothing(handlers: dict[int, Any]) -> None:
    seen = []

    def run() -> None:
        with held():
            seen.append(installed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with held():
        inner = installed()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert installed() == inner  # a block of another thread ends none of this one
    assert seen == [handlers, inner]
    assert installed() == handlers


@pytest.mark.parametrize("default", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_without_a_python_handler_are_left_alone(default: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, default)
    with held():
        assert all(signal.getsignal(n) is default for n in SIGNALS)
        if default is signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGINT)
    assert all(signal.getsignal(n) is default for n in SIGNALS)
    assert not interrupts._pending


@pytest.mark.parametrize("backend", BACKENDS)
def test_handlers_after_merges(backend: str, handlers: dict[int, Any]) -> None:
    base = {"a": torch.zeros(5), "b": torch.zeros(3)}
    merge_(base, {"a": torch.ones(5)}, backend=backend)
    assert installed() == handlers
    with pytest.raises(ValueError, match="shape"):
        merge_(base, {"a": torch.ones(5), "b": torch.ones(4)}, backend=backend)
    assert installed() == handlers
    assert not base["b"].any()
    with pytest.raises(ValueError, match="backend is 'none'"):
        merge_(base, {"a": torch.ones(5)}, backend="none")
    assert installed() == handlers


# A signal between any two lines of the block's ends -----------------------------------------------


def at_step(step: int, work: Callable[[], object], number: int) -> bool:
    """Do `work`, and raise a signal at the n-th line of interrupts.py; whether it has so many."""
    left = [step]

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename != interrupts.__file__:
            return None
        here = linecache.getline(interrupts.__file__, frame.f_lineno).strip()
        if here.startswith("return"):  # where Python itself looks for no signals
            return trace
        if event == "line" and threading.current_thread() is threading.main_thread():
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                signal.raise_signal(number)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return left[0] <= 0


@pytest.mark.parametrize("other", [False, True], ids=["alone", "after another"])
def test_at_every_line_of_entry_and_exit(
    other: bool, handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exception comes out and the block did not run, or it ran and the signal follows."""
    number, kind = signal.SIGINT, KeyboardInterrupt
    monkeypatch.setattr(interrupts, "DELAY", 0.003)
    came = []

    def interrupt(_: int, frame: object) -> None:
        came.append(number)
        raise kind

    signal.signal(number, interrupt)
    signal.signal(signal.SIGUSR1, lambda n, _: came.append(n))
    expected = installed()
    outcomes = set()
    for step in range(1, 200):
        came.clear()
        ran = []

        def work(ran: list[int] = ran) -> None:
            with held():
                if other:
                    os.kill(os.getpid(), signal.SIGUSR1)
                ran.append(1)

        try:
            reached = at_step(step, work, number)
            raised = False
        except kind:
            reached = raised = True
        assert installed() == expected
        if not reached:
            break
        assert raised == (not ran)
        try:
            deadline = time.monotonic() + 5
            while (not raised and number not in came) or interrupts._pending:
                assert time.monotonic() < deadline, f"lost at step {step}"
                time.sleep(0.002)
        except kind:
            pass
        assert number in came
        outcomes.add(raised)
        time.sleep(0.01 if other else 0)
    else:
        pytest.fail("no end")
    assert outcomes == {False, True}


def test_another_exception_at_every_line(handlers: dict[int, Any]) -> None:
    """It may come out after the block, but every handler is what it was, and nothing is lost."""
    for step in range(1, 200):

        def work() -> None:
            with held():
                pass

        try:
            reached = at_step(step, work, signal.SIGTERM)
            if reached:
                await_told(signal.SIGTERM)
        except Told:
            reached = True
        assert installed() == handlers
        assert not interrupts._holding
        if not reached:
            return
    pytest.fail("no end")


# Real signals at many moments of merge_ ----------------------------------------------------------

PRELUDE = """
import os, signal, sys, threading, time, random
import torch
from tangentfast import interrupts
from tangentfast.merge import merge_
backend, dtype, size = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
before = signal.getsignal(signal.SIGINT)
base = {f"p{i}": torch.randn(size).to(dtype) for i in range(60)}
vectors = [{n: torch.randn(size).to(dtype) for n in base} for _ in range(3)]
alphas = [{"*": 0.5}, {"*": -0.25}, {"*": 1.0}]  # which takes longer before the first write
def copy(): return {n: t.clone() for n, t in base.items()}
def same(a, b): return all(torch.equal(a[n], b[n]) for n in a)
new = merge_(copy(), vectors, alphas, backend=backend)
assert not same(new, base)
def kill_after(seconds, number=signal.SIGINT):
    def run():
        time.sleep(seconds)
        os.kill(os.getpid(), number)
    thread = threading.Thread(target=run)
    thread.start()
    return thread
"""


def run_child(code: str, *args: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


MOMENTS = """
interrupts.DELAY = 0.004
start = time.perf_counter()
for _ in range(3): merge_(copy(), vectors, alphas, backend=backend)
whole = (time.perf_counter() - start) / 3
random.seed(0)
counts = {"old": 0, "new": 0}
end = time.perf_counter() + 2
while time.perf_counter() < end:
    target, thread, interrupted, came = copy(), None, True, 0
    try:
        thread = kill_after(random.random() * random.choice([1.3 * whole, 1e-3]))
        merge_(target, vectors, alphas, backend=backend)
        interrupted = False
        came = 1  # what comes from here on is not of merge_
        thread.join()
        stop = time.perf_counter() + 5
        while time.perf_counter() < stop: time.sleep(0.001)
        raise SystemExit("the signal was lost")
    except KeyboardInterrupt:
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert not interrupts._pending and not interrupts._holding
    assert same(target, base if interrupted else new), (interrupted, counts)
    counts["old" if interrupted else "new"] += 1
assert min(counts.values()) > 0, counts
print(counts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_base_is_old_or_new(backend: str, dtype: str) -> None:
    run_child(MOMENTS, backend, dtype, 4_000)


LOOP = """
interrupts.DELAY = 0.05
target, done = copy(), 0
kill_after(0.02)
stop = time.perf_counter() + 10
try:
    while time.perf_counter() < stop:
        merge_(target, vectors, alphas, backend=backend)
        done += 1
    raise SystemExit("it did not stop")
except KeyboardInterrupt:
    pass
again = copy()
for _ in range(done): merge_(again, vectors, alphas, backend=backend)
after = {n: t.clone() for n, t in again.items()}
merge_(after, vectors, alphas, backend=backend)
assert same(target, again) or same(target, after)  # the last was done, or not begun
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_of_merges_stops(backend: str) -> None:
    run_child(LOOP, backend, "float32", 4_000)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_while_the_op_runs(backend: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = op.merge_

    def slow(*args: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.03)
        plain(*args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(op, "merge_", slow)
    base = {"w": torch.zeros(3)}
    merge_(base, {"w": torch.ones(3)}, backend=backend)
    assert base["w"].tolist() == [1.0] * 3
    await_told(number)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])
def test_a_handlers_error_is_none_of_the_merge(error: type[Exception]) -> None:
    """merge_ asks again where the op refuses: not where a handler raised the same exception."""

    def handler(*_: object) -> None:
        raise error("of the handler")

    signal.signal(signal.SIGTERM, handler)
    with held():
        os.kill(os.getpid(), signal.SIGTERM)
        interrupts._come_due()
    base = {"w": torch.zeros(3)}
    with pytest.raises(error, match="of the handler"):
        merge_(base, {"w": torch.ones(3)})
    assert not base["w"].any()
