"""python -m crislit.export CHECKPOINT DIR: exports a network to ONNX."""

from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors
from crislit.inference import add_trust, check_order, command_parser

EPILOG = """
The network is split into two graphs, so that an image is encoded once for all its sentences:

  image_encoder.onnx   images (P, 3, S, S) float32
                       -> v3, v4, v5: three maps of each of P images
  grounding.onnx       v3, v4, v5, tokens (B, L) int64, image_indices (B,) int64
                       -> logits (B, 1, S/4, S/4) float32
  export.json          S, L, the threshold, and the data set of the training

P and B are any numbers; image_indices holds the index of each sentence's image. The graphs
contain neither the preprocessing nor the resizing of masks to the image's own size.
crislit.load("DIR") does both, with ONNX Runtime (the extra `onnx`).
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a network."""
    parser = command_parser("export", "shapes-tiny outputs/onnx", __doc__, EPILOG)
    add = parser.add_argument
    add(
        "source",
        metavar="CHECKPOINT",
        type=Path,
        help="a run's best.ckpt, a folder, a .pth, or shapes-tiny",
    )
    add("target", metavar="DIR", type=Path, help="folder for the three files, created if missing")
    add("--max-words", type=int, help="tokens per sentence, for a .pth: 17, or 22 for G-Ref")
    add("--int8", action="store_true", help="8-bit weights and activations: slightly less accurate")
    add(
        "--calibrate",
        metavar="FOLDER",
        type=Path,
        help="for --int8: images like yours, each with its sentences in a text file of the same "
        "name, one per line (default: the shipped examples of shapes)",
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.calibrate and not options.int8:
        parser.error("--calibrate needs --int8")
    with one_line_errors():
        # Imported here, because it takes seconds and the help does not need it.
        from crislit.inference import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER, export_onnx
        from crislit.io import EXAMPLES

        source, target = options.source.expanduser(), options.target.expanduser()
        calibrate = (options.calibrate or EXAMPLES).expanduser() if options.int8 else None
        check_order(source, target)
        export_onnx(source, target, options.max_words, calibrate, options.trust)
        print(f"written to {options.target}: {IMAGE_ENCODER}, {GROUNDING}, {EXPORT_CONFIG}")


if __name__ == "__main__":
    main()
