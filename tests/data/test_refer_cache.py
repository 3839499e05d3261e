"""The cache of a ReferIndex: used while its sources are unchanged, checked before it is trusted."""

import logging
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from crislit.data import refer_cache, refer_index
from crislit.data.refer_index import ReferIndex
from tests.io.test_pickles import open_set
from tests.refer_data import SETS, one_ref, read_refs, write_set


@pytest.fixture(autouse=True)
def cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder for this test."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def forbid_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, building an index is an error: it must come from the cache."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("the index was built again")

    return lambda: monkeypatch.setattr(refer_index, "build_index", fail)


def caches(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.crislit"))


def copy_annotations(source: Path, root: Path) -> Path:
    (root / "images/train2014").mkdir(parents=True)
    (root / "refcoco").mkdir()
    for name in ("instances.json", "refs(unc).p"):
        # The contents, without a read-only mode.
        shutil.copyfile(source / "refcoco" / name, root / "refcoco" / name)
    return root


# -- Use


def test_the_second_open_reads_an_equal_index_from_the_cache(
    refer_root: Path, tmp_path: Path, forbid_building: Callable[[], None]
) -> None:
    root = copy_annotations(refer_root, tmp_path / "data")
    built = open_set(root)
    assert len(caches(root / "refcoco")) == 1
    forbid_building()
    cached = open_set(root)
    assert cached.splits == built.splits
    assert cached.image_folder == built.image_folder
    for name, array in vars(built._arrays).items():
        np.testing.assert_array_equal(getattr(cached._arrays, name), array, err_msg=name)
        assert getattr(cached._arrays, name).dtype == array.dtype, name


def test_only_the_cache_is_added_beside_the_data(tmp_path: Path, cache_home: Path) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    names = {path.name for path in (root / "refcoco").iterdir()}
    assert names == {"instances.json", "refs(unc).p", cache.name}
    assert not list(cache_home.iterdir())


CHANGES = {  # of a source: bytes to replace, their replacement, and the index's sentence and area
    "refs(unc).p": (b"a square", b"A SQUARE", ("A SQUARE", 36)),
    "instances.json": (b"[2, 2, 8, 2, 8, 8, 2, 8]", b"[2, 2, 4, 2, 4, 4, 2, 4]", ("a square", 4)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_source_is_indexed_again(name: str, change: str, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    path = root / "refcoco" / name
    before, (old, new, expected) = path.stat(), CHANGES[name]
    # Both formats allow a line feed at the end.
    path.write_bytes(path.read_bytes().replace(old, new) + (b"\n" if change == "size" else b""))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    assert (path.stat().st_size != before.st_size) == (change == "size")
    index = open_set(root)
    assert (index.sentence(0), index.mask(0).sum()) == expected


def test_two_refs_files_of_one_folder_have_separate_caches(refer_root: Path) -> None:
    expected = [len(read_refs(refer_root, *names)) for names in SETS]
    for _ in ("built", "cached"):
        assert [len(ReferIndex.open(refer_root, *names)) for names in SETS] == expected


def test_a_moved_set_does_not_use_the_cache_of_another(tmp_path: Path) -> None:
    first = write_set(tmp_path / "first")
    open_set(first)
    shutil.copytree(first, tmp_path / "second")  # with cache, sizes and times
    refs, _ = one_ref()
    refs[0]["sentences"][0]["sent"] = "A SQUARE"
    path = tmp_path / "second/refcoco/refs(unc).p"
    before = path.stat()
    path.write_bytes(pickle.dumps(refs))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_set(tmp_path / "second").sentence(0) == "A SQUARE"


# -- Where it is written


def test_a_cache_goes_to_the_users_folder_if_the_disk_of_the_data_is_full(
    tmp_path: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    forbid_building: Callable[[], None],
) -> None:
    root = write_set(tmp_path / "data")

    def save(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None) -> None:
        if path.is_relative_to(root):
            reason = "I/O error: No space left on device (os error 28)"
            raise SafetensorError(f"Error while serializing: {reason}")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(refer_cache, "save_file", save)
    assert open_set(root).sentence(0) == "a square"
    assert not caches(root)
    assert len(list(cache_home.rglob("*.crislit"))) == 1
    forbid_building()
    assert open_set(root).sentence(0) == "a square"


def test_a_read_only_data_folder_is_cached_in_the_users_folder_and_stays_untouched(
    tmp_path: Path, cache_home: Path, forbid_building: Callable[[], None]
) -> None:
    root = write_set(tmp_path / "data")
    folder = root / "refcoco"
    folder.chmod(0o555)
    try:
        before = folder.stat().st_mtime_ns, sorted(folder.iterdir())
        open_set(root)
        assert (folder.stat().st_mtime_ns, sorted(folder.iterdir())) == before
        (cache,) = caches(cache_home)
        assert cache.parent == cache_home / "crislit"
        forbid_building()
        assert open_set(root).sentence(0) == "a square"
    finally:
        folder.chmod(0o755)  # so that pytest can remove it


def test_an_index_that_cannot_be_cached_anywhere_opens_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "data")
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    (root / "refcoco").chmod(0o555)
    try:
        assert open_set(root).sentence(0) == "a square"
    finally:
        (root / "refcoco").chmod(0o755)
    assert any("could not be cached" in record.getMessage() for record in caplog.records)


def test_the_log_says_where_the_cache_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_set(tmp_path / "data")
    caplog.set_level(logging.INFO)
    open_set(root)
    (cache,) = caches(root)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"indexing {root / 'refcoco/refs(unc).p'} (once)",
        f"the index is cached in {cache}",
    ]


SHARED: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "of another user": lambda _, monkeypatch: monkeypatch.setattr(os, "getuid", lambda: 4242),
    "of a group": lambda folder, _: folder.chmod(0o775),
    "of all": lambda folder, _: folder.chmod(0o1777),
}


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no owners of this kind")
@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
def test_nothing_is_added_to_a_folder_that_others_use(
    share: Callable[[Path, pytest.MonkeyPatch], object],
    tmp_path: Path,
    cache_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    forbid_building: Callable[[], None],
) -> None:
    root = write_set(tmp_path / "data")
    share(root / "refcoco", monkeypatch)
    open_set(root)
    assert not caches(root)
    assert len(caches(cache_home)) == 1
    forbid_building()
    open_set(root)


def test_a_shared_folder_is_used_if_the_user_has_no_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path / "data")
    (root / "refcoco").chmod(0o777)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    open_set(root)
    assert len(caches(root)) == 1


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read_a_cache(umask: int, tmp_path: Path) -> None:
    root = write_set(tmp_path / "data")
    (root / "refcoco").chmod(0o755)
    before = os.umask(umask)
    try:
        open_set(root)
    finally:
        os.umask(before)
    (cache,) = caches(root)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o666 & ~umask


