"""Training on data with bad samples: refused, or others stand for them; evaluation never skips."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import load_file, save_file

from crislit.config import compose_config
from crislit.data import shapes
from crislit.data.datamodule import ReferDataModule
from crislit.data.dataset import SkippingTrainSet, TrainBatch
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import TrainKey, TrainSampler, epoch_order
from crislit.errors import InputError
from crislit.training.provenance import fingerprint
from tests.data.test_custom import GOOD, picture, write
from tests.runs import execute, run
from tests.training.test_resume import SHORT, same_state

REFS = "refs(crislit).p"


def spoil(root: Path, split: str = "train") -> list[str]:
    """Delete the first picture of a split, cut the second, make the third another's; return what names their refs."""
    index = ReferDataModule(root=root, folder="shapes", refs=REFS).index
    refs = index.split_refs(split)
    images = list(dict.fromkeys(index.image_ids(refs).tolist()))[:3]
    paths = [index.image_path(int(refs[index.image_ids(refs) == image][0])) for image in images]
    harms: tuple[Callable[[Path], object], ...] = (
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: PIL.Image.new("RGB", (64, 48)).save(path),
    )
    for path, harm in zip(paths, harms, strict=False):
        harm(path)
    return [f"ref {index.ref_id(int(ref))}" for ref in refs[np.isin(index.image_ids(refs), images)]]


def erase(root: Path) -> str:
    """Take the mask of the last training ref away, and return what names it."""
    path = root / "shapes/instances.json"
    instances = json.loads(path.read_text())
    ref = [
        ref
        for ref in pickle.loads((root / "shapes" / REFS).read_bytes())
        if ref["split"] == "train"
    ][-1]
    next(
        annotation for annotation in instances["annotations"] if annotation["id"] == ref["ann_id"]
    )["segmentation"] = []
    path.write_text(json.dumps(instances))
    return f"ref {ref['ref_id']}"


Entry = dict[str, Any]
HARMS: dict[str, Callable[[Entry, Entry, Entry], object]] = {
    "no name of its picture": lambda ref, annotation, image: image.pop("file_name"),
    "no annotation": lambda ref, annotation, image: ref.update(ann_id=10**9),
    "no picture": lambda ref, annotation, image: ref.update(image_id=10**9),
    "NaN in its outline": lambda ref, annotation, image: annotation.update(
        segmentation=[[float("nan")] * 6]
    ),
    "run lengths that lie": lambda ref, annotation, image: annotation.update(
        segmentation={"size": [2, 2], "counts": [1, 3]}
    ),
    "no sentence": lambda ref, annotation, image: ref.update(sentences=[]),
    "a number for a sentence": lambda ref, annotation, image: ref["sentences"][0].update(sent=7),
    "half a character for an id": lambda ref, annotation, image: ref.update(ref_id="\ud800"),
    "no id": lambda ref, annotation, image: ref.pop("ref_id"),
    "no id either": lambda ref, annotation, image: ref.pop("ref_id"),
}


def harm(root: Path, split: str, *names: str) -> list[int]:
    """Spoil a split's first refs, each in one of these ways; return their places in the file.

    Where a ref's picture is spoilt, so are the other refs of it.
    """
    path = root / "shapes/instances.json"
    instances, refs = (
        json.loads(path.read_text()),
        pickle.loads((root / "shapes" / REFS).read_bytes()),
    )
    annotations, images = (
        {entry["id"]: entry for entry in instances[kind]} for kind in ("annotations", "images")
    )
    own = [place for place, ref in enumerate(refs) if ref["split"] == split]
    spoilt: list[int] = []
    for name in names:
        place = next(place for place in own if place not in spoilt)
        ref = refs[place]
        shared = [other for other in own if refs[other]["image_id"] == ref["image_id"]]
        HARMS[name](ref, annotations[ref["ann_id"]], images[ref["image_id"]])
        spoilt += shared if "picture" in name and "name" in name else [place]
    path.write_text(json.dumps(instances))
    (root / "shapes" / REFS).write_bytes(pickle.dumps(refs))
    return spoilt


def told(index: ReferIndex) -> dict[int, Any]:
    """Return what an index says of each ref, by its id."""
    return {
        index.ref_id(ref): (
            index.image_id(ref),
            index.image_path(ref).name,
            index.image_size(ref),
            [index.sentence(row) for row in index.sentence_rows(ref)],
            index.mask(ref).tobytes(),
        )
        for ref in range(len(index))
    }


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write_shapes(
        tmp_path_factory.mktemp("data"),
        "shapes",
        scenes={"train": 8, "val": 2, "testA": 2, "testB": 2},
    )


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A set of one's own to spoil."""
    shutil.copytree(sound, tmp_path / "data")
    for cache in (tmp_path / "data").rglob("*.crislit"):
        cache.unlink()
    return tmp_path / "data"


