"""Training and evaluation of CRIS as a LightningModule: steps, optimizer groups, schedule. No plotting, no files."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from crislit import checkpoint as checkpoints
from crislit.data.dataset import NO_SAMPLE, EvaluationBatch, TrainBatch
from crislit.data.letterbox import normalise, restore, upsample_probabilities
from crislit.errors import InputError, check_whole
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.metrics import SegmentationMetric, intersection_and_union
from crislit.models.cris import CRIS
from crislit.models.rearranged import for_inference

Masks = list[npt.NDArray[np.bool_]]


class CRISTask(L.LightningModule):
    """Trains a network by the text-to-pixel contrastive loss and evaluates masks at the pictures' own sizes.

    Args:
        model: The network.
        learning_rate: Of every parameter in the first epoch.
        encoder_factor: What the encoders' rate is multiplied by.
        encoder_from: Epoch, counted from 0, from which it is. The released code means to train the encoders at a tenth, but
            sets only ``initial_lr``, which takes effect at the first step of the scheduler: after an epoch.
        milestones: Epochs after which all rates are multiplied by ``gamma``.
        gamma: See ``milestones``.
        threshold: Where a probability becomes a mask (0.35, section 4.2).
        splits: Names of the test loaders, in their order.
        select_split: Name of the validation loader.
        config: The run's configuration, which checkpoints keep.
        initial_weights: What the network starts from, which they keep too.

    Raises:
        InputError: If a value is out of its range.
    """

    def __init__(
        self,
        model: CRIS,
        *,
        learning_rate: float = 1e-4,
        encoder_factor: float = 1.0,
        encoder_from: int = 1,
        milestones: Sequence[int] = (35,),
        gamma: float = 0.1,
        threshold: float = 0.35,
        splits: Sequence[str] = ("val",),
        select_split: str = "val",
        config: Mapping[str, Any] | None = None,
        initial_weights: str = "random",
    ) -> None:
        super().__init__()
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise InputError(f"threshold must be a number in [0, 1), got {threshold!r}")
        for name, value in (("learning_rate", learning_rate), ("encoder_factor", encoder_factor), ("gamma", gamma)):
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InputError(f"recipe.optimizer.{name} must be a positive number, got {value!r}")
        self.model = model.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs alike
        self.learning_rate, self.encoder_factor = learning_rate, encoder_factor
        check_whole("recipe.optimizer.encoder_from", encoder_from, 0)
        self.encoder_from = encoder_from
        if isinstance(milestones, str) or not isinstance(milestones, Sequence):
            raise InputError(f"recipe.optimizer.milestones must be a list of epochs, got {milestones!r}")
        for milestone in milestones:
            check_whole("each of recipe.optimizer.milestones", milestone, 1)
        self.milestones, self.gamma = sorted(milestones), gamma
        self.threshold = threshold
        self.evaluated: Callable[..., Tensor] = self._as_trained
        self.splits = list(splits)
        self.select_split = select_split
        self.config, self.initial_weights = dict(config or {}), initial_weights
        self.validation_metric = SegmentationMetric()
        self.test_metrics = nn.ModuleList(SegmentationMetric() for _ in self.splits)

    # -- Training

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.images))
        return loss

    def loss(self, batch: TrainBatch) -> Tensor:
        """Return the loss of a batch, and log nothing."""
        images = self._normalised(batch.images)
        return text_to_pixel_contrastive_loss(self.model(images, batch.tokens), batch.masks.to(images.dtype) / 255)

    def configure_optimizers(self) -> Any:
        """Return Adam over the encoders (without position embeddings) and the rest, and their schedule."""
        groups = [
            {"params": list(params), "lr": self.learning_rate, "name": name} for name, params in self.parameter_groups().items()
        ]
        optimizer = torch.optim.Adam(groups, lr=self.learning_rate, fused=True)  # the same steps, several times faster
        # The steps of MultiStepLR, and for the encoders one more.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [self.encoder_rate if name == "encoders" else self.rate for name in self.parameter_groups()]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what it takes to build the network again."""
        checkpoint[checkpoints.KEY] = checkpoints.record(self.model.settings, self.config, self.initial_weights)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that learn, as the released code groups them."""
        groups: dict[str, list[nn.Parameter]] = {"encoders": [], "rest": []}
        for name, parameter in self.model.named_parameters():
            encoder = name.startswith(("image_encoder.", "text_encoder.")) and "positional_embedding" not in name
            if parameter.requires_grad:
                groups["encoders" if encoder else "rest"].append(parameter)
        return groups

    def rate(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0."""
        return float(self.gamma ** bisect.bisect_right(self.milestones, epoch))

    def encoder_rate(self, epoch: int) -> float:
        """Return the factor of the encoders' learning rate in an epoch, counted from 0."""
        return self.rate(epoch) * (self.encoder_factor if epoch >= self.encoder_from else 1.0)

    # -- Evaluation

    @torch.no_grad()
    def predict_probabilities(self, batch: EvaluationBatch) -> Iterator[npt.NDArray[np.float32]]:
        """Return one map a sample, (h, w) at its picture's own size; bicubic steps may leave [0, 1] a little.

        One map after another is made, for those of a large picture are large.
        """
        with torch.autocast(batch.images.device.type, enabled=False):  # mixed precision is for training only, as released
            logits = self.evaluated(self._normalised(batch.images), batch.tokens, batch.owners)
        squares = upsample_probabilities(logits, batch.images.shape[-1]).cpu().numpy()
        return (restore(square, *truth.shape) for square, truth in zip(squares, batch.truths, strict=True))

    def predict_masks(self, batch: EvaluationBatch) -> Masks:
        """Return one mask a sample, (h, w) bool at its picture's own size."""
        return [probability > self.threshold for probability in self.predict_probabilities(batch)]

    def on_validation_start(self) -> None:
        """Weights are fixed until this ends: evaluate the network's form for that."""
        self.evaluated = for_inference(self.model).forward  # not the module, which checkpoints would hold

    def on_validation_end(self) -> None:
        """Let the network be trained again."""
        self.evaluated = self._as_trained

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Count a batch of the selecting split."""
        self._count(self.validation_metric, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the selecting split's metrics."""
        self._log(self.select_split, self.validation_metric, prog_bar=True)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Masks]:
        """Count a batch of one of the test loaders, and return its masks."""
        metric = self.test_metrics[dataloader_idx]
        assert isinstance(metric, SegmentationMetric)
        return {"masks": self._count(metric, batch)}

    def on_test_epoch_end(self) -> None:
        """Log every split's metrics."""
        for split, metric in zip(self.splits, self.test_metrics, strict=True):
            assert isinstance(metric, SegmentationMetric)
            self._log(split, metric, prog_bar=False)

    def _normalised(self, images: Tensor) -> Tensor:
        return normalise(images).to(next(self.model.parameters()).dtype)  # which is not float32 under 64-true and the like

    def _as_trained(self, *batch: Tensor) -> Tensor:
        logits: Tensor = self.model(*batch)
        return logits

    def _count(self, metric: SegmentationMetric, batch: EvaluationBatch) -> Masks:
        masks = self.predict_masks(batch)
        counted = [i for i, number in enumerate(batch.samples) if number != NO_SAMPLE]
        counts = [intersection_and_union(masks[i], batch.truths[i]) for i in counted]
        empty = [not batch.truths[i].any() for i in counted]
        metric.update([i for i, _ in counts], [u for _, u in counts], empty)
        return masks

    def _log(self, split: str, metric: SegmentationMetric, prog_bar: bool) -> None:
        values = metric.compute()  # over all processes, so that every one logs the same
        metric.reset()
        for name, value in values.items():
            self.log(f"{split}/{name}", value.float(), prog_bar=prog_bar and name == "mIoU")