# -- Damaged and forged caches


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "overwritten": lambda content: b"x" * len(content),
    "another file": lambda content: pickle.dumps([1, 2, 3]),
    "without one of its arrays": lambda content: content.replace(b'"ref_id"', b'"ref_ix"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_again_with_a_warning(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    forbid_building: Callable[[], None],
) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    damaged = damage(cache.read_bytes())
    assert damaged != cache.read_bytes()
    cache.write_bytes(damaged)
    assert open_set(root).sentence(0) == "a square"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"ignoring the damaged cache {cache}")
    caplog.clear()
    forbid_building()
    open_set(root)
    assert not caplog.records, "the next open reads an intact one"


def flat(name: str, text: str) -> dict[str, Any]:
    """Return the arrays that store one text."""
    characters = np.frombuffer(text.encode(), np.uint8)
    return {name: characters, f"{name}_ends": np.array([len(characters)])}


Arrays = dict[str, Any]
FORGERIES: dict[str, Callable[[Arrays], Arrays]] = {  # the arrays that are replaced
    "a path for a file name": lambda a: flat("file_names", "../../../etc/passwd"),
    "a folder for a file name": lambda a: flat("file_names", ".."),
    "sentences that end beyond the end": lambda a: {"sentences_ends": a["sentences_ends"] + 1},
    "decreasing ends": lambda a: {"polygons_ends": np.array([8, -4, 8])},
    "a ref too many": lambda a: {"ref_id": np.array([1, 2])},
    "an absent image": lambda a: {"ref_image": a["ref_image"] + 1},
    "a split before the first": lambda a: {"split": a["split"] - 1},
    "an endless image": lambda a: {"image_size": np.array([[2**40, 2**40]])},
    "an image without height": lambda a: {"image_size": np.array([[0, 20]])},
    "a single side": lambda a: {"image_size": np.array([[12]])},
    "fractions for ids": lambda a: {"ref_id": a["ref_id"] + 0.5},
    "runs that fill more": lambda a: {"runs": np.array([2**40]), "ref_runs_ends": np.array([1])},
    "runs whose sum overflows": lambda a: {
        "runs": np.full(4, 2**62),
        "ref_runs_ends": np.array([4]),
    },
    "a negative run": lambda a: {"runs": np.array([-5, 245]), "ref_runs_ends": np.array([2])},
    "NaN for a point": lambda a: {"points": a["points"] * np.nan},
    "points far away": lambda a: {"points": a["points"] * 1e9},
    "half a point": lambda a: {"points": a["points"][:-1], "polygons_ends": np.array([7])},
    "sentences that are not text": lambda a: {"sentences": np.full_like(a["sentences"], 0xFF)},
    "a split's name that is not text": lambda a: {
        "split_names": np.full_like(a["split_names"], 0xFF)
    },
    "a polygon of two points": lambda a: {
        "polygons_ends": np.array([4, 8]),
        "ref_polygons_ends": np.array([2]),
    },
    "a ref without a sentence": lambda a: {
        "sentence_id": a["sentence_id"][:0],
        "sentences": a["sentences"][:0],
        "sentences_ends": a["sentences_ends"][:0],
        "ref_sentences_ends": a["ref_sentences_ends"] * 0,
    },
    "an image larger than allowed": lambda a: {"image_size": np.array([[2**15, 2**15]])},
    "an endless outline": lambda a: {
        "points": np.tile([0.0, 0, 3e5, 3e5], 9),
        "polygons_ends": np.array([36]),
    },
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_cache_is_refused_and_built_again(
    forge: Callable[[Arrays], Arrays], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "data")
    open_set(root)
    (cache,) = caches(root)
    arrays = load_file(cache)
    with safe_open(cache, framework="numpy") as file:
        metadata = file.metadata()
    save_file(arrays, cache, metadata)
    open_set(root)
    assert "ignoring" not in caplog.text, "unchanged arrays are used"
    save_file(arrays | forge(arrays), cache, metadata)
    index = open_set(root)
    contents = index.sentence(0), index.image_path(0).name, index.mask(0).sum()
    assert contents == ("a square", "seven.jpg", 36)
    warning = f"ignoring the damaged cache {cache}"
    assert any(record.getMessage().startswith(warning) for record in caplog.records)
