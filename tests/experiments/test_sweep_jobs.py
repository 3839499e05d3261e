"""Jobs of a sweep and the files in their folders, without starting processes."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from crislit import evaluate, train
from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.config import compose_config
from crislit.errors import InputError
from crislit.experiments import sweep
from crislit.experiments.sweep import run_job
from crislit.training.provenance import fingerprint
from crislit.training.run_folder import reserve
from crislit.training.sweep_jobs import expand
from tests.runs import run


@pytest.fixture(scope="module")
def small_checkpoint(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    sizes = ("batch_size=8", "image_size=64", "trainer.max_steps=1", "model.clip_weights=null")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, f"data_root={small_shapes}", *sizes)
    return folder / "checkpoints/last.ckpt"


def test_only_an_interrupted_run_of_the_same_job_is_removed(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crislit.experiments.sweep.run_process", lambda *_: 7)
    own = read_checkpoint(small_checkpoint).config | {"record": None}
    for name, seed in (("same", own["seed"]), ("foreign", own["seed"] + 1)):
        checkpoints = tmp_path / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        copy = checkpoints / "last.ckpt"
        shutil.copyfile(small_checkpoint, copy)
        message = "failed with exit code 7" if name == "same" else "holds another run, see"
        with pytest.raises(InputError, match=message):
            run_job(own | {"seed": seed}, [], tmp_path / name, "group")
        assert copy.exists() == (name == "foreign")
        assert not (tmp_path / name / ".lock").exists()


def test_a_job_that_still_runs_keeps_its_checkpoints(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    config = read_checkpoint(small_checkpoint).config | {"record": None}
    (tmp_path / "checkpoints").mkdir()
    copy = Path(shutil.copyfile(small_checkpoint, tmp_path / "checkpoints/last.ckpt"))
    reserved = reserve(tmp_path, "hydra.run.dir")
    with pytest.raises(InputError, match=r"in use by process .* choose another hydra.sweep.dir"):
        run_job(config, [], tmp_path, "group")
    reserved.release()
    assert copy.exists()


def test_a_record_that_cannot_be_written_is_an_error_before_a_job_starts(tmp_path: Path) -> None:
    (tmp_path / "record.csv").mkdir()
    config = compose_config([f"record={tmp_path / 'record.csv'}"])
    with pytest.raises(InputError, match=r"record\.csv"):
        run_job(config, [], tmp_path / "job", "group")
    assert not (tmp_path / "job").exists()


# -- Before the first job


def start_sweep(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, program: str = "train"
) -> None:
    """Start a sweep in this process."""
    options = ["-m", f"hydra.sweep.dir={folder}", "hydra/job_logging=stdout"]
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *options, *overrides])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    {"train": train, "evaluate": evaluate}[program].main()


@pytest.mark.parametrize(
    ("arguments", "jobs"),
    [
        ([], [([], [])]),
        (["seed=1"], [(["seed=1"], [])]),
        (["a=1,2", "b=x"], [(["a=1", "b=x"], ["a=1"]), (["a=2", "b=x"], ["a=2"])]),
        (["a=1,2", "b=x,y"], [2 * ([f"a={a}", f"b={b}"],) for a in "12" for b in "xy"]),
        (["seed=range(3)"], [2 * ([f"seed={n}"],) for n in range(3)]),
        (["a='1,2'", "b=[3,4]"], [(["a='1,2'", "b=[3,4]"], [])]),
        (["a=1,2", "a=3"], [(["a=3"], [])]),  # the last one counts
        (["+a=choice(1,2)", "~b"], [([f"+a={n}", "~b=null"], [f"+a={n}"]) for n in (1, 2)]),
    ],
)
def test_every_combination_of_values_is_a_job(
    arguments: Sequence[str], jobs: Sequence[tuple[list[str], list[str]]]
) -> None:
    assert expand(arguments) == jobs


def test_the_sweep_of_the_readme_has_a_job_for_each_row_and_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, str]] = []

    def record(config: dict[str, Any], *_: Any, **__: Any) -> float:
        started.append((config["dataset"]["name"], str(config["decoder"]["layers"])))
        return 0.0

    monkeypatch.setattr(sweep, "run_job", record)
    options = ("ablation=glob(*)", "dataset=shapes,gshapes", "model.clip_weights=null")
    start_sweep(monkeypatch, tmp_path / "sweep", *options, "hydra.sweep.subdir=x${hydra:job.num}")
    assert len(started) == 14
    assert len(set(started)) == 2 * 5  # two rows each have no decoder, and one layer
    assert {path.name for path in tmp_path.glob("sweep/*/")} >= {f"x{n}" for n in range(14)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoder.layers=1,2,x"], "decoder.layers must be a whole number, .*'x'"),
        (["decoder.layers=1,-1"], "decoder.layers must be a whole number"),
        (["recipe.optimizer.learning_rate=1e-4,fast"], "learning_rate must be a positive number"),
        (["threshold=0.3,1.5"], r"threshold must be a number in \[0, 1\)"),
        (["image_size=64,65"], "image_size must be .*multiple of 32"),
        (["seed=0,-1"], "seed must be"),
        (["recipe.optimizer.learning_rate=interval(1e-4,1e-3)"], "has no list of values: write"),
        (["image_size=64", "seed=0,-1"], r"\(in the job seed=-1\)$"),
        (["rearrange=true,maybe"], "rearrange must be true or false"),
        (["trainer.max_epochs=1,two"], "recipe.epochs \\(trainer.max_epochs\\) must be"),
        (["model=tiny,rn5"], "Could not find 'model/rn5', did you mean model=rn50"),
        (["+trainer.max_step=1,2"], "did you mean trainer.max_steps"),
        (["+dataset.max_word=1,2"], "dataset.max_word is not a setting"),
        (["augment=flip_color,none", "+augment.flop=1"], "augment.flop is not a setting"),
    ],
)
def test_a_bad_value_of_any_job_ends_the_sweep_before_it_writes(
    overrides: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep, "run_process", None)
    with pytest.raises(SystemExit):
        start_sweep(monkeypatch, tmp_path / "sweep", "model.clip_weights=null", *overrides)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_in_the_folder_of_another_one_changes_none_of_its_files(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config(["seed=1", "model.clip_weights=null"])
    prints = fingerprint(config, "0" * 16)  # the data's digest plays no part here
    finished, killed = tmp_path / "sweep/0", tmp_path / "sweep/1"
    (finished / ".hydra").mkdir(parents=True)
    (finished / ".hydra/config.yaml").write_text("seed: 1")
    (tmp_path / "sweep/multirun.yaml").write_text("seed: 1,2")
    (finished / "results.json").write_text(json.dumps({**prints, "config": config}))
    (killed / "checkpoints").mkdir(parents=True)
    shutil.copyfile(small_checkpoint, killed / "checkpoints/last.ckpt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(sweep, "run_process", None)
    for seeds in ("2,1", "1,7"):  # the results are of seed 1, the checkpoint of seed 0
        with pytest.raises(SystemExit):
            start_sweep(monkeypatch, tmp_path / "sweep", f"seed={seeds}", "model.clip_weights=null")
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_sweep_of_evaluations_does_not_overwrite_an_earlier_one(
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/results.json").write_text("{}")
    options = (f"checkpoint={small_checkpoint}", "split=val,testA")
    with pytest.raises(SystemExit):
        start_sweep(monkeypatch, tmp_path, *options, program="evaluate")
    assert "1 holds an earlier run; choose another hydra.sweep.dir" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_a_record_of_a_single_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"record={tmp_path / 'record.csv'}")
    assert "error: record=FILE records the runs of a sweep: add -m" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
