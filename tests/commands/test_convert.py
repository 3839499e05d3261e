"""Conversion of checkpoints keeps every bit, is complete or leaves no files, never overwrites."""

import copy
import json
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
"""Settings of the tiny network that cannot be inferred from its weights."""


def run(*arguments: str | Path) -> None:
    """Convert in this process."""
    convert.main([str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Return the error line of a conversion that fails."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    message = caught.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


def assert_bits(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare names, types, shapes and every bit, also those of NaNs and signed zeros."""
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(ours[name]), bits(value)), name


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, and its hidden folders as empty."""
    paths = [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def lightning(model: CRIS, **changes: Any) -> dict[str, Any]:
    """Return the Lightning checkpoint of a run, in the memory format of training."""
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
    """Released weights with unusual numbers among them."""
    state = {name: value.clone() for name, value in to_released(network.state_dict()).items()}
    state[LOGIT_SCALE] = torch.tensor(4.60517)
    # NaNs with a payload, -0.0, the smallest number, infinity.
    odd = torch.tensor([0x7FC12345, -0x3FEDCC, -0x80000000, 1, 0x7F800000], dtype=torch.int64)
    state["decoder.norm.bias"][:5] = odd.to(torch.int32).view(torch.float32)
    return state


@pytest.fixture(scope="module")
def sources(weights: State, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same released weights in every form of file."""
    folder = tmp_path_factory.mktemp("released")
    save_file(weights, folder / "weights.safetensors")
    torch.save(weights, folder / "bare.pth")
    torch.save(training_checkpoint(weights), folder / "training.pth")
    content = {"state_dict": with_module(weights)}
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return {path.name: path for path in folder.iterdir()}


SOURCES = ("weights.safetensors", "bare.pth", "training.pth", "legacy.pt")


@pytest.fixture(scope="module")
def plain(network: CRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint of finite weights."""
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save({"state_dict": with_module(to_released(network.state_dict()))}, path)
    return path


@pytest.fixture(scope="module")
def originals(plain: Path, network: CRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder and a run's checkpoint."""
    root = tmp_path_factory.mktemp("originals")
    run(plain, root / "ours", *FLAGS, "--image-size", "64")
    torch.save(lightning(network), root / "best.ckpt")
    return root


@pytest.fixture
def folder(originals: Path, tmp_path: Path) -> Path:
    """A converted folder, which a test may damage."""
    return shutil.copytree(originals / "ours", tmp_path / "ours")


@pytest.fixture
def ckpt(originals: Path, tmp_path: Path) -> Path:
    """A run's checkpoint."""
    return shutil.copyfile(originals / "best.ckpt", tmp_path / "best.ckpt")


# -- Round trips


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
    first = json.loads((folder / "config.json").read_text())
    second = json.loads(model.with_name("config.json").read_text())
    assert second.pop("initial_weights") != first.pop("initial_weights")  # the files' names
    assert second == first


def test_the_golden_checkpoint_comes_back_bit_for_bit(
    golden: Path, golden_checkpoint: Path, tmp_path: Path
) -> None:
    run(golden_checkpoint, tmp_path / "ours", "--max-words", "12", "--decoder-heads", "4")
    run(tmp_path / "ours", tmp_path / "back.safetensors", "--to", "released")
    assert_bits(load_file(tmp_path / "back.safetensors"), load_file(golden_checkpoint))
    activations = load_file(golden / "tiny_a.activations.safetensors")
    model = read_checkpoint(tmp_path / "ours").build()
    with torch.no_grad():
        result = model(activations["in.image"], activations["in.tokens"])
    expected = activations["out.logits"]
    assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("source", ["weights.safetensors", "training.pth"])
def test_a_released_checkpoint_is_converted_to_another_released_form(
    source: str, sources: dict[str, Path], weights: State, tmp_path: Path
) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        run(sources[source], tmp_path / name, *FLAGS, "--to", "released")
    assert_bits(load_file(tmp_path / "weights.safetensors"), weights)
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert_bits(content["state_dict"], with_module(weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_precisions_are_kept(
    dtype: torch.dtype, suffix: str, weights: State, tmp_path: Path
) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
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
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_bits(content["state_dict"], with_module(state))
    # Only finite weights can be built.
    finite = {k: torch.nan_to_num(v, posinf=1.0, neginf=-1.0) for k, v in state.items()}
    torch.save(finite, tmp_path / "finite.pth")
    run(tmp_path / "finite.pth", tmp_path / "built", *FLAGS)
    model = read_checkpoint(tmp_path / "built").build()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_that_are_views_of_one_tensor_are_converted(weights: State, tmp_path: Path) -> None:
    flat = torch.arange(64.0)
    state = weights | {"neck.aggr.1.weight": flat[:32], "neck.aggr.1.bias": flat[32:]}
    transposed = weights["neck.aggr.0.weight"].transpose(0, 1).contiguous()
    state["neck.aggr.0.weight"] = transposed.transpose(0, 1)
    torch.save(state, tmp_path / "source.pth")
    run(tmp_path / "source.pth", tmp_path / "ours", *FLAGS)
    assert_bits(load_file(tmp_path / "ours" / "model.safetensors"), from_released(state))


def test_weights_that_share_memory_are_converted(weights: State, tmp_path: Path) -> None:
    state = weights | {"neck.aggr.1.bias": weights["neck.aggr.1.weight"]}
    torch.save(state, tmp_path / "source.pth")
    run(tmp_path / "source.pth", tmp_path / "ours", *FLAGS)
    assert_bits(load_file(tmp_path / "ours" / "model.safetensors"), from_released(state))


def test_released_files_have_the_format_of_the_authors_programs(
    folder: Path, network: CRIS, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "released.pth"
    run(folder, target, "--to", "released")
    content = torch.load(target, weights_only=True)
    assert list(content) == ["state_dict"]
    state = content["state_dict"]
    assert set(state) == set(with_module(to_released(network.state_dict())))
    assert all(type(value) is Tensor and value.is_contiguous() for value in state.values())
    assert_same_network(load_released(target, WORDS, HEADS), network)


# -- config.json


def test_the_configuration_holds_the_network_the_image_size_and_the_threshold(
    folder: Path, plain: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    network = SIZES | {"max_words": SIZES["max_tokens"]}
    del network["max_tokens"]
    assert config == {
        "crislit": crislit.__version__,
        "network": network,
        "image_size": 64,
        "threshold": 0.35,
        "initial_weights": f"released checkpoint {plain.name}",
        "steps": 0,
        "training": {},
        "results": {},
    }
    assert (folder / "config.json").read_text().endswith("}\n")


def test_sizes_that_a_released_checkpoint_lacks_come_from_flags_or_the_paper(
    plain: Path, tmp_path: Path
) -> None:
    def convert_with(*flags: str) -> tuple[int, int, int]:
        target = tmp_path / "-".join(["to", *flags])
        run(plain, target, *flags)
        checkpoint = read_checkpoint(target)
        network = checkpoint.network
        return network.max_tokens, network.decoder_heads, checkpoint.image_size

    context = SIZES["clip"]["text_cfg"]["context_length"]
    assert convert_with() == (context, 8, 416)  # 17 tokens would not fit
    flags = ("--max-words", "5", "--decoder-heads", "2", "--image-size", "480")
    assert convert_with(*flags) == (5, 2, 480)


def test_the_folder_builds_the_network(folder: Path, network: CRIS) -> None:
    for path in (folder, folder / "model.safetensors"):
        checkpoint = read_checkpoint(path)
        assert isinstance(checkpoint, Checkpoint)
        model = checkpoint.build()
        assert not model.training
        assert_same_network(model, network)


def test_the_command_reports_what_it_wrote(
    plain: Path, weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(plain, tmp_path / "ours", *FLAGS)
    numbers = sum(value.numel() for value in weights.values())
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'ours'}: {numbers:,} numbers in {len(weights)} tensors\n"
    assert output.err == ""


# -- A run's checkpoint


@pytest.mark.parametrize("target", ["ours", "ours.safetensors"])
def test_a_runs_checkpoint_becomes_a_folder_of_the_same_network(
    target: str, ckpt: Path, network: CRIS, tmp_path: Path
) -> None:
    run(ckpt, tmp_path / "out" / target)
    checkpoint = read_checkpoint(tmp_path / "out" / target)
    assert_same_network(checkpoint.build(), network)
    assert_bits(checkpoint.weights, network.state_dict())
    assert all(value.is_contiguous() for value in checkpoint.weights.values())
    assert (checkpoint.image_size, checkpoint.threshold, checkpoint.steps) == (64, 0.4, 7)
    assert checkpoint.initial_weights == "openai (sha256 0123456789abcdef)"
    assert checkpoint.config == {"image_size": 64, "threshold": 0.4, "recipe": {"epochs": 3}}


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


def test_a_network_without_con_cannot_become_a_released_checkpoint(tmp_path: Path) -> None:
    model = filled(build_cris(CRISConfig(**SIZES | {"contrastive": False})))
    torch.save(lightning(model), tmp_path / "best.ckpt")
    run(tmp_path / "best.ckpt", tmp_path / "ours")
    assert_same_network(read_checkpoint(tmp_path / "ours").build(), model)
    for source in ("best.ckpt", "ours"):
        message = refused(tmp_path / source, tmp_path / "released.pth", "--to", "released")
        assert "the released format cannot hold this network: 'head.conv." in message
    assert not (tmp_path / "released.pth").exists()


# -- Existing files


@pytest.mark.parametrize("existing", ["model.safetensors", "config.json"])
def test_files_in_a_folder_are_never_overwritten(
    existing: str, plain: Path, tmp_path: Path
) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / existing).write_bytes(b"precious")
    (tmp_path / "ours" / "other.txt").write_bytes(b"another")
    message = refused(plain, tmp_path / "ours", *FLAGS)
    assert f"{tmp_path / 'ours' / existing} exists and is never overwritten" in message
    assert files(tmp_path) == {f"ours/{existing}": b"precious", "ours/other.txt": b"another"}


def test_a_second_network_in_a_folder_is_refused(plain: Path, folder: Path) -> None:
    before = files(folder)
    message = refused(plain, folder / "second.safetensors", *FLAGS)
    assert f"{folder / 'config.json'} exists" in message
    assert files(folder) == before


@pytest.mark.parametrize("name", ["released.pth", "released.pt", "released.safetensors"])
def test_a_released_file_is_never_overwritten(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"precious")
    before = files(tmp_path)
    assert f"{tmp_path / name} exists" in refused(folder, tmp_path / name, "--to", "released")
    assert files(tmp_path) == before


def test_a_source_is_never_overwritten(
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


# -- Bad arguments


@pytest.mark.parametrize(
    "flags", [("--max-words", "9"), ("--decoder-heads", "4"), ("--image-size", "64"), FLAGS]
)
@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_sizes_that_a_checkpoint_stores_cannot_be_given(
    flags: tuple[str, ...], form: str, folder: Path, ckpt: Path, tmp_path: Path
) -> None:
    source = {"folder": folder, "file": folder / "model.safetensors", "run": ckpt}[form]
    before = files(tmp_path)
    for target in (("out",), ("out.pth", "--to", "released")):
        message = refused(source, tmp_path / target[0], *target[1:], *flags)
        names = [flag.removeprefix("--").replace("-", "_") for flag in flags[::2]]
        assert f"{source} stores {', '.join(names)} itself; leave it out" in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["released", "released.ckpt", "released.bin", "released.pth.tar", ".pth"]
)
def test_a_released_checkpoint_needs_a_known_suffix(
    name: str, folder: Path, tmp_path: Path
) -> None:
    message = refused(folder, tmp_path / name, "--to", "released")
    assert f"a .pth, .pt or .safetensors file, and {tmp_path / name} is not" in message
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
def test_flags_that_do_not_fit_the_network_are_refused(
    flags: tuple[str, ...], complaint: str, plain: Path, tmp_path: Path
) -> None:
    for target in (("out",), ("out.pth", "--to", "released")):
        assert complaint in refused(plain, tmp_path / target[0], *target[1:], *flags)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [("--decoder-heads", "0"), *(("--image-size", size) for size in ("0", "-32", "100"))],
)
def test_flags_out_of_range_are_refused(
    flags: tuple[str, str], plain: Path, tmp_path: Path
) -> None:
    message = refused(plain, tmp_path / "out", *flags)
    assert flags[1] in message
    assert not files(tmp_path)


# -- Bad sources


def test_a_missing_source_is_an_error_that_names_it(tmp_path: Path) -> None:
    for name in ("absent.pth", "absent.safetensors", "absent"):
        message = refused(tmp_path / name, tmp_path / "out", *FLAGS)
        assert f"no checkpoint at {tmp_path / name}" in message
    (tmp_path / "empty").mkdir()
    message = refused(tmp_path / "empty", tmp_path / "out")
    assert f"there is no {tmp_path / 'empty' / 'model.safetensors'}" in message
    assert not files(tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_truncated_source_is_an_error_that_names_it(
    source: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    content = sources[source].read_bytes()
    path = tmp_path / source
    for length in (0, 5, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        for target in (("out",), ("out.pth", "--to", "released")):
            message = refused(path, tmp_path / target[0], *target[1:], *FLAGS)
            assert f"cannot read {path}" in message
    assert set(files(tmp_path)) == {source}


def test_an_incomplete_released_checkpoint_is_an_error_that_names_the_missing_weight(
    weights: State, tmp_path: Path
) -> None:
    path = tmp_path / "source.pth"
    incomplete = {k: v for k, v in weights.items() if k != "decoder.norm.weight"}
    torch.save({"state_dict": with_module(incomplete)}, path)
    message = refused(path, tmp_path / "out", *FLAGS)
    assert str(path) in message
    assert "missing decoder.norm.weight" in message
    assert set(files(tmp_path)) == {"source.pth"}


def test_our_weights_without_their_configuration_are_an_error(folder: Path, tmp_path: Path) -> None:
    alone = (folder / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert str(alone) in refused(alone, tmp_path / "out", *FLAGS)


@pytest.mark.parametrize(
    "changes",
    [
        *({"state_dict": None}, {"global_step": None}, {"crislit": None}, {"crislit": {}}),
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


def test_a_source_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"crislit": Evil(mark), "state_dict": {}, "global_step": 0}, path)
    assert f"cannot read {path}" in refused(path, tmp_path / "out")
    assert not mark.exists()


# -- Damaged folders


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def assert_refused(folder: Path, *names: Path) -> None:
    """Check that a folder can neither be read nor converted, and that errors name a file."""
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


def test_truncated_weights_in_a_folder_are_an_error_that_names_them(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(folder, path)


CLIP = SIZES["clip"]


def change_clip(part: str, **changes: Any) -> dict[str, Any]:
    """Return the network's sizes with some of CLIP's changed."""
    return SIZES | {"clip": CLIP | {part: CLIP[part] | changes}}


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
    "heads that do not divide": change_clip("text_cfg", heads=3),
    "two stages": change_clip("vision_cfg", layers=[1, 2]),
    "no text layers": change_clip("text_cfg", layers=0),
}


@pytest.mark.parametrize(
    "case", ["another width", "fewer layers", "more layers", "another head", "another kernel"]
)
def test_weights_that_do_not_fit_the_configuration_do_not_build(case: str, folder: Path) -> None:
    edit(folder, network=UNFIT[case])
    message = r"do not fit the network that it describes: .*(neck|decoder|head)\."
    with pytest.raises(InputError, match=message):
        read_checkpoint(folder).build()


@pytest.mark.parametrize("case", UNFIT)
def test_weights_that_do_not_fit_the_configuration_are_an_error_that_names_it(
    case: str, folder: Path
) -> None:
    edit(folder, network=UNFIT[case])
    assert_refused(folder, folder / "config.json", folder / "model.safetensors", folder)


def test_a_released_checkpoint_beside_another_configuration_is_still_released(
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
    converted = load_file(tmp_path / "again" / "model.safetensors")
    assert_bits(converted, load_file(folder / "model.safetensors"))


# -- Failing writes


def full_disk(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def half(write: Callable[..., None], error: Exception) -> Callable[..., None]:
    """Return a writer that fails after it has written its file."""

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
def test_a_full_disk_leaves_no_files(
    target: str, source: str, folder: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("crislit.io.tensors.save_file", half(save_file, full))
    monkeypatch.setattr(torch, "save", half(torch.save, full))
    name, *options = TARGETS[target]
    message = refused({"folder": folder, "run": ckpt}[source], folder.parent / name, *options)
    assert f"cannot write {folder.parent / name}" in message
    assert "the disk is full" in message
    assert files(folder.parent) == before


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_that_cannot_be_renamed_leaves_no_files(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    monkeypatch.setattr(Path, "replace", full_disk)
    name, *options = TARGETS[target]
    assert "the disk is full" in refused(folder, folder.parent / name, *options)
    assert files(folder.parent) == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of the files that this process writes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_that_cannot_grow_is_an_error_without_traceback(target: str, folder: Path) -> None:
    before = files(folder.parent)
    name, *options = TARGETS[target]
    with file_size_limit(100_000):
        message = refused(folder, folder.parent / name, *options)
    assert f"cannot write {folder.parent / name}" in message
    assert files(folder.parent) == before


@pytest.mark.parametrize("target", TARGETS)
def test_any_error_while_writing_leaves_no_files(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    error = SafetensorError("I/O error")
    monkeypatch.setattr("crislit.io.tensors.save_file", half(save_file, error))
    monkeypatch.setattr(torch, "save", half(torch.save, RuntimeError("unexpected pos")))
    name, *options = TARGETS[target]
    with pytest.raises((SafetensorError, RuntimeError, SystemExit)):
        run(folder, folder.parent / name, *options)
    assert files(folder.parent) == before


def test_weights_and_configuration_have_the_same_permissions(folder: Path) -> None:
    run(folder, folder.parent / "out")
    modes = {path.stat().st_mode for path in (folder.parent / "out").iterdir()}
    assert len(modes) == 1


def test_no_weights_are_left_if_the_configuration_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder.parent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        assert "the disk is full" in refused(folder, folder.parent / "out")
    assert files(folder.parent) == before
    run(folder, folder.parent / "out")


def test_a_target_below_a_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    before = files(tmp_path)
    for target in (("file",), ("file/out",), ("file/out.pth", "--to", "released")):
        message = refused(folder, tmp_path / target[0], *target[1:])
        assert f"cannot write {tmp_path / 'file'}" in message
    assert files(tmp_path) == before


# -- The command


def test_swapped_arguments_are_an_error_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    message = refused(tmp_path / "new", folder)
    assert f"there is no {tmp_path / 'new'}, but {folder} exists" in message
    assert "expected the source first, then the target" in message
    assert files(folder) == before
    for surplus in ([str(tmp_path / "third")], ["--to", "released", "--to", "crislit"]):
        with pytest.raises(SystemExit) as caught:
            run(folder, tmp_path / "out", *surplus)
        assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_on_stderr_and_exit_code_1(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "hostile.pth"
    source.write_bytes(plain.read_bytes()[:5000])
    done = execute("convert", str(source), str(tmp_path / "ours"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot read {source}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr
    assert set(files(tmp_path)) == {"hostile.pth"}


def test_unknown_formats_and_flags_are_usage_errors(plain: Path, tmp_path: Path) -> None:
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
    forms = (".pth", ".safetensors", "best.ckpt", "config.json")
    for word in (*forms, "--max-words", "--decoder-heads", "--image-size"):
        assert word in text


def test_a_converted_checkpoint_of_the_authors_code_is_evaluated_on_a_named_data_set(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = change_clip("text_cfg", vocab_size=49408, context_length=22)
    network = build_cris(CRISConfig(**sizes))
    torch.save(to_released(network.state_dict()), tmp_path / "cris.pth")
    flags = ("--image-size", "96", "--decoder-heads", "4")
    run(tmp_path / "cris.pth", tmp_path / "ours", *flags)
    data = (f"checkpoint={tmp_path}/ours", f"data_root={small_shapes}")
    with pytest.raises(SystemExit):
        run_program(monkeypatch, tmp_path / "unnamed", *data, program="evaluate")
    assert "error: which data?" in capsys.readouterr().err
    named = (*data, "dataset=shapes", "protocol=first_sentence")
    results = run_program(monkeypatch, tmp_path / "run", *named, program="evaluate")
    assert [values["samples"] for values in results["splits"].values()] == [12, 12, 12]
    assert results["initial_weights"] == "released checkpoint cris.pth"
    assert results["config"]["decoder"] == {"layers": 3, "heads": 4, "ffn": 40, "dropout": 0.1}
    assert results["config"]["image_size"] == 96
    output = " ".join(capsys.readouterr().out.split())
    assert "by which the released code selects checkpoints" in output


@pytest.mark.parametrize("name", ["ours.pth", "ours.pt", "ours.ckpt"])
def test_a_target_that_looks_released_needs_the_option(
    name: str, plain: Path, tmp_path: Path
) -> None:
    message = refused(plain, tmp_path / name)
    assert "expected a folder or a .safetensors file, found " in message
    assert "--to released" in message
    assert not (tmp_path / name).exists()


def test_sizes_that_the_released_format_does_not_store_are_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path / "back.pth", "--to", "released")
    sizes = f"{HEADS} decoder heads, {WORDS} tokens per sentence, 64 pixels"
    assert f"this format does not store: {sizes}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "name", "value"), [("text_cfg", "heads", 2), ("vision_cfg", "head_width", 32)]
)
def test_the_released_format_cannot_hold_other_head_widths_than_clips(
    part: str, name: str, value: int, tmp_path: Path
) -> None:
    network = build_cris(CRISConfig(**change_clip(part, **{name: value})))
    checkpoint = Checkpoint(network.config, network.state_dict(), 64, 0.35, "random")
    with pytest.raises(InputError, match="the released format cannot hold"):
        write_released(checkpoint, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("absent", "width"), [("heads", 32), ("width", 512)])
def test_omitted_heads_and_width_are_open_clips_defaults(
    absent: str, width: int, tmp_path: Path
) -> None:
    text = CLIP["text_cfg"] | {"heads": 8}
    del text[absent]
    changes = {"clip": CLIP | {"text_cfg": text}, "neck": [12, width, 24]}
    model = filled(build_cris(CRISConfig(**SIZES | changes)))
    torch.save(lightning(model), tmp_path / "best.ckpt")
    arguments = (tmp_path / "best.ckpt", tmp_path / "out.pth", "--to", "released")
    if width // 64 == 8:
        run(*arguments)
        assert torch.equal(logits(load_released(tmp_path / "out.pth", WORDS, HEADS)), logits(model))
    else:
        assert "8 heads" in refused(*arguments)
        assert not (tmp_path / "out.pth").exists()
