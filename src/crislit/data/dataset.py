"""Samples for training (a ref and one of its sentences) and for evaluation (a sentence and its truth), and their batches."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import albumentations as A
import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from crislit.data.letterbox import Image, letterbox_image, letterbox_mask, stack_images
from crislit.data.refer import Mask, ReferIndex
from crislit.data.tokenizer import tokenize
from crislit.data.transform import Letterbox
from crislit.errors import InputError
from crislit.picture import open_file

Protocol = Literal["all_sentences", "first_sentence"]
"""Which sentences are evaluated: all, as the field does, or each ref's first, as the released code chose checkpoints."""


class Skip(NamedTuple):
    """A training sample that cannot be used, and why."""

    sample: str
    reason: str


@dataclass
class TrainBatch:
    """What a training step sees. Pixels stay bytes up to the device that computes: a quarter of what workers hand over.

    Attributes:
        images: (B/k, 3, S, S) uint8 RGB; the first k sentences are the first image's, and so on.
        tokens: (B, L) long.
        masks: (B, 1, S, S) uint8, 0 to 255, soft at the edges.
        skipped: Samples that others of the batch stand for.
    """

    images: Tensor
    tokens: Tensor
    masks: Tensor
    skipped: tuple[Skip, ...] = ()


NO_SAMPLE = -1
"""The number of an evaluation sample (the set's last) that a process computes and does not count."""


@dataclass
class EvaluationBatch:
    """What an evaluation step sees.

    Attributes:
        images: (P, 3, S, S) uint8 RGB; sentences that follow each other share theirs.
        tokens: (B, L) long.
        owners: (B,) long, the number of each sentence's image.
        truths: B masks at their pictures' own sizes, (h, w) uint8, 0 or 1.
        samples: Numbers of the samples in their data set, :data:`NO_SAMPLE` for one that does not count.
    """

    images: Tensor
    tokens: Tensor
    owners: Tensor
    truths: list[Mask]
    samples: list[int]


class TrainKey(NamedTuple):
    """What a sampler asks the training set for: in this epoch, the sample at this position."""

    epoch: int
    position: int


