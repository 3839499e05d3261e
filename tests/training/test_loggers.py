"""The content of Weights & Biases (read from the offline run's file), TensorBoard and CSV logs."""

import csv
import importlib.util
import json
import logging
import os
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb
from google.protobuf.message import DecodeError
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from crislit.config import compose_config
from crislit.data.dataset import TrainBatch
from crislit.errors import InputError
from crislit.training import loggers
from crislit.training.metrics import METRICS
from crislit.training.task import CRISTask
from crislit.training.trainer import build_logger
from tests.runs import run

SHORT = (
    "batch_size=16",
    "image_size=64",
    "recipe.epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures=2",
    "model.clip_weights=null",
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
    """Yield the records of a run's file.

    The file has blocks of 32 KiB. A record is one or several chunks, each with its checksum, length
    and kind: 1 full, 2 first, 3 middle, 4 last.
    """
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
    """Read a run's file once its writer, another process, has written the last record."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            records = list(wandb_records(path))
        except (DecodeError, struct.error):  # the last record is incomplete
            records = []
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} has no last record"
        time.sleep(0.2)


def parse_items(items: Any) -> dict[str, Any]:
    """Return the values of a record by their dotted names."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_an_offline_wandb_run_has_scalars_configuration_and_samples(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "a sweep")
    folder = tmp_path / "run"
    # With a cooldown, both predictions would be equal, and W&B stores equal masks once.
    options = (*SHORT, f"data_root={small_shapes}", "logger=wandb", "recipe.optimizer.cooldown=0")
    results = run(monkeypatch, folder, *options)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[str, list[Any]] = {}
    config: dict[str, Any] = {}
    groups = set()
    for record in finished_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for name, value in parse_items(record.history.item).items():
                history.setdefault(name, []).append(value)
        elif kind == "config":
            config |= parse_items(record.config.update)
        elif kind == "run":
            groups.add(record.run.run_group)
            config |= parse_items(record.run.config.update)
    assert set(history) >= SCALARS
    assert history["val/mIoU"][-1] == pytest.approx(results["splits"]["val"]["mIoU"], abs=1e-6)
    assert len(history["train/loss"]) == results["steps"]
    assert groups == {"a sweep"}
    assert config["parameters"] == results["parameters"]
    assert config["model"] == results["config"]["model"]
    assert config["recipe"] == results["config"]["recipe"]
    assert config["batch_size"] == 16
    # The samples: a table, images with two masks each, and plots.
    media = folder.glob("wandb/offline-run-*/files/media/**/*.*")
    names = [path.relative_to(folder).as_posix().split("/media/")[1] for path in media]
    assert sum(name.startswith("images/overlays") for name in names) == 2
    assert sum(name.startswith("images/figures") for name in names) == 2
    masks = [np.array(Image.open(p)) for p in folder.glob("**/media/images/mask/overlays*")]
    labels = [set(np.unique(mask).tolist()) for mask in masks]
    assert len(labels) == 4
    assert labels.count({0, 1}) == 2  # targets; predictions have label 2
    assert sum(values <= {0, 2} for values in labels) == 2
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/samples*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["sample", "sentence", "image", "IoU"]
    assert len(rows["data"]) == 2


def test_tensorboard_has_the_same_scalars_and_samples(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    run(monkeypatch, folder, *SHORT, f"data_root={small_shapes}", "logger=tensorboard")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("samples/")]) == 2


