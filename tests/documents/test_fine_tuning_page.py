"""The commands of the page on fine-tuning compose, and its numbers are the recorded ones."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from crislit.config import compose_config
from crislit.training.settings import check_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/fine_tuning.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    python -m crislit\.(\w+) (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_its_commands_compose(program: str, arguments: str) -> None:
    config = compose_config(shlex.split(arguments), program)
    check_settings(config, program)
    source = config["init_from"] if program == "train" else config["checkpoint"]
    assert source in ("shapes-tiny", "cris_r50.pth")


def test_its_numbers_are_the_recorded_ones() -> None:
    with (ROOT / "results/fine_tuning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["dataset"], row["split"], row["samples"]) for row in rows} == {
        ("gshapes", "val", "1200")
    }
    shown = re.findall(r"^\| .* \| (\d+\.\d\d) \|$", PAGE, re.MULTILINE)
    recorded = [f"{100 * float(row['mIoU']):.2f}" for row in rows]
    assert sorted(shown) == sorted(recorded)
