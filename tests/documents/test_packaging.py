"""The wheel contains the configuration and runs anywhere; make targets do not repeat their work."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.runs import environment

ROOT = Path(__file__).parents[2]


def build(kind: str, folder: Path) -> Path:
    """Build a distribution without a network, and return its file."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation"]
    result = subprocess.run(
        [*command, "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        env=environment([("PIP_NO_INDEX", "1")]),
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_source_distribution_builds_the_site_in_two_minutes(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("crislit-*")
    tracked = subprocess.run(
        ["git", "ls-files", "src", "conf", "tests", "scripts", "docs", "notebooks", "results"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(tracked) > 300
    assert not [name for name in tracked if not (source / name).is_file()]
    paths = environment([("PYTHONPATH", str(source / "src")), ("NO_MKDOCS_2_WARNING", "1")])
    for command in (["scripts.pages", "--check"], ["mkdocs", "build", "--strict"]):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=source,
            env=paths,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert (source / "site/troubleshooting.html").is_file()


def test_the_wheel_contains_the_configuration_the_assets_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"crislit/conf/{path.relative_to(ROOT / 'conf')}" in names
    assert "crislit/py.typed" in names
    assets = [path for path in (ROOT / "src/crislit/assets").rglob("*") if path.is_file()]
    assert len(assets) >= 7
    for path in assets:
        assert path.relative_to(ROOT / "src").as_posix() in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheels_metadata_names_authors_and_addresses_and_has_the_readme(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    fields = message_from_bytes(archive.read(name))
    assert fields["Author"] == "The crislit authors"
    assert fields.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2111.15174"]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_the_address_of_the_repository_makes_the_readmes_links_absolute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = runpy.run_path(str(ROOT / "scripts/build_metadata.py"))
    text = "![a](docs/a.jpg) [b](b.md#c) [d](https://e.org/f) [g](#h) [`i`](conf/i.yaml)"
    start = "https://e.org/o/crislit"
    assert script["absolute_links"](text, start, "1.2") == (
        f"![a]({start}/raw/v1.2/docs/a.jpg) [b]({start}/blob/v1.2/b.md#c) [d](https://e.org/f) "
        f"[g](#h) [`i`]({start}/blob/v1.2/conf/i.yaml)"
    )
    monkeypatch.setenv("CRISLIT_REPOSITORY", f"{start}/")
    metadata = {"version": "1.2"}
    script["BuildMetadata"](str(ROOT), {}).update(metadata)
    project: Any = metadata
    assert project["urls"]["Repository"] == start
    assert f"]({start}/raw/v1.2/docs/masks.jpg)" in project["readme"]["text"]
    links = re.findall(r"\]\(([^)]+)\)", project["readme"]["text"])
    assert all(link.startswith(("https://", "#")) for link in links)


@pytest.mark.slow
def test_the_wheel_composes_and_trains_in_another_environment_and_folder(
    wheel: Path, small_shapes: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    # Reuse the dependencies of this environment: installing them again would take gigabytes.
    packages = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    dependencies = Path(pytest.__file__).parents[1]
    Path(packages.stdout.strip(), "dependencies.pth").write_text(f"{dependencies}\n")
    work = tmp_path / "elsewhere"
    work.mkdir()

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [str(python), *arguments],
            cwd=work,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert str(tmp_path / "env") in run("-c", "import crislit; print(crislit.__file__)")
    show = ("-m", "crislit.train", "--cfg", "job")
    assert "RN101-quickgelu" in run(*show, "model=rn101", "dataset=grefcoco")
    small = (
        *("image_size=64", "batch_size=8", "decoder.layers=1", "trainer.max_steps=1"),
        *("trainer.devices=1", f"data_root={small_shapes}"),
    )
    assert "testB" in run("-m", "crislit.train", *small)
    (results,) = work.glob("outputs/*/*/results.json")
    assert results.is_file()


def test_the_shipped_examples_match_the_script_that_draws_them(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "scripts/make_examples.py"))["main"](tmp_path)
    shipped = ROOT / "src/crislit/assets/examples"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in shipped.iterdir())
    for name in names:
        if not name.endswith(".jpg"):
            assert (tmp_path / name).read_text() == (shipped / name).read_text()
        else:
            drawn, expected = (
                np.asarray(PIL.Image.open(folder / name), dtype=float)
                for folder in (tmp_path, shipped)
            )
            # JPEG encoders of other versions differ slightly.
            assert abs(drawn - expected).mean() < 2


def test_every_dependency_has_a_comment_with_its_purpose() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = text.split("dependencies = [")[1].split("\n]")[0].strip().splitlines()
    assert len(lines) == len(project["dependencies"])
    assert all("#" in line for line in lines)
    assert {"dev", "demo", "onnx", "tensorboard", "sweep"} <= set(project["optional-dependencies"])
    assert "albumentations==2.0.8" in project["dependencies"]
    assert project["requires-python"] == ">=3.11"


def test_no_dependency_has_a_copyleft_license() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = requirement.split("=")[0].split(">")[0]
        try:
            fields = metadata(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is a dependency but not installed")
        for field in ("License-Expression", "Classifier"):
            text = " ".join(fields.get_all(field) or [])
            assert "GPL" not in text, f"{name}: {text}"
        assert version(name)


@pytest.mark.parametrize(
    ("version", "free", "message"),
    [
        ((3, 11, 0), 9, ""),
        ((3, 9, 0), 9, "error: Python 3.11 or newer is needed, this is 3.9: make PYTHON=/path"),
        ((3, 11, 0), 7.5, "error: 8 GB of free disk space are needed, 7.5 GB are left"),
    ],
)
def test_make_reports_an_old_python_and_a_full_disk(
    version: tuple[int, int, int], free: float, message: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil, sys, types\n"
        f"sys.version_info = {(*version, 'final', 0)}\n"
        f"shutil.disk_usage = lambda path: types.SimpleNamespace(free={free} * 1e9)\n"
    )
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts/check_machine.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == bool(message)
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == bool(message)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make like a user's shell, without the variables that a make running these tests sets."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_do_not_install_twice(tmp_path: Path) -> None:
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
    assert would_run("train").strip() == ".venv/bin/python -m crislit.train"
    for target in ("test", "test-slow", "lint"):
        assert "install" not in would_run(target)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "No known vulnerabilities found", None),
        (1, "Found 1 known vulnerability in 1 package", "there are vulnerabilities"),
        (
            0,
            "numpy  Dependency not found on PyPI and could not be audited: numpy (2.0)",
            "some packages could not be audited",
        ),
    ],
)
def test_an_audit_fails_if_a_package_could_not_be_audited(
    code: int, output: str, expected: str | None, tmp_path: Path
) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name, content in {
        ".venv/bin/python": "",
        ".venv/ready-dev": "",
        ".venv-audit/bin/pip-audit": f"#!/bin/sh\necho '{output}'\nexit {code}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    result = make(tmp_path, "audit")
    assert output in result.stdout
    assert (result.returncode == 0) == (expected is None)
    assert expected is None or f"error: {expected}" in result.stderr
