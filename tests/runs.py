"""Runs the programs for the tests: in this process, or in one of their own where signals or exit codes count."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

QUICK = ("workers=0", "trainer.devices=1", "+trainer.enable_progress_bar=false", "callbacks.pictures=0")
"""No worker processes, no bar and no pictures, which take longer than all else: the tests' runs are short."""


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, program: str = "train") -> dict[str, Any]:
    """Run a program in this process and return its results.json; InputError and the like end in SystemExit."""
    from crislit import evaluate, train

    main = {"train": train.main, "evaluate": evaluate.main}[program]
    arguments = [f"crislit.{program}", f"hydra.run.dir={folder}", "hydra/job_logging=stdout"]
    monkeypatch.setattr(sys, "argv", [*arguments, *QUICK, *overrides])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    main()
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def run_here(program: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run any program in this process, as its command line would: only the jobs of a sweep have their own."""
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    try:
        importlib.import_module(f"crislit.{program}").main()
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{program} {shlex.join(arguments)}: {end.code}")


def command(program: str, *overrides: str) -> list[str]:
    """Return the command line of a program in a process of its own."""
    return [sys.executable, "-m", f"crislit.{program}", *overrides]


def execute(
    program: str, *overrides: str, cwd: Path, seconds: float = 300, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, without a network."""
    return subprocess.run(
        command(program, *overrides),
        cwd=cwd,
        env=environment([("OMP_NUM_THREADS", str(threads))]),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def environment(extra: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Return an environment for child processes."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | dict(extra)
