"""What a user can get wrong."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where there is no room, or no more for this user."""


class InputError(ValueError):
    """What the user gave cannot be used: data, a checkpoint, a setting.

    The message says what was expected, what was found and what to do. Programs print it without a traceback.
    """


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command-line program with one line and exit code 1 on what the user got wrong, and in silence if nobody listens."""
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        raise SystemExit(f"error: {printable(str(error))}") from error
    except OSError as error:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # what is left can be written nowhere, and Python would say so once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1 if isinstance(error, BrokenPipeError) else f"error: {error}") from error  # such as by `| head`


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show, such as control characters in strangers' names; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def check_whole(name: str, value: Any, least: int, multiple_of: int = 1, most: int = 2**63 - 1) -> None:
    """Raise an :class:`InputError` unless a setting is a whole number, neither too small nor too large, and a multiple."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most or value % multiple_of:
        kind = f"a multiple of {multiple_of}" if multiple_of > 1 else "a whole number"
        large = isinstance(value, int) and value > most
        bound = f" and at most {most}" if large else ""
        found = f"a number of {value.bit_length()} bits" if large and value.bit_length() > 1000 else f"{value!r:.200}"
        raise InputError(f"{name} must be {kind}, at least {least}{bound}, got {found}")


def for_want_of_room(error: BaseException | None) -> bool:
    """Whether an error is that of a full disk, or came while one was handled: PyTorch ends an archive on its own terms."""
    return error is not None and (getattr(error, "errno", None) in DISK_FULL or for_want_of_room(error.__context__))
