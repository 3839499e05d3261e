"""Splits, samplers and loaders: nothing counted twice, nothing lost, the same order again."""

import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from crislit.data import shapes
from crislit.data.datamodule import ReferDataModule, TrainSampler, WholePictures, evaluation_share
from crislit.data.dataset import NO_SAMPLE, ReferEvaluationSet, ReferTrainSet, TrainKey, decode_image, read_image
from crislit.data.letterbox import letterbox_image, letterbox_mask
from crislit.data.tokenizer import tokenize
from crislit.data.transform import Letterbox
from crislit.errors import InputError
from crislit.train import fitting_devices, report_empty


def module(minirefer: Path, folder: str = "refcoco", refs: str = "refs(unc).p", **options: Any) -> ReferDataModule:
    given: dict[str, Any] = {"image_size": 64, "batch_size": 4, "workers": 0} | options
    return ReferDataModule(root=minirefer, folder=folder, refs=refs, **given)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 12, 13])
def test_evaluation_shares_are_a_partition(size: int, processes: int) -> None:
    shares = [list(evaluation_share(size, rank, processes)) for rank in range(processes)]
    assert sorted(number for share in shares for number in share if number != NO_SAMPLE) == list(range(size))
    assert all(share and (NO_SAMPLE not in share or share == [NO_SAMPLE]) for share in shares), "everyone has a batch"


def test_a_picture_is_divided_only_where_it_alone_fills_a_batch() -> None:
    pictures = np.repeat([9, 4, 7, 5, 6], [7, 7, 4, 20, 1])
    batches = list(WholePictures(range(39), pictures, 16))
    assert [len(batch) for batch in batches] == [14, 4, 16, 5]
    assert [sample for batch in batches for sample in batch] == list(range(39))
    assert {pictures[i] for i in batches[3]} == {5, 6}
    assert list(WholePictures([NO_SAMPLE], pictures, 16)) == [[NO_SAMPLE]]


def test_every_picture_is_encoded_once_in_an_evaluation(minirefer: Path) -> None:
    data = module(minirefer, eval_batch_size=32)
    data.prepare_data()
    loader = data.evaluation_loader("val")
    samples = loader.dataset
    assert isinstance(samples, ReferEvaluationSet)
    most = max(np.bincount(np.unique(samples.pictures, return_inverse=True)[1]))
    assert most <= 32
    assert sum(len(batch.images) for batch in loader) == len(np.unique(samples.pictures))
    assert len(loader) == len(list(loader))


