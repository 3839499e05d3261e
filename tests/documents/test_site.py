"""``make docs`` builds a site that needs no other address, and fails at a broken link."""

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
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of what the site is built from."""
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    return tmp_path


def test_broken_links_fail_the_build(copied: Path) -> None:
    page = copied / "docs/index.md"
    broken = ("[a](nowhere.md)", "[b](model.md#nowhere)", "[c][crislit.Segmentr]")
    page.write_text(page.read_text() + "\n".join(broken))
    (copied / "docs/orphan.md").write_text("# Orphan\n")
    ended = build(copied)
    assert ended.returncode != 0
    for name in ("nowhere.md", "#nowhere", "crislit.Segmentr", "orphan.md"):
        assert name in ended.stderr, name


def test_the_site_loads_nothing_from_other_addresses(copied: Path) -> None:
    ended = build(copied)
    assert ended.returncode == 0, ended.stderr
    pages = list((copied / "site").rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        loaded = re.findall(
            r'<(?:script|link|img|object)\b[^>]*?(?:src|href|data)="([^"]+)"', page.read_text()
        )
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page
    # The boxes of the diagram lead to sections.
    model = (copied / "site/model.html").read_text()
    boxes = re.findall(
        r'href="\.\./model\.html#([\w-]+)"', (ROOT / "docs/images/model.svg").read_text()
    )
    assert len(boxes) >= 8
    assert all(f'id="{box}"' in model for box in boxes)
    assert (
        sum(path.stat().st_size for path in (copied / "site").rglob("*") if path.is_file()) < 20e6
    )
