"""Reserves the folder of a run or a sweep, so that no other process writes to it.

The lock vanishes with the process that holds it, however the process ends. So a run that was killed
can continue at once.
"""

import contextlib
import errno
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from crislit.errors import InputError, see, why_unwritten

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
"""File in the folder that is locked. It names the process that holds the lock."""
CONFIG_FOLDER = ".hydra"
"""Where Hydra saves the configuration as soon as a command starts."""
UNUSED = {LOCK, CONFIG_FOLDER, "hparams.yaml", "multirun.yaml"}
"""Files that a folder holds, beside logs, before a run trains."""
BUSY = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}
"""Errors of a lock that another process holds."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of file systems that cannot lock, such as Lustre mounted without ``flock``."""
ATTEMPTS, PAUSE = 4, 0.1
"""How often a lock is tried, and the seconds in between: a killed process may still be ending."""


@dataclass
class ReservedFolder:
    """A folder that this process alone writes to.

    Attributes:
        path: The folder.
        created: The topmost folder that was created for it; None if it existed.
        handle: The open lock file.
    """

    path: Path
    created: Path | None
    handle: int

    def release(self, refused: bool = False) -> None:
        """Let other processes use the folder.

        Args:
            refused: Whether the command was refused: a new folder without results is removed.
        """
        if self in _reserved:
            _reserved.remove(self)
        is_unused = refused and self.created is not None and _is_unused(self.path)
        if sys.platform == "win32":  # an open file cannot be removed
            os.close(self.handle)
        if is_unused:
            shutil.rmtree(self.path, ignore_errors=True)
            _remove_empty(self.path, self.created)
        else:
            with contextlib.suppress(OSError):  # of a read-only folder
                (self.path / LOCK).unlink()
        if sys.platform != "win32":
            os.close(self.handle)


_reserved: list[ReservedFolder] = []


def reserve(folder: Path, setting: str) -> ReservedFolder:
    """Create a folder and reserve it until this process releases it or ends.

    Args:
        folder: The folder.
        setting: The setting that chooses another folder, for messages.

    Raises:
        InputError: If another process uses it, or if it cannot be created or written.
    """
    created = None
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        created = missing[-1] if missing else None
        handle = _open_locked(folder)
        if handle is None:
            raise InputError(
                f"{folder} is in use by {_owner(folder)}: choose another {setting}, or wait until "
                f"it has ended{see('folder-in-use')}"
            )
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        os.write(handle, f"{owner} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
    except (OSError, ValueError) as error:
        if created:
            _remove_empty(folder, created)
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot write to {folder}: {_reason(error)}. Choose another {setting}"
        ) from error
    reserved = ReservedFolder(folder, created, handle)
    _reserved.append(reserved)
    return reserved


def release_all(refused: bool = False) -> None:
    """Release every folder that this process has reserved, see ``ReservedFolder.release``."""
    for reserved in list(_reserved):
        reserved.release(refused)


def find_owner(folder: Path) -> str | None:
    """Return which process uses a folder; None if none does."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(handle) else _owner(folder)
    finally:
        os.close(handle)


def _open_locked(folder: Path) -> int | None:
    """Open and lock the lock file of a folder; return None if another process holds the lock."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # a refused command has just removed the folder
        try:
            # Not a file that its owner has removed while we waited.
            if _lock(handle) and os.path.samestat(os.fstat(handle), (folder / LOCK).stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def _lock(handle: int) -> bool:
    """Lock an open file; return whether no other process holds the lock."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the text, which stays readable
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in BUSY:
            return False
        if error.errno not in NO_LOCKS:
            raise
        print(
            "warning: the file system of this folder has no locks: make sure that no other run "
            "writes to it",
            file=sys.stderr,
        )
    return True


def _owner(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file has the name of this folder or of one above it"
    return why_unwritten(error)


def _is_unused(folder: Path) -> bool:
    """Whether a folder, or each job's in that of a sweep, holds only what a start writes."""
    return all(
        path.name in UNUSED or path.suffix == ".log" or (path.is_dir() and _is_unused(path))
        for path in folder.iterdir()
    )


def _remove_empty(folder: Path, created: Path | None) -> None:
    """Remove a folder and those above it that were created for it, as far as they are empty."""
    for path in (folder, *folder.parents):
        try:
            path.rmdir()
        except FileNotFoundError:
            pass  # it could not be created
        except (OSError, ValueError):
            return
        if path == created:
            return


def _close_in_child() -> None:
    """Leave the lock to the parent process: a data worker may outlive it."""
    for reserved in _reserved:
        os.close(reserved.handle)
    _reserved.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)
