"""Untrusted input ends in the right result or one clear error, and does no harm."""

import json
import os
import pickle
import re
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.io.hostile.case import ANY
from tests.io.hostile.pickles import refused_pickles
from tests.io.hostile.sandbox import CASES, PROBES
from tests.runs import environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the sandbox limits memory as Linux does"
)

ROOT = Path(__file__).parents[2]
MAX_SECONDS, MAX_ELAPSED, MAX_MEGABYTES = 10, 60, 600
"""Processor time, time on a busy machine, and memory that reading an input may take."""


class Sandbox:
    """A process that reads hostile input; it is restarted after an input that ended it."""

    def __init__(self, home: Path) -> None:
        self.environment = environment(
            [
                ("XDG_CACHE_HOME", str(home)),
                ("TMPDIR", str(home)),
                ("PYTHONDONTWRITEBYTECODE", "1"),
                ("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)])),
            ]
        )
        self.errors = home / "stderr"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "subprocess.Popen[str]":
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.io.hostile.sandbox"],
                cwd=ROOT,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def attempt(self, name: str, folder: Path, timeout: float = 2 * MAX_ELAPSED) -> dict[str, Any]:
        """Read an input in a new folder, and return the outcome."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            self.process = self.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, str(folder)]) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.close()
                return {"crash": f"no answer in {timeout} seconds"}
        answer = self.process.stdout.readline()
        if not answer:
            code, errors = self.process.wait(), self.errors.read_text()[-2000:]
            return {"crash": f"it ended the process with {code}: {errors}"}
        outcome: dict[str, Any] = json.loads(answer)
        return outcome

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One process for all input."""
    box = Sandbox(tmp_path_factory.mktemp("home"))
    yield box
    box.close()


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_ends_in_the_right_result_or_one_clear_error(
    name: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    case, folder = CASES[name], tmp_path / "case"
    outcome = sandbox.attempt(name, folder)
    assert "crash" not in outcome, outcome["crash"]
    assert not outcome["outside"], "it wrote outside its folder"
    assert not outcome["started"], "it started a program"
    assert not (folder / "mark").exists(), "it ran code"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case"]
    assert outcome["seconds"] < MAX_SECONDS
    assert outcome["elapsed"] < MAX_ELAPSED
    assert outcome["megabytes"] < MAX_MEGABYTES
    if case.error is None:
        assert "value" in outcome, outcome
        assert case.value == ANY or outcome["value"] == case.value
    else:
        assert re.search(case.error, outcome.get("error", "")), outcome
        assert len(outcome["error"].splitlines()) == 1
        assert len(outcome["error"]) < 1000
        assert not case.names_file or str(folder) in outcome["error"], "the message names the file"


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_the_corpus_run_code_in_an_unrestricted_reader(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(refused_pickles()[f"code, protocol {protocol}"])
    assert (tmp_path / "mark").exists()


@pytest.fixture
def fresh_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A process whose memory no input has used yet."""
    box = Sandbox(tmp_path_factory.mktemp("home"))
    yield box
    box.close()


def test_the_sandbox_detects_harm(fresh_sandbox: Sandbox, tmp_path: Path) -> None:
    names = [name for name in PROBES if name != "hangs"]
    outcomes = {name: fresh_sandbox.attempt(name, tmp_path / name) for name in names}
    assert outcomes["writes outside"]["outside"] == [str(tmp_path / "elsewhere")]
    assert outcomes["makes a folder outside"]["outside"] == [str(tmp_path / "folder")]
    assert outcomes["starts a program"]["started"]
    assert outcomes["takes memory"]["megabytes"] > MAX_MEGABYTES
    assert "MemoryError" in outcomes["takes too much memory"]["crash"]
    assert outcomes["computes"]["seconds"] > 0.5
    assert outcomes["computes"]["elapsed"] > 1.1
    assert "ended the process" in outcomes["ends the process"]["crash"]
    assert outcomes["fails"]["crash"].endswith("ZeroDivisionError: division by zero")


def test_the_sandbox_gives_up_on_input_that_hangs(sandbox: Sandbox, tmp_path: Path) -> None:
    outcome = sandbox.attempt("hangs", tmp_path / "case", timeout=1)
    assert outcome == {"crash": "no answer in 1 seconds"}
