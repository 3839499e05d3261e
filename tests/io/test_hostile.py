"""What strangers made ends in the right result or in one clear error, and does no harm (the corpus is in hostile.py)."""

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

from tests.io.hostile import ANY, CASES, WITNESSES, refused_pickles
from tests.runs import environment

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of a process's memory are Linux's"
)

ROOT = Path(__file__).parents[2]
SECONDS, ELAPSED, MEGABYTES = 10, 60, 600
"""Of computing, of a busy machine's time, and of memory beyond what the programs take anyway, that an input may cost."""


class Sandbox:
    """A process that tries hostile input, begun anew where one has ended it."""

    def __init__(self, home: Path) -> None:
        extra = [
            ("XDG_CACHE_HOME", str(home)),
            ("TMPDIR", str(home)),
            ("PYTHONDONTWRITEBYTECODE", "1"),
        ]
        self.environment = environment(
            [*extra, ("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))]
        )
        self.errors = home / "stderr"
        self.process: subprocess.Popen[str] | None = None

    def attempt(self, name: str, folder: Path, patience: float = 2 * ELAPSED) -> dict[str, Any]:
        """Try an input in a folder of its own, and return how it ended."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            with self.errors.open("w") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "tests.io.hostile"],
                    cwd=ROOT,
                    env=self.environment,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, str(folder)]) + "\n")
        self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(patience):
                self.close()
                return {"crash": f"no end in {patience} seconds"}
        answer = self.process.stdout.readline()
        if not answer:
            return {
                "crash": f"it ended the process, with {self.process.wait()}: {self.errors.read_text()[-2000:]}"
            }
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
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
    end = sandbox.attempt(name, folder)
    assert "crash" not in end, end["crash"]
    assert not end["outside"], "it wrote outside its folder"
    assert not end["started"], "it started a program"
    assert not (folder / "mark").exists(), "it ran code"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case"]
    assert end["seconds"] < SECONDS
    assert end["elapsed"] < ELAPSED
    assert end["megabytes"] < MEGABYTES
    if case.error is None:
        assert "value" in end, end
        assert case.value == ANY or end["value"] == case.value
    else:
        assert re.search(case.error, end.get("error", "")), end
        assert len(end["error"].splitlines()) == 1
        assert len(end["error"]) < 1000
        assert not case.file or str(folder) in end["error"], "the message names the file"


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("protocol", range(6))
def test_the_corpus_holds_pickles_that_do_run_code_where_they_are_let(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(refused_pickles()[f"code, protocol {protocol}"])
    assert (tmp_path / "mark").exists()


@pytest.fixture
def fresh_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One whose memory no input has used yet."""
    box = Sandbox(tmp_path_factory.mktemp("home"))
    yield box
    box.close()


def test_the_sandbox_sees_what_it_is_there_to_see(fresh_sandbox: Sandbox, tmp_path: Path) -> None:
    ends = {
        name: fresh_sandbox.attempt(name, tmp_path / name) for name in WITNESSES if name != "hangs"
    }
    assert ends["writes outside"]["outside"] == [str(tmp_path / "elsewhere")]
    assert ends["makes a folder outside"]["outside"] == [str(tmp_path / "folder")]
    assert ends["starts a program"]["started"]
    assert ends["takes memory"]["megabytes"] > MEGABYTES
    assert "MemoryError" in ends["takes more memory than there is"]["crash"]
    assert ends["computes"]["seconds"] > 0.5
    assert ends["computes"]["elapsed"] > 1.1
    assert "ended the process" in ends["ends the process"]["crash"]
    assert ends["fails"]["crash"].endswith("ZeroDivisionError: division by zero")


def test_the_sandbox_gives_up_on_what_hangs(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.attempt("hangs", tmp_path / "case", patience=1) == {
        "crash": "no end in 1 seconds"
    }
