"""What Hydra cannot read on a command line is explained in one line, with what works."""

import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from crislit import evaluate, train
from crislit.training.command_line import expand_home, quote_value

NAMES = (
    *("a=b.jsonl", "a(b).jsonl", "a,b.jsonl", "d\N{LATIN SMALL LETTER A WITH DIAERESIS}.jsonl"),
    *("it's.jsonl", 'say "x".jsonl', "a b.jsonl", "a\\", "[a]{b}$c", "a\\'b", "~a"),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_quoting_that_a_message_shows_works(name: str) -> None:
    parsed = OverridesParser.create().parse_override(f"dataset.file={quote_value(name)}")
    assert parsed.value() == name


def error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    program: str = "train",
) -> str:
    """Return the only line that a refused command prints."""
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as end:
        {"train": train.main, "evaluate": evaluate.main}[program]()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("name", ["a=b.jsonl", "a(b.jsonl", "d\N{GREEK SMALL LETTER PI}", "it's"])
def test_a_value_that_needs_quotes_is_shown_with_them(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error(monkeypatch, capsys, "dataset=custom", f"dataset.file={name}")
    assert f"cannot read the argument {f'dataset.file={name}'!r}" in message
    (shown,) = shlex.split(message.partition("shell: ")[2])
    assert shown == f'dataset.file="{name}"'
    again = error(monkeypatch, capsys, "dataset=custom", shown)
    assert again.startswith(f"{name} not found: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=custom", "dataset.file=a,b"], "has commas: write 'dataset.file=\"a,b\"' for te"),
        (["data.jsonl"], "cannot read the argument 'data.jsonl': expected KEY=VALUE"),
        (
            ["trainer.limit_val_batches=1"],
            "To append to your config use +trainer.limit_val_batches",
        ),
        (["decoder.layer=2"], "decoder.layer is not a setting, did you mean decoder.layers? dec"),
        (["epochs=1"], "epochs is not a setting, did you mean recipe.epochs?"),
        (["learning_rate=1"], "did you mean recipe.optimizer.learning_rate?"),
        (["max_words=1"], "did you mean dataset.max_words?"),
        (["--epochs", "1"], "--epochs is not an option: write recipe.epochs=VALUE"),
        (["--batch-size=4"], "--batch-size is not an option: write batch_size=VALUE"),
        (["-m", "--cfg", "job", "seed=0,1"], "leave out -m and the commas"),
        (["--multirun", "--cfg=job"], "leave out -m and the commas"),
        (["modle=rn50"], "modle is not a setting, did you mean model?"),
        (["model=rn5"], "Could not find 'model/rn5', did you mean model=rn50? model has rn101, "),
        (["logger=[csv,wand]"], "Could not find 'logger/wand', did you mean logger=wandb? logger"),
        (["logger.project=x"], "logger.project is not a setting; logger has csv, tensorboard, wa"),
        (["dataset.file=x"], "dataset.file is a setting of dataset=custom only"),
        (["dataset=null"], "dataset=null is not a choice: dataset has custom, grefcoco"),
        (["seed.x=1"], "seed is a single setting without keys of its own: seed=VALUE"),
        (["hydra.foo=1"], "To append to your config use +hydra.foo=1"),
        (["data_root=${x}"], "Interpolation key 'x' not found"),
        (["augment={flip:"], "quote it all for the shell, augment='{...'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_do(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error(monkeypatch, capsys, *arguments)
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_a_wrong_key_of_an_evaluation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error(monkeypatch, capsys, "dataset.max_words=9", program="evaluate")
    assert message.startswith("which data set? dataset=CHOICE, or +dataset.max_words=VALUE to")
    message = error(monkeypatch, capsys, "checkpoint=x", "splt=val", program="evaluate")
    assert message.startswith("splt is not a setting, did you mean split?")
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder_where_a_path_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    arguments = [
        *("data_root=~/data", "+init_from=~/x.ckpt", "record='~/a b.csv'", "dataset.file=~/a,~/b"),
        *("~seed", "hydra.run.dir=~", "seed=~/x", "data_root=a~/b", "-m"),
    ]
    assert expand_home(arguments) == [
        *(f"data_root={tmp_path}/data", f"+init_from={tmp_path}/x.ckpt"),
        *(f"record='{tmp_path}/a b.csv'", f"dataset.file={tmp_path}/a,{tmp_path}/b"),
        *("~seed", f"hydra.run.dir={tmp_path}", "seed=~/x", "data_root=a~/b", "-m"),
    ]
