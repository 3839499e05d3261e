"""Devices: names, precisions, memory, and what they cannot run."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crislit.benchmarks import devices
from crislit.errors import InputError
from tests.benchmarks.conftest import CPU

CUDA = torch.device("cuda", 1)


def settings() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_tf32(products: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    before = settings()
    yield
    set_tf32(*before)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("before", [(False, True), (True, False)])
def test_tf32_is_set_for_products_and_convolutions_and_restored(
    enabled: bool, before: tuple[bool, bool]
) -> None:
    set_tf32(*before)
    with contextlib.suppress(KeyError), devices.tf32(enabled):
        assert settings() == (enabled, enabled)
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize(
    ("precision", "result", "tf32"),
    [
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("float16", torch.float16, False),
        ("bfloat16", torch.bfloat16, False),
    ],
)
def test_a_precision_holds_within_its_context(
    precision: devices.Precision, result: torch.dtype, tf32: bool
) -> None:
    a, before = torch.ones(2, 2), settings()
    with devices.computing_in(precision, CPU):
        assert (a @ a).dtype == result
        assert settings() == (tf32, tf32)
    assert (a @ a).dtype == torch.float32
    assert settings() == before


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [(None, (7, 0), False), (None, (8, 0), True), (None, (9, 0), True), ("6.4", (9, 4), False)],
)
def test_only_nvidias_gpus_since_ampere_have_tf32(
    hip: str | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {CUDA: capability}.__getitem__)
    assert devices.has_tf32(CUDA) is expected
    assert ("TF32" in devices.precisions(CUDA)) is expected
    assert {"float32", "float16", "bfloat16"} <= set(devices.precisions(CUDA))


def test_a_cpu_computes_in_float32_and_mps_without_tf32() -> None:
    assert devices.precisions(CPU) == ("float32",)
    assert devices.precisions(torch.device("mps")) == ("float32", "float16", "bfloat16")


def test_a_device_has_its_models_name_or_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.device_name(CPU) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", {CUDA: "NVIDIA H100 80GB HBM3"}.__getitem__)
    assert devices.device_name(CUDA) == "NVIDIA H100 80GB HBM3"
    assert devices.device_name(torch.device("mps")) == "mps"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB"), "out of memory"),
        (InputError("the network computes NaN"), "the network computes NaN"),
    ],
)
def test_what_the_machine_cannot_run_is_reported_in_one_line(
    error: Exception, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert devices.attempt("latency, plain", fail) is None
    assert capsys.readouterr().err == f"latency, plain: not run, {reason}\n"
    assert devices.attempt("latency, plain", lambda: 5) == 5


def test_a_failed_compilation_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise OSError("no compiler\nat all")

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    assert devices.attempt("compiled", lambda: compiled(torch.ones(2)), True) is None
    message = capsys.readouterr().err
    assert message.startswith("compiled: not run, torch.compile failed: ")
    assert "no compiler at all" in message
    assert message.count("\n") == 1


def test_a_graph_that_breaks_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(x: torch.Tensor) -> float:
        return float(x.sum().item()) if x.sum() > 0 else 0.0

    compiled = devices.compile_forward(broken)
    assert devices.attempt("compiled", lambda: compiled(torch.ones(2)), True) is None
    assert capsys.readouterr().err.startswith("compiled: not run, torch.compile failed: ")


def test_other_errors_are_faults() -> None:
    def fail() -> None:
        raise RuntimeError("expected all tensors to be on the same device")

    with pytest.raises(RuntimeError, match="same device"):
        devices.attempt("plain", fail)


def test_the_peak_is_that_of_the_work_when_the_device_has_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def read(device: torch.device) -> int:
        calls.append(("read", device))
        return 3_500_000_000

    module = SimpleNamespace(
        reset_peak_memory_stats=lambda device: calls.append(("reset", device)),
        max_memory_allocated=read,
    )
    monkeypatch.setattr(torch, "get_device_module", {CUDA: module}.__getitem__)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda x: calls.append(("wait", x)))
    assert devices.measure_peak(lambda: calls.append("work"), CUDA) == 3.5
    assert calls == [("reset", CUDA), "work", ("wait", CUDA), ("read", CUDA)]


def test_a_device_that_records_no_memory_has_no_peak() -> None:
    assert devices.measure_peak(lambda: pytest.fail("not needed"), CPU) is None


def test_unused_memory_is_returned_where_pytorch_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = SimpleNamespace(empty_cache=lambda: calls.append("empty"))
    monkeypatch.setattr(torch, "get_device_module", {CUDA: module, CPU: torch.cpu}.__getitem__)
    devices.release_memory(CUDA)
    devices.release_memory(CPU)
    assert calls == ["empty"]
