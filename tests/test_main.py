"""``crislit COMMAND`` and ``python -m crislit COMMAND`` run the commands."""

import re
import sys

import pytest

from crislit import __main__ as program
from tests.test_architecture import COMMANDS


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["crislit", *arguments])
    program.main()


def test_every_command_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(program.COMMANDS) == COMMANDS
    run(monkeypatch)
    listed = capsys.readouterr().out
    assert listed.startswith("example: crislit predict ")
    assert re.findall(r"^  (\w+)  +\w", listed, re.MULTILINE) == list(program.COMMANDS)
    run(monkeypatch, "--help")
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", "did you mean train?"), ("xyz", "choose from train, evaluate, predict, ")],
)
def test_an_unknown_command_is_one_line(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"crislit has no command '{name}': {hint}")):
        run(monkeypatch, name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(COMMANDS - {"train", "evaluate"}))
def test_a_command_gets_its_arguments_and_its_help_starts_with_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        run(monkeypatch, name, "--help")
    first, second, third = capsys.readouterr().out.splitlines()[:3]
    assert first.startswith(f"example: python -m crislit.{name}")
    assert second == ""
    assert third.startswith(f"usage: python -m crislit.{name} ")