def test_csv_has_the_same_scalars_and_the_configuration(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    results = run(monkeypatch, folder, *SHORT, f"data_root={small_shapes}")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= SCALARS
    assert f"parameters: {results['parameters']}" in (folder / "hparams.yaml").read_text()
    assert len(list((folder / "figures").glob("sample_*.png"))) == 2


def test_several_loggers_log_the_same_and_a_run_that_continues_keeps_its_rows(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    options = (
        *(*SHORT, f"data_root={small_shapes}", "logger=[csv,wandb]", "logger.wandb.project=mine"),
        *("resume=auto", "trainer.max_steps=3", "checkpoint_every=1", "callbacks.pictures=0"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(CRISTask, "loss", stop_after(2))
        with pytest.raises(RuntimeError, match="killed"):
            run(patch, folder, *options)
    wandb.finish()  # a killed process would have ended
    results = run(monkeypatch, folder, *options)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [0, 1, 2]
    assert results["steps"] == 3
    (project,) = {
        record.run.project
        for file in folder.glob("wandb/offline-run-*/run-*.wandb")
        for record in finished_records(file)
        if record.WhichOneof("record_type") == "run"
    }
    assert project == "mine"


def stop_after(steps: int) -> Any:
    """Return a loss that is interrupted after a number of steps."""
    loss, calls = CRISTask.loss, []

    def stopping(self: CRISTask, batch: TrainBatch) -> Any:
        calls.append(batch)
        if len(calls) > steps:
            raise RuntimeError("killed")
        return loss(self, batch)

    return stopping


def test_each_choice_of_a_logger_has_a_key_of_its_own() -> None:
    names = compose_config(["logger=[csv,tensorboard,wandb]"])["logger"]
    assert set(names) == {"csv", "tensorboard", "wandb"}
    assert compose_config(["logger=none"])["logger"] is None


def test_loggers_of_earlier_versions_and_none_are_built(tmp_path: Path) -> None:
    earlier = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "", "version": ""}
    (logger,) = build_logger({"logger": earlier}, tmp_path)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir) == tmp_path
    assert build_logger({"logger": None}, tmp_path) == []
    assert build_logger({}, tmp_path) == []


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("csv", "logger=csv is not a choice: csv, wandb, ... or none"),
        ({"csv": "on"}, "logger.csv is not a logger: it needs _target_"),
        ({"own": {"_target_": "no.such.Logger"}}, "logger.own cannot start: .*no"),
    ],
)
def test_a_logger_that_cannot_be_built_is_named(logger: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        build_logger({"logger": logger}, tmp_path)


# -- Online or offline


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and an environment without a key or a mode."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def chosen_mode(monkeypatch: pytest.MonkeyPatch, folder: Path = Path("run")) -> str | None:
    """Return the mode that is chosen for a run, and reset it."""
    loggers.choose_wandb_mode(folder)
    mode = os.environ.get("WANDB_MODE")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return mode


def test_without_a_key_wandb_logs_offline_and_the_warning_names_the_upload_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert chosen_mode(monkeypatch, Path("runs/7")) == "offline"
    assert "no WANDB_API_KEY" in caplog.text
    assert "wandb sync runs/7/wandb/offline-run-*" in caplog.text


def test_with_a_key_and_no_connection_wandb_logs_offline(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert chosen_mode(monkeypatch) == "offline"
    assert "127.0.0.1:9 does not answer" in caplog.text


def test_with_a_key_and_a_connection_wandb_logs_online(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    monkeypatch.setattr(loggers, "unreachable", lambda _: "")
    assert chosen_mode(monkeypatch) is None


def test_a_key_is_used_for_its_server_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "unreachable", lambda _: "")
    (home / "keys").write_text("machine boards.example.org login user password x\n")
    monkeypatch.setenv("NETRC", str(home / "keys"))
    assert chosen_mode(monkeypatch) == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://boards.example.org:8443/x")
    assert chosen_mode(monkeypatch) is None
    (home / "keys").write_text("mach")
    assert chosen_mode(monkeypatch) == "offline"


def test_a_mode_in_the_environment_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert chosen_mode(monkeypatch) == "disabled"


@pytest.mark.parametrize("offline", [True, False])
def test_the_checkpoint_is_uploaded_online_only(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import WandbLogger

    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes(b"weights")
    uploaded: list[Any] = []
    experiment = SimpleNamespace(id="7", offline=offline, log_artifact=uploaded.append)
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: experiment))
    loggers.log_checkpoint([WandbLogger.__new__(WandbLogger)], checkpoint, {"commit": "abc"})
    assert len(uploaded) == (0 if offline else 1)
    for artifact in uploaded:
        assert (artifact.name, artifact.type) == ("crislit-7", "model")
        assert list(artifact.manifest.entries) == ["best.ckpt"]


# -- The workspace


# wandb-workspaces 0.4 on pydantic 2: see pydantic's migration guide, "Validator and root_validator"
@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
@pytest.mark.filterwarnings("ignore:Support for class-based")
def test_the_workspace_shows_only_logged_metrics() -> None:
    pytest.importorskip("wandb_workspaces")
    path = Path(__file__).parents[2] / "scripts/wandb_dashboard.py"
    spec = importlib.util.spec_from_file_location("wandb_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    dashboard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dashboard)
    workspace = dashboard.workspace("me", "crislit")
    assert [section.name for section in workspace.sections] == ["Training", "Table 1", "Samples"]
    text = workspace._to_model().model_dump_json(by_alias=True)
    logged = {"train/loss", "lr-Adam/encoders", "lr-Adam/rest", "trainer/global_step"}
    splits = ("val", "testA", "testB", "test", "val-blind")
    logged |= {f"{split}/{metric}" for split in splits for metric in METRICS}
    metrics = set(re.findall(r"[\w-]+/[\w@]+", text))
    assert {name for name in metrics if not name.startswith(("me/", "http"))} <= logged
    shown = ("train/loss", "val/mIoU", "testA/mIoU", "val-blind/mIoU", "lr-Adam/encoders")
    assert all(name in text for name in (*shown, "overlays", "figures"))
    assert "loss.value.contrastive" in text  # runs are grouped by the columns of table 1
    assert compose_config(["logger=wandb"])["logger"]["wandb"]["project"] == "crislit"
