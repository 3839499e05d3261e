"""What runs show in Weights & Biases (read back from the offline run's file), TensorBoard and CSV."""

import csv
import json
import logging
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from PIL import Image

from crislit.config import compose_config
from crislit.training import loggers
from crislit.training.metrics import METRICS
from tests.runs import run

SHORT = (
    "batch_size=16",
    "image_size=64",
    "recipe.epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures=2",
)
SCALARS = {
    "train/loss",
    "lr-Adam/encoders",
    "lr-Adam/rest",
    "val/mIoU",
    "val/oIoU",
    "val/Pr@50",
    "testA/mIoU",
    "val-blind/mIoU",
}


def wandb_records(path: Path) -> Iterator[Any]:
    """Read a run's file: blocks of 32 KiB of chunks, each with checksum, length and kind (whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 and length == 0:
            position += left
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished_records(path: Path, seconds: float = 60) -> list[Any]:
    """Read a run's file when its writer, a process of its own, has written the last record."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            records = list(wandb_records(path))
        except (DecodeError, struct.error):  # the last one is still being written
            records = []
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} never ended"
        time.sleep(0.2)


def test_an_offline_run_of_weights_and_biases_holds_everything(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "a sweep")
    folder = tmp_path / "run"
    results = run(
        monkeypatch,
        folder,
        *SHORT,
        f"data_root={small_shapes}",
        "logger=wandb",
        "model.clip_weights=null",
    )
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[str, list[Any]] = {}
    config: dict[str, Any] = {}
    groups = set()
    for record in finished_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                history.setdefault(".".join(item.nested_key) or item.key, []).append(
                    json.loads(item.value_json)
                )
        elif kind == "config":
            config |= {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.config.update
            }
        elif kind == "run":
            groups.add(record.run.run_group)
            config |= {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.run.config.update
            }
    assert set(history) >= SCALARS
    assert history["val/mIoU"][-1] == pytest.approx(results["splits"]["val"]["mIoU"], abs=1e-6)
    assert len(history["train/loss"]) == results["steps"]
    assert groups == {"a sweep"}
    assert config["parameters"] == results["parameters"]
    assert config["model"] == results["config"]["model"]
    assert config["recipe"] == results["config"]["recipe"]
    assert config["batch_size"] == 16
    # The samples: a table, pictures with two masks each that can be switched, and the drawn figures.
    media = folder.glob("wandb/offline-run-*/files/media/**/*.*")
    names = [path.relative_to(folder).as_posix().split("/media/")[1] for path in media]
    assert sum(name.startswith("images/overlays") for name in names) == 2
    masks = [
        set(np.unique(np.array(Image.open(path))).tolist())
        for path in folder.glob("**/media/images/mask/overlays*")
    ]
    assert len(masks) == 4
    assert (
        sum(labels == {0, 1} for labels in masks) == 2
    )  # the truths; predictions have a label of their own
    assert sum(labels <= {0, 2} for labels in masks) == 2
    assert sum(name.startswith("images/figures") for name in names) == 2
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/samples*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["sample", "sentence", "picture", "IoU"]
    assert len(rows["data"]) == 2


def test_tensorboard_gets_the_same_scalars_and_pictures(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    run(
        monkeypatch,
        folder,
        *SHORT,
        f"data_root={small_shapes}",
        "logger=tensorboard",
        "model.clip_weights=null",
    )
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("samples/")]) == 2


def test_csv_gets_the_same_scalars_and_the_configuration(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    results = run(
        monkeypatch, folder, *SHORT, f"data_root={small_shapes}", "model.clip_weights=null"
    )
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= SCALARS
    assert f"parameters: {results['parameters']}" in (folder / "hparams.yaml").read_text()
    assert len(list((folder / "figures").glob("sample_*.png"))) == 2


# -- Online or offline --------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key, and an environment without a choice."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str | None:
    import os

    loggers.choose_wandb_mode(folder)
    found = os.environ.get("WANDB_MODE")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return found


def test_without_a_key_it_logs_offline_and_says_how_to_send_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert mode(monkeypatch, Path("runs/7")) == "offline"
    assert "no WANDB_API_KEY" in caplog.text
    assert "wandb sync runs/7/wandb/offline-run-*" in caplog.text


def test_with_a_key_and_no_network_it_logs_offline(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert mode(monkeypatch, Path("run")) == "offline"
    assert "127.0.0.1:9 does not answer" in caplog.text


def test_with_a_key_and_a_server_it_stays_online(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    monkeypatch.setattr(loggers, "unreachable", lambda _: "")
    assert mode(monkeypatch, Path("run")) is None


def test_a_key_counts_for_its_own_server_wherever_it_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "unreachable", lambda _: "")
    (home / "keys").write_text("machine boards.example.org login user password x\n")
    monkeypatch.setenv("NETRC", str(home / "keys"))
    assert mode(monkeypatch, Path("run")) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://boards.example.org:8443/x")
    assert mode(monkeypatch, Path("run")) is None
    (home / "keys").write_text("mach")
    assert mode(monkeypatch, Path("run")) == "offline"


def test_the_users_own_choice_stands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode(monkeypatch, Path("run")) == "disabled"


@pytest.mark.parametrize("offline", [True, False])
def test_the_checkpoint_becomes_an_artifact_online_only(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import WandbLogger

    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    handed: list[Any] = []
    experiment = SimpleNamespace(id="7", offline=offline, log_artifact=handed.append)
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: experiment))
    loggers.log_checkpoint([WandbLogger.__new__(WandbLogger)], checkpoint, {"commit": "abc"})
    assert len(handed) == (0 if offline else 1)
    if handed:
        assert handed[0].name == "crislit-7"
        assert handed[0].type == "model"
        assert list(handed[0].manifest.entries) == ["best.ckpt"]


# -- The workspace ------------------------------------------------------------------------------------------------------------


# wandb-workspaces 0.4 on pydantic 2: see pydantic's migration guide, "Validator and root_validator"
@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
@pytest.mark.filterwarnings("ignore:Support for class-based")
def test_the_workspace_shows_what_the_runs_log() -> None:
    pytest.importorskip("wandb_workspaces")
    import importlib.util

    path = Path(__file__).parents[2] / "scripts/wandb_dashboard.py"
    spec = importlib.util.spec_from_file_location("wandb_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    dashboard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dashboard)
    built = dashboard.workspace("me", "crislit")
    assert [section.name for section in built.sections] == ["Training", "Table 1", "Samples"]
    text = built._to_model().model_dump_json(by_alias=True)
    logged = {"train/loss", "lr-Adam/encoders", "lr-Adam/rest", "trainer/global_step"}
    logged |= {
        f"{split}/{metric}"
        for split in ("val", "testA", "testB", "test", "val-blind")
        for metric in METRICS
    }
    named = set(re.findall(r"[\w-]+/[\w@]+", text)) - {"crislit/", "me/"}
    assert {name for name in named if not name.startswith(("me/", "http"))} <= logged, (
        "only what runs log is shown"
    )
    for shown in (
        "train/loss",
        "val/mIoU",
        "testA/mIoU",
        "val-blind/mIoU",
        "overlays",
        "figures",
        "lr-Adam/encoders",
    ):
        assert shown in text
    assert "loss.value.contrastive" in text  # runs are grouped by table 1's columns
    assert compose_config(["logger=wandb"])["logger"]["project"] == "crislit"
