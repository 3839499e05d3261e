"""python -m crislit.convert SRC DST: a checkpoint of the authors' code, or of a run, to safetensors, and back."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from crislit.checkpoints.checkpoint import read_any, write_folder, write_released
from crislit.errors import one_line_errors

EPILOG = """
SRC is one of: a checkpoint of the authors' code (.pth, .pt, .safetensors; sizes are read off its weights), a run's
checkpoints/best.ckpt, a folder that this program wrote.

DST is a folder, which gets model.safetensors and config.json; or the path of the safetensors file, beside which config.json
goes. With --to released it is a .pth file as the authors' programs read it (under "state_dict", names beginning with
"module."), or a .safetensors file with the bare names. Tensors are renamed, and otherwise stay bit for bit what they are.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert what the command line says."""
    parser = argparse.ArgumentParser(
        "python -m crislit.convert",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument(
        "--to", choices=("crislit", "released"), default="crislit", help="the format of DST"
    )
    released = parser.add_argument_group("what a checkpoint of the authors' code does not tell")
    released.add_argument(
        "--max-words", type=int, help="tokens of a sentence: 17 (default), 22 for G-Ref"
    )
    released.add_argument(
        "--decoder-heads", type=int, help="attention heads of the decoder (default 8)"
    )
    released.add_argument("--image-size", type=int, help="side of the square input (default 416)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        source, target = options.source.expanduser(), options.target.expanduser()
        checkpoint = read_any(source, options.max_words, options.decoder_heads, options.image_size)
        if options.to == "released":
            write_released(checkpoint, target)
        else:
            write_folder(checkpoint, target)
        numbers = sum(value.numel() for value in checkpoint.weights.values())
        print(f"{options.target}: {numbers:,} numbers in {len(checkpoint.weights)} tensors")
        if options.to == "released":
            heads, words = checkpoint.network.decoder_heads, checkpoint.network.max_tokens
            print(
                f"this format does not tell: decoder heads {heads}, at most {words} words, {checkpoint.image_size} pixels"
            )


if __name__ == "__main__":
    main()