def module(root: Path, **options: Any) -> ReferDataModule:
    given: dict[str, Any] = {
        "image_size": 32,
        "batch_size": 4,
        "workers": 0,
        "on_error": "skip",
    } | options
    return ReferDataModule(root=root, folder="shapes", refs=REFS, **given)


def epoch(data: ReferDataModule) -> list[TrainBatch]:
    return list(data.train_dataloader())


def named(batches: list[TrainBatch]) -> set[str]:
    return {skip.sample for batch in batches for skip in batch.skipped}


def test_a_bad_sample_ends_training_unless_it_may_be_skipped(root: Path) -> None:
    spoil(root)
    with pytest.raises(InputError, match=r"is (missing|cut off)|has .* pixels"):
        epoch(module(root, on_error="raise"))


@pytest.mark.parametrize("k", [1, 2])
def test_batches_keep_their_size_and_all_that_was_skipped_is_named(root: Path, k: int) -> None:
    whole = epoch(module(root, sentences_per_image=k))
    bad = spoil(root)
    batches = epoch(module(root, sentences_per_image=k))
    assert len(batches) == len(whole) > 2
    for batch, before in zip(batches, whole, strict=True):
        assert batch.images.shape == before.images.shape
        assert batch.tokens.shape == before.tokens.shape
        assert batch.masks.shape == before.masks.shape
    assert named(batches) <= set(bad)
    every = {skip for epoch_number in range(2) for skip in named_in(root, k, epoch_number)}
    assert every == set(bad)
    reasons = [skip.reason for batch in batches for skip in batch.skipped]
    assert all(str(root) in reason for reason in reasons)


def named_in(root: Path, k: int, number: int) -> set[str]:
    data = SkippingTrainSet(module(root, sentences_per_image=k).train_set())
    return {
        skip.sample
        for position in range(len(data))
        for skip in data[TrainKey(number, position)].skipped
    }


def test_the_next_usable_sample_of_the_epochs_order_stands_for_a_bad_one(root: Path) -> None:
    bad = set(spoil(root))
    data = module(root).train_set()
    forgiving = SkippingTrainSet(data)
    order = epoch_order(0, 3, len(data)).tolist()
    usable = {
        p for p in order if f"ref {data.index.ref_id(data.draw_refs(TrainKey(3, p))[0])}" not in bad
    }
    assert 0 < len(usable) < len(order)
    for place, position in enumerate(order):
        ahead = [*order[place:], *order[:place]]
        expected = next(p for p in ahead if p in usable)
        ours, theirs = forgiving[TrainKey(3, position)], data[TrainKey(3, expected)]
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.masks, theirs.masks)
        assert len(ours.skipped) == ahead.index(expected)


def test_workers_and_processes_train_on_the_same(root: Path) -> None:
    spoil(root)
    alone, working = epoch(module(root)), epoch(module(root, workers=1))
    for one, other in zip(alone, working, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert one.skipped == other.skipped
    data = SkippingTrainSet(module(root).train_set())
    shares = [list(TrainSampler(len(data), 4, 2, rank, 2)) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        keys = [key for share in shares for key in share[2 * step : 2 * step + 2]]
        assert torch.equal(data.__getitems__(keys).images, batch.images)
        assert data.__getitems__(keys).skipped == batch.skipped


def test_sound_data_give_the_very_same_batches_either_way(sound: Path) -> None:
    for one, other in zip(
        epoch(module(sound)), epoch(module(sound, on_error="raise")), strict=True
    ):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.masks, other.masks)
        assert one.skipped == other.skipped == ()


def test_a_ref_whose_mask_has_no_pixel_is_left_out_before_training(root: Path) -> None:
    bad = erase(root)
    data, refused = module(root), module(root, on_error="raise")
    assert data.never_usable() == [(bad, "its mask has no pixel")]
    assert len(data.train_set().refs) == len(refused.train_set().refs) - 1
    assert not any((batch.masks.amax(dim=(1, 2, 3)) == 0).any() for batch in epoch(data))


def test_if_no_sample_can_be_used_training_ends(root: Path) -> None:
    for path in (root / "images/train2014").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"none of \d+ training samples can be used; ref \d+: image .* is damaged"
    ):
        epoch(module(root))


