"""Training samples (a ref and one of its sentences), evaluation samples (a sentence), batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crislit.data.refer_annotations import Ints, Mask
from crislit.data.refer_cache import SkippedSample
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import TrainKey, epoch_order
from crislit.errors import InputError
from crislit.io import Image, decode_image, decode_pixels, read_image_file
from crislit.transforms import letterbox_image, letterbox_mask, stack_images, tokenize
from crislit.transforms.augmentation import Augmentation

Protocol = Literal["all_sentences", "first_sentence"]
"""Which sentences are evaluated: all, as the field does, or the first of each ref, by which the
released code selects checkpoints."""


@dataclass
class TrainBatch:
    """The input of a training step. Pixels stay bytes until they are on the training device.

    Attributes:
        images: (B/k, 3, S, S) uint8 RGB; the first k sentences belong to the first image, etc.
        tokens: (B, L) long.
        masks: (B, 1, S, S) uint8, 0 to 255, soft at the edges.
        skipped: Samples that were replaced by others.
    """

    images: Tensor
    tokens: Tensor
    masks: Tensor
    skipped: tuple[SkippedSample, ...] = ()

    def pin_memory(self) -> "TrainBatch":
        """Return the batch in memory from which a GPU copies without waiting."""
        return pin_tensors(self)


@dataclass
class EvaluationBatch:
    """The input of an evaluation step.

    Attributes:
        images: (P, 3, S, S) uint8 RGB.
        tokens: (B, L) long.
        image_indices: (B,) long, the number of each sentence's image.
        targets: B masks at their images' own sizes, (h, w) uint8, 0 or 1.
        samples: Numbers of the samples in their data set, ``NO_SAMPLE`` for one not counted.
    """

    images: Tensor
    tokens: Tensor
    image_indices: Tensor
    targets: list[Mask]
    samples: list[int]

    def pin_memory(self) -> "EvaluationBatch":
        """Return the batch in memory from which a GPU copies without waiting."""
        return pin_tensors(self)


Batch = TypeVar("Batch", TrainBatch, EvaluationBatch)


def pin_tensors(batch: Batch) -> Batch:
    """Return a batch with its tensors in page-locked memory."""
    pinned: Any = {k: x.pin_memory() for k, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, **pinned)


class ReferTrainSet(Dataset[TrainBatch]):
    """Refs of one split. Each visit draws one of a ref's sentences, by seed, epoch and ref only.

    Returns whole batches, so that pixels are written to their final place.

    Args:
        index: The data set.
        refs: Numbers of the refs.
        image_size: S, side of the square input.
        max_tokens: L, tokens per sentence.
        sentences_per_image: k. With 1, a sample is a ref, as in the paper. With more, it is an
            image with k of its refs, which share its encoding; if fewer are left, some are
            visited again.
        seed: Decides, with epoch and ref, which sentence is drawn.
        augmentation: Random changes of image, masks and sentences; None for none, as in the paper.
    """

    def __init__(
        self,
        index: ReferIndex,
        refs: Sequence[int],
        *,
        image_size: int,
        max_tokens: int,
        sentences_per_image: int = 1,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.index = index
        self.image_size, self.max_tokens = image_size, max_tokens
        self.sentences_per_image = sentences_per_image
        self.seed, self.augmentation = seed, augmentation
        # Refs grouped by image. A sample is (first row, last row + 1, its number) in its group.
        images = index.image_ids(np.asarray(refs, dtype=np.int64))
        order = np.argsort(images, kind="stable")
        self.refs = np.asarray(refs)[order]
        starts = np.flatnonzero(np.diff(images[order], prepend=-1))
        ends = np.append(starts[1:], len(order))
        self.samples = np.array(
            [
                (start, end, number)
                for start, end in zip(starts, ends, strict=True)
                for number in range(-(-(end - start) // sentences_per_image))
            ]
        ).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: TrainKey) -> TrainBatch:
        """Return the batch of one sample."""
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[TrainKey]) -> TrainBatch:
        """Return the batch of several samples.

        Raises:
            InputError: If an image cannot be read, or an augmentation changes the type of pixels.
        """
        # All samples' small steps come before the large ones: pixels evict everything from caches.
        drawn, mirrored, tokens = self.draw_words(keys)
        places = [
            (self.index.image_path(refs[0]), self.index.image_size(refs[0])) for refs in drawn
        ]
        files = [read_image_file(*place) for place in places]
        s = self.image_size
        squares = np.empty((len(keys), s, s, 3), dtype=np.uint8)
        masks = np.zeros((len(keys), self.sentences_per_image, s, s), dtype=np.uint8)
        if self.augmentation is None:
            drawn_refs = [ref for refs in drawn for ref in refs]
            for ref, mask in zip(drawn_refs, masks.reshape(-1, s, s), strict=True):
                letterbox_mask(255 * self.index.mask(ref), s, mask)
            for file, place, square in zip(files, places, squares, strict=True):
                letterbox_image(decode_pixels(file, *place), s, square)
        else:
            for i, (key, refs) in enumerate(zip(keys, drawn, strict=True)):
                squares[i], masks[i] = self.augmentation.apply(
                    decode_pixels(files[i], *places[i]),
                    np.stack([255 * self.index.mask(ref) for ref in refs]),
                    s,
                    mirrored[i],
                    self.sample_seed(key),
                )
        images = torch.from_numpy(squares).permute(0, 3, 1, 2)
        return TrainBatch(images, tokens, torch.from_numpy(masks.reshape(-1, 1, s, s)))

    def draw_words(self, keys: Sequence[TrainKey]) -> tuple[list[list[int]], list[bool], Tensor]:
        """Return each sample's k refs, whether it is mirrored, and all tokens, (B, L)."""
        drawn = [self.draw_refs(key) for key in keys]
        mirrored, sentences = [], []
        for key, refs in zip(keys, drawn, strict=True):
            rows = [self.draw_sentence(key.epoch, ref, visit) for visit, ref in enumerate(refs)]
            texts = [self.index.sentence(row) for row in rows]
            augment = self.augmentation
            changed = augment.mirror(texts, self.sample_seed(key)) if augment else None
            mirrored.append(changed is not None)
            sentences += changed or texts
        return drawn, mirrored, tokenize(sentences, self.max_tokens)

    def sample_seed(self, key: TrainKey) -> int:
        """Return the seed of a sample's augmentation, whatever was drawn before."""
        return int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0])

    def draw_refs(self, key: TrainKey) -> list[int]:
        """Return the k refs of a sample: its share of its image's refs, shuffled in every epoch."""
        start, end, number = self.samples[key.position]
        rng = np.random.default_rng([self.seed, key.epoch, int(self.refs[start]), 0])
        refs = rng.permutation(self.refs[start:end])
        first, k = number * self.sentences_per_image, self.sentences_per_image
        return [int(refs[i % len(refs)]) for i in range(first, first + k)]

    def draw_sentence(self, epoch: int, ref: int, visit: int) -> int:
        """Return the row of the sentence of a ref's visit in an epoch."""
        rng = np.random.default_rng([self.seed, epoch, ref, 1 + visit])
        return int(rng.choice(self.index.sentence_rows(ref)))

    def names(self, key: TrainKey) -> list[str]:
        """Return the names of a sample's sentences, for messages."""
        return [
            sentence_name(self.index, ref, self.draw_sentence(key.epoch, ref, visit))
            for visit, ref in enumerate(self.draw_refs(key))
        ]


