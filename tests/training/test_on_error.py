"""Training on data with bad samples: an error, or other samples instead; evaluation never skips."""

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
from crislit.data.sources import CustomSource, ReferSource
from crislit.errors import InputError
from crislit.training.provenance import fingerprint
from tests.runs import execute, run
from tests.training.test_resume import SHORT, same_state

REFS = "refs(crislit).p"
UNREADABLE = r"missing|cut off|truncated|has .* pixels"


def module(root: Path, **options: Any) -> ReferDataModule:
    """Return a data module with small images that skips bad samples."""
    defaults: dict[str, Any] = {"image_size": 32, "batch_size": 4, "workers": 0}
    source = ReferSource(root, "shapes", REFS)
    return ReferDataModule(source, **defaults | {"on_error": "skip"} | options)


# -- Damaging a data set


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `shapes`."""
    scenes = {"train": 8, "val": 2, "testA": 2, "testB": 2}
    return shapes.write_shapes(tmp_path_factory.mktemp("data"), "shapes", scenes=scenes)


@pytest.fixture
def root(intact: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(intact, tmp_path / "data")
    remove_caches(tmp_path / "data")
    return tmp_path / "data"


def remove_caches(folder: Path) -> None:
    for cache in folder.rglob("*.crislit"):
        cache.unlink()


def read_set(root: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a set's refs and instances."""
    refs = pickle.loads((root / "shapes" / REFS).read_bytes())
    return refs, json.loads((root / "shapes/instances.json").read_text())


def write_set(root: Path, refs: list[dict[str, Any]], instances: dict[str, Any]) -> None:
    (root / "shapes/instances.json").write_text(json.dumps(instances))
    (root / "shapes" / REFS).write_bytes(pickle.dumps(refs))


def damage_images(root: Path, split: str = "train") -> list[str]:
    """Damage a split's first three images; return the names of their refs.

    The first is deleted, the second truncated, and the third replaced by one of another size.
    """
    index = ReferIndex.open(root, "shapes", REFS)
    refs = index.split_refs(split)
    images = list(dict.fromkeys(index.image_ids(refs).tolist()))[:3]
    paths = [index.image_path(int(refs[index.image_ids(refs) == image][0])) for image in images]
    damages: tuple[Callable[[Path], object], ...] = (
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: PIL.Image.new("RGB", (64, 48)).save(path),
    )
    for path, damage in zip(paths, damages, strict=False):
        damage(path)
    return [f"ref {index.ref_id(int(ref))}" for ref in refs[np.isin(index.image_ids(refs), images)]]


def empty_mask(root: Path) -> str:
    """Empty the mask of the last training ref; return its name."""
    refs, instances = read_set(root)
    ref = [ref for ref in refs if ref["split"] == "train"][-1]
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    annotations[ref["ann_id"]]["segmentation"] = []
    write_set(root, refs, instances)
    return f"ref {ref['ref_id']}"


Entry = dict[str, Any]
NO_FILE_NAME = "image without file name"
DAMAGES: dict[str, Callable[[Entry, Entry, Entry], object]] = {
    NO_FILE_NAME: lambda ref, annotation, image: image.pop("file_name"),
    "no annotation": lambda ref, annotation, image: ref.update(ann_id=10**9),
    "no image": lambda ref, annotation, image: ref.update(image_id=10**9),
    "NaN in the polygon": lambda ref, annotation, image: annotation.update(
        segmentation=[[float("nan")] * 6]
    ),
    "run lengths of another size": lambda ref, annotation, image: annotation.update(
        segmentation={"size": [2, 2], "counts": [1, 3]}
    ),
    "no sentence": lambda ref, annotation, image: ref.update(sentences=[]),
    "a number as sentence": lambda ref, annotation, image: ref["sentences"][0].update(sent=7),
    "half a character as id": lambda ref, annotation, image: ref.update(ref_id="\ud800"),
    "no id": lambda ref, annotation, image: ref.pop("ref_id"),
    "no id again": lambda ref, annotation, image: ref.pop("ref_id"),
}


def damage_refs(root: Path, split: str, *names: str) -> list[int]:
    """Damage a split's first refs, one per name; return their positions in the file.

    An image without a file name spoils all of its refs.
    """
    refs, instances = read_set(root)
    annotations, images = (
        {entry["id"]: entry for entry in instances[kind]} for kind in ("annotations", "images")
    )
    in_split = [position for position, ref in enumerate(refs) if ref["split"] == split]
    damaged: list[int] = []
    for name in names:
        position = next(position for position in in_split if position not in damaged)
        ref = refs[position]
        same_image = [i for i in in_split if refs[i]["image_id"] == ref["image_id"]]
        DAMAGES[name](ref, annotations[ref["ann_id"]], images[ref["image_id"]])
        damaged += same_image if name == NO_FILE_NAME else [position]
    write_set(root, refs, instances)
    return damaged


