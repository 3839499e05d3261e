"""A number that makes no sense ends a training before it reaches the weights, and is traced to where it came from."""

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
from tests.training.test_resume import same_state

SMALL = (
    "dataset=shapes",
    "image_size=64",
    "batch_size=8",
    "model.neck=[16,64,32]",
    "decoder.layers=1",
    "trainer=cpu",
)
SHORT = (
    *SMALL,
    "recipe.epochs=2",
    "callbacks.pictures=0",
    "threshold=0.15",
    "dataset.evaluation_splits=[val]",
)


@pytest.fixture
def task() -> CRISTask:
    torch.manual_seed(0)
    task = CRISTask(build_cris(CRISConfig(**SIZES))).train()
    for module in task.model.modules():
        if isinstance(module, Bottleneck):  # whose zeros would hide what comes before
            nn.init.ones_(module.bn3.weight)
    return task


@pytest.fixture
def batch() -> TrainBatch:
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    masks[:, :, 16:40, 8:48] = 255
    return TrainBatch(bytes_of(random_images(4)), sentences(1, 3, 5, 6), masks)


# -- Where it came from -------------------------------------------------------------------------------------------------------


class InfiniteGradient(torch.autograd.Function):
    """Passes a tensor on, and infinity back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.inf)


def spoil(value: Any, harm: Callable[[Tensor], Tensor]) -> Any:
    """Harm a tensor, or the first of several."""
    return (
        harm(value)
        if isinstance(value, Tensor)
        else type(value)([spoil(value[0], harm), *value[1:]])
    )


def places(task: CRISTask, batch: TrainBatch) -> list[tuple[str, nn.Module]]:
    """Modules that a forward pass calls and whose output counts, by name."""
    called: dict[str, nn.Module] = {}

    def note(name: str, module: nn.Module, *_: Any) -> None:
        called.setdefault(name, module)

    handles = [
        module.register_forward_hook(partial(note, name))
        for name, module in task.model.named_modules()
    ]
    task.loss(batch)
    for handle in handles:
        handle.remove()
    return list(called.items())


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_whatever_module_makes_the_first_such_number_is_named(
    which: str, task: CRISTask, batch: TrainBatch
) -> None:
    harm = {"forward": lambda x: x * torch.nan, "backward": InfiniteGradient.apply}[which]
    found = places(task, batch)
    assert len(found) > 80
    for name, module in found[::-6]:  # the network itself, then one in six
        handle = module.register_forward_hook(lambda _, __, output: spoil(output, harm))
        _, where = first_non_finite(task, batch)
        handle.remove()
        assert where == f"{name or 'the network'} ({type(module).__name__}), in the {which} pass"


def test_a_healthy_batch_is_found_healthy_and_leaves_weights_and_gradients_alone(
    task: CRISTask, batch: TrainBatch
) -> None:
    before = [parameter.clone() for parameter in task.parameters()]
    loss, where = first_non_finite(task, batch)
    assert where is None
    assert 0 < loss < 10
    assert all(torch.equal(a, b) for a, b in zip(before, task.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in task.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in task.model.modules()
    )


def test_weights_and_the_loss_are_named_too(task: CRISTask, batch: TrainBatch) -> None:
    def where(changed: TrainBatch = batch) -> str | None:
        return first_non_finite(task, changed)[1]

    huge = torch.full(batch.masks.shape, torch.inf)
    assert where(TrainBatch(batch.images, batch.tokens, huge)) == "the loss, in the forward pass"
    with torch.no_grad():
        next(task.model.neck.parameters()).flatten()[0] = torch.nan
    name = next(name for name, _ in task.model.named_parameters() if name.startswith("neck."))
    assert where() == f"the weights themselves, {name}"


class Divides(nn.Module):
    """Calls two parts, and divides by zero between them or behind them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(2, 2), nn.Linear(2, 2), between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x)
        y = self.two(y / 0 if self.between else y)
        return y if self.between else y / 0


@pytest.mark.parametrize("between", [True, False])
def test_what_a_module_does_itself_is_not_blamed_on_its_parts(between: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Divides(between))
    trace = NanTracer(model)
    model(torch.ones(1, 2))
    trace.close()
    assert trace.where == "1 (Divides), in the forward pass"


