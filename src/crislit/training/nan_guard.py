"""Stops training before a step with NaN or infinite values, and names the module they came from."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from crislit.data.dataset import ReferTrainSet, SkippingTrainSet, TrainBatch
from crislit.data.samplers import TrainSampler
from crislit.errors import InputError
from crislit.training.checkpointing import LAST, StepSeeds
from crislit.training.task import CRISTask


class NanGuard(L.Callback):
    """Refuses optimizer steps with a non-finite loss or gradients, and such weights in checkpoints.

    Under 16-mixed, gradients are scaled so that they do not vanish in half precision. Where they
    overflow, the scaler skips the step and halves the scale: that ends a run only when a scale
    below 1 does not help.

    Args:
        seeds: Seeds of each batch's random numbers, to run a batch again.
        folder: The folder of the checkpoints.
    """

    def __init__(self, seeds: StepSeeds, folder: Path) -> None:
        self.seeds, self.folder = seeds, folder
        self._batch = 0
        self._losses: dict[int, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch."""
        self._batch = batch_idx

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the losses of a step's batches; reading one would wait for the device."""
        self._losses[self._batch] = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check a step before it is taken.

        Raises:
            InputError: In every process, if any process's loss or the gradients are not finite.
        """
        losses, self._losses = self._losses, {}
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        loss = torch.stack(list(losses.values())).sum()
        non_finite = not (loss + norm).isfinite()
        if non_finite and loss.isfinite() and can_lower_scale(trainer):
            non_finite = False
        if not any_process(trainer, non_finite):
            return
        assert isinstance(pl_module, CRISTask)
        # In every process, since SyncBatchNorm needs all of them.
        reports = [self.examine(trainer, pl_module, batch) for batch in losses]
        reports = gather_reports(trainer, reports)
        raise InputError(self.describe(trainer, optimizer, float(norm), reports))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the weights, which a step with finite gradients may still have made infinite.

        Raises:
            InputError: In every process, if a weight is not finite.
        """
        state = checkpoint["state_dict"].items()
        floats = {name: value for name, value in state if value.is_floating_point()}
        offenders = [n for n, value in floats.items() if not get_total_norm([value]).isfinite()]
        if any_process(trainer, bool(offenders)):
            names = ", ".join(offenders[:3]) or "elsewhere"
            raise InputError(
                f"the weights are no longer finite after step {trainer.global_step}: {names}. They "
                f"are not saved; {self.recovery_hint()}"
            )

    def examine(self, trainer: L.Trainer, task: CRISTask, number: int) -> dict[str, Any]:
        """Run a batch of this epoch again with its random numbers, and trace the first NaN."""
        loader = trainer.train_dataloader
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, TrainSampler)
        assert isinstance(loader.dataset, (ReferTrainSet, SkippingTrainSet))
        keys = loader.sampler.keys(number)
        batch = trainer.strategy.batch_to_device(loader.dataset.__getitems__(keys))
        self.seeds.on_train_batch_start(trainer, task, batch, number)
        with trainer.precision_plugin.train_step_context():
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss, origin = first_non_finite(task, batch, scaler)
        samples = [name for key in keys for name in loader.dataset.names(key)]
        report = {"batch": number, "process": trainer.global_rank, "loss": loss}
        return report | {"origin": origin, "samples": samples}

    def describe(
        self,
        trainer: L.Trainer,
        optimizer: torch.optim.Optimizer,
        norm: float,
        reports: list[dict[str, Any]],
    ) -> str:
        """Return a message about a step that was not taken."""
        offenders = [report for report in reports if report["origin"]] or reports
        first = offenders[0]
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in optimizer.param_groups)
        place = f"epoch {trainer.current_epoch + 1}, batch {first['batch'] + 1}"
        place += f", process {first['process']}" if trainer.world_size > 1 else ""
        samples = ", ".join(name for report in offenders for name in report["samples"])
        origin = first["origin"] or "nothing when the batch was run again"
        hint = self.recovery_hint()
        return (
            f"step {trainer.global_step + 1} was not taken ({place}): loss {first['loss']:g}, norm "
            f"of the gradients {norm:g}. First not finite: {origin}. Learning rates: {rates}. "
            f"{hint[0].upper()}{hint[1:]}. Samples: {samples}"
        )

    def recovery_hint(self) -> str:
        """Return what a user can do."""
        last = self.folder / LAST
        saved = "; nothing had been saved"
        if last.is_file():
            saved = f", or correct the data and continue with resume={last}"
        return f"start again with a lower recipe.optimizer.learning_rate{saved}"


