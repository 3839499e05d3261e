"""Downloads and verifies RefCOCO, RefCOCO+ and G-Ref: REFER's annotations, COCO's train2014 images.

    python scripts/download_refer.py DATA             # downloads 13.7 GB, needs 28 GB of disk
    python scripts/download_refer.py DATA --verify    # compares with the published counts

After an interruption, start it again: it continues where it stopped. Then train with data_root=DATA
or CRISLIT_DATA=DATA. With --verify the exit code is 1 if a count differs.
"""

import argparse
import hashlib
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from crislit.data.refer_index import IMAGE_FOLDERS, ReferIndex
from crislit.errors import InputError, one_line_errors

CHUNK = 2**20
SPARE = 2**28
"""Bytes of the disk that must stay free."""


@dataclass(frozen=True)
class Archive:
    """A zip file and its mirrors.

    Attributes:
        name: Its file name.
        inside: The folder in it that is unpacked.
        place: The folder below the data root that it becomes.
        size: Bytes.
        checksum: ``algorithm:digest``.
        urls: Mirrors, the best one first.
    """

    name: str
    inside: str
    place: str
    size: int
    checksum: str
    urls: tuple[str, ...]


def refer_archive(name: str, captured: str, size: int, sha256: str) -> Archive:
    """Return one of the REFER project's archives.

    Its original host no longer answers, but the Web Archive has copies. Other hosts that we know
    serve conversions. A copy that you already have can be placed in DATA/downloads.
    """
    original = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
    urls = (
        f"https://web.archive.org/web/{captured}id_/{original}",
        f"https://web.archive.org/web/2id_/{original}",  # the newest capture
        original,
    )
    return Archive(f"{name}.zip", name, name, size, f"sha256:{sha256}", urls)


ARCHIVES = {
    "refcoco": refer_archive(
        "refcoco",
        "20220413011718",
        53_993_993,
        "7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
    ),
    "refcoco+": refer_archive(
        "refcoco+",
        "20220413011656",
        45_613_210,
        "5f1238112d63199e68da54a28f201471909b21ded7ed79a57d51b4c1443c6b45",
    ),
    "refcocog": refer_archive(
        "refcocog",
        "20220413012904",
        56_712_951,
        "3d1f7e5b2ff2205940bf59de55f861f5f2cc1403fb980669933a7f9af1aa8211",
    ),
    "images": Archive(
        "train2014.zip",
        "train2014",
        "images/train2014",
        13_510_573_713,
        "md5:0da8c0bd3d6becc4dcb32757491aca88",
        (
            "http://images.cocodataset.org/zips/train2014.zip",
            "https://s3.amazonaws.com/images.cocodataset.org/zips/train2014.zip",
            "https://pjreddie.com/media/files/train2014.zip",
        ),
    ),
}

Counts = dict[str, tuple[int, int, int]]
"""Refs, sentences and images of each split."""

EXPECTED: dict[tuple[str, str], Counts] = {
    ("refcoco", "refs(unc).p"): {
        "train": (42404, 120624, 16994),
        "val": (3811, 10834, 1500),
        "testA": (1975, 5657, 750),
        "testB": (1810, 5095, 750),
    },
    ("refcoco+", "refs(unc).p"): {
        "train": (42278, 120191, 16992),
        "val": (3805, 10758, 1500),
        "testA": (1975, 5726, 750),
        "testB": (1798, 4889, 750),
    },
    ("refcocog", "refs(umd).p"): {
        "train": (42226, 80512, 21899),
        "val": (2573, 4896, 1300),
        "test": (5023, 9602, 2600),
    },
    ("refcocog", "refs(google).p"): {"train": (44822, 85474, 24698), "val": (5000, 9536, 4650)},
}


# -- Downloading


class UnusableMirrorError(Exception):
    """A mirror that does not provide the archive; the next one may."""


