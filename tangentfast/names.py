"""Names of parameters in messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {rest} more" if rest > 0 else "")


def close_names(name: object, names: Iterable[str]) -> str:
    """The end of a message about a name that is not there: those that are like it."""
    close = get_close_matches(str(name), [n for n in names if isinstance(n, str)], n=3)
    return f"; close names are {', '.join(close)}" if close else ""
