"""Fetches RefCOCO, RefCOCO+ and G-Ref: the REFER project's annotations and COCO's train2014 images, and checks what is there.

python scripts/download_refer.py DATA             # 13.7 GB to fetch, 28 GB of disk until the archives are unpacked
python scripts/download_refer.py DATA --verify    # compares with the published counts; exit code 1 on a difference

Start it again after an interruption: it goes on where it was. DATA is then what data_root=DATA (or CRISLIT_DATA) names.
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
"""Bytes that shall stay free on the disk."""


@dataclass(frozen=True)
class Archive:
    """A zip file and where it can be had.

    Attributes:
        name: Its file name.
        inside: The folder in it that is wanted.
        place: Where that goes, below the data root.
        size: Bytes.
        checksum: ``algorithm:digest``.
        urls: Where it is, the best place first.
    """

    name: str
    inside: str
    place: str
    size: int
    checksum: str
    urls: tuple[str, ...]


def refer_archive(name: str, captured: str, size: int, sha256: str) -> Archive:
    """Return one of the REFER project's archives; its original host answers no more, the Web Archive keeps what it served.

    We know of no other host with these very files: others serve conversions. A lab's own copy goes to DATA/downloads.
    """
    original = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
    urls = (
        f"https://web.archive.org/web/{captured}id_/{original}",
        f"https://web.archive.org/web/2id_/{original}",  # its newest capture, should that one be gone
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


# -- Fetching ---------------------------------------------------------------------------------------------------------------


class UnusableMirrorError(Exception):
    """A mirror that cannot give the archive; the next one may."""


def fetch(archive: Archive, folder: Path, tries: int = 3, pause: float = 2.0) -> Path:
    """Download an archive, from the first mirror that gives it whole and right; what an earlier try left is gone on with.

    Args:
        archive: What to fetch.
        folder: Where to.
        tries: How often a mirror may break off.
        pause: Seconds between two tries.

    Raises:
        InputError: If no mirror gives it, or the disk is too full.
    """
    target = folder / archive.name
    if target.is_file():  # of an interrupted unpacking, or somebody's own copy
        if digest(target, archive.checksum.split(":")[0]) != archive.checksum:
            raise InputError(
                f"{target} is not the published archive ({archive.checksum}): take it away, and start again"
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
    kept = (
        f"; what was fetched of it stays in {part}, to go on with later" if part.is_file() else ""
    )
    raise InputError(f"no mirror gave {archive.name}{kept}. " + "; ".join(reasons))


def pull(archive: Archive, url: str, part: Path, tries: int, pause: float) -> None:
    """Bring ``part`` up to the whole archive from one mirror.

    Raises:
        UnusableMirrorError: If the mirror refuses, breaks off too often, or has another file.
        InputError: If the disk is too full.
    """
    reason = ""
    for number in range(tries):
        if number:
            time.sleep(pause)
        begun, broken = part.stat().st_size if part.is_file() else 0, ""
        try:
            if begun < archive.size:
                check_space(part.parent, archive.size - begun, archive.name)
                pull_once(archive, url, part)
        except urllib.error.HTTPError as error:
            raise UnusableMirrorError(f"it answers {error.code} {error.reason}") from error
        except (HTTPException, OSError) as error:
            broken = str(error) or type(error).__name__
        size = part.stat().st_size if part.is_file() else 0
        if size < archive.size:
            reason = broken or f"the connection broke off at byte {size:,} of {archive.size:,}"
            continue
        found = digest(part, archive.checksum.split(":")[0])
        if size == archive.size and found == archive.checksum:
            return
        part.unlink()  # whatever it is, it is no beginning of the archive
        if not begun:
            raise UnusableMirrorError(f"it has another file ({size:,} bytes, {found})")
        reason = "what an earlier try left was no part of the archive"  # begin anew, here
    raise UnusableMirrorError(reason)


def pull_once(archive: Archive, url: str, part: Path) -> None:
    """Append to ``part`` what a server gives of the rest, or all of it if the server knows no ranges."""
    begun = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "crislit"} | ({"Range": f"bytes={begun}-"} if begun else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {begun}-"
        )
        start = begun if goes_on else 0
        length = answer.headers.get("Content-Length", "")
        announced = int(length) if length.isdecimal() else archive.size - start
        if start + announced != archive.size:
            raise UnusableMirrorError(
                f"it has another file, of {start + announced:,} bytes instead of {archive.size:,}"
            )
        bar = tqdm(
            total=archive.size,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=archive.name,
            disable=None,
        )
        with bar, part.open("ab" if goes_on else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > archive.size:  # another file, of no announced length
                    break


def check_space(folder: Path, needed: int, name: str) -> None:
    """Raise an :class:`InputError` if a folder's disk has not so many bytes to spare."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise InputError(
            f"{name} needs {(needed + SPARE) / 1e9:.1f} GB below {folder}, and {free / 1e9:.1f} GB are free: "
            "make room, or choose another folder"
        )


