"""A run's numbers are labeled with the digest of the sentences and masks that it saw."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.config import compose_config
from crislit.errors import InputError
from crislit.training.checkpointing import LAST
from crislit.training.provenance import fingerprint
from crislit.training.resume import check_same_run
from tests.runs import run

TINY = (
    *("dataset=custom", "model=tiny", "recipe=shapes", "recipe.epochs=1", "batch_size=4"),
    *("image_size=32", "trainer=cpu", "model.neck=[16,64,32]", "decoder.layers=1", "logger=none"),
)


def write_custom(folder: Path, word: str = "disc", column: int = 10) -> str:
    """Write four images with one object each; return the override that names them."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(4):
        image = np.full((40, 60, 3), 40 * number, dtype=np.uint8)
        mask = np.zeros((40, 60), dtype=bool)
        mask[10:30, column : column + 20] = True
        PIL.Image.fromarray(image).save(folder / f"{number}.png")
        PIL.Image.fromarray(mask).save(folder / f"{number}-mask.png")
        sample = {"image": f"{number}.png", "mask": f"{number}-mask.png"}
        sentences = [f"the red {word}", f"{word} {number}"]
        for split in ("train", "val"):
            lines.append({**sample, "sentences": sentences, "split": split})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"dataset.file={folder}/data.jsonl"


@pytest.mark.parametrize("change", [{"word": "circle"}, {"column": 12}], ids=["sentence", "mask"])
def test_changed_data_are_never_taken_for_those_of_an_earlier_run(
    change: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, folder = write_custom(tmp_path / "own"), tmp_path / "run"
    results = run(monkeypatch, folder, *TINY, data, "resume=auto")
    checkpoint = read_checkpoint(folder / "checkpoints" / LAST)
    assert len(results["data"]) == 16
    names = ("experiment", "setting", "data")
    assert {name: checkpoint.fingerprint[name] for name in names} == {
        name: results[name] for name in names
    }

    write_custom(tmp_path / "own", **change)
    for is_finished in (True, False):
        if not is_finished:
            (folder / "results.json").unlink()
        with pytest.raises(SystemExit):
            run(monkeypatch, folder, *TINY, data, "resume=auto")
        error = capsys.readouterr().err
        assert "a run on other sentences or masks" in error
        assert results["data"] in error
    last = folder / "checkpoints" / LAST
    more = (f"resume={last}", "recipe.epochs=2")
    continued = run(monkeypatch, tmp_path / "more", *TINY, data, *more)
    assert "the sentences or masks have changed since" in capsys.readouterr().out
    assert continued["data"] != results["data"]

    write_custom(tmp_path / "moved")  # the same data at another place
    moved = f"dataset.file={tmp_path}/moved/data.jsonl"
    again = run(monkeypatch, folder, *TINY, moved, "resume=auto")
    assert again["data"] == results["data"]


def test_a_run_continues_only_on_its_own_data_set(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_custom(tmp_path / "own")
    run(monkeypatch, tmp_path / "run", *TINY, data)
    last = tmp_path / "run/checkpoints" / LAST
    other = tuple(option for option in TINY if not option.startswith("dataset="))
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            tmp_path / "other",
            *other,
            *("dataset=shapes", f"data_root={small_shapes}", f"resume={last}"),
            "dataset.max_words=22",
        )
    error = capsys.readouterr().err
    assert "was trained on custom, not on shapes" in error
    assert f"init_from={last}" in error


def test_runs_of_version_0_1_are_compared_by_their_configuration() -> None:
    config = compose_config(["dataset=refcoco", "model.clip_weights=null"])
    prints = fingerprint(config, "0123456789abcdef")
    check_same_run(prints, config, {}, config, "it is")
    other = config | {"seed": 1}
    with pytest.raises(InputError, match=r"a run with other settings \(seed=1, here 0\);"):
        check_same_run(prints, config, {}, other, "it is")


def test_a_run_continues_without_the_file_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, first = write_custom(tmp_path / "own"), tmp_path / "first"
    run(monkeypatch, first, *TINY, data)
    best = first / "checkpoints/best.ckpt"
    options = (*TINY, data, f"init_from={best}", "resume=auto")
    expected = run(monkeypatch, tmp_path / "second", *options)
    best.unlink()
    (tmp_path / "second/results.json").unlink()
    again = run(monkeypatch, tmp_path / "second", *options)
    assert again["experiment"] == expected["experiment"]
    assert again["initial_weights"] == expected["initial_weights"]


def test_fewer_epochs_than_a_checkpoint_has_trained_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_custom(tmp_path / "own")
    run(monkeypatch, tmp_path / "run", *TINY, data, "recipe.epochs=2")
    last = tmp_path / "run/checkpoints" / LAST
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "fewer", *TINY, data, f"resume={last}", "recipe.epochs=1")
    assert "has trained 2 epochs, and recipe.epochs=1 asks for fewer" in capsys.readouterr().err
