"""Images and sentences to tensors, and logits back to probability maps.

The Albumentations transforms are not exported: ``augmentation.py`` takes seconds to import.
"""

from typing import TYPE_CHECKING, Any

from crislit.transforms.letterbox import (
    letterbox_image,
    letterbox_mask,
    normalise,
    probability_maps,
    stack_images,
)

if TYPE_CHECKING:
    from crislit.transforms.tokenizer import tokenize

__all__ = [
    "letterbox_image",
    "letterbox_mask",
    "normalise",
    "probability_maps",
    "stack_images",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """Import ``tokenize`` on first use, because it loads open_clip."""
    if name != "tokenize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from crislit.transforms.tokenizer import tokenize

    return tokenize
