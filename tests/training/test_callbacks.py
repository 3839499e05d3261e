"""Plots of samples, and the printed table of results."""

from pathlib import Path

import numpy as np
import pytest

from crislit.training.callbacks import draw_sample
from crislit.training.evaluation import print_results
from crislit.training.metrics import METRICS


@pytest.mark.parametrize(
    "sentence", ["the $_$ sign", "cost $5 {or $10", "50 % \\frac", "猫", "a < b & c"]
)
def test_any_sentence_can_be_drawn(sentence: str, tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 100, dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 10:30] = 1
    for prediction in (mask, np.zeros_like(mask), np.ones_like(mask)):
        draw_sample(image, sentence, mask, prediction).savefig(tmp_path / "sample.png")


def test_the_table_of_results_fits_eighty_columns_and_has_every_number(
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
