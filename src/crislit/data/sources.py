"""Where a data set comes from: REFER files, embedded scenes or custom data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crislit.data.custom import read_custom
from crislit.data.refer_cache import SkippedSample
from crislit.data.refer_index import ReferIndex
from crislit.data.shapes import VERSION, write_shapes
from crislit.errors import InputError, require
from crislit.io import sha256


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

    def content(self, skip_unusable: bool = False) -> str | None:
        """Return a digest of the refs that a run sees, or None if files are missing."""


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
        """Open the data set, see :class:`DataSource`."""
        return ReferIndex.open(self.root, self.name, self.refs, skip_unusable)

    def content(self, skip_unusable: bool = False) -> str | None:
        """Return the refs file's SHA-256, and that of the annotations where they decide, too."""
        names = [self.refs, "instances.json"] if skip_unusable else [self.refs]
        return _digests([self.root / self.name / name for name in names])


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
        """Open the data set, see :class:`DataSource`."""
        root = write_shapes(self.root, self.name)
        return ReferIndex.open(root, self.name, "refs(crislit).p", skip_unusable)

    def content(self, skip_unusable: bool = False) -> str | None:
        """Return the version of the definition."""
        return f"version {VERSION}"


@dataclass(frozen=True)
class CustomSource:
    """Custom data: a JSON-lines file, or COCO annotations with a CSV of sentences.

    Attributes:
        file: The JSON-lines file, or the COCO instances file.
        sentences: The CSV of a COCO file's sentences.
        images: The folder of a COCO file's images, if it is not the file's own.
    """

    file: str
    sentences: str | None = None
    images: str | None = None

    @property
    def name(self) -> str:
        """The file."""
        return self.file

    def open(self, skip_unusable: bool = False) -> ReferIndex:
        """Open the data set, see :class:`DataSource`."""
        data = read_custom(self.file, self.sentences, self.images)
        table = self.sentences or self.file
        skipped = [p for p in data.problems if skip_unusable and p.split == "train"]
        problems = [problem for problem in data.problems if problem not in skipped]
        reasons = "; ".join(f"line {p.line}: {p.reason[:250]}" for p in problems[:3])
        require(
            not problems,
            f"{len(problems)} lines of {table} cannot be used: {reasons}. "
            "`python -m crislit.check_data` lists all",
        )
        samples = [SkippedSample(f"line {p.line} of {table}", p.reason) for p in skipped]
        return ReferIndex.of(data.refs, data.instances, Path(self.file), data.folder, samples)

    def content(self, skip_unusable: bool = False) -> str | None:
        """Return the SHA-256 of the file and of the CSV."""
        files = [self.file] if self.sentences is None else [self.file, self.sentences]
        return _digests([Path(file).expanduser() for file in files])


def build_source(dataset: Mapping[str, Any], root: Path) -> DataSource:
    """Return the source that the group ``dataset`` of a configuration describes.

    Args:
        dataset: ``file``, ``sentences`` and ``images`` of custom data, or ``folder``, ``refs`` and
            ``embedded``.
        root: Folder of all data.

    Raises:
        InputError: If it describes none, or both.
    """
    texts = {name: dataset.get(name) for name in ("folder", "refs", "file", "sentences", "images")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InputError(f"dataset.{name} must be text, got {text!r:.200}")
    folder, refs, file = texts["folder"], texts["refs"], texts["file"]
    if file is not None and folder is None and refs is None:
        return CustomSource(file, texts["sentences"], texts["images"])
    if file is not None or folder is None or refs is None:
        raise InputError("expected either dataset.file (custom data), or dataset.folder and refs")
    is_embedded = dataset.get("embedded")
    return EmbeddedSource(root, folder) if is_embedded else ReferSource(root, folder, refs)


def _digests(paths: list[Path]) -> str | None:
    return " ".join(map(sha256, paths)) if all(path.is_file() for path in paths) else None