@pytest.mark.parametrize(
    ("scale", "helps"), [(65536.0, True), (1.0, True), (0.5, False), (None, False)]
)
def test_a_scaler_is_trusted_until_its_scale_falls_below_one(
    scale: float | None, helps: bool
) -> None:
    plugin = (
        SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
        if scale
        else SimpleNamespace()
    )
    trainer: Any = SimpleNamespace(precision_plugin=plugin)
    assert can_lower_scale(trainer) is helps


# -- Whole runs ---------------------------------------------------------------------------------------------------------------


def test_every_batch_of_an_epoch_is_found_again_by_its_number(small_shapes: Path) -> None:

    data = build_data(
        compose_config(
            [*SHORT, f"data_root={small_shapes}", "batch_size_per_device=4", "workers=0"]
        )
    )
    loader = data.train_dataloader()
    sampler = loader.sampler
    for epoch in (0, 3):
        sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for number, batch in enumerate(loader):
            again = loader.dataset.__getitems__(sampler.keys(number))  # type: ignore[attr-defined]
            assert torch.equal(batch.images, again.images)
            assert torch.equal(batch.tokens, again.tokens)
            assert torch.equal(batch.masks, again.masks)
    assert number == 11


@pytest.mark.parametrize(
    "options",
    [(), pytest.param(("batch_size_per_device=4", "workers=1"), marks=pytest.mark.slow)],
    ids=["plain", "accumulated"],
)
def test_a_picture_of_nan_ends_the_run_before_it_is_learnt_from(
    options: tuple[str, ...],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (*SHORT, f"data_root={small_shapes}", "checkpoint_every=1", *options)
    run(monkeypatch, tmp_path / "whole", *overrides)
    capsys.readouterr()
    healthy = ReferTrainSet.__getitems__
    spoilt: list[str] = []

    def read(self: ReferTrainSet, keys: Sequence[TrainKey]) -> TrainBatch:
        batch = healthy(self, keys)
        if TrainKey(1, 7) not in keys:
            return batch
        spoilt[:] = self.names(TrainKey(1, 7))
        images = batch.images.float()  # stands for whatever may make one: bytes have none
        images[keys.index(TrainKey(1, 7)), 0, 5, 5] = torch.nan
        return replace(batch, images=images)

    monkeypatch.setattr(ReferTrainSet, "__getitems__", read)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *overrides)
    assert end.value.code == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    start = re.match(r"error: step (\d+) was not taken \(epoch 2, batch (\d+)\): loss nan", told[0])
    assert start
    step, number = map(int, start.groups())
    assert 7 <= step <= 12
    assert (number - 1) // (2 if options else 1) == step - 7
    for expected in (
        "not finite: image_encoder.",
        "encoders 0.",
        "rest 0.",
        f"resume={tmp_path}",
        spoilt[0],
    ):
        assert expected in told[0]
    assert told[0].count(" of ref ") == (4 if options else 8)
    last = tmp_path / "run/checkpoints" / LAST
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == step - 1
    assert all(value.isfinite().all() for value in content["state_dict"].values())

    monkeypatch.setattr(
        ReferTrainSet, "__getitems__", healthy
    )  # the data mended: as if nothing had been
    run(monkeypatch, tmp_path / "run", *overrides, "resume=auto")
    assert same_state(last, tmp_path / "whole/checkpoints" / LAST)


@pytest.mark.parametrize(
    ("rate", "steps", "expected"),
    [
        (
            "1e30",
            3,
            r"step 2 was not taken \(epoch 1, batch 2\): loss \S+, norm of the gradients \S+ First not finite: \S+ \(",
        ),
        (
            "1e39",
            1,
            r"the weights are no longer finite after step 1: model\.\S+, .* They are not saved; .*nothing had been saved",
        ),
    ],
)
def test_a_rate_far_too_high_is_one_error_and_leaves_no_spoilt_checkpoint(
    rate: str,
    steps: int,
    expected: str,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = (f"recipe.optimizer.learning_rate={rate}", f"trainer.max_steps={steps}")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", *SHORT, f"data_root={small_shapes}", *limits)
    assert end.value.code == 1
    assert re.search(f"error: {expected}", capsys.readouterr().err)
    assert not list(tmp_path.glob("run/checkpoints/*"))