@pytest.mark.parametrize(("processes", "per_device"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (3, 2)])
def test_an_optimizer_step_sees_the_same_refs_however_it_is_divided(processes: int, per_device: int) -> None:
    whole = [key.position for key in TrainSampler(50, 12, 12)]
    shares = [[key.position for key in TrainSampler(50, 12, per_device, rank, processes)] for rank in range(processes)]
    assert {len(share) for share in shares} == {len(TrainSampler(50, 12, per_device, 0, processes))} == {48 // processes}
    for step in range(4):
        here = [share[step * 12 // processes : (step + 1) * 12 // processes] for share in shares]
        assert sorted(number for share in here for number in share) == sorted(whole[12 * step : 12 * step + 12])


def test_epochs_differ_and_repeat_by_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TrainSampler(40, 8, 8, seed=seed)
        sampler.set_epoch(epoch)
        assert {key.epoch for key in sampler} == {epoch}
        return [key.position for key in sampler]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(order(0, 3)) == list(range(40))


def test_training_draws_every_sentence_of_a_ref_in_time_and_the_same_again(minirefer: Path) -> None:
    data = module(minirefer)
    train = ReferTrainSet(data.index, data.refs_of("train").tolist(), image_size=32, max_words=17, seed=1)
    position = next(i for i, ref in enumerate(train.refs) if len(data.index.sentence_rows(ref)) == 3)
    ref = int(train.refs[position])
    drawn = [train.draw_sentence(epoch, ref, 0) for epoch in range(30)]
    assert set(drawn) == set(data.index.sentence_rows(ref))
    assert drawn == [train.draw_sentence(epoch, ref, 0) for epoch in range(30)]
    assert torch.equal(train[TrainKey(0, position)].tokens, train[TrainKey(0, position)].tokens)


def noisy(minirefer: Path) -> ReferTrainSet:
    data = module(minirefer)
    augmentations = [A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1)]
    return ReferTrainSet(
        data.index, data.refs_of("train").tolist(), image_size=32, max_words=17, seed=1, augmentations=augmentations
    )


@pytest.mark.parametrize("k", [1, 2, 4, "augmented"])
def test_samples_that_are_asked_for_together_are_those_that_are_asked_for_alone(minirefer: Path, k: int | str) -> None:
    train = module(minirefer, sentences_per_image=k, batch_size=4).train_set() if isinstance(k, int) else noisy(minirefer)
    keys = [TrainKey(2, position) for position in (3, 0, 5, 3)]
    together, size = train.__getitems__(keys), k if isinstance(k, int) else 1
    assert (len(together.images), len(together.tokens), len(together.masks)) == (4, 4 * size, 4 * size)
    for i, key in enumerate(keys):  # each picture's own words and masks, in order
        alone, share = train[key], slice(i * size, (i + 1) * size)
        assert torch.equal(together.images[i : i + 1], alone.images)
        assert torch.equal(together.tokens[share], alone.tokens)
        assert torch.equal(together.masks[share], alone.masks)
        words = [train.index.sentence(train.draw_sentence(2, ref, visit)) for visit, ref in enumerate(train.draw_refs(key))]
        assert torch.equal(alone.tokens, tokenize(words, 17))


def test_augmentations_differ_between_epochs_and_must_leave_bytes(minirefer: Path) -> None:
    train = noisy(minirefer)
    assert not torch.equal(train[TrainKey(0, 0)].images, train[TrainKey(1, 0)].images)
    train.transform = A.Compose([Letterbox(32), A.Normalize()])
    with pytest.raises(InputError, match="augmentations must leave uint8, and made float32"):
        train[TrainKey(0, 0)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_epoch_visits_every_ref_with_any_number_of_sentences_an_image(minirefer: Path, k: int) -> None:
    data = module(minirefer, sentences_per_image=k, batch_size=4)
    train = data.train_set()
    for epoch in (0, 1):
        drawn = [train.draw_refs(TrainKey(epoch, position)) for position in range(len(train))]
        assert all(len(refs) == k and len({data.index.image_id(ref) for ref in refs}) == 1 for refs in drawn)
        assert {ref for refs in drawn for ref in refs} == set(data.refs_of("train").tolist())
    assert len(train) == 94 or k > 1
    batch = next(iter(data.train_dataloader()))
    assert (batch.images.shape[0], batch.tokens.shape[0], batch.masks.shape[0]) == (4 // k, 4, 4)


def test_a_training_sample_has_the_letterboxed_shapes_and_a_soft_mask(minirefer: Path) -> None:
    data = module(minirefer)
    train = ReferTrainSet(data.index, data.refs_of("train").tolist(), image_size=96, max_words=17)
    key = TrainKey(0, 0)
    batch, (ref,) = train[key], train.draw_refs(key)
    assert (batch.images.shape, batch.tokens.shape, batch.masks.shape) == ((1, 3, 96, 96), (1, 17), (1, 1, 96, 96))
    assert np.array_equal(batch.images[0].permute(1, 2, 0), letterbox_image(read_image(data.index, ref), 96))
    assert np.array_equal(batch.masks[0, 0], letterbox_mask(255 * data.index.mask(ref), 96))
    assert ((batch.masks > 0) & (batch.masks < 255)).any()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_pictures_of_every_kind_are_read_as_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(24), 3 * np.arange(32))[..., None] + np.array([0, 60, 120])  # red, green and blue differ
    picture = PIL.Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).convert(mode)
    path = tmp_path / f"a.{suffix}"
    try:
        picture.save(path, **({"lossless": True} if suffix == "webp" else {"quality": 95} if suffix == "jpg" else {}))
    except OSError:
        pytest.skip(f"there is no {suffix} of {mode}")
    with PIL.Image.open(path) as saved:
        expected = np.asarray(saved.convert("RGB")).astype(int)
    assert abs(decode_image(path, (24, 32)).astype(int) - expected).max() <= (4 if suffix == "jpg" else 0)


def test_every_sentence_is_an_evaluation_sample_and_each_refs_first_in_the_released_protocol(minirefer: Path) -> None:
    data = module(minirefer)
    assert {split: len(data.evaluation_set(split)) for split in data.splits} == {"val": 54, "testA": 16, "testB": 41}
    first = module(minirefer, protocol="first_sentence")
    assert {split: len(first.evaluation_set(split)) for split in first.splits} == {"val": 20, "testA": 7, "testB": 15}


def test_the_blind_control_pairs_every_sentence_with_another_object_of_its_picture(minirefer: Path) -> None:
    data = module(minirefer)
    index, refs = data.index, data.refs_of("train")
    blind = data.evaluation_set("train", blind=True)
    owner = {row: int(ref) for ref in refs for row in index.sentence_rows(ref)}
    assert len(blind) > 100
    for truth, row in blind.samples:
        assert truth != owner[row]
        assert index.image_id(truth) == index.image_id(owner[row])
    assert len({int(row) for row in blind.samples[:, 1]}) == len(blind)
    several = [ref for ref in refs if (index.image_ids(refs) == index.image_id(ref)).sum() > 1]
    assert len(blind) == sum(len(index.sentence_rows(ref)) for ref in several)


def test_loaders_give_the_documented_batches(minirefer: Path) -> None:
    data = module(minirefer, eval_batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert (batch.images.shape, batch.tokens.shape, batch.masks.shape) == ((4, 3, 64, 64), (4, 17), (4, 1, 64, 64))
    batches = list(data.evaluation_loader("val"))
    assert [number for batch in batches for number in batch.samples] == list(range(54))
    samples = data.evaluation_set("val")
    for batch in batches[:2]:
        for truth, number in zip(batch.truths, batch.samples, strict=True):
            assert truth.shape == samples.picture(number).shape[:2]
            assert np.array_equal(truth, samples.truth(number))


@pytest.mark.parametrize("blind", [False, True])
def test_sentences_of_a_picture_follow_each_other_and_share_it_in_a_batch(blind: bool, minirefer: Path) -> None:
    data = module(minirefer, eval_batch_size=7)
    samples = data.evaluation_set("val", blind)
    pictures = [data.index.image_id(int(ref)) for ref, _ in samples.samples]
    assert 1 + sum(a != b for a, b in itertools.pairwise(pictures)) == len(set(pictures)) < len(pictures)
    shared = 0
    for batch in data.evaluation_loader("val", blind):
        assert len(batch.images) == len({pictures[number] for number in batch.samples})
        shared += len(batch.tokens) - len(batch.images)
        for owner, number in zip(batch.owners, batch.samples, strict=True):
            assert np.array_equal(batch.images[owner].permute(1, 2, 0), letterbox_image(samples.picture(number), 64))
    assert shared > len(samples) / 4


def test_workers_give_what_the_main_process_gives(minirefer: Path) -> None:
    alone, together = (next(iter(module(minirefer, workers=workers).train_dataloader())) for workers in (0, 2))
    assert torch.equal(alone.images, together.images)
    assert torch.equal(alone.tokens, together.tokens)


def test_max_images_keeps_the_first_by_id(minirefer: Path) -> None:
    data = module(minirefer, max_images=8, evaluation_splits=["train"], select_split="train")
    assert len(data.evaluation_set("train")) == 36
    every = module(minirefer)
    images = sorted(set(every.index.image_ids(every.refs_of("train")).tolist()))[:8]
    assert set(data.index.image_ids(data.refs_of("train")).tolist()) == set(images)


def test_a_set_without_train_split_evaluates_and_refuses_training(minirefer: Path) -> None:
    data = module(minirefer, "refcocog", "refs(google).p")
    assert data.splits == ["val"]
    data.setup("test")
    with pytest.raises(InputError, match="no split 'train', only val"):
        data.setup("fit")


def test_a_split_that_the_set_does_not_have_is_named(minirefer: Path) -> None:
    with pytest.raises(InputError, match="no split 'testC', only train, val, testA, testB"):
        module(minirefer, evaluation_splits=["testC"]).setup("test")


def test_fewer_samples_than_a_batch_is_an_error(minirefer: Path) -> None:
    with pytest.raises(
        InputError, match="no training batch: an epoch of the train split has 94 sentences, fewer than batch_size=95"
    ):
        module(minirefer, batch_size=95).setup("fit")


def test_the_batch_must_divide_and_leave_batchnorm_two_samples(minirefer: Path) -> None:
    assert module(minirefer, batch_size=64).accumulation(8) == 1
    assert module(minirefer, batch_size=64, batch_size_per_device=4).accumulation(2) == 8
    with pytest.raises(InputError, match="does not divide over 3 devices"):
        module(minirefer, batch_size=64).accumulation(3)
    with pytest.raises(InputError, match=r"batch_size=30 must be a multiple of dataset\.sentences_per_image=4"):
        module(minirefer, batch_size=30, sentences_per_image=4)
    with pytest.raises(InputError, match="batch_size_per_device=5"):
        module(minirefer, batch_size=64, batch_size_per_device=5).accumulation(1)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"batch_size": 1}, 1),
        ({"batch_size": 2}, 2),
        ({"batch_size_per_device": 1}, 1),
    ]
    for options, processes in cases:
        with pytest.raises(InputError, match="BatchNorm needs at least two"):
            module(minirefer, **options).accumulation(processes)


