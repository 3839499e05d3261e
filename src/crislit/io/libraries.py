"""Tells damaged files from faults of the program and of the libraries that read them."""

import functools
import pickle
import struct
import zlib
from typing import TypeGuard

import cv2
import PIL.Image

from crislit.errors import require, see

OPENCV = 5
"""Required major version of OpenCV: others warp and decode to different pixels."""
DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, ArithmeticError),
    *(struct.error, zlib.error, cv2.error, PIL.Image.DecompressionBombError),
    *(pickle.UnpicklingError, RecursionError),
)
"""Types of errors by which libraries report that a file is damaged."""


def is_system_error(error: Exception) -> TypeGuard[OSError]:
    """Whether the system refused to read a file: PIL's own errors have no number."""
    return isinstance(error, OSError) and error.errno is not None


def is_damage(error: Exception, library: str = "PIL") -> bool:
    """Whether an error raised while reading a file comes from its bytes.

    On damaged files, PIL and pickle raise errors of any type, even TypeError and AttributeError.
    The same types from elsewhere are faults of the program, or of a library of another version.

    Args:
        error: The error.
        library: The package that may raise any error.
    """
    if isinstance(error, (MemoryError, ImportError)):
        return False
    return isinstance(error, DAMAGE) or _was_raised_in(error, library)


def _was_raised_in(error: Exception, library: str) -> bool:
    trace = error.__traceback__
    packages = []
    while trace is not None:
        packages.append(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    # The library calls the standard library, and code of ours such as a file of bounded size.
    last = next((name for name in reversed(packages) if name in (library, "crislit")), None)
    return last == library


@functools.cache
def require_opencv() -> None:
    """Raise an ``InputError`` if OpenCV is not of the required version."""
    version = cv2.__version__
    require(
        version.partition(".")[0].isdecimal() and int(version.partition(".")[0]) >= OPENCV,
        f"OpenCV {version} is installed, but crislit needs version {OPENCV} or later, because "
        "others change results: remove all packages that `pip list` shows as opencv-..., then run "
        f"`pip install 'opencv-python-headless>={OPENCV}'`{see('opencv')}",
    )
