"""Conversion between the authors' checkpoints and ours: bit for bit, whole or not at all, over nothing that exists."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import crislit
from crislit import convert
from crislit.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_metadata,
    read_checkpoint,
    write_released,
)
from crislit.checkpoints.released import LOGIT_SCALE, from_released, load_released, to_released
from crislit.errors import InputError
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from tests.checkpoints.test_released import (
    HEADS,
    SIZES,
    WORDS,
    State,
    assert_same_network,
    filled,
    logits,
    training_checkpoint,
    with_module,
)
from tests.checkpoints.test_released_errors import Evil
from tests.runs import execute
from tests.runs import run as run_program

FLAGS = ("--max-words", str(WORDS), "--decoder-heads", str(HEADS))
"""What the tiny network's weights do not tell."""


def run(*arguments: str | Path) -> None:
    """Convert in this process."""
    convert.main([str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Return the one line that a conversion ends with, and which the interpreter prints before it exits with 1."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


def assert_bits(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Agree in names, types, shapes and every bit, those of NaNs and signed zeros too."""
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(ours[name]), bits(value)), name


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    """Return everything below a folder except plain folders: hidden ones are temporary and should be gone."""
    found = [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in found
    }


def lightning(model: CRIS, **changes: Any) -> dict[str, Any]:
    """Return what a run of a network saves, in the memory format that it trains in."""
    trained = copy.deepcopy(model).to(memory_format=torch.channels_last)
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    assert not all(value.is_contiguous() for value in state.values())
    config = {"image_size": 64, "threshold": 0.4, "recipe": {"epochs": 3}}
    return {
        "epoch": 2,
        "global_step": 7,
        "state_dict": state | {"validation_metric.intersection": torch.zeros(1)},
        "optimizer_states": [training_checkpoint({})["optimizer"]],
        "crislit": checkpoint_metadata(model.config, config, "openai (sha256 0123456789abcdef)"),
    } | changes


@pytest.fixture(scope="module")
def network() -> CRIS:
    return filled(build_cris(CRISConfig(**SIZES)))


@pytest.fixture(scope="module")
def weights(network: CRIS) -> State:
    """Released weights, every kind of bits among them."""
    state = {name: value.clone() for name, value in to_released(network.state_dict()).items()}
    state[LOGIT_SCALE] = torch.tensor(4.60517)
    odd = torch.tensor([0x7FC12345, -0x3FEDCC, -0x80000000, 1, 0x7F800000], dtype=torch.int64).to(
        torch.int32
    )
    state["decoder.norm.bias"][:5] = odd.view(
        torch.float32
    )  # NaNs with a payload, -0.0, the smallest number, infinity
    return state


@pytest.fixture(scope="module")
def sources(weights: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same released weights as the files that they come in."""
    folder = tmp_path_factory.mktemp("released")
    save_file(weights, folder / "weights.safetensors")
    torch.save(weights, folder / "bare.pth")
    torch.save(training_checkpoint(weights), folder / "training.pth")
    torch.save(
        {"state_dict": with_module(weights)},
        folder / "legacy.pt",
        _use_new_zipfile_serialization=False,
    )
    return {path.name: path for path in folder.iterdir()}


SOURCES = ("weights.safetensors", "bare.pth", "training.pth", "legacy.pt")


@pytest.fixture(scope="module")
def plain(network: CRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint of numbers that can be computed with."""
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save({"state_dict": with_module(to_released(network.state_dict()))}, path)
    return path


@pytest.fixture(scope="module")
def originals(plain: Path, network: CRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of our own and a run's checkpoint."""
    place = tmp_path_factory.mktemp("originals")
    run(plain, place / "ours", *FLAGS, "--image-size", "64")
    torch.save(lightning(network), place / "best.ckpt")
    return place


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """A folder of our own, which a test may damage."""
    return shutil.copytree(originals / "ours", tmp_path / "ours")


@pytest.fixture
def ckpt(originals: Path, tmp_path: Path) -> Path:
    """A run's checkpoint."""
    return shutil.copyfile(originals / "best.ckpt", tmp_path / "best.ckpt")


# -- There and back


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("middle", ["ours", "deep/er/ours", "ours.safetensors"])
def test_released_weights_come_back_bit_for_bit(
    source: str, middle: str, sources: dict[str, Path], weights: State, tmp_path: Path
) -> None:
    ours = tmp_path / middle
    run(sources[source], ours, *FLAGS)
    model = ours if ours.suffix else ours / "model.safetensors"
    assert {path.name for path in model.parent.iterdir()} == {model.name, "config.json"}
    assert_bits(load_file(model), from_released(weights))

    run(ours, tmp_path / "back.safetensors", "--to", "released")
    assert_bits(load_file(tmp_path / "back.safetensors"), weights)
    run(ours, tmp_path / "back.pth", "--to", "released")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == {"state_dict"}
    assert_bits(back["state_dict"], with_module(weights))


@pytest.mark.parametrize("target", ["ours", "ours.safetensors"])
def test_our_weights_come_back_bit_for_bit(target: str, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "released.pth", "--to", "released")
    again = tmp_path / "again" / target
    run(tmp_path / "released.pth", again, *FLAGS, "--image-size", "64")
    model = again if again.suffix else again / "model.safetensors"
    assert_bits(load_file(model), load_file(folder / "model.safetensors"))
    first, second = (
        json.loads(path.with_name("config.json").read_text()) for path in (folder / "any", model)
    )
    assert second.pop("initial_weights") != first.pop("initial_weights")  # the files' names
    assert second == first


def test_the_golden_checkpoint_comes_back_bit_for_bit(
    golden: Path, golden_checkpoint: Path, tmp_path: Path
) -> None:
    run(golden_checkpoint, tmp_path / "ours", "--max-words", "12", "--decoder-heads", "4")
    run(tmp_path / "ours", tmp_path / "back.safetensors", "--to", "released")
    assert_bits(load_file(tmp_path / "back.safetensors"), load_file(golden_checkpoint))
    activations = load_file(golden / "tiny_a.activations.safetensors")
    with torch.no_grad():
        logits = read_checkpoint(tmp_path / "ours").build()(
            activations["in.image"], activations["in.tokens"]
        )
    assert (logits - activations["out.logits"]).norm() / activations["out.logits"].norm() < 1e-5


@pytest.mark.parametrize("source", ["weights.safetensors", "training.pth"])
def test_a_released_checkpoint_becomes_one_of_another_form_without_a_stop(
    source: str, sources: dict[str, Path], weights: State, tmp_path: Path
) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        run(sources[source], tmp_path / name, *FLAGS, "--to", "released")
    assert_bits(load_file(tmp_path / "weights.safetensors"), weights)
    assert_bits(
        torch.load(tmp_path / "weights.pth", weights_only=True)["state_dict"], with_module(weights)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_stay_what_they_are(
    dtype: torch.dtype, suffix: str, weights: State, tmp_path: Path
) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }
    source = tmp_path / f"source{suffix}"
    if suffix == ".pth":
        torch.save(state, source)
    else:
        save_file(state, source)
    run(source, tmp_path / "ours", *FLAGS)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {value.dtype for value in ours.values()} == {dtype, torch.int64}
    assert_bits(ours, from_released(state))
    run(tmp_path / "ours", tmp_path / "back.pth", "--to", "released")
    assert_bits(
        torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], with_module(state)
    )
    finite = {
        name: torch.nan_to_num(value, posinf=1.0, neginf=-1.0) for name, value in state.items()
    }  # to be built
    torch.save(finite, tmp_path / "finite.pth")
    run(tmp_path / "finite.pth", tmp_path / "built", *FLAGS)
    assert {p.dtype for p in read_checkpoint(tmp_path / "built").build().parameters()} == {
        torch.float32
    }


def test_weights_that_are_pieces_of_one_tensor_come_back_too(
    weights: State, tmp_path: Path
) -> None:
    flat = torch.arange(64.0)
    state = weights | {"neck.aggr.1.weight": flat[:32], "neck.aggr.1.bias": flat[32:]}
    state["neck.aggr.0.weight"] = (
        weights["neck.aggr.0.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    )
    torch.save(state, tmp_path / "source.pth")
    run(tmp_path / "source.pth", tmp_path / "ours", *FLAGS)
    assert_bits(load_file(tmp_path / "ours" / "model.safetensors"), from_released(state))


def test_weights_that_share_their_memory_come_back_too(weights: State, tmp_path: Path) -> None:
    state = weights | {"neck.aggr.1.bias": weights["neck.aggr.1.weight"]}
    torch.save(state, tmp_path / "source.pth")
    run(tmp_path / "source.pth", tmp_path / "ours", *FLAGS)
    assert_bits(load_file(tmp_path / "ours" / "model.safetensors"), from_released(state))


def test_the_authors_programs_get_a_file_that_they_can_read(
    folder: Path, network: CRIS, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "released.pth"
    run(folder, target, "--to", "released")
    content = torch.load(target, weights_only=True)
    assert list(content) == ["state_dict"]
    assert set(content["state_dict"]) == {
        f"module.{name}" for name in to_released(network.state_dict())
    }
    assert all(
        type(value) is Tensor and value.is_contiguous() for value in content["state_dict"].values()
    )
    assert_same_network(load_released(target, WORDS, HEADS), network)


# -- config.json


def test_the_configuration_tells_the_network_the_image_size_and_the_threshold(
    folder: Path, plain: Path
) -> None:
    about = json.loads((folder / "config.json").read_text())
    assert about == {
        "crislit": crislit.__version__,
        "network": SIZES,
        "image_size": 64,
        "threshold": 0.35,
        "initial_weights": f"released checkpoint {plain.name}",
        "steps": 0,
        "training": {},
        "results": {},
    }
    assert (folder / "config.json").read_text().endswith("}\n")


def test_what_a_released_checkpoint_does_not_tell_comes_from_flags_or_the_paper(
    plain: Path, tmp_path: Path
) -> None:
    def told(*flags: str) -> tuple[int, int, int]:
        target = tmp_path / "-".join(["to", *flags])
        run(plain, target, *flags)
        read = read_checkpoint(target)
        return read.network.max_tokens, read.network.decoder_heads, read.image_size

    context = SIZES["clip"]["text_cfg"]["context_length"]
    assert told() == (context, 8, 416)  # 17 words would not fit
    assert told("--max-words", "5", "--decoder-heads", "2", "--image-size", "480") == (5, 2, 480)


def test_what_the_folder_holds_builds_the_network(folder: Path, network: CRIS) -> None:
    for path in (folder, folder / "model.safetensors"):
        checkpoint = read_checkpoint(path)
        assert isinstance(checkpoint, Checkpoint)
        model = checkpoint.build()
        assert not model.training
        assert_same_network(model, network)


def test_the_program_says_what_it_wrote(
    plain: Path, weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(plain, tmp_path / "ours", *FLAGS)
    numbers = sum(value.numel() for value in weights.values())
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'ours'}: {numbers:,} numbers in {len(weights)} tensors\n"
    )


# -- A run's checkpoint


@pytest.mark.parametrize("target", ["ours", "ours.safetensors"])
def test_a_runs_checkpoint_becomes_a_folder_of_the_same_network(
    target: str, ckpt: Path, network: CRIS, tmp_path: Path
) -> None:
    run(ckpt, tmp_path / "out" / target)
    read = read_checkpoint(tmp_path / "out" / target)
    assert_same_network(read.build(), network)
    assert_bits(read.weights, network.state_dict())
    assert all(value.is_contiguous() for value in read.weights.values())
    assert (read.image_size, read.threshold, read.steps) == (64, 0.4, 7)
    assert read.initial_weights == "openai (sha256 0123456789abcdef)"
    assert read.config == {"image_size": 64, "threshold": 0.4, "recipe": {"epochs": 3}}


def test_a_runs_checkpoint_becomes_a_released_one(
    ckpt: Path, network: CRIS, tmp_path: Path
) -> None:
    for name in ("released.pth", "released.safetensors"):
        run(ckpt, tmp_path / name, "--to", "released")
        assert_same_network(load_released(tmp_path / name, WORDS, HEADS), network)
    content = torch.load(tmp_path / "released.pth", weights_only=True)
    assert all(value.is_contiguous() for value in content["state_dict"].values())


def test_a_folder_becomes_another_folder(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(folder)


def test_a_network_without_con_becomes_a_folder_but_no_released_checkpoint(tmp_path: Path) -> None:
    model = filled(build_cris(CRISConfig(**SIZES | {"contrastive": False})))
    torch.save(lightning(model), tmp_path / "best.ckpt")
    run(tmp_path / "best.ckpt", tmp_path / "ours")
    assert_same_network(read_checkpoint(tmp_path / "ours").build(), model)
    for source in ("best.ckpt", "ours"):
        message = refused(tmp_path / source, tmp_path / "released.pth", "--to", "released")
        assert "the released format cannot hold this network: 'head.conv." in message
    assert not (tmp_path / "released.pth").exists()


# -- Nothing is written over


@pytest.mark.parametrize("existing", ["model.safetensors", "config.json"])
def test_a_folders_files_are_not_written_over(existing: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / existing).write_bytes(b"precious")
    (tmp_path / "ours" / "other.txt").write_bytes(b"another")
    message = refused(plain, tmp_path / "ours", *FLAGS)
    assert f"{tmp_path / 'ours' / existing} exists, and nothing is written over" in message
    assert files(tmp_path) == {f"ours/{existing}": b"precious", "ours/other.txt": b"another"}


def test_a_second_network_does_not_get_the_firsts_configuration(plain: Path, folder: Path) -> None:
    before = files(folder)
    message = refused(plain, folder / "second.safetensors", *FLAGS)
    assert f"{folder / 'config.json'} exists" in message
    assert files(folder) == before


@pytest.mark.parametrize("name", ["released.pth", "released.pt", "released.safetensors"])
def test_a_released_file_is_not_written_over(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"precious")
    before = files(tmp_path)
    assert f"{tmp_path / name} exists" in refused(folder, tmp_path / name, "--to", "released")
    assert files(tmp_path) == before


def test_a_source_is_not_written_over(
    folder: Path, ckpt: Path, plain: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(plain.read_bytes())
    before = files(tmp_path)
    refused(source, source, *FLAGS, "--to", "released")
    refused(source, source, *FLAGS)
    refused(folder, folder)
    refused(folder, folder / "model.safetensors")
    refused(folder, folder / "model.safetensors", "--to", "released")
    refused(ckpt, ckpt, "--to", "released")
    assert files(tmp_path) == before


# -- Refused arguments


@pytest.mark.parametrize(
    "flags", [("--max-words", "9"), ("--decoder-heads", "4"), ("--image-size", "64"), FLAGS]
)
@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_what_a_checkpoint_says_itself_cannot_be_given(
    flags: tuple[str, ...], form: str, folder: Path, ckpt: Path, tmp_path: Path
) -> None:
    source = {"folder": folder, "file": folder / "model.safetensors", "run": ckpt}[form]
    before = files(tmp_path)
    for target in (("out",), ("out.pth", "--to", "released")):
        message = refused(source, tmp_path / target[0], *target[1:], *flags)
        names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
        assert f"{source} says itself what {', '.join(names)} would" in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["released", "released.ckpt", "released.bin", "released.pth.tar", ".pth"]
)
def test_a_released_checkpoint_must_have_a_suffix_that_says_so(
    name: str, folder: Path, tmp_path: Path
) -> None:
    message = refused(folder, tmp_path / name, "--to", "released")
    assert (
        f"the released format is a .pth, .pt or .safetensors file, and {tmp_path / name} is none"
        in message
    )
    assert set(files(tmp_path)) == {"ours/model.safetensors", "ours/config.json"}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--max-words", "15"), "max_words=15 exceeds"),
        (("--max-words", "2"), "max_words must be"),
        (("--max-words", "0"), "max_words must be"),
        (("--decoder-heads", "5"), "heads"),
        (("--decoder-heads", "-8"), "heads must be"),
    ],
)
def test_flags_that_make_no_network_are_refused(
    flags: tuple[str, ...], complaint: str, plain: Path, tmp_path: Path
) -> None:
    for target in (("out",), ("out.pth", "--to", "released")):
        assert complaint in refused(plain, tmp_path / target[0], *target[1:], *flags)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        ("--decoder-heads", "0"),
        ("--image-size", "0"),
        ("--image-size", "-32"),
        ("--image-size", "100"),
    ],
)
def test_flags_that_can_serve_nobody_are_refused(
    flags: tuple[str, str], plain: Path, tmp_path: Path
) -> None:
    message = refused(plain, tmp_path / "out", *flags)
    assert flags[1] in message
    assert not files(tmp_path)


# -- Unreadable sources


def test_a_source_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name in ("absent.pth", "absent.safetensors", "absent"):
        assert f"no checkpoint at {tmp_path / name}" in refused(
            tmp_path / name, tmp_path / "out", *FLAGS
        )
    (tmp_path / "empty").mkdir()
    assert f"there is no {tmp_path / 'empty' / 'model.safetensors'}" in refused(
        tmp_path / "empty", tmp_path / "out"
    )
    assert not files(tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_truncated_source_is_an_error_that_names_it(
    source: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    whole = sources[source].read_bytes()
    path = tmp_path / source
    for length in (0, 5, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"cannot read {path}" in refused(path, tmp_path / "out", *FLAGS)
        assert f"cannot read {path}" in refused(
            path, tmp_path / "out.pth", *FLAGS, "--to", "released"
        )
    assert set(files(tmp_path)) == {source}


def test_a_released_checkpoint_that_is_not_whole_is_an_error_that_names_what_is_missing(
    weights: State, tmp_path: Path
) -> None:
    path = tmp_path / "source.pth"
    torch.save(
        {
            "state_dict": {
                f"module.{k}": v for k, v in weights.items() if k != "decoder.norm.weight"
            }
        },
        path,
    )
    message = refused(path, tmp_path / "out", *FLAGS)
    assert str(path) in message
    assert "missing decoder.norm.weight" in message
    assert set(files(tmp_path)) == {"source.pth"}


def test_our_weights_alone_are_an_error(folder: Path, tmp_path: Path) -> None:
    alone = (folder / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert str(alone) in refused(alone, tmp_path / "out", *FLAGS)


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict": None},
        {"global_step": None},
        {"crislit": None},
        {"crislit": {}},
        {"crislit": {"settings": SIZES}},
    ],
    ids=str,
)
def test_a_runs_checkpoint_that_lacks_a_part_is_an_error_that_names_it(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "best.ckpt"
    torch.save(lightning(build_cris(CRISConfig(**SIZES))) | changes, path)
    assert f"{path} lacks a part of crislit's checkpoints" in refused(path, tmp_path / "out")
    assert set(files(tmp_path)) == {"best.ckpt"}


@pytest.mark.parametrize(
    "state",
    [{}, {"model.neck.aggregate.0.weight": torch.zeros(3)}, {"model.neck.aggregate.0.weight": 3}],
    ids=["none", "a few", "no tensor"],
)
def test_a_runs_checkpoint_with_other_weights_is_an_error_that_names_it(
    state: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "best.ckpt"
    torch.save(lightning(build_cris(CRISConfig(**SIZES)), state_dict=state), path)
    assert str(path) in refused(path, tmp_path / "out")
    assert str(path) in refused(path, tmp_path / "out.pth", "--to", "released")
    assert set(files(tmp_path)) == {"best.ckpt"}


def test_a_source_that_would_run_code_runs_none(tmp_path: Path) -> None:
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"crislit": Evil(mark), "state_dict": {}, "global_step": 0}, path)
    assert f"cannot read {path}" in refused(path, tmp_path / "out")
    assert not mark.exists()


# -- A damaged folder


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's config.json; None takes one out."""
    path = folder / "config.json"
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in about.items() if value is not None}))


def assert_refused(folder: Path, *names: Path) -> None:
    """Check that reading and converting a folder both end in an error that names one of the files, and write nothing."""
    before = files(folder.parent)
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder).build()
    messages = [str(caught.value), refused(folder, folder.parent / "out")]
    messages.append(refused(folder, folder.parent / "out.pth", "--to", "released"))
    for message in messages:
        assert any(str(name) in message for name in names), message
        assert len(message.splitlines()) == 1
    assert files(folder.parent) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_an_error_that_names_it(
    name: str, folder: Path
) -> None:
    (folder / name).unlink()
    assert_refused(folder, folder / name)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b"[" * 100_000],
    ids=lambda b: b[:5],
)
def test_a_damaged_configuration_is_an_error_that_names_it(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, folder / "config.json")


