"""Reads and writes state dicts as safetensors or PyTorch files, and checks what was read."""

import errno
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crislit.errors import DamagedFileError, InputError, first_line, require, see
from crislit.io.libraries import is_damage
from crislit.io.pickles import check_torch_pickle

DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""Types of weights, of counters, and of whatever else a checkpoint stores beside them."""
NUMPY_SCALARS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
]
"""NumPy scalars that a checkpoint may store, such as the best IoU: building them runs no code."""


# -- Reading


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or PyTorch file, without running code.

    Raises:
        InputError: If there is no such file, it is damaged, or it holds no state dict.
    """
    require(path.is_file(), f"no weights at {path}: expected a .pth, .pt or .safetensors file")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return to_state_dict(content, str(path))


def to_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Take the state dict out of a file's content, and drop DistributedDataParallel's ``module.``.

    Args:
        content: Tensors by name, alone or under ``state_dict``.
        source: The file's name, for errors.

    Raises:
        InputError: If the content is anything else.
    """
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    require(
        isinstance(state, Mapping)
        and state
        and all(isinstance(value, Tensor) for value in state.values()),
        f"{source} holds no state dict: expected tensors by name, alone or under 'state_dict'",
    )
    check_storage(state, source)
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file.

    Raises:
        DamagedFileError: If it is damaged or not a safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"cannot read {path}: it is damaged, or not a safetensors file ({error})"
            f"{see('checkpoint-path')}"
        ) from error


def read_torch(path: Path) -> Any:
    """Read a PyTorch file of tensors and plain containers; weights are mapped, not loaded.

    Raises:
        DamagedFileError: If it is damaged or would run code.
        InputError: If the disk cannot read it.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("it is compressed, which PyTorch's files are not")
        check_torch_pickle(path, zipped)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        _raise_unless_damaged(path, error)
        reason, hint = first_line(error), see("checkpoint-path")
        if str(error).startswith("Weights only load failed"):  # PyTorch advises to run its code
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            hint = see("unsafe-pickle") if code else hint
            reason = (
                f"it holds {code[1]}, and only tensors and plain containers are read"
                if code
                else "its bytes are not a pickle of tensors"
            )
        raise DamagedFileError(
            f"cannot read {path}: it is damaged, or not a PyTorch checkpoint ({reason}){hint}"
        ) from error


def check_checksums(path: Path) -> None:
    """Compare an archive's content with the checksums it holds; PyTorch does not.

    Raises:
        DamagedFileError: If they differ, or the file is not an archive.
        InputError: If the disk cannot read it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:
        _raise_unless_damaged(path, error)
        raise DamagedFileError(
            f"{path} is damaged ({first_line(error)}){see('checkpoint-path')}"
        ) from error
    if record is not None:
        raise DamagedFileError(f"{path} is damaged (the checksum of {record} is wrong)")


def _raise_unless_damaged(path: Path, error: Exception) -> None:
    """Raise an error again unless it comes from the bytes of a PyTorch file.

    Damaged bytes lead PyTorch, pickle and zipfile to errors of any type, and PyTorch's part in C++
    to a RuntimeError.

    Raises:
        InputError: If the disk failed, which says nothing of the file. Damaged archives raise
            EINVAL, by seeking to before the file's beginning.
        Exception: The error, if it does not come from the bytes.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    libraries = ("torch", "pickle", "zipfile")
    if not isinstance(error, (RuntimeError, zipfile.BadZipFile)) and not any(
        is_damage(error, library) for library in libraries
    ):
        raise error


# -- Writing


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name to a path, as contiguous safetensors with the usual permissions."""
    path.touch()
    permissions = path.stat().st_mode  # save_file makes a file that only its owner may read
    save_file({n: x.clone(memory_format=torch.contiguous_format) for n, x in tensors.items()}, path)
    path.chmod(permissions)


# -- Checking


def check_names(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str
) -> None:
    """Compare names, shapes and kinds of numbers found in a state dict with the expected ones.

    Raises:
        InputError: With the complaint and everything missing, unexpected or different.
    """
    shared = [name for name in expected if name in found]
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} ({format_shape(found[name])} instead of {format_shape(expected[name])})"
            for name in shared
            if found[name].shape != expected[name].shape
        ],
        "of another kind": [
            f"{name} ({found[name].dtype} instead of {expected[name].dtype})"
            for name in shared
            if expected[name].is_floating_point() and not found[name].is_floating_point()
        ],
    }
    reasons = [f"{what} {join_names(names)}" for what, names in differences.items() if names]
    require(not reasons, f"{complaint}: {'; '.join(reasons)}{see('keys')}")


def check_storage(weights: Mapping[str, Any], source: str) -> None:
    """Check that weights are tensors of plain numbers, no larger than the data in the file.

    Strides can make gigabytes of a few bytes.

    Args:
        weights: A state dict, of any shapes.
        source: The file's name, for errors.

    Raises:
        InputError: If some are not plain numbers.
        DamagedFileError: If they are larger than their data.
    """
    odd = [
        f"{name} ({getattr(value, 'dtype', type(value).__name__)})"
        for name, value in weights.items()
        if not is_plain_tensor(value)
    ]
    require(not odd, f"{source} holds tensors that are not plain numbers: {join_names(odd)}")
    # By address: tied weights are stored once.
    stored = {s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, weights.values())}
    if sum(x.numel() * x.element_size() for x in weights.values()) > 2 * sum(stored.values()):
        raise DamagedFileError(
            f"{source} is damaged: its tensors are larger than what it holds of them"
        )


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor of numbers of a usual type, dense and in memory."""
    return (
        isinstance(value, Tensor)
        and not (value.is_nested or value.is_quantized or value.is_meta)
        and value.layout == torch.strided
        and value.dtype in DTYPES
    )


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise an ``InputError``, which names the source, if a weight of any shape is not finite."""
    if odd := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise InputError(
            f"{source} holds weights that are NaN or infinite: its training diverged, or it is "
            f"damaged: {join_names(odd)}"
        )


def format_shape(value: Tensor) -> str:
    """Return a tensor's shape as text, ``64 x 3 x 3``."""
    return " x ".join(map(str, value.shape)) or "one number"


def join_names(names: Sequence[str], maximum: int = 20) -> str:
    """List at most a maximum of names, long ones shortened."""
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:maximum]]
    rest = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return ", ".join(shown) + rest
