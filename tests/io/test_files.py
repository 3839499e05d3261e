"""Files are written as the user's umask says, whatever library writes them."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from crislit.errors import InputError
from crislit.io import save_tensors, write_csv, write_files, write_json, write_text

TENSORS, ARRAYS = {"a": torch.ones(2)}, {"a": np.ones(2)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "text"),
    "JSON": lambda path: write_json(path, [1]),
    "CSV": lambda path: write_csv(path, ["a"], [{"a": 1}]),
    "tensors": lambda path: write_files({path: lambda part: save_tensors(TENSORS, part)}),
    "safetensors": lambda path: write_files({path: lambda part: save_file(ARRAYS, part)}),
    "PyTorch": lambda path: write_files({path: lambda part: torch.save(TENSORS, part)}),
}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_file_has_the_mode_of_the_umask(
    write: Callable[[Path], object], umask: int, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "file"
    before = os.umask(umask)
    try:
        write(path)
        write(path)  # replaces the first one
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, 1)

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("no space left")

    with pytest.raises(InputError, match=r"cannot write .*file\.json: no space left"):
        write_files({path: fail})
    assert json.loads(path.read_text()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