# -- Images and masks


def epoch(data: ReferDataModule) -> list[TrainBatch]:
    return list(data.train_dataloader())


def skipped_samples(batches: list[TrainBatch]) -> set[str]:
    return {skipped.sample for batch in batches for skipped in batch.skipped}


def same_batch(a: TrainBatch, b: TrainBatch) -> bool:
    """Whether two batches are bit-identical."""
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "tokens", "masks"))


def test_a_bad_sample_ends_training_unless_it_may_be_skipped(root: Path) -> None:
    damage_images(root)
    with pytest.raises(InputError, match=UNREADABLE):
        epoch(module(root, on_error="raise"))


@pytest.mark.parametrize("k", [1, 2])
def test_batches_keep_their_size_and_every_skipped_sample_is_listed(root: Path, k: int) -> None:
    before = epoch(module(root, sentences_per_image=k))
    bad = damage_images(root)
    batches = epoch(module(root, sentences_per_image=k))
    assert len(batches) == len(before) > 2
    for a, b in zip(batches, before, strict=True):
        assert a.images.shape == b.images.shape
        assert a.tokens.shape == b.tokens.shape
        assert a.masks.shape == b.masks.shape
    assert skipped_samples(batches) <= set(bad)
    data = SkippingTrainSet(module(root, sentences_per_image=k).train_set())
    keys = [TrainKey(number, position) for number in range(2) for position in range(len(data))]
    assert skipped_samples([data[key] for key in keys]) == set(bad)
    reasons = [skipped.reason for batch in batches for skipped in batch.skipped]
    assert all(str(root) in reason for reason in reasons)


def test_a_bad_sample_is_replaced_by_the_next_usable_one_of_the_epoch(root: Path) -> None:
    bad = set(damage_images(root))
    data = module(root).train_set()
    skipping = SkippingTrainSet(data)
    order = epoch_order(0, 3, len(data)).tolist()
    first_refs = {p: data.index.ref_id(data.draw_refs(TrainKey(3, p))[0]) for p in order}
    usable = {p for p in order if f"ref {first_refs[p]}" not in bad}
    assert 0 < len(usable) < len(order)
    for i, position in enumerate(order):
        ahead = [*order[i:], *order[:i]]
        replacement = next(p for p in ahead if p in usable)
        sample = skipping[TrainKey(3, position)]
        assert same_batch(sample, data[TrainKey(3, replacement)])
        assert len(sample.skipped) == ahead.index(replacement)


