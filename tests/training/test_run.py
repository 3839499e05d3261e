"""A run is five calls: start, build, fit, evaluate, write."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.config import compose_config
from crislit.errors import InputError
from crislit.training import build_data
from crislit.training import run as steps
from crislit.training.checkpointing import LAST
from crislit.training.provenance import fingerprint
from crislit.training.settings import Config
from tests.runs import QUICK, run
from tests.training.test_resume import SHORT, same_weights

ONE_EPOCH = (*SHORT, "recipe.epochs=1")


@pytest.fixture
def config(small_shapes: Path) -> Config:
    """A configuration of one epoch of six steps."""
    return compose_config([*QUICK, *ONE_EPOCH, f"data_root={small_shapes}"])


def begin(config: Config, folder: Path) -> steps.Start:
    started = steps.start(config, folder)
    assert isinstance(started, steps.Start)
    return started


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Return results without the values that differ from run to run."""
    different = ("seconds", "fps", "overrides", "checkpoint")
    return {name: value for name, value in results.items() if name not in different}


def test_the_five_calls_are_the_run_of_the_command(
    config: Config, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "calls"
    started = begin(config, folder)
    assert started.fingerprint == fingerprint(config, started.data.index.digest)
    assert started.resume is None
    training = steps.build(started)
    steps.fit(training)
    assert training.trainer.global_step == 6
    results = steps.evaluate(training)
    score = steps.write(training, results, ["threshold=0.15"])

    written = json.loads((folder / "results.json").read_text())
    assert written == results
    assert written["overrides"] == ["threshold=0.15"]
    assert score == written["splits"]["val"]["mIoU"]
    expected = run(monkeypatch, tmp_path / "run", *ONE_EPOCH, f"data_root={small_shapes}")
    assert without_times(written) == without_times(expected)
    checkpoints = (folder / "checkpoints" / LAST, tmp_path / "run/checkpoints" / LAST)
    assert same_weights(*checkpoints)


def test_run_makes_the_five_calls_in_order(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for name in ("start", "build", "fit", "evaluate", "write"):

        def call(*arguments: Any, name: str = name) -> str:
            calls.append((name, arguments))
            return f"result of {name}"

        monkeypatch.setattr(steps, name, call)
    assert steps.run(config, tmp_path, ["seed=0"]) == "result of write"  # type: ignore[comparison-overlap]
    assert calls == [
        ("start", (config, tmp_path)),
        ("build", ("result of start",)),
        ("fit", ("result of build",)),
        ("evaluate", ("result of build",)),
        ("write", ("result of build", "result of evaluate", ["seed=0"])),
    ]


def test_a_finished_run_needs_only_the_first_call(config: Config, tmp_path: Path) -> None:
    config = config | {"resume": "auto"}
    prints = fingerprint(config, build_data(config).index.digest)
    results = prints | {"splits": {"val": {"mIoU": 0.5}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert steps.start(config, tmp_path) == 0.5
    assert steps.run(config, tmp_path) == 0.5
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is damaged"):
        steps.start(config, tmp_path)


def test_settings_and_data_are_checked_before_anything_is_built(
    config: Config, tmp_path: Path
) -> None:
    for change, message in (
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"resume": "gone.ckpt"}, r"no checkpoint at gone\.ckpt"),
        ({"dataset": config["dataset"] | {"embedded": False}}, "shapes is not at"),
    ):
        with pytest.raises(InputError, match=message):
            steps.start(config | change, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_the_initial_weights_of_its_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    first = steps.build(begin(config, tmp_path / "first"))
    steps.fit(first)
    assert first.task.metadata["initial_weights"].startswith("tiny-clip (sha256 ")
    last = tmp_path / "first/checkpoints" / LAST
    resumed = begin(config | {"resume": str(last)}, tmp_path / "resumed")
    assert resumed.resume is not None
    assert (resumed.resume.steps, resumed.resume.weights) == (6, {})
    training = steps.build(resumed)
    assert training.task.metadata["initial_weights"] == first.task.metadata["initial_weights"]
    with pytest.raises(InputError, match="no step was taken beyond step 6"):
        steps.fit(training)


def test_the_best_weights_are_evaluated_and_the_last_ones_without_a_validation(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = steps.build(begin(config, tmp_path))
    steps.fit(training)
    best = tmp_path / "checkpoints/best.ckpt"
    for parameter in training.task.model.parameters():
        parameter.data.zero_()
    results = steps.evaluate(training)
    assert (results["checkpoint"], results["steps"]) == (str(best), 6)
    weights = read_checkpoint(best).weights
    state = training.task.model.state_dict()
    assert all(torch.equal(state[name].cpu(), weights[name]) for name in weights)
    best.unlink()
    with caplog.at_level(logging.WARNING):
        results = steps.evaluate(training)
    assert results["checkpoint"] == str(tmp_path / "checkpoints" / LAST)
    assert "no best.ckpt, evaluating the last weights" in caplog.text
