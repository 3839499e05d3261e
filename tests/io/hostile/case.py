"""The definition of a hostile input."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Act = Callable[[Path], Any]
"""Writes a hostile file into a folder and reads it."""
ANY: Any = "any value"
MANY, MILLION = 10**5, 10**6


@dataclass(frozen=True)
class Case:
    """A hostile input and its expected outcome.

    Attributes:
        name: Its description, used as the test's id.
        act: Writes it into a folder and reads it. Returns JSON types.
        error: Pattern of the expected InputError; None if it must be read without one.
        value: Expected return value without an error.
        names_file: Whether the error must name a file in the folder.
    """

    name: str
    act: Act
    error: str | None = None
    value: Any = ANY
    names_file: bool = True


Cases = Iterator[Case]
