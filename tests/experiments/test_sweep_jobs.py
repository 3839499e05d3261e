"""Jobs of a sweep and the files in their folders, without starting processes."""

import shutil
from pathlib import Path

import pytest

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.config import compose_config
from crislit.errors import InputError
from crislit.experiments.sweep import run_job
from crislit.training.run_folder import reserve
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
