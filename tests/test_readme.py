"""The README's commands are accepted, its links lead somewhere, and its numbers are the recorded ones."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crislit.models.cris import build_cris
from tests.runs import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python -m crislit\.(\w+)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)
HYDRA = [(program, rest) for program, rest in COMMANDS if program in ("train", "evaluate")]
OTHERS = [(program, rest) for program, rest in COMMANDS if program not in ("train", "evaluate")]


def test_the_readme_shows_the_two_commands_and_programs_to_run() -> None:
    assert "make train" in README
    assert {program for program, _ in COMMANDS} == {"train", "evaluate", "benchmark", "convert", "report", "figures"}
    assert len(HYDRA) >= 8


@pytest.mark.parametrize(("program", "rest"), HYDRA)
def test_every_command_of_the_readme_composes(program: str, rest: str, tmp_path: Path) -> None:
    overrides = [part for part in shlex.split(rest) if part != "-m"]
    overrides = [re.sub(r"=([\w+]+),.*", r"=\1", part.replace("glob(*)", "baseline")) for part in overrides]  # a first job
    command = [sys.executable, "-m", f"crislit.{program}", *overrides, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_other_commands_run_in_their_order(four_networks: list[Path], small_shapes: Path, tmp_path: Path) -> None:
    from crislit.checkpoint import record
    from crislit.models.released import to_released

    clip = {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": {"context_length": 22, "vocab_size": 99, "width": 64, "heads": 1, "layers": 1},
    }
    model = build_cris(clip=clip, neck=(8, 64, 16), decoder_layers=1)
    torch.save(to_released(model.state_dict()), tmp_path / "cris_r50.pth")
    kept = record(model.settings, {"image_size": 416, "threshold": 0.35}, "random")
    (tmp_path / "RUN/checkpoints").mkdir(parents=True)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights, "crislit": kept, "global_step": 1}, tmp_path / "RUN/checkpoints/best.ckpt")
    for name, network in zip(("BASELINE", "CON", "DEC1", "FULL"), four_networks, strict=True):
        (tmp_path / f"{name}.ckpt").symlink_to(network)
    (tmp_path / "data").symlink_to(small_shapes)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for program, rest in OTHERS:
        command = [sys.executable, "-m", f"crislit.{program}", *shlex.split(rest)]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "cris_r50/model.safetensors").is_file()
    assert all((tmp_path / f"{kind}.png").is_file() for kind in ("compare", "failures", "attention", "threshold"))
    assert (tmp_path / "report/report.md").is_file()
    assert all(name.startswith("module.") for name in torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"])


def test_the_scripts_that_the_readme_calls_know_the_options() -> None:
    called = re.findall(r"^    python (scripts/\w+\.py)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(called) >= 2
    for script, rest in called:
        done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
        assert all(option in done.stdout for option in re.findall(r"--[\w-]+", rest))


def test_every_key_and_choice_that_the_readme_lists_composes() -> None:
    from crislit.config import load_config

    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 9
    for key, cell in rows:
        for choice in re.findall(r"`([\w+]+)`", cell):
            load_config([f"{key}={choice}"])


def test_links_and_pictures_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_result_table_shows_the_recorded_run() -> None:
    with (ROOT / "results/make_train.csv").open() as file:
        recorded = {row["split"]: row for row in csv.DictReader(file)}
    assert list(recorded) == ["val", "testA", "testB"]
    for split, row in recorded.items():
        shown = re.search(rf"^\| {split} \| (.*) \|$", README, re.MULTILINE)
        assert shown, split
        cells = [cell.strip() for cell in shown.group(1).split("|")]
        names = ("mIoU", "oIoU", "Pr@50", "Pr@70", "Pr@90", "blind", "ceiling")
        expected = [f"{100 * float(row[name]):.2f}" if row[name] else "-" for name in names]
        assert cells == [row["samples"], *expected]
    assert float(recorded["val"]["mIoU"]) >= 2 * float(recorded["val"]["blind"])
