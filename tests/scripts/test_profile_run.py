"""``scripts/profile_run.py``: times the calls of a run, and counts what it reads."""

from pathlib import Path

import pytest

from scripts import profile_run


def test_steps_and_batches_read_nothing_before_a_checkpoint_is_saved(
    small_shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_run.main(["--steps", "3", "--data-root", str(small_shapes)])
    page = capsys.readouterr().out
    training, evaluation = page.split("## Evaluation, per batch")
    assert "## Training, per step (3)" in training
    assert "[Strategy]SingleDeviceStrategy.backward | " in training
    assert "[Strategy]SingleDeviceStrategy.test_step | " in evaluation
    # Each weight is checked before it is saved, after the third step.
    [reads] = [line for line in training.splitlines() if line.startswith("Numbers of tensors")]
    assert reads.endswith(" in number 3.")
    assert reads.count(" in number ") == 1
    assert "Numbers of tensors that Python read: none." in evaluation
