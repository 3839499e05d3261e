"""Decodes Label Studio's run lengths of brush strokes."""

from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from crislit.errors import InputError

CHANNELS = 4
"""Values per pixel: Label Studio stores an RGBA image, whose last channel is the mask."""


def decode_runs(runs: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Convert Label Studio's run lengths to COCO's.

    The bytes are a stream of bits: the number of values (32 bits), the bits per value less 1 (5),
    four possible lengths of a run's length, each less 1 (4 x 4), then the runs. A run starts with
    1 if it repeats one value, or 0 if all its values follow; then which of the four lengths (2
    bits), and its length less 1.

    Args:
        runs: The bytes, as numbers from 0 to 255.
        size: The image's (height, width).

    Raises:
        InputError: If they are not run lengths of an image of this size.
    """
    height, width = size
    try:
        if not isinstance(runs, list):
            raise TypeError(f"expected a list, found {type(runs).__name__}")
        bits = "".join([f"{value:08b}" for value in bytes(runs)])
        values = _decode_bits(bits, height * width * CHANNELS)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"rle is a list, but not Label Studio's run lengths of {width} x {height} pixels "
            '(width x height); COCO has {"size": [height, width], "counts": ...}'
        ) from error
    mask = values.reshape(height, width, CHANNELS)[..., -1] > 127
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def _decode_bits(bits: str, expected: int) -> npt.NDArray[np.uint8]:
    """Return the values of a stream of bits.

    Raises:
        ValueError: If there are not as many as expected, or the stream is damaged.
    """
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    if total != expected or word != 8:
        raise ValueError(f"{total} values of {word} bits, expected {expected} of 8")
    values = np.zeros(total, dtype=np.uint8)
    filled = 0
    while filled < total:
        is_repeated = read(1)
        count = read(lengths[read(2)]) + 1
        if filled + count > total or place + word * (1 if is_repeated else count) > len(bits):
            raise ValueError("a run is too long")
        values[filled : filled + count] = (
            read(word) if is_repeated else [read(word) for _ in range(count)]
        )
        filled += count
    return values
