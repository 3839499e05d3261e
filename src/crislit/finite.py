"""Ends a training before a step whose numbers make no sense, and finds out where they came from."""

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

from crislit.data.datamodule import TrainSampler
from crislit.data.dataset import ReferTrainSet, SkippingTrainSet, TrainBatch
from crislit.errors import InputError
from crislit.resume import LAST, StepSeeds
from crislit.task import CRISTask


class FiniteNumbers(L.Callback):
    """Takes no optimizer step with a loss or gradients that are NaN or infinite, and lets no such weights into a checkpoint.

    Under 16-mixed, gradients are scaled so that they do not vanish in half precision. Where they overflow, the scaler leaves
    out the step and halves the scale: that ends a run only when a scale below 1 does not help.

    Args:
        seeds: What seeds each batch's random numbers, which a batch that is run again needs.
        folder: Where the checkpoints are.
    """

    def __init__(self, seeds: StepSeeds, folder: Path) -> None:
        self.seeds, self.folder = seeds, folder
        self._batch = 0
        self._losses: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch."""
        self._batch = batch_idx

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the losses of the batches that make the next step; looking at one would wait for the device."""
        self._losses[self._batch] = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check a step before it is taken.

        Raises:
            InputError: In every process, if a process's loss or the gradients are not finite.
        """
        losses, self._losses = self._losses, {}
        norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        loss = torch.stack(list(losses.values())).sum()
        spoilt = not (loss + norm).isfinite()
        if spoilt and loss.isfinite() and scale_helps(trainer):
            spoilt = False
        if not in_any_process(trainer, spoilt):
            return
        assert isinstance(pl_module, CRISTask)
        found = [self.examine(trainer, pl_module, batch) for batch in losses]  # all, as SyncBatchNorm needs every process
        raise InputError(self.describe(trainer, optimizer, float(norm), gather(trainer, found)))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look through the weights, which a last step with finite gradients may still have spoilt.

        Raises:
            InputError: In every process, if one of them is not finite.
        """
        weights = {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}
        spoilt = [name for name, value in weights.items() if not get_total_norm([value]).isfinite()]
        if in_any_process(trainer, bool(spoilt)):
            raise InputError(
                f"the weights are no longer finite after step {trainer.global_step}: {', '.join(spoilt[:3]) or 'elsewhere'}. "
                f"They are not saved; {self.onward()}"
            )

    def examine(self, trainer: L.Trainer, task: CRISTask, number: int) -> dict[str, Any]:
        """Run a batch of this epoch once more, with the random numbers it had, and watch; weights and gradients stay."""
        loader = trainer.train_dataloader
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, TrainSampler)
        assert isinstance(loader.dataset, (ReferTrainSet, SkippingTrainSet))
        keys = loader.sampler.keys(number)
        batch = trainer.strategy.batch_to_device(loader.dataset.__getitems__(keys))
        self.seeds.on_train_batch_start(trainer, task, batch, number)
        with trainer.precision_plugin.train_step_context():
            loss, where = first_non_finite(task, batch, getattr(trainer.precision_plugin, "scaler", None))
        samples = [name for key in keys for name in loader.dataset.names(key)]
        return {"batch": number, "process": trainer.global_rank, "loss": loss, "where": where, "samples": samples}

    def describe(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, norm: float, found: list[dict[str, Any]]) -> str:
        """Return one line about a step that was not taken."""
        culprits = [one for one in found if one["where"]]
        worst = (culprits or found)[0]
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in optimizer.param_groups)
        place = f"epoch {trainer.current_epoch + 1}, batch {worst['batch'] + 1}"
        place += f", process {worst['process']}" if trainer.world_size > 1 else ""
        samples = [name for one in culprits or found for name in one["samples"]]
        return (
            f"step {trainer.global_step + 1} was not taken ({place}): loss {worst['loss']:g}, norm of the gradients {norm:g}. "
            f"First not finite: {worst['where'] or 'no single number when it was run again'}. Learning rates: {rates}. "
            f"{self.onward()[0].upper()}{self.onward()[1:]}. Samples: {', '.join(samples)}"
        )

    def onward(self) -> str:
        """Return what a user can do."""
        last = self.folder / LAST
        saved = f", or resume={last} with the data mended" if last.is_file() else "; nothing had been saved"
        return f"begin anew with a lower recipe.optimizer.learning_rate{saved}"


def scale_helps(trainer: L.Trainer) -> bool:
    """Whether gradients overflow under a scale that the scaler still can halve with some effect."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1


def in_any_process(trainer: L.Trainer, here: bool) -> bool:
    """Whether something holds in one of the processes, the same answer in all."""
    return bool(trainer.strategy.reduce_boolean_decision(here, all=False)) if trainer.world_size > 1 else here


def gather(trainer: L.Trainer, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what all processes found."""
    if trainer.world_size == 1:
        return found
    everybody: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everybody, found)
    return [one for theirs in everybody for one in theirs]


# -- Where a number first was not finite --------------------------------------------------------------------------------------


def first_non_finite(task: CRISTask, batch: TrainBatch, scaler: Any = None) -> tuple[float, str | None]:
    """Run a batch forwards and backwards, and return its loss and where a number first was not finite, None if nowhere.

    Args:
        task: Its weights, and their gradients, stay what they are.
        batch: On the task's device.
        scaler: Of the gradients, under 16-mixed.
    """
    trace = Trace(task.model)
    for name, parameter in task.model.named_parameters():
        trace.check(parameter, f"the weights themselves, {name}")
    try:
        with torch.enable_grad():
            loss = task.loss(batch)
        trace.claim(loss, "the loss")
        trace.check(loss, "the loss, in the forward pass")
        learning = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss if scaler is None else scaler.scale(loss), learning, allow_unused=True)
    finally:
        trace.close()
    return float(loss.detach()), trace.where


class Trace:
    """Watches a forward and a backward pass, and remembers where a number first was not finite.

    Every node of autograd's graph is claimed by the module that made it, which tells the backward pass apart by modules too.
    (Backward hooks of modules do not go together with operations in place, which CLIP's ResNet has.)

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.where: str | None = None
        self._running = ["the loss"]
        self._claimed: set[Node] = set()
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            name = f"{path or 'the network'} ({type(module).__name__})"
            self._handles.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._handles.append(module.register_forward_hook(partial(self._leave, name)))

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def check(self, value: Any, place: str) -> None:
        """Remember a place if a number there is not finite, and it is the first."""
        if self.where is None and not all(bool(tensor.isfinite().all()) for tensor in tensors(value)):
            self.where = place

    def claim(self, value: Any, name: str) -> None:
        """Give the part of the graph behind a value that nobody has claimed yet to a module."""
        nodes = [tensor.grad_fn for tensor in tensors(value)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._claimed:
                self._claimed.add(node)
                self._handles.append(node.register_hook(partial(self._backward, name)))
                nodes += [behind for behind, _ in node.next_functions]

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        caller = self._running[-1]
        self.claim(inputs, caller)
        self.check([tensor for tensor in tensors(inputs) if tensor.requires_grad], f"{caller}, in the forward pass")  # no mask
        self._running.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self.claim(output, name)
        self.check(output, f"{name}, in the forward pass")

    def _backward(self, name: str, to_inputs: Any, from_outputs: Any) -> None:
        self.check(to_inputs, f"{name}, in the backward pass")


def tensors(value: Any) -> Iterator[Tensor]:
    """Return the tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
