"""Every combination of the configuration composes and builds; a data set selects its recipe."""

import errno
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from crislit.config import compose_config, config_dir, load_config
from crislit.data.datamodule import ReferDataModule
from crislit.errors import InputError
from crislit.models.cris import count_parameters
from crislit.models.projector import PixelClassifier
from crislit.training.build import build_data, build_model, build_task, check_values
from crislit.training.program import hydra_command
from crislit.training.task import CRISTask

MODELS = ("tiny", "rn50", "rn101", "rn50x4")
EMBEDDED = ("shapes", "shapes+", "gshapes")
REAL = ("refcoco", "refcoco+", "grefcoco", "grefcoco_google")
LONG = ("gshapes", "grefcoco", "grefcoco_google")
"""Data sets with 22 tokens per sentence."""
ABLATIONS = {  # file: (Con., n), as in table 1
    "baseline": (False, 0),
    "con": (True, 0),
    "dec1": (False, 1),
    "con_dec1": (True, 1),
    "con_dec2": (True, 2),
    "con_dec3": (True, 3),
    "con_dec4": (True, 4),
}


def compose(*overrides: str, name: str = "train") -> dict[str, Any]:
    return compose_config(overrides, name)


# -- Training


def test_the_groups_hold_exactly_the_choices_of_the_contract() -> None:
    def choices(group: str) -> set[str]:
        return {path.stem for path in Path(config_dir(), group).glob("*.yaml")}

    assert choices("model") == set(MODELS)
    assert choices("dataset") == {*EMBEDDED, *REAL, "custom"}
    assert choices("ablation") == set(ABLATIONS)
    assert choices("recipe") == {"released", "paper", "shapes"}
    assert choices("trainer") == {"auto", "cpu", "gpu", "ddp", "ddp_cpu"}
    assert choices("logger") == {"csv", "wandb", "tensorboard", "none"}
    assert choices("augment") == {"none", "flip_color"}
    assert choices("experiment") == {"overfit", "shapes_tiny", "table2"}


@pytest.mark.parametrize(("model", "dataset"), list(itertools.product(MODELS, EMBEDDED + REAL)))
def test_a_data_set_selects_its_recipe_with_every_model(model: str, dataset: str) -> None:
    config, shapes = compose(f"model={model}", f"dataset={dataset}"), compose()
    assert config["dataset"]["name"] == dataset
    assert config["dataset"]["max_words"] == (22 if dataset in LONG else 17)
    sizes = (config["image_size"], config["batch_size"])
    if dataset in REAL:
        assert (*sizes, config["recipe"]["epochs"]) == (416, 64, 50)
        assert config["recipe"]["optimizer"]["milestones"] == [35]
        assert not config["dataset"]["blind_control"]
    else:
        assert config["recipe"] == shapes["recipe"]
        assert sizes == (shapes["image_size"], shapes["batch_size"])
        assert config["dataset"]["blind_control"]
    assert config["threshold"] == 0.35
    assert isinstance(build_data(config), ReferDataModule)


def test_without_overrides_tiny_is_trained_on_shapes_without_augmentation() -> None:
    config = compose()
    assert config["dataset"]["name"] == "shapes"
    assert config["model"] == compose("model=tiny")["model"]
    assert config["augment"] is None
    assert build_data(config).augmentation is None


@pytest.mark.parametrize(("ablation", "model"), list(itertools.product(ABLATIONS, MODELS)))
def test_every_ablation_of_every_model_builds(ablation: str, model: str) -> None:
    contrastive, layers = ABLATIONS[ablation]
    config = compose(f"model={model}", f"ablation={ablation}")
    with torch.device("meta"):
        network = build_model(config)
    assert isinstance(network.head, PixelClassifier) != contrastive
    assert (len(network.decoder.layers) if network.decoder else 0) == layers
    task = build_task(network, build_data(config), config, "random")
    assert isinstance(task, CRISTask)
    assert task.metadata["config"] == config


def test_every_ablation_of_every_data_set_composes() -> None:
    for dataset, ablation in itertools.product(EMBEDDED + REAL, ABLATIONS):
        config = compose(f"dataset={dataset}", f"ablation={ablation}")
        assert (config["loss"]["contrastive"], config["decoder"]["layers"]) == ABLATIONS[ablation]
        assert config["record"] == "outputs/table1.csv"


def test_the_default_network_is_the_best_row_of_table_1() -> None:
    with torch.device("meta"):
        assert count_parameters(build_model(compose("model=rn50"))) == 146_849_121


def test_the_command_line_overrides_every_group() -> None:
    groups = ("dataset=refcoco", "recipe=paper", "ablation=con")
    config = compose(*groups, "decoder.layers=2", "image_size=96", "recipe.epochs=1")
    assert config["recipe"]["optimizer"]["encoder_factor"] == 1.0
    assert (config["decoder"]["layers"], config["image_size"]) == (2, 96)
    assert config["recipe"]["epochs"] == config["trainer"]["max_epochs"] == 1