def test_workers_and_processes_train_on_the_same_samples(root: Path) -> None:
    damage_images(root)
    batches = epoch(module(root))
    for a, b in zip(batches, epoch(module(root, workers=1)), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
        assert a.skipped == b.skipped
    data = SkippingTrainSet(module(root).train_set())
    shares = [list(TrainSampler(len(data), 4, 2, rank, 2)) for rank in (0, 1)]
    for step, batch in enumerate(batches):
        keys = [key for share in shares for key in share[2 * step : 2 * step + 2]]
        assert torch.equal(data.__getitems__(keys).images, batch.images)
        assert data.__getitems__(keys).skipped == batch.skipped


def test_intact_data_give_the_same_batches_either_way(intact: Path) -> None:
    batches = epoch(module(intact)), epoch(module(intact, on_error="raise"))
    for a, b in zip(*batches, strict=True):
        assert same_batch(a, b)
        assert a.skipped == b.skipped == ()


def test_a_ref_with_an_empty_mask_is_left_out_before_training(root: Path) -> None:
    bad = empty_mask(root)
    data = module(root)
    assert data.never_usable() == [(bad, "its mask is empty")]
    refs = module(root, on_error="raise").train_set().refs
    assert len(data.train_set().refs) == len(refs) - 1
    assert not any((batch.masks.amax(dim=(1, 2, 3)) == 0).any() for batch in epoch(data))


def test_training_on_empty_masks_is_logged_at_every_start(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = empty_mask(root)
    message = f"training on 1 ref whose mask is empty: ref_id {bad.split()[1]}"
    for _ in range(2):  # indexed, then read from the cache
        caplog.clear()
        module(root, on_error="raise").setup("fit")
        assert message in caplog.messages


def test_training_ends_if_no_sample_can_be_used(root: Path) -> None:
    for path in (root / "images/train2014").iterdir():
        path.write_bytes(b"x")
    message = r"none of \d+ training samples can be used; ref \d+: image .* is damaged"
    with pytest.raises(InputError, match=message):
        epoch(module(root))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_evaluation_never_skips(root: Path, on_error: str) -> None:
    damage_images(root, "val")
    data = module(root, on_error=on_error)
    for stage in ("test", "fit"):
        with pytest.raises(InputError, match=r"1 of 2 images are missing"):
            data.setup(stage)
    with pytest.raises(InputError, match=UNREADABLE):
        list(data.evaluation_loader("val"))


def test_missing_images_are_logged_before_training_and_an_error_where_train_is_evaluated(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_images(root)
    module(root).setup("fit")
    assert "1 of 8 images are missing" in caplog.text
    strict: tuple[dict[str, Any], ...] = (
        *({"on_error": "raise"}, {"evaluation_splits": ["train"]}, {"select_split": "train"}),
    )
    for options in strict:
        with pytest.raises(InputError, match="1 of 8 images are missing"):
            module(root, **options).setup("fit")


# -- Annotations


def facts(index: ReferIndex) -> dict[int, Any]:
    """Return what an index holds of each ref, by its id."""
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


def test_malformed_training_refs_are_skipped_and_listed_at_every_start(root: Path) -> None:
    before = module(root).index
    ids, all_facts = [before.ref_id(ref) for ref in range(len(before))], facts(before)
    bad = damage_refs(root, "train", *DAMAGES)
    first = f"ref {ids[bad[0]]} or its image"
    with pytest.raises(InputError, match=rf"refs\(crislit\)\.p: {first} .*file_name"):
        _ = module(root, on_error="raise").index
    expected = {number: all_facts[number] for i, number in enumerate(ids) if i not in bad}
    for _ in range(2):  # indexed, then read from the cache
        data = module(root)
        assert facts(data.index) == expected
        skipped = dict(data.never_usable())
        assert list(skipped) == [f"entry {position + 1} of {REFS}" for position in sorted(bad)]
        assert all(reason.startswith("ref ") for reason in skipped.values())
        epoch(data)
    # The cache without the skipped refs is not used where none may be skipped.
    strict: tuple[dict[str, Any], ...] = (
        *({"on_error": "raise"}, {"evaluation_splits": ["train"]}, {"select_split": "train"}),
    )
    for options in strict:
        with pytest.raises(InputError, match=first):
            _ = module(root, **options).index


@pytest.mark.parametrize("name", DAMAGES)
def test_malformed_evaluation_refs_are_an_error(root: Path, name: str) -> None:
    damage_refs(root, "val", name)
    with pytest.raises(InputError, match=r"refs\(crislit\)\.p: ref (\d+|without ref_id|\ud800)"):
        _ = module(root).index


@pytest.mark.parametrize("content", ["[1]", "{", "[[1, 2]]", "[" * 10**5, '[["a"]]'])
def test_a_damaged_list_of_skipped_refs_is_written_again(
    root: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage_refs(root, "train", "no sentence")
    expected = module(root).never_usable()
    (cache,) = (root / "shapes").glob(".*.skip.crislit")
    save_file(load_file(cache), cache, {"skipped": content})
    assert module(root).never_usable() == expected
    assert "ignoring the damaged cache" in caplog.text


def test_an_evaluation_ref_of_an_image_that_training_skips_is_an_error(root: Path) -> None:
    refs, instances = read_set(root)
    train = [ref for ref in refs if ref["split"] == "train"]
    other = [ref for ref in train if ref["image_id"] == train[0]["image_id"]][1]
    other["split"] = "val"
    write_set(root, refs, instances)
    damage_refs(root, "train", NO_FILE_NAME)
    with pytest.raises(InputError, match=f"ref {other['ref_id']} or its image"):
        _ = module(root).index


# -- Custom data


LINE = {"image": "a.png", "sentence": "dog", "polygons": [[10, 5, 30, 5, 30, 25, 10, 25]]}
"""A usable line; its split is train."""
NO_SENTENCE = LINE | {"sentence": ""}


def write_lines(folder: Path, *lines: dict[str, Any] | str) -> str:
    """Write custom data of one image, and return the file's path."""
    PIL.Image.new("RGB", (60, 40)).save(folder / "a.png")
    path = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def custom_module(file: str, **options: Any) -> ReferDataModule:
    return ReferDataModule(CustomSource(file), **options)


def test_bad_lines_of_custom_data_are_skipped_if_they_are_for_training(tmp_path: Path) -> None:
    bad = [NO_SENTENCE, LINE | {"image": "nowhere.png", "split": "train"}, LINE | {"polygons": []}]
    file = write_lines(tmp_path, LINE, *bad, LINE | {"split": "val"})
    with pytest.raises(InputError, match="3 lines of"):
        _ = custom_module(file).index
    data = custom_module(file, on_error="skip")
    assert len(data.index) == 2
    names = [f"line {number} of {file}" for number in (2, 3, 4)]
    assert [skipped.sample for skipped in data.never_usable()] == names
    for line in (NO_SENTENCE | {"split": "val"}, "{"):  # for evaluation, and possibly for it
        file = write_lines(tmp_path, LINE, *bad, line)
        with pytest.raises(InputError, match=r"1 line of .* line 5"):
            _ = custom_module(file, on_error="skip").index


def test_bad_training_lines_are_an_error_where_train_is_evaluated(tmp_path: Path) -> None:
    file = write_lines(tmp_path, LINE, NO_SENTENCE, LINE | {"split": "val"})
    strict: tuple[dict[str, Any], ...] = (
        {"evaluation_splits": ["train"]},
        {"select_split": "train"},
    )
    for options in strict:
        with pytest.raises(InputError, match=r"1 line of .* line 2"):
            _ = custom_module(file, on_error="skip", **options).index


# -- The setting


def test_only_raise_and_skip_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.on_error must be raise or skip, got 'ignore'"):
        module(tmp_path, on_error="ignore")


@pytest.mark.parametrize("dataset", ["shapes", "refcoco", "grefcoco"])
def test_the_default_is_to_raise_and_does_not_change_the_fingerprint(dataset: str) -> None:
    config = compose_config([f"dataset={dataset}"])
    assert config["dataset"].pop("on_error") == "raise"
    before = fingerprint(config)
    assert fingerprint(compose_config([f"dataset={dataset}"])) == before
    skipping = fingerprint(compose_config([f"dataset={dataset}", "dataset.on_error=skip"]))
    assert skipping["experiment"] != before["experiment"]
    assert skipping["setting"] == before["setting"]


# -- Whole runs


def damaged_root(small_shapes: Path, folder: Path) -> tuple[Path, list[str]]:
    """Return a data root with a damaged copy of the small set, and the names of the bad refs."""
    root = folder / f"shapes-v{shapes.VERSION}"
    shutil.copytree(small_shapes / root.name, root)
    remove_caches(folder)
    last = empty_mask(root)
    return folder, [*damage_images(root), last]


def skipped_in(results: dict[str, Any]) -> set[str]:
    return {entry["sample"] for entry in results["skipped"]}


SKIPPING = (*SHORT, "dataset.on_error=skip", "dataset.sentences_per_image=1")


def test_a_run_lists_skipped_samples_and_resumes_exactly(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, bad = damaged_root(small_shapes, tmp_path / "data")
    overrides = (*SKIPPING, f"data_root={data}")
    whole = run(monkeypatch, tmp_path / "whole", *overrides)
    skipped = skipped_in(whole)
    message = f"{len(skipped)} training samples could not be used and were replaced"
    assert message in capsys.readouterr().out
    assert bad[-1] in skipped, "known before the first step"
    assert skipped <= set(bad)
    assert len(skipped) > len(bad) / 2, "an epoch leaves out samples that do not fill a batch"
    run(monkeypatch, tmp_path / "part", *overrides, "trainer.max_steps=4")
    last = "checkpoints/last.ckpt"
    resumed = run(
        monkeypatch, tmp_path / "resumed", *overrides, f"resume='{tmp_path / 'part' / last}'"
    )
    assert same_state(tmp_path / "resumed" / last, tmp_path / "whole" / last)
    assert resumed["skipped"] == whole["skipped"]


@pytest.mark.slow
def test_two_processes_with_workers_skip_and_list_the_same_samples(
    small_shapes: Path, tmp_path: Path
) -> None:
    data, bad = damaged_root(small_shapes, tmp_path / "data")
    options = (f"data_root={data}", "hydra.run.dir=run", "workers=1")
    devices = ("trainer=ddp_cpu", "trainer.devices=2")
    result = execute("train", *SKIPPING, *options, *devices, cwd=tmp_path, seconds=600)
    assert result.returncode == 0, result.stderr[-3000:]
    skipped = skipped_in(json.loads((tmp_path / "run/results.json").read_text()))
    assert skipped <= set(bad)
    assert len(skipped) > len(bad) / 2
    output = result.stdout + result.stderr
    assert output.count("training samples could not be used") == 1
