"""``crislit.train_network`` is the command, without Hydra's run folders."""

from pathlib import Path

import pytest

import crislit
from crislit.training import run_folder
from tests.runs import QUICK, run
from tests.training.test_data_identity import TINY, write_custom


def test_training_from_python_gives_the_results_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_custom(tmp_path / "own")
    results = crislit.train_network([*QUICK, *TINY, data], tmp_path / "python")
    expected = run(monkeypatch, tmp_path / "command", *TINY, data)
    for name in ("splits", "experiment", "data", "steps", "initial_weights"):
        assert results[name] == expected[name], name
    best = tmp_path / "python/checkpoints/best.ckpt"
    segmenter = crislit.load(best)
    assert segmenter(tmp_path / "own/0.png", "the red disc")[0].mask.shape == (40, 60)
    with pytest.raises(crislit.InputError, match="is not empty: choose a new folder"):
        crislit.train_network([*QUICK, *TINY, data], tmp_path / "python")
    again = crislit.train_network([*QUICK, *TINY, data, "resume=auto"], tmp_path / "python")
    assert again == results


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=custom"], "dataset.file"),
        (["datset=shapes"], "datset"),
        (["model=rn5"], "rn5"),
        (["+decoder.dropuot=0.9"], "did you mean decoder.dropout"),
        (["+trainer.accumulate_grad_batches=4"], "batch_size_per_device"),
        (["decoder.layers=-1"], "decoder.layers"),
    ],
)
def test_a_wrong_setting_is_one_error(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(crislit.InputError, match=message) as error:
        crislit.train_network([*overrides, f"data_root={tmp_path}"], tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    reserved = run_folder.reserve(tmp_path / "run", "folder")
    try:
        with pytest.raises(crislit.InputError, match="is in use by process"):
            crislit.train_network([*TINY, write_custom(tmp_path / "own")], tmp_path / "run")
    finally:
        reserved.release()
