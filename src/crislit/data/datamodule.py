"""Splits and loaders of one data set."""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from crislit.data.dataset import (
    Protocol,
    ReferEvaluationSet,
    ReferTrainSet,
    SkippingTrainSet,
    keep_batch,
)
from crislit.data.refer_annotations import Ints
from crislit.data.refer_cache import SkippedSample
from crislit.data.refer_index import ReferIndex
from crislit.data.samplers import ImageGroupedBatchSampler, TrainSampler, evaluation_share
from crislit.data.sources import DataSource
from crislit.data.workers import init_worker
from crislit.errors import InputError, check_integer, counted, printable, require, see
from crislit.transforms.augmentation import Augmentation

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
"""What happens to training samples that cannot be used."""


class ReferDataModule(L.LightningDataModule):
    """Serves one data set to any number of processes.

    Args:
        source: Where the data set comes from.
        max_tokens: L, tokens per sentence.
        image_size: S, side of the square input, a multiple of 32.
        batch_size: Sentences per optimizer step, over all processes and accumulated batches.
        batch_size_per_device: Sentences per training batch in one process; None divides
            ``batch_size`` evenly.
        eval_batch_size: Sentences per evaluation batch in one process.
        evaluation_splits: The splits to evaluate; None takes all but train.
        select_split: The split that validates during training and selects the best checkpoint.
        protocol: Which sentences are evaluated.
        sentences_per_image: k, refs of one image per training sample; they share its encoding.
            1 as in the paper.
        max_images: Keep only the first images of each split, by image id.
        workers: Processes that load data; None takes one per core, at most 4.
        seed: Decides the order of training and the choice of sentences.
        on_error: ``raise`` ends with an error where an image is missing or damaged, or a ref or a
            line of custom data is wrong. ``skip`` trains on other samples instead, also instead
            of those whose mask is empty. Evaluation never skips.
        augmentation: Random changes of training samples; None for none, as in the paper.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        max_tokens: int = 17,
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
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        check_integer("image_size", image_size, 32, multiple_of=32)
        check_integer("seed", seed, 0, maximum=2**32 - 1)  # NumPy's limit
        required = {
            "dataset.max_words": (max_tokens, 3),
            "dataset.sentences_per_image": (sentences_per_image, 1),
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
        }
        optional = {
            "workers": (workers, 0),
            "batch_size_per_device": (batch_size_per_device, 1),
            "dataset.max_images": (max_images, 1),
        }
        for name, (value, minimum) in (required | optional).items():
            if value is not None or name in required:
                check_integer(name, value, minimum)
        require(
            batch_size % sentences_per_image == 0,
            f"batch_size={batch_size} must be a multiple of "
            f"dataset.sentences_per_image={sentences_per_image}, which train on one image",
        )
        for name, choice, options in (
            ("dataset.on_error", on_error, get_args(OnError)),
            ("protocol", protocol, get_args(Protocol)),
        ):
            require(choice in options, f"{name} must be {' or '.join(options)}, got {choice!r}")
        require(
            isinstance(select_split, str),
            f"dataset.select_split must be a name, got {select_split!r:.200}",
        )
        listed = [] if evaluation_splits is None else evaluation_splits
        require(
            not isinstance(listed, str) and all(isinstance(split, str) for split in listed),
            "dataset.evaluation_splits must be a list of names, such as [val], "
            f"got {evaluation_splits!r:.200}",
        )
        self.source = source
        self.image_size, self.max_tokens = image_size, max_tokens
        self.batch_size, self.batch_size_per_device = batch_size, batch_size_per_device
        self.eval_batch_size = eval_batch_size
        self.evaluation_splits, self.select_split = list(listed), select_split
        self.blind_splits: list[str] = []
        self.protocol = protocol
        self.sentences_per_image, self.max_images = sentences_per_image, max_images
        self.workers = min(torch.multiprocessing.cpu_count(), 4) if workers is None else workers
        self.seed = seed
        self.on_error = on_error
        self.augmentation = augmentation

    # -- The data set

    def prepare_data(self) -> None:
        """Write and index the data set: in one process, before the others read it."""
        self.index  # noqa: B018

    @functools.cached_property
    def index(self) -> ReferIndex:
        """The data set's index."""
        evaluates_train = "train" in (*self.evaluation_splits, self.select_split)
        return self.source.open(self.on_error == "skip" and not evaluates_train)

    def setup(self, stage: str) -> None:
        """Check that the splits of a stage exist and their images are there.

        Raises:
            InputError: If a split or an image is missing, or training has not one whole batch.
        """
        evaluated = dict.fromkeys([*self.splits, self.select_split])
        for split in dict.fromkeys([*evaluated, "train"]) if stage == "fit" else self.splits:
            try:
                self.index.check_images(self.split_refs(split))
            except InputError as error:
                if self.on_error == "raise" or split in evaluated:
                    raise
                log.warning(
                    "%s; training without them (dataset.on_error=skip)", printable(str(error))
                )
        if stage == "fit":
            self._check_training()

    def _check_training(self) -> None:
        empty = self.index.without_pixels(self.split_refs("train"))
        if len(empty) and self.on_error == "raise":
            ids = ", ".join(str(self.index.ref_id(int(ref))) for ref in empty[:20])
            ids += ", ..." if len(empty) > 20 else ""
            refs = counted(len(empty), "ref")
            log.warning("training on %s whose mask is empty: ref_id %s", refs, ids)
        sentences = len(self.train_set()) * self.sentences_per_image
        require(
            sentences >= self.batch_size,
            f"no training batch: an epoch of the train split has {counted(sentences, 'sentence')}, "
            f"fewer than batch_size={self.batch_size}. Set batch_size={sentences} or smaller"
            f"{see('no-batch')}",
        )

    @property
    def splits(self) -> list[str]:
        """The splits to evaluate, in the order of the result table."""
        splits = self.evaluation_splits or [s for s in self.index.splits if s != "train"]
        if not splits:
            raise InputError(
                f"{self.source.name} has no split to evaluate, only {', '.join(self.index.splits)}"
            )
        return splits

    def split_refs(self, split: str) -> Ints:
        """Return the refs of a split, only those of its first ``max_images`` images if set."""
        refs = self.index.split_refs(split)
        if self.max_images is None:
            return refs
        images = self.index.image_ids(refs)
        return refs[np.isin(images, np.unique(images)[: self.max_images])]

    # -- Training

    def accumulation(self, processes: int) -> int:
        """Return how many batches make one optimizer step.

        Raises:
            InputError: If ``batch_size`` does not divide evenly over processes and batches, or
                leaves one sample per batch.
        """
        per_device = self.batch_size_per_device or self.batch_size // processes
        steps, rest = divmod(self.batch_size, per_device * processes) if per_device else (0, 1)
        limits = {
            "batch_size_per_device": self.batch_size_per_device,
            "dataset.sentences_per_image": self.sentences_per_image,
        }
        given = " and ".join(f"{name}={value}" for name, value in limits.items() if value)
        require(
            steps > 0 and rest == 0 and per_device % self.sentences_per_image == 0,
            f"batch_size={self.batch_size} does not divide over {counted(processes, 'device')} "
            f"with {given}{see('fewer-gpus')}",
        )
        require(
            per_device > 1,
            "a training batch of one sample per device is too small: BatchNorm needs two. Set "
            f"batch_size to at least {2 * processes}, or batch_size_per_device to 2 or more"
            f"{see('batchnorm')}",
        )
        require(
            per_device > self.sentences_per_image or self.image_size > 32,
            "one image of 32 pixels per device is too little for BatchNorm: raise image_size "
            f"or batch_size{see('batchnorm')}",
        )
        return steps

    def train_dataloader(self) -> DataLoader[Any]:
        """Serve every ref once per epoch, in an order that seed and epoch decide.

        A resumed epoch continues where it was interrupted.
        """
        rank, processes = self._rank()
        data, k = self.train_set(), self.sentences_per_image
        per_device = self.batch_size // (processes * self.accumulation(processes)) // k
        sampler = TrainSampler(
            len(data), self.batch_size // k, per_device, rank, processes, self.seed
        )
        if self.trainer is not None:
            sampler.start_at(self.trainer.current_epoch, completed_batches(self.trainer))
        served = SkippingTrainSet(data) if self.on_error == "skip" else data
        return self._loader(served, keep_batch, sampler=sampler, batch_size=per_device)

    def train_set(self) -> ReferTrainSet:
        """Return the training samples, with ``on_error=skip`` without those of empty masks."""
        refs = self.split_refs("train")
        if self.on_error == "skip":
            refs = np.setdiff1d(refs, self.index.without_pixels(refs))
        return ReferTrainSet(
            self.index,
            refs.tolist(),
            image_size=self.image_size,
            max_tokens=self.max_tokens,
            sentences_per_image=self.sentences_per_image,
            seed=self.seed,
            augmentation=self.augmentation,
        )

    def never_usable(self) -> list[SkippedSample]:
        """Return the training samples that ``on_error=skip`` leaves out from the start."""
        empty = self.index.without_pixels(self.split_refs("train"))
        names = [f"ref {self.index.ref_id(int(ref))}" for ref in empty]
        return self.index.skipped + [SkippedSample(name, "its mask is empty") for name in names]

    # -- Evaluation

    def val_dataloader(self) -> DataLoader[Any]:
        """Serve every sentence of the selecting split, once over all processes."""
        return self.evaluation_loader(self.select_split)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per split to evaluate, then one per blind control."""
        return [
            *(self.evaluation_loader(split) for split in self.splits),
            *(self.evaluation_loader(split, blind=True) for split in self.blind_splits),
        ]

    def evaluation_loader(self, split: str, blind: bool = False) -> DataLoader[Any]:
        """Return the loader of a split, or of its blind control."""
        data = self.evaluation_set(split, blind)
        share = evaluation_share(len(data), *self._rank())
        batches = ImageGroupedBatchSampler(share, data.image_ids, self.eval_batch_size)
        return self._loader(data, ReferEvaluationSet.collate, batch_sampler=batches)

    def evaluation_set(self, split: str, blind: bool = False) -> ReferEvaluationSet:
        """Return the samples of a split, or of its blind control.

        Raises:
            InputError: If there are none.
        """
        data = ReferEvaluationSet(
            self.index,
            self.split_refs(split).tolist(),
            image_size=self.image_size,
            max_tokens=self.max_tokens,
            protocol=self.protocol,
            blind=blind,
        )
        require(len(data), f"split {split!r} of {self.source.name} has no sample to evaluate")
        return data

    # -- Loaders

    def _loader(self, data: Any, collate: Any, **batches: Any) -> DataLoader[Any]:
        # Starting a worker takes longer than loading 64 samples.
        workers = min(self.workers, max(len(data) // 64, 1)) if self.workers else 0
        return DataLoader(
            data,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=init_worker,
            persistent_workers=workers > 0 and "sampler" in batches,  # in training
            pin_memory=self._is_on_gpu(),
            # Forked workers share the index; Python 3.14 would send a copy to each.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            **batches,
        )

    def _is_on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def completed_batches(trainer: L.Trainer) -> int:
    """Return how many batches of the current epoch a resumed run has trained on already."""
    fit = trainer.fit_loop
    within_epoch = fit.epoch_progress.current.ready > trainer.current_epoch  # started, not finished
    return fit.epoch_loop.batch_progress.current.ready if within_epoch else 0
