"""``python -m scripts.pages``: generated pages are up to date, and show what the code has."""

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from scripts.pages.__main__ import PAGES, check_docstrings, check_pages, main
from scripts.pages.commands import invocation, preformatted, usage
from scripts.pages.conf_files import read_comments, read_title
from scripts.pages.configuration import (
    GROUPS,
    Configuration,
    configuration_page,
    flatten,
    format_choices,
)
from scripts.pages.docstrings import docstring_violations
from scripts.pages.text import ROOT

from crislit.config import known_settings, load_config
from crislit.errors import InputError

CONF = ROOT / "conf"
YAML = """\
# @package _global_
# A title
# of two lines.
# python -m crislit.train
defaults:
  - override /model: rn101     # table 2
size: 416  # side; "#" begins none, # does
color: "#800000"
nested:      # a group
  # above
  first: [1, 2]
  second: {a: 1}

last: null   # after it
list:
  - name: x  # of an item
"""


@pytest.fixture(scope="module")
def files() -> Configuration:
    return Configuration(CONF)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of the configuration."""
    return shutil.copytree(CONF, tmp_path / "conf")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_script_writes(name: str) -> None:
    check_pages(ROOT, {name: PAGES[name]()})


def test_an_outdated_and_a_missing_page_are_one_error_that_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "same.md").write_text("new")
    (tmp_path / "old.md").write_text("old")
    pages = dict.fromkeys(("same.md", "old.md", "missing.md"), "new")
    with pytest.raises(InputError, match=r"^old.md, missing.md is out of date: run `python -m"):
        check_pages(tmp_path, pages)


def test_comments_belong_to_the_keys_beside_or_below_them() -> None:
    assert read_comments(YAML) == {
        "defaults.model": "table 2",
        "size": 'side; "#" begins none, # does',
        "nested": "a group",
        "nested.first": "above",
        "last": "after it",
        "list.name": "of an item",
    }
    assert read_title(YAML) == "A title of two lines."


def test_values_by_choice_are_grouped() -> None:
    assert format_choices({"a": 1, "b": 1}, 2) == "`1`"
    assert format_choices({"a": 1, "b": 1}, 3) == "`1` (`a`, `b`)"
    assert format_choices({"a": True, "b": None, "c": True}, 3) == "`true` (`a`, `c`); `null` (`b`)"
    assert format_choices({"a": "a", "b": "b"}, 2) == "the choice"
    assert format_choices({"a": {"x": [1, ""]}}, 1) == '`{x: [1, ""]}`'


@pytest.mark.parametrize(
    ("name", "key"), [("train", "seed"), ("evaluate", "split"), ("recipe/released", "epochs")]
)
def test_a_key_without_a_comment_is_an_error_that_names_file_and_key(
    conf: Path, name: str, key: str
) -> None:
    file = conf / f"{name}.yaml"
    changed, count = re.subn(rf"^( *{key}: \S+) +#.*", r"\1", file.read_text(), flags=re.MULTILINE)
    assert count == 1
    file.write_text(changed)
    with pytest.raises(
        InputError, match=rf"^conf/[\w/]+\.yaml: the key [\w.]*{key} has no comment"
    ):
        configuration_page(conf)


def test_a_choice_without_a_comment_is_an_error_that_names_its_file(conf: Path) -> None:
    (conf / "trainer/gpu.yaml").write_text("defaults: [auto]\naccelerator: gpu\n")
    with pytest.raises(InputError, match=r"^conf/trainer/gpu.yaml has no comment at its top"):
        configuration_page(conf)


def test_the_page_has_every_key_and_group(files: Configuration) -> None:
    page = configuration_page(CONF)
    for command in ("train", "evaluate"):
        for key in flatten(known_settings(command), files.meanings):
            assert f"| `{key}` |" in page, key
    assert set(GROUPS) == {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}


@pytest.mark.parametrize("group", GROUPS)
def test_the_values_of_a_choice_are_those_that_it_composes(
    files: Configuration, group: str
) -> None:
    # The recipe of the embedded data changes a key of the group trainer, which the page says.
    recipe = ["recipe=released"] if group == "trainer" else []
    for choice, file in files.groups[group].items():
        composed: Any = OmegaConf.to_container(load_config([f"{group}={choice}", *recipe]))
        shown, values = flatten(file.values, files.meanings), flatten(composed, files.meanings)
        assert shown == {key: value for key, value in values.items() if key in shown}
    page = configuration_page(CONF)
    assert "| `trainer.gradient_clip_val` | `null`; `1.0` with `recipe=shapes` |" in page


def test_the_default_choices_are_those_of_the_defaults_list() -> None:
    entries = OmegaConf.load(CONF / "train.yaml").defaults
    listed = {key: choice for x in entries if x != "_self_" for key, choice in x.items()}
    assert {group: listed[group] or "" for group in GROUPS} == GROUPS


def test_help_texts_become_paragraphs_and_code() -> None:
    text = "\nTwo\nlines <x>:\n\n  python x\n    y\nend\n\npython z\n"
    assert list(preformatted(text)) == [
        "Two lines &lt;x>:",
        "```text\npython x\n  y\n```",
        "end",
        "```text\npython z\n```",
    ]


def test_arguments_are_shown_as_they_are_written() -> None:
    parser = argparse.ArgumentParser("x")
    kind = parser.add_argument("kind", choices=("a", "b"))
    files = parser.add_argument("files", nargs="*", metavar="FILE")
    option = parser.add_argument("--new", "--old", metavar="N")
    flag = parser.add_argument("--flag", action="store_true")
    shown = [invocation(action) for action in (kind, files, option, flag)]
    assert shown == ["{a,b}", "FILE ...", "--new, --old N", "--flag"]
    assert usage(parser) == "x {a,b} [FILE ...] [options]"


def test_public_names_without_documentation_are_listed(tmp_path: Path) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample/__init__.py").write_text(
        '"""A package."""\n'
        "from sample.parts import A, B, C, N, crop, paste, seek, turn\n"
        '__all__ = ["A", "B", "C", "N", "crop", "paste", "seek", "turn"]\n'
    )
    (tmp_path / "sample/parts.py").write_text(
        'A = 1\n"""One."""\nB = 2\n'
        "class C:\n"
        '    """A class.\n\n    Args:\n        size: A size.\n        name: A name.\n    """\n'
        "    def __init__(self, size, name): pass\n"
        '    def move(self, x, y):\n        """Move it."""\n'
        "    def _hidden(self, x, y): pass\n"
        'def crop(image, box):\n    """Crop images to a box."""\n'
        'def paste(image, box):\n    """Paste an image."""\n'
        'def seek(image):\n    """Look."""\n    raise InputError("lost")\n'
        'def turn(image: Tensor):\n    """Turn."""\n    require(image, "no image")\n'
        'class N(nn.Module):\n    """A layer of 3."""\n'
    )
    assert docstring_violations(tmp_path, "sample") == [
        "sample.parts.B: no docstring",
        "sample.parts.C.move: nothing about x, y",
        "sample.parts.N: no section, equation or other source",
        "sample.parts.paste: nothing about box",
        "sample.parts.seek: nothing about InputError",
        "sample.parts.turn: no shapes",
        "sample.parts.turn: nothing about InputError",
    ]


def test_docstrings_document_every_public_name_and_parameter(tmp_path: Path) -> None:
    check_docstrings(ROOT / "src")
    (tmp_path / "crislit").mkdir()
    (tmp_path / "crislit/__init__.py").write_text('__all__ = ["A"]\nA = 1\n')
    with pytest.raises(InputError, match=r"^complete the docstrings: crislit.A: no docstring$"):
        check_docstrings(tmp_path)


def test_every_argument_of_a_command_has_a_meaning() -> None:
    assert "|  |" not in (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")


def test_the_command_checks_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "scripts.pages.__main__"
    monkeypatch.setattr(f"{module}.check_docstrings", lambda _: None)
    monkeypatch.setattr(f"{module}.ROOT", tmp_path)
    monkeypatch.setattr(f"{module}.PAGES", {"page.md": lambda: "text\n"})
    with pytest.raises(SystemExit, match=r"^error: page.md is out of date"):
        main(["--check"])
    main([])
    main(["--check"])
    assert (tmp_path / "page.md").read_text() == "text\n"
    assert capsys.readouterr().out == ""
