"""Augmentation: mirrored images, masks and sentences agree, and a seed decides everything."""

from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crislit.config import compose_config
from crislit.data.datamodule import ReferDataModule
from crislit.data.dataset import ReferTrainSet, SkippingTrainSet, TrainBatch
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import TrainKey
from crislit.errors import InputError
from crislit.io.images import Image
from crislit.training.build import build_augmentation, build_data
from crislit.training.provenance import fingerprint
from crislit.transforms.augmentation import Augmentation, mirror_sentence
from crislit.transforms.letterbox import letterbox_image, letterbox_mask
from crislit.transforms.tokenizer import tokenize
from tests.runs import run
from tests.training.test_resume import SHORT, same_state

SIZE = 96


# -- Sentences


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        # Sides
        ("left", "right"),
        ("the man on the left", "the man on the right"),
        ("leftmost dog", "rightmost dog"),
        ("right most dog", "left most dog"),
        ("second from left", "second from right"),
        ("third from left to right", "third from right to left"),
        ("the right-hand door", "the left-hand door"),
        ("righthand side", "lefthand side"),
        ("right-handed batter", "left-handed batter"),
        ("leftward, then to the right side", "rightward, then to the left side"),
        ("bus to the right of the left man", "bus to the left of the right man"),
        ("woman on lhs", "woman on rhs"),
        ("topleft corner, bottomright corner", "topright corner, bottomleft corner"),
        ("left-center", "right-center"),
        ("his left hand", "his right hand"),
        # Upper case
        ("LEFT", "RIGHT"),
        ("Left man, Rightmost dog", "Right man, Leftmost dog"),
        ("RHS and Lhs", "LHS and Rhs"),
        # "right" as a side before a preposition
        ("man on the right next to the car", "man on the left next to the car"),
        ("man on right next to car", "man on left next to car"),
        ("the one to the right by the door", "the one to the left by the door"),
        ("the chair on far right near the wall", "the chair on far left near the wall"),
        ("second from right behind the table", "second from left behind the table"),
        ("upper right by the window", "upper left by the window"),
        ("the dog on your right at the back", "the dog on your left at the back"),
        ("right of the dog", "left of the dog"),
        # "right" in the sense of "immediately" stays
        ("right behind the dog", "right behind the dog"),
        ("man right next to the left car", "man right next to the right car"),
        ("Right in front of the bus", "Right in front of the bus"),
        ("the cup right in the middle", "the cup right in the middle"),
        ("on the right right behind him", "on the left right behind him"),
        ("the glass that is right side up", "the glass that is right side up"),
        # Words that only contain the letters
        ("bright upright piano", "bright upright piano"),
        ("the leftover pizza of the copyright owner", "the leftover pizza of the copyright owner"),
        ("frightened knight with a radio clock", "frightened knight with a radio clock"),
        ("the red circle", "the red circle"),
        ("", ""),
    ],
)
def test_left_and_right_are_exchanged(sentence: str, mirrored: str) -> None:
    assert mirror_sentence(sentence) == mirrored
    assert mirror_sentence(mirrored) == sentence


@pytest.mark.parametrize(
    "sentence",
    [
        *("man at 9 o'clock", "3 o’clock", "the 12 oclock position", "at three O' Clock"),
        *("the arrow that points clockwise", "counter-clockwise arrow"),
        *("guy on the R", "l person", "far rt", "lft side"),  # abbreviations
        "man left behind the dog",  # "right behind" would mean "immediately behind"
        "the one on the lhſ",  # not in the alphabet of left and right
    ],
)
def test_sentences_without_a_mirror_image_are_recognized(sentence: str) -> None:
    assert mirror_sentence(sentence) is None


WORDS = (
    *("left", "right", "Left", "RIGHT", "leftmost", "right-hand", "lhs", "topright", "bright"),
    *("behind", "next to", "in front", "on", "the", "from", "far", "man,", "of"),
)


@given(words=st.lists(st.sampled_from(WORDS), max_size=7))
@settings(deadline=None, database=None, derandomize=True, max_examples=300)
def test_mirroring_twice_gives_the_sentence_back(words: list[str]) -> None:
    sentence = " ".join(words)
    mirrored = mirror_sentence(sentence)
    assert mirrored is None or mirror_sentence(mirrored) == sentence


# -- Images and masks


