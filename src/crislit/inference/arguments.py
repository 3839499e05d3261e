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


def command_parser(name: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return the parser of a command, whose texts keep their lines."""
    parser = argparse.ArgumentParser(
        f"python -m crislit.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("action", None, StoreOnce)
    return parser


def check_order(source: Path, target: Path) -> None:
    """Raise an :class:`InputError` if a source does not exist, and its target does."""
    from crislit.io import shipped_networks  # takes seconds

    exists = source.exists() or str(source) in shipped_networks()
    require(
        exists or not target.exists(),
        f"there is no {source}, but {target} exists: expected the source first, then the target",
    )
