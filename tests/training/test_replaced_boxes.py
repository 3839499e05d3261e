"""A user's classes replace boxes and the loss, from a folder of their own."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import crislit
from crislit.checkpoints import read_any, write_released
from crislit.errors import InputError
from crislit.experiments.subjects import Subject
from tests.runs import execute, run, run_here

CODE = """
import pathlib
import lightning
import torch
from torch import nn
from crislit.data import ReferIndex
from crislit.transforms.augmentation import Augmentation

class FiLMDecoder(nn.Module):
    def __init__(self, width, text_width, gain=1.0):
        super().__init__()
        self.film, self.gain = nn.Linear(text_width, 2 * width), gain
        self.mix = nn.Conv2d(width, width, 3, padding=1)
    def forward(self, fused, words, padding):
        keep = (~padding).to(words.dtype)[..., None]
        scale, shift = self.film((words * keep).sum(1) / keep.sum(1)).chunk(2, dim=1)
        mixed = self.mix(fused) * (1 + scale[..., None, None]) + shift[..., None, None]
        return fused + self.gain * torch.relu(mixed)

class Counter(lightning.Callback):
    def __init__(self, name):
        self.name, self.batches = name, 0
    def on_train_batch_end(self, *arguments):
        self.batches += 1
    def on_train_end(self, *arguments):
        pathlib.Path(self.name).write_text(str(self.batches))

class Scenes:
    name = "my scenes"
    def __init__(self, root, number):
        self.root, self.number = root, number
    def open(self, skip_unusable=False):
        assert self.number == 7
        return ReferIndex.open(self.root / "shapes-v1", "shapes", "refs(crislit).p", skip_unusable)

class Mirror(Augmentation):
    def mirror(self, sentences, seed):
        return None

class Squared:
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, logits, masks):
        small = nn.functional.interpolate(masks, size=logits.shape[-2:])
        return self.scale * (logits.sigmoid() - small).square().mean()
"""
SCENES = """\
# @package _global_
defaults:
  - override /recipe: shapes
dataset:
  _target_: film_decoder.Scenes
  number: 7
  name: scenes
  max_words: 15
  evaluation_splits: [val]
"""
SHORT = (
    *("image_size=64", "batch_size=8", "trainer.max_steps=3", "dataset.blind_control=false"),
    *("dataset.evaluation_splits=[val]", "dataset.max_images=4"),
)


@pytest.fixture
def folder(tmp_path: Path, small_shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with a module and a configuration."""
    for name, text in {
        "film_decoder.py": CODE,
        "conf/decoder/film.yaml": "_target_: film_decoder.FiLMDecoder\ngain: 0.5\n",
        "conf/callbacks/counter.yaml": "counter: {_target_: film_decoder.Counter, name: counted}\n",
        "conf/dataset/scenes.yaml": SCENES,
        "conf/augment/mirror.yaml": "{_target_: film_decoder.Mirror, flip: 0.5}\n",
        "conf/loss/squared.yaml": "_target_: film_decoder.Squared\nscale: 2.0\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRISLIT_DATA", str(small_shapes))
    return tmp_path


def test_a_folder_of_the_user_is_enough_from_training_to_sharing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(folder)  # as `python -m` does
    mine = ("--config-dir=conf", "decoder=film", "loss=squared", "decoder.gain=0.25", *SHORT)
    results = run(monkeypatch, folder / "run", *mine)
    spec = {"_target_": "film_decoder.FiLMDecoder", "gain": 0.25}
    assert results["config"]["decoder"] | spec == results["config"]["decoder"]
    assert results["config"]["loss"]["_target_"] == "film_decoder.Squared"
    last = folder / "run/checkpoints/last.ckpt"

    refused = r"runs code outside crislit \(decoder=film_decoder.FiLMDecoder\). If you trust it"
    with pytest.raises(InputError, match=refused):
        crislit.load(last)
    with pytest.raises(SystemExit):
        run(monkeypatch, folder / "no", f"checkpoint={last}", "split=val", program="evaluate")
    assert "runs code outside crislit" in capsys.readouterr().err
    trusted = (f"checkpoint={last}", "split=val", "trust=[film_decoder]")
    again = run(monkeypatch, folder / "yes", *trusted, program="evaluate")
    assert again["splits"]["val"] == results["splits"]["val"]

    more = (f"resume={last}", *mine, "trainer.max_steps=5")
    assert run(monkeypatch, folder / "more", *more)["steps"] == 5

    segmenter = crislit.load(last, trust=["film_decoder"])
    segmenter.save_pretrained("shared")
    card = Path("shared/README.md").read_text()
    assert 'trust=["film_decoder"]' in card
    assert "Loading them runs the code of film_decoder, which must be installed." in card
    image = torch.randint(0, 255, (60, 80, 3), dtype=torch.uint8).numpy()
    (first,) = segmenter(image, "the red disc")
    for source in ("shared", "converted"):
        if source == "converted":
            run_here("convert", [str(last), source, "--trust", "film_decoder"], monkeypatch)
        (same,) = crislit.load(source, trust=["film_decoder"])(image, "the red disc")
        assert (same.probability == first.probability).all()
    with pytest.raises(InputError, match=r"released format cannot hold decoder=film"):
        write_released(read_any(last, trust=["film_decoder"]), Path("released.pth"))
    pytest.importorskip("onnxscript")
    run_here("export", [str(last), "onnx", "--trust", "film_decoder"], monkeypatch)
    (exported,) = crislit.load("onnx")(image, "the red disc")
    assert abs(exported.probability - first.probability).max() < 1e-4


