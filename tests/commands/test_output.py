"""Commands print on any output: what it cannot encode is escaped."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from crislit import check_data
from crislit.errors import one_line_errors


class Output(io.TextIOWrapper):
    """An output of an encoding, as Python opens it where a command's output is redirected."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")

    def text(self) -> str:
        self.flush()
        content: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return content.decode(self.encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_check_data_prints_names_and_sentences_in_any_encoding(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PIL.Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8)).save(tmp_path / "a.png")
    polygons = [[10, 5, 30, 5, 30, 25, 10, 25]]
    lines = [
        {"image": "a.png", "sentence": "\u7ea2\u8272 \U0001f534", "split": "\u8bad\u7ec3"},
        {"image": "\u56fe\xe9.png", "sentence": "x"},
    ]
    content = "\n".join(json.dumps({**line, "polygons": polygons}) for line in lines)
    (tmp_path / "d.jsonl").write_text(content)
    output = Output(encoding)
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit, match="error: 1 problem in"):
        check_data.main([str(tmp_path / "d.jsonl")])
    text = output.text()
    if encoding == "utf-8":
        assert "\u56fe\xe9.png" in text
        assert "\u8bad\u7ec3: 1 object," in text
    else:
        assert (r"\u56fe\xe9.png" if encoding == "ascii" else "\\u56fe\xe9.png") in text
        assert r"\u8bad\u7ec3: 1 object, 1 sentence, 1 image" in text


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_every_command_prints_in_any_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, errors = Output(encoding), Output(encoding)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)
    with one_line_errors():
        print("\u7ea2 \U0001f534 \ud800")
        print("\u56fe", file=sys.stderr)
    assert output.text() == "\\u7ea2 \\U0001f534 \\ud800\n"
    assert errors.text() == "\\u56fe\n"
