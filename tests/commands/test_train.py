"""Training and evaluation as a user runs them, on a small embedded set written for the tests."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.data import shapes
from crislit.data.dataset import TrainBatch
from crislit.models.cris import CRIS
from crislit.training.build import build_data
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.training.metrics import METRICS
from crislit.training.task import CRISTask
from crislit.transforms.letterbox import CLIP_MEAN, CLIP_STD
from tests.models.networks import sentences, tiny
from tests.runs import execute, run

SMALL = (
    "dataset=shapes",
    "image_size=64",
    "batch_size=8",
    "model.neck=[16,64,32]",
    "decoder.layers=1",
    "recipe.optimizer.learning_rate=3e-3",
)


@pytest.fixture(scope="module")
def trained(
    small_shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run(
            monkeypatch,
            folder,
            *SMALL,
            f"data_root={small_shapes}",
            "recipe.epochs=4",
            "trainer.log_every_n_steps=1",
            "callbacks.pictures=12",
        )


def test_a_run_leaves_everything_that_the_contract_names(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = trained
    for name in (
        ".hydra/config.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "metrics.csv",
        "results.json",
    ):
        assert (folder / name).is_file(), name
    assert len(list((folder / "figures").glob("*.png"))) == 12
    assert list(results["splits"]) == ["val", "testA", "testB"]
    for values in results["splits"].values():
        assert values["samples"] == 36
        assert all(0 <= values[metric] <= 1 for metric in METRICS)
    assert results["parameters"] == sum(
        p.numel() for p in read_checkpoint(folder / "checkpoints/best.ckpt").build().parameters()
    )
    assert results["steps"] == 4 * (len_train(results) // 8)
    assert (results["seed"], results["threshold"], results["protocol"]) == (
        0,
        0.35,
        "all_sentences",
    )
    assert results["fps"] > 0
    assert results["checkpoint"].endswith("best.ckpt")
    assert results["config"]["dataset"]["name"] == "shapes"
    assert f"data_root={results['config']['data_root']}" in results["overrides"]
    assert results["initial_weights"].startswith("tiny-clip (sha256 ")
    assert results["commit"]
    assert results["hardware"]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_network_of_other_numbers_is_given_pictures_of_them(
    precision: str, small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"data_root={small_shapes}", f"trainer.precision={precision}", "trainer.max_steps=1")
    assert run(monkeypatch, tmp_path / "run", *SMALL, *options)["splits"]["val"]["samples"] == 36


def test_the_loss_is_of_normalised_pictures_and_of_masks_between_0_and_1() -> None:
    batch = TrainBatch(
        torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8),
        sentences(3, 5),
        torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8),
    )
    model = tiny().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    logits = model((batch.images / 255 - mean) / std, batch.tokens)
    expected = text_to_pixel_contrastive_loss(logits, batch.masks / 255)
    assert CRISTask(model).loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert text_to_pixel_contrastive_loss(logits, batch.masks.float()).item() != pytest.approx(
        expected.item(), rel=0.1
    )


def len_train(results: dict[str, Any]) -> int:

    return len(build_data(results["config"]).split_refs("train"))


def test_blind_control_and_ceiling_stand_beside_the_results(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    _, results = trained
    assert list(results["blind"]) == ["val"]
    assert results["blind"]["val"]["samples"] == 36
    assert list(results["ceiling"]) == list(results["splits"])
    assert all(0.3 < value["mIoU"] < 1 for value in results["ceiling"].values())
    assert all(
        results["splits"][split]["mIoU"] <= results["ceiling"][split]["mIoU"]
        for split in results["splits"]
    )


def test_training_lowers_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert {"val/mIoU", "val/oIoU", *(f"val/Pr@{x}" for x in (50, 60, 70, 80, 90))} <= set(rows[0])
    assert sum(bool(row["val/mIoU"]) for row in rows) == 5  # four epochs, and the final evaluation


def test_evaluating_the_checkpoint_gives_exactly_the_numbers_that_training_wrote(
    trained: tuple[Path, dict[str, Any]],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, results = trained
    checkpoint = f"checkpoint={folder / 'checkpoints/best.ckpt'}"
    again = run(
        monkeypatch,
        tmp_path / "again",
        checkpoint,
        f"data_root={small_shapes}",
        "dataset=shapes",
        program="evaluate",
    )
    for part in ("splits", "blind", "ceiling", "parameters", "threshold", "protocol"):
        assert again[part] == results[part], part
    one = run(
        monkeypatch,
        tmp_path / "one",
        checkpoint,
        f"data_root={small_shapes}",
        "split=testB",
        program="evaluate",
    )
    assert one["splits"] == {"testB": results["splits"]["testB"]}
    higher = run(
        monkeypatch,
        tmp_path / "higher",
        checkpoint,
        f"data_root={small_shapes}",
        "split=val",
        "threshold=0.9",
        "protocol=first_sentence",
        program="evaluate",
    )
    assert higher["splits"]["val"]["samples"] == 12
    assert higher["threshold"] == 0.9


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        run(
            monkeypatch,
            tmp_path / name,
            *SMALL,
            f"data_root={small_shapes}",
            f"seed={seed}",
            "trainer.max_steps=3",
        )
        return read_checkpoint(tmp_path / name / "checkpoints/last.ckpt").weights[
            "head.linear.weight"
        ]

    first = weights("first", 0)
    assert torch.equal(first, weights("again", 0))
    assert not torch.equal(first, weights("other", 1))


def test_a_run_that_ends_before_a_validation_evaluates_its_last_weights_and_says_so(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = run(
        monkeypatch,
        tmp_path / "run",
        *SMALL,
        f"data_root={small_shapes}",
        "trainer.max_steps=2",
        "logger=none",
    )
    assert results["steps"] == 2
    assert results["checkpoint"].endswith("last.ckpt")
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()
    assert "no best.ckpt" in capsys.readouterr().out


def test_resuming_goes_on_where_the_checkpoint_stands(
    trained: tuple[Path, dict[str, Any]],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, results = trained
    resumed = run(
        monkeypatch,
        tmp_path / "resumed",
        *SMALL,
        f"data_root={small_shapes}",
        "recipe.epochs=5",
        f"resume={folder / 'checkpoints/last.ckpt'}",
    )
    assert resumed["steps"] == results["steps"] * 5 // 4
    assert resumed["checkpoint"] == str(tmp_path / "resumed/checkpoints/best.ckpt")


def test_a_resumed_run_without_a_validation_reports_its_own_weights_and_one_without_a_step_nothing(
    trained: tuple[Path, dict[str, Any]],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, results = trained
    last = (
        *SMALL,
        f"data_root={small_shapes}",
        f"resume={folder / 'checkpoints/last.ckpt'}",
        "recipe.epochs=9",
    )
    resumed = run(
        monkeypatch, tmp_path / "resumed", *last, f"trainer.max_steps={results['steps'] + 2}"
    )
    assert resumed["checkpoint"] == str(tmp_path / "resumed/checkpoints/last.ckpt")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "idle", *last, f"trainer.max_steps={results['steps']}")
    assert "no step was taken beyond step" in capsys.readouterr().err


def test_accumulated_batches_make_the_steps_of_whole_ones(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(
        monkeypatch,
        tmp_path / "run",
        *SMALL,
        f"data_root={small_shapes}",
        "batch_size_per_device=4",
        "recipe.epochs=1",
    )
    assert results["steps"] == len_train(results) // 8


BAD = {
    "a data root without data": (
        ["dataset=refcoco", "data_root=nowhere"],
        r"nowhere.*\n.*images/train2014.*\n.*instances\.json",
    ),
    "an unknown data set": (["dataset=cococo"], "Could not find 'dataset/cococo'.*shapes"),
    "an unknown key": (["decoder.layrs=2"], "layrs"),
    "a size that is no multiple of 32": (
        ["image_size=100"],
        "image_size must be a multiple of 32.*100",
    ),
    "a negative number of layers": (["decoder.layers=-1"], "decoder.layers must be a whole number"),
    "layers that are no number": (["decoder.layers=abc"], "decoder.layers must be a whole number"),
    "an even kernel": (["projector.kernel_size=2"], "kernel_size must be odd"),
    "a batch of one": (
        ["batch_size=1", "dataset.sentences_per_image=1"],
        "BatchNorm needs at least two",
    ),
    "a threshold out of range": (["threshold=2"], r"threshold must be a number in \[0, 1\)"),
    "a rate that is no number": (
        ["recipe.optimizer.learning_rate=fast"],
        "learning_rate must be a positive number, got 'fast'",
    ),
    "no epoch at all": (["recipe.epochs=0"], "no step was taken"),
    "a negative number of workers": (["workers=-1"], "workers must be a whole number"),
    "a negative seed": (["seed=-1"], "seed must be a whole number"),
    "a seed that is too large": (
        ["seed=4294967296"],
        "seed must be a whole number, at least 0 and at most 4294967295",
    ),
    "a number for a folder": (["dataset.folder=7"], "dataset.folder must be a text, got 7"),
    "a data root that is a file": (["data_root=/dev/null"], "cannot write the embedded data set"),
    "more words than the context": (
        ["dataset.max_words=100"],
        "max_words=100 exceeds the text encoder's context of 77",
    ),
    "splits that are no list": (
        ["dataset.evaluation_splits=testA"],
        "must be a list of names, such as .val., got 'testA'",
    ),
    "splits that are no names": (["dataset.evaluation_splits=[1]"], "must be a list of names"),
    "milestones that are no list": (
        ["recipe.optimizer.milestones=2"],
        "milestones must be a list of epochs",
    ),
    "epochs that are no number": (
        ["recipe.epochs=abc"],
        "trainer.max_epochs must be a whole number",
    ),
    "devices that are no number": (["trainer.devices=abc"], "cannot run trainer"),
    "an argument that no trainer has": (["+trainer.max_epoch=3"], "cannot run trainer"),
    "one tiny picture": (["image_size=32", "batch_size=4"], "too little for BatchNorm"),
    "a checkpoint that is not there": (["resume=gone.ckpt"], "no checkpoint at gone.ckpt"),
    "a GPU that is not there": (["trainer=gpu"], "cannot run trainer"),
    "a split that the set does not have": (["dataset.select_split=testC"], "no split 'testC'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_clear_error_and_no_results(
    case: str,
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if case == "a GPU that is not there" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    overrides, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, tmp_path / "run", f"data_root={small_shapes}", *overrides)
    assert error.value.code == 1
    complaint = capsys.readouterr().err.split("error: ")[-1]
    assert re.search(message, complaint, re.DOTALL), complaint
    assert not (tmp_path / "run/results.json").exists()


def test_a_damaged_picture_in_a_worker_process_is_one_clear_line(tmp_path: Path) -> None:
    root = shapes.write_shapes(
        tmp_path / "data", "shapes", scenes={"train": 20, "val": 2, "testA": 2, "testB": 2}
    )
    root = root.rename(root.parent / f"shapes-v{shapes.VERSION}")
    for picture in sorted((root / "images/train2014").iterdir())[:20]:
        picture.write_bytes(b"no picture")
    done = execute(
        "train", *SMALL, f"data_root={tmp_path / 'data'}", "workers=2", "trainer=cpu", cwd=tmp_path
    )
    assert done.returncode == 1
    told = r"^error: image .*COCO_train2014_\d+.jpg is damaged, or of a kind that cannot be read; fetch it again"
    assert re.search(told, done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_bad_checkpoints_are_told_apart(
    trained: tuple[Path, dict[str, Any]],
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    good = folder / "checkpoints/best.ckpt"
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")

    def complaint(*overrides: str, program: str = "evaluate") -> str:
        with pytest.raises(SystemExit):
            run(
                monkeypatch,
                tmp_path / f"run{len(list(tmp_path.iterdir()))}",
                f"data_root={small_shapes}",
                *overrides,
                program=program,
            )
        return capsys.readouterr().err.split("error: ")[-1]

    assert "checkpoint=PATH" in complaint()
    assert "damaged" in complaint(f"checkpoint={tmp_path / 'cut.ckpt'}")
    assert "damaged" in complaint(f"checkpoint={tmp_path / 'text.ckpt'}")
    assert "no checkpoint of crislit" in complaint(f"checkpoint={tmp_path / 'other.ckpt'}")
    assert "no split 'testC'" in complaint(f"checkpoint={good}", "split=testC")
    other = complaint(*SMALL, "decoder.layers=2", f"resume={good}", program="train")
    assert "checkpoint of another model: it has decoder_layers=1 instead of 2" in other


def test_nothing_is_written_over_an_earlier_run(
    trained: tuple[Path, dict[str, Any]],
    small_shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for program, overrides in (
        ("train", ["seed=5"]),
        ("evaluate", [f"checkpoint={folder / 'checkpoints/best.ckpt'}"]),
    ):
        with pytest.raises(SystemExit):
            run(monkeypatch, folder, f"data_root={small_shapes}", *overrides, program=program)
        assert "holds an earlier run" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_google_partition_refuses_training_where_it_has_only_val(
    generated_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            tmp_path / "run",
            "dataset=grefcoco_google",
            f"data_root={generated_root}",
            "batch_size=4",
            "image_size=64",
        )
    assert "no split 'train', only val" in capsys.readouterr().err


def test_an_error_leaves_the_process_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = execute("train", "dataset=cococo", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_mixed_precision_is_for_training_only(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code validates and tests in float32."""
    seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self: CRIS, *arguments: Tensor) -> Tensor:
        logits: Tensor = original(self, *arguments)
        seen.append((self.training, torch.is_autocast_enabled("cpu"), logits.dtype))
        return logits

    original = CRIS.forward
    monkeypatch.setattr(CRIS, "forward", forward)
    run(
        monkeypatch,
        tmp_path / "run",
        *SMALL,
        f"data_root={small_shapes}",
        "trainer.max_steps=1",
        "trainer.precision=bf16-mixed",
        "+trainer.enable_model_summary=false",
    )
    assert {(autocast, dtype) for training, autocast, dtype in seen if training} == {
        (True, torch.bfloat16)
    }
    assert {(autocast, dtype) for training, autocast, dtype in seen if not training} == {
        (False, torch.float32)
    }
