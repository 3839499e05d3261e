"""The tests and files that the security page names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_security_page_names_exists() -> None:
    text = (ROOT / "docs/security.md").read_text()
    file = ""
    checked = 0
    for named, test in re.findall(r"`(?:(test_\w+)\.py)?(?:::)?(test_\w+)?`", text):
        file = named or file
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        source = path.read_text()
        if test:
            assert f"def {test}(" in source, (file, test)
            checked += 1
    assert checked >= 15


def test_every_file_that_the_security_page_names_exists() -> None:
    text = (ROOT / "docs/security.md").read_text()
    for name in re.findall(r"`((?:results|scripts|docs)/[\w./]+)`", text):
        assert (ROOT / name).is_file(), name
