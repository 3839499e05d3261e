"""Stops training before a step with NaN or infinite values, and names the module they came from."""

import math
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from crislit.data import TrainBatch
from crislit.errors import InputError, see
from crislit.training.callbacks import gather_objects
from crislit.training.checkpointing import LAST, StepSeeds
from crislit.training.task import CRISTask

CHECK_EVERY = 10
"""Steps after which their numbers are read, which waits for the device."""


@dataclass
class Step:
    """The numbers of a step, on the device.

    Attributes:
        number: Optimizer steps before it.
        losses: The loss of each of its batches, by the batch's number in the epoch.
        loss: Their sum.
        norm: The norm of the gradients.
    """

    number: int
    losses: dict[int, Tensor]
    loss: Tensor
    norm: Tensor


class NanGuard(L.Callback):
    """Refuses optimizer steps with a non-finite loss or gradients, and such weights in checkpoints.

    The optimizer itself skips such a step and all after it, on the device. What happened is read
    every ``CHECK_EVERY`` steps, at the end of an epoch and before a checkpoint is written. So
    training does not wait for the device at every step, and no checkpoint has such a step.

    Under 16-mixed, gradients are scaled so that they do not vanish in half precision. Where they
    overflow, the scaler skips the step and halves the scale: that ends a run only when a scale
    below 1 does not help. The scaler, not this class, then decides which steps are skipped.

    Args:
        seeds: Seeds of each batch's random numbers, to run a batch again.
        folder: The folder of the checkpoints.
    """

    def __init__(self, seeds: StepSeeds, folder: Path) -> None:
        self.seeds, self.folder = seeds, folder
        self._losses: dict[int, Tensor] = {}
        self._steps: list[Step] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the losses of a step's batches; reading one would wait for the device."""
        self._losses[trainer.fit_loop.batch_idx] = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the optimizer skip the step if a number is not finite, without reading it here.

        Raises:
            InputError: In every process, if any process's loss or the gradients were not finite.
        """
        losses, self._losses = self._losses, {}
        norm = nn.utils.get_total_norm(
            [p.grad for p in pl_module.parameters() if p.grad is not None]
        )
        loss = torch.stack(list(losses.values())).sum()
        self._steps.append(Step(trainer.global_step, losses, loss, norm))
        self._optimizer = optimizer
        is_bad = 1 - (loss + norm).isfinite().float()
        # Fused optimizers skip a step where this is 1, as gradient scalers need it.
        skip = torch.maximum(is_bad, getattr(optimizer, "found_inf", is_bad))
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        if len(self._steps) >= CHECK_EVERY:
            self.check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the steps while their batches can be read again."""
        self.check(trainer, pl_module)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the numbers of the steps since the last check.

        Raises:
            InputError: In every process, if any process's loss or the gradients were not finite.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return
        numbers = torch.stack([torch.stack([s.loss.float(), s.norm.float()]) for s in steps])
        bad = [
            step
            for step, (loss, norm) in zip(steps, numbers.tolist(), strict=True)
            if not math.isfinite(loss) or (not math.isfinite(norm) and not can_lower_scale(trainer))
        ]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        assert isinstance(pl_module, CRISTask)
        assert self._optimizer is not None
        pl_module.train()  # also where a checkpoint is written before a validation
        # In every process, since SyncBatchNorm needs all of them.
        first = min(gather_objects(trainer, bad[0].number if bad else math.inf))
        step = next(step for step in steps if step.number == first)
        reports = [self.examine(trainer, pl_module, batch) for batch in step.losses]
        gathered = [report for part in gather_objects(trainer, reports) for report in part]
        raise InputError(self.describe(trainer, self._optimizer, step, gathered))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the steps, and the weights, which finite gradients may still have made infinite.

        Raises:
            InputError: In every process, if a number of a step or a weight is not finite.
        """
        self.check(trainer, pl_module)
        finite = {
            name: nn.utils.get_total_norm([value]).isfinite()
            for name, value in checkpoint["state_dict"].items()
            if value.is_floating_point()
        }
        results = torch.stack(list(finite.values())).tolist()  # waits for the device once
        offenders = [name for name, result in zip(finite, results, strict=True) if not result]
        if trainer.strategy.reduce_boolean_decision(bool(offenders), all=False):
            names = ", ".join(offenders[:3]) or "elsewhere"
            raise InputError(
                f"the weights are no longer finite after step {trainer.global_step}: {names}. They "
                f"are not saved; {self.recovery_hint()}"
            )

    def examine(self, trainer: L.Trainer, task: CRISTask, number: int) -> dict[str, Any]:
        """Run a batch of this epoch again with its random numbers, and trace the first NaN."""
        loader: Any = trainer.train_dataloader
        keys = loader.sampler.keys(number)
        batch = trainer.strategy.batch_to_device(loader.dataset.__getitems__(keys))
        self.seeds.on_train_batch_start(trainer, task, batch, number)
        with trainer.precision_plugin.train_step_context():
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss, origin = first_non_finite(task, batch, scaler)
        return {
            **{"batch": number, "process": trainer.global_rank, "loss": loss, "origin": origin},
            "samples": [name for key in keys for name in loader.dataset.names(key)],
        }

    def describe(
        self,
        trainer: L.Trainer,
        optimizer: torch.optim.Optimizer,
        step: Step,
        reports: list[dict[str, Any]],
    ) -> str:
        """Return a message about a step that was not taken."""
        offenders = [report for report in reports if report["origin"]] or reports
        first = offenders[0]
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in optimizer.param_groups)
        process = f", process {first['process']}" if trainer.world_size > 1 else ""
        samples = ", ".join(name for report in offenders for name in report["samples"])
        return (
            f"step {step.number + 1} was not taken (epoch {trainer.current_epoch + 1}, "
            f"batch {first['batch'] + 1}{process}): loss {first['loss']:g}, norm of the gradients "
            f"{float(step.norm):g}. First not finite: "
            f"{first['origin'] or 'nothing when the batch was run again'}. "
            f"Learning rates: {rates}; {self.recovery_hint()}. Samples: {samples}"
            f"{see('nan')}"
        )

    def recovery_hint(self) -> str:
        """Return what a user can do."""
        last = self.folder / LAST
        resume = f", or correct the data and continue with resume={last}"
        return "start again with a lower recipe.optimizer.learning_rate" + (
            resume if last.is_file() else "; nothing had been saved"
        )


def can_lower_scale(trainer: L.Trainer) -> bool:
    """Whether gradients may have overflowed under a scale that the scaler can still halve."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() >= 1


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
    with (
        closing(NanTracer(task.model)) as tracer,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.compiler.set_stance("force_eager"),  # a compiled network calls no hooks
    ):
        for name, parameter in task.model.named_parameters():
            tracer.check(parameter, f"the weights themselves, {name}")
        loss = task.loss(batch)
        tracer.claim(loss, "the loss")
        tracer.check(loss, "the loss, in the forward pass")
        trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        torch.autograd.grad(scaler.scale(loss) if scaler else loss, trained, allow_unused=True)
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
        self._claimed: set[torch.autograd.graph.Node] = set()
        self._hooks = ExitStack()
        for path, module in model.named_modules():
            name = f"{path or 'the network'} ({type(module).__name__})"
            self._hooks.enter_context(module.register_forward_pre_hook(partial(self._enter, name)))
            self._hooks.enter_context(module.register_forward_hook(partial(self._leave, name)))

    def close(self) -> None:
        """Remove all hooks."""
        self._hooks.close()

    def check(self, value: Any, place: str) -> None:
        """Remember the place if it is the first with a number that is not finite."""
        if self.origin is None and not all(x.isfinite().all() for x in find_tensors(value)):
            self.origin = place

    def claim(self, value: Any, name: str) -> None:
        """Assign the unclaimed part of the graph behind a value to a module."""
        nodes = [tensor.grad_fn for tensor in find_tensors(value)]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._claimed:
                self._claimed.add(node)
                self._hooks.enter_context(node.register_hook(partial(self._backward, name)))
                nodes += [behind for behind, _ in node.next_functions]

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        caller = self._running[-1]
        self.claim(inputs, caller)
        computed = [tensor for tensor in find_tensors(inputs) if tensor.requires_grad]
        self.check(computed, f"{caller}, in the forward pass")  # attention masks may be infinite
        self._running.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()
        self.claim(output, name)
        self.check(output, f"{name}, in the forward pass")

    def _backward(self, name: str, to_inputs: Any, from_outputs: Any) -> None:
        self.check(to_inputs, f"{name}, in the backward pass")


def find_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested sequences."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in find_tensors(part)]
    return [value] if isinstance(value, Tensor) else []
