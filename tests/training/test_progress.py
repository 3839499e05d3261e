"""A run prints five lines when it starts, progress, and nothing of Lightning's."""

import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from crislit.config import compose_config
from crislit.training import progress
from crislit.training.build import build_model
from crislit.training.progress import format_seconds
from crislit.training.terminal import (
    IGNORED_MESSAGES,
    TerminalFormatter,
    log_warnings,
    quiet_lightning,
)
from crislit.training.threads import choose_threads
from tests.runs import run

SHORT = (
    *("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]"),
    *("decoder.layers=1", "trainer=cpu", "recipe.epochs=1", "logger=none"),
    "dataset.evaluation_splits=[val]",
)


def test_durations_are_hours_minutes_and_seconds() -> None:
    shown = {0: "0:00", 7.4: "0:07", 59.6: "1:00", 125: "2:05", 3600: "1:00:00", 90061: "25:01:01"}
    assert {seconds: format_seconds(seconds) for seconds in shown} == shown


def test_a_run_says_what_it_starts_with_where_it_is_and_what_it_took(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    monkeypatch.setattr("tests.runs.QUICK", ("workers=0", "callbacks.pictures=0"))
    run(monkeypatch, tmp_path / "run", *SHORT, f"data_root={small_shapes}")
    out, err = capsys.readouterr()
    for line in (
        r"device: .*, \d+ threads?",
        r"data: shapes, 48 training sentences per epoch, validated on val",
        r"network: 5\.2 million parameters, starts from tiny-clip \(sha256 \w{16}\)",
        r"steps: 6 of 8 sentences, 1 epoch",
        rf"folder: {tmp_path}/run",
        r"epoch 1 of 1, step 3 of 6: loss \d\.\d{3}, \d:\d\d left",
        rf"\d:\d\d in all; results, checkpoints and figures are in {tmp_path}/run",
    ):
        assert re.search(line, out), line
    for text in (*IGNORED_MESSAGES, "FLOPs", "site-packages", "━"):
        assert text not in err, text


def test_bars_count_the_steps_of_the_run_and_name_the_blind_control(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    def open_bar(name: str, total: int, unit: str, done: int = 0, leave: bool = True) -> Any:
        bar = tqdm(None, name, total, initial=done, file=io.StringIO())
        bars.append(bar)
        return bar

    monkeypatch.setattr(progress, "open_bar", open_bar)
    monkeypatch.setattr("tests.runs.QUICK", ("workers=0", "callbacks.pictures=0"))
    options = (*SHORT, f"data_root={small_shapes}", "recipe.epochs=2")
    run(monkeypatch, tmp_path / "run", *options)
    shown = [(bar.desc.strip(": "), bar.n, bar.total) for bar in bars]
    assert shown[0] == ("training", 12, 12)
    assert [name for name, _, _ in shown[1:]] == [
        *("validating", "validating", "evaluating val", "evaluating val, blind control")
    ]
    assert all(done == total for _, done, total in shown)
    more = (f"resume={tmp_path}/run/checkpoints/last.ckpt", "recipe.epochs=3")
    bars.clear()
    run(monkeypatch, tmp_path / "more", *options, *more)
    assert (bars[0].initial, bars[0].n, bars[0].total) == (12, 18, 18)


def test_warnings_are_marked_on_the_terminal() -> None:
    lines = [
        TerminalFormatter().format(logging.LogRecord("a", level, "", 0, "text %d", (1,), None))
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
    ]
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", x) for x in lines] == [
        *("text 1", "warning: text 1", "error: text 1")
    ]


def test_warnings_of_libraries_are_messages_without_a_place(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        log_warnings()
        warnings.simplefilter("always")
        warnings.warn("precision=16 is discouraged", stacklevel=1)
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, "precision=16 is discouraged")
    assert "UserWarning" not in capsys.readouterr().err  # as Python prints it, with its place


def test_messages_that_a_user_cannot_act_on_are_not_printed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    filters = list(logger.filters)
    try:
        quiet_lightning()
        with caplog.at_level(logging.INFO):
            for text in IGNORED_MESSAGES:
                logger.info("%s: more", text)
            logger.info("a message of another kind")
    finally:
        logger.filters[:] = filters
    assert [record.getMessage() for record in caplog.records] == ["a message of another kind"]


@pytest.mark.parametrize(
    ("model", "variable", "expected"),
    [("tiny", None, 1), ("tiny", "2", 2), ("rn50", None, 2)],
)
def test_small_networks_compute_with_one_thread(
    model: str, variable: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        network = build_model(compose_config([f"model={model}"]))
    threads: list[int] = [2]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    choose_threads(network, torch.device("cpu"))
    assert threads[-1] == expected
    choose_threads(network, torch.device("cuda"))
    assert threads[-1] == expected
