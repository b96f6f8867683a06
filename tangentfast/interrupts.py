"""Signals held back while something is written that must be done whole or not at all."""

from __future__ import annotations

import signal
import threading
from typing import Any

DELAY = 3.0  # seconds from the end of a block to the delivery of what it held

_NAMES = "SIGINT SIGTERM SIGHUP SIGQUIT SIGALRM SIGVTALRM SIGPROF SIGUSR1 SIGUSR2 SIGBREAK"
_SIGNALS = [getattr(signal, name) for name in _NAMES.split() if hasattr(signal, name)]

_pending: dict[int, bool] = {}  # signals that came, in their order -> whether they are due
_came = 0  # signals that were held, ever
_holding = False


class held:
    """``with held():`` holds the signals that have a Python handler, such as Ctrl-C, for its block.

    They are delivered in the main thread `DELAY` seconds after the block, when its caller can no
    longer take the exception of a handler for one of the block; or before the first block that
    begins after that, so that a loop over blocks stops. The handlers are those of before when the
    block ends. Of a signal that comes just when they are put back, an exception other than
    KeyboardInterrupt comes out at the end of the block, after all of them are back. In other
    threads, which no handler interrupts, and within another such block this does nothing.
    """

    def __enter__(self) -> None:
        global _holding
        self.handlers: dict[int, Any] = {}
        if _holding or threading.current_thread() is not threading.main_thread():
            return
        _deliver()
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self.handlers[number] = handler
                    signal.signal(number, _hold)
            _holding = bool(self.handlers)
        except BaseException:  # of a handler not yet replaced
            self._give_back()
            raise

    def __exit__(self, *_: object) -> None:
        global _holding
        if self.handlers:
            _holding = False
            self._give_back()

    def _give_back(self) -> None:
        """Put the old handlers back, and set a timer for what is pending, whatever comes."""
        seen = -1
        error: BaseException | None = None
        while True:
            try:
                if _pending and seen != _came:
                    seen = _came
                    _deliver_later()
                for number, handler in list(self.handlers.items()):
                    signal.signal(number, handler)
                    del self.handlers[number]
                if not _pending or seen == _came:  # or else it came since the timer began
                    if error is None:
                        return  # here: after the loop, an exception would come out
                    break
            except KeyboardInterrupt:  # it came when the block was done, and its caller goes on
                _hold(signal.SIGINT, None)
            except BaseException as other:  # of another handler: all the same the rest
                error = other
        raise error


def _hold(number: int, _: object) -> None:
    global _came
    _came += 1
    _pending.setdefault(number, False)


def _deliver_later() -> None:
    timer = threading.Timer(DELAY, _come_due)
    timer.daemon = True
    timer.start()


def _come_due() -> None:
    """What is pending is due: at once, or when the block that runs now is over."""
    for number in list(_pending):
        _pending[number] = True
    if not _holding:
        _deliver()


def _deliver() -> None:
    """Send what is due to the main thread."""
    main = threading.main_thread()
    for number in [n for n, due in list(_pending.items()) if due]:
        if _pending.pop(number, None) is None:
            continue  # another thread was first
        if threading.current_thread() is main or not hasattr(signal, "pthread_kill"):
            signal.raise_signal(number)
        elif main.ident is not None:  # to that thread, so that it wakes from sleeping
            signal.pthread_kill(main.ident, number)
