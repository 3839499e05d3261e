"""A run that continues on a GPU: exact with deterministic operations, close without them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.training.checkpointing import LAST, LastCheckpoint
from tests.runs import run
from tests.training.gpu import support
from tests.training.gpu.support import SHORT, read_checkpoint, read_losses

pytestmark = support.MARKS

STEPS = 20
"""Steps of the whole run; an epoch has 12."""


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Undo trainer.deterministic, which Lightning leaves to the process."""
    yield
    torch.use_deterministic_algorithms(False)


def whole_and_resumed(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[Path, Path]:
    """Train without an interruption, and again from its checkpoint in the middle of an epoch.

    Returns:
        The folders of the two runs.
    """
    whole, place = folder / "whole", folder / "run"
    overrides = (
        *(f"data_root={root}", f"trainer={support.TRAINER}", *SHORT, f"trainer.max_steps={STEPS}"),
        *("recipe.epochs=2", "checkpoint_every=7", "resume=auto", *options),
    )
    save = LastCheckpoint.save

    def save_and_copy(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        if trainer.global_step == 7:
            shutil.copytree(place, folder / "copy")

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "save", save_and_copy)
        run(monkeypatch, place, *overrides)
    place.rename(whole)
    (folder / "copy").rename(place)
    assert read_checkpoint(place / "checkpoints" / LAST)["global_step"] == 7
    run(monkeypatch, place, *overrides)
    return whole, place


def resumed_losses(folder: Path) -> list[float]:
    """Return the losses of the steps that the second run took itself."""
    losses = read_losses(folder)
    return [losses[step] for step in range(7, STEPS)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_deterministic_run_continues_bit_for_bit(
    precision: str, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 128 is the native size of the encoder: resizing its positions (bicubic) has no deterministic
    # backward pass. All other operations have one: see torch.use_deterministic_algorithms.
    options = (f"trainer.precision={precision}", "+trainer.deterministic=true", "image_size=128")
    whole, resumed = whole_and_resumed(small_shapes, tmp_path, monkeypatch, *options)
    first, second = (read_checkpoint(path / "checkpoints" / LAST) for path in (whole, resumed))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    states = [content["optimizer_states"][0]["state"] for content in (first, second)]
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())
    assert resumed_losses(whole) == resumed_losses(resumed)
    scaler = first.get("MixedPrecision")
    assert scaler == second.get("MixedPrecision")
    assert (precision == "16-mixed") == bool(scaler)


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 0.001), ("16-mixed", 0.03)])
def test_a_run_continues_up_to_rounding(
    precision: str,
    bound: float,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # At a rate so low that Adam hardly amplifies rounding. On a CPU, another order of sums changes
    # these losses by 0.00007 in float32 and by 0.013 in float16, other batches by 0.1.
    options = (f"trainer.precision={precision}", "recipe.optimizer.learning_rate=1e-5")
    whole, resumed = whole_and_resumed(small_shapes, tmp_path, monkeypatch, *options)
    expected, losses = resumed_losses(whole), resumed_losses(resumed)
    print(f"relative: {max(abs(b / a - 1) for a, b in zip(expected, losses, strict=True))}")
    assert losses == pytest.approx(expected, rel=bound)
    before, after = (read_checkpoint(path / "checkpoints" / LAST) for path in (whole, resumed))
    for name in ("global_step", "epoch", "lr_schedulers"):
        assert before[name] == after[name]
    assert ("MixedPrecision" in after) == (precision == "16-mixed")
