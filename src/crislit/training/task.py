"""Training and evaluation of CRIS as a LightningModule: steps, optimizer groups, schedule."""

import bisect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from crislit.checkpoints import KEY
from crislit.data import EvaluationBatch, TrainBatch
from crislit.errors import InputError, check_integer, require
from crislit.models import CRIS, compile_for_inference, optimize_for_inference
from crislit.training.losses import Loss, text_to_pixel_contrastive_loss
from crislit.training.mask_counter import MaskCounter
from crislit.training.metrics import SegmentationMetric
from crislit.transforms import normalize, probability_maps, probability_squares

Masks = list[npt.NDArray[np.bool_]]


class CRISTask(L.LightningModule):
    """Trains a network with the text-to-pixel contrastive loss, evaluates masks at image size.

    Args:
        model: The network.
        learning_rate: Learning rate of every parameter in the first epoch.
        encoder_factor: Factor of the encoders' learning rate, from ``encoder_from`` on.
        encoder_from: Epoch, counted from 0. The released code means to train the encoders at a
            tenth of the rate, but sets only ``initial_lr``, which takes effect with the
            scheduler's first step, after one epoch.
        milestones: Epochs after which all rates are multiplied by ``gamma``.
        gamma: See ``milestones``.
        cooldown: Share of the training, at its end, over which all rates fall linearly to zero,
            step by step. 0 for none, as in the paper. The training is ``max_epochs`` epochs long,
            even if ``max_steps`` ends it earlier.
        threshold: Probability above which a pixel belongs to the mask (0.35, section 4.2).
        compile: Whether ``torch.compile`` compiles the network, for training and evaluation.
        splits: Names of the test loaders, in their order.
        select_split: Name of the validation loader.
        criterion: The loss, called with logits, (B, 1, H/4, W/4), and masks, (B, 1, H, W).
        metadata: Stored in checkpoints, see ``checkpoint_metadata``.

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
        cooldown: float = 0.0,
        threshold: float = 0.35,
        compile: bool = False,
        splits: Sequence[str] = ("val",),
        select_split: str = "val",
        criterion: Loss = text_to_pixel_contrastive_loss,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_task_options(
            threshold=threshold,
            learning_rate=learning_rate,
            encoder_factor=encoder_factor,
            encoder_from=encoder_from,
            milestones=milestones,
            gamma=gamma,
            cooldown=cooldown,
        )
        # Convolutions are faster in channels-last layout, on CPUs and GPUs alike.
        self.model = model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.is_compiled = compile
        self.learning_rate = learning_rate
        self.encoder_factor, self.encoder_from = encoder_factor, encoder_from
        self.milestones, self.gamma, self.cooldown = sorted(milestones), gamma, cooldown
        self.threshold = threshold
        self.splits, self.select_split = list(splits), select_split
        self.criterion = criterion
        self.metadata = dict(metadata or {})
        self.validation_metric = SegmentationMetric()
        self.test_metrics: Sequence[SegmentationMetric] = nn.ModuleList(  # type: ignore[assignment]
            SegmentationMetric() for _ in self.splits
        )
        # No attribute is the network itself: checkpoints would store its weights.
        self._evaluated: Callable[..., Tensor] | None = None
        self._compiled: tuple[CRIS, Callable[..., Tensor]] | None = None
        self._counters: dict[str, MaskCounter] = {}

    # -- Training

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a scalar, and log it."""
        loss = self.loss(batch)
        # Without prog_bar, for which Lightning waits for the device at every step.
        self.log("train/loss", loss, batch_size=len(batch.images))
        return loss

    def loss(self, batch: TrainBatch) -> Tensor:
        """Return the loss of a batch, a scalar (section 3.3)."""
        images = self._normalized(batch.images)
        masks = batch.masks.to(images.dtype) / 255
        return self.criterion(self.model(images, batch.tokens), masks)

    def configure_optimizers(self) -> Any:
        """Return Adam over the encoders (without position embeddings) and the rest, scheduled."""
        groups = self.parameter_groups()
        rates: list[Callable[[int], float]] = [
            self.encoder_rate if name == "encoders" else self.rate for name in groups
        ]
        optimizer = torch.optim.Adam(
            [
                {"params": parameters, "lr": self.learning_rate, "name": name}
                for name, parameters in groups.items()
            ],
            lr=self.learning_rate,
            fused=True,  # the same steps, several times faster
        )
        if self.cooldown:
            rates = [partial(self._rate_at_step, rate) for rate in rates]
        # MultiStepLR, with one more step for the encoders and with the cooldown.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        interval = "step" if self.cooldown else "epoch"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval},
        }

    def _rate_at_step(self, rate: Callable[[int], float], step: int) -> float:
        if step == 0:  # the optimizer is built before the number of steps is known
            return rate(0)
        trainer = self.trainer
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        # Not up to trainer.max_steps: raising that limit continues a run as if it had been higher.
        steps = per_epoch * (trainer.max_epochs or 1)
        return rate(step // per_epoch) * cooldown_factor(step, steps, self.cooldown)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, under mixed precision the scaled ones at the scaled limit.

        There, a fused optimizer removes the scale itself, in its step, and Lightning does not clip.
        """
        plugin = self.trainer.precision_plugin
        if not gradient_clip_val or not isinstance(plugin, MixedPrecision):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        groups = (group["params"] for group in optimizer.param_groups)
        gradients = [p.grad for params in groups for p in params if p.grad is not None]
        limit = gradients[0].new_full((), gradient_clip_val, dtype=torch.float32)
        if plugin.scaler is not None:
            limit = plugin.scaler.scale(limit)
        if gradient_clip_algorithm == "value":
            for gradient in gradients:
                gradient.clamp_(-limit, limit)
        else:
            factor = (limit / nn.utils.get_total_norm(gradients)).clamp(max=1)
            torch._foreach_mul_(gradients, factor)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters, grouped as in the released code."""
        groups: dict[str, list[nn.Parameter]] = {"encoders": [], "rest": []}
        for name, parameter in self.model.named_parameters():
            is_encoder = name.startswith(("image_encoder.", "text_encoder.")) and (
                "positional_embedding" not in name
            )
            if parameter.requires_grad:
                groups["encoders" if is_encoder else "rest"].append(parameter)
        return groups

    def rate(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0."""
        return float(self.gamma ** bisect.bisect_right(self.milestones, epoch))

    def encoder_rate(self, epoch: int) -> float:
        """Return the factor of the encoders' learning rate in an epoch, counted from 0."""
        return self.rate(epoch) * (self.encoder_factor if epoch >= self.encoder_from else 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what it takes to build the network again."""
        checkpoint[KEY] = self.metadata

    # -- Evaluation

    @torch.no_grad()
    def predict_probabilities(self, batch: EvaluationBatch) -> Iterator[npt.NDArray[np.float32]]:
        """Yield one map per sample, (h, w) at its image's own size, slightly beyond [0, 1].

        Maps are made one after another, since those of large images are large.
        """
        sizes = [target.shape for target in batch.targets]
        return probability_maps(self._logits(batch), batch.images.shape[-1], sizes)

    def _logits(self, batch: EvaluationBatch) -> Tensor:
        compute = self._evaluated or self.model
        # Mixed precision is for training only, as released.
        with torch.autocast(batch.images.device.type, enabled=False):
            return compute(self._normalized(batch.images), batch.tokens, batch.image_indices)

    def predict_masks(self, batch: EvaluationBatch) -> Masks:
        """Return one mask per sample, (h, w) bool at its image's own size."""
        return [probability > self.threshold for probability in self.predict_probabilities(batch)]

    def on_validation_start(self) -> None:
        """Use the inference-optimized network during evaluation; the weights do not change."""
        self._evaluated = self._optimize_for_inference()
        self._counters = {}  # those of an interrupted evaluation

    @torch.no_grad()
    @torch.inference_mode(False)  # which other evaluations of this task may not use
    def _optimize_for_inference(self) -> Callable[..., Tensor]:
        network = optimize_for_inference(self.model)
        if not self.is_compiled:
            return network.forward
        if self._compiled is None:
            self._compiled = network, compile_for_inference(network.forward)
        # Compiling takes a minute: later evaluations only replace the weights.
        self._compiled[0].load_state_dict(network.state_dict())
        return self._compiled[1]

    def on_validation_end(self) -> None:
        """Return to the trained network."""
        self._evaluated = None

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Count a batch of the selecting split."""
        self._count(self.select_split, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the selecting split's metrics."""
        self._log(self.select_split, self.validation_metric)

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch of the test loader with the index ``dataloader_idx``."""
        split = self.splits[dataloader_idx]
        self._count(split, batch)
        if batch_idx + 1 == self.trainer.num_test_batches[dataloader_idx]:
            self._counters[split].wait()  # before the next loader forks its workers

    def on_test_epoch_end(self) -> None:
        """Log every split's metrics."""
        for split, metric in zip(self.splits, self.test_metrics, strict=True):
            self._log(split, metric)

    def _normalized(self, images: Tensor) -> Tensor:
        # Weights are not float32 under 64-true and the like.
        return normalize(images).to(next(self.model.parameters()).dtype)

    @torch.no_grad()
    def _count(self, split: str, batch: EvaluationBatch) -> None:
        squares = probability_squares(self._logits(batch), batch.images.shape[-1])
        if split not in self._counters:
            threads = (os.cpu_count() or 1) if squares.device.type == "cuda" else 0
            self._counters[split] = MaskCounter(self.threshold, threads)
        self._counters[split].add(squares, batch)

    def _log(self, split: str, metric: SegmentationMetric) -> None:
        if counter := self._counters.pop(split, None):
            metric.update(*counter.finish())
        values = metric.compute()  # over all processes, so that each logs the same
        metric.reset()
        for name, value in values.items():
            self.log(f"{split}/{name}", value.float())


def cooldown_factor(step: int, steps: int, cooldown: float) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    Args:
        step: The step.
        steps: Number of steps of the training.
        cooldown: Share of the training, at its end, over which the rate falls linearly to zero.
    """
    return min(1.0, (steps - step) / (cooldown * steps))


def check_task_options(
    *,
    threshold: Any,
    learning_rate: Any,
    encoder_factor: Any,
    encoder_from: Any,
    milestones: Any,
    gamma: Any,
    cooldown: Any,
) -> None:
    """Check the values of ``CRISTask`` that come from a configuration.

    Raises:
        InputError: If one is out of its range.
    """
    require(
        isinstance(threshold, (int, float)) and 0 <= threshold < 1,
        f"threshold must be a number in [0, 1), got {threshold!r}",
    )
    rates = {"learning_rate": learning_rate, "encoder_factor": encoder_factor, "gamma": gamma}
    for name, value in rates.items():
        require(
            isinstance(value, (int, float)) and 0 < value < float("inf"),
            f"recipe.optimizer.{name} must be a positive number, got {value!r}",
        )
    require(
        isinstance(cooldown, (int, float)) and 0 <= cooldown <= 1,
        "recipe.optimizer.cooldown must be a share of the training between 0 and 1, got "
        f"{cooldown!r}",
    )
    check_integer("recipe.optimizer.encoder_from", encoder_from, 0)
    if isinstance(milestones, str) or not isinstance(milestones, Sequence):
        raise InputError(
            f"recipe.optimizer.milestones must be a list of epochs, got {milestones!r}"
        )
    for milestone in milestones:
        check_integer("each of recipe.optimizer.milestones", milestone, 1)
