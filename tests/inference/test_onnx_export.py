"""Export to ONNX in two graphs: the same numbers for any number of pictures and sentences, by both runtimes."""

import json
import shutil
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
from tests.inference.test_segmenter import CLIP, SENTENCES, photo

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model() -> CRIS:
    torch.manual_seed(0)
    model = build_cris(
        CRISConfig(clip=CLIP, neck=(16, 64, 32), decoder_layers=2, decoder_heads=4, decoder_ffn=64)
    )
    for module in model.modules():  # statistics as if trained
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


CASES = [[0], [0, 0, 0, 0], [2, 0, 1, 1, 1], [3, 1, 0, 2]]
"""Owners: one and one, many sentences of one picture, uneven and out of order, several pictures."""


def given(image_indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(len(image_indices))
    tokens = crislit.tokenize(["big red star " * (1 + i) for i in range(len(image_indices))], 17)
    return torch.randn(max(image_indices) + 1, 3, 64, 64), tokens, torch.tensor(image_indices)


@pytest.mark.parametrize("owners", CASES)
def test_onnx_runtime_agrees(image_indices: list[int], model: CRIS, folder: Path) -> None:
    images, tokens, numbers = given(image_indices)
    network = OnnxNetwork(folder / "onnx")
    with torch.no_grad():
        expected = model(images, tokens, numbers)
    found = network.ground(network.encode_images(images), tokens, numbers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("contrastive", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_every_kind_of_network_can_be_traced(contrastive: bool, layers: int) -> None:
    model = build_cris(
        CRISConfig(
            clip=CLIP,
            neck=(16, 64, 32),
            decoder_layers=layers,
            decoder_heads=4,
            decoder_ffn=64,
            contrastive=contrastive,
        )
    ).eval()
    image_graph, grounding = onnx_export.trace_graphs(model, 64)
    for image_indices in CASES:
        images, tokens, numbers = given(image_indices)
        with torch.no_grad():
            found = grounding.module()(*image_graph.module()(images), tokens, numbers)
            torch.testing.assert_close(found, model(images, tokens, numbers), atol=1e-5, rtol=1e-4)


def test_an_exported_network_segments_like_its_origin(folder: Path) -> None:
    torch_one = crislit.load(folder / "net", device="cpu")
    for segmenter in (
        crislit.load(folder / "onnx"),
        crislit.load(folder / "onnx", backend="onnx", device="cpu"),
    ):
        assert (segmenter.image_size, segmenter.threshold, segmenter.model.max_tokens) == (
            64,
            0.4,
            17,
        )
        for one, other in zip(
            segmenter(photo(), SENTENCES), torch_one(photo(), SENTENCES), strict=True
        ):
            np.testing.assert_allclose(one.probability, other.probability, atol=1e-5)
    assert crislit.load(folder / "onnx", threshold=0.6).threshold == 0.6


def test_an_export_of_8_bits_is_smaller_and_nearly_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are traced once, for the fixture: that takes long.
    monkeypatch.setattr(onnx_export, "trace_graphs", lambda *_: (IMAGE_ENCODER, GROUNDING))
    monkeypatch.setattr(
        onnx_export, "save_onnx", lambda name, path, _: shutil.copy(folder / "onnx" / name, path)
    )
    export.main([str(folder / "net"), str(tmp_path / "int8"), "--int8"])
    quantised, exact_size = (
        (place / IMAGE_ENCODER).stat().st_size for place in (tmp_path / "int8", folder / "onnx")
    )
    assert (
        quantised < 0.5 * exact_size
    )  # most of the other graph is its vocabulary, which stays as it is
    exact, quick = crislit.load(folder / "onnx"), crislit.load(tmp_path / "int8")
    logits = []
    for segmenter in (exact, quick):
        network = segmenter.network
        images, tokens, numbers = given([1, 0, 1])
        logits.append(network(images, tokens, numbers))
    assert 0 < float((logits[1] - logits[0]).norm() / (logits[0] - logits[0].mean()).norm()) < 0.3


def test_calibration_needs_pictures_with_sentences(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        SystemExit,
        match=r"error: no picture with sentences in .*expected files such as a\.jpg and a\.txt",
    ):
        export.main(
            [str(folder / "net"), str(tmp_path / "int8"), "--int8", "--calibrate", str(tmp_path)]
        )
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"error: cannot read the sentences in .*a\.txt"):
        export.main(
            [str(folder / "net"), str(tmp_path / "int8"), "--int8", "--calibrate", str(tmp_path)]
        )
    assert "tracing" not in capsys.readouterr().out, "what takes long comes after what may be wrong"
    assert not (tmp_path / "int8").exists()
    with pytest.raises(SystemExit) as stop:
        export.main([str(folder / "net"), str(tmp_path / "int8"), "--calibrate", str(tmp_path)])
    assert stop.value.code == 2


def test_the_files_are_whole_and_self_contained(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == sorted(
        [IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG]
    )
    about = json.loads((folder / "onnx" / EXPORT_CONFIG).read_text())
    assert about == {"image_size": 64, "threshold": 0.4, "max_words": 17}


def test_what_cannot_be_done_is_one_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no exported network; `python -m crislit\.export"):
        crislit.load(folder / "net", backend="onnx")
    with pytest.raises(InputError, match="is an exported network, which ONNX Runtime computes"):
        crislit.load(folder / "onnx", backend="torch")
    with pytest.raises(InputError, match="computes on the CPU in float32, not on cuda"):
        crislit.load(folder / "onnx", device="cuda")
    with pytest.raises(InputError, match="says itself what max_words would"):
        crislit.load(folder / "onnx", max_words=22)
    with pytest.raises(InputError, match="was exported for pictures of 64 pixels, not of 96"):
        crislit.Segmenter(OnnxNetwork(folder / "onnx"), image_size=96)
    with pytest.raises(InputError, match="cannot be shared so"):
        crislit.load(folder / "onnx").save_pretrained(tmp_path / "net")
    with pytest.raises(SystemExit, match=r"error: .*exists, and nothing is written over"):
        export.main([str(folder / "net"), str(folder / "onnx")])
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        export.main([str(folder / "nowhere/x.ckpt"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_damaged_exports_are_one_error_that_names_the_file(folder: Path, tmp_path: Path) -> None:
    for name in (IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG):
        broken = tmp_path / name
        broken.mkdir()
        for path in (folder / "onnx").iterdir():
            content = path.read_bytes()
            (broken / path.name).write_bytes(
                content[: len(content) // 2] if path.name == name else content
            )
        with pytest.raises(InputError, match=name):
            crislit.load(broken)
        if name != EXPORT_CONFIG:
            (broken / name).unlink()
            with pytest.raises(InputError, match=f"there is no .*{name}"):
                crislit.load(broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rn50", "shapes-tiny"])
def test_whole_networks_agree_by_onnx_runtime_and_as_traced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(name)
    if name == "rn50":
        torch.manual_seed(0)
        source, drawn = tmp_path / "net", build_cris(CRISConfig(clip="RN50-quickgelu"))
        write_folder(Checkpoint(drawn.config, drawn.state_dict(), 416, 0.35, "random"), source)
    checkpoint = read_any(source)
    model, size = checkpoint.build().eval(), checkpoint.image_size
    traced: list[torch.export.ExportedProgram] = []
    trace = onnx_export.trace_graphs

    def keep(model: CRIS, image_size: int) -> list[torch.export.ExportedProgram]:
        traced[:] = trace(model, image_size)
        return traced

    monkeypatch.setattr(onnx_export, "trace_graphs", keep)
    export.main([str(source), str(tmp_path / "onnx")])
    network = OnnxNetwork(tmp_path / "onnx")
    said = ["the man in red", "leftmost dog", "a cat", "the red car"]
    images, tokens = (
        torch.randn(3, 3, size, size),
        crislit.tokenize(said, 17),
    )  # other numbers than those traced
    image_indices = torch.tensor([0, 1, 1, 2])
    with torch.no_grad():
        expected = model(images, tokens, image_indices)
        by_torch = traced[1].module()(*traced[0].module()(images), tokens, image_indices)
    by_onnx = network.ground(network.encode_images(images), tokens, image_indices)
    assert float(expected.std()) > 0.01, "else agreement would say little"
    for found in (by_onnx, by_torch):
        assert float((found - expected).abs().max()) < 1e-4