@pytest.mark.parametrize(
    "entry", ["network", "image_size", "threshold", "initial_weights", "steps", "training"]
)
def test_a_configuration_without_an_entry_is_an_error_that_names_it(
    entry: str, folder: Path
) -> None:
    edit(folder, **{entry: None})
    assert_refused(folder, folder / "config.json")
    with pytest.raises(InputError, match=f"config.json does not describe .*'{entry}'"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("image_size", "large"),
        ("image_size", [64]),
        ("image_size", float("nan")),
        ("threshold", "high"),
        ("steps", {}),
        ("image_size", float("inf")),
    ],
)
def test_a_configuration_with_an_impossible_number_is_an_error_that_names_it(
    entry: str, value: Any, folder: Path
) -> None:
    edit(folder, **{entry: value})
    assert_refused(folder, folder / "config.json")


def test_truncated_weights_of_a_folder_are_an_error_that_names_them(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(folder, path)


CLIP = SIZES["clip"]
UNFIT: dict[str, Any] = {
    "another width": SIZES | {"neck": [12, 32, 25]},
    "fewer layers": SIZES | {"decoder_layers": 2},
    "more layers": SIZES | {"decoder_layers": 4},
    "another head": SIZES | {"contrastive": False},
    "another kernel": SIZES | {"kernel_size": 1},
    "too many words": SIZES | {"max_tokens": 15},
    "an unknown setting": SIZES | {"depth": 3},
    "no encoders": {name: value for name, value in SIZES.items() if name != "clip"},
    "no settings": [],
    "a damaged encoder": SIZES | {"clip": CLIP | {"vision_cfg": 3}},
    "an encoder's width in words": SIZES | {"clip": CLIP | {"embed_dim": "wide"}},
    "heads that do not divide": SIZES
    | {"clip": CLIP | {"text_cfg": CLIP["text_cfg"] | {"heads": 3}}},
    "two stages": SIZES | {"clip": CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"layers": [1, 2]}}},
    "no text layers": SIZES | {"clip": CLIP | {"text_cfg": CLIP["text_cfg"] | {"layers": 0}}},
}