def can_lower_scale(trainer: L.Trainer) -> bool:
    """Whether gradients may have overflowed under a scale that the scaler can still halve."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1


def any_process(trainer: L.Trainer, here: bool) -> bool:
    """Whether a condition holds in any process, the same answer in all; a collective."""
    if trainer.world_size == 1:
        return here
    return bool(trainer.strategy.reduce_boolean_decision(here, all=False))


def gather_reports(trainer: L.Trainer, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the reports of all processes; a collective."""
    if trainer.world_size == 1:
        return reports
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, reports)
    return [report for part in gathered for report in part]


# -- Tracing


def first_non_finite(
    task: CRISTask, batch: TrainBatch, scaler: Any = None
) -> tuple[float, str | None]:
    """Run a batch forward and backward; return its loss and where a number first was not finite.

    Args:
        task: Its weights and their gradients stay as they are.
        batch: On the task's device.
        scaler: The gradient scaler, under 16-mixed.

    Returns:
        The loss, and the module and pass; None if all numbers are finite.
    """
    tracer = NanTracer(task.model)
    for name, parameter in task.model.named_parameters():
        tracer.check(parameter, f"the weights themselves, {name}")
    try:
        with torch.enable_grad():
            loss = task.loss(batch)
        tracer.claim(loss, "the loss")
        tracer.check(loss, "the loss, in the forward pass")
        trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        scaled = loss if scaler is None else scaler.scale(loss)
        torch.autograd.grad(scaled, trained, allow_unused=True)
    finally:
        tracer.close()
    return float(loss.detach()), tracer.origin


class NanTracer:
    """Watches a forward and a backward pass, and remembers where a number first was not finite.

    Every node of autograd's graph is claimed by the module that made it, so that the backward pass
    is attributed to modules, too. (Backward hooks of modules do not work with in-place operations,
    which CLIP's ResNet has.)

    Args:
        model: The network.

    Attributes:
        origin: The module and pass, None so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.origin: str | None = None
        self._running = ["the loss"]
        self._claimed: set[Node] = set()
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            name = f"{path or 'the network'} ({type(module).__name__})"
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(partial(self._leave, name)))

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def check(self, value: Any, place: str) -> None:
        """Remember the place if it is the first with a number that is not finite."""
        if self.origin is None and not all(x.isfinite().all() for x in iterate_tensors(value)):
            self.origin = place

    def claim(self, value: Any, name: str) -> None:
        """Assign the unclaimed part of the graph behind a value to a module."""
        nodes = [tensor.grad_fn for tensor in iterate_tensors(value)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._claimed:
                self._claimed.add(node)
                self._handles.append(node.register_hook(partial(self._backward, name)))
                nodes += [behind for behind, _ in node.next_functions]

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        caller = self._running[-1]
        self.claim(inputs, caller)
        computed = [
            x for x in iterate_tensors(inputs) if x.requires_grad
        ]  # attention masks are not
        self.check(computed, f"{caller}, in the forward pass")
        self._running.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self.claim(output, name)
        self.check(output, f"{name}, in the forward pass")

    def _backward(self, name: str, to_inputs: Any, from_outputs: Any) -> None:
        self.check(to_inputs, f"{name}, in the backward pass")


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from iterate_tensors(part)
