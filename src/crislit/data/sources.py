"""Where a data set comes from: REFER files, embedded scenes or custom data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crislit.data.custom import read_custom
from crislit.data.refer_cache import SkippedSample
from crislit.data.refer_index import ReferIndex
from crislit.data.shapes import write_shapes
from crislit.errors import InputError, counted, require, see

WANTED = {
    "folder": "the folder of a REFER data set",
    "refs": "its refs file",
    "file": "a JSON-lines file, or what a labeling tool wrote; see `python -m crislit.check_data "
    "--help`",
    "sentences": "a CSV, categories or null",
    "images": "the folder of the images, or null",
}
"""Meanings of the texts of the group ``dataset``."""


class DataSource(Protocol):
    """A data set that can be opened as an index."""

    @property
    def name(self) -> str:
        """The data set's name in messages."""

    def open(self, skip_unusable: bool = False) -> ReferIndex:
        """Open the data set, writing or indexing it on first use.

        Args:
            skip_unusable: Leave out training refs that cannot be used and list them in
                ``ReferIndex.skipped``, instead of raising an error.

        Raises:
            InputError: If a file is missing or cannot be used.
        """


@dataclass(frozen=True)
class ReferSource:
    """A data set on disk in the REFER layout.

    Attributes:
        root: Folder that holds ``images/`` and the data set's folder.
        name: The data set's folder, such as ``refcoco``.
        refs: Its refs file, such as ``refs(unc).p``.
    """

    root: Path
    name: str
    refs: str

    def open(self, skip_unusable: bool = False) -> ReferIndex:
        """Open the data set, see ``DataSource``."""
        return ReferIndex.open(self.root, self.name, self.refs, skip_unusable)


@dataclass(frozen=True)
class EmbeddedSource:
    """An embedded data set, written below a folder on first use.

    Attributes:
        root: Folder of all data.
        name: ``shapes``, ``shapes+`` or ``gshapes``.
    """

    root: Path
    name: str

    def open(self, skip_unusable: bool = False) -> ReferIndex:
        """Open the data set, see ``DataSource``."""
        root = write_shapes(self.root, self.name)
        return ReferIndex.open(root, self.name, "refs(crislit).p", skip_unusable)


@dataclass(frozen=True)
class CustomSource:
    """Custom data: a JSON-lines file, or what labeling tools write.

    Attributes:
        file: The file or folder, see ``read_custom``.
        sentences: The CSV of a COCO file's sentences, or ``categories``.
        images: The folder of a COCO file's images, if it is not the file's own.
        val_share: Share of the training images to move to val.
        mask_value: What marks objects in mask images with several values.
    """

    file: str
    sentences: str | None = None
    images: str | None = None
    val_share: float | None = None
    mask_value: Any = None

    @property
    def name(self) -> str:
        """The file."""
        return self.file

    def open(self, skip_unusable: bool = False) -> ReferIndex:
        """Open the data set, see ``DataSource``."""
        data = read_custom(self.file, self.sentences, self.images, self.val_share, self.mask_value)
        is_table = data.unit == "line" and self.sentences is not None
        table = self.sentences if is_table else self.file
        skippable = ("train",) if skip_unusable else ()
        skipped = [problem for problem in data.problems if problem.split in skippable]
        problems = [problem for problem in data.problems if problem.split not in skippable]
        reasons = "; ".join(f"{data.unit} {p.line}: {p.reason[:250]}" for p in problems[:3])
        require(
            not problems,
            f"{counted(len(problems), data.unit)} of {table} cannot be used: {reasons}. "
            f"`python -m crislit.check_data` lists all{see('unusable-lines')}",
        )
        samples = [SkippedSample(f"{data.unit} {p.line} of {table}", p.reason) for p in skipped]
        return ReferIndex.of(data.refs, data.instances, Path(self.file), data.folder, samples)


def build_source(dataset: Mapping[str, Any], root: Path) -> DataSource:
    """Return the source that the group ``dataset`` of a configuration describes.

    Args:
        dataset: ``file``, ``sentences``, ``images``, ``val_share`` and ``mask_value`` of custom
            data, or ``folder``, ``refs`` and ``embedded``.
        root: Folder of all data.

    Raises:
        InputError: If it describes none, or both.
    """
    texts = {name: dataset.get(name) for name in ("folder", "refs", "file", "sentences", "images")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InputError(f"dataset.{name} must be text, got {text!r:.200}")
        is_empty = text is not None and not text.strip()
        require(not is_empty, f"dataset.{name} is empty: expected {WANTED[name]}")
    folder, refs, file = texts["folder"], texts["refs"], texts["file"]
    if file is not None and folder is None and refs is None:
        options = dataset.get("val_share"), dataset.get("mask_value")
        return CustomSource(file, texts["sentences"], texts["images"], *options)
    if file is not None or folder is None or refs is None:
        raise InputError(
            "expected either dataset.file=FILE (custom data: a JSON-lines file, or what a "
            "labeling tool wrote; see `python -m crislit.check_data --help`), or dataset.folder "
            "and dataset.refs"
        )
    is_embedded = dataset.get("embedded")
    return EmbeddedSource(root, folder) if is_embedded else ReferSource(root, folder, refs)
