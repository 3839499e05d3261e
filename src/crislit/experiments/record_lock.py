"""Lets one process at a time change a record, without a file beside it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crislit.errors import InputError, why_unwritten

if sys.platform == "win32":
    from filelock import FileLock
else:
    import fcntl


@contextmanager
def lock_record(path: Path) -> Iterator[None]:
    """Wait until no other process changes a record, and keep the others waiting.

    On POSIX systems, the record itself is locked, also on shared file systems, and the system
    frees it if the process is killed. A missing record is created empty. Windows cannot replace a
    file that is open, so a file beside the record is locked there, and removed afterwards.

    Raises:
        InputError: If the record cannot be opened for writing or locked.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if sys.platform == "win32":
                stack.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
            else:
                stack.callback(os.close, _open_locked(path))
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


def _open_locked(path: Path) -> int:
    """Open and lock the file that has this name when the lock is granted."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The process before us has replaced the file that we waited for. Opening it once more
            # asks the server, where a status may be outdated on shared file systems.
            with path.open("rb") as current:
                if os.path.sameopenfile(handle, current.fileno()):
                    return handle
        except FileNotFoundError:
            pass  # removed while we waited
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def check_writable(path: Path) -> None:
    """Check that a record can be written, and leave nothing behind.

    Raises:
        InputError: If it cannot.
    """
    try:
        if path.exists():
            path.open("r+b").close()
        folder = next(folder for folder in path.parents if folder.exists())
        # Its name is as long as that of the file that replaces the record.
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.", suffix=".part").close()
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error of a record that cannot be written."""
    return InputError(
        f"cannot write the record {path}: {why_unwritten(error)}. Choose another file: record=FILE"
    )
