"""``crislit.train_network`` is the command, without Hydra's run folders."""

import logging
from pathlib import Path
from typing import Any

import pytest

import crislit
from crislit.training import run_folder
from crislit.training.terminal import log_to
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
    assert "epoch 1 of 1" in (tmp_path / "python/train.log").read_text()
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
        (["datset=shapes"], "datset is not a setting, did you mean dataset"),
        (["model=rn5"], "did you mean model=rn50"),
        (["epochs=1"], "did you mean recipe.epochs"),
        (["--epochs=1"], "--epochs is not an option: write recipe.epochs=VALUE"),
        (["model=tiny dataset=shapes"], "cannot read the argument|Could not find"),
        (["dataset=null"], "dataset=null is not a choice"),
        (["data.jsonl"], "expected KEY=VALUE"),
        (["+decoder.dropuot=0.9"], "did you mean decoder.dropout"),
        (["+trainer.accumulate_grad_batches=4"], "batch_size_per_device"),
        (["decoder.layers=-1"], "decoder.layers"),
    ],
)
def test_a_wrong_setting_is_one_error(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(crislit.InputError, match=message) as error:
        crislit.train_network([*overrides, f"data_root={tmp_path}"], tmp_path / "run")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [], "a refused call leaves nothing behind"


@pytest.mark.parametrize("overrides", ["model=tiny", {"model": "tiny"}, [1], None, ("a", 2)])
def test_overrides_are_a_list_of_strings(overrides: Any, tmp_path: Path) -> None:
    with pytest.raises(crislit.InputError, match=r'list of strings, such as \["model=tiny"\], got'):
        crislit.train_network(overrides, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_messages_go_to_a_file_and_to_the_terminal_or_to_the_programs_own_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("crislit")
    before = (logger.level, list(logger.handlers))
    cases: dict[str, list[logging.Handler]] = {"plain": [], "program": [logging.NullHandler()]}
    for name, handlers in cases.items():
        monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
        with log_to(tmp_path / name):
            logging.getLogger("crislit.training.run").info("a message of %s", name)
        text = (tmp_path / name).read_text()
        assert text.rstrip().endswith(f"[crislit.training.run][INFO] - a message of {name}")
        assert (f"a message of {name}" in capsys.readouterr().out) == (name == "plain")
        assert (logger.level, list(logger.handlers)) == before


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    reserved = run_folder.reserve(tmp_path / "run", "folder")
    try:
        with pytest.raises(crislit.InputError, match="is in use by process"):
            crislit.train_network([*TINY, write_custom(tmp_path / "own")], tmp_path / "run")
    finally:
        reserved.release()
