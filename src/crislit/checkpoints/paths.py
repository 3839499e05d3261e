"""Finds the file or folder of a network, and explains paths that hold none."""

import codecs
from pathlib import Path

from crislit.errors import DamagedFileError, InputError, require, see
from crislit.io import shipped_networks

WEIGHTS = "model.safetensors"
"""Name of a shared network's file of weights."""
CONFIG = "config.json"
"""Name of the file beside it, with everything else."""
SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
"""Suffixes of networks, which hints list. Files with other suffixes are read, too."""
NAMES = ("best.ckpt", "last.ckpt")
"""Checkpoints of a run, the most useful first."""
MAX_NAMES = 3
"""Checkpoints that a hint names beside the first."""
EXPECTED = (
    "expected a run's checkpoints/best.ckpt, a folder with model.safetensors and config.json, or a "
    ".pth file of the authors' code"
)


def find_network(path: Path) -> Path:
    """Return the file of a network, its folder, or the folder of a shipped one by its bare name.

    Raises:
        DamagedFileError: If the file holds text.
        InputError: If there is no network at the path. The message names checkpoints near it.
    """
    path = find_shipped(path.expanduser())
    if path.is_dir():
        if (path / WEIGHTS).is_file() or (path / CONFIG).is_file():
            return path
        raise InputError(explain_folder(path))
    folder = path.parent
    near = list_checkpoints(folder, "checkpoints/*") or list_checkpoints(folder, "*")
    hint = f"; there is {near[0]}" if near else ""
    require(
        path.is_file(),
        f"no checkpoint at {path}; a run keeps checkpoints/best.ckpt and checkpoints/last.ckpt"
        f"{hint}{see('checkpoint-path')}",
    )
    if text := read_text_start(path):
        raise DamagedFileError(
            f"{path} is not a checkpoint but text, which begins with {text!r}: {EXPECTED}{hint}"
            f"{see('checkpoint-path')}"
        )
    return path


def find_shipped(path: Path) -> Path:
    """Return the folder of a shipped network if a bare name means one, else the path itself.

    Raises:
        InputError: If a bare name is neither a file here nor a shipped network.
    """
    if path.name != str(path) or path.suffix or path.exists():
        return path
    shipped = shipped_networks()
    require(
        path.name in shipped,
        f"no network {path.name!r}: neither a file here nor one of the shipped "
        f"{', '.join(shipped) or '(none)'}",
    )
    return shipped[path.name]


def explain_folder(folder: Path) -> str:
    """Return why a folder is not a network, and which checkpoints it holds."""
    for pattern in ("checkpoints/*", "*", "*/checkpoints/*"):
        if found := list_checkpoints(folder, pattern):
            names = [str(path.relative_to(folder)) for path in found[1:]]
            more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
            also = f"; it also holds {', '.join(names[:MAX_NAMES] + more)}" if names else ""
            return (
                f"{folder} is a folder, and a checkpoint is a file: give {found[0]}{also}"
                f"{see('checkpoint-path')}"
            )
    if any(folder.glob("*.onnx")):
        return (
            f"{folder} is a network exported to ONNX, which can only predict: give the "
            "network that it was exported from"
        )
    kind = "the folder of a run without checkpoints" if is_run(folder) else "not a network"
    missing = folder / WEIGHTS
    return f"{folder} is {kind}, and there is no {missing}: {EXPECTED}{see('checkpoint-path')}"


def is_run(folder: Path) -> bool:
    """Whether a run or an evaluation wrote to a folder."""
    return any((folder / name).exists() for name in (".hydra", "results.json", "checkpoints"))


def list_checkpoints(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a folder that look like networks, the most useful first."""

    def rank(path: Path) -> tuple[int, str]:
        return NAMES.index(path.name) if path.name in NAMES else len(NAMES), str(path)

    try:
        return sorted(
            (path for path in folder.glob(pattern) if path.suffix in SUFFIXES and path.is_file()),
            key=rank,
        )
    except OSError:  # a folder that may not be listed gets no hint
        return []


def read_text_start(path: Path) -> str:
    """Return the first words of a file of text, such as ``results.json``; empty for all others.

    Raises:
        InputError: If the disk cannot read it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    words = " ".join(text.split())
    return words[:40] if words.isprintable() else ""