def digest(path: Path, algorithm: str) -> str:
    """Return ``algorithm:digest`` of a file."""
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


# -- Unpacking --------------------------------------------------------------------------------------------------------------


def unpack(archive: Archive, file: Path, root: Path) -> Path:
    """Unpack the wanted folder of an archive to its place, which gets its name when it is complete.

    Raises:
        InputError: If the archive is damaged or would write elsewhere, or the disk is too full.
    """
    place = root / archive.place
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = root / f".unpacking-{archive.inside}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a try that was killed
    try:
        with zipfile.ZipFile(file) as content:
            wanted = [
                item
                for item in content.infolist()
                if item.filename.startswith(f"{archive.inside}/")
            ]
            if not wanted:
                raise InputError(f"{file} holds no folder {archive.inside}/")
            for item in wanted:
                if ".." in Path(item.filename).parts:
                    raise InputError(
                        f"{file} holds {item.filename!r}, which would leave its folder; do not trust it"
                    )
            check_space(root, sum(item.file_size for item in wanted), f"unpacking {archive.name}")
            for item in tqdm(wanted, f"unpacking {archive.name}", disable=None):
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
    """Fetch and unpack what is not there yet."""
    for name in names:
        archive = archives[name]
        places = IMAGE_FOLDERS if archive.place in IMAGE_FOLDERS else (archive.place,)
        there = next((root / place for place in places if (root / place).is_dir()), None)
        if there is not None:
            print(f"{there} is there already")
            continue
        file = fetch(archive, root / "downloads")
        place = unpack(archive, file, root)
        if not keep:
            file.unlink()
        print(f"{place} is complete")


# -- Verifying --------------------------------------------------------------------------------------------------------------


def verify(root: Path, expected: dict[tuple[str, str], Counts]) -> tuple[Table, bool]:
    """Count what is there, and compare.

    Returns:
        The table of expected and found counts, and whether all is as expected.
    """
    table = Table(title=escape(f"expected -> found, below {root}"))
    for column in (
        "set",
        "split",
        "refs",
        "sentences",
        "images",
        "no image file",
        "empty masks",
        "",
    ):
        left = column in ("set", "split", "")
        table.add_column(
            column, justify="left" if left else "right", no_wrap=column != "", overflow="fold"
        )
    fine = True
    for (folder, file), splits in expected.items():
        name = f"{folder}/{file}"
        try:
            index = ReferIndex.open(root, folder, file)
        except InputError as error:
            fine = False
            table.add_row(
                name,
                "",
                "",
                "",
                "",
                "",
                "",
                escape(str(error).splitlines()[0].removesuffix(" Expected")),
            )
            continue
        unknown = {split: (0, 0, 0) for split in index.splits if split not in splits}
        for split, published in {**splits, **unknown}.items():
            found, missing, empty = (
                count(index, split) if split in index.splits else ((0, 0, 0), 0, 0)
            )
            good = found == published and not missing and not empty
            fine = fine and good
            cells = [
                f"{p:,}" if p == f else f"{p:,} -> {f:,}"
                for p, f in zip(published, found, strict=True)
            ]
            table.add_row(
                name, split, *cells, str(missing), str(empty), "" if good else "DIFFERENT"
            )
    return table, fine


def count(index: ReferIndex, split: str) -> tuple[tuple[int, int, int], int, int]:
    """Return a split's refs, sentences and images, its missing images, and its refs whose mask has no pixel."""
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
    """Fetch, or verify."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root",
        type=Path,
        nargs="?",
        default=Path(os.environ.get("CRISLIT_DATA", "data")),
        metavar="DATA",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(ARCHIVES),
        default=list(ARCHIVES),
        help="a part of it (DATA goes before)",
    )
    parser.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    parser.add_argument("--verify", action="store_true", help="fetch nothing, count what is there")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if options.verify:
            expected = {key: value for key, value in EXPECTED.items() if key[0] in options.only}
            if not expected:
                parser.error(
                    "--verify counts the images of annotated sets: name such a set with --only"
                )
            table, fine = verify(options.root, expected)
            Console(width=max(Console().width, 150)).print(table)
            if not fine:
                raise InputError("the data are not what was published; the table says where")
            print("the data are what was published")
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
        raise SystemExit("interrupted; start it again to go on") from None
