"""Reads the text files of custom data, explains errors of JSON, and finds files by name."""

import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from crislit.errors import InputError, require, see


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with any line ends.

    Raises:
        InputError: If it is missing or in another encoding.
    """
    require(path.is_file(), f"{path} not found")
    content = path.read_bytes()
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in content[:2] and content[2:])
    is_binary = b"\0" in content[:4096] and not is_utf16
    require(
        not is_binary,
        f"{path} is not a text file but {_guess_kind(content)}: expected JSON lines, or an export "
        "of a labeling tool as JSON",
    )
    try:
        if is_utf16:
            raise InputError(
                f"{path} is not UTF-8 text but UTF-16: save it as UTF-8{see('csv-commas')}"
            )
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason} in line {line}): save it as UTF-8"
            f"{see('csv-commas')}"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _guess_kind(content: bytes) -> str:
    """Return what a binary file looks like."""
    kinds = {
        b"PK\x03\x04": "a zip archive or a spreadsheet (unpack it, or save it as text)",
        b"\x89PNG": "an image",
        b"\xff\xd8\xff": "an image",
        b"PAR1": "a table in Parquet",
    }
    return next((kind for start, kind in kinds.items() if content.startswith(start)), "binary")


# -- JSON


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise InputError(f"the key {twice!r:.60} occurs twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def parse_json(text: str) -> Any:
    """Parse JSON, and refuse objects with the same key twice.

    Raises:
        InputError: If it is not JSON, with the cause where it is a usual one.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(f"{error.msg} at {place}{_cure(text, error)}") from error


def _cure(text: str, error: json.JSONDecodeError) -> str:
    """Return what to do about an error of JSON, if its cause is a usual one."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    is_after_comma = before.endswith(",") or after.startswith(",")
    if is_after_comma and re.match(r",?\s*([}\]]|$)", after):
        return ": remove the comma at the end"
    if after.startswith("'"):
        return ": write double quotes, not single ones"
    if after[:1] and after[0] in "“”„":
        return ': write straight quotes, "'
    if re.match("None|True|False", after):
        return ": write null, true or false"
    if error.msg.startswith("Extra data"):
        return ": write one object per line"
    if "escape" in error.msg:
        return r": write / or \\ for a backslash in a path"
    if "control character" in error.msg or error.msg.startswith("Unterminated"):
        return ": a sentence or path must end on its line"
    return ""


# -- Names


class FileFinder:
    """Finds the files of a folder under the names that lists of them use.

    Lists may spell names differently than the file system: with backslashes, percent signs, in
    other case or in another Unicode form.

    Attributes:
        respelled: The names that were found under another spelling, and these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.respelled: dict[str, str] = {}
        self._listed: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """Return the name of a file, relative to the folder, as it exists; None if it does not.

        Raises:
            InputError: If several files have this name but for the case of its letters.
        """
        if self._exists(name):
            return self._simplify(name)
        slashes = name.replace("\\", "/")
        for spelling in dict.fromkeys((slashes, unquote(slashes))):
            found = spelling if self._exists(spelling) else self._find_similar(spelling)
            if found is not None:
                self.respelled[name] = self._simplify(found)
                return self.respelled[name]
        return None

    def _simplify(self, name: str) -> str:
        """Return a name without detours, so that one image has one name."""
        simple = posixpath.normpath(name)
        if simple == name or not self._exists(simple):
            return name
        # Behind a link to a folder, ".." leads elsewhere than the text says.
        return simple if (self.folder / name).samefile(self.folder / simple) else name

    def _exists(self, name: str) -> bool:
        try:
            return os.path.isfile(self.folder / name)  # noqa: PTH113 (no error for long names)
        except ValueError:
            return False

    def _find_similar(self, name: str) -> str | None:
        """Return the file whose path differs in case or Unicode form only."""
        found = "/" if name.startswith("/") else ""
        for part in filter(None, name.split("/")):
            if part not in (".", ".."):
                names = self._names(found).get(_similar(part), [])
                exact = [part] if part in names else names
                if len(exact) > 1:
                    raise InputError(f"{name!r:.200} may be {' or '.join(sorted(exact))}")
                if not exact:
                    return None
                part = exact[0]
            found = posixpath.join(found, part)
        return found if self._exists(found) else None

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._listed:
            names: dict[str, list[str]] = {}
            for name in _list(self.folder / folder):
                names.setdefault(_similar(name), []).append(name)
            self._listed[folder] = names
        return self._listed[folder]


def _list(folder: Path) -> Iterable[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return []


def _similar(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
