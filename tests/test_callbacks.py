"""What a run leaves in its folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn

from crislit.callbacks import LastCheckpoint, draw_sample, print_results
from crislit.metrics import METRICS


@pytest.mark.parametrize("sentence", ["the $_$ sign", "cost $5 {or $10", "50 % \\frac", "猫", "a < b & c"])
def test_any_sentence_can_be_drawn(sentence: str, tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 10:30] = 1
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for prediction in (mask, np.zeros_like(mask), np.ones_like(mask)):
            draw_sample(image, sentence, mask, prediction).savefig(tmp_path / "sample.png")


def test_the_table_fits_eighty_columns_and_shows_every_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    values = {"samples": 10834, "empty": 0, **dict.fromkeys(METRICS, 0.98765)}
    results = {
        "threshold": 0.35,
        "protocol": "all_sentences",
        "splits": {"testA": values},
        "blind": {"testA": {"mIoU": 0.1234}},
        "ceiling": {"testA": {"mIoU": 0.76543}},
    }
    print_results(results)
    table = capsys.readouterr().out
    assert all(text in table for text in ("testA", "10834", "98.77", "12.34", "76.54"))
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "…" not in table


class FakeTrainer:
    """As much of a trainer as the callback asks for."""

    def __init__(self, step: int, fn: TrainerFn) -> None:
        self.global_step, self.is_global_zero, self.sanity_checking = step, True, False
        self.state = SimpleNamespace(fn=fn)
        self.strategy = SimpleNamespace(
            save_checkpoint=lambda content, path: Path(path).write_text(content), barrier=lambda: None
        )
        self._checkpoint_connector = SimpleNamespace(dump_checkpoint=lambda weights_only: f"step {self.global_step}")

    def save_checkpoint(self, path: Path) -> None:
        path.write_text(f"step {self.global_step}")


def test_an_interruption_saves_in_training_and_validation_but_not_in_evaluation(tmp_path: Path) -> None:
    trainer: Any = FakeTrainer(7, TrainerFn.FITTING)
    last = LastCheckpoint(tmp_path / "checkpoints/last.ckpt", every=1000)
    last.on_exception(trainer, trainer, KeyboardInterrupt())
    assert last.path.read_text() == "step 7"
    last.path.unlink()
    last.on_exception(FakeTrainer(9, TrainerFn.TESTING), trainer, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not last.path.exists()


def test_the_last_checkpoint_is_written_every_so_many_steps_and_never_half(tmp_path: Path) -> None:
    last = LastCheckpoint(tmp_path / "last.ckpt", every=5)
    for step, expected in ((3, None), (5, "step 5"), (9, "step 5"), (10, "step 10")):
        trainer: Any = FakeTrainer(step, TrainerFn.FITTING)
        last.on_train_batch_end(trainer, trainer, None, None, 0)
        assert (last.path.read_text() if last.path.exists() else None) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
