"""python -m crislit.export CHECKPOINT DIR: two ONNX graphs, so that many sentences share one picture's encoding."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors
from crislit.inference.onnx_export import export_onnx
from crislit.inference.onnx_network import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER
from crislit.io.assets import EXAMPLES

EPILOG = f"""
DIR gets three files:

  {IMAGE_ENCODER}   images (P, 3, S, S) float32 -> v3, v4, v5: everything about P pictures that no sentence changes
  {GROUNDING}       v3, v4, v5, tokens (B, L) int64, image_indices (B,) int64 (the number of each sentence's picture)
                       -> logits (B, 1, S/4, S/4) float32; P and B are any numbers
  {EXPORT_CONFIG}        S, L and the threshold; preprocessing and the way back to a picture's own size are crislit's

crislit.load("DIR") runs them by ONNX Runtime (the extra `onnx`: pip install "crislit[onnx]").
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m crislit.export",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="CHECKPOINT",
        type=Path,
        help="a run's best.ckpt, a folder, a .pth, or shapes-tiny",
    )
    parser.add_argument(
        "target",
        metavar="DIR",
        type=Path,
        help="a folder for the three files, made if there is none",
    )
    parser.add_argument(
        "--max-words",
        type=int,
        help="tokens of a sentence, for a .pth of the authors' code: 17, 22 for G-Ref",
    )
    parser.add_argument(
        "--int8", action="store_true", help="weights and activations of 8 bits: a little less exact"
    )
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
        export_onnx(
            options.source.expanduser(), options.target.expanduser(), options.max_words, calibrate
        )
    print(f"written to {options.target}: {IMAGE_ENCODER}, {GROUNDING}, {EXPORT_CONFIG}")


if __name__ == "__main__":
    main()
