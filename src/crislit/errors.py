"""Errors caused by user input, and how commands report them."""

import errno
import functools
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any


class InputError(ValueError):
    """Data, a checkpoint or a setting that cannot be used.

    The message says what was expected, what was found and what to do. Commands print it without a
    traceback.
    """


class DamagedFileError(InputError):
    """A file whose content is truncated or altered."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line and exit code 1 on errors caused by the user.

    A closed output, such as by ``| head``, ends it silently.
    """
    escape_unencodable()
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        raise SystemExit(f"error: {printable(str(error))}") from error
    except OSError as error:
        discard_unwritten()
        raise SystemExit(1 if isinstance(error, BrokenPipeError) else f"error: {error}") from error


def discard_unwritten() -> None:
    """Discard output that cannot be written, which Python would report once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_unencodable() -> None:
    """Escape characters that the output cannot encode, such as redirected output on Windows."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Escape control characters, for example in file names from untrusted data; keep newlines."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def first_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters, or its type if empty."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= 200 else f"{message[:200]}..."


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun for a message, such as ``1 image`` and ``3 images``.

    Args:
        count: The number.
        singular: The noun, perhaps with a verb.
        plural: The same for other numbers than 1. Empty: the singular and an s.
    """
    return f"{count} {singular if count == 1 else plural or f'{singular}s'}"


def see(entry: str) -> str:
    """Return the end of a message, which names an entry of docs/troubleshooting.md by its id."""
    return f" (see {_troubleshooting()}#{entry})"


@functools.cache
def _troubleshooting() -> str:
    """Return the path of the page, or its address if the package was built with one."""
    path = "docs/troubleshooting.md"
    try:
        fields = metadata("crislit")
    except PackageNotFoundError:  # run from its source
        return path
    addresses = dict(url.split(", ", 1) for url in fields.get_all("Project-URL") or ())
    repository = addresses.get("Repository")
    return f"{repository}/blob/v{fields['Version']}/{path}" if repository else path


def require(condition: object, message: str) -> None:
    """Raise an ``InputError`` with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def check_integer(
    name: str, value: Any, minimum: int, multiple_of: int = 1, maximum: int = 2**63 - 1
) -> None:
    """Raise an ``InputError`` unless a setting is an integer in its range."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    kind = f"a multiple of {multiple_of}" if multiple_of > 1 else "a whole number"
    bound = f" and at most {maximum}" if is_integer and value > maximum else ""
    is_huge = is_integer and value.bit_length() > 1000  # Python may refuse to print it
    found = f"a number of {value.bit_length()} bits" if is_huge else f"{value!r:.200}"
    require(
        is_integer and minimum <= value <= maximum and value % multiple_of == 0,
        f"{name} must be {kind}, at least {minimum}{bound}, got {found}",
    )


def why_unwritten(error: BaseException) -> str:
    """Return why a file cannot be written: that the disk is full, or what the system says."""
    if is_disk_full(error):
        return f"the disk is full{see('disk-space')}"
    return getattr(error, "strerror", None) or str(error)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error was raised by a full disk, or while handling one, as PyTorch does."""
    return error is not None and (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or is_disk_full(error.__context__)
    )