def keep_batch(batch: TrainBatch) -> TrainBatch:
    """Return a batch as it is: nothing is left to collate."""
    return batch


class SkippingTrainSet(Dataset[TrainBatch]):
    """Wraps a training set and replaces samples that cannot be used by others.

    The replacement is the next usable sample of the epoch's order, after the last one the first.
    So a batch keeps its size, and depends on seed, epoch and position only.

    Args:
        data: The training set.
    """

    def __init__(self, data: ReferTrainSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: TrainKey) -> TrainBatch:
        """Return the batch of one sample, with the samples that it replaces.

        Raises:
            InputError: If no sample can be used.
        """
        return self._find(key)[1]

    def __getitems__(self, keys: Sequence[TrainKey]) -> TrainBatch:
        """Return the batch of several samples, see ``__getitem__``."""
        try:
            return self.data.__getitems__(keys)
        except InputError:
            batches = [self[key] for key in keys]
        return TrainBatch(
            images=torch.cat([batch.images for batch in batches]),
            tokens=torch.cat([batch.tokens for batch in batches]),
            masks=torch.cat([batch.masks for batch in batches]),
            skipped=tuple(sample for batch in batches for sample in batch.skipped),
        )

    def names(self, key: TrainKey) -> list[str]:
        """Return the names of the sentences of a sample or its replacement, for messages."""
        return self.data.names(self._find(key)[0])

    def _find(self, key: TrainKey) -> tuple[TrainKey, TrainBatch]:
        order = epoch_order(self.data.seed, key.epoch, len(self))
        start = int(np.flatnonzero(order == key.position)[0])
        skipped: list[SkippedSample] = []
        for position in np.roll(order, -start):
            other = TrainKey(key.epoch, int(position))
            try:
                return other, replace(self.data[other], skipped=tuple(skipped))
            except InputError as error:
                skipped += [
                    SkippedSample(f"ref {self.data.index.ref_id(ref)}", str(error))
                    for ref in dict.fromkeys(self.data.draw_refs(other))
                ]
        raise InputError(
            f"none of {len(self)} training samples can be used; {skipped[0].sample}: "
            f"{skipped[0].reason}"
        )


