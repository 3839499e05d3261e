"""Weights and example images that ship with the package."""

from pathlib import Path

from crislit.errors import InputError, require
from crislit.io.images import image_suffixes

ASSETS = Path(__file__).parents[1] / "assets"
EXAMPLES = ASSETS / "examples"
"""Example images, each with its sentences in a text file of the same name, one per line."""

Example = tuple[Path, list[str]]
"""An image and its sentences."""


def shipped_weights() -> dict[str, Path]:
    """Return the weight files that ship with the package, by name."""
    return {path.stem: path for path in sorted(ASSETS.glob("*.safetensors"))}


def shipped_networks() -> dict[str, Path]:
    """Return the folders of the networks that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}


def find_examples(folder: Path) -> list[Example]:
    """Return the images of a folder that have sentences in a text file of the same name.

    Raises:
        InputError: If there are none, or a text file cannot be read.
    """
    examples = []
    for path in sorted(p for p in folder.glob("*") if p.suffix.lower() in image_suffixes()):
        text = path.with_suffix(".txt")
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines() if text.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the sentences in {text}: {error}") from error
        if sentences := [line.strip() for line in lines if line.strip()]:
            examples.append((path, sentences))
    require(
        examples,
        f"no image with sentences in {folder}: expected pairs such as a.jpg and a.txt, "
        "one sentence per line",
    )
    return examples
