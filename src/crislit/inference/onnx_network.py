"""A network that ``python -m crislit.export`` wrote, computed by ONNX Runtime."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crislit.errors import InputError
from crislit.models.neck import Maps

IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG = "image_encoder.onnx", "grounding.onnx", "export.json"


class OnnxNetwork:
    """Encodes pictures and grounds sentences in them as :class:`crislit.CRIS` does.

    Args:
        folder: What the export wrote.

    Raises:
        InputError: If a file is missing or damaged, or ONNX Runtime is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                'ONNX Runtime is not installed: pip install "crislit[onnx]"'
            ) from error
        try:
            about = json.loads((folder / EXPORT_CONFIG).read_bytes())
            self.max_tokens, self.image_size = int(about["max_words"]), int(about["image_size"])
            self.threshold = float(about["threshold"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / EXPORT_CONFIG} is missing or damaged ({error}): export the network again"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        sessions = []
        for name in (IMAGE_ENCODER, GROUNDING):
            if not (folder / name).is_file():
                raise InputError(f"there is no {folder / name}: export the network again")
            try:
                session = onnxruntime.InferenceSession(
                    os.fspath(folder / name), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # the runtime's own exceptions have no common base
                raise InputError(
                    f"{folder / name} cannot be read: {str(error).splitlines()[0]}"
                ) from error
            sessions.append(session)
        self.image_encoder, self.grounding = sessions

    def __call__(self, images: Tensor, tokens: Tensor, image_indices: Tensor) -> Tensor:
        """(P, 3, S, S), (B, L) and (B,) -> logits (B, 1, S/4, S/4)."""
        return self.ground(self.encode_images(images), tokens, image_indices)

    def encode_images(self, images: Tensor) -> Maps:
        """(P, 3, S, S) -> the three maps of :meth:`crislit.CRIS.encode_images`."""
        v3, v4, v5 = self.image_encoder.run(None, {"images": _array(images)})
        return torch.from_numpy(v3), torch.from_numpy(v4), torch.from_numpy(v5)

    def ground(self, maps: Maps, tokens: Tensor, image_indices: Tensor) -> Tensor:
        """Three maps, (B, L) and (B,) -> logits (B, 1, S/4, S/4)."""
        inputs = (*maps, tokens, image_indices)
        names = [known.name for known in self.grounding.get_inputs()]  # "owners" in version 0.1
        feed = dict(zip(names, map(_array, inputs), strict=True))
        return torch.from_numpy(self.grounding.run(None, feed)[0])


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x.cpu().numpy())
