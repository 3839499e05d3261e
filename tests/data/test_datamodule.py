"""ReferDataModule: splits and loaders serve every sample once, and sizes are checked."""

import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from crislit.data import shapes
from crislit.data.datamodule import ReferDataModule
from crislit.data.dataset import ReferEvaluationSet
from crislit.data.samplers import NO_SAMPLE, TrainKey
from crislit.data.sources import ReferSource
from crislit.errors import InputError
from crislit.training.evaluation import warn_about_empty_targets
from crislit.training.trainer import usable_devices
from crislit.transforms.letterbox import letterbox_image
from tests.refer_data import count_refs

REFCOCO = ("refcoco", "refs(unc).p")
SHAPES = ("shapes", "refs(crislit).p")


def data_module(
    root: Path, folder: str = REFCOCO[0], refs: str = REFCOCO[1], **options: Any
) -> ReferDataModule:
    """Return a data module with small images and batches."""
    options = {"image_size": 64, "batch_size": 4, "workers": 0} | options
    return ReferDataModule(ReferSource(root, folder, refs), **options)


def write_small_shapes(folder: Path) -> Path:
    """Write `shapes` with 4 training images and 2 in every other split, to be damaged."""
    scenes = {"train": 4, "val": 2, "testA": 2, "testB": 2}
    return shapes.write_shapes(folder, "shapes", scenes=scenes)


def shapes_module(root: Path, **options: Any) -> ReferDataModule:
    return data_module(root, *SHAPES, **options)


# -- Evaluation


def test_every_image_is_encoded_once_per_evaluation(refer_root: Path) -> None:
    data = data_module(refer_root, eval_batch_size=32)
    data.prepare_data()
    loader = data.evaluation_loader("val")
    samples = loader.dataset
    assert isinstance(samples, ReferEvaluationSet)
    images, sentences = np.unique(samples.image_ids, return_counts=True)
    assert max(sentences) <= 32
    assert sum(len(batch.images) for batch in loader) == len(images)
    assert len(loader) == len(list(loader))


def test_every_sentence_is_evaluated_or_only_the_first_of_each_ref(refer_root: Path) -> None:
    counts = count_refs(refer_root, *REFCOCO)
    del counts["train"]
    for protocol, column in (("first_sentence", 0), ("all_sentences", 1)):
        data = data_module(refer_root, protocol=protocol)
        sizes = {split: len(data.evaluation_set(split)) for split in data.splits}
        assert sizes == {split: numbers[column] for split, numbers in counts.items()}


def test_loaders_give_the_documented_batches(refer_root: Path) -> None:
    data = data_module(refer_root, eval_batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.tokens.shape == (4, 17)
    assert batch.masks.shape == (4, 1, 64, 64)
    batches = list(data.evaluation_loader("val"))
    samples = data.evaluation_set("val")
    assert [number for batch in batches for number in batch.samples] == list(range(len(samples)))
    for batch in batches[:2]:
        for target, number in zip(batch.targets, batch.samples, strict=True):
            assert target.shape == samples.image(number).shape[:2]
            assert np.array_equal(target, samples.target(number))


@pytest.mark.parametrize("blind", [False, True])
def test_sentences_of_an_image_are_consecutive_and_share_it_in_a_batch(
    blind: bool, refer_root: Path
) -> None:
    data = data_module(refer_root, eval_batch_size=7)
    samples = data.evaluation_set("val", blind)
    images = samples.image_ids.tolist()
    changes = sum(a != b for a, b in itertools.pairwise(images))
    assert 1 + changes == len(set(images)) < len(images)
    shared = 0
    for batch in data.evaluation_loader("val", blind):
        assert len(batch.images) == len({images[number] for number in batch.samples})
        shared += len(batch.tokens) - len(batch.images)
        for row, number in zip(batch.image_indices, batch.samples, strict=True):
            expected = letterbox_image(samples.image(number), 64)
            assert np.array_equal(batch.images[row].permute(1, 2, 0), expected)
    assert shared > len(samples) / 4


def test_images_without_refs_are_allowed_and_empty_targets_are_evaluated(tmp_path: Path) -> None:
    root = write_small_shapes(tmp_path)
    instances_path, refs_path = root / "shapes/instances.json", root.joinpath(*SHAPES)
    instances, refs = json.loads(instances_path.read_bytes()), pickle.loads(refs_path.read_bytes())
    target = next(ref for ref in refs if ref["split"] == "val")
    # One ref remains in val, in one of its two images, with a degenerate polygon.
    refs = [ref for ref in refs if ref["split"] != "val" or ref is target]
    (annotation,) = [item for item in instances["annotations"] if item["id"] == target["ann_id"]]
    annotation["segmentation"] = [[1, 1, 2, 2]]
    instances["images"].append({"id": 10**6, "file_name": "nowhere.jpg", "height": 10, "width": 10})
    instances_path.write_text(json.dumps(instances))
    refs_path.write_bytes(pickle.dumps(refs, 2))

    data = shapes_module(root)
    data.setup("fit")
    assert sum(len(batch.targets) for batch in data.val_dataloader()) == len(target["sentences"])
    samples = data.evaluation_set("val")
    assert not any(samples.target(number).any() for number in range(len(samples)))
    ids = [sentence["sent_id"] for sentence in target["sentences"]]
    names = {samples.name(number) for number in range(len(samples))}
    assert names == {f"sentence {i} of ref {target['ref_id']}" for i in ids}
    # The blind control needs another object in the image.
    with pytest.raises(InputError, match="split 'val' of shapes has no sample to evaluate"):
        data.evaluation_set("val", blind=True)
    served = []
    for rank in range(8):
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=8, strategy=strategy
        )
        (batch,) = data.val_dataloader()
        served += batch.samples
    assert sorted(served) == [NO_SAMPLE] * (8 - len(samples)) + list(range(len(samples)))


