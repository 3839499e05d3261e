"""Runs commands for tests, in this process or, where signals and exit codes matter, in another."""

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

from crislit import evaluate, train

QUICK = (
    "workers=0",
    "trainer.devices=1",
    "+trainer.enable_progress_bar=false",
    "callbacks.pictures=0",
)
"""No worker processes, progress bar or plots: they take longer than the short runs of tests."""


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, program: str = "train"
) -> dict[str, Any]:
    """Run a command in this process and return its results.json.

    Raises:
        SystemExit: If the command reports an error.
    """
    main = {"train": train.main, "evaluate": evaluate.main}[program]
    options = [text for text in overrides if text.startswith("--")]
    rest = [text for text in overrides if text not in options]
    own = [f"hydra.run.dir={folder}", "hydra/job_logging=stdout", *QUICK]
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *options, *own, *rest])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    main()
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def run_here(program: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run any command in this process with a command line; only jobs of a sweep start others."""
    monkeypatch.setattr(sys, "argv", [f"crislit.{program}", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()
    try:
        importlib.import_module(f"crislit.{program}").main()
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{program} {shlex.join(arguments)}: {end.code}")


def command(program: str, *overrides: str) -> list[str]:
    """Return the command line that starts a command in another process."""
    return [sys.executable, "-m", f"crislit.{program}", *overrides]


def execute(
    program: str, *overrides: str, cwd: Path, seconds: float = 300, threads: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a command in another process, without network access."""
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