def test_a_loss_of_crislit_and_several_decoders_are_swept(folder: Path) -> None:
    sweep = ("-m", "decoder=default,film", "loss=bce_dice,focal", "record=runs.csv")
    quick = ("workers=0", "callbacks.pictures=0", "hydra.sweep.dir=sweep")
    ended = execute("train", "--config-dir=conf", *sweep, *SHORT, *quick, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    files = sorted((folder / "sweep").glob("*/results.json"))
    configs = [json.loads(file.read_text())["config"] for file in files]
    assert [config["loss"]["_target_"] for config in configs] == 2 * [
        "crislit.training.BCEDiceLoss",
        "crislit.training.FocalLoss",
    ]
    is_film = ["film_decoder" in str(config["decoder"]) for config in configs]
    assert is_film == [False, False, True, True]
    rows = (folder / "runs.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    assert len({row.split(",")[0] for row in rows}) == 5, "each has a digest of its own"


def test_data_and_augmentation_of_the_user_are_trained_on_and_need_trust_in_figures(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(folder)
    chosen = ("--config-dir=conf", "dataset=scenes", "augment=mirror", *SHORT)
    own = [text for text in chosen if not text.startswith("dataset.")]  # the file has few keys
    results = run(monkeypatch, folder / "run", *own)
    assert results["config"]["dataset"]["number"] == 7
    assert results["splits"]["val"]["samples"] > 0
    best = folder / "run/checkpoints/last.ckpt"
    with pytest.raises(InputError, match=r"runs code outside crislit \(dataset=film_decoder\.Sc"):
        Subject(best, str(folder), "val")
    assert len(Subject(best, os.environ["CRISLIT_DATA"], "val", ["film_decoder"]).data) > 0
    with pytest.raises(SystemExit):
        run(monkeypatch, folder / "no", f"checkpoint={best}", program="evaluate")
    assert "runs code outside crislit (dataset=" in capsys.readouterr().err
    again = run(
        *(monkeypatch, folder / "yes", f"checkpoint={best}", "split=val", "trust=[film_decoder]"),
        program="evaluate",
    )
    assert again["splits"]["val"] == results["splits"]["val"]


def test_figures_build_no_transform_that_a_checkpoint_names(
    four_networks: list[Path], small_shapes: Path, tmp_path: Path
) -> None:
    content = torch.load(four_networks[0], weights_only=True)
    made = tmp_path / "made"
    content["crislit"]["config"]["augment"] = {
        "flip": 0.0,
        "transforms": [{"_target_": "os.mkdir", "path": str(made)}],
    }
    torch.save(content, tmp_path / "evil.ckpt")
    Subject(tmp_path / "evil.ckpt", str(small_shapes), "val")
    assert not made.exists()


def test_callbacks_of_the_user_and_early_stopping_join_those_of_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(folder)
    chosen = ("--config-dir=conf", "callbacks=[counter,early_stopping]", *SHORT)
    never_better = (
        "trainer.max_steps=-1",
        "recipe.epochs=9",
        "callbacks.early_stopping.patience=2",
    )
    frozen = ("recipe.optimizer.learning_rate=1e-12", "recipe.optimizer.cooldown=0")
    results = run(monkeypatch, folder / "run", *chosen, *never_better, *frozen)
    assert int((folder / "counted").read_text()) == results["steps"] == 3 * 2
    assert results["config"]["callbacks"]["early_stopping"]["monitor"] == "val/mIoU"
    message = "stopped early, after val/mIoU had not improved for 2 validations"
    assert message in capsys.readouterr().out
    assert (folder / "run/checkpoints/best.ckpt").is_file()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("decoder/bad.yaml", "_target_: film_decoder.Film", "decoder._target_=film_decoder.Film: "),
        (
            "decoder/bad.yaml",
            "_target_: film.Film",
            "decoder: film.Film cannot be imported: ModuleNotFound",
        ),
        ("decoder/bad.yaml", "_target_: film_decoder.FiLMDecoder\ngian: 1", "unexpected keyword"),
        (
            "neck/bad.yaml",
            "_target_: torch.nn.Identity",
            "neck: torch.nn.Identity fails on inp",
        ),
        ("head/bad.yaml", "channels: 3", "head={'channels': 3} names no class: head._target_"),
        (
            "loss/bad.yaml",
            "_target_: film_decoder.Squared",
            "missing 1 required positional argument",
        ),
        (
            "loss/bad.yaml",
            "_target_: film_decoder.Missing",
            "cannot build loss=film_decoder.Missing",
        ),
        ("loss/bad.yaml", "gamma: 1", "loss.gamma is not a setting"),
        ("callbacks/bad.yaml", "x: {_target_: film_decoder.Missing}", "cannot build callbacks.x: "),
        (
            "callbacks/bad.yaml",
            "x: {_target_: torch.nn.ReLU}",
            "makes a ReLU, expected",
        ),
        ("augment/bad.yaml", "_target_: torch.nn.ReLU", "augment: torch.nn.ReLU must derive from"),
        ("callbacks/bad.yaml", "patience: 3", "callbacks.patience is not a setting"),
    ],
)
def test_a_class_that_does_not_fit_ends_before_the_training(
    folder: Path,
    file: str,
    text: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "conf" / file).parent.mkdir(exist_ok=True)
    (folder / "conf" / file).write_text(text)
    group = file.partition("/")[0]
    with pytest.raises(SystemExit):
        run(monkeypatch, folder / "run", "--config-dir=conf", f"{group}=bad", *SHORT)
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not (folder / "run").exists()
