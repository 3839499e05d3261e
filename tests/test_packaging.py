"""What users install: the wheel holds the configuration and runs anywhere, and the make targets do nothing twice."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.runs import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, env=environment([("PIP_NO_INDEX", "1")]), check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_whole_configuration_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"crislit/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert "crislit/py.typed" in names
    assets = [path for path in (ROOT / "src/crislit/assets").rglob("*") if path.is_file()]
    assert len(assets) >= 7
    for path in assets:
        assert path.relative_to(ROOT / "src").as_posix() in names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_the_wheel_composes_and_trains_in_another_environment_and_folder(
    wheel: Path, small_shapes: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # The dependencies are this environment's: gigabytes that need not be installed again.
    here = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    ours = Path(pytest.__file__).parents[1]
    Path(here.stdout.strip(), "dependencies.pth").write_text(f"{ours}\n")
    work = tmp_path / "elsewhere"
    work.mkdir()

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(python), *arguments], cwd=work, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(tmp_path / "env") in run("-c", "import crislit; print(crislit.__file__)")
    assert "RN101-quickgelu" in run("-m", "crislit.train", "--cfg", "job", "model=rn101", "dataset=grefcoco")
    small = (
        "image_size=64",
        "batch_size=8",
        "decoder.layers=1",
        "trainer.max_steps=1",
        "trainer.devices=1",
        f"data_root={small_shapes}",
    )
    assert "testB" in run("-m", "crislit.train", *small)
    (results,) = work.glob("outputs/*/*/results.json")
    assert results.is_file()


def test_the_shipped_examples_are_what_their_script_draws(tmp_path: Path) -> None:
    script = ROOT / "scripts/make_examples.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env=environment())
    shipped = ROOT / "src/crislit/assets/examples"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in shipped.iterdir())
    for path in tmp_path.iterdir():
        if path.suffix == ".txt":
            assert path.read_text() == (shipped / path.name).read_text()
        else:  # encoders of other versions differ by a little
            drawn, known = (np.asarray(PIL.Image.open(folder / path.name), dtype=float) for folder in (tmp_path, shipped))
            assert abs(drawn - known).mean() < 2


def test_every_dependency_says_why_it_is_there_and_none_is_left_out() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = [line.strip() for line in text.split("dependencies = [")[1].split("\n]")[0].splitlines() if line.strip()]
    assert len(lines) == len(project["dependencies"])
    assert all("#" in line for line in lines)
    assert {"dev", "demo", "onnx", "tensorboard", "sweep"} <= set(project["optional-dependencies"])
    assert "albumentations==2.0.8" in project["dependencies"]
    assert project["requires-python"] == ">=3.11"


def test_no_dependency_is_under_a_copyleft_licence() -> None:
    from importlib.metadata import metadata

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = requirement.split("=")[0].split(">")[0]
        try:
            facts = metadata(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is a dependency and not installed")
        licence = " ".join([*(facts.get_all("License-Expression") or []), *(facts.get_all("Classifier") or [])])
        assert "GPL" not in licence, f"{name}: {licence}"
        assert version(name)


def test_make_says_what_a_machine_lacks(tmp_path: Path) -> None:
    fake = tmp_path / "sitecustomize.py"
    fake.write_text("import sys; sys.version_info = (3, 9, 0, 'final', 0)")
    check = [sys.executable, str(ROOT / "scripts/check_machine.py")]
    done = subprocess.run(check, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: Python 3.11 or newer is needed, this is 3.9")
    assert subprocess.run(check, check=False).returncode == 0


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as if typed in a shell: the tests themselves may run under make, which talks to its children."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=plain, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_make_targets_do_nothing_twice(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    (copy / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        (copy / name).write_text((ROOT / name).read_text())

    def would_run(target: str) -> str:
        return make(copy, "-n", target).stdout

    for target in ("train", "test", "test-slow", "lint"):
        assert "venv .venv" in would_run(target)
        assert "pip install" in would_run(target)
    (copy / ".venv/bin/python").touch()
    for name in ("ready", "ready-dev"):
        (copy / ".venv" / name).touch()
    assert would_run("train").split() == ["OMP_NUM_THREADS=1", ".venv/bin/python", "-m", "crislit.train"]
    for target in ("test", "test-slow", "lint"):
        assert "install" not in would_run(target)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("code", "says", "expected"),
    [
        (0, "No known vulnerabilities found", None),
        (1, "Found 1 known vulnerability in 1 package", "there are vulnerabilities"),
        (0, "numpy  Dependency not found on PyPI and could not be audited: numpy (2.0)", "nobody was asked about"),
    ],
)
def test_an_audit_that_asked_nobody_is_no_clean_one(code: int, says: str, expected: str | None, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name, content in {
        ".venv/bin/python": "",
        ".venv/ready-dev": "",
        ".venv-audit/bin/pip-audit": f"#!/bin/sh\necho '{says}'\nexit {code}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    done = make(tmp_path, "audit")
    assert says in done.stdout
    assert (done.returncode == 0) == (expected is None)
    assert expected is None or f"error: {expected}" in done.stderr
