"""Plots show sentences in any script, with at most one warning."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest

from crislit.training import fonts
from crislit.training.callbacks import draw_sample
from crislit.training.fonts import MISSING, readable_text


def test_characters_without_a_font_become_squares_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "installed_fonts", lambda: [])
    monkeypatch.setattr(fonts, "_reported", set())
    image, mask = np.full((40, 60, 3), 100, np.uint8), np.zeros((40, 60), np.uint8)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for number, sentence in enumerate(("红色", "猫 cat", "🟥️ \x07")):
            draw_sample(image, sentence, mask, mask).savefig(tmp_path / f"{number}.png")
    assert len(caplog.messages) == 1
    assert "no installed font has the characters 红 色" in caplog.messages[0]
    assert readable_text("红 red") == (f"{MISSING} red", readable_text("red")[1])


def test_fonts_are_added_that_have_the_missing_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "installed_fonts", lambda: [("Other", "o"), ("Han", "h")])
    known = {"o": frozenset("x"), "h": frozenset("红")}
    original = fonts.characters
    monkeypatch.setattr(fonts, "characters", lambda path: known.get(path) or original(path))
    text, families = readable_text("红 red")
    assert (text, families[-1]) == ("红 red", "Han")
    assert "Other" not in families
    assert readable_text("é")[1] == families[:-1], "the default font has it"
