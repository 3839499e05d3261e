"""The worked example of one's own data does what it says, from nothing to masks."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.runs import run_here

DOC = (Path(__file__).parents[1] / "docs/own_data.md").read_text()


@pytest.mark.slow
def test_the_worked_example_leads_from_nothing_to_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> str:
        run_here(arguments[1].removeprefix("crislit."), arguments[2:], monkeypatch)
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    draw, use = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    commands = [shlex.split(line) for line in re.findall(r"^    python (-m .*)$", DOC, re.MULTILINE)]
    coco = [command for command in commands if "instances.json" in " ".join(command)]
    commands = [command for command in commands if command not in coco]
    assert [command[1] for command in commands] == ["crislit.check_data", "crislit.train", "crislit.predict"]
    assert [command[1] for command in coco] == ["crislit.check_data", "crislit.train"]
    assert "file: instances.json" in run([*coco[1], "--cfg", "job"])
    assert set(coco[0]) >= {"--sentences", "--images"}
    exec(draw, {})
    checked = run(commands[0])
    for line in ("train: 28 objects, 84 sentences, 14 pictures", "val: 12 objects, 36 sentences, 6 pictures"):
        assert line in checked
        assert line in DOC
    run(commands[1])
    results = json.loads((tmp_path / "runs/own/results.json").read_text())
    assert results["splits"]["val"]["samples"] == 36
    assert results["splits"]["val"]["mIoU"] > 0.4, "it has learned something"
    lines = [json.loads(line) for line in run(commands[2]).splitlines()]
    assert [line["sentence"] for line in lines] == ["the red disc", "left disc"]
    assert all(np.array(PIL.Image.open(tmp_path / line["mask"])).shape == (120, 160) for line in lines)
    exec(use, {})
    assert "pixels" in capsys.readouterr().out
