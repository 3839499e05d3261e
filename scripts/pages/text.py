"""Lays out Markdown."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the repository."""
GENERATED = "<!-- Written by `python -m scripts.pages`: do not edit this page. -->"


def fill(text: str) -> str:
    """Wrap a paragraph at 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def escape(text: str) -> str:
    """Escape characters that Markdown or HTML would not show."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("|", "\\|")


def code(text: str) -> str:
    """Format text as code in a table's cell."""
    return f"`{text}`".replace("|", "\\|")


def join_blocks(blocks: Iterable[str]) -> str:
    """Return a page of blocks with an empty line between them."""
    return "\n\n".join([GENERATED, *blocks]) + "\n"