def test_the_papers_settings_compose_for_eight_gpus() -> None:
    config = compose("trainer=ddp", "trainer.devices=8", "model=rn101", "dataset=grefcoco")
    trainer = [config["trainer"][name] for name in ("accelerator", "strategy", "devices")]
    assert trainer == ["gpu", "ddp", 8]
    assert (config["batch_size"], config["image_size"]) == (64, 416)
    assert config["dataset"]["max_words"] == 22
    assert build_data(config).accumulation(processes=8) == 1


def test_the_overfit_experiment_has_its_own_settings_on_any_data_set() -> None:
    for dataset in ("refcoco", "refcoco+", "shapes"):
        config = compose("experiment=overfit", f"dataset={dataset}")
        assert config["dataset"]["max_images"] == 8
        assert config["dataset"]["evaluation_splits"] == ["train"]
        assert config["dataset"]["select_split"] == "train"
        assert config["image_size"] == 320
        assert build_data(config).accumulation(1) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+dataset.max_word=9", "dataset.max_word is not a setting"),
        ("+recipe.optimizer.momentum=0.9", "recipe.optimizer.momentum is not a setting"),
        ("+augment={flop: 1}", "augment.flop is not a setting"),
        ("data_root=''", "data_root is empty: expected the folder of all data"),
        ("data_root=' '", "data_root is empty"),
        ("data_root=null", "data_root is empty"),
    ],
)
def test_settings_that_cannot_be_used_are_an_error(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_values(compose(override))


# -- Evaluation


def test_evaluation_composes_for_every_data_set_and_leaves_sizes_to_the_checkpoint() -> None:
    assert compose(name="evaluate").get("dataset") is None
    for dataset in EMBEDDED + REAL:
        config = compose(f"dataset={dataset}", name="evaluate")
        assert config["dataset"]["name"] == dataset
        assert config["image_size"] is None
        assert config["threshold"] is None


# -- Commands


@pytest.mark.parametrize(
    ("program", "beginning"),
    [("train", "Trains CRIS"), ("evaluate", "Evaluates a trained network")],
)
def test_help_describes_the_command_and_lists_every_key(
    program: str,
    beginning: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", "--help"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"crislit.{program}").main()
    text = capsys.readouterr().out
    example, description = text.split("\n\n", 1)
    assert example.startswith(f"example: python -m crislit.{program} ")
    assert description.startswith(beginning)
    for key in map(str, load_config(name=program)):
        assert f"\n{key}:" in text


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_help_and_refused_keys_do_not_wait_for_pytorch(program: str, tmp_path: Path) -> None:
    code = """
import sys
from hydra.core.global_hydra import GlobalHydra
main = __import__(f"crislit.{sys.argv[1]}", fromlist=["main"]).main
for argument in ("--help", "--cfg=job", "+optimizer=adamw", "seed=(", "sed=1"):
    sys.argv = ["crislit", argument]
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as end:
        print(argument, end.code)
print(*sorted({"torch", "lightning", "wandb", "matplotlib"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-4:] == ["+optimizer=adamw 1", "seed=( 1", "sed=1 1", ""]
    assert len(result.stderr.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def disk_full(name: str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


@pytest.fixture
def error_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a command whose function raises an error; return what it prints."""

    def run(error: Exception, name: str, *options: str) -> str:
        @hydra_command("train")
        def main(_: DictConfig) -> None:
            raise error

        arguments = ["train", f"hydra.run.dir={tmp_path / name}", "hydra/job_logging=stdout"]
        monkeypatch.setattr(sys, "argv", [*arguments, *options])
        with pytest.raises(SystemExit, match="1"):
            main()
        return capsys.readouterr().err

    return run


def test_exhausted_memory_of_a_gpu_is_one_line_that_names_an_entry(
    error_of: Callable[..., str],
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has")
    assert error_of(error, "run") == (
        "error: the device's memory is exhausted: CUDA out of memory. Tried to allocate 20.00 MiB. "
        "GPU 0 has (see docs/troubleshooting.md#out-of-memory)\n"
    )


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_a_closed_output_ends_the_help_silently(program: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", f"crislit.{program}", "--help"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_full_disk_is_reported_in_one_line(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_config(*_: Any, **__: Any) -> None:
        raise disk_full("config.yaml")

    message = "error: the disk is full: [Errno 28] No space left on device: '{}'. Files"
    full = disk_full("metrics.csv")
    assert message.format("metrics.csv") in error_of(full, "run", "hydra.output_subdir=null")
    monkeypatch.setattr("hydra.core.utils._save_config", save_config)  # before our function runs
    assert message.format("config.yaml") in error_of(full, "other")
