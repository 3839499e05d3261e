"""Finds fonts for sentences in any script, so that plots show them without a flood of warnings."""

import functools
import logging
import unicodedata

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

log = logging.getLogger(__name__)
MISSING = "□"
"""Drawn for a character that no installed font has."""
_reported: set[str] = set()


def readable_text(text: str) -> tuple[str, list[str]]:
    """Return a text as it can be drawn, and the fonts that have its characters.

    Characters that no installed font has become squares, which one warning per process explains.

    Args:
        text: A sentence.

    Returns:
        The text, and the families for Matplotlib's argument ``family``.
    """
    text = "".join(
        " " if unicodedata.category(c) == "Cc" else c
        for c in text
        if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f"  # shape emoji
    )
    families = list(rcParams["font.family"])
    missing = set(text) - characters(
        font_manager.findfont(font_manager.FontProperties(family=families))
    )
    for name, path in installed_fonts() if missing else ():
        if found := missing & characters(path):
            families.append(name)
            missing -= found
    for character in missing:
        text = text.replace(character, MISSING)
    if missing and not _reported:
        _reported.update(missing)
        log.warning(
            "no installed font has the characters %s of a sentence: plots show them as %s. "
            "Install a font of their script, for example one of Noto",
            " ".join(sorted(missing))[:80],
            MISSING,
        )
    return text, families


@functools.cache
def installed_fonts() -> list[tuple[str, str]]:
    """Return family and path of the upright fonts of normal weight, sorted by name."""
    return sorted(
        (entry.name, entry.fname)
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and entry.weight in (400, "normal", "regular")
        # Last Resort has a box for every character.
        if not entry.name.startswith("Last Resort")
    )


@functools.cache
def characters(path: str) -> frozenset[str]:
    """Return the characters of a font; none if it cannot be read or scaled."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
