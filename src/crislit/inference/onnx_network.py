"""Runs a network that ``python -m crislit.export`` wrote, with ONNX Runtime."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crislit.errors import InputError, first_line, require, see
from crislit.models import Maps

IMAGE_ENCODER = "image_encoder.onnx"
"""Name of the graph that encodes images."""
GROUNDING = "grounding.onnx"
"""Name of the graph that finds what sentences refer to in encoded images."""
EXPORT_CONFIG = "export.json"
"""Name of the file with the sizes, the threshold and the data set of the training."""


class OnnxNetwork:
    """An exported network, with the methods of ``crislit.CRIS`` that a segmenter calls.

    Args:
        folder: The exported folder.

    Attributes:
        dataset: The data set of its training, as in a run's configuration; empty if unknown.

    Raises:
        InputError: If a file is missing or damaged, or ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path) -> None:
        config = folder / EXPORT_CONFIG
        try:
            stored = json.loads(config.read_bytes())
            self.max_tokens, self.image_size = int(stored["max_words"]), int(stored["image_size"])
            self.threshold = float(stored["threshold"])
            self.dataset = dict(stored.get("dataset", {}))  # absent in version 0.1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{config} is missing or damaged ({error}): export the network again"
            ) from error
        self.image_encoder = _open_session(folder / IMAGE_ENCODER)
        self.grounding = _open_session(folder / GROUNDING)

    def __call__(self, images: Tensor, tokens: Tensor, image_indices: Tensor) -> Tensor:
        """(P, 3, S, S), (B, L) and (B,) -> logits (B, 1, S/4, S/4)."""
        return self.ground(self.encode_images(images), tokens, image_indices)

    def encode_images(self, images: Tensor) -> Maps:
        """(P, 3, S, S) -> the three maps of ``crislit.CRIS.encode_images``."""
        v3, v4, v5 = map(torch.from_numpy, _run(self.image_encoder, images))
        return v3, v4, v5

    def ground(self, maps: Maps, tokens: Tensor, image_indices: Tensor) -> Tensor:
        """Segment what sentences refer to in encoded images.

        Args:
            maps: The output of ``encode_images``.
            tokens: (B, L) long.
            image_indices: (B,) long, the index of each sentence's image.

        Returns:
            Logits, (B, 1, S/4, S/4).
        """
        return torch.from_numpy(_run(self.grounding, *maps, tokens, image_indices)[0])


def _open_session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            f"ONNX Runtime is not installed: it comes with the extra onnx{see('extras')}"
        ) from error
    require(path.is_file(), f"there is no {path}: export the network again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def _run(session: Any, *inputs: Tensor) -> list[npt.NDArray[Any]]:
    """Run a graph. Inputs are fed by position, because version 0.1 gave one another name."""
    feeds = {
        node.name: np.ascontiguousarray(x.cpu().numpy())
        for node, x in zip(session.get_inputs(), inputs, strict=True)
    }
    outputs: list[npt.NDArray[Any]] = session.run(None, feeds)
    return outputs
