"""``scripts/draw_masks.py``: the README's figure shows how good each mask is."""

import re
import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest

import crislit
from crislit.inference import load

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_readmes_figure_says_which_masks_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["draw_masks.py", str(tmp_path / "masks.png")])
    runpy.run_path(str(SCRIPTS / "draw_masks.py"), run_name="__main__")
    assert matplotlib.image.imread(tmp_path / "masks.png").shape == (710, 1100, 4)
    assert capsys.readouterr().out == "14 of 14 masks have an IoU above 0.5\n"
    monkeypatch.setattr(crislit, "load", lambda _: load("shapes-tiny", threshold=0.99))
    runpy.run_path(str(SCRIPTS / "draw_masks.py"), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ of 14 masks have an IoU above 0\.5", first)
    assert re.fullmatch(r"not \{('[^']+': '0\.[0-4]\d'(, )?)+\}", second)
