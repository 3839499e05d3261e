"""Parses command lines without importing what the commands need."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crislit.errors import require


class StoreOnce(argparse.Action):
    """Stores an argument. An option that is given twice is an error, since one would be lost."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the value of an argument."""
        given = vars(namespace).setdefault("_given", set())
        if option_string and self.dest in given:
            raise argparse.ArgumentError(self, "given twice")
        if option_string:
            given.add(self.dest)
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """A parser whose help starts with an example."""

    example = ""

    def format_help(self) -> str:
        """Return the help."""
        return f"example: {self.example}\n\n{super().format_help()}"


def command_parser(
    name: str, example: str, description: str | None, epilog: str = ""
) -> argparse.ArgumentParser:
    """Return the parser of a command, whose texts keep their lines.

    Args:
        name: The command.
        example: Arguments that work in a fresh clone, with which the help starts.
        description: What the command does.
        epilog: Stands below the options.
    """
    parser = CommandParser(
        f"python -m crislit.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.example = f"{parser.prog} {example}".rstrip()
    parser.register("action", None, StoreOnce)
    return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option of packages that a network may need, to a command's parser."""
    parser.add_argument(
        "--trust",
        metavar="PACKAGES",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=[],
        help="packages whose classes the network may have, separated by commas; their code is run",
    )


def check_order(source: Path, target: Path) -> None:
    """Raise an ``InputError`` if a source does not exist, and its target does."""
    from crislit.io import shipped_networks  # takes seconds

    exists = source.exists() or str(source) in shipped_networks()
    require(
        exists or not target.exists(),
        f"there is no {source}, but {target} exists: expected the source first, then the target",
    )
