"""A network is evaluated on the data set that is named, whatever it was trained on."""

import json
from pathlib import Path

import pytest

from crislit.checkpoints.checkpoint import Checkpoint, read_any, read_checkpoint, write_released
from crislit.config import compose_config
from crislit.models import CRISConfig
from crislit.training.evaluation import complete_config
from crislit.training.provenance import fingerprint
from tests.runs import run
from tests.training.test_data_identity import TINY, write_custom


def trained_on(*overrides: str) -> Checkpoint:
    config = compose_config(overrides)
    network = CRISConfig.from_run_config(config)
    return Checkpoint(network, {}, 64, 0.2, "random", config=config)


def evaluated(checkpoint: Checkpoint, *overrides: str) -> dict[str, object]:
    config = compose_config(["checkpoint=x", *overrides], "evaluate")
    dataset: dict[str, object] = complete_config(config, checkpoint)["dataset"]
    return dataset


@pytest.mark.parametrize("trained", ["shapes", "refcoco", "custom"])
@pytest.mark.parametrize("named", ["shapes", "refcoco", "gshapes", "grefcoco_google", "custom"])
def test_a_named_data_set_replaces_the_one_of_the_training(trained: str, named: str) -> None:
    files = {"custom": ("dataset.file=a.jsonl", "dataset.images=null")}
    changed = ("dataset.max_images=3", "dataset.select_split=train", "dataset.on_error=skip")
    before = trained_on(f"dataset={trained}", *files.get(trained, ()), *changed)
    options = (f"dataset={named}", *files.get(named, ()))
    assert evaluated(before, *options) == compose_config(options)["dataset"]


def test_single_keys_change_the_data_set_of_the_training() -> None:
    before = trained_on("dataset=gshapes", "dataset.max_images=3")
    assert evaluated(before) == before.config["dataset"]
    expected = before.config["dataset"] | {"max_images": 5}
    assert evaluated(before, "+dataset.max_images=5") == expected
    assert evaluated(before, "split=train") == before.config["dataset"] | {
        "evaluation_splits": ["train"]
    }


def test_networks_are_evaluated_on_data_of_another_kind(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("dataset=custom", write_custom(tmp_path / "own"))
    shapes = ("dataset=shapes", f"data_root={small_shapes}", "split=testA")
    results = run(monkeypatch, tmp_path / "run", *TINY, own[1])
    best = tmp_path / "run/checkpoints/best.ckpt"
    options = ("trainer=cpu", f"checkpoint={best}")
    other = run(monkeypatch, tmp_path / "a", *options, *shapes, program="evaluate")
    assert list(other["splits"]) == ["testA"]
    assert other["splits"]["testA"]["samples"] == 36
    assert other["data"] != results["data"]
    as_if_trained = fingerprint(other["config"], other["data"])
    assert other["setting"] != as_if_trained["setting"]  # not a run on those data
    same = run(monkeypatch, tmp_path / "b", *options, *own, program="evaluate")
    assert same["splits"] == results["splits"]
    assert same["data"] == results["data"]
    assert (same["experiment"], same["setting"]) == (results["experiment"], results["setting"])
    options = ("trainer=cpu", "checkpoint=shapes-tiny")
    shipped = run(monkeypatch, tmp_path / "c", *options, *own, program="evaluate")
    assert shipped["config"]["dataset"]["name"] == "custom"
    assert shipped["splits"]["val"]["samples"] == 8

    # A file of the authors' code stores no data set, and takes its tokens per sentence.
    released = tmp_path / "cris.pth"
    write_released(read_checkpoint(best), released)
    as_trained = (f"checkpoint={released}", "trainer=cpu", "image_size=32", "threshold=0.35")
    foreign = run(monkeypatch, tmp_path / "d", *as_trained, *own, program="evaluate")
    assert foreign["config"]["dataset"]["max_words"] == 22
    assert foreign["splits"] == results["splits"]
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "e", *as_trained, program="evaluate")


def test_a_released_file_takes_its_tokens_from_the_data_set(tmp_path: Path) -> None:
    network = tmp_path / "cris.pth"
    write_released(read_checkpoint(Path("shapes-tiny")), network)
    assert read_any(network).network.max_tokens == 17
    assert read_any(network, default_max_tokens=22).network.max_tokens == 22
    stored = read_any(Path("shapes-tiny"), default_max_tokens=22).network.max_tokens
    assert stored == 17
    json.dumps(read_any(network).network.to_dict())