EvaluationSample = tuple[Image, Tensor, Mask, int]
"""Image (S, S, 3) uint8 RGB, tokens (L,), target (h, w) and the sample's number."""


class ReferEvaluationSet(Dataset[EvaluationSample]):
    """Sentences of one split with their targets; those of an image are consecutive.

    Args:
        index: The data set.
        refs: Numbers of the refs.
        image_size: S, side of the square input.
        max_tokens: L, tokens per sentence.
        protocol: Which sentences count.
        blind: The blind control: sentences are rotated among the described objects of each image,
            so that every sentence meets the target of another object. Images with a single
            described object are left out.
    """

    def __init__(
        self,
        index: ReferIndex,
        refs: Sequence[int],
        *,
        image_size: int,
        max_tokens: int,
        protocol: Protocol = "all_sentences",
        blind: bool = False,
    ) -> None:
        self.index = index
        self.image_size, self.max_tokens = image_size, max_tokens
        groups = group_by_image(index, refs)
        # The ref whose target each ref's sentences meet.
        targets = rotated_targets(groups) if blind else {ref: ref for g in groups for ref in g}
        sentences = slice(1) if protocol == "first_sentence" else slice(None)
        # One (ref of the target, row of the sentence) per sample.
        self.samples = np.array(
            [
                (target, row)
                for ref, target in targets.items()
                for row in index.sentence_rows(ref)[sentences]
            ]
        ).reshape(-1, 2)
        self._last: tuple[int, Image] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def image_ids(self) -> Ints:
        """The image's COCO id of each sample."""
        return self.index.image_ids(self.samples[:, 0])

    def __getitem__(self, number: int) -> EvaluationSample:
        """Return a sample; consecutive samples of an image share the very same array."""
        image_id = self.index.image_id(int(self.samples[number, 0]))
        if self._last is None or self._last[0] != image_id:
            self._last = (image_id, letterbox_image(self.image(number), self.image_size))
        tokens = tokenize([self.sentence(number)], self.max_tokens)[0]
        return self._last[1], tokens, self.target(number), number

    def image(self, number: int) -> Image:
        """Return a sample's image at its own size, (h, w, 3) uint8 RGB."""
        return read_image(self.index, int(self.samples[number, 0]))

    def target(self, number: int) -> Mask:
        """Return a sample's target, (h, w) uint8, 0 or 1."""
        return self.index.mask(int(self.samples[number, 0]))

    def sentence(self, number: int) -> str:
        """Return a sample's sentence."""
        return self.index.sentence(int(self.samples[number, 1]))

    def name(self, number: int) -> str:
        """Return a sample's name, for messages."""
        return sentence_name(self.index, *self.samples[number].tolist())

    @staticmethod
    def collate(samples: Sequence[EvaluationSample]) -> EvaluationBatch:
        """Stack samples, an image that several sentences share only once."""
        images, tokens, targets, numbers = zip(*samples, strict=True)
        is_new = [i == 0 or image is not images[i - 1] for i, image in enumerate(images)]
        return EvaluationBatch(
            images=stack_images([image for image, new in zip(images, is_new, strict=True) if new]),
            tokens=torch.stack(tokens),
            image_indices=torch.tensor(is_new).cumsum(0) - 1,
            targets=list(targets),
            samples=list(numbers),
        )


def group_by_image(index: ReferIndex, refs: Sequence[int]) -> list[list[int]]:
    """Return the refs of each image, images in the order of their first refs."""
    groups: dict[int, list[int]] = {}
    for ref in refs:
        groups.setdefault(index.image_id(int(ref)), []).append(int(ref))
    return list(groups.values())


def rotated_targets(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """Map each ref to the next one of its image, the last to the first; leave out single refs."""
    return {
        ref: group[(i + 1) % len(group)]
        for group in groups
        if len(group) > 1
        for i, ref in enumerate(group)
    }


def read_image(index: ReferIndex, ref: int) -> Image:
    """Read the image of a ref of an index, (H, W, 3) RGB on the pixel grid of its polygons.

    Raises:
        InputError: If it is missing, damaged, or not of the annotated size.
    """
    return decode_image(index.image_path(ref), index.image_size(ref))


def sentence_name(index: ReferIndex, ref: int, row: int) -> str:
    """Return a sentence's name, for messages."""
    return f"sentence {index.sentence_id(row)} of ref {index.ref_id(ref)}"
