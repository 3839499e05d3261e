"""Reads mask images as COCO run lengths."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
from pycocotools import mask as coco_mask

from crislit.errors import InputError, require
from crislit.io.images import image_errors, is_transparent, open_image_file, require_one_frame
from crislit.io.orientation import require_upright

MaskValue = int | tuple[int, int, int]
"""What marks an object: a stored value (in a palette image, the index), or an RGB color."""
MARKED = "marked pixels need values above 127, or 1 in an image of 0 and 1"
CURE = "name the object's with mask_value, or save the mask in black and white"
END = 16
"""Values this close to the darkest or brightest one may be noise of a compressed image."""
PLATEAU = 1e-3
"""Share of pixels that may lie in areas of a value in between, in a mask with soft edges."""
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
Array = npt.NDArray[Any]


def parse_mask_value(value: Any) -> MaskValue | None:
    """Return a mask value from a setting: a whole number, ``"#rrggbb"`` or ``[r, g, b]``.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*(\d{1,5}|\[[\d\s,]+\])\s*", value):
        value = json.loads(value)
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value.strip()):
        value = list(bytes.fromhex(value.strip()[1:]))
    if value is None or (type(value) is int and 0 <= value < 2**16):
        return value
    is_color = isinstance(value, (list, tuple)) and len(value) == 3
    require(
        is_color and all(type(part) is int and 0 <= part <= 255 for part in value),
        f'mask_value must be a whole number, a color "#rrggbb" or [r, g, b], found {value!r:.60}',
    )
    red, green, blue = value
    return red, green, blue


def read_mask(
    path: Path, size: tuple[int, int], value: MaskValue | None = None
) -> tuple[dict[str, Any], str]:
    """Read an image as a mask in COCO's run lengths.

    Without a value, a mask has two: 0 and 1, or dark and bright (above 127), with soft edges or
    not; or two colors, of which black is the background, or else white. A color palette counts
    by its colors, not by the order of its entries. Transparent pixels are an error, since they may
    be the object or the background, unless the value is an index of the palette.

    Args:
        path: The file.
        size: The (height, width) of its image.
        value: What marks the object, if the mask has more than two values.

    Returns:
        The run lengths, and the values of the mask in words.

    Raises:
        InputError: If it cannot be read, is not of this size, has transparent pixels or several
            frames, marks no pixel, or has several values and none is named.
    """
    with (
        image_errors(f"{path} is not a mask that can be read", f"no mask at {path}"),
        open_image_file(path) as image,
    ):
        found = (image.height, image.width)
        # Checked first: a few bytes can claim any number of pixels.
        require(
            found == size, f"the mask {path} has {found} pixels (height, width), its image {size}"
        )
        require_one_frame(image, f"the mask {path}")
        require_upright(image, f"the mask {path}")
        is_index = image.mode == "P" and isinstance(value, int)
        transparent = not is_index and is_transparent(image)
        labels, colors = _labels(image, by_index=is_index)
        is_lossy = image.format in LOSSY
    require(
        not transparent,
        f"the mask {path} has transparent pixels: save it in black and white, without them",
    )
    try:
        if labels.dtype.kind == "f":
            require(np.isfinite(labels).all(), "has values that are not numbers")
            labels = np.rint(labels).astype(np.int64)
        if value is not None:
            marked, values = _select(labels, colors, value)
        elif colors is not None:
            marked, values = _mark_color(labels, colors)
        else:
            marked, values = _mark_bright(labels, is_lossy)
    except InputError as error:
        raise InputError(f"the mask {path} {error}") from error
    # In the column-major order of run lengths, several times as fast as NumPy's copy.
    runs = coco_mask.encode(cv2.transpose(marked.view(np.uint8)).T)
    return {"size": list(size), "counts": runs["counts"].decode()}, values


def _labels(image: PIL.Image.Image, by_index: bool) -> tuple[Array, Array | None]:
    """Return each pixel's label, and the RGB colors of the labels; None if labels are gray."""
    if image.mode == "P":
        indices = np.array(image)
        if by_index:
            return indices, None
        palette = np.zeros((256, 3), dtype=np.uint8)
        entries = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
        palette[: len(entries)] = entries
        used = palette[_values(indices)]
        if (used != used[0]).any() and (used.min(axis=1) == used.max(axis=1)).all():
            return palette[indices, 0], None  # shades of gray, as in an image without a palette
        return indices, palette
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return np.array(image), None
    if image.mode in ("LA", "La"):
        return np.array(image.convert("LA").getchannel("L")), None
    rgb = np.array(image.convert("RGB"))
    # Compression turns shades of gray into almost gray ones.
    tolerance = END if image.format in LOSSY else 0
    if (rgb.max(axis=2) - rgb.min(axis=2)).max() <= tolerance:
        return np.array(image.convert("L")), None
    packed = rgb.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    used, labels = np.unique(packed, return_inverse=True)
    return labels.reshape(packed.shape), np.stack([used >> 16, used >> 8 & 255, used & 255], axis=1)


