"""Splits, samplers and loaders of one data set."""

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from crislit.data import custom, shapes
from crislit.data.dataset import (
    NO_SAMPLE,
    Protocol,
    ReferEvaluationSet,
    ReferTrainSet,
    Skip,
    SkippingTrainSet,
    TrainBatch,
    TrainKey,
    epoch_order,
    whole,
)
from crislit.data.refer import Ints, ReferIndex
from crislit.data.workers import worker_init
from crislit.errors import InputError, check_whole, printable

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
"""What becomes of training samples that cannot be used."""


class ReferDataModule(L.LightningDataModule):
    """Serves one data set in the REFER layout, embedded ones included, to any number of processes.

    Args:
        root: The data root; an embedded set is written below it when first used.
        folder: The set's folder, ``refcoco``, or its name if it is embedded; None for one's own data.
        refs: Its refs file, ``refs(unc).p``.
        file: One's own data: a JSON-lines file, or a COCO instances file; see :mod:`crislit.data.custom`.
        sentences: The table of sentences that a COCO instances file needs.
        images: Where its pictures are, if not beside it.
        embedded: Whether the set is an embedded one.
        max_words: L, tokens of a sentence.
        image_size: S, side of the square input, a multiple of 32.
        batch_size: Samples of one optimizer step, over all processes and accumulated batches.
        batch_size_per_device: Samples of one training batch in one process; None divides ``batch_size`` evenly.
        eval_batch_size: Samples of one evaluation batch in one process.
        evaluation_splits: The splits to evaluate; None takes all but train.
        select_split: The split that validates during training and selects the best checkpoint.
        protocol: Which sentences are evaluated.
        sentences_per_image: k, refs of one picture that a training sample holds; they share its encoding. 1 as in the paper.
        max_images: Keep only the first images of each split, by image id.
        workers: Processes that load data; None takes one a core, at most 4.
        seed: Order of training and choice of sentences.
        on_error: What becomes of training samples that cannot be used: ``raise`` ends with an error where a picture is missing
            or damaged, or a ref or a line of one's own data is wrong; ``skip`` trains on others in their place, and in that of
            samples whose mask has no pixel. Evaluation never skips.

    Raises:
        InputError: If a size or number makes no sense.
    """

    def __init__(
        self,
        *,
        root: Path,
        folder: str | None = None,
        refs: str | None = None,
        file: str | None = None,
        sentences: str | None = None,
        images: str | None = None,
        embedded: bool = False,
        max_words: int = 17,
        image_size: int = 416,
        batch_size: int = 64,
        batch_size_per_device: int | None = None,
        eval_batch_size: int = 16,
        evaluation_splits: Sequence[str] | None = None,
        select_split: str = "val",
        protocol: Protocol = "all_sentences",
        sentences_per_image: int = 1,
        max_images: int | None = None,
        workers: int | None = None,
        seed: int = 0,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise InputError(f"dataset.on_error must be raise or skip, got {on_error!r}")
        texts = {
            "folder": folder,
            "refs": refs,
            "file": file,
            "sentences": sentences,
            "images": images,
            "select_split": select_split,
        }
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise InputError(f"dataset.{name} must be a text, got {text!r:.200}")
        check_whole("image_size", image_size, 32, multiple_of=32)
        check_whole("dataset.sentences_per_image", sentences_per_image, 1)
        check_whole("batch_size", batch_size, 1)
        if batch_size % sentences_per_image:
            raise InputError(
                f"batch_size={batch_size} must be a multiple of dataset.sentences_per_image={sentences_per_image}, "
                "the sentences that train together on one picture"
            )
        check_whole("eval_batch_size", eval_batch_size, 1)
        check_whole("dataset.max_words", max_words, 3)
        check_whole("workers", 0 if workers is None else workers, 0)
        for name, number in (("batch_size_per_device", batch_size_per_device), ("dataset.max_images", max_images)):
            if number is not None:
                check_whole(name, number, 1)
        if protocol not in ("all_sentences", "first_sentence"):
            raise InputError(f"protocol must be all_sentences or first_sentence, got {protocol!r}")
        if (file is None) == (folder is None) or (folder is None) != (refs is None):
            raise InputError("expected either dataset.file (your own data), or dataset.folder and dataset.refs")
        self.root, self.folder, self.refs_file, self.embedded = root, folder, refs, embedded
        self.file, self.sentences_file, self.images = file, sentences, images
        self.image_size, self.max_words = image_size, max_words
        self.batch_size, self.batch_size_per_device = batch_size, batch_size_per_device
        self.eval_batch_size = eval_batch_size
        if evaluation_splits is not None and (
            isinstance(evaluation_splits, str) or not all(isinstance(split, str) for split in evaluation_splits)
        ):
            raise InputError(
                f"dataset.evaluation_splits must be a list of names, such as [val], got {evaluation_splits!r:.200}"
            )
        self.evaluation_splits = list(evaluation_splits) if evaluation_splits is not None else None
        self.select_split = select_split
        self.blind_splits: list[str] = []
        self.protocol = protocol
        self.sentences_per_image = sentences_per_image
        self.max_images = max_images
        self.workers = min(torch.multiprocessing.cpu_count(), 4) if workers is None else workers
        self.seed = seed
        self.on_error = on_error
        self.unusable: list[Skip] = []
        self._index: ReferIndex | None = None

    # -- What is on disk

    def prepare_data(self) -> None:
        """Write an embedded set, and index the annotations: in one process, before the others read."""
        self.index  # noqa: B018

    @property
    def index(self) -> ReferIndex:
        """The data set."""
        if self._index is None:
            skip = self.on_error == "skip" and "train" not in [*(self.evaluation_splits or []), self.select_split]
            if self.file is not None:
                self._index, self.unusable = open_own(self.file, self.sentences_file, self.images, skip)
                return self._index
            assert self.folder is not None
            assert self.refs_file is not None
            root = shapes.write(self.root, self.folder) if self.embedded else self.root
            skipped: list[tuple[str, str]] | None = [] if skip else None
            self._index = ReferIndex.open(root, self.folder, self.refs_file, skipped)
            self.unusable = list(itertools.starmap(Skip, skipped or []))
        return self._index

    @property
    def place(self) -> str:
        """How messages call the data set."""
        return str(self.folder or self.file)

    def setup(self, stage: str) -> None:
        """Check that the splits of a stage exist and their images are there.

        Raises:
            InputError: If a split or an image is missing, or there is not one whole training batch.
        """
        splits = [*self.splits, "train", self.select_split] if stage == "fit" else self.splits
        evaluated = [*self.splits, self.select_split]
        for split in dict.fromkeys(splits):
            try:
                self.index.check_images(self.refs_of(split))
            except InputError as error:
                if self.on_error == "raise" or split in evaluated:
                    raise
                log.warning("%s; training goes on without them (dataset.on_error=skip)", printable(str(error)))
        if stage == "fit":
            empty = self.index.without_pixels(self.refs_of("train"))
            if len(empty) and self.on_error == "raise":
                told = ", ".join(str(self.index.ref_id(int(ref))) for ref in empty[:20]) + (", ..." if len(empty) > 20 else "")
                log.warning("training on %d refs whose mask has no pixel: ref_id %s", len(empty), told)
            sentences = len(self.train_set()) * self.sentences_per_image
            if sentences < self.batch_size:
                raise InputError(
                    f"no training batch: an epoch of the train split has {sentences} sentences, fewer than "
                    f"batch_size={self.batch_size}. Set batch_size={sentences} or smaller"
                )

    @property
    def splits(self) -> list[str]:
        """The splits to evaluate, in the order of the result table."""
        splits = self.evaluation_splits or [split for split in self.index.splits if split != "train"]
        if not splits:
            raise InputError(f"{self.place} has no split to evaluate, only {', '.join(self.index.splits)}")
        return splits

    def refs_of(self, split: str) -> Ints:
        """Return the refs of a split, those of its first images if so asked."""
        refs = self.index.refs_of(split)
        if self.max_images is None:
            return refs
        images = self.index.image_ids(refs)
        return refs[np.isin(images, np.unique(images)[: self.max_images])]

    # -- Loaders

    def accumulation(self, processes: int) -> int:
        """Return how many batches make one optimizer step.

        Raises:
            InputError: If ``batch_size`` does not divide evenly over the processes and batches, or leaves one sample each.
        """
        per_device = self.batch_size_per_device or self.batch_size // processes
        steps, rest = divmod(self.batch_size, per_device * processes) if per_device else (0, 1)
        if rest or not steps or per_device % self.sentences_per_image:
            raise InputError(
                f"batch_size={self.batch_size} does not divide over {processes} devices"
                + (f" with batch_size_per_device={self.batch_size_per_device}" if self.batch_size_per_device else "")
                + (f" with {self.sentences_per_image} sentences an image" if self.sentences_per_image > 1 else "")
            )
        if per_device == 1:
            raise InputError(
                "a training batch of one sample per device is too small: BatchNorm needs at least two. "
                f"Set batch_size to at least {2 * processes}, or batch_size_per_device to 2 or more"
            )
        if per_device == self.sentences_per_image and self.image_size == 32:
            raise InputError("one picture of 32 pixels per device is too little for BatchNorm: raise image_size or batch_size")
        return steps

    def train_dataloader(self) -> DataLoader[Any]:
        """Every ref once an epoch, in an order that seed and epoch decide; a resumed epoch goes on where it was."""
        rank, processes = self._place()
        data, k = self.train_set(), self.sentences_per_image
        per_device = self.batch_size // (processes * self.accumulation(processes))
        sampler = TrainSampler(len(data), self.batch_size // k, per_device // k, rank, processes, self.seed)
        if self.trainer is not None:
            sampler.go_on(self.trainer.current_epoch, batches_done(self.trainer))
        served = SkippingTrainSet(data) if self.on_error == "skip" else data
        return self._loader(served, whole, sampler=sampler, batch_size=per_device // k)

    def train_set(self) -> ReferTrainSet:
        """Return the training samples; with ``on_error=skip`` without those whose mask has no pixel."""
        refs = self.refs_of("train")
        return ReferTrainSet(
            self.index,
            (refs if self.on_error == "raise" else np.setdiff1d(refs, self.index.without_pixels(refs))).tolist(),
            image_size=self.image_size,
            max_words=self.max_words,
            sentences_per_image=self.sentences_per_image,
            seed=self.seed,
        )

    def never_usable(self) -> list[Skip]:
        """Return the training samples that ``on_error=skip`` left out before training began."""
        empty = self.index.without_pixels(self.refs_of("train"))
        return [*self.unusable, *(Skip(f"ref {self.index.ref_id(int(ref))}", "its mask has no pixel") for ref in empty)]

    def val_dataloader(self) -> DataLoader[Any]:
        """Every sentence of the selecting split, once over all processes."""
        return self.evaluation_loader(self.select_split)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each split to evaluate, then one for each blind control."""
        blind = [self.evaluation_loader(split, blind=True) for split in self.blind_splits]
        return [self.evaluation_loader(split) for split in self.splits] + blind

    def evaluation_loader(self, split: str, blind: bool = False) -> DataLoader[Any]:
        """Return the loader of a split, or of its blind control."""
        data = self.evaluation_set(split, blind)
        rank, processes = self._place()
        share = evaluation_share(len(data), rank, processes)
        batches = WholePictures(share, data.pictures, self.eval_batch_size)
        return self._loader(data, ReferEvaluationSet.collate, batch_sampler=batches)

    def evaluation_set(self, split: str, blind: bool = False) -> ReferEvaluationSet:
        """Return the samples of a split.

        Raises:
            InputError: If it has none.
        """
        data = ReferEvaluationSet(
            self.index,
            self.refs_of(split).tolist(),
            image_size=self.image_size,
            max_words=self.max_words,
            protocol=self.protocol,
            blind=blind,
        )
        if not len(data):
            raise InputError(f"split {split!r} of {self.place} has no sample to evaluate")
        return data

    def _loader(self, data: Any, collate: Any, **batches: Any) -> DataLoader[Any]:
        workers = min(self.workers, max(len(data) // 64, 1)) if self.workers else 0  # a worker costs more than 64 samples
        return DataLoader(
            data,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=worker_init,
            persistent_workers=workers > 0 and "sampler" in batches,  # in training
            # Workers share the index; Python 3.14 would send a copy to each.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            **batches,
        )

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def batches_done(trainer: L.Trainer) -> int:
    """Return how many batches of the current epoch a process has trained on already, in a resumed run that began within it."""
    fit = trainer.fit_loop
    within = fit.epoch_progress.current.ready > trainer.current_epoch  # as many as were begun were not ended
    return fit.epoch_loop.batch_progress.current.ready if within else 0


def open_own(file: str, sentences: str | None, images: str | None, skip: bool) -> tuple[ReferIndex, list[Skip]]:
    """Open somebody's own data, and return with it the lines of the train split that were skipped, if they may be.

    Raises:
        InputError: If a file is missing, or a line cannot be used that may not be skipped.
    """
    data = custom.read(file, sentences, images)
    skipped = [problem for problem in data.problems if skip and problem.split == "train"]
    if problems := [problem for problem in data.problems if problem not in skipped]:
        first = "; ".join(f"line {problem.line}: {problem.reason[:250]}" for problem in problems[:3])
        raise InputError(
            f"{len(problems)} lines of {sentences or file} cannot serve: {first}. `python -m crislit.check_data` shows all"
        )
    index = ReferIndex.of(data.refs, data.instances, Path(file), data.folder)
    return index, [Skip(f"line {problem.line} of {sentences or file}", problem.reason) for problem in skipped]


class Skips(L.Callback):
    """Counts and lists the training samples that ``on_error=skip`` left out, over all workers and processes.

    Args:
        data: The data module.
    """

    def __init__(self, data: ReferDataModule) -> None:
        self.found = dict(data.never_usable())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        """Take down what a batch says."""
        self.found |= dict(batch.skipped)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was skipped until here, by every process."""
        self.gather(trainer)
        checkpoint["skipped"] = self.found

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what was skipped before."""
        self.found |= checkpoint.get("skipped", {})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what was skipped."""
        self.gather(trainer)
        if trainer.is_global_zero and self.found:
            told = "".join("\n  " + printable(f"{sample}: {reason}") for sample, reason in self.found.items())
            log.warning("%d training samples could not be used, and others stood for them:%s", len(self.found), told)

    def gather(self, trainer: L.Trainer) -> None:
        """Put together what all processes found; every one of them must call it."""
        if trainer.world_size > 1:
            parts: list[dict[str, str]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(parts, self.found)
            self.found = {sample: reason for part in parts for sample, reason in part.items()}
        self.found = dict(sorted(self.found.items()))


class TrainSampler(Sampler[TrainKey]):
    """One process's share of every optimizer step's batch, which is the same for any number of processes.

    The samples that do not fill a last whole batch are left out of the epoch.

    Args:
        size: Number of refs.
        batch_size: Samples of an optimizer step, in all.
        per_device: Samples of one batch of one process.
        rank: This process.
        processes: How many there are.
        seed: Decides with the epoch the order.
    """

    def __init__(self, size: int, batch_size: int, per_device: int, rank: int = 0, processes: int = 1, seed: int = 0) -> None:
        self.size, self.batch_size, self.per_device = size, batch_size, per_device
        self.rank, self.processes, self.seed = rank, processes, seed
        self.epoch = 0
        self.resumed, self.start = 0, 0

    def go_on(self, epoch: int, batches: int) -> None:
        """Leave out the first batches of an epoch, on which an earlier run has trained."""
        self.epoch = self.resumed = epoch
        self.start = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[TrainKey]:
        shares = self._shares()
        if self.epoch == self.resumed:
            shares = shares[self.start :]
        return (TrainKey(self.epoch, int(position)) for position in shares.flat)

    def keys(self, batch: int) -> list[TrainKey]:
        """Return what this process's batch of a number, counted from the epoch's first, holds."""
        return [TrainKey(self.epoch, int(position)) for position in self._shares()[batch]]

    def _shares(self) -> Ints:
        """Return this process's batches of the epoch, (batches, samples)."""
        order = epoch_order(self.seed, self.epoch, self.size)
        whole = order[: self.size // self.batch_size * self.batch_size]
        return whole.reshape(-1, self.processes, self.per_device)[:, self.rank]

    def __len__(self) -> int:
        return self.size // self.batch_size * (self.batch_size // self.processes)


def evaluation_share(size: int, rank: int = 0, processes: int = 1) -> Sequence[int]:
    """Return a process's own run of samples, none twice and none left out: shares may differ by one.

    Where there are fewer samples than processes, one without a sample is given :data:`NO_SAMPLE`: a process that had no batch
    would not take part in what the others do together at one.
    """
    return range(rank * size // processes, (rank + 1) * size // processes) or [NO_SAMPLE]


class WholePictures(Sampler[list[int]]):
    """Batches of evaluation samples in which no picture is divided, so that each is read and encoded once.

    Args:
        share: The samples, those of a picture after each other.
        pictures: The picture of every sample.
        most: How many samples a batch has at most; a picture that has more is divided.
    """

    def __init__(self, share: Iterable[int], pictures: Ints, most: int) -> None:
        self.batches: list[list[int]] = []
        for _, group in itertools.groupby(share, key=lambda sample: int(pictures[sample])):
            own = list(group)
            if self.batches and len(self.batches[-1]) + len(own) <= most:
                self.batches[-1] += own
            else:
                self.batches += [own[i : i + most] for i in range(0, len(own), most)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
