"""Draws contact sheets of custom data: images with their targets and sentences."""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from crislit.data.custom.builder import CustomData
from crislit.data.custom.check import draw_target
from crislit.data.custom.remarks import Remark
from crislit.data.refer_annotations import Mask
from crislit.errors import InputError, counted, printable, require
from crislit.io import Image, decode_image, write_files

COLUMNS, ROWS = 4, 6
"""Samples of a sheet."""
MAX_SHEETS = 4
PREFIX = "crislit-sheet-"
"""Beginning of the sheets' names, which no other file should have."""
SIDE = 400
"""Pixels of the longer side of an image on a sheet."""
DIMMED = 0.55
"""Brightness outside a target."""
LETTERS = 40
"""Letters in a line below an image."""
MAX_LINES = 4


def draw_sheets(
    data: CustomData, remarks: list[Remark], folder: Path
) -> tuple[list[Path], list[str]]:
    """Draw at most ``MAX_SHEETS`` contact sheets, ``crislit-sheet-1.png`` and so on.

    Earlier sheets of the folder are replaced.

    Args:
        data: The data.
        remarks: Remarks; the samples that they are about come first. The others are spread evenly.
        folder: Receives the sheets.

    Returns:
        The files, and remarks on them.

    Raises:
        InputError: If a sheet cannot be written, or the folder holds images of the data.
    """
    parents = {(data.folder / image["file_name"]).parent for image in data.instances["images"]}
    require(
        folder.resolve() not in {parent.resolve() for parent in parents},
        f"{folder} holds images of the data: choose another folder for the contact sheets",
    )
    rows = choose_rows(len(data.refs), remarks, MAX_SHEETS * COLUMNS * ROWS)
    suspicious = {row for remark in remarks for row in remark.rows}
    tiles = []
    for row in rows:
        try:
            tiles.append((_draw_tile(data, row), _caption(data, row), row in suspicious))
        except InputError:
            continue  # an unreadable image, which is among the problems
    for path in folder.glob(f"{PREFIX}*.png"):
        if path.stem.removeprefix(PREFIX).isdecimal():
            path.unlink()
    paths, per_sheet = [], COLUMNS * ROWS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start in range(0, len(tiles), per_sheet):
            path = folder / f"{PREFIX}{start // per_sheet + 1}.png"
            figure = _draw_sheet(tiles[start : start + per_sheet])
            write_files({path: lambda part, figure=figure: figure.savefig(part, format="png")})  # type: ignore[misc]
            paths.append(path)
    lacks_letters = any("Glyph" in str(warning.message) for warning in caught)
    notes = ["the font of the sheets lacks letters of some sentences, and shows boxes instead"]
    return paths, notes if lacks_letters else []


def choose_rows(count: int, remarks: list[Remark], most: int) -> list[int]:
    """Return the refs to draw: first those of remarks, then others, spread evenly."""
    suspicious = list(dict.fromkeys(row for remark in remarks for row in remark.rows))[:most]
    others = sorted(set(range(count)) - set(suspicious))
    room = min(most - len(suspicious), len(others))
    return suspicious + [others[place * len(others) // room] for place in range(room)]


def _draw_tile(data: CustomData, row: int) -> Image:
    """Return an image, dimmed outside its target, with the target's outline."""
    image = data.instances["images"][data.refs[row]["image_id"] - 1]
    size = image["height"], image["width"]
    pixels = decode_image(data.folder / image["file_name"], size)
    return outline(pixels, draw_target(data, row))


def outline(pixels: Image, mask: Mask) -> Image:
    """Scale an image to ``SIDE`` pixels, dim it outside a mask, and draw the outline."""
    height, width = mask.shape
    scale = SIDE / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    # Any part of a pixel counts, so that small targets stay visible.
    marked = cv2.resize(255 * mask, shape, interpolation=way) > 0
    scaled = cv2.resize(pixels, shape, interpolation=way)
    tile: Image = np.where(marked[..., None], scaled, DIMMED * scaled).astype(np.uint8)
    contours, _ = cv2.findContours(marked.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for color, thickness in (((255, 255, 255), 4), ((230, 0, 0), 2)):
        cv2.drawContours(tile, contours, -1, color, thickness)
    return tile


def _caption(data: CustomData, row: int) -> str:
    """Return the lines below an image: where it is listed, and its sentences."""
    ref = data.refs[row]
    lines = [f"{data.unit} {ref['sentences'][0]['line']}, {ref['split']}"]
    for place, sentence in enumerate(ref["sentences"]):
        wrapped = textwrap.wrap(printable(sentence["sent"]), LETTERS, max_lines=2)
        if len(lines) + len(wrapped) > MAX_LINES:
            lines.append(f"and {counted(len(ref['sentences']) - place, 'more sentence')}")
            break
        lines += wrapped
    return "\n".join(lines)


def _draw_sheet(tiles: list[tuple[Image, str, bool]]) -> Any:
    """Return a figure of a sheet; captions of suspicious samples are red."""
    from matplotlib.figure import Figure  # takes a second to import

    rows = -(-len(tiles) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 3.5 * rows), dpi=100)
    figure.subplots_adjust(0.01, 0.25 / rows, 0.99, 1 - 0.05 / rows, 0.05, 0.4)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (tile, caption, is_suspicious) in zip(grid.flat, tiles, strict=False):
        axes.imshow(tile)
        axes.text(
            0.5,
            -0.03,
            caption,
            transform=axes.transAxes,
            ha="center",
            va="top",
            fontsize=9,
            color="#b00000" if is_suspicious else "black",
            parse_math=False,
        )
    return figure