@pytest.mark.parametrize(
    "what", ["another width", "fewer layers", "more layers", "another head", "another kernel"]
)
def test_weights_that_do_not_fit_the_configuration_do_not_build(what: str, folder: Path) -> None:
    edit(folder, network=UNFIT[what])
    with pytest.raises(
        InputError,
        match=r"not the network's that the checkpoint describes: .*(neck|decoder|head)\.",
    ):
        read_checkpoint(folder).build()


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_do_not_fit_the_configuration_are_an_error_that_names_it(
    what: str, folder: Path
) -> None:
    edit(folder, network=UNFIT[what])
    assert_refused(folder, folder / "config.json", folder / "model.safetensors", folder)


def test_a_released_checkpoint_beside_anybodys_configuration_is_still_released(
    sources: dict[str, Path], weights: State, tmp_path: Path
) -> None:
    source = tmp_path / "weights.safetensors"
    source.write_bytes(sources["weights.safetensors"].read_bytes())
    (tmp_path / "config.json").write_text('{"architectures": ["CRIS"]}\n')
    run(source, tmp_path / "ours", *FLAGS)
    assert_bits(load_file(tmp_path / "ours" / "model.safetensors"), from_released(weights))


def test_a_released_checkpoint_beside_our_configuration_is_still_released(
    folder: Path, tmp_path: Path
) -> None:
    run(folder, folder / "released.safetensors", "--to", "released")
    run(folder / "released.safetensors", tmp_path / "again", *FLAGS)
    assert_bits(
        load_file(tmp_path / "again" / "model.safetensors"), load_file(folder / "model.safetensors")
    )


