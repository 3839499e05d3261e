"""Names of splits, and the name that was meant by a misspelled one."""

import difflib
from collections.abc import Iterable

SPLIT_ORDER = ("train", "val", "test", "testA", "testB")
"""Usual names of splits. Training needs the first two; all but the first are evaluated."""


def find_similar(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like another one, ignoring case; None if none is like it."""
    folded = {other.casefold(): other for other in names if other != name}
    matches = difflib.get_close_matches(name.casefold(), folded, 1, cutoff=0.5)
    return folded[matches[0]] if matches else None
