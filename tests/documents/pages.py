"""Reads the code blocks of README.md and of the documentation's pages."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MEASURED = {"results.md"}
"""Pages whose commands take hours: their parsers check them."""
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name not in MEASURED
}
"""The text of the other pages, by their paths."""
COMMAND = re.compile(r"(?:\S*python -m crislit\.|crislit )(\w+) ?(.*)")


class Block(NamedTuple):
    """A code block.

    Attributes:
        page: The page's path.
        language: Of a fenced block; empty for an indented one, which holds shell commands.
        text: Its lines.
    """

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A command of crislit in a page."""

    page: str
    program: str
    arguments: tuple[str, ...]


def read_blocks(page: str, text: str) -> Iterator[Block]:
    """Yield the code blocks of a page."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, language, block)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?<=\n\n)((?: {4}\S.*\n|\n(?= {4}\S))+)", rest):
        yield Block(page, "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE))


BLOCKS = [block for page, text in PAGES.items() for block in read_blocks(page, text)]


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yield every line of shell code with its page, without comments."""
    for block in BLOCKS:
        if block.language in ("", "sh"):
            for line in block.text.splitlines():
                if command := re.sub(r"\s{2,}#.*", "", line).strip():
                    yield block.page, command


def commands() -> list[Command]:
    """Return every command of crislit, each once."""
    found: dict[tuple[str, ...], Command] = {}
    for page, line in shell_lines():
        if match := COMMAND.fullmatch(line):
            arguments = tuple(shlex.split(match[2]))
            found.setdefault((match[1], *arguments), Command(page, match[1], arguments))
    return list(found.values())


def python_blocks(page: str) -> list[str]:
    """Return the Python code of a page."""
    return [block.text for block in BLOCKS if block.page == page and block.language == "python"]