# -- Writing that fails


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def half(write: Callable[..., None], error: Exception) -> Callable[..., None]:
    """Return a writer that writes its file and fails nevertheless."""

    def failing(content: Any, path: Path) -> None:
        write(content, path)
        assert Path(path).stat().st_size
        raise error

    return failing


TARGETS = {
    "folder": ("out",),
    "file": ("out.safetensors",),
    "released safetensors": ("out.safetensors", "--to", "released"),
    "released pth": ("out.pth", "--to", "released"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["folder", "run"])
def test_a_full_disk_leaves_nothing_behind(
    target: str, source: str, folder: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("crislit.io.tensors.save_file", half(save_file, full))
    monkeypatch.setattr(torch, "save", half(torch.save, full))
    name, *options = TARGETS[target]
    message = refused({"folder": folder, "run": ckpt}[source], folder.parent / name, *options)
    assert f"cannot write {folder.parent / name}" in message
    assert "No space left on device" in message
    assert files(folder.parent) == before


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_that_cannot_get_its_name_leaves_nothing_behind(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    monkeypatch.setattr(Path, "replace", full_disk)
    name, *options = TARGETS[target]
    assert "No space left on device" in refused(folder, folder.parent / name, *options)
    assert files(folder.parent) == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", TARGETS)
def test_a_disk_that_is_really_full_is_an_error_without_traceback(
    target: str, folder: Path
) -> None:
    before = files(folder.parent)
    name, *options = TARGETS[target]
    with file_size_limit(100_000):
        message = refused(folder, folder.parent / name, *options)
    assert f"cannot write {folder.parent / name}" in message
    assert files(folder.parent) == before


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_ends_the_writing_leaves_nothing_behind(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    monkeypatch.setattr(
        "crislit.io.tensors.save_file", half(save_file, SafetensorError("I/O error"))
    )
    monkeypatch.setattr(torch, "save", half(torch.save, RuntimeError("unexpected pos")))
    name, *options = TARGETS[target]
    with pytest.raises((SafetensorError, RuntimeError, SystemExit)):
        run(folder, folder.parent / name, *options)
    assert files(folder.parent) == before


def test_whoever_may_read_the_configuration_may_read_the_weights(folder: Path) -> None:
    run(folder, folder.parent / "out")
    modes = {path.stat().st_mode for path in (folder.parent / "out").iterdir()}
    assert len(modes) == 1


def test_a_configuration_that_cannot_be_written_takes_the_weights_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        assert "No space left on device" in refused(folder, folder.parent / "out")
    assert files(folder.parent) == before
    run(folder, folder.parent / "out")


def test_a_target_below_a_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    before = files(tmp_path)
    for target in (("file",), ("file/out",), ("file/out.pth", "--to", "released")):
        assert f"cannot write {tmp_path / 'file'}" in refused(
            folder, tmp_path / target[0], *target[1:]
        )
    assert files(tmp_path) == before


# -- As a program


def test_the_program_says_what_it_has_written(
    plain: Path, network: CRIS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(plain, tmp_path / "ours", *FLAGS)
    told = capsys.readouterr()
    assert told.err == ""
    assert re.fullmatch(r".*/ours: [\d,]+ numbers in \d+ tensors\n", told.out)
    assert_same_network(read_checkpoint(tmp_path / "ours").build(), network)


def test_the_programs_errors_are_one_line_on_stderr_and_exit_code_1(
    plain: Path, tmp_path: Path
) -> None:
    source = tmp_path / "hostile.pth"
    source.write_bytes(plain.read_bytes()[:5000])
    done = execute("convert", str(source), str(tmp_path / "ours"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot read {source}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr
    assert set(files(tmp_path)) == {"hostile.pth"}


def test_unknown_formats_and_flags_are_errors_of_usage(plain: Path, tmp_path: Path) -> None:
    for wrong in (["--to", "onnx"], ["--max-words", "many"], ["--threshold", "0.5"]):
        with pytest.raises(SystemExit) as caught:
            run(plain, tmp_path / "out", *wrong)
        assert caught.value.code == 2
    assert not files(tmp_path)


def test_the_help_names_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in (
        ".pth",
        ".safetensors",
        "best.ckpt",
        "config.json",
        "--max-words",
        "--decoder-heads",
        "--image-size",
    ):
        assert word in text


def test_a_converted_checkpoint_of_the_authors_code_evaluates_on_the_data_that_one_names(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = SIZES["clip"] | {
        "text_cfg": SIZES["clip"]["text_cfg"] | {"vocab_size": 49408, "context_length": 22}
    }
    network = build_cris(CRISConfig(**SIZES | {"clip": clip}))
    torch.save(to_released(network.state_dict()), tmp_path / "cris.pth")
    convert.main(
        [
            str(tmp_path / "cris.pth"),
            str(tmp_path / "ours"),
            "--image-size",
            "96",
            "--decoder-heads",
            "4",
        ]
    )
    data = (f"checkpoint={tmp_path}/ours", f"data_root={small_shapes}", "callbacks.pictures=0")
    with pytest.raises(SystemExit):
        run_program(monkeypatch, tmp_path / "unnamed", *data, program="evaluate")
    assert "error: which data?" in capsys.readouterr().err
    results = run_program(
        monkeypatch,
        tmp_path / "run",
        *data,
        "dataset=shapes",
        "protocol=first_sentence",
        program="evaluate",
    )
    assert [values["samples"] for values in results["splits"].values()] == [12, 12, 12]
    assert results["initial_weights"] == "released checkpoint cris.pth"
    assert results["config"]["decoder"] == {"layers": 3, "heads": 4, "ffn": 40, "dropout": 0.1}
    assert results["config"]["image_size"] == 96
    assert "the figure that the released code selects checkpoints by" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("name", ["ours.pth", "ours.pt", "ours.ckpt"])
def test_whoever_forgets_to_say_released_is_told(name: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"expected a folder or a \.safetensors file, found .*--to released"
    ):
        run(plain, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_the_released_format_does_not_tell_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path / "back.pth", "--to", "released")
    assert (
        f"does not tell: decoder heads {HEADS}, at most {WORDS} words, 64 pixels"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("part", "name", "value"), [("text_cfg", "heads", 2), ("vision_cfg", "head_width", 32)]
)
def test_heads_off_clips_rule_cannot_be_written_in_the_released_format(
    part: str, name: str, value: int, tmp_path: Path
) -> None:
    clip = SIZES["clip"] | {part: SIZES["clip"][part] | {name: value}}
    network = build_cris(CRISConfig(**SIZES | {"clip": clip}))
    checkpoint = Checkpoint(network.config, network.state_dict(), 64, 0.35, "random")
    with pytest.raises(InputError, match="the released format cannot hold"):
        write_released(checkpoint, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("absent", "width"), [("heads", 32), ("width", 512)])
def test_heads_and_width_that_a_run_leaves_to_open_clip_are_what_open_clip_takes(
    absent: str, width: int, tmp_path: Path
) -> None:
    text = {
        name: value for name, value in (CLIP["text_cfg"] | {"heads": 8}).items() if name != absent
    }
    model = filled(
        build_cris(
            CRISConfig(**SIZES | {"clip": CLIP | {"text_cfg": text}, "neck": [12, width, 24]})
        )
    )
    torch.save(lightning(model), tmp_path / "best.ckpt")
    if width // 64 == 8:
        run(tmp_path / "best.ckpt", tmp_path / "out.pth", "--to", "released")
        assert torch.equal(logits(load_released(tmp_path / "out.pth", WORDS, HEADS)), logits(model))
    else:
        assert "8 heads" in refused(
            tmp_path / "best.ckpt", tmp_path / "out.pth", "--to", "released"
        )
        assert not (tmp_path / "out.pth").exists()
