"""The README's commands are accepted, its links lead somewhere, and its numbers are the recorded ones."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    python -m crislit\.(\w+)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_the_readme_shows_the_two_commands_and_programs_to_run() -> None:
    assert "make train" in README
    assert {program for program, _ in COMMANDS} == {"train", "evaluate"}
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("program", "rest"), COMMANDS)
def test_every_command_of_the_readme_composes(program: str, rest: str, tmp_path: Path) -> None:
    overrides = [part for part in shlex.split(rest) if part != "-m"]
    overrides = [re.sub(r"=(\d),.*", r"=\1", part) for part in overrides]  # a sweep's first job
    command = [sys.executable, "-m", f"crislit.{program}", *overrides, "--cfg", "job"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


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
