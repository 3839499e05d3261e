"""Fine-tuning: a new run starts from all weights of a trained network that fit."""

import logging
from pathlib import Path

import pytest
import torch

from crislit.checkpoints.checkpoint import (
    read_any,
    read_checkpoint,
    write_folder,
    write_released,
)
from crislit.checkpoints.initial_weights import load_start
from crislit.config import compose_config
from crislit.errors import InputError
from crislit.training.build import build_model, load_initial_weights
from tests.runs import run
from tests.training.test_data_identity import write_custom

SHAPES_TINY = Path("shapes-tiny")


@pytest.mark.parametrize("form", ["name", "folder", "safetensors", "pth"])
def test_every_form_of_a_network_is_taken_whole(form: str, tmp_path: Path) -> None:
    network = read_checkpoint(SHAPES_TINY)
    source = {"name": "shapes-tiny", "pth": f"{tmp_path}/cris.pth"}.get(form, f"{tmp_path}/mine")
    if form == "pth":
        write_released(network, Path(source))
    elif form != "name":
        write_folder(network, Path(source))
        source += "/model.safetensors" if form == "safetensors" else ""
    model = build_model(compose_config([f"init_from={source}"]))
    initial = load_initial_weights(model, compose_config([f"init_from={source}"]))
    assert initial.startswith(f"init_from={source} (sha256 ")
    assert all(torch.equal(w, network.weights[name]) for name, w in model.state_dict().items())


def test_weights_that_do_not_fit_stay_random_and_are_listed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = compose_config(["decoder.layers=4", "projector.kernel_size=1"])
    torch.manual_seed(0)
    model = build_model(config)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_start(model, "shapes-tiny", 17)
    shipped = read_checkpoint(SHAPES_TINY).weights
    fits = {n for n, w in shipped.items() if n in before and w.shape == before[n].shape}
    new = before.keys() - fits
    assert any(name.startswith("decoder.layers.3.") for name in new)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, shipped[name] if name in fits else before[name]), name
    assert f"{len(fits)} of {len(before)} weights fit" in caplog.text
    random, unused = (
        next(r.getMessage() for r in caplog.records if text in r.getMessage())
        for text in ("start from random weights", "are not used")
    )
    assert "decoder.layers.3 (" in random
    assert "head.linear.weight (1)" in unused


def test_another_backbone_is_one_error() -> None:
    model = build_model(compose_config(["model=rn50", "decoder.layers=0"]))
    with pytest.raises(
        InputError, match=r"\(model=tiny, not RN50-quickgelu\): choose model=tiny \(see "
    ):
        load_start(model, "shapes-tiny", 17)


@pytest.mark.parametrize("source", ["gone.ckpt", "no-such-network", "."])
def test_a_missing_network_is_an_error_before_any_work(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"init_from={source}", f"data_root={tmp_path}/data")
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_fine_tuning_starts_where_the_network_ended_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("dataset=custom", write_custom(tmp_path / "own"))
    options = (*data, "recipe=shapes", "recipe.epochs=1", "batch_size=4", "image_size=64")
    tiny = (*options, "trainer=cpu", "logger=none", "recipe.optimizer.learning_rate=1e-9")
    results = run(monkeypatch, tmp_path / "run", *tiny, "init_from=shapes-tiny")
    assert results["initial_weights"].startswith("init_from=shapes-tiny (sha256 ")
    assert results["steps"] == 1  # a new run: neither steps nor optimizer are taken
    assert "starts from init_from=shapes-tiny (sha256 " in capsys.readouterr().out
    trained = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    shipped = read_any(SHAPES_TINY).weights
    moved = [
        float((trained.weights[name] - weights).abs().max())
        for name, weights in shipped.items()
        if weights.is_floating_point() and "running_" not in name
    ]
    assert 0 < max(moved) < 1e-6
    random = run(monkeypatch, tmp_path / "random", *tiny)
    assert random["experiment"] != results["experiment"]