def fetch(archive: Archive, folder: Path, tries: int = 3, pause: float = 2.0) -> Path:
    """Download an archive from the first mirror that provides it complete and correct.

    A partial download is continued.

    Args:
        archive: The archive.
        folder: The folder for the file.
        tries: Attempts per mirror.
        pause: Seconds between two attempts.

    Raises:
        InputError: If no mirror provides it, or the disk is too full.
    """
    target = folder / archive.name
    if target.is_file():  # from an interrupted unpacking, or a copy of the user's
        if digest(target, archive.checksum.split(":")[0]) != archive.checksum:
            raise InputError(
                f"{target} is not the published archive ({archive.checksum}): "
                "remove it, and start again"
            )
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{archive.name}.part"
    reasons = []
    for url in archive.urls:
        try:
            pull(archive, url, part, tries, pause)
        except UnusableMirrorError as error:
            reasons.append(f"{url}: {error}")
            print(f"{url}: {error}", file=sys.stderr)
            continue
        part.rename(target)
        return target
    partial = f"; a later start continues the partial download {part}" if part.is_file() else ""
    raise InputError(f"no mirror provided {archive.name}{partial}. {'; '.join(reasons)}")


def pull(archive: Archive, url: str, part: Path, tries: int, pause: float) -> None:
    """Complete the partial file from one mirror.

    Raises:
        UnusableMirrorError: If the mirror refuses, disconnects too often, or has another file.
        InputError: If the disk is too full.
    """
    reason = ""
    for number in range(tries):
        if number:
            time.sleep(pause)
        start, failure = size_of(part), ""
        try:
            if start < archive.size:
                check_space(part.parent, archive.size - start, archive.name)
                pull_once(archive, url, part)
        except urllib.error.HTTPError as error:
            raise UnusableMirrorError(f"it answers {error.code} {error.reason}") from error
        except (HTTPException, OSError) as error:
            failure = str(error) or type(error).__name__
        size = size_of(part)
        if size < archive.size:
            reason = failure or f"the connection ended at byte {size:,} of {archive.size:,}"
            continue
        checksum = digest(part, archive.checksum.split(":")[0])
        if size == archive.size and checksum == archive.checksum:
            return
        part.unlink()
        if not start:
            raise UnusableMirrorError(f"it has another file ({size:,} bytes, {checksum})")
        reason = "the partial download was not a part of the archive"  # try once more from zero
    raise UnusableMirrorError(reason)


