"""Reads and writes files: reading never runs code and is bounded, writing is atomic."""

from crislit.io.assets import EXAMPLES, Example, find_examples, shipped_networks, shipped_weights
from crislit.io.dataset_images import (
    decode_image,
    decode_pixels,
    read_image_file,
    read_upright_size,
)
from crislit.io.files import (
    Writer,
    read_json,
    refuse_existing,
    sha256,
    sync,
    text_writer,
    write_csv,
    write_files,
    write_json,
    write_text,
)
from crislit.io.images import MAX_PIXELS, Image, ImageSource, image_suffixes, open_image
from crislit.io.masks import MaskValue, parse_mask_value, read_mask
from crislit.io.pickles import load_pickle
from crislit.io.tensors import (
    check_checksums,
    check_finite,
    check_names,
    check_storage,
    format_shape,
    join_names,
    read_safetensors,
    read_state_dict,
    read_torch,
    save_tensors,
    to_state_dict,
)

__all__ = [
    "EXAMPLES",
    "MAX_PIXELS",
    "Example",
    "Image",
    "ImageSource",
    "MaskValue",
    "Writer",
    "check_checksums",
    "check_finite",
    "check_names",
    "check_storage",
    "decode_image",
    "decode_pixels",
    "find_examples",
    "format_shape",
    "image_suffixes",
    "join_names",
    "load_pickle",
    "open_image",
    "parse_mask_value",
    "read_image_file",
    "read_json",
    "read_mask",
    "read_safetensors",
    "read_state_dict",
    "read_torch",
    "read_upright_size",
    "refuse_existing",
    "save_tensors",
    "sha256",
    "shipped_networks",
    "shipped_weights",
    "sync",
    "text_writer",
    "to_state_dict",
    "write_csv",
    "write_files",
    "write_json",
    "write_text",
]
