"""NaN or infinity stops training before it reaches the weights, and its origin is named."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import Bottleneck
from torch import Tensor, nn

from crislit.config import compose_config
from crislit.data.dataset import ReferTrainSet, TrainBatch
from crislit.data.samplers import TrainKey
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.training.build import build_data
from crislit.training.checkpointing import LAST
from crislit.training.nan_guard import NanTracer, can_lower_scale, first_non_finite
from crislit.training.task import CRISTask
from tests.models.networks import SIZES, bytes_of, random_images, sentences
from tests.runs import run
from tests.training.test_resume import SHORT, same_state


@pytest.fixture
def task() -> CRISTask:
    torch.manual_seed(0)
    task = CRISTask(build_cris(CRISConfig(**SIZES))).train()
    for module in task.model.modules():
        if isinstance(module, Bottleneck):  # its zeros would hide the modules before it
            nn.init.ones_(module.bn3.weight)
    return task


@pytest.fixture
def batch() -> TrainBatch:
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    masks[:, :, 16:40, 8:48] = 255
    return TrainBatch(bytes_of(random_images(4)), sentences(1, 3, 5, 6), masks)


# -- The origin


class InfiniteGradient(torch.autograd.Function):
    """Passes a tensor on unchanged; its gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.inf)


def spoil(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or the first of several."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([spoil(value[0], change), *value[1:]])


def called_modules(task: CRISTask, batch: TrainBatch) -> list[tuple[str, nn.Module]]:
    """Return the modules that a forward pass calls, by name."""
    called: dict[str, nn.Module] = {}

    def remember(name: str, module: nn.Module, *_: Any) -> None:
        called.setdefault(name, module)

    modules = task.model.named_modules()
    handles = [module.register_forward_hook(partial(remember, name)) for name, module in modules]
    task.loss(batch)
    for handle in handles:
        handle.remove()
    return list(called.items())


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_module_with_the_first_non_finite_number_is_named(
    direction: str, task: CRISTask, batch: TrainBatch
) -> None:
    change = {"forward": lambda x: x * torch.nan, "backward": InfiniteGradient.apply}[direction]
    modules = called_modules(task, batch)
    assert len(modules) > 80
    for name, module in modules[::-6]:  # the network itself, then one in six
        handle = module.register_forward_hook(lambda _, __, output: spoil(output, change))
        _, origin = first_non_finite(task, batch)
        handle.remove()
        kind = type(module).__name__
        assert origin == f"{name or 'the network'} ({kind}), in the {direction} pass"


def test_a_healthy_batch_has_no_origin_and_leaves_weights_and_gradients_as_they_are(
    task: CRISTask, batch: TrainBatch
) -> None:
    before = [parameter.clone() for parameter in task.parameters()]
    loss, origin = first_non_finite(task, batch)
    assert origin is None
    assert 0 < loss < 10
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in task.parameters())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in task.model.modules()]
    assert not any(hooks)


def test_weights_and_the_loss_are_named_too(task: CRISTask, batch: TrainBatch) -> None:
    infinite = replace(batch, masks=torch.full(batch.masks.shape, torch.inf))
    assert first_non_finite(task, infinite)[1] == "the loss, in the forward pass"
    with torch.no_grad():
        next(task.model.neck.parameters()).flatten()[0] = torch.nan
    name = next(name for name, _ in task.model.named_parameters() if name.startswith("neck."))
    assert first_non_finite(task, batch)[1] == f"the weights themselves, {name}"


