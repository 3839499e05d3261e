"""Every combination of the configuration composes and builds, and a data set brings the recipe that suits it."""

import errno
import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from crislit.config import config_dir, load_config
from crislit.data.datamodule import ReferDataModule
from crislit.models.cris import count_parameters
from crislit.models.projector import PixelClassifier
from crislit.training.build import build_data, build_model
from crislit.training.program import hydra_command
from crislit.training.task import CRISTask

MODELS = ("tiny", "rn50", "rn101", "rn50x4")
EMBEDDED = ("shapes", "shapes+", "gshapes")
REAL = ("refcoco", "refcoco+", "grefcoco", "grefcoco_google")
ABLATIONS = {  # file: (Con., n), as in table 1
    "baseline": (False, 0),
    "con": (True, 0),
    "dec1": (False, 1),
    "con_dec1": (True, 1),
    "con_dec2": (True, 2),
    "con_dec3": (True, 3),
    "con_dec4": (True, 4),
}


def settings(*overrides: str, name: str = "train") -> dict[str, Any]:
    config = OmegaConf.to_container(load_config(overrides, name), resolve=True)
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def test_the_groups_hold_exactly_what_the_contract_names() -> None:
    def options(group: str) -> set[str]:
        return {path.stem for path in Path(config_dir(), group).glob("*.yaml")}

    assert options("model") == set(MODELS)
    assert options("dataset") == {*EMBEDDED, *REAL, "custom"}
    assert options("ablation") == set(ABLATIONS)
    assert options("recipe") == {"released", "paper", "shapes"}
    assert options("trainer") == {"auto", "cpu", "gpu", "ddp", "ddp_cpu"}
    assert options("logger") == {"csv", "wandb", "tensorboard", "none"}


@pytest.mark.parametrize(("model", "dataset"), list(itertools.product(MODELS, EMBEDDED + REAL)))
def test_a_data_set_brings_its_recipe_whatever_the_model(model: str, dataset: str) -> None:
    config = settings(f"model={model}", f"dataset={dataset}")
    shapes = settings()
    assert config["dataset"]["name"] == dataset
    assert config["dataset"]["max_words"] == (
        22 if dataset in ("gshapes", "grefcoco", "grefcoco_google") else 17
    )
    if dataset in REAL:
        assert (config["image_size"], config["batch_size"], config["recipe"]["epochs"]) == (
            416,
            64,
            50,
        )
        assert config["recipe"]["optimizer"]["milestones"] == [35]
        assert not config["dataset"]["blind_control"]
    else:
        assert config["recipe"] == shapes["recipe"]
        assert (config["image_size"], config["batch_size"]) == (
            shapes["image_size"],
            shapes["batch_size"],
        )
        assert config["dataset"]["blind_control"]
    assert config["threshold"] == 0.35
    assert isinstance(build_data(config), ReferDataModule)


def test_no_override_at_all_means_tiny_on_shapes() -> None:
    config = settings()
    assert config["dataset"]["name"] == "shapes"
    assert config["model"] == settings("model=tiny")["model"]


@pytest.mark.parametrize(("ablation", "model"), list(itertools.product(ABLATIONS, MODELS)))
def test_every_ablation_of_every_model_instantiates(ablation: str, model: str) -> None:
    contrastive, layers = ABLATIONS[ablation]
    config = settings(f"model={model}", f"ablation={ablation}")
    with torch.device("meta"):
        network = build_model(config)
    assert isinstance(network.head, PixelClassifier) != contrastive
    assert (len(network.decoder.layers) if network.decoder else 0) == layers
    CRISTask(network, **config["recipe"]["optimizer"])


def test_every_ablation_of_every_data_set_composes() -> None:
    for dataset, ablation in itertools.product(EMBEDDED + REAL, ABLATIONS):
        config = settings(f"dataset={dataset}", f"ablation={ablation}")
        assert (config["loss"]["contrastive"], config["decoder"]["layers"]) == ABLATIONS[ablation]


def test_the_default_network_is_table_1s_best_row() -> None:
    with torch.device("meta"):
        assert count_parameters(build_model(settings("model=rn50"))) == 146_849_121


def test_the_command_line_wins_over_every_group() -> None:
    config = settings(
        "dataset=refcoco",
        "recipe=paper",
        "ablation=con",
        "decoder.layers=2",
        "image_size=96",
        "recipe.epochs=1",
    )
    assert config["recipe"]["optimizer"]["encoder_factor"] == 1.0
    assert (config["decoder"]["layers"], config["image_size"], config["recipe"]["epochs"]) == (
        2,
        96,
        1,
    )
    assert config["trainer"]["max_epochs"] == 1


def test_the_papers_settings_compose_for_eight_gpus() -> None:
    config = settings("trainer=ddp", "trainer.devices=8", "model=rn101", "dataset=grefcoco")
    assert (
        config["trainer"]["accelerator"],
        config["trainer"]["strategy"],
        config["trainer"]["devices"],
    ) == ("gpu", "ddp", 8)
    assert (config["batch_size"], config["image_size"], config["dataset"]["max_words"]) == (
        64,
        416,
        22,
    )
    data = build_data(config)
    assert data.accumulation(processes=8) == 1


def test_the_overfit_experiment_fixes_its_own_setting_on_any_data_set() -> None:
    for dataset in ("refcoco", "refcoco+", "shapes"):
        config = settings("experiment=overfit", f"dataset={dataset}")
        assert config["dataset"]["max_images"] == 8
        assert (
            config["dataset"]["evaluation_splits"]
            == [config["dataset"]["select_split"]]
            == ["train"]
        )
        assert config["image_size"] == 320
        assert build_data(config).accumulation(1) == 1


def test_evaluation_composes_for_every_data_set_and_leaves_sizes_to_the_checkpoint() -> None:
    assert settings(name="evaluate").get("dataset") is None
    for dataset in EMBEDDED + REAL:
        config = settings(f"dataset={dataset}", name="evaluate")
        assert config["dataset"]["name"] == dataset
        assert config["image_size"] is None
        assert config["threshold"] is None


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_help_says_what_the_program_does_and_lists_every_key(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", "--help"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"crislit.{program}").main()
    told = capsys.readouterr().out
    assert told.startswith(
        {"train": "Trains CRIS", "evaluate": "Evaluates a trained network"}[program]
    )
    for key in map(str, load_config(name=program)):
        assert f"\n{key}:" in told


def test_a_full_disk_is_one_line_wherever_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @hydra_command("train")
    def main(_: DictConfig) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

    quiet = ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
    monkeypatch.setattr(sys, "argv", ["train", f"hydra.run.dir={tmp_path / 'run'}", *quiet])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert (
        "error: the disk is full: [Errno 28] No space left on device: 'metrics.csv'. What"
        in capsys.readouterr().err
    )

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.yaml")

    monkeypatch.setattr("hydra.core.utils._save_config", full)  # before our function is called
    monkeypatch.setattr(
        sys, "argv", ["train", f"hydra.run.dir={tmp_path / 'other'}", "hydra/job_logging=stdout"]
    )
    with pytest.raises(SystemExit, match="1"):
        main()
    assert (
        "error: the disk is full: [Errno 28] No space left on device: 'config.yaml'. What"
        in capsys.readouterr().err
    )
