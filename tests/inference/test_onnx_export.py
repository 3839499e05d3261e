"""Exported networks give the same numbers for any number of images and sentences."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import crislit
from crislit import export
from crislit.checkpoints.checkpoint import Checkpoint, read_any, write_folder
from crislit.errors import InputError
from crislit.inference import onnx_export
from crislit.inference.onnx_network import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from tests.inference.test_forks import areas
from tests.inference.test_segmenter import SENTENCES, TINY
from tests.io.test_images import photo

pytest.importorskip("onnxruntime")

IMAGE_INDICES = [[0], [0, 0, 0, 0], [2, 0, 1, 1, 1], [3, 1, 0, 2]]
"""One of each, many sentences of one image, uneven and out of order, several images."""


@pytest.fixture(scope="module")
def model() -> CRIS:
    torch.manual_seed(0)
    model = build_cris(replace(TINY, decoder_layers=2))
    for module in model.modules():  # statistics as after training
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: CRIS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    write_folder(Checkpoint(model.config, model.state_dict(), 64, 0.4, "random"), root / "net")
    export.main([str(root / "net"), str(root / "onnx")])
    return root


def draw_inputs(image_indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(len(image_indices))
    tokens = crislit.tokenize(["big red star " * (1 + i) for i in range(len(image_indices))], 17)
    return torch.randn(max(image_indices) + 1, 3, 64, 64), tokens, torch.tensor(image_indices)


@pytest.mark.parametrize("image_indices", IMAGE_INDICES)
def test_onnx_runtime_agrees(image_indices: list[int], model: CRIS, folder: Path) -> None:
    images, tokens, indices = draw_inputs(image_indices)
    network = OnnxNetwork(folder / "onnx")
    with torch.no_grad():
        expected = model(images, tokens, indices)
    logits = network.ground(network.encode_images(images), tokens, indices)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_every_kind_of_network_can_be_traced(contrastive: bool, layers: int) -> None:
    config = replace(TINY, decoder_layers=layers, contrastive=contrastive)
    model = build_cris(config).eval()
    image_graph, grounding = onnx_export.trace_graphs(model, 64)
    for image_indices in IMAGE_INDICES:
        images, tokens, indices = draw_inputs(image_indices)
        with torch.no_grad():
            logits = grounding.module()(*image_graph.module()(images), tokens, indices)
            expected = model(images, tokens, indices)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_an_exported_network_segments_like_its_source(folder: Path) -> None:
    expected = crislit.load(folder / "net", device="cpu")(photo(), SENTENCES)
    for segmenter in (
        crislit.load(folder / "onnx"),
        crislit.load(folder / "onnx", backend="onnx", device="cpu"),
    ):
        assert (segmenter.image_size, segmenter.threshold) == (64, 0.4)
        assert segmenter.model.max_tokens == 17
        assert segmenter.about is None
        for result, reference in zip(segmenter(photo(), SENTENCES), expected, strict=True):
            np.testing.assert_allclose(result.probability, reference.probability, atol=1e-5)
    assert crislit.load(folder / "onnx", threshold=0.6).threshold == 0.6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
def test_forked_processes_run_an_exported_network(folder: Path, tmp_path: Path) -> None:
    found = areas(str(folder / "onnx"), 2, tmp_path)
    assert len(found) == 7
    assert len(set(found)) == 1


def test_exports_of_version_0_1_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    """Version 0.1 called the input of the images' indices "owners"."""
    onnx = pytest.importorskip("onnx")
    old = shutil.copytree(folder / "onnx", tmp_path / "old")
    graph = onnx.load(old / GROUNDING)
    graph.graph.input[4].name = "owners"
    for node in graph.graph.node:
        node.input[:] = ["owners" if x == "image_indices" else x for x in node.input]
    onnx.save(graph, old / GROUNDING)
    images, tokens, indices = draw_inputs([2, 0, 1, 1, 1])
    networks = OnnxNetwork(old), OnnxNetwork(folder / "onnx")
    names = [[node.name for node in network.grounding.get_inputs()][4] for network in networks]
    assert names == ["owners", "image_indices"]
    old_logits, logits = (network(images, tokens, indices) for network in networks)
    assert torch.equal(old_logits, logits)


def test_an_int8_export_is_smaller_and_nearly_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(name: str, path: Path, _: list[str]) -> None:
        shutil.copy(folder / "onnx" / name, path)

    # Tracing is slow, and was done for the fixture.
    monkeypatch.setattr(onnx_export, "trace_graphs", lambda *_: (IMAGE_ENCODER, GROUNDING))
    monkeypatch.setattr(onnx_export, "save_onnx", copy)
    export.main([str(folder / "net"), str(tmp_path / "int8"), "--int8"])
    # Most of the other graph is the vocabulary, which is not quantized.
    sizes = [(path / IMAGE_ENCODER).stat().st_size for path in (tmp_path / "int8", folder / "onnx")]
    assert sizes[0] < 0.5 * sizes[1]
    inputs = draw_inputs([1, 0, 1])
    expected = crislit.load(folder / "onnx").network(*inputs)
    difference = crislit.load(tmp_path / "int8").network(*inputs) - expected
    assert 0 < float(difference.norm() / (expected - expected.mean()).norm()) < 0.3


