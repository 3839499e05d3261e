"""State dicts in files: damaged files have an error of their own, and every other error has not."""

import errno
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crislit.errors import DamagedFileError, InputError
from crislit.io.tensors import check_checksums, read_safetensors, read_state_dict, read_torch

WEIGHTS = {"a": torch.arange(1000.0), "b": torch.ones(3)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A PyTorch file, which is a zip archive."""
    path = tmp_path / "weights.pt"
    torch.save(WEIGHTS, path)
    return path


def flip_a_bit(path: Path) -> None:
    """Flip a bit within the weights."""
    content = bytearray(path.read_bytes())
    content[content.index(WEIGHTS["a"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)


def test_a_damaged_file_is_an_input_error_of_its_own() -> None:
    assert issubclass(DamagedFileError, InputError)
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_not_pytorchs_is_damaged(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for read in (read_torch, read_state_dict):
        with pytest.raises(DamagedFileError, match=r"cannot read .*weights\.pt: it is damaged"):
            read(path)
    with pytest.raises(DamagedFileError, match=r"weights\.pt is damaged"):
        check_checksums(path)


def test_truncated_files_are_damaged(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(DamagedFileError, match="it is damaged, or not a PyTorch checkpoint"):
        read_torch(archive)
    tensors = archive.with_suffix(".safetensors")
    save_file(WEIGHTS, tensors)
    tensors.write_bytes(tensors.read_bytes()[:-9])
    for read in (read_safetensors, read_state_dict):
        with pytest.raises(DamagedFileError, match="it is damaged, or not a safetensors file"):
            read(tensors)


def test_a_flipped_bit_is_found_by_the_checksums_only(archive: Path) -> None:
    check_checksums(archive)
    flip_a_bit(archive)
    assert not torch.equal(read_torch(archive)["a"], WEIGHTS["a"])
    with pytest.raises(DamagedFileError, match=r"weights\.pt is damaged \(.*data/0.*\)"):
        check_checksums(archive)


def test_a_compressed_archive_is_not_pytorchs(archive: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(compressed, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(DamagedFileError, match="it is compressed"):
        read_torch(compressed)


def test_other_errors_do_not_call_the_file_damaged(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(message: str, path: Path) -> InputError:
        with pytest.raises(InputError, match=message) as raised:
            read_state_dict(path)
        return raised.value

    assert type(error("no weights at", tmp_path / "gone.pt")) is InputError
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    assert type(error("holds no state dict", tmp_path / "other.pt")) is InputError

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    message = r"cannot read .*weights\.pt: Input/output error"
    assert type(error(message, archive)) is InputError
    with pytest.raises(InputError, match=message) as raised:
        check_checksums(archive)
    assert type(raised.value) is InputError


@pytest.mark.parametrize("fault", [AttributeError("no such method"), TypeError("3 arguments")])
@pytest.mark.parametrize("read", [read_torch, check_checksums])
def test_a_fault_of_the_program_is_not_called_damage(
    read: Callable[[Path], Any], fault: Exception, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr("crislit.io.tensors.check_torch_pickle", fail)
    monkeypatch.setattr(zipfile, "ZipFile", fail)
    with pytest.raises(type(fault), match=str(fault)):
        read(archive)


def test_errors_within_pytorch_and_zipfile_are_damage(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged bytes lead libraries to errors of any type, here to a call of None."""
    monkeypatch.setattr("torch.serialization._load", None)
    with pytest.raises(DamagedFileError, match=r"not a PyTorch checkpoint .*NoneType"):
        read_torch(archive)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(DamagedFileError, match=r"is damaged .*NoneType"):
        check_checksums(archive)