def epoch_order(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """Return the positions of all training samples in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


class ReferTrainSet(Dataset[TrainBatch]):
    """Refs of one split; each visit draws one of a ref's sentences, by seed, epoch and ref alone.

    It gives whole batches, as PyTorch's loader asks for them, so that pixels are written where they stay.

    Args:
        index: The data set.
        refs: Numbers of the refs.
        image_size: S, side of the square input.
        max_words: L, tokens of a sentence.
        sentences_per_image: k. With 1, a sample is a ref, as in the paper. With more, it is a picture with k of its refs,
            which share the picture's encoding; where a picture has fewer left, some are visited again.
        seed: Decides with epoch and ref which sentence is drawn.
        augmentations: Albumentations applied to picture and masks before the letterbox. None by default, as in the paper. A
            flip would have to swap "left" and "right" in the sentence.
    """

    def __init__(
        self,
        index: ReferIndex,
        refs: Sequence[int],
        *,
        image_size: int,
        max_words: int,
        sentences_per_image: int = 1,
        seed: int = 0,
        augmentations: Sequence[A.BasicTransform] = (),
    ) -> None:
        self.index = index
        self.max_words = max_words
        self.sentences_per_image = sentences_per_image
        self.seed = seed
        self.image_size = image_size
        # Without augmentations Albumentations would add nothing but its own time.
        self.transform = A.Compose([*augmentations, Letterbox(image_size)]) if augmentations else None
        # The refs of one picture follow each other; a sample is (its picture's first and last row here, its number there).
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
        """Return the batch of some samples.

        Raises:
            InputError: If a picture cannot be read, or an augmentation makes numbers of another kind.
        """
        # Small steps of all samples before large ones: pixels drive all else out of the processor's caches.
        drawn, tokens = self.draw_words(keys)
        photographs = [(self.index.image_path(refs[0]), self.index.image_size(refs[0])) for refs in drawn]
        files = [read_file(path, size) for path, size in photographs]
        s = self.image_size
        squares = np.empty((len(keys), s, s, 3), dtype=np.uint8)
        masks = np.zeros((len(keys), self.sentences_per_image, s, s), dtype=np.uint8)
        if self.transform is None:
            for refs, some in zip(drawn, masks, strict=True):
                for ref, place in zip(refs, some, strict=True):
                    letterbox_mask(255 * self.index.mask(ref), s, place)
            for file, photograph, square in zip(files, photographs, squares, strict=True):
                letterbox_image(decode(file, *photograph), s, square)
        else:
            for i, (key, refs) in enumerate(zip(keys, drawn, strict=True)):
                squares[i], masks[i] = self.augment(key, refs, decode(files[i], *photographs[i]))
        return TrainBatch(torch.from_numpy(squares).permute(0, 3, 1, 2), tokens, torch.from_numpy(masks.reshape(-1, 1, s, s)))

    def draw_words(self, keys: Sequence[TrainKey]) -> tuple[list[list[int]], Tensor]:
        """Return each sample's k refs, and the tokens of a sentence of each, (B, L)."""
        drawn = [self.draw_refs(key) for key in keys]
        sentences = [
            self.index.sentence(self.draw_sentence(key.epoch, ref, visit))
            for key, refs in zip(keys, drawn, strict=True)
            for visit, ref in enumerate(refs)
        ]
        return drawn, tokenize(sentences, self.max_words)

    def augment(self, key: TrainKey, refs: Sequence[int], image: Image) -> tuple[Image, npt.NDArray[np.uint8]]:
        """Return a sample's picture, (S, S, 3) uint8 RGB, and masks, (k, S, S) uint8, 0 to 255, after the augmentations."""
        assert self.transform is not None
        # By the sample's own seed, not by what was drawn before.
        self.transform.set_random_seed(int(np.random.SeedSequence([self.seed, *key]).generate_state(1)[0]))
        warped = self.transform(image=image, masks=np.stack([255 * self.index.mask(ref) for ref in refs]))
        image, masks = warped["image"], warped["masks"]
        if image.dtype != np.uint8 or masks.dtype != np.uint8:
            raise InputError(f"augmentations must leave uint8, and made {image.dtype} and {masks.dtype}")
        return image, masks

    def draw_refs(self, key: TrainKey) -> list[int]:
        """Return the k refs of a sample: the epoch's share of its picture's refs, in an order of the epoch's own."""
        start, end, number = self.samples[key.position]
        refs = np.random.default_rng([self.seed, key.epoch, int(self.refs[start]), 0]).permutation(self.refs[start:end])
        first, k = number * self.sentences_per_image, self.sentences_per_image
        return [int(refs[i % len(refs)]) for i in range(first, first + k)]

    def draw_sentence(self, epoch: int, ref: int, visit: int) -> int:
        """Return the row of the sentence of a ref's visit in an epoch."""
        rng = np.random.default_rng([self.seed, epoch, ref, 1 + visit])
        return int(rng.choice(self.index.sentence_rows(ref)))

    def names(self, key: TrainKey) -> list[str]:
        """Return how a message should call the sentences of a sample."""
        rows = [(ref, self.draw_sentence(key.epoch, ref, visit)) for visit, ref in enumerate(self.draw_refs(key))]
        return [f"sentence {self.index.sentence_id(row)} of ref {self.index.ref_id(ref)}" for ref, row in rows]


def whole(batch: TrainBatch) -> TrainBatch:
    """Return a batch as it is: there is nothing to collate."""
    return batch


class SkippingTrainSet(Dataset[TrainBatch]):
    """A training set that stands for its samples that cannot be used with others.

    In the place of such a sample is the next one of the epoch's order that can be used, and behind the last the first. So a
    batch keeps its size, and what is in it depends on seed, epoch and position alone, as it does without.

    Args:
        data: The training set.
    """

    def __init__(self, data: ReferTrainSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: TrainKey) -> TrainBatch:
        """Return the batch of one sample, and in it the samples that it stands for if they are not itself.

        Raises:
            InputError: If no sample can be used.
        """
        return self._find(key)[1]

    def __getitems__(self, keys: Sequence[TrainKey]) -> TrainBatch:
        """Return the batch of some samples, see :meth:`__getitem__`."""
        try:
            return self.data.__getitems__(keys)
        except InputError:
            alone = [self[key] for key in keys]
        images, tokens, masks = (torch.cat([getattr(one, name) for one in alone]) for name in ("images", "tokens", "masks"))
        return TrainBatch(images, tokens, masks, tuple(skip for one in alone for skip in one.skipped))

    def names(self, key: TrainKey) -> list[str]:
        """Return how a message should call the sentences of a sample, or of the one in its place."""
        return self.data.names(self._find(key)[0])

    def _find(self, key: TrainKey) -> tuple[TrainKey, TrainBatch]:
        try:
            return key, self.data[key]
        except InputError as error:
            skipped = self.skip(key, error)
        order = epoch_order(self.data.seed, key.epoch, len(self))
        start = int(np.flatnonzero(order == key.position)[0])
        for position in np.roll(order, -start)[1:]:
            other = TrainKey(key.epoch, int(position))
            try:
                return other, replace(self.data[other], skipped=tuple(skipped))
            except InputError as error:
                skipped += self.skip(other, error)
        raise InputError(f"none of {len(self)} training samples can be used; {skipped[0].sample}: {skipped[0].reason}")

    def skip(self, key: TrainKey, error: InputError) -> list[Skip]:
        """Return what a list shall say of a sample that cannot be used."""
        return [Skip(f"ref {self.data.index.ref_id(ref)}", str(error)) for ref in dict.fromkeys(self.data.draw_refs(key))]


EvaluationSample = tuple[Image, Tensor, Mask, int]
"""Image (S, S, 3) uint8 RGB, tokens (L,), truth (h, w) and the sample's number."""


class ReferEvaluationSet(Dataset[EvaluationSample]):
    """Sentences of one split, each with the truth at its picture's own size; those of a picture follow each other.

    Args:
        index: The data set.
        refs: Numbers of the refs.
        image_size: S, side of the square input.
        max_words: L, tokens of a sentence.
        protocol: Which sentences count.
        blind: The blind control: the sentences change places among the described objects of each picture, so that every
            sentence meets the truth of another object. Pictures with a single described object are left out.
    """

    def __init__(
        self,
        index: ReferIndex,
        refs: Sequence[int],
        *,
        image_size: int,
        max_words: int,
        protocol: Protocol = "all_sentences",
        blind: bool = False,
    ) -> None:
        self.index = index
        self.image_size = image_size
        self.max_words = max_words
        pictures = by_picture(index, refs)
        truths = neighbours(pictures) if blind else {ref: ref for group in pictures for ref in group}
        rows = slice(1) if protocol == "first_sentence" else slice(None)
        # One (ref of the truth, row of the sentence) a sample.
        self.samples = np.array(
            [(truth, row) for ref, truth in truths.items() for row in index.sentence_rows(ref)[rows]]
        ).reshape(-1, 2)
        self.last: tuple[int, Image] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def pictures(self) -> npt.NDArray[np.int64]:
        """The picture's id of each sample."""
        return self.index.image_ids(self.samples[:, 0])

    def __getitem__(self, number: int) -> EvaluationSample:
        """Return a sample; its image is the very array of the sample before, where both are of one picture."""
        picture = self.index.image_id(int(self.samples[number, 0]))
        if self.last is None or self.last[0] != picture:
            self.last = (picture, letterbox_image(self.picture(number), self.image_size))
        tokens = tokenize([self.sentence(number)], self.max_words)[0]
        return self.last[1], tokens, self.truth(number), number

    def picture(self, number: int) -> Image:
        """Return a sample's picture as it is on disk, (h, w, 3) uint8 RGB."""
        return read_image(self.index, int(self.samples[number, 0]))

    def truth(self, number: int) -> Mask:
        """Return a sample's truth, (h, w) uint8, 0 or 1."""
        return self.index.mask(int(self.samples[number, 0]))

    def sentence(self, number: int) -> str:
        """Return a sample's sentence."""
        return self.index.sentence(int(self.samples[number, 1]))

    def name(self, number: int) -> str:
        """Return how a message should call a sample."""
        ref, row = self.samples[number]
        return f"sentence {self.index.sentence_id(row)} of ref {self.index.ref_id(ref)}"

    @staticmethod
    def collate(samples: Sequence[EvaluationSample]) -> EvaluationBatch:
        """Stack what can be stacked, a picture that several sentences share once."""
        images, tokens, truths, numbers = zip(*samples, strict=True)
        starts = torch.tensor([i == 0 or image is not images[i - 1] for i, image in enumerate(images)])
        pictures = stack_images([image for image, start in zip(images, starts, strict=True) if start])
        return EvaluationBatch(pictures, torch.stack(tokens), starts.cumsum(0) - 1, list(truths), list(numbers))


def by_picture(index: ReferIndex, refs: Sequence[int]) -> list[list[int]]:
    """Return the refs of each picture, pictures in the order of their first refs."""
    pictures: dict[int, list[int]] = {}
    for ref in refs:
        pictures.setdefault(index.image_id(int(ref)), []).append(int(ref))
    return list(pictures.values())


def neighbours(pictures: Sequence[Sequence[int]]) -> dict[int, int]:
    """Map each ref to the next one of its picture, the last to the first; refs alone in theirs are left out."""
    return {ref: group[(i + 1) % len(group)] for group in pictures if len(group) > 1 for i, ref in enumerate(group)}


def read_image(index: ReferIndex, ref: int) -> Image:
    """Read a ref's photograph as RGB, greyscale included, on the raw pixel grid that its polygons were drawn on.

    Raises:
        InputError: If it is missing, damaged, or not of the annotated size.
    """
    return decode_image(index.image_path(ref), index.image_size(ref))


def decode_image(path: Path, size: tuple[int, int]) -> Image:
    """Read a photograph of this (height, width), see :func:`read_image`."""
    return decode(read_file(path, size), path, size)


def read_file(path: Path, size: tuple[int, int]) -> bytes:
    """Read a photograph's file, if by its head and end it is a whole one of this (height, width).

    Raises:
        InputError: If it is not.
    """
    if not path.is_file():
        raise InputError(f"image {path} is {'no file' if path.exists() else 'missing'}; fetch it again")
    try:
        content = path.read_bytes()
        with open_file(io.BytesIO(content)) as picture:  # its head, before memory is taken for the pixels that it speaks of
            width, height = picture.size
            cut = picture.format in ("JPEG", "MPO") and not has_end(content)
    except InputError:
        raise
    except Exception as error:  # PIL's readers raise whatever damaged bytes lead them to
        raise InputError(f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG") from error
    if (height, width) != size:
        raise InputError(f"image {path} has {(height, width)} pixels (height, width), its annotation {size}")
    if cut:
        raise InputError(f"image {path} is cut off; fetch it again, or save it as PNG or JPEG")
    return content


def decode(content: bytes, path: Path, size: tuple[int, int]) -> Image:
    """Decode what :func:`read_file` has read: (h, w, 3) uint8 RGB.

    Raises:
        InputError: If it is damaged.
    """
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except Exception as error:  # OpenCV's readers raise whatever damaged bytes lead them to
        raise InputError(f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG") from error
    if image is None or image.shape[:2] != size:
        raise InputError(f"image {path} is {DAMAGED}; fetch it again, or save it as PNG or JPEG")
    return image  # type: ignore[return-value]


DAMAGED = "damaged, or of a kind that cannot be read"


def has_end(jpeg: bytes) -> bool:
    """Whether a JPEG's pixels are followed by its end marker; OpenCV fills up with grey what a picture that is cut off lacks.

    A file that is damaged within its pixels cannot be told from a sound one: JPEG has no checksum.
    """
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] != b"\xda":  # a segment, thumbnails' included
        fill = jpeg[place + 1 : place + 2] == b"\xff"
        place += 1 if fill else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg.rfind(b"\xff\xd9", place) >= 0  # from the end, where it usually is