@pytest.mark.parametrize(("available", "used"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_a_machine_with_any_number_of_devices_trains_on_as_many_as_divide_the_batch(
    minirefer: Path, available: int, used: int
) -> None:
    assert fitting_devices(available, module(minirefer, batch_size=32, sentences_per_image=4)) == used


@pytest.mark.parametrize(
    "options",
    [{"image_size": 100}, {"image_size": 0}, {"batch_size": 0}, {"batch_size": 2.5}, {"eval_batch_size": 0}, {"max_images": 0}],
)
def test_sizes_that_make_no_sense_are_refused_at_once(minirefer: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        module(minirefer, **options)


def test_a_missing_photograph_stops_before_training(tmp_path: Path) -> None:
    root = shapes.write(tmp_path, "shapes", scenes={"train": 4, "val": 2, "testA": 2, "testB": 2})
    data = ReferDataModule(root=root, folder="shapes", refs="refs(crislit).p", image_size=64, batch_size=4, workers=0)
    data.setup("fit")
    (root / "images/train2014/COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 4 images are missing.*COCO_train2014_000000000002.jpg"):
        data.setup("fit")


def test_a_damaged_photograph_and_one_of_another_size_are_named(tmp_path: Path) -> None:
    root = shapes.write(tmp_path, "shapes", scenes={"train": 4, "val": 2, "testA": 2, "testB": 2})
    data = ReferDataModule(root=root, folder="shapes", refs="refs(crislit).p", image_size=64, workers=0)
    samples: ReferEvaluationSet = data.evaluation_set("val")
    path = data.index.image_path(int(samples.samples[0, 0]))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        samples[0]
    cv2.imwrite(str(path), np.zeros((50, 100, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"\(50, 100\) pixels"):
        samples[0]


def test_pictures_without_refs_are_no_error_and_truths_without_pixels_and_nothing_to_evaluate_are_told(tmp_path: Path) -> None:
    root = shapes.write(tmp_path, "shapes", scenes={"train": 4, "val": 2, "testA": 2, "testB": 2})
    instances_file, refs_file = root / "shapes/instances.json", root / "shapes/refs(crislit).p"
    instances, refs = json.loads(instances_file.read_bytes()), pickle.loads(refs_file.read_bytes())
    target = next(ref for ref in refs if ref["split"] == "val")
    lonely = [ref for ref in refs if ref["split"] != "val" or ref is target]  # val: one ref, in one of its two pictures
    next(item for item in instances["annotations"] if item["id"] == target["ann_id"])["segmentation"] = [[1, 1, 2, 2]]
    instances["images"].append({"id": 10**6, "file_name": "nowhere.jpg", "height": 10, "width": 10})
    instances_file.write_text(json.dumps(instances))
    refs_file.write_bytes(pickle.dumps(lonely, 2))

    data = ReferDataModule(root=root, folder="shapes", refs=refs_file.name, image_size=64, batch_size=4, workers=0)
    data.setup("fit")
    assert sum(len(batch.truths) for batch in data.val_dataloader()) == len(target["sentences"])
    samples = data.evaluation_set("val")
    assert not any(samples.truth(number).any() for number in range(len(samples)))
    assert {samples.name(number) for number in range(len(samples))} == {
        f"sentence {sentence['sent_id']} of ref {target['ref_id']}" for sentence in target["sentences"]
    }
    with pytest.raises(InputError, match="split 'val' of shapes has no sample to evaluate"):
        data.evaluation_set("val", blind=True)  # which takes another object of the picture
    shares = []
    for rank in range(8):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=8)  # type: ignore[assignment]
        (batch,) = data.val_dataloader()
        shares += batch.samples
    assert sorted(shares) == [NO_SAMPLE] * (8 - len(samples)) + list(range(len(samples)))


def test_an_empty_truth_counts_as_zero_and_is_listed_by_name(caplog: pytest.LogCaptureFixture) -> None:
    truths = [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)]
    methods = {"__len__": lambda _: 2, "truth": lambda _, n: truths[n], "name": lambda _, n: f"sample {n}"}
    samples: Any = type("Samples", (), methods)()
    report_empty({"empty": 1}, samples, "val")
    assert caplog.messages == ["val: 1 samples have a truth without pixels, counted as IoU 0: sample 0"]
    caplog.clear()
    report_empty({"empty": 0}, samples, "val")
    assert caplog.messages == []
