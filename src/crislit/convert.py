"""python -m crislit.convert SRC DST: converts checkpoints of the authors' code or of runs."""

from collections.abc import Sequence
from pathlib import Path

from crislit.errors import one_line_errors
from crislit.inference import add_trust, check_order, command_parser

EPILOG = """
SRC is one of: a checkpoint of the authors' code (.pth, .pt, .safetensors), whose sizes are inferred
from its weights; a run's checkpoints/best.ckpt; a folder that this command wrote.

DST is a folder for model.safetensors and config.json, or the path of the safetensors file, beside
which config.json is written. With --to released it is a .pth file that the authors' programs read
(weights under "state_dict", with the prefix "module."), or a .safetensors file without the prefix.
Tensors are renamed, and otherwise keep every bit.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a checkpoint."""
    parser = command_parser("convert", "shapes-tiny outputs/shapes-tiny", __doc__, EPILOG)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="the network to convert, see below")
    add("target", type=Path, metavar="DST", help="where to write it, see below")
    add("--to", choices=("crislit", "released"), default="crislit", help="the format of DST")
    released = parser.add_argument_group("sizes that checkpoints of the authors' code do not store")
    released.add_argument(
        "--max-words", type=int, help="tokens per sentence: 17 (default), 22 for G-Ref"
    )
    released.add_argument("--decoder-heads", type=int, help="attention heads (default 8)")
    released.add_argument("--image-size", type=int, help="side of the input (default 416)")
    add_trust(parser)
    options = parser.parse_args(arguments)
    with one_line_errors():
        # Imported here, because it takes seconds and the help does not need it.
        from crislit.checkpoints import read_any, write_folder, write_released

        source, target = options.source.expanduser(), options.target.expanduser()
        check_order(source, target)
        checkpoint = read_any(
            *(source, options.max_words, options.decoder_heads, options.image_size),
            trust=options.trust,
        )
        write = write_released if options.to == "released" else write_folder
        write(checkpoint, target)
        numbers = sum(value.numel() for value in checkpoint.weights.values())
        print(f"{options.target}: {numbers:,} numbers in {len(checkpoint.weights)} tensors")
        if options.to == "released":
            print(
                f"this format does not store: {checkpoint.network.decoder_heads} decoder heads, "
                f"{checkpoint.network.max_tokens} tokens per sentence, "
                f"{checkpoint.image_size} pixels"
            )


if __name__ == "__main__":
    main()
