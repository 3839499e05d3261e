"""The worked example for custom data runs as documented, from an empty folder to masks."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest

from crislit.data.custom import label_studio
from tests.runs import run_here

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/own_data.md").read_text()


@pytest.mark.slow
def test_the_worked_example_ends_with_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> str:
        run_here(arguments[1].removeprefix("crislit."), arguments[2:], monkeypatch)
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    draw, predict = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    lines = re.findall(r"^    python (-m .*)$", PAGE, re.MULTILINE)
    coco = [shlex.split(line) for line in lines if "instances.json" in line]
    commands = [shlex.split(line) for line in lines if "instances.json" not in line]
    modules = ["crislit.check_data", "crislit.train", "crislit.predict"]
    assert [command[1] for command in commands] == modules
    assert [command[1] for command in coco] == modules[:2]
    assert "file: instances.json" in run([*coco[1], "--cfg", "job"])
    assert set(coco[0]) >= {"--sentences", "--images"}
    exec(draw, {})
    summary = run(commands[0])
    for line in (
        "train: 28 objects, 84 sentences, 14 images",
        "val: 12 objects, 36 sentences, 6 images",
    ):
        assert line in summary
        assert line in PAGE
    run(commands[1])
    results = json.loads((tmp_path / "outputs/own-run/results.json").read_text())
    assert results["splits"]["val"]["samples"] == 36
    assert results["splits"]["val"]["mIoU"] > 0.6
    predictions = [json.loads(line) for line in run(commands[2]).splitlines()]
    assert [line["sentence"] for line in predictions] == ["the red disc", "left disc"]
    for line in predictions:
        assert np.array(PIL.Image.open(tmp_path / line["mask"])).shape == (120, 160)
    exec(predict, {})
    assert "pixels" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]  # git ignores it


def test_the_setup_of_label_studio_exports_what_is_read() -> None:
    (setup,) = re.findall(r"```xml\n(.*?)```", PAGE, re.DOTALL)
    (region,) = ElementTree.fromstring(setup).findall("BrushLabels")
    (text,) = ElementTree.fromstring(setup).findall("TextArea")
    (image,) = ElementTree.fromstring(setup).findall("Image")
    assert region.get("toName") == text.get("toName") == image.get("name")
    assert image.get("value", "").removeprefix("$") in label_studio.IMAGE_KEYS
    assert text.get("perRegion") == "true"
    assert region.tag.lower() in label_studio.REGIONS  # an export has the tags in lower case
    assert text.tag.lower() in label_studio.LOOSE


def test_everything_that_the_worked_example_writes_is_ignored_by_git() -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    lines = re.findall(r"^    python -m (.*)$", PAGE, re.MULTILINE)
    options = ("--figures ", "hydra.run.dir=", "--output ")
    written = [line.partition(o)[2].split()[0] for line in lines for o in options if o in line]
    written += re.findall(r'^folder = Path\("(.*)"\)', code, re.MULTILINE)
    written += re.findall(r"`python (\S+\.py)`", PAGE)
    assert len(written) == 5
    assert all(path.startswith("outputs/") for path in written), written
    assert "/outputs/" in (ROOT / ".gitignore").read_text().splitlines()