def pull_once(archive: Archive, url: str, part: Path) -> None:
    """Download the rest of a partial file, or all of it if the server does not support ranges."""
    start = size_of(part)
    headers = {"User-Agent": "crislit"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        sent_range = response.headers.get("Content-Range", "")
        is_rest = response.status == 206 and sent_range.startswith(f"bytes {start}-")
        start = start if is_rest else 0
        length = response.headers.get("Content-Length", "")
        size = start + int(length) if length.isdecimal() else archive.size
        if size != archive.size:
            raise UnusableMirrorError(
                f"it has another file, of {size:,} bytes instead of {archive.size:,}"
            )
        bar = tqdm(
            total=archive.size,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=archive.name,
            disable=None,
        )
        with bar, part.open("ab" if is_rest else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > archive.size:  # another file, without a Content-Length
                    break


def size_of(path: Path) -> int:
    """Return a file's size in bytes, 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def check_space(folder: Path, needed: int, name: str) -> None:
    """Raise an ``InputError`` if a folder's disk does not have so many bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise InputError(
            f"{name} needs {(needed + SPARE) / 1e9:.1f} GB below {folder}, and "
            f"{free / 1e9:.1f} GB are free: make room, or choose another folder"
        )


def digest(path: Path, algorithm: str) -> str:
    """Return ``algorithm:digest`` of a file."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


# -- Unpacking


def unpack(archive: Archive, file: Path, root: Path) -> Path:
    """Unpack an archive's folder. It gets its name only when it is complete.

    Raises:
        InputError: If the archive is damaged or would write elsewhere, or the disk is too full.
    """
    place = root / archive.place
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = root / f".unpacking-{archive.inside}"
    shutil.rmtree(temporary, ignore_errors=True)  # from a killed run
    try:
        with zipfile.ZipFile(file) as content:
            items = [
                item
                for item in content.infolist()
                if item.filename.startswith(f"{archive.inside}/")
            ]
            if not items:
                raise InputError(f"{file} does not have the folder {archive.inside}/")
            for item in items:
                if ".." in Path(item.filename).parts:
                    raise InputError(
                        f"{file} holds {item.filename!r}, which would leave its folder: "
                        "do not trust this file"
                    )
            check_space(root, sum(item.file_size for item in items), f"unpacking {archive.name}")
            for item in tqdm(items, f"unpacking {archive.name}", disable=None):
                content.extract(item, temporary)
            (temporary / archive.inside).rename(place)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot unpack {file} below {root}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}. Delete it, and start again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def install(names: Sequence[str], root: Path, archives: dict[str, Archive], keep: bool) -> None:
    """Download and unpack the archives whose folders are not there yet."""
    for name in names:
        archive = archives[name]
        places = IMAGE_FOLDERS if archive.place in IMAGE_FOLDERS else (archive.place,)
        existing = next((root / place for place in places if (root / place).is_dir()), None)
        if existing is not None:
            print(f"{existing} is there already")
            continue
        file = fetch(archive, root / "downloads")
        place = unpack(archive, file, root)
        if not keep:
            file.unlink()
        print(f"{place} is complete")


# -- Verifying


def verify(root: Path, expected: dict[tuple[str, str], Counts]) -> tuple[Table, bool]:
    """Compare the data on disk with the expected counts.

    Returns:
        The table of expected and found counts, and whether all are equal.
    """
    table = Table(title=escape(f"expected -> found, below {root}"))
    columns = ("set", "split", "refs", "sentences", "images", "no image file", "empty masks", "")
    for column in columns:
        left = column in ("set", "split", "")
        table.add_column(
            column, justify="left" if left else "right", no_wrap=column != "", overflow="fold"
        )
    is_complete = True
    for (folder, file), splits in expected.items():
        name = f"{folder}/{file}"
        try:
            index = ReferIndex.open(root, folder, file)
        except InputError as error:
            is_complete = False
            reason = escape(str(error).splitlines()[0].removesuffix(" Expected"))
            table.add_row(name, *[""] * 6, reason)
            continue
        unknown = {split: (0, 0, 0) for split in index.splits if split not in splits}
        for split, published in {**splits, **unknown}.items():
            found, missing, empty = (
                count(index, split) if split in index.splits else ((0, 0, 0), 0, 0)
            )
            is_equal = found == published and not missing and not empty
            is_complete = is_complete and is_equal
            cells = [
                f"{p:,}" if p == f else f"{p:,} -> {f:,}"
                for p, f in zip(published, found, strict=True)
            ]
            verdict = "" if is_equal else "DIFFERENT"
            table.add_row(name, split, *cells, str(missing), str(empty), verdict)
    return table, is_complete


def count(index: ReferIndex, split: str) -> tuple[tuple[int, int, int], int, int]:
    """Count a split's (refs, sentences, images), its missing images, and its empty masks."""
    refs = index.split_refs(split)
    sentences = sum(len(index.sentence_rows(int(ref))) for ref in refs)
    images, first = np.unique(index.image_ids(refs), return_index=True)
    missing = sum(not index.image_path(int(refs[i])).is_file() for i in first)
    empty = sum(
        not index.mask(int(ref)).any()
        for ref in tqdm(refs, f"masks of {split}", leave=False, disable=None)
    )
    return (len(refs), sentences, len(images)), missing, empty


def main(
    arguments: Sequence[str] | None = None, archives: dict[str, Archive] | None = None
) -> None:
    """Download, or verify."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root",
        type=Path,
        nargs="?",
        default=Path(os.environ.get("CRISLIT_DATA", "data")),
        metavar="DATA",
        help="folder of all data (default: $CRISLIT_DATA, else data)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(ARCHIVES),
        default=list(ARCHIVES),
        help="download or verify only these; write DATA before this option",
    )
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    parser.add_argument(
        "--verify", action="store_true", help="download nothing, compare with the published counts"
    )
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.verify:
            expected = {key: value for key, value in EXPECTED.items() if key[0] in options.only}
            if not expected:
                parser.error("--verify counts the images of annotated sets: name one with --only")
            table, is_complete = verify(options.root, expected)
            Console(width=max(Console().width, 150)).print(table)
            if not is_complete:
                raise InputError("the data differ from the published counts, see the table")
            print("the data have the published counts")
        else:
            try:
                install(
                    options.only,
                    options.root,
                    ARCHIVES if archives is None else archives,
                    options.keep,
                )
            except OSError as error:
                raise InputError(f"cannot write below {options.root}: {error}") from error


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; start it again to continue") from None
