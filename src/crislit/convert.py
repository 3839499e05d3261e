"""python -m crislit.convert SRC DST: a checkpoint of the authors' code, or of a run, to safetensors, and back."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg

from crislit.checkpoint import (
    Checkpoint,
    read_any,
    refuse_existing,
    save_tensors,
    write_folder,
    write_whole,
)
from crislit.errors import InputError, one_line_errors
from crislit.models.released import to_released

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
        "python -m crislit.convert", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--to", choices=("crislit", "released"), default="crislit", help="the format of DST")
    released = parser.add_argument_group("what a checkpoint of the authors' code does not tell")
    released.add_argument("--max-words", type=int, help="tokens of a sentence: 17 (default), 22 for G-Ref")
    released.add_argument("--decoder-heads", type=int, help="attention heads of the decoder (default 8)")
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
            heads, words = checkpoint.settings["decoder_heads"], checkpoint.settings["max_words"]
            print(f"this format does not tell: decoder heads {heads}, at most {words} words, {checkpoint.image_size} pixels")


def write_released(checkpoint: Checkpoint, target: Path) -> None:
    """Write weights as the authors' programs read them.

    Raises:
        InputError: If the released network has no such part or other attention heads, or the file cannot be written.
    """
    if target.suffix not in (".pth", ".pt", ".safetensors"):
        raise InputError(f"the released format is a .pth, .pt or .safetensors file, and {target} is none")
    state = to_released(checkpoint.weights)
    check_heads(checkpoint.settings["clip"])
    refuse_existing(target)
    if target.suffix == ".safetensors":
        write_whole({target: lambda part: save_tensors(state, part)})
    else:
        content = {"state_dict": {f"module.{name}": value.contiguous() for name, value in state.items()}}
        write_whole({target: lambda part: torch.save(content, part)})


def check_heads(clip: str | Mapping[str, Any]) -> None:
    """Raise an :class:`InputError` unless the encoders have 64 channels a head, as the authors' code takes for granted."""
    if isinstance(clip, str):
        return
    text = clip["text_cfg"]
    heads, rule = text.get("heads", CLIPTextCfg.heads), max(text.get("width", CLIPTextCfg.width) // 64, 1)
    if heads != rule:
        raise InputError(f"the released format cannot hold {heads} heads in the text encoder, only {rule}, 64 channels each")
    if clip["vision_cfg"].get("head_width", 64) != 64:
        raise InputError("the released format cannot hold a pooling whose heads have not 64 channels each")


if __name__ == "__main__":
    main()