def random_sample(masks: int = 2) -> tuple[Image, npt.NDArray[np.uint8]]:
    """Return an image of noise, (48, 80, 3), and masks of rectangles, (masks, 48, 80)."""
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    targets = np.zeros((masks, 48, 80), dtype=np.uint8)
    for i, target in enumerate(targets):
        target[10 + i : 30, 5 + 3 * i : 25] = 255
    return image, targets


def test_without_changes_it_is_the_letterbox() -> None:
    image, masks = random_sample()
    square, squares = Augmentation().apply(image, masks, SIZE, mirrored=False, seed=0)
    assert np.array_equal(square, letterbox_image(image, SIZE))
    assert np.array_equal(squares, [letterbox_mask(mask, SIZE) for mask in masks])


def test_a_mirrored_image_and_its_masks_are_mirrored_before_the_letterbox() -> None:
    image, masks = random_sample()
    square, squares = Augmentation().apply(image, masks, SIZE, mirrored=True, seed=0)
    assert np.array_equal(square, letterbox_image(image[:, ::-1].copy(), SIZE))
    assert np.array_equal(squares, [letterbox_mask(mask[:, ::-1].copy(), SIZE) for mask in masks])


def test_transforms_of_places_change_image_and_masks_alike() -> None:
    image, masks = random_sample()
    image[...] = masks[0][..., None]
    square, squares = Augmentation(0, [A.VerticalFlip(p=1)]).apply(image, masks, SIZE, False, 0)
    upside_down = np.ascontiguousarray(image[::-1])
    assert np.array_equal(square, letterbox_image(upside_down, SIZE))
    flipped = [letterbox_mask(np.ascontiguousarray(mask[::-1]), SIZE) for mask in masks]
    assert np.array_equal(squares, flipped)


def test_transforms_of_colors_leave_masks_unchanged() -> None:
    image, masks = random_sample()
    jitter = A.ColorJitter(brightness=(0.5, 0.5), contrast=(1, 1), saturation=(1, 1), p=1)
    square, squares = Augmentation(0, [jitter]).apply(image, masks, SIZE, False, 0)
    assert square.dtype == np.uint8
    assert square.mean() < letterbox_image(image, SIZE).mean()
    assert np.array_equal(squares, [letterbox_mask(mask, SIZE) for mask in masks])


def test_the_seed_alone_decides_the_changes() -> None:
    image, masks = random_sample()
    augmentation = Augmentation(0.5, [A.ColorJitter(p=0.8), A.GaussNoise(p=0.8)])

    def draw(seed: int) -> Image:
        return augmentation.apply(image, masks, SIZE, False, seed)[0]

    first = draw(7)
    others = [draw(seed) for seed in range(5)]
    assert np.array_equal(draw(7), first)
    assert not any(np.array_equal(first, other) for other in others)
    again = Augmentation(0.5, [A.ColorJitter(p=0.8), A.GaussNoise(p=0.8)])
    assert np.array_equal(again.apply(image, masks, SIZE, False, 7)[0], first)


def test_a_transform_that_changes_the_type_of_pixels_is_an_error() -> None:
    image, masks = random_sample()
    with pytest.raises(InputError, match="augmentations must keep uint8, and made float32"):
        Augmentation(0, [A.ToFloat(p=1)]).apply(image, masks, SIZE, False, 0)


@pytest.mark.parametrize("flip", [-0.1, 1.1, float("nan"), "often"])
def test_the_probability_is_checked(flip: Any) -> None:
    with pytest.raises(InputError, match=r"augment\.flip must be a probability in \[0, 1\]"):
        Augmentation(flip)


def test_the_probability_decides_how_many_samples_are_mirrored() -> None:
    def share(flip: float) -> float:
        augmentation = Augmentation(flip)
        mirrored = [augmentation.mirror(["left dog"], seed) for seed in range(1000)]
        assert all(sentences in (None, ["right dog"]) for sentences in mirrored)
        return sum(sentences is not None for sentences in mirrored) / 1000

    assert share(0.0) == 0
    assert share(0.3) == pytest.approx(0.3, abs=0.05)
    assert share(1.0) == 1


def test_the_sentences_of_an_image_are_mirrored_together_or_not_at_all() -> None:
    augmentation = Augmentation(1.0)
    assert augmentation.mirror(["left dog", "cat"], 0) == ["right dog", "cat"]
    assert augmentation.mirror(["left dog", "man at 9 o'clock"], 0) is None


