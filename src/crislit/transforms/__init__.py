"""Images and sentences to tensors, and logits back to probability maps.

The augmentations are not exported: Albumentations takes seconds to import.
"""

from crislit.transforms.letterbox import (
    BORDER,
    ProbabilityMap,
    letterbox_image,
    letterbox_mask,
    letterbox_matrices,
    normalize,
    probability_maps,
    probability_squares,
    restore,
    stack_images,
)
from crislit.transforms.tokenizer import has_words, split_at_limit, tokenize, truncated_words

__all__ = [
    "BORDER",
    "ProbabilityMap",
    "has_words",
    "letterbox_image",
    "letterbox_mask",
    "letterbox_matrices",
    "normalize",
    "probability_maps",
    "probability_squares",
    "restore",
    "split_at_limit",
    "stack_images",
    "tokenize",
    "truncated_words",
]