def test_training_refs_that_make_no_sense_are_skipped_and_listed_at_every_start(root: Path) -> None:
    before = module(root).index
    ids, sound = [before.ref_id(ref) for ref in range(len(before))], told(before)
    bad = harm(root, "train", *HARMS)
    with pytest.raises(
        InputError, match=rf"refs\(crislit\)\.p: ref {ids[bad[0]]} or its image .*file_name"
    ):
        _ = module(root, on_error="raise").index
    for _ in range(2):  # made, and opened
        data = module(root)
        assert told(data.index) == {
            number: entry for number, entry in sound.items() if ids.index(number) not in bad
        }
        found = dict(data.never_usable())
        assert list(found) == [f"entry {place + 1} of {REFS}" for place in sorted(bad)]
        assert all(reason.startswith("ref ") for reason in found.values())
        epoch(data)
    with pytest.raises(
        InputError, match=f"ref {ids[bad[0]]} or its image"
    ):  # the other cache is not taken for all
        _ = module(root, on_error="raise").index
    for options in ({"evaluation_splits": ["train"]}, {"select_split": "train"}):
        with pytest.raises(InputError, match=f"ref {ids[bad[0]]} or its image"):
            _ = module(root, **options).index


@pytest.mark.parametrize("name", HARMS)
def test_refs_for_evaluation_that_make_no_sense_are_an_error(root: Path, name: str) -> None:
    harm(root, "val", name)
    with pytest.raises(InputError, match=r"refs\(crislit\)\.p: ref (\d+|without ref_id|\ud800)"):
        _ = module(root).index


