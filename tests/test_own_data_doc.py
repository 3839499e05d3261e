"""The worked example of one's own data does what it says, from nothing to masks."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.runs import environment

DOC = (Path(__file__).parents[1] / "docs/own_data.md").read_text()


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment([("HF_HUB_OFFLINE", "1")]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_worked_example_leads_from_nothing_to_masks(tmp_path: Path) -> None:
    draw, use = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    commands = [shlex.split(line) for line in re.findall(r"^    python (-m .*)$", DOC, re.MULTILINE)]
    coco = [command for command in commands if "instances.json" in " ".join(command)]
    commands = [command for command in commands if command not in coco]
    assert [command[1] for command in commands] == ["crislit.check_data", "crislit.train", "crislit.predict"]
    assert [command[1] for command in coco] == ["crislit.check_data", "crislit.train"]
    assert "file: instances.json" in run([sys.executable, *coco[1], "--cfg", "job"], tmp_path)
    assert set(coco[0]) >= {"--sentences", "--images"}
    (tmp_path / "draw.py").write_text(draw)
    run([sys.executable, "draw.py"], tmp_path)
    checked = run([sys.executable, *commands[0]], tmp_path)
    for line in ("train: 28 objects, 84 sentences, 14 pictures", "val: 12 objects, 36 sentences, 6 pictures"):
        assert line in checked
        assert line in DOC
    run([sys.executable, *commands[1]], tmp_path)
    results = json.loads((tmp_path / "runs/own/results.json").read_text())
    assert results["splits"]["val"]["samples"] == 36
    assert results["splits"]["val"]["mIoU"] > 0.4, "it has learned something"
    lines = [json.loads(line) for line in run([sys.executable, *commands[2]], tmp_path).splitlines()]
    assert [line["sentence"] for line in lines] == ["the red disc", "left disc"]
    assert all(np.array(PIL.Image.open(tmp_path / line["mask"])).shape == (120, 160) for line in lines)
    assert "pixels" in run([sys.executable, "-c", use], tmp_path)
