"""SECURITY.md claims nothing that no test shows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_security_md_names_exists() -> None:
    named = re.findall(r"`(?:(test_\w+)\.py)?(?:::)?(test_\w+)?`", (ROOT / "SECURITY.md").read_text())
    file = ""
    checked = 0
    for other, test in named:
        file = other or file
        source = (ROOT / f"tests/{file}.py").read_text()
        if test:
            assert f"def {test}(" in source, (file, test)
            checked += 1
    assert checked >= 15


def test_every_file_that_security_md_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert all((ROOT / name).is_file() for name in re.findall(r"`((?:results|scripts|docs)/[\w./]+)`", text))
