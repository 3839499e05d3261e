"""Training and evaluation samples: shapes, drawn sentences, augmentations and damaged images."""

import itertools
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from crislit.data.dataset import ReferTrainSet, read_image
from crislit.data.samplers import TrainKey
from crislit.errors import InputError
from crislit.io.dataset_images import decode_image
from crislit.transforms.augmentation import Augmentation
from crislit.transforms.letterbox import letterbox_image, letterbox_mask
from crislit.transforms.tokenizer import tokenize
from tests.data.test_datamodule import data_module, shapes_module, write_small_shapes


def train_set(root: Path, **options: Any) -> ReferTrainSet:
    data = data_module(root)
    options = {"image_size": 32, "max_tokens": 17, "seed": 1} | options
    return ReferTrainSet(data.index, data.split_refs("train").tolist(), **options)


def augmented_set(root: Path) -> ReferTrainSet:
    transforms = [A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1)]
    return train_set(root, augmentation=Augmentation(transforms=transforms))


# -- Training samples


def test_training_draws_every_sentence_of_a_ref_and_repeats_by_seed(refer_root: Path) -> None:
    train = train_set(refer_root)
    index = train.index
    position = next(
        i for i, ref in enumerate(train.refs) if len(index.sentence_rows(int(ref))) == 3
    )
    ref = int(train.refs[position])
    drawn = [train.draw_sentence(epoch, ref, 0) for epoch in range(30)]
    assert set(drawn) == set(index.sentence_rows(ref))
    assert drawn == [train.draw_sentence(epoch, ref, 0) for epoch in range(30)]
    key = TrainKey(0, position)
    assert torch.equal(train[key].tokens, train[key].tokens)


@pytest.mark.parametrize("k", [1, 2, 4, "augmented"])
def test_a_batch_of_samples_equals_the_same_samples_read_alone(
    refer_root: Path, k: int | str
) -> None:
    if isinstance(k, int):
        train, sentences = data_module(refer_root, sentences_per_image=k).train_set(), k
    else:
        train, sentences = augmented_set(refer_root), 1
    keys = [TrainKey(2, position) for position in (3, 0, 5, 3)]
    batch = train.__getitems__(keys)
    assert len(batch.images) == 4
    assert len(batch.tokens) == len(batch.masks) == 4 * sentences
    for i, key in enumerate(keys):
        alone, share = train[key], slice(i * sentences, (i + 1) * sentences)
        assert torch.equal(batch.images[i : i + 1], alone.images)
        assert torch.equal(batch.tokens[share], alone.tokens)
        assert torch.equal(batch.masks[share], alone.masks)
        rows = [train.draw_sentence(2, ref, i) for i, ref in enumerate(train.draw_refs(key))]
        texts = [train.index.sentence(row) for row in rows]
        assert torch.equal(alone.tokens, tokenize(texts, 17))


def test_augmentations_differ_between_epochs_and_must_keep_uint8(generated_root: Path) -> None:
    train = augmented_set(generated_root)
    assert not torch.equal(train[TrainKey(0, 0)].images, train[TrainKey(1, 0)].images)
    train.augmentation = Augmentation(transforms=[A.ToFloat()])
    with pytest.raises(InputError, match="augmentations must keep uint8, and made float32"):
        train[TrainKey(0, 0)]


def test_a_training_sample_has_the_letterboxed_shapes_and_a_soft_mask(refer_root: Path) -> None:
    train = train_set(refer_root, image_size=96)
    key = TrainKey(0, 0)
    batch, (ref,) = train[key], train.draw_refs(key)
    assert batch.images.shape == (1, 3, 96, 96)
    assert batch.tokens.shape == (1, 17)
    assert batch.masks.shape == (1, 1, 96, 96)
    square = letterbox_image(read_image(train.index, ref), 96)
    assert np.array_equal(batch.images[0].permute(1, 2, 0), square)
    assert np.array_equal(batch.masks[0, 0], letterbox_mask(255 * train.index.mask(ref), 96))
    assert ((batch.masks > 0) & (batch.masks < 255)).any()


# -- Images


SUFFIXES = ("png", "bmp", "tiff", "webp", "gif", "ppm", "jpg")
NOT_WRITTEN = {("P", "jpg"), ("RGBA", "jpg"), ("P", "ppm")}
"""Modes that Pillow cannot write in a format."""
OPTIONS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 95}}
KINDS = sorted(set(itertools.product(("RGB", "L", "P", "RGBA", "1"), SUFFIXES)) - NOT_WRITTEN)


@pytest.mark.parametrize(("mode", "suffix"), KINDS)
def test_images_of_every_kind_are_read_as_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    gray = np.add.outer(np.arange(24), 3 * np.arange(32))[..., None]
    pixels = gray + np.array([0, 60, 120])  # red, green and blue differ
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    path = tmp_path / f"a.{suffix}"
    image.save(path, **OPTIONS.get(suffix, {}))
    with PIL.Image.open(path) as saved:
        expected = np.asarray(saved.convert("RGB")).astype(int)
    difference = abs(decode_image(path, (24, 32)).astype(int) - expected).max()
    assert difference <= (4 if suffix == "jpg" else 0)


def test_a_damaged_image_and_one_of_another_size_are_named(tmp_path: Path) -> None:
    root = write_small_shapes(tmp_path)
    data = shapes_module(root)
    samples = data.evaluation_set("val")
    path = data.index.image_path(int(samples.samples[0, 0]))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=rf"{path.name} is damaged"):
        samples[0]
    cv2.imwrite(str(path), np.zeros((50, 100, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"\(50, 100\) pixels"):
        samples[0]


# -- The blind control


def test_the_blind_control_pairs_every_sentence_with_another_object_of_its_image(
    refer_root: Path,
) -> None:
    data = data_module(refer_root)
    index, refs = data.index, data.split_refs("train")
    blind = data.evaluation_set("train", blind=True)
    ref_of_row = {row: int(ref) for ref in refs for row in index.sentence_rows(int(ref))}
    assert len(blind) > 100
    for target, row in blind.samples:
        assert target != ref_of_row[row]
        assert index.image_id(target) == index.image_id(ref_of_row[row])
    assert len({int(row) for row in blind.samples[:, 1]}) == len(blind)
    images = index.image_ids(refs)
    several = [int(ref) for ref in refs if (images == index.image_id(int(ref))).sum() > 1]
    assert len(blind) == sum(len(index.sentence_rows(ref)) for ref in several)
