"""Writes the generated pages of the documentation: configuration, commands and results.

    python -m scripts.pages            # writes the three pages
    python -m scripts.pages --check    # checks that they are up to date, and the docstrings

The configuration comes from ``conf/`` and its comments, the commands from their ``--help``, and the
results from ``results/``. The other pages show docstrings of public names, which must not lack any.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scripts.pages.commands import commands_page
from scripts.pages.configuration import configuration_page
from scripts.pages.docstrings import docstring_violations
from scripts.pages.results import results_page
from scripts.pages.text import ROOT

from crislit.errors import InputError, one_line_errors
from crislit.io import write_text

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/configuration.md": lambda: configuration_page(ROOT / "conf"),
    "docs/reference/commands.md": commands_page,
    "docs/results.md": results_page,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages, or check them and the docstrings."""
    parser = argparse.ArgumentParser(
        "python -m scripts.pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, check what there is")
    options = parser.parse_args(arguments)
    with one_line_errors():
        pages = {name: build() for name, build in PAGES.items()}
        if options.check:
            check_pages(ROOT, pages)
            check_docstrings(ROOT / "src")
            return
        for name, text in pages.items():
            write_text(ROOT / name, text)


def check_pages(root: Path, pages: Mapping[str, str]) -> None:
    """Compare pages with those on disk.

    Args:
        root: The folder of the repository.
        pages: The content of each page, by its path.

    Raises:
        InputError: If one of them differs.
    """
    files = {name: root / name for name in pages}
    old = [
        name
        for name, file in files.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != pages[name]
    ]
    if old:
        raise InputError(f"{', '.join(old)} is out of date: run `python -m scripts.pages`")


def check_docstrings(source: Path) -> None:
    """Check the docstrings of public names.

    Raises:
        InputError: If one lacks something.
    """
    if violations := docstring_violations(source):
        raise InputError(f"complete the docstrings: {'; '.join(violations)}")


if __name__ == "__main__":
    main()
