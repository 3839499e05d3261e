"""Exports a network to ONNX, in float32 or int8."""

import functools
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from crislit.checkpoints import read_any
from crislit.errors import InputError, see
from crislit.inference.onnx_network import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER
from crislit.inference.quantization import quantize
from crislit.io import Writer, find_examples, refuse_existing, text_writer, write_files
from crislit.models import CRIS, optimize_for_inference

DATASET_KEYS = ("name", "folder", "embedded")
"""Keys stored from the configuration of the training's data set."""


class Graph(nn.Module):
    """One of the two parts that are exported, as a module."""

    def __init__(self, model: CRIS) -> None:
        super().__init__()
        self.model = model


class ImageGraph(Graph):
    """``CRIS.encode_images`` as a module."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, 3, S, S) -> three maps."""
        return self.model.encode_images(images)


class GroundingGraph(Graph):
    """``CRIS.ground`` as a module."""

    def forward(
        self, v3: Tensor, v4: Tensor, v5: Tensor, tokens: Tensor, image_indices: Tensor
    ) -> Tensor:
        """Three maps, (B, L), (B,) -> (B, 1, S/4, S/4)."""
        return self.model.ground((v3, v4, v5), tokens, image_indices)


def trace_graphs(
    model: CRIS, image_size: int
) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]:
    """Trace both graphs with ``torch.export``, for any number of images and of sentences."""
    model = optimize_for_inference(model)
    image_count = torch.export.Dim("image_count", min=1)
    sentence_count = torch.export.Dim("sentence_count", min=1)
    images = torch.zeros(2, 3, image_size, image_size)
    tokens = torch.zeros(3, model.max_tokens, dtype=torch.long)
    tokens[:, 2] = 1  # [EOS] is the largest
    with torch.no_grad():
        maps = model.encode_images(images)
        image_graph = torch.export.export(
            ImageGraph(model), (images,), dynamic_shapes=({0: image_count},), strict=False
        )
        grounding = torch.export.export(
            GroundingGraph(model),
            (*maps, tokens, torch.tensor([0, 1, 1])),
            dynamic_shapes=(*3 * ({0: image_count},), *2 * ({0: sentence_count},)),
            strict=False,
        )
    return image_graph, grounding


def export_onnx(
    source: Path,
    target: Path,
    max_tokens: int | None = None,
    calibrate: Path | None = None,
    trust: Sequence[str] = (),
) -> None:
    """Write a network's two graphs and the settings of its preprocessing.

    Args:
        source: The network, in any form of ``crislit.checkpoints.checkpoint.read_any``.
        target: The folder.
        max_tokens: Tokens per sentence, for a ``.pth`` of the authors' code.
        calibrate: A folder of images with sentences, see ``crislit.io.assets.find_examples``,
            for int8; None for float32.
        trust: Packages outside crislit whose classes the network may have.

    Raises:
        InputError: If the network or an image cannot be read, a file exists, or ONNX is not
            installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX is not installed: it comes with the extra onnx{see('extras')}"
        ) from error
    checkpoint = read_any(source, max_tokens, trust=trust)
    files = [target / name for name in (IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG)]
    refuse_existing(*files)
    examples = find_examples(calibrate) if calibrate else []
    model = checkpoint.build()
    print("tracing the network", flush=True)
    image_graph, grounding = trace_graphs(model, checkpoint.image_size)
    dataset = checkpoint.config.get("dataset", {})
    config = {
        "image_size": checkpoint.image_size,
        "threshold": checkpoint.threshold,
        "max_words": model.max_tokens,
        "dataset": {key: dataset[key] for key in DATASET_KEYS if key in dataset},
    }
    writers: dict[Path, Writer] = {
        files[0]: lambda part: save_onnx(image_graph, part, ["v3", "v4", "v5"]),
        files[1]: lambda part: save_onnx(grounding, part, ["logits"]),
        files[2]: text_writer(json.dumps(config, indent=2) + "\n"),
    }
    print(f"writing {IMAGE_ENCODER} and {GROUNDING}", flush=True)
    if examples:
        with tempfile.TemporaryDirectory() as folder:
            for file, write in writers.items():
                write(Path(folder, file.name))
            quantize(Path(folder), examples)
            write_files(
                {
                    file: functools.partial(shutil.copyfile, Path(folder, file.name))
                    for file in files
                }
            )
    else:
        write_files(writers)


def save_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced graph as one ONNX file that contains the weights."""
    with warnings.catch_warnings(action="ignore"):
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        exported = torch.onnx.export(
            program, dynamo=True, output_names=list(outputs), verbose=False
        )
    assert exported is not None
    exported.save(str(path), external_data=False)
