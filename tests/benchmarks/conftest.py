"""Fixtures of the benchmark's tests: code for accelerators runs on the CPU."""

from typing import Any

import pytest
import torch

from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Machine, measure_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect no garbage before every timed run: it takes a large part of a second in tests."""
    monkeypatch.setattr("gc.collect", lambda generation=2: 0)


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let ``torch.compile`` capture graphs without compiling them; return what was compiled."""
    compile_function, compiled = torch.compile, []

    def capture(function: Any, **options: Any) -> Any:
        compiled.append(function)
        assert options == {"fullgraph": True}
        return compile_function(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", capture)
    return compiled


@pytest.fixture(scope="session")
def machine() -> Machine:
    """Rates of the CPU in the precisions of a GPU."""
    return measure_machine(CPU, 64, 1, 1, ("float32", "TF32", "float16", "bfloat16"))


@pytest.fixture
def options() -> Options:
    """A network that takes milliseconds."""
    return Options(model="tiny", image_size=32, rounds=1, images=2)
