"""compile=true trains and evaluates as without it, also after the weights have changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.errors import InputError
from crislit.training.task import CRISTask
from tests.runs import run

COMPILE = torch.compile
SHORT = (
    *("trainer=cpu", "image_size=64", "batch_size=8", "recipe.epochs=2", "logger=none"),
    *("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"),
    *("+trainer.limit_test_batches=1", "trainer.num_sanity_val_steps=0"),
    "model.clip_weights=null",
)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Trace as torch.compile does, without a compiler; a graph break is an error."""
    functions: list[Any] = []

    def trace(function: Any = None, **options: Any) -> Any:
        functions.append(function)
        return COMPILE(function, backend="eager", fullgraph=True, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", trace)
    yield functions
    torch._dynamo.reset()


def test_a_compiled_run_ends_as_one_that_is_not(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Any]
) -> None:
    data = f"data_root={small_shapes}"
    expected = run(monkeypatch, tmp_path / "eager", data, *SHORT)
    assert not compiled
    actual = run(monkeypatch, tmp_path / "compiled", data, *SHORT, "compile=true")
    assert len(compiled) == 3  # the compiler's check, training, evaluation
    for name in ("splits", "blind", "experiment"):
        assert actual[name] == expected[name]
    weights = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=False)["state_dict"]
        for name in ("eager", "compiled")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())

    checkpoint = f"checkpoint={actual['checkpoint']}"
    options = ("trainer=cpu", "+trainer.limit_test_batches=1", "compile=true", data)
    again = run(monkeypatch, tmp_path / "again", checkpoint, *options, program="evaluate")
    assert again["splits"] == expected["splits"]


def test_a_compiled_run_names_the_module_of_a_number_that_is_not_finite(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    forward = CRISTask.training_step

    def spoil(self: CRISTask, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.model.get_parameter("neck.smooth_f4.0.weight").fill_(torch.inf)
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(CRISTask, "training_step", spoil)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"data_root={small_shapes}", *SHORT, "compile=true")
    assert "First not finite: the weights themselves, neck.smooth_f4.0" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_other_values_than_true_and_false_are_refused(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    checkpoint = ["checkpoint=shapes-tiny"] if program == "evaluate" else []
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", "compile=yes please", *checkpoint, program=program)
    assert "compile must be true or false, got 'yes please'" in capsys.readouterr().err


def test_a_machine_without_a_compiler_is_noticed_before_training(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*arguments: Any) -> Any:
        raise InputError("compile=true needs a C++ compiler")

    monkeypatch.setattr("crislit.training.run.check_compiler", fail)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", f"data_root={small_shapes}", *SHORT, "compile=true")
    assert "error: compile=true needs a C++ compiler" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*"))
