"""Words of messages: numbers with their nouns, and names that were meant."""

import difflib
from collections.abc import Iterable

SPLIT_ORDER = ("train", "val", "test", "testA", "testB")
"""Usual names of splits. Training needs the first two; all but the first are evaluated."""


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun, such as ``1 image`` and ``3 images``.

    Args:
        count: The number.
        singular: The noun, perhaps with a verb.
        plural: The same for other numbers than 1. Empty: the singular and an s.
    """
    return f"{count} {singular if count == 1 else plural or f'{singular}s'}"


def find_similar(name: str, names: Iterable[str]) -> str | None:
    """Return the name that is most like another one, ignoring case; None if none is like it."""
    folded = {other.casefold(): other for other in names if other != name}
    matches = difflib.get_close_matches(name.casefold(), folded, 1, cutoff=0.5)
    return folded[matches[0]] if matches else None
