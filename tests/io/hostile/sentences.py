"""Hostile sentences for a network."""

import functools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crislit.inference.segmenter import Segmenter
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.transforms.tokenizer import tokenize
from tests.inference.test_segmenter import CLIP
from tests.io.hostile.case import MANY, MILLION, Case, Cases
from tests.io.hostile.images import photo
from tests.io.hostile.refer import SENTENCES


@functools.cache
def segmenter() -> Segmenter:
    """Return a small network with random weights."""
    config = CRISConfig(
        clip=CLIP, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64
    )
    return Segmenter(build_cris(config), image_size=64)


def segment(folder: Path, sentence: str) -> list[Any]:
    """Segment an image.

    Returns:
        The mask's shape, whether it is finite, the number of start and end tokens, and whether
        all warnings were short.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (result,) = segmenter()(photo(), sentence)
    tokens = tokenize([sentence], 17)
    return [
        [*result.mask.shape],
        bool(np.isfinite(result.probability).all()),
        [int((tokens == token).sum()) for token in (49406, 49407)],
        all(len(str(warning.message)) < 1000 for warning in caught),
    ]


def segment_odd(folder: Path, sentence: Any) -> Any:
    """Segment an image by something that is not a sentence."""
    return segmenter()(photo(), [sentence])


def sentences() -> Cases:
    """Yield unusual and invalid sentences."""
    letters = np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], MANY)
    texts = SENTENCES | {
        "ten thousand words": " ".join(f"word{i}" for i in range(10**4)),
        "one word of 100,000 letters": "".join(letters),
        "100,000 emoji": "🐕" * MANY,
        "100,000 punctuation marks": "!" * MANY,
        "100,000 lines": "\n" * MANY + "dog",
        "nested entities": "&amp;" * 10**4,
        "lone surrogate": "\ud800 dog",
        "a million spaces": " " * MILLION,
    }
    for name, sentence in texts.items():
        yield Case(
            f"sentence, {name}",
            partial(segment, sentence=sentence),
            error=None if sentence.strip() else "a sentence is empty",
            value=[[200, 300], True, [1, 1], True],
            names_file=False,
        )
    odd = {
        "None": None,
        "number": 7,
        "a million zeros": bytes(MILLION),
        "bytes": b"dog",
        "list in a list": [["dog"]],
    }
    for name, value in odd.items():
        act = partial(segment_odd, sentence=value)
        yield Case(f"sentence, {name}", act, error="must be a string", names_file=False)
