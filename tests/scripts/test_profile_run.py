"""``scripts/profile_run.py``: times the calls of a run, and counts what it reads."""

from pathlib import Path

import pytest

from scripts import profile_run


def test_steps_read_nothing_before_a_checkpoint_and_batches_their_probabilities_once(
    small_shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_run.main(["--steps", "3", "--data-root", str(small_shapes)])
    page = capsys.readouterr().out
    training, evaluation = page.split("## Evaluation, per batch")
    assert "## Training, per step (3)" in training
    assert "[Strategy]SingleDeviceStrategy.backward | " in training
    assert "[Strategy]SingleDeviceStrategy.test_step | " in evaluation
    # The third step is checked, and saved.
    [reads] = [line for line in training.splitlines() if line.startswith("Reads of a tensor's")]
    assert reads.endswith(" in number 3.")
    assert reads.count(" in ") == 1
    assert "Reads of a tensor's values by Python: 1 in each." in evaluation
