"""python -m crislit.export CHECKPOINT DIR: two ONNX graphs, so that many sentences share one picture's encoding."""

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crislit.checkpoint import read_any, refuse_existing, write_whole, writes
from crislit.errors import InputError, one_line_errors
from crislit.models.cris import CRIS
from crislit.models.rearranged import for_inference
from crislit.onnx_network import CONFIG, GROUNDING, IMAGE_ENCODER
from crislit.quantise import EXAMPLES, find_examples, quantise

EPILOG = f"""
DIR gets three files:

  {IMAGE_ENCODER}   images (P, 3, S, S) float32 -> v3, v4, v5: everything about P pictures that no sentence changes
  {GROUNDING}       v3, v4, v5, tokens (B, L) int64, owners (B,) int64 (the number of each sentence's picture)
                       -> logits (B, 1, S/4, S/4) float32; P and B are any numbers
  {CONFIG}        S, L and the threshold; preprocessing and the way back to a picture's own size are crislit's

crislit.load("DIR") runs them by ONNX Runtime (the extra `onnx`: pip install "crislit[onnx]").
"""


class ImageGraph(nn.Module):
    """What :meth:`CRIS.encode_images` does, as a module of its own."""

    def __init__(self, model: CRIS) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, 3, S, S) -> three maps."""
        return self.model.encode_images(images)


class GroundingGraph(nn.Module):
    """What :meth:`CRIS.ground` does, as a module of its own."""

    def __init__(self, model: CRIS) -> None:
        super().__init__()
        self.model = model

    def forward(self, v3: Tensor, v4: Tensor, v5: Tensor, tokens: Tensor, owners: Tensor) -> Tensor:
        """Three maps, (B, L), (B,) -> (B, 1, S/4, S/4)."""
        return self.model.ground((v3, v4, v5), tokens, owners)


def graphs(model: CRIS, image_size: int) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]:
    """Trace both graphs with ``torch.export``; the numbers of pictures and of sentences stay free, sizes do not."""
    model = for_inference(model)
    pictures, sentences = torch.export.Dim("pictures", min=1), torch.export.Dim("sentences", min=1)
    images = torch.zeros(2, 3, image_size, image_size)
    tokens = torch.zeros(3, model.max_words, dtype=torch.long)
    tokens[:, 2] = 1  # [EOS] is the largest
    with torch.no_grad():
        maps = model.encode_images(images)
        image_graph = torch.export.export(ImageGraph(model), (images,), dynamic_shapes=({0: pictures},), strict=False)
        given = (*maps, tokens, torch.tensor([0, 1, 1]))
        free = ({0: pictures}, {0: pictures}, {0: pictures}, {0: sentences}, {0: sentences})
        grounding = torch.export.export(GroundingGraph(model), given, dynamic_shapes=free, strict=False)
    return image_graph, grounding


def export(source: Path, target: Path, max_words: int | None = None, calibrate: Path | None = None) -> None:
    """Write a network's two graphs and what it takes to use them.

    Args:
        source: The network.
        target: The folder.
        max_words: Tokens of a sentence, for a ``.pth`` of the authors' code.
        calibrate: A folder of pictures and sentences, see :func:`crislit.quantise.find_examples`: graphs of 8 bits are written.

    Raises:
        InputError: If the network or a picture cannot be read, a file exists, or ONNX is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError('ONNX is not installed: pip install "crislit[onnx]"') from error
    checkpoint = read_any(source, max_words)
    files = [target / name for name in (IMAGE_ENCODER, GROUNDING, CONFIG)]
    refuse_existing(*files)
    examples = find_examples(calibrate) if calibrate else []
    model = checkpoint.build()
    print("tracing the network", flush=True)
    image_graph, grounding = graphs(model, checkpoint.image_size)
    about = {"image_size": checkpoint.image_size, "threshold": checkpoint.threshold, "max_words": model.max_words}
    writers: dict[Path, Callable[[Path], Any]] = {
        files[0]: lambda part: save_onnx(image_graph, part, ["v3", "v4", "v5"]),
        files[1]: lambda part: save_onnx(grounding, part, ["logits"]),
        files[2]: writes(json.dumps(about, indent=2) + "\n"),
    }
    if not examples:
        write_whole(writers)
        return
    with tempfile.TemporaryDirectory() as folder:
        exact, whole = Path(folder, "exact"), Path(folder, "whole")
        for place in (exact, whole):
            place.mkdir()
        for file, write in writers.items():
            write(exact / file.name)
        quantise(exact, whole, examples)
        shutil.copy(exact / CONFIG, whole)
        write_whole({file: lambda part: shutil.copyfile(whole / part.name, part) for file in files})


def save_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced graph as one ONNX file, weights and all."""
    print(f"writing {path.name}", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        found = torch.onnx.export(program, dynamo=True, output_names=list(outputs), verbose=False)
    assert found is not None
    found.save(str(path), external_data=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m crislit.export", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="CHECKPOINT", type=Path, help="a run's best.ckpt, a folder, a .pth, or shapes-tiny")
    parser.add_argument("target", metavar="DIR", type=Path, help="a folder for the three files, made if there is none")
    parser.add_argument("--max-words", type=int, help="tokens of a sentence, for a .pth of the authors' code: 17, 22 for G-Ref")
    parser.add_argument("--int8", action="store_true", help="weights and activations of 8 bits: a little less exact")
    parser.add_argument(
        "--calibrate",
        metavar="FOLDER",
        type=Path,
        help="for --int8: some pictures like yours, each with its sentences in a text file of its name, one a line "
        "(default: the shipped examples of shapes)",
    )
    options = parser.parse_args(arguments)
    if options.calibrate and not options.int8:
        parser.error("--calibrate is for --int8")
    calibrate = (options.calibrate or EXAMPLES).expanduser() if options.int8 else None
    with one_line_errors():
        export(options.source.expanduser(), options.target.expanduser(), options.max_words, calibrate)
    print(f"written to {options.target}: {IMAGE_ENCODER}, {GROUNDING}, {CONFIG}")


if __name__ == "__main__":
    main()