# -- Training samples


@pytest.fixture(scope="module")
def index(small_shapes: Path) -> ReferIndex:
    """The index of a small `shapes`."""
    data = build_data(compose_config([f"data_root={small_shapes}"]))
    return data.index


def train_set(
    index: ReferIndex, augmentation: Augmentation | None, k: int = 1, seed: int = 0
) -> ReferTrainSet:
    return ReferTrainSet(
        index,
        index.split_refs("train").tolist(),
        image_size=SIZE,
        max_tokens=17,
        sentences_per_image=k,
        seed=seed,
        augmentation=augmentation,
    )


def keys(data: ReferTrainSet, epoch: int = 0) -> list[TrainKey]:
    return [TrainKey(epoch, position) for position in range(len(data))]


def same_batch(a: TrainBatch, b: TrainBatch) -> bool:
    """Whether two batches are bit-identical."""
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "tokens", "masks"))


def drawn_sentences(data: ReferTrainSet, key: TrainKey) -> list[tuple[int, str]]:
    """Return the refs of a sample and their sentences as annotated."""
    refs = data.draw_refs(key)
    rows = [data.draw_sentence(key.epoch, ref, visit) for visit, ref in enumerate(refs)]
    return [(ref, data.index.sentence(row)) for ref, row in zip(refs, rows, strict=True)]


@pytest.mark.parametrize("k", [1, 4])
def test_without_augmentation_samples_are_letterboxed_only(index: ReferIndex, k: int) -> None:
    data = train_set(index, None, k)
    batch = data.__getitems__(keys(data))
    masks, sentences = [], []
    for key, image in zip(keys(data), batch.images, strict=True):
        for ref, sentence in drawn_sentences(data, key):
            masks.append(letterbox_mask(255 * index.mask(ref), SIZE))
            sentences.append(sentence)
        expected = letterbox_image(read(index, data.draw_refs(key)[0]), SIZE)
        assert np.array_equal(image.permute(1, 2, 0), expected)
    assert np.array_equal(batch.masks[:, 0], masks)
    assert torch.equal(batch.tokens, tokenize(sentences, 17))
    for unchanged in (Augmentation(), Augmentation(0.0, [A.ColorJitter(p=0)])):
        augmented = train_set(index, unchanged, k)
        assert same_batch(augmented.__getitems__(keys(data)), batch)


def read(index: ReferIndex, ref: int) -> Image:
    """Read an image without the code under test."""
    return np.array(PIL.Image.open(index.image_path(ref)).convert("RGB"))


@pytest.mark.parametrize("k", [1, 4])
def test_a_mirrored_samples_image_masks_and_sentences_agree(index: ReferIndex, k: int) -> None:
    data = train_set(index, Augmentation(1.0), k)
    on_sides = 0
    for key in keys(data):
        batch = data[key]
        drawn = drawn_sentences(data, key)
        mirrored = [mirror_sentence(sentence) for _, sentence in drawn]
        assert None not in mirrored, "every sentence of the embedded data can be mirrored"
        sentences = [sentence for sentence in mirrored if sentence is not None]
        assert torch.equal(batch.tokens, tokenize(sentences, 17))
        image = np.ascontiguousarray(read(index, drawn[0][0])[:, ::-1])
        assert np.array_equal(batch.images[0].permute(1, 2, 0), letterbox_image(image, SIZE))
        for (ref, _), sentence, mask in zip(drawn, sentences, batch.masks[:, 0], strict=True):
            target = np.ascontiguousarray(index.mask(ref)[:, ::-1])
            assert np.array_equal(mask, letterbox_mask(255 * target, SIZE))
            # Words of place in `shapes` are halves of the image.
            center = np.nonzero(target)[1].mean() / target.shape[1]
            for side, is_there in (("left", center < 0.5), ("right", center > 0.5)):
                if side in sentence and "most" not in sentence:
                    assert is_there, sentence
                    on_sides += 1
    assert on_sides > 3


def test_mirrored_and_other_samples_are_mixed_and_epochs_differ(index: ReferIndex) -> None:
    data, plain = train_set(index, Augmentation(0.5)), train_set(index, None)

    def mirrored(epoch: int) -> list[bool]:
        pairs = zip(
            data.__getitems__(keys(data, epoch)).images,
            plain.__getitems__(keys(plain, epoch)).images,
            strict=True,
        )
        return [not torch.equal(a, b) for a, b in pairs]

    first, second = mirrored(0), mirrored(1)
    assert 0.25 < np.mean(first) < 0.75
    assert first == mirrored(0)
    assert first != second


