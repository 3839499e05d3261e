"""Atomic writes, JSON, CSV and checksums."""

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from crislit.errors import InputError, first_line, require, see, why_unwritten

Writer = Callable[[Path], Any]
"""Writes one file, given its path."""


def write_files(files: Mapping[Path, Writer]) -> None:
    """Write files of one folder, all or none, each flushed to the disk before it gets its name.

    A single file may replace an existing one, which survives a failure. The user's umask decides
    who may read them.

    Args:
        files: What writes each file, given the path of a temporary file beside it.

    Raises:
        InputError: If a file cannot be written, for example because the disk is full.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    path, done = next(iter(files)), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for path, write in files.items():
            part = parts[path]
            part.touch()  # with the user's umask, which safetensors ignores
            mode = part.stat().st_mode
            write(part)
            if part.stat().st_mode != mode:
                part.chmod(mode)
            sync(part)
        for path, part in parts.items():
            part.replace(path)
            done.append(path)
        sync(path.parent)
    except BaseException as error:
        for leftover in (*done, *parts.values()) if len(done) < len(files) else ():
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # PyTorch: RuntimeError
            raise InputError(f"cannot write {path}: {why_unwritten(error)}") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text to a path atomically.

    Raises:
        InputError: If it cannot be written.
    """
    write_files({path: text_writer(text)})


def text_writer(text: str) -> Writer:
    """Return a writer of this text, in UTF-8 and with line feeds as they are."""
    return lambda path: path.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, content: Any) -> None:
    """Write one JSON file atomically, indented by two spaces.

    Args:
        path: The file.
        content: Any value that ``json.dumps`` accepts.

    Raises:
        InputError: If it cannot be written.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one CSV file atomically, a header and one line per row.

    Args:
        path: The file.
        columns: The header.
        rows: Values by column; absent ones are empty.

    Raises:
        InputError: If it cannot be written.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk where the system supports it."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_existing(*paths: Path) -> None:
    """Raise an ``InputError`` if one of the files exists."""
    for path in paths:
        require(
            not path.exists(),
            f"{path} exists and is never overwritten: choose another path{see('folder-in-use')}",
        )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: If it cannot be read or parsed.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"cannot read {path}: {first_line(error)}. It may be truncated: fetch it again"
        ) from error


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
