"""``make docs`` fails at a broken link; the site is complete, and needs no other address."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
(BUILD,) = re.findall(r"\$\(BIN\)/mkdocs (build.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a folder with the options of the Makefile."""
    command = [sys.executable, "-m", "mkdocs", *shlex.split(BUILD)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(  # in two minutes, on two cores
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_broken_links_fail_the_build_and_pages_load_nothing_from_other_addresses(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    page = tmp_path / "docs/index.md"
    broken = ("[a](nowhere.md)", "[b](model.md#nowhere)", "[c][crislit.Segmentr]")
    page.write_text(page.read_text() + "\n".join(broken))
    (tmp_path / "docs/orphan.md").write_text("# Orphan\n")
    ended = build(tmp_path)
    assert ended.returncode != 0
    for name in ("nowhere.md", "#nowhere", "crislit.Segmentr", "orphan.md"):
        assert name in ended.stderr, name

    # The pages have been written all the same.
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        html = page.read_text()
        tags = re.findall(r"<(?:script|link|img|object)\b[^>]*>", html)
        loaded = re.findall(r'(?:src|href|data)="([^"]+)"', "".join(tags))
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page
    for page in (ROOT / "docs/reference/api").glob("*.md"):
        package = "crislit" if page.stem == "crislit" else f"crislit.{page.stem}"
        html = (tmp_path / f"site/reference/api/{page.stem}.html").read_text()
        for name in {*importlib.import_module(package).__all__} - {"__version__"}:
            assert f'id="{package}.{name}"' in html, name
    boxes = re.findall(r"model\.html#([\w-]+)", (ROOT / "docs/images/model.svg").read_text())
    assert len(boxes) >= 8
    model = (tmp_path / "site/model.html").read_text()
    assert all(f'id="{box}"' in model for box in boxes)
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