class Divides(nn.Module):
    """Calls two parts, and divides by zero between them or after them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(2, 2), nn.Linear(2, 2), between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        y = self.second(y / 0 if self.between else y)
        return y if self.between else y / 0


@pytest.mark.parametrize("between", [True, False])
def test_a_module_and_not_its_parts_is_named_for_its_own_operations(between: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Divides(between))
    tracer = NanTracer(model)
    model(torch.ones(1, 2))
    tracer.close()
    assert tracer.origin == "1 (Divides), in the forward pass"


@pytest.mark.parametrize(
    ("scale", "helps"), [(65536.0, True), (1.0, True), (0.5, False), (None, False)]
)
def test_a_scaler_may_lower_its_scale_until_it_is_below_one(
    scale: float | None, helps: bool
) -> None:
    scaler = SimpleNamespace(get_scale=lambda: scale)
    plugin = SimpleNamespace(scaler=scaler) if scale else SimpleNamespace()
    trainer: Any = SimpleNamespace(precision_plugin=plugin)
    assert can_lower_scale(trainer) is helps


# -- Whole runs


def test_every_batch_of_an_epoch_can_be_read_again_by_its_number(small_shapes: Path) -> None:
    options = (f"data_root={small_shapes}", "batch_size_per_device=4", "workers=0")
    loader = build_data(compose_config([*SHORT, *options])).train_dataloader()
    sampler = loader.sampler
    for epoch in (0, 3):
        sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for number, batch in enumerate(loader):
            again = loader.dataset.__getitems__(sampler.keys(number))  # type: ignore[attr-defined]
            assert torch.equal(batch.images, again.images)
            assert torch.equal(batch.tokens, again.tokens)
            assert torch.equal(batch.masks, again.masks)
    assert number == 11


ACCUMULATED = ("batch_size_per_device=4", "workers=1")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="default"),
        pytest.param(ACCUMULATED, marks=pytest.mark.slow, id="accumulated"),
    ],
)
def test_an_image_with_nan_ends_the_run_before_its_step(
    options: tuple[str, ...],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "checkpoint_every=1", *options)
    run(monkeypatch, tmp_path / "whole", *overrides)
    capsys.readouterr()
    read, bad = ReferTrainSet.__getitems__, TrainKey(1, 7)
    bad_names: list[str] = []

    def read_nan(self: ReferTrainSet, keys: Sequence[TrainKey]) -> TrainBatch:
        batch = read(self, keys)
        if bad not in keys:
            return batch
        bad_names[:] = self.names(bad)
        images = batch.images.float()  # bytes cannot be NaN
        images[keys.index(bad), 0, 5, 5] = torch.nan
        return replace(batch, images=images)

    monkeypatch.setattr(ReferTrainSet, "__getitems__", read_nan)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *overrides)
    assert end.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    pattern = r"error: step (\d+) was not taken \(epoch 2, batch (\d+)\): loss nan"
    start = re.match(pattern, error)
    assert start
    step, number = map(int, start.groups())
    assert 7 <= step <= 12
    assert (number - 1) // (2 if options else 1) == step - 7
    assert "not finite: image_encoder." in error
    assert "encoders 0." in error
    assert "rest 0." in error
    assert f"resume={tmp_path}" in error
    assert bad_names[0] in error
    assert error.count(" of ref ") == (4 if options else 8)
    last = tmp_path / "run/checkpoints" / LAST
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == step - 1
    assert all(value.isfinite().all() for value in content["state_dict"].values())

    # With the data corrected, the run ends as if nothing had happened.
    monkeypatch.setattr(ReferTrainSet, "__getitems__", read)
    run(monkeypatch, tmp_path / "run", *overrides, "resume=auto")
    assert same_state(last, tmp_path / "whole/checkpoints" / LAST)


NOT_TAKEN = (
    r"step 2 was not taken \(epoch 1, batch 2\): loss \S+, norm of the gradients \S+ "
    r"First not finite: \S+ \("
)
NOT_SAVED = (
    r"the weights are no longer finite after step 1: model\.\S+, .* They are not saved; "
    r".*nothing had been saved"
)


@pytest.mark.parametrize(
    ("rate", "steps", "message"), [("1e30", 3, NOT_TAKEN), ("1e39", 1, NOT_SAVED)]
)
def test_a_rate_far_too_high_is_one_error_and_leaves_no_unusable_checkpoint(
    rate: str,
    steps: int,
    message: str,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = (f"recipe.optimizer.learning_rate={rate}", f"trainer.max_steps={steps}")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *SHORT, f"data_root={small_shapes}", *limits)
    assert end.value.code == 1
    assert re.search(f"error: {message}", capsys.readouterr().err)
    assert not list(tmp_path.glob("run/checkpoints/*"))