@pytest.mark.parametrize("content", ["[1]", "{", "[[1, 2]]", "[" * 10**5, '[["a"]]'])
def test_a_list_of_what_was_left_out_that_is_none_is_made_again(
    root: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm(root, "train", "no sentence")
    expected = module(root).never_usable()
    (cache,) = (root / "shapes").glob(".*.skip.crislit")
    save_file(load_file(cache), cache, {"skipped": content})
    assert module(root).never_usable() == expected
    assert "ignoring the damaged cache" in caplog.text


def test_an_evaluated_ref_on_a_picture_that_training_left_out_is_an_error(root: Path) -> None:
    refs = pickle.loads((root / "shapes" / REFS).read_bytes())
    train = [ref for ref in refs if ref["split"] == "train"]
    other = [ref for ref in train if ref["image_id"] == train[0]["image_id"]][1]
    other["split"] = "val"
    (root / "shapes" / REFS).write_bytes(pickle.dumps(refs))
    harm(root, "train", "no name of its picture")
    with pytest.raises(InputError, match=f"ref {other['ref_id']} or its image"):
        _ = module(root).index


def test_what_was_left_out_is_part_of_what_a_run_is(root: Path) -> None:
    settings = compose_config(["dataset=refcoco", f"data_root={root}", "dataset.folder=shapes"])
    settings["dataset"]["refs"] = REFS
    before = [
        fingerprint(settings | {"dataset": settings["dataset"] | {"on_error": value}})
        for value in ("raise", "skip")
    ]
    path = root / "shapes/instances.json"
    path.write_text(path.read_text() + "\n")
    after = [
        fingerprint(settings | {"dataset": settings["dataset"] | {"on_error": value}})
        for value in ("raise", "skip")
    ]
    assert [
        one["experiment"] == other["experiment"] for one, other in zip(before, after, strict=True)
    ] == [True, False]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_evaluation_never_skips(root: Path, on_error: str) -> None:
    spoil(root, "val")
    data = module(root, on_error=on_error)
    with pytest.raises(InputError, match=r"1 of 2 images are missing"):
        data.setup("test")
    with pytest.raises(InputError, match=r"1 of 2 images are missing"):
        data.setup("fit")
    with pytest.raises(InputError, match=r"is (missing|cut off)|has .* pixels"):
        list(data.evaluation_loader("val"))


def test_missing_photographs_are_told_before_training_and_refused_where_train_is_evaluated(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(root)
    module(root).setup("fit")
    assert "1 of 8 images are missing" in caplog.text
    for options in (
        {"on_error": "raise"},
        {"evaluation_splits": ["train"]},
        {"select_split": "train"},
    ):
        with pytest.raises(InputError, match="1 of 8 images are missing"):
            module(root, **options).setup("fit")


def test_lines_of_ones_own_data_are_skipped_where_they_are_for_training(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    bad = [
        {**GOOD, "sentence": ""},
        {**GOOD, "image": "nowhere.png", "split": "train"},
        {**GOOD, "polygons": []},
    ]
    file = write(tmp_path, GOOD, *bad, {**GOOD, "split": "val"})
    with pytest.raises(InputError, match="3 lines of"):
        _ = ReferDataModule(root=tmp_path, file=file).index
    data = ReferDataModule(root=tmp_path, file=file, on_error="skip")
    assert len(data.index) == 2
    assert [skip.sample for skip in data.never_usable()] == [
        f"line {number} of {file}" for number in (2, 3, 4)
    ]
    for line in (
        {**GOOD, "sentence": "", "split": "val"},
        "{",
    ):  # what is for evaluation, or may be
        file = write(tmp_path, GOOD, *bad, line)
        with pytest.raises(InputError, match=r"1 lines of .* line 5"):
            _ = ReferDataModule(root=tmp_path, file=file, on_error="skip").index


def test_lines_for_training_are_not_skipped_where_they_are_evaluated(tmp_path: Path) -> None:
    picture(tmp_path, "a.png")
    file = write(tmp_path, GOOD, {**GOOD, "sentence": ""}, {**GOOD, "split": "val"})
    for options in ({"evaluation_splits": ["train"]}, {"select_split": "train"}):
        with pytest.raises(InputError, match=r"1 lines of .* line 2"):
            _ = ReferDataModule(root=tmp_path, file=file, on_error="skip", **options).index


def test_masks_without_pixels_are_told_at_every_start_where_they_are_trained_on(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = erase(root)
    for _ in range(2):  # indexed, then read from the cache
        caplog.clear()
        module(root, on_error="raise").setup("fit")
        assert (
            f"training on 1 refs whose mask has no pixel: ref_id {last.split()[1]}"
            in caplog.messages
        )


def test_only_raise_and_skip_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.on_error must be raise or skip, got 'ignore'"):
        module(tmp_path, on_error="ignore")


@pytest.mark.parametrize("dataset", ["shapes", "refcoco", "grefcoco"])
def test_the_default_is_to_raise_and_makes_no_other_run(dataset: str) -> None:
    settings = compose_config([f"dataset={dataset}"])
    assert settings["dataset"].pop("on_error") == "raise"
    before = fingerprint(settings)
    assert fingerprint(compose_config([f"dataset={dataset}"])) == before
    skipping = fingerprint(compose_config([f"dataset={dataset}", "dataset.on_error=skip"]))
    assert skipping["experiment"] != before["experiment"]
    assert skipping["setting"] == before["setting"]


def spoiled_root(small_shapes: Path, folder: Path) -> tuple[Path, list[str]]:
    """A data root with a spoiled copy of the small set."""
    name = f"shapes-v{shapes.VERSION}"
    shutil.copytree(small_shapes / name, folder / name)
    for cache in folder.rglob("*.crislit"):
        cache.unlink()
    last = erase(folder / name)
    return folder, [*spoil(folder / name), last]


def skipped_in(results: dict[str, Any]) -> set[str]:
    return {entry["sample"] for entry in results["skipped"]}


def test_a_run_lists_what_it_skipped_and_goes_on_exactly(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, bad = spoiled_root(small_shapes, tmp_path / "data")
    overrides = (
        *SHORT,
        f"data_root={data}",
        "dataset.on_error=skip",
        "dataset.sentences_per_image=1",
    )
    whole = run(monkeypatch, tmp_path / "whole", *overrides)
    skipped = skipped_in(whole)
    assert (
        f"{len(skipped)} training samples could not be used, and others stood for them"
        in capsys.readouterr().out
    )
    assert bad[-1] in skipped, "known before the first step"
    assert skipped <= set(bad)
    assert len(skipped) > len(bad) / 2, "an epoch leaves out what fills no batch"
    run(monkeypatch, tmp_path / "part", *overrides, "trainer.max_steps=4")
    last = tmp_path / "part/checkpoints/last.ckpt"
    rest = run(monkeypatch, tmp_path / "rest", *overrides, f"resume='{last}'")
    assert same_state(
        tmp_path / "rest/checkpoints/last.ckpt", tmp_path / "whole/checkpoints/last.ckpt"
    )
    assert rest["skipped"] == whole["skipped"]


@pytest.mark.slow
def test_two_processes_with_workers_skip_and_list_the_same(
    small_shapes: Path, tmp_path: Path
) -> None:
    data, bad = spoiled_root(small_shapes, tmp_path / "data")
    overrides = (
        *SHORT,
        f"data_root={data}",
        "dataset.on_error=skip",
        "dataset.sentences_per_image=1",
        "hydra.run.dir=run",
    )
    done = execute(
        "train",
        *overrides,
        "trainer=ddp_cpu",
        "trainer.devices=2",
        "workers=1",
        cwd=tmp_path,
        seconds=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = skipped_in(json.loads((tmp_path / "run/results.json").read_text()))
    assert skipped <= set(bad)
    assert len(skipped) > len(bad) / 2
    assert (done.stdout + done.stderr).count("training samples could not be used") == 1
