"""Training and evaluation as a user runs them, on a small embedded data set."""

import csv
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.config import config_dir
from crislit.data import shapes
from crislit.data.dataset import TrainBatch
from crislit.models.cris import CRIS
from crislit.training import run_folder, time_limit
from crislit.training.build import build_data
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.training.metrics import METRICS
from crislit.training.program import RunGuard
from crislit.training.run_folder import reserve
from crislit.training.task import CRISTask
from crislit.transforms.letterbox import CLIP_MEAN, CLIP_STD
from tests.models.networks import sentences, tiny
from tests.runs import execute, run

SMALL = (
    *("dataset=shapes", "image_size=64", "batch_size=8", "model.neck=[16,64,32]"),
    *("decoder.layers=1", "recipe.optimizer.learning_rate=3e-3"),
)
Trained = tuple[Path, dict[str, Any]]
"""A run's folder and its results."""


@pytest.fixture(scope="module")
def trained(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of four epochs."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = (f"data_root={small_shapes}", "recipe.epochs=4", "trainer.log_every_n_steps=1")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run(monkeypatch, folder, *SMALL, *options, "callbacks.pictures=12")


# -- A run


def test_a_run_writes_everything_that_the_contract_names(trained: Trained) -> None:
    folder, results = trained
    files = ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", "results.json")
    for name in (".hydra/config.yaml", *files):
        assert (folder / name).is_file(), name
    assert len(list((folder / "figures").glob("*.png"))) == 12
    assert list(results["splits"]) == ["val", "testA", "testB"]
    for values in results["splits"].values():
        assert values["samples"] == 36
        assert all(0 <= values[metric] <= 1 for metric in METRICS)
    network = read_checkpoint(folder / "checkpoints/best.ckpt").build()
    assert results["parameters"] == sum(p.numel() for p in network.parameters())
    assert results["steps"] == 4 * (count_refs(results) // 8)
    settings = (results["seed"], results["threshold"], results["protocol"])
    assert settings == (0, 0.35, "all_sentences")
    assert results["fps"] > 0
    assert results["checkpoint"].endswith("best.ckpt")
    assert results["config"]["dataset"]["name"] == "shapes"
    assert f"data_root={results['config']['data_root']}" in results["overrides"]
    assert results["initial_weights"].startswith("tiny-clip (sha256 ")
    assert results["commit"]
    assert results["hardware"]


def count_refs(results: dict[str, Any]) -> int:
    """Return the number of training refs of a run."""
    return len(build_data(results["config"]).split_refs("train"))


def test_blind_control_and_ceiling_are_reported_with_the_results(trained: Trained) -> None:
    _, results = trained
    splits, ceiling = results["splits"], results["ceiling"]
    assert list(results["blind"]) == ["val"]
    assert results["blind"]["val"]["samples"] == 36
    assert list(ceiling) == list(splits)
    assert all(0.3 < value["mIoU"] < 1 for value in ceiling.values())
    assert all(splits[split]["mIoU"] <= ceiling[split]["mIoU"] for split in splits)


def test_training_lowers_the_loss(trained: Trained) -> None:
    folder, _ = trained
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    precisions = (f"val/Pr@{percent}" for percent in (50, 60, 70, 80, 90))
    assert {"val/mIoU", "val/oIoU", *precisions} <= set(rows[0])
    assert sum(bool(row["val/mIoU"]) for row in rows) == 5  # four epochs, and the final evaluation


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, seed: int) -> Tensor:
        options = (f"data_root={small_shapes}", f"seed={seed}", "trainer.max_steps=3")
        run(monkeypatch, tmp_path / name, *SMALL, *options)
        checkpoint = read_checkpoint(tmp_path / name / "checkpoints/last.ckpt")
        return checkpoint.weights["head.linear.weight"]

    first = train("first", 0)
    assert torch.equal(first, train("again", 0))
    assert not torch.equal(first, train("other", 1))


def test_accumulated_batches_make_as_many_steps(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"data_root={small_shapes}", "batch_size_per_device=4", "recipe.epochs=1")
    results = run(monkeypatch, tmp_path / "run", *SMALL, *options)
    assert results["steps"] == count_refs(results) // 8


def test_a_run_that_ends_before_a_validation_evaluates_its_last_weights_with_a_warning(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (f"data_root={small_shapes}", "trainer.max_steps=2", "logger=none")
    results = run(monkeypatch, tmp_path / "run", *SMALL, *options)
    assert results["steps"] == 2
    assert results["checkpoint"].endswith("last.ckpt")
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()
    assert "no best.ckpt" in capsys.readouterr().out


# -- Arguments of Lightning's trainer


def test_a_time_limit_saves_like_a_signal_and_the_run_continues_later(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, steps = tmp_path / "run", 7
    options = (*SMALL, f"data_root={small_shapes}", "resume=auto", f"trainer.max_steps={steps}")
    # A limit that is over after the first step.
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, folder, *options, "+trainer.max_time={seconds: 0.001}")
    assert end.value.code == 128 + signal.SIGTERM
    assert not (folder / "results.json").exists()
    assert not (folder / ".lock").exists()
    saved = read_checkpoint(folder / "checkpoints/last.ckpt").steps
    assert saved == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(time_limit.TimeLimit, "_look", lambda *_: None)
    results = run(monkeypatch, folder, *options, "+trainer.max_time={seconds: 0.001}")
    assert results["steps"] == steps


SWITCHES: dict[str, tuple[list[str], int, int]] = {  # steps, tested samples of val
    "fast_dev_run": (["+trainer.fast_dev_run=true"], 1, 12),
    "overfit_batches": (["+trainer.overfit_batches=1", "recipe.epochs=2"], 2, 36),
    "limit_train_batches": (["+trainer.limit_train_batches=1"], 1, 36),
    "no validation": (["+trainer.limit_val_batches=0", "trainer.max_steps=1"], 1, 36),
    "limit_test_batches": (["+trainer.limit_test_batches=1", "trainer.max_steps=1"], 1, 12),
    "others": (
        [
            *("+trainer.detect_anomaly=true", "+trainer.profiler=simple", "trainer.max_steps=1"),
            *("trainer.gradient_clip_val=1", "+trainer.deterministic=warn"),
            *("trainer.num_sanity_val_steps=1", "+trainer.inference_mode=false"),
        ],
        1,
        36,
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_debug_switches_of_lightning_work(
    name: str, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, steps, samples = SWITCHES[name]
    options = (*SMALL, "recipe.epochs=1", f"data_root={small_shapes}", *overrides)
    results = run(monkeypatch, tmp_path / "run", *options)
    assert (results["steps"], results["splits"]["val"]["samples"]) == (steps, samples)


def test_the_smallest_share_of_the_evaluated_batches_is_one_batch(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = (*SMALL, f"data_root={small_shapes}", "trainer.max_steps=1")
    with pytest.raises(SystemExit):  # before it trains
        run(monkeypatch, tmp_path / "run", *options, "+trainer.limit_test_batches=0.01")
    message = "limit_test_batches=0.01 is less than a batch: the smallest split has 3 of 16"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["max_time={seconds: 9}", "overfit_batches=1"])
def test_what_only_training_has_is_refused_in_an_evaluation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"+trainer.{name}", program="evaluate")
    assert f"trainer.{name.partition('=')[0]} is for training: leave it" in capsys.readouterr().err


def test_overfitting_repeats_the_same_samples_in_every_epoch(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = CRISTask.loss

    def recorded(self: CRISTask, batch: TrainBatch) -> Tensor:
        seen.append(batch.images)
        return loss(self, batch)

    monkeypatch.setattr(CRISTask, "loss", recorded)
    options = (*SMALL, f"data_root={small_shapes}", "recipe.epochs=3", "trainer.max_steps=6")
    run(monkeypatch, tmp_path / "run", *options, "+trainer.overfit_batches=2")
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[5])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.limit_train_batches=0.01", "Lightning cannot use these settings: .*0.01"),
        ("+trainer.val_check_interval=100", r"trainer.val_check_interval \(100\) must be less"),
    ],
)
def test_limits_that_do_not_fit_the_data_are_one_line_and_leave_no_folder(
    override: str,
    message: str,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "outputs" / "run"
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, *SMALL, f"data_root={small_shapes}", override)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.match(f"error: {message}", line)
    assert not folder.parent.exists()


# -- Folders


def test_a_folder_in_use_is_refused_and_its_files_stay_as_they_are(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    reserved = reserve(folder, "hydra.run.dir")
    run_folder._reserved.remove(reserved)  # as if another process had reserved it
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    for program in ("train", "evaluate"):
        with pytest.raises(SystemExit):
            run(monkeypatch, folder, f"data_root={small_shapes}", program=program)
        assert f"{folder} is in use by process {os.getpid()}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    reserved.release()


def test_the_second_of_two_processes_on_two_nodes_writes_no_configuration_and_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)  # the main process was faster
    environment = {"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**environment, "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    overrides = [f"hydra.run.dir={folder}", "trainer.num_nodes=2", "trainer=cpu"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    RunGuard("train").on_run_start(config)
    assert config.hydra.output_subdir is None
    assert [path.name for path in folder.iterdir()] == [".hydra"]


def test_a_sweep_whose_earlier_jobs_still_run_is_refused_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = reserve(tmp_path / "sweep" / "0", "hydra.run.dir")
    run_folder._reserved.remove(job)  # as if another process had reserved it
    overrides = [f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
        with pytest.raises(SystemExit):
            RunGuard("train").on_multirun_start(config)
        assert f"{tmp_path / 'sweep/0'} is in use by process" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["0"]
        job.release()
        RunGuard("train").on_multirun_start(config)  # its jobs have ended: it may go on
        with pytest.raises(SystemExit):
            RunGuard("train").on_multirun_start(config)
        assert "choose another hydra.sweep.dir" in capsys.readouterr().err
    run_folder.release_all()


def test_default_folders_lie_below_outputs_and_differ_within_a_second() -> None:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for program in ("train", "evaluate"):
            names = {str(default_folder(program, mode)) for mode in ("run", "sweep") for _ in "ab"}
            assert len(names) == 4
            assert all(name.startswith("outputs/") for name in names)


def default_folder(program: str, mode: str) -> Any:
    hydra = compose(program, return_hydra_config=True).hydra
    return hydra.run.dir if mode == "run" else hydra.sweep.dir


# -- Precision


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_networks_of_other_precisions_get_images_of_theirs(
    precision: str, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"data_root={small_shapes}", f"trainer.precision={precision}", "trainer.max_steps=1")
    results = run(monkeypatch, tmp_path / "run", *SMALL, *options)
    assert results["splits"]["val"]["samples"] == 36


def test_mixed_precision_is_for_training_only(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code validates and tests in float32."""
    calls: list[tuple[bool, bool, torch.dtype]] = []  # training, autocast, type of the logits
    forward = CRIS.forward

    def recorded_forward(self: CRIS, *arguments: Tensor) -> Tensor:
        logits: Tensor = forward(self, *arguments)
        calls.append((self.training, torch.is_autocast_enabled("cpu"), logits.dtype))
        return logits

    monkeypatch.setattr(CRIS, "forward", recorded_forward)
    options = ("trainer.max_steps=1", "trainer.precision=bf16-mixed")
    run(monkeypatch, tmp_path / "run", *SMALL, f"data_root={small_shapes}", *options)
    assert set(calls) == {(True, True, torch.bfloat16), (False, False, torch.float32)}


def test_the_loss_is_of_normalized_images_and_of_masks_between_0_and_1() -> None:
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    masks = torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8)
    batch, model = TrainBatch(images, sentences(3, 5), masks), tiny().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    logits = model((images / 255 - mean) / std, batch.tokens)
    expected = text_to_pixel_contrastive_loss(logits, masks / 255).item()
    assert CRISTask(model).loss(batch).item() == pytest.approx(expected, rel=1e-5)
    without_scale = text_to_pixel_contrastive_loss(logits, masks.float()).item()
    assert without_scale != pytest.approx(expected, rel=0.1)


# -- Evaluation


def test_evaluating_a_checkpoint_gives_exactly_the_numbers_that_training_wrote(
    trained: Trained, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = trained

    def evaluate(name: str, *overrides: str) -> dict[str, Any]:
        checkpoint = f"checkpoint={folder / 'checkpoints/best.ckpt'}"
        options = (checkpoint, f"data_root={small_shapes}", *overrides)
        return run(monkeypatch, tmp_path / name, *options, program="evaluate")

    again = evaluate("again", "dataset=shapes")
    for part in ("splits", "blind", "ceiling", "parameters", "threshold", "protocol"):
        assert again[part] == results[part], part
    one_split = evaluate("one", "split=testB")
    assert one_split["splits"] == {"testB": results["splits"]["testB"]}
    higher = evaluate("higher", "split=val", "threshold=0.9", "protocol=first_sentence")
    assert higher["splits"]["val"]["samples"] == 12
    assert higher["threshold"] == 0.9


# -- Resuming


def test_a_run_resumed_in_another_folder_takes_the_remaining_steps(
    trained: Trained, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = trained
    options = (f"data_root={small_shapes}", "recipe.epochs=5")
    last = f"resume={folder / 'checkpoints/last.ckpt'}"
    resumed = run(monkeypatch, tmp_path / "resumed", *SMALL, *options, last)
    assert resumed["steps"] == results["steps"] * 5 // 4
    assert resumed["checkpoint"] == str(tmp_path / "resumed/checkpoints/best.ckpt")


def test_a_resumed_run_without_a_validation_reports_the_best_so_far_and_without_a_step_nothing(
    trained: Trained,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, results = trained
    last = f"resume={folder / 'checkpoints/last.ckpt'}"
    options = (*SMALL, f"data_root={small_shapes}", last, "recipe.epochs=9")
    steps = results["steps"]
    resumed = run(monkeypatch, tmp_path / "resumed", *options, f"trainer.max_steps={steps + 2}")
    # As a run without an interruption would.
    assert resumed["checkpoint"] == str(tmp_path / "resumed/checkpoints/best.ckpt")
    assert resumed["splits"] == results["splits"]
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "idle", *options, f"trainer.max_steps={steps}")
    assert "no step was taken beyond step" in capsys.readouterr().err


# -- Bad input


REAL_DATA = r"nowhere.*\n.*images/train2014.*\n.*instances\.json"
BAD: dict[str, tuple[list[str], str]] = {
    "a data root without data": (["dataset=refcoco", "data_root=nowhere"], REAL_DATA),
    "an unknown data set": (["dataset=cococo"], "Could not find 'dataset/cococo'.*shapes"),
    "an unknown key": (["decoder.layrs=2"], "layrs"),
    "an unknown key of the data set": (
        ["+dataset.max_word=9"],
        r"dataset.max_word is not a setting, did you mean dataset.max_words\?",
    ),
    "an unknown key of the optimizer": (
        ["+recipe.optimizer.momentum=0.9"],
        "recipe.optimizer.momentum is not a setting; recipe.optimizer has .*learning_rate",
    ),
    "an unknown key of an augmentation": (
        ["augment=flip_color", "+augment.flop=1"],
        r"augment.flop is not a setting, did you mean augment.flip\? augment has flip, transforms",
    ),
    "a probability above 1": (
        ["augment=flip_color", "augment.flip=2"],
        r"augment.flip must be a probability in \[0, 1\], got 2",
    ),
    "a transform that does not exist": (
        ["augment=flip_color", "augment.transforms=[{_target_: albumentations.Nonsense}]"],
        "cannot build augment.transforms: .*Nonsense",
    ),
    "an image size that is not a multiple of 32": (
        ["image_size=100"],
        "image_size must be a multiple of 32.*100",
    ),
    "a negative number of layers": (["decoder.layers=-1"], "decoder.layers must be a whole number"),
    "layers that are not a number": (
        ["decoder.layers=abc"],
        "decoder.layers must be a whole number",
    ),
    "an even kernel": (["projector.kernel_size=2"], "kernel_size must be odd"),
    "a batch of one": (
        ["batch_size=1", "dataset.sentences_per_image=1"],
        "BatchNorm needs (at least )?two",
    ),
    "a threshold out of range": (["threshold=2"], r"threshold must be a number in \[0, 1\)"),
    "a rate that is not a number": (
        ["recipe.optimizer.learning_rate=fast"],
        "learning_rate must be a positive number, got 'fast'",
    ),
    "no epoch": (["recipe.epochs=0"], "no step was taken"),
    "a negative number of workers": (["workers=-1"], "workers must be a whole number"),
    "a negative seed": (["seed=-1"], "seed must be a whole number"),
    "a seed that is too large": (
        ["seed=4294967296"],
        "seed must be a whole number, at least 0 and at most 4294967295",
    ),
    "a number as folder": (["dataset.folder=7"], "dataset.folder must be text, got 7"),
    "a data root that is a file": (["data_root=/dev/null"], "cannot write the embedded data set"),
    "more tokens than the context": (
        ["dataset.max_words=100"],
        "max_words=100 exceeds the text encoder's context of 77",
    ),
    "splits that are not a list": (
        ["dataset.evaluation_splits=testA"],
        "must be a list of names, such as .val., got 'testA'",
    ),
    "splits that are not names": (["dataset.evaluation_splits=[1]"], "must be a list of names"),
    "milestones that are not a list": (
        ["recipe.optimizer.milestones=2"],
        "milestones must be a list of epochs",
    ),
    "epochs that are not a number": (
        ["recipe.epochs=abc"],
        r"recipe.epochs \(trainer.max_epochs\) must be a whole number",
    ),
    "devices that are not a number": (["trainer.devices=abc"], "cannot run trainer"),
    "an unknown argument of the trainer": (
        ["+trainer.max_epoch=3"],
        r"trainer.max_epoch is not a setting, did you mean trainer.max_epochs\?",
    ),
    "one tiny image": (["image_size=32", "batch_size=4"], "too little for BatchNorm"),
    "a missing checkpoint": (["resume=gone.ckpt"], "no checkpoint at gone.ckpt"),
    "a missing GPU": (["trainer=gpu"], "cannot run trainer"),
    "a missing split": (["dataset.select_split=testC"], "no split 'testC'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_clear_error_and_no_results(
    case: str,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case == "a missing GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    overrides, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, tmp_path / "run", f"data_root={small_shapes}", *overrides)
    assert end.value.code == 1
    error = capsys.readouterr().err.split("error: ")[-1]
    assert re.search(message, error, re.DOTALL), error
    assert not (tmp_path / "run/results.json").exists()


def test_a_damaged_image_in_a_worker_process_is_one_clear_line(tmp_path: Path) -> None:
    scenes = {"train": 20, "val": 2, "testA": 2, "testB": 2}
    root = shapes.write_shapes(tmp_path / "data", "shapes", scenes=scenes)
    root = root.rename(root.parent / f"shapes-v{shapes.VERSION}")
    for image in sorted((root / "images/train2014").iterdir())[:20]:
        image.write_bytes(b"no image")
    options = (f"data_root={tmp_path / 'data'}", "workers=2", "trainer=cpu")
    result = execute("train", *SMALL, *options, cwd=tmp_path)
    assert result.returncode == 1
    message = r"^error: image .*COCO_train2014_\d+.jpg is damaged, or .* fetch it again"
    assert re.search(message, result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr


def test_bad_checkpoints_have_different_errors(
    trained: Trained,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    good = folder / "checkpoints/best.ckpt"
    (tmp_path / "truncated.ckpt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")

    def error(*overrides: str, program: str = "evaluate") -> str:
        target = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        with pytest.raises(SystemExit):
            run(monkeypatch, target, f"data_root={small_shapes}", *overrides, program=program)
        return capsys.readouterr().err.split("error: ")[-1]

    assert "checkpoint=PATH" in error()
    assert "damaged" in error(f"checkpoint={tmp_path / 'truncated.ckpt'}")
    assert "not a checkpoint but text" in error(f"checkpoint={tmp_path / 'text.ckpt'}")
    assert "is not the released CRIS network" in error(f"checkpoint={tmp_path / 'other.ckpt'}")
    assert "no split 'testC'" in error(f"checkpoint={good}", "split=testC")
    message = error(*SMALL, "decoder.layers=2", f"resume={good}", program="train")
    assert "checkpoint of another model: it has decoder_layers=1 instead of 2" in message


@pytest.mark.parametrize(
    ("program", "override", "message"),
    [
        ("train", "projector=deep", "projector=deep is not a choice: set single keys, proj"),
        ("train", "recipe.optimizer=null", "recipe.optimizer=None is not a choice: set sing"),
        ("evaluate", "callbacks=default", "callbacks has no choices in evaluate: set single"),
        ("train", "decoder=deep", "Could not find 'decoder/deep': decoder has default"),
        ("train", "loss=null", "loss=null is not a choice: loss has bce, bce_dice, focal"),
    ],
)
def test_a_group_of_keys_is_not_a_choice(
    program: str,
    override: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", override, program=program)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
    assert error.endswith(". --help lists them\n") == ("single" in error)


def test_an_earlier_run_is_never_overwritten(
    trained: Trained,
    small_shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    best = f"checkpoint={folder / 'checkpoints/best.ckpt'}"
    for program, override in (("train", "seed=5"), ("evaluate", best)):
        with pytest.raises(SystemExit):
            run(monkeypatch, folder, f"data_root={small_shapes}", override, program=program)
        assert "holds an earlier run" in capsys.readouterr().err
        assert contents() == before


def test_training_needs_a_train_split_which_the_google_partition_lacks(
    generated_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("dataset=grefcoco_google", f"data_root={generated_root}")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", *options, "batch_size=4", "image_size=64")
    assert "no split 'train', only val" in capsys.readouterr().err


def test_an_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    result = execute("train", "dataset=cococo", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
