"""What a checkpoint holds, and how it is read: nothing in it can run code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crislit.errors import InputError
from crislit.models.cris import CRIS, build_cris

KEY = "crislit"
"""Under this key a Lightning checkpoint keeps the network's settings and the run's configuration."""


@dataclass(frozen=True)
class Checkpoint:
    """A network as training left it.

    Attributes:
        settings: Arguments of :func:`crislit.models.cris.build_cris`.
        weights: The network's state dict.
        config: The run's whole configuration.
        steps: Optimizer steps taken.
    """

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    config: dict[str, Any]
    steps: int

    def build(self) -> CRIS:
        """Build the network and load its weights."""
        model = build_cris(**self.settings)
        model.load_state_dict(self.weights)
        return model.eval()


def record(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint must keep under :data:`KEY`."""
    return {"settings": dict(settings), "config": dict(config)}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this library.

    Raises:
        InputError: If there is none, it is damaged, or another program wrote it.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; a run keeps its own under checkpoints/best.ckpt and checkpoints/last.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the optimizer's half stays on disk
    except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read checkpoint {path}: it is damaged, or no PyTorch checkpoint ({reason})") from error
    if not isinstance(content, dict) or KEY not in content:
        found = ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} is no checkpoint of crislit: expected the entry {KEY!r}, found {found or 'nothing'}")
    try:
        weights = {name.removeprefix("model."): v for name, v in content["state_dict"].items() if name.startswith("model.")}
        return Checkpoint(content[KEY]["settings"], weights, content[KEY]["config"], int(content["global_step"]))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks a part of crislit's checkpoints: {error}") from error