def test_calibration_needs_images_with_sentences(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "net"), str(tmp_path / "int8"), "--calibrate", str(tmp_path)]
    message = r"error: no image with sentences in .*expected pairs such as a\.jpg and a\.txt"
    with pytest.raises(SystemExit, match=message):
        export.main([*arguments, "--int8"])
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"error: cannot read the sentences in .*a\.txt"):
        export.main([*arguments, "--int8"])
    assert "tracing" not in capsys.readouterr().out, "inputs are checked before slow work"
    assert not (tmp_path / "int8").exists()
    with pytest.raises(SystemExit) as stop:
        export.main(arguments)
    assert stop.value.code == 2


def test_an_export_consists_of_three_files(folder: Path) -> None:
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names == {IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG}
    config = json.loads((folder / "onnx" / EXPORT_CONFIG).read_text())
    assert config == {"image_size": 64, "threshold": 0.4, "max_words": 17, "dataset": {}}


def test_the_help_names_the_three_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG))


def test_unsupported_requests_are_input_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not an exported network; `python -m crislit\.export"):
        crislit.load(folder / "net", backend="onnx")
    with pytest.raises(InputError, match="is an exported network, which needs ONNX Runtime"):
        crislit.load(folder / "onnx", backend="torch")
    with pytest.raises(InputError, match="runs on the CPU in float32, not on cuda"):
        crislit.load(folder / "onnx", device="cuda")
    with pytest.raises(InputError, match="an exported network cannot be compiled: leave compile"):
        crislit.load(folder / "onnx", compile=True)
    with pytest.raises(InputError, match="stores max_words itself; leave it out"):
        crislit.load(folder / "onnx", max_words=22)
    with pytest.raises(InputError, match="was exported for images of 64 pixels, not of 96"):
        crislit.Segmenter(OnnxNetwork(folder / "onnx"), image_size=96)
    with pytest.raises(InputError, match="an exported network cannot be shared"):
        crislit.load(folder / "onnx").save_pretrained(tmp_path / "net")
    with pytest.raises(SystemExit, match=r"error: .*exists and is never overwritten"):
        export.main([str(folder / "net"), str(folder / "onnx")])
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        export.main([str(folder / "nowhere/x.ckpt"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="expected the source first, then the target"):
        export.main([str(tmp_path / "out"), str(folder / "net")])
    assert not (tmp_path / "out").exists()


def test_damaged_exports_are_input_errors_that_name_the_file(folder: Path, tmp_path: Path) -> None:
    for name in (IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG):
        broken = shutil.copytree(folder / "onnx", tmp_path / name)
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=name):
            crislit.load(broken)
        if name != EXPORT_CONFIG:
            (broken / name).unlink()
            with pytest.raises(InputError, match=f"there is no .*{name}"):
                crislit.load(broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rn50", "shapes-tiny"])
def test_full_networks_agree_in_onnx_runtime_and_as_traced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(name)
    if name == "rn50":
        torch.manual_seed(0)
        source, random = tmp_path / "net", build_cris(CRISConfig(clip="RN50-quickgelu"))
        write_folder(Checkpoint(random.config, random.state_dict(), 416, 0.35, "random"), source)
    checkpoint = read_any(source)
    model, size = checkpoint.build().eval(), checkpoint.image_size
    traced: list[torch.export.ExportedProgram] = []
    trace = onnx_export.trace_graphs

    def record(model: CRIS, image_size: int) -> list[torch.export.ExportedProgram]:
        traced[:] = trace(model, image_size)
        return traced

    monkeypatch.setattr(onnx_export, "trace_graphs", record)
    export.main([str(source), str(tmp_path / "onnx")])
    network = OnnxNetwork(tmp_path / "onnx")
    # Other numbers of images and sentences than were traced.
    images = torch.randn(3, 3, size, size)
    tokens = crislit.tokenize(["the man in red", "leftmost dog", "a cat", "the red car"], 17)
    indices = torch.tensor([0, 1, 1, 2])
    with torch.no_grad():
        expected = model(images, tokens, indices)
        by_torch = traced[1].module()(*traced[0].module()(images), tokens, indices)
    by_onnx = network.ground(network.encode_images(images), tokens, indices)
    assert float(expected.std()) > 0.01, "the logits must vary for agreement to mean anything"
    for logits in (by_onnx, by_torch):
        assert float((logits - expected).abs().max()) < 1e-4
