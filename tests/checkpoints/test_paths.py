"""Paths that hold no network: the message names the checkpoint that was meant."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import crislit
from crislit.checkpoints.checkpoint import read_any, read_checkpoint, write_released
from crislit.checkpoints.initial_weights import find_start
from crislit.checkpoints.paths import find_network
from crislit.errors import DamagedFileError, InputError, see

READERS: dict[str, Callable[[Path], Any]] = {
    "evaluate": read_any,
    "figures": read_checkpoint,
    "init_from": lambda path: find_start(str(path)),
    "predict": crislit.load,
}


def write(*paths: Path, content: str | bytes = b"\x80\x02") -> None:
    """Write files; the default content is not text."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run."""
    folder = tmp_path / "run"
    write(*(folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt", "previous.ckpt")))
    write(folder / "results.json", content='{"seed": 0}\n')
    write(folder / "metrics.csv", content="\ufeffepoch,loss\n0,1.5\n")
    write(folder / "notes.html", content="<!DOCTYPE html>\n<html>")
    return folder


def refuse(path: Path, read: Callable[[Path], Any] = find_network) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_the_folder_of_a_run_is_answered_with_its_best_checkpoint(reader: str, run: Path) -> None:
    message = refuse(run, READERS[reader])
    assert message.endswith(
        f"{run} is a folder, and a checkpoint is a file: give {run}/checkpoints/best.ckpt; it also "
        "holds checkpoints/last.ckpt, checkpoints/previous.ckpt" + see("checkpoint-path")
    )
    assert message.startswith(f"init_from={run}: " if reader == "init_from" else str(run))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("results.json", '{"seed": 0}'),
        ("metrics.csv", "epoch,loss 0,1.5"),
        ("notes.html", "<!DOCTYPE html> <html>"),
    ],
)
def test_a_file_of_text_is_answered_with_the_checkpoint_beside_it(
    reader: str, name: str, start: str, run: Path
) -> None:
    message = refuse(run / name, READERS[reader])
    assert f"{run / name} is not a checkpoint but text, which begins with {start!r}" in message
    assert message.endswith(f"; there is {run}/checkpoints/best.ckpt{see('checkpoint-path')}")


def test_other_folders_are_answered_with_what_they_hold(run: Path, tmp_path: Path) -> None:
    best = "checkpoints/best.ckpt"
    assert f"give {run}/{best}; it also holds last.ckpt, previous.ckpt" in refuse(
        run / "checkpoints"
    )
    (run / best).unlink()
    assert f"give {run}/checkpoints/last.ckpt; it also holds" in refuse(run)
    write(*(tmp_path / f"sweep/{number}" / best for number in range(6)))
    message = refuse(tmp_path / "sweep")
    assert f"give {tmp_path}/sweep/0/{best}; it also holds 1/{best}, 2/{best}, 3/{best}" in message
    assert message.endswith(f"3/{best}, 2 more{see('checkpoint-path')}")
    write(tmp_path / "authors/cris_r50.pth")
    message = refuse(tmp_path / "authors")
    assert message.endswith(f"give {tmp_path}/authors/cris_r50.pth{see('checkpoint-path')}")
    write(tmp_path / "onnx/grounding.onnx")
    assert "exported to ONNX, which can only predict" in refuse(tmp_path / "onnx")
    write(tmp_path / "killed/.hydra/config.yaml")
    assert "is the folder of a run without checkpoints" in refuse(tmp_path / "killed")
    (tmp_path / "empty").mkdir()
    message = refuse(tmp_path / "empty")
    assert "is not a network, and there is no" in message
    assert message.endswith(f"a .pth file of the authors' code{see('checkpoint-path')}")


def test_a_wrong_name_is_answered_with_the_checkpoint_near_it(run: Path) -> None:
    for wrong in (run / "best.ckpt", run / "checkpoints/bset.ckpt"):
        message = refuse(wrong)
        assert message.startswith(f"no checkpoint at {wrong}; a run keeps checkpoints/best.ckpt")
        assert message.endswith(f"; there is {run}/checkpoints/best.ckpt{see('checkpoint-path')}")
    expected = f"and checkpoints/last.ckpt{see('checkpoint-path')}"
    assert refuse(run / "nowhere/best.ckpt").endswith(expected)


def test_text_counts_as_damage_and_other_bytes_are_left_to_the_readers(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for text in ("version https://git-lfs.github.com/spec/v1\noid", "é" * 300 + "x" * 400):
        write(file, content=text)
        with pytest.raises(DamagedFileError, match="is not a checkpoint but text"):
            find_network(file)
    for content in (b"", b"PK\x03\x04", b"\x80\x02}q", b'\x08\0\0\0\0\0\0\0{"a": 1}', b"\0" * 99):
        write(file, content=content)
        assert find_network(file) == file
        with pytest.raises(DamagedFileError, match="it is damaged, or not a PyTorch checkpoint"):
            read_any(file)


# -- Sizes that the authors' files do not store


def test_assumed_sizes_of_a_released_file_are_one_line_with_the_way_to_set_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cris.pth"
    write_released(read_checkpoint(Path("shapes-tiny")), file)
    convert = f"For others: python -m crislit.convert {file} FOLDER"
    cases: tuple[tuple[dict[str, Any], str, str], ...] = (
        (
            {},
            "8 heads in the decoder, images of 416 pixels, 17 tokens per sentence",
            "--decoder-heads N --image-size N --max-words N",
        ),
        ({"max_tokens": 9, "image_size": 192}, "8 heads in the decoder", "--decoder-heads N"),
        ({"max_tokens": 17, "image_size": 192, "decoder_heads": 4}, "", ""),
    )
    for sizes, assumed, options in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checkpoint = read_any(file, **sizes)
        line = f"{file} does not store all of its sizes; assumed: {assumed}. {convert} {options}"
        line += see("released-sizes")
        assert [record.getMessage() for record in caplog.records] == [line] * bool(assumed)
        assert checkpoint.image_size == sizes.get("image_size", 416)
        assert checkpoint.network.decoder_heads == sizes.get("decoder_heads", 8)
    caplog.clear()
    read_any(Path("shapes-tiny"))
    assert not caplog.records, "crislit's own files store everything"
    assert torch.equal(
        checkpoint.weights["head.linear.weight"],
        read_any(Path("shapes-tiny")).weights["head.linear.weight"],
    )
