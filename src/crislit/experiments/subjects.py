"""Trained networks with the samples that figures show of them."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from crislit.checkpoints import Checkpoint, read_checkpoint
from crislit.data import ReferEvaluationSet
from crislit.errors import require
from crislit.models import CRIS
from crislit.training import CRISTask, build_data, require_trust_of_data

log = logging.getLogger(__name__)


class Subject:
    """A trained network with a split of its data set.

    Args:
        path: Its checkpoint.
        root: Folder of all data.
        split: Split of its data set.
        trust: Packages outside crislit whose classes it may have.

    Raises:
        InputError: If the checkpoint does not record its data set, or a file cannot be read.
    """

    def __init__(self, path: Path, root: str, split: str, trust: Sequence[str] = ()) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(path, trust)
        require(
            self.checkpoint.config,
            f"{path} does not say what data it was trained on: figures need checkpoints of "
            "crislit.train",
        )
        self.model: CRIS = self.checkpoint.build()
        self.task = CRISTask(self.model, threshold=self.checkpoint.threshold).eval()
        config = self.checkpoint.config | {"data_root": root, "workers": 0, "augment": None}
        require_trust_of_data(config["dataset"], trust, str(path))
        self.module = build_data(config)
        self.data: ReferEvaluationSet = self.module.evaluation_set(split)
        here = self.module.index.digest
        if self.trained_on not in ("", here):
            log.warning(
                "%s was trained on other sentences or masks (digest %s, here %s): the figure shows "
                "those that are here",
                *(path, self.trained_on, here),
            )

    @property
    def source(self) -> str:
        """The data set's name, and the folder or file that it is read from."""
        dataset = self.checkpoint.config["dataset"]
        names = ("name", "folder", "refs", "file")
        return " ".join(str(dataset[name]) for name in names if dataset.get(name))

    @property
    def trained_on(self) -> str:
        """The digest of the data that it was trained on; empty if its checkpoint has none."""
        return self.checkpoint.fingerprint.get("data", "")

    @property
    def title(self) -> str:
        """The network's name as in figure 4."""
        network = self.checkpoint.network
        layers = f"n = {network.decoder_layers}" if network.decoder_layers else ""
        if network.contrastive:
            return f"full, {layers}" if layers else "without decoder"
        return f"without contrastive, {layers}" if layers else "baseline"

    @torch.no_grad()
    def predictions(
        self, numbers: Sequence[int], batch_size: int = 16
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield samples' numbers with their probability maps, (h, w)."""
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        for chunk in tqdm(batches, self.title, leave=False, disable=None):
            batch = ReferEvaluationSet.collate([self.data[number] for number in chunk])
            yield from zip(chunk, self.task.predict_probabilities(batch), strict=True)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most ``count`` integers, evenly spaced from 0 to ``total - 1``."""
    return [int(number) for number in np.linspace(0, total - 1, min(count, total), dtype=int)]


def check_same_samples(subjects: Sequence[Subject]) -> None:
    """Check that a sample's number means the same sample for every network.

    Raises:
        InputError: If data set, protocol or choice of images differ.
    """
    first = subjects[0]
    for other in subjects[1:]:
        require(
            other.module.index.digest == first.module.index.digest,
            f"checkpoints of different data cannot be compared: {first.source} and {other.source}",
        )
        require(
            "" in (other.trained_on, first.trained_on) or other.trained_on == first.trained_on,
            f"checkpoints trained on different sentences or masks of {first.source} cannot be "
            f"compared: digest {first.trained_on} and {other.trained_on}",
        )
        options = [
            f"protocol={subject.module.protocol} max_images={subject.module.max_images}"
            for subject in (first, other)
        ]
        require(
            np.array_equal(other.data.samples, first.data.samples),
            f"checkpoints of different samples cannot be compared: {' and '.join(options)}",
        )


def make_grid(
    rows: int, columns: int, width: float, height: float, margin: float, frame: bool
) -> tuple[Figure, Any]:
    """Return a figure and its axes, (rows, columns), without ticks; sizes per panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows + margin), layout="constrained")
    properties = {"xticks": [], "yticks": [], "frame_on": frame}
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=properties)


def unique_titles(subjects: Sequence[Subject]) -> list[str]:
    """Return the networks' titles, numbered where several have the same."""
    titles = [subject.title for subject in subjects]
    return [
        f"{title} ({number})" if titles.count(title) > 1 else title
        for number, title in enumerate(titles, start=1)
    ]
