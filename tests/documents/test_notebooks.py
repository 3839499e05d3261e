"""The notebooks run from top to bottom on embedded data."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"image/jpeg", "image/png"}


def read_cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return a notebook's cells of one kind."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs(path: Path) -> None:
    cells = read_cells(path, "code")
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, 1 + len(cells))), "not executed from top to bottom"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    # Warnings on standard error would contain local paths.
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert sum(not FIGURES.isdisjoint(output.get("data", ())) for output in outputs) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_installs_crislit_where_it_is_missing(path: Path) -> None:
    assert path.stat().st_size < 700_000
    first = "".join(read_cells(path, "code")[0]["source"])
    assert first == "".join(read_cells(NOTEBOOKS[0], "code")[0]["source"])
    assert "REPOSITORY =" in first
    assert len(read_cells(path, "code")) <= 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_lead_to_files(path: Path) -> None:
    text = "".join(line for cell in read_cells(path, "markdown") for line in cell["source"])
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / target).is_file(), target


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, small_shapes: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    # Imitate a clone, with the small data set instead of the full one.
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "data").symlink_to(small_shapes)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # few steps are enough here
        cell.source = re.sub(r"epochs=\d+", "epochs=2", cell.source)
        cell.source = re.sub(r"every_n_epoch=\d+", "every_n_epoch=1", cell.source)
    client = nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3")
    client.execute(cwd=str(tmp_path / "notebooks"))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(output.output_type != "error" for output in outputs)
    assert any(not FIGURES.isdisjoint(output.get("data", ())) for output in outputs)
