"""``scripts/draw_masks.py``: the README's figure shows how good each mask is."""

import runpy
import sys
from pathlib import Path

import matplotlib.image
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_the_readmes_figure_says_which_masks_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["draw_masks.py", str(tmp_path / "masks.png")])
    runpy.run_path(str(SCRIPTS / "draw_masks.py"), run_name="__main__")
    assert matplotlib.image.imread(tmp_path / "masks.png").shape == (710, 1100, 4)
    printed = capsys.readouterr().out
    assert printed.startswith("11 of 14 masks have an IoU above 0.5; not ")
    for sentence in ("checked orange square", "red solid one on the right", "dotted blue shape"):
        assert f"'{sentence}'" in printed