def _select(labels: Array, colors: Array | None, value: MaskValue) -> tuple[Array, str]:
    """Return the pixels of one value or color."""
    if isinstance(value, int):
        chosen = [value] if colors is None else _find(colors, (value,) * 3)
    else:
        is_gray = colors is None and len(set(value)) == 1
        chosen = [value[0]] if is_gray else _find(colors, value)
    marked, used = np.isin(labels, chosen), _values(labels)
    name = _name(value)
    require(marked.any(), f"has no pixel of mask_value {name}: {_list(used, colors)}")
    return marked, f"{name} (mask_value) of {_list(used, colors, words='')}"


def _find(colors: Array | None, color: tuple[int, ...]) -> list[int]:
    return [] if colors is None else np.flatnonzero((colors == color).all(axis=1)).tolist()


def _mark_color(labels: Array, colors: Array) -> tuple[Array, str]:
    """Return the pixels of the only color beside the background, which is black or else white."""
    used = _values(labels)
    shown = np.unique(colors[used], axis=0)
    if len(shown) == 1 and len(used) == 2 and not used[0]:
        return labels > 0, _list(used, None, words="")  # the palette has one color only
    background = next((c for c in (0, 255) if (shown == c).all(axis=1).any()), None)
    others = shown[(shown != background).any(axis=1)] if background is not None else shown
    require(len(others), f"marks no pixel: {_list(used, colors)}; {MARKED}")
    require(
        len(others) == 1,
        f"has several colors, and any may be the object's: {_list(used, colors)}; {CURE}",
    )
    return np.isin(labels, _find(colors, tuple(others[0]))), _list(used, colors, words="")


def _mark_bright(values: Array, is_lossy: bool) -> tuple[Array, str]:
    """Return the pixels of 1 in an image of 0 and 1, and the bright ones in others."""
    used = _values(values)
    if used[-1] <= 127:
        require(
            used.tolist() in ([0, 1], [1]),
            f"marks no pixel: {_list(used, None)}; {MARKED}. Or {CURE}",
        )
        return values > 0, _list(used, None, words="")
    if len(used) == 1 or (len(used) == 2 and used[0] <= 127):
        return values > 127, _list(used, None, words="")
    depth = 257 if used[-1] > 255 else 1
    is_soft = 0 <= used[0] // depth <= 127
    scaled = (values // depth).astype(np.uint8) if is_soft else values
    require(
        is_soft and _has_two_levels(scaled, is_lossy),
        f"has several values, and any may be the object's: {_list(used, None)}; {CURE}",
    )
    return scaled > 127, f"{used[0]} to {used[-1]} with soft edges"


def _has_two_levels(values: npt.NDArray[np.uint8], is_lossy: bool) -> bool:
    """Whether a gray mask has one dark and one bright level, with soft edges or noise between.

    Labels of objects form areas: pixels whose neighbors all have the same value. Values of soft
    edges do not. The labels 0, 1 and 255 have no value in between, as soft edges have, and none
    just below 255, as the noise of a compressed image. And every value of labels forms areas, while
    noise also has values that do not.
    """
    kernel = np.ones((3, 3), dtype=np.uint8)
    is_flat = cv2.erode(values, kernel) == cv2.dilate(values, kernel)
    flat = np.bincount(values[is_flat], minlength=256)
    used = _values(values)
    darkest, brightest = int(used[0]), int(used[-1])
    between = (used > darkest + END) & (used < brightest - END)
    near = [
        used[(used > darkest) & (used <= darkest + END)],
        used[(used < brightest) & (used >= brightest - END)],
    ]
    has_noise = all(map(len, near))
    most = PLATEAU * values.size
    has_labels = any(0 < len(end) < END and (flat[end] > most).all() for end in near)
    plateaus = flat[darkest + END + 1 : max(0, brightest - END)].sum()
    is_two_level = darkest <= 127 < brightest and plateaus <= most
    return bool(is_two_level and (is_lossy or ((between.any() or has_noise) and not has_labels)))


def _values(labels: Array) -> Array:
    """Return the sorted values of an array."""
    if labels.dtype == np.uint8:
        # Several times as fast as NumPy's unique and bincount.
        return np.flatnonzero(cv2.calcHist([labels], [0], None, [256], [0, 256]))
    return np.unique(labels).astype(np.int64)


def _list(used: Array, colors: Array | None, words: str = "its {} are ") -> str:
    """Return the values or colors of a mask in words, at most 8."""
    kind = "values" if colors is None else "colors"
    if colors is None:
        names = [str(int(value)) for value in used[:8]]
    else:
        shown = list(dict.fromkeys(_name(tuple(colors[value])) for value in used[:1000]))
        names, used = shown[:8], np.array(shown)
    more = f", ... ({len(used)} {kind})" if len(used) > 8 else ""
    return words.format(kind) + ", ".join(names) + more


def _name(value: MaskValue | tuple[Any, ...]) -> str:
    """Return a value as users write it."""
    return str(value) if isinstance(value, int) else "#{:02x}{:02x}{:02x}".format(*map(int, value))