def test_a_sample_depends_on_seed_epoch_and_position_only(index: ReferIndex) -> None:
    def data(seed: int = 0) -> ReferTrainSet:
        return train_set(index, Augmentation(0.5, [A.ColorJitter(p=0.8)]), 4, seed)

    first = data()
    batch = first.__getitems__(keys(first))
    singles = [data()[key] for key in reversed(keys(first))][::-1]
    assert torch.equal(torch.cat([single.images for single in singles]), batch.images)
    assert torch.equal(torch.cat([single.tokens for single in singles]), batch.tokens)
    assert torch.equal(torch.cat([single.masks for single in singles]), batch.masks)
    assert not torch.equal(first.__getitems__(keys(first, 1)).images, batch.images)
    assert not torch.equal(data(1).__getitems__(keys(first)).images, batch.images)
    assert same_batch(SkippingTrainSet(data()).__getitems__(keys(first)), batch)


# -- The group `augment`


def build(root: Path, *overrides: str) -> ReferDataModule:
    options = (f"data_root={root}", "image_size=64", "batch_size=8", "workers=0")
    return build_data(compose_config([*options, *overrides]))


def test_the_choices_build(small_shapes: Path) -> None:
    assert build(small_shapes).augmentation is None
    assert build(small_shapes, "augment=none").augmentation is None
    augmentation = build(small_shapes, "augment=flip_color").augmentation
    assert augmentation is not None
    assert augmentation.flip == 0.5
    (jitter,) = augmentation.transforms
    assert isinstance(jitter, A.ColorJitter)
    assert jitter.hue == (0, 0), "sentences name colors"
    assert jitter.p == 0.8


def test_transforms_can_be_replaced_on_the_command_line() -> None:
    blur = "augment.transforms=[{_target_: albumentations.Blur, p: 1.0}]"
    augmentation = build_augmentation(compose_config(["augment=flip_color", blur]))
    assert augmentation is not None
    assert [type(transform) for transform in augmentation.transforms] == [A.Blur]


def test_evaluation_is_never_augmented(small_shapes: Path) -> None:
    plain, augmented = build(small_shapes), build(small_shapes, "augment=flip_color")
    loaders = (data.evaluation_loader("val") for data in (plain, augmented))
    for a, b in zip(*loaders, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


def test_workers_draw_the_same_changes(small_shapes: Path) -> None:
    loaders = [
        build(small_shapes, "augment=flip_color", f"workers={workers}").train_dataloader()
        for workers in (0, 1)
    ]
    for a, b in zip(*loaders, strict=True):
        assert same_batch(a, b)


def test_the_default_fingerprint_is_unchanged_and_an_augmentation_changes_it() -> None:
    default = fingerprint(compose_config())
    assert fingerprint(compose_config(["augment=none"])) == default
    config = compose_config()
    del config["augment"]  # as in version 0.1
    assert fingerprint(config) == default
    augmented = fingerprint(compose_config(["augment=flip_color"]))
    assert augmented["experiment"] != default["experiment"]
    assert augmented["setting"] != default["setting"]


def test_a_run_with_augmentation_trains_and_resumes_exactly(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*SHORT, f"data_root={small_shapes}", "augment=flip_color")
    whole = run(monkeypatch, tmp_path / "whole", *options)
    assert whole["config"]["augment"]["flip"] == 0.5
    assert whole["splits"]["val"]["samples"] == 36
    last = "checkpoints/last.ckpt"
    run(monkeypatch, tmp_path / "part", *options, "trainer.max_steps=4")
    resume = f"resume='{tmp_path / 'part' / last}'"
    resumed = run(monkeypatch, tmp_path / "resumed", *options, resume)
    assert same_state(tmp_path / "resumed" / last, tmp_path / "whole" / last)
    assert resumed["splits"] == whole["splits"]
    without = run(monkeypatch, tmp_path / "without", *SHORT, f"data_root={small_shapes}")
    assert not same_state(tmp_path / "without" / last, tmp_path / "whole" / last)
    assert without["experiment"] != whole["experiment"]
