"""``scripts/gpu_acceptance.sh``: its stages, their limits and what it reports, without a GPU."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu_acceptance.sh"
PARTS = ["rows", "training", "evaluation", "latency", "agreement", "data"]

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout"))), reason="needs bash and coreutils"
)

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$* with $PYTHONPATH" >> "$CALLS"
case "$*" in
  "-m pytest"*)
    for argument; do [[ $argument != --junitxml=* ]] || xml=${argument#*=}; done
    echo '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2">' > "$xml"
    echo '<testcase name="test_a"><failure/></testcase></testsuite></testsuites>' >> "$xml"
    exit 1 ;;
  "-m crislit.benchmark --evaluation"*) exit 124 ;;
  "-m crislit.benchmark"*)
    for argument; do [[ $before != --output ]] || folder=$argument; before=$argument; done
    [[ -f $folder/speed.csv ]] || echo part,value > "$folder/speed.csv"
    echo "${3#--},1" >> "$folder/speed.csv"; echo "measured $3" ;;
  "-m pip"*) ;;
  "- cpu"* | -) cat > /dev/null ;;
  *) exec REAL "$@" ;;
esac
"""
"""Fails the tests, takes too long for a part of the benchmark, and measures a row of the others."""
FAKE_TIMEOUT = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
echo "$1 $2" >> "$LIMITS"
shift; exec "$@"
"""


class Machine:
    """Runs the script with a Python that only pretends to work."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.limits, self.output = folder / "calls", folder / "limits", folder / "out"
        self.fakes = folder / "bin"
        self.fakes.mkdir()
        self.script = SCRIPT
        self.add("python", FAKE_PYTHON)
        self.add("timeout", FAKE_TIMEOUT)
        self.settings = {"DEVICE": "cpu", "PYTHON": str(self.fakes / "python"), "WHEELS": ""}

    def add(self, name: str, text: str) -> None:
        """Add a program."""
        (self.fakes / name).write_text(text.replace("REAL", sys.executable))
        (self.fakes / name).chmod(0o755)

    def run(self, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
        """Run the script in another folder."""
        return subprocess.run(
            ["bash", str(self.script), *arguments],
            cwd=self.fakes,
            env=os.environ
            | {"PATH": f"{self.fakes}:{os.environ['PATH']}"}
            | {"CALLS": str(self.calls), "LIMITS": str(self.limits)}
            | self.settings
            | settings,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def called(self) -> list[str]:
        """Return the calls of Python."""
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine whose Python pretends to work."""
    return Machine(tmp_path)


def test_every_stage_runs_although_others_fail_or_take_too_long(machine: Machine) -> None:
    done = machine.run(str(machine.output))
    assert done.returncode == 1, done.stderr
    names = [
        "benchmark.log",
        "environment.txt",
        "speed.csv",
        "summary.txt",
        "tests.log",
        "tests.xml",
    ]
    assert sorted(path.name for path in machine.output.iterdir()) == names
    stages = re.findall("^== ([a-z]+)$", done.stdout, re.MULTILINE)
    assert stages == ["tests", *PARTS]
    summary = (machine.output / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    assert re.search(r"^tests: failed with exit code 1, \d+ s$", summary, re.MULTILINE)
    assert re.search(r"^evaluation: ended after its limit of \d+ s, ", summary, re.MULTILINE)
    passed = re.findall(r"^(\w+): passed, \d+ s$", summary, re.MULTILINE)
    assert passed == [part for part in PARTS if part != "evaluation"]
    assert "tests: 2 passed, 1 failed, 2 skipped\n  failed: test_a\n" in summary
    measured = "rows 1, training 1, latency 1, agreement 1, data 1"
    assert summary.endswith(f"rows measured: {measured}\n")
    log = (machine.output / "benchmark.log").read_text()
    assert log.startswith("== rows\nmeasured --rows\n== training\n")


def test_the_limits_of_all_stages_add_up_to_25_minutes(machine: Machine) -> None:
    machine.run(str(machine.output))
    limits = [line.split() for line in machine.limits.read_text().splitlines()]
    limited = {int(seconds) for seconds, program in limits if program != "tee"}
    # What a stage leaves is for the next one: here, none takes a second.
    assert max(limited) == pytest.approx(1500, abs=5)
    alone = {}
    for stage in ("tests", *PARTS):
        machine.limits.unlink()
        machine.run(str(machine.output), stage)
        seconds = machine.limits.read_text().splitlines()
        alone[stage] = next(int(line.split()[0]) for line in seconds if not line.endswith("tee"))
    assert sum(alone.values()) == 1500
    assert max(alone.values()) < 600, "a machine may allow 10 minutes per command"


def test_a_stage_that_hangs_is_ended_and_what_processes_leave_behind_holds_nothing(
    machine: Machine,
) -> None:
    hanging = 'case "$*" in *--data*) trap "" INT; setsid sleep 9 & sleep 60 ;; *--latency*) '
    machine.add(
        "python", FAKE_PYTHON.replace("case", f"{hanging} setsid sleep 9 & ;; esac\ncase", 1)
    )
    (machine.fakes / "timeout").unlink()
    machine.script = machine.fakes / "scripts/gpu_acceptance.sh"
    machine.script.parent.mkdir()
    short = re.sub(r"(\[(?:data|latency)\])=\d+", r"\1=1", SCRIPT.read_text())
    machine.script.write_text(short.replace("--kill-after=15", "--kill-after=1"))
    began = time.monotonic()
    done = machine.run(str(machine.output), "data", "latency")
    assert time.monotonic() - began < 8
    assert done.returncode == 1
    assert re.search(r"\ndata: ended after its limit of 1 s, [123] s\n", done.stdout), done.stdout
    assert re.search(r"\nlatency: passed, [01] s\n", done.stdout)


def test_stages_are_chosen_and_arguments_are_passed_on(machine: Machine) -> None:
    settings = {"BENCHMARK_ARGS": "--model tiny --rounds 1"}
    done = machine.run(str(machine.output), "latency", "data", **settings)
    assert done.returncode == 0
    calls = [call for call in machine.called() if "crislit.benchmark" in call]
    options = f"--device cpu --output {machine.output} --model tiny --rounds 1"
    assert [call.split(" with ")[0] for call in calls] == [
        f"-m crislit.benchmark --{part} {options}" for part in ("latency", "data")
    ]
    assert all(call.split(" with ")[1].startswith(f"{ROOT}/src") for call in calls)
    assert not any(call.startswith("-m pytest") for call in machine.called())


def test_wheels_are_installed_without_an_index_and_come_first(machine: Machine) -> None:
    wheels = machine.fakes.parent / "wheels"
    wheels.mkdir()
    (wheels / "some-1.0-py3-none-any.whl").touch()
    relative = os.path.relpath(wheels, machine.fakes)
    assert machine.run(str(machine.output), "data", WHEELS=relative).returncode == 0
    [install] = [call for call in machine.called() if call.startswith("-m pip install")]
    target = re.search(r"--no-index --no-deps .*--target (\S+) \S+/some-1.0-\S+ with", install)
    assert target
    measured = next(call for call in machine.called() if "crislit.benchmark" in call)
    assert measured.split(" with ")[1].startswith(f"{target[1]}:{ROOT}/src")
    assert not Path(target[1]).exists(), "the folder is temporary"
    assert not Path(target[1]).is_relative_to(machine.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "speed"], "unknown stage speed: expected tests, benchmark, or of its parts rows "),
        (["tests"], "the folder comes first: "),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, machine: Machine) -> None:
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not machine.calls.exists()


def test_wheels_that_are_not_there_are_an_error(machine: Machine) -> None:
    done = machine.run(str(machine.output), "data", WHEELS="elsewhere")
    assert done.returncode == 2
    assert done.stderr == "error: WHEELS=elsewhere is not a folder with wheels\n"


def test_a_missing_package_or_device_is_named_before_anything_runs(machine: Machine) -> None:
    modules = machine.fakes.parent / "modules"
    for name in (
        *("torchvision", "lightning", "torchmetrics", "hydra", "omegaconf", "open_clip", "wandb"),
        *("albumentations", "cv2", "pycocotools", "huggingface_hub", "matplotlib", "rich", "tqdm"),
    ):
        (modules / name).mkdir(parents=True)
        (modules / name / "__init__.py").touch()
    (modules / "pycocotools/mask.py").touch()
    real = {"PYTHON": sys.executable, "PYTHONPATH": str(modules)}
    done = machine.run(str(machine.output), "rows", DEVICE="cuda:99", **real)
    assert done.returncode == 2
    assert re.fullmatch(r"error: PyTorch \S+ cannot compute on cuda:99: .+\n", done.stderr), (
        done.stderr
    )
    missing = "raise ModuleNotFoundError('no module', name='{}')"
    (modules / "cv2/__init__.py").write_text(missing.format("cv2"))
    (modules / "albumentations/__init__.py").write_text(missing.format("albucore"))
    done = machine.run(str(machine.output), "rows", **real)
    assert done.returncode == 2
    assert done.stderr == (
        "error: this Python cannot import albucore (for albumentations), cv2: put their wheels "
        "into a folder and set WHEELS\n"
    )


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(tmp_path: Path) -> None:
    settings = {"DEVICE": "cpu", "PYTHON": sys.executable, "WHEELS": ""}
    settings["BENCHMARK_ARGS"] = "--model tiny --image-size 64 --rounds 1 --images 1"
    done = subprocess.run(
        ["bash", "scripts/gpu_acceptance.sh", str(tmp_path), "tests", "rows"],
        cwd=ROOT,
        env=os.environ | settings | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\ntests: 0 passed, 0 failed, \d\d skipped\n", done.stdout)
    assert re.search(r"\nrows measured: .*rows \d+", done.stdout)
    assert "device cpu" in (tmp_path / "environment.txt").read_text()