def test_samples_with_an_empty_target_are_listed_by_name(caplog: pytest.LogCaptureFixture) -> None:
    targets = [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)]
    methods = {
        "__len__": lambda _: 2,
        "target": lambda _, n: targets[n],
        "name": lambda _, n: f"sample {n}",
    }
    samples: Any = type("Samples", (), methods)()
    warn_about_empty_targets(samples, "val")
    assert caplog.messages == ["val: 1 samples have an empty target and count as IoU 0: sample 0"]


# -- Training


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_epoch_visits_every_ref_with_any_number_of_sentences_per_image(
    refer_root: Path, k: int
) -> None:
    data = data_module(refer_root, sentences_per_image=k)
    train = data.train_set()
    for epoch in (0, 1):
        drawn = [train.draw_refs(TrainKey(epoch, position)) for position in range(len(train))]
        for refs in drawn:
            assert len(refs) == k
            assert len({data.index.image_id(ref) for ref in refs}) == 1
        visited = {ref for refs in drawn for ref in refs}
        assert visited == set(data.split_refs("train").tolist())
    assert len(train) == count_refs(refer_root, *REFCOCO)["train"][0] or k > 1
    batch = next(iter(data.train_dataloader()))
    assert (batch.images.shape[0], batch.tokens.shape[0], batch.masks.shape[0]) == (4 // k, 4, 4)


def test_workers_give_the_same_batch_as_the_main_process(refer_root: Path) -> None:
    alone, from_workers = (
        next(iter(data_module(refer_root, workers=workers).train_dataloader()))
        for workers in (0, 2)
    )
    assert torch.equal(alone.images, from_workers.images)
    assert torch.equal(alone.tokens, from_workers.tokens)


# -- Splits


def test_max_images_keeps_the_first_images_by_id(refer_root: Path) -> None:
    every = data_module(refer_root)
    refs = every.split_refs("train")
    image_ids = every.index.image_ids(refs)
    first = sorted(set(image_ids.tolist()))[:8]
    kept = refs[np.isin(image_ids, first)]
    assert 8 < len(kept) < len(refs)

    data = data_module(refer_root, max_images=8, evaluation_splits=["train"], select_split="train")
    assert data.split_refs("train").tolist() == kept.tolist()
    sentences = sum(len(data.index.sentence_rows(int(ref))) for ref in kept)
    assert len(data.evaluation_set("train")) == sentences


def test_a_set_without_a_train_split_evaluates_and_refuses_training(refer_root: Path) -> None:
    data = data_module(refer_root, "refcocog", "refs(google).p")
    assert data.splits == ["val"]
    data.setup("test")
    with pytest.raises(InputError, match="no split 'train', only val"):
        data.setup("fit")


def test_an_absent_split_is_an_error_that_names_the_existing_ones(generated_root: Path) -> None:
    with pytest.raises(InputError, match="no split 'testC', only train, val, testA, testB"):
        data_module(generated_root, evaluation_splits=["testC"]).setup("test")


def test_a_missing_image_is_an_error_before_training(tmp_path: Path) -> None:
    root = write_small_shapes(tmp_path)
    data = shapes_module(root)
    data.setup("fit")
    (root / "images/train2014/COCO_train2014_000000000002.jpg").unlink()
    missing = r"1 of 4 images are missing.*COCO_train2014_000000000002.jpg"
    with pytest.raises(InputError, match=missing):
        data.setup("fit")


# -- Sizes


def test_fewer_samples_than_a_batch_is_an_error(refer_root: Path) -> None:
    refs = count_refs(refer_root, *REFCOCO)["train"][0]
    expected = (
        f"no training batch: an epoch of the train split has {refs} sentences, fewer than "
        f"batch_size={refs + 1}"
    )
    with pytest.raises(InputError, match=expected):
        data_module(refer_root, batch_size=refs + 1).setup("fit")


def test_a_batch_must_divide_evenly_and_leave_batchnorm_two_samples(generated_root: Path) -> None:
    def accumulation(processes: int, **options: Any) -> int:
        return data_module(generated_root, **options).accumulation(processes)

    assert accumulation(8, batch_size=64) == 1
    assert accumulation(2, batch_size=64, batch_size_per_device=4) == 8
    with pytest.raises(InputError, match="does not divide over 3 devices"):
        accumulation(3, batch_size=64)
    multiple = r"batch_size=30 must be a multiple of dataset\.sentences_per_image=4"
    with pytest.raises(InputError, match=multiple):
        data_module(generated_root, batch_size=30, sentences_per_image=4)
    with pytest.raises(InputError, match="batch_size_per_device=5"):
        accumulation(1, batch_size=64, batch_size_per_device=5)
    for processes, options in (
        (1, {"batch_size": 1}),
        (2, {"batch_size": 2}),
        (1, {"batch_size_per_device": 1}),
    ):
        with pytest.raises(InputError, match="BatchNorm needs two"):
            accumulation(processes, **options)


@pytest.mark.parametrize(("available", "used"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_training_uses_the_largest_number_of_devices_that_divides_the_batch(
    generated_root: Path, available: int, used: int
) -> None:
    data = data_module(generated_root, batch_size=32, sentences_per_image=4)
    assert usable_devices(available, data) == used


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 100},
        {"image_size": 0},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"eval_batch_size": 0},
        {"max_images": 0},
    ],
)
def test_invalid_sizes_are_refused_on_construction(
    generated_root: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        data_module(generated_root, **options)
