"""CLIP's weights, from files in the formats of OpenAI and open_clip."""

import re
import time
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from crislit.checkpoints import clip_weights
from crislit.checkpoints.checkpoint import read_checkpoint
from crislit.checkpoints.clip_weights import find_openai, load_clip_weights
from crislit.config import compose_config
from crislit.errors import InputError, see
from crislit.io import assets, files
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.transforms.tokenizer import tokenize
from tests.runs import run

SIZES: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"layers": [1, 2, 1, 1], "width": 16, "image_size": 96},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


def cris(**changes: Any) -> CRIS:
    clip = SIZES | changes
    return build_cris(
        CRISConfig(clip=clip, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64)
    )


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {part: SIZES[part] | values}


@pytest.fixture(scope="module")
def towers() -> CLIP:
    """open_clip's CLIP, with random weights and statistics."""
    torch.manual_seed(0)
    clip = CLIP(SIZES["embed_dim"], SIZES["vision_cfg"], SIZES["text_cfg"], quick_gelu=True)
    with torch.no_grad():
        for name, value in clip.state_dict().items():
            if value.is_floating_point():
                is_variance = name.endswith("running_var")
                random = torch.rand_like(value) if is_variance else torch.randn_like(value)
                scaled = 0.5 + random if is_variance else 0.1 * random
                value.copy_(scaled.half().float())  # exact in OpenAI's half precision
        clip.logit_scale.fill_(4.6055)
    return clip.eval()


class Archive(nn.Module):
    """The layout of OpenAI's archives: weights, many in half precision, and three numbers."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        for name, value in clip.state_dict().items():
            parent: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            is_half = last in ("weight", "text_projection") and value.ndim >= 2
            parent.register_buffer(last, value.half() if is_half else value.clone())
        self.register_buffer("input_resolution", torch.tensor(96))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(49408))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_traced(module: nn.Module, inputs: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, inputs, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, path)


def write_clip(clip: CLIP, path: Path) -> None:
    """Write CLIP in the form that belongs to the file's name."""
    state = clip.state_dict()
    if path.name == "RN50.pt":
        save_traced(Archive(clip), torch.zeros(1), path)
    elif path.name == "traced.pt":
        example = (torch.zeros(1, 3, 96, 96), torch.zeros(1, 77, dtype=torch.long))
        save_traced(clip, example, path)
    elif path.name == "parallel.pth":
        parallel = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "state_dict": parallel}, path)
    elif path.name == "open_clip_model.safetensors":
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    else:
        absent = OMITTED[path.name]
        torch.save({name: v for name, v in state.items() if not name.endswith(absent)}, path)


OMITTED: dict[str, str | tuple[str, ...]] = {
    "plain.pt": (),
    "without_logit_scale.pt": "logit_scale",
    "without_counters.pt": "num_batches_tracked",
}
"""State dicts, and the names that they lack."""
FORMS = ("RN50.pt", "traced.pt", "parallel.pth", "open_clip_model.safetensors", *OMITTED)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_clips_weights_gives_clips_features(
    form: str, towers: CLIP, tmp_path: Path
) -> None:
    write_clip(towers, tmp_path / form)
    model = cris()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recorded = load_clip_weights(model.eval(), str(tmp_path / form))
    assert recorded.startswith(f"{tmp_path / form} (sha256 ")
    images, tokens = torch.randn(2, 3, 96, 96), tokenize(["the man in red", "left"], 77)
    with torch.no_grad():
        maps = towers.visual.forward_intermediates(
            images, indices=[2, 3, 4], intermediates_only=True
        )["image_intermediates"]
        c3, c4, _ = model.image_encoder(images)
        _, sentence = model.text_encoder(tokens)
        expected = towers.encode_text(tokens)
        # At the native size, the pooling differs from CLIP's only in the mean token.
        pool, clip_pool = model.image_encoder.pool, towers.visual.attnpool
        positions = clip_pool.positional_embedding[1:]
        x = maps[2].flatten(2).transpose(1, 2) + positions
        assert_close(pool.k_proj(x), clip_pool.k_proj(x))
        assert torch.equal(pool.positions(3, 3), positions)
    assert_close(c3, maps[0])
    assert_close(c4, maps[1])
    assert_close(sentence, expected)
    state = model.state_dict()
    assert all(value.dtype != torch.float16 for value in state.values())
    scale = 2.6593 if form == "without_logit_scale.pt" else 4.6055
    assert state["text_encoder.logit_scale"].item() == pytest.approx(scale, abs=2e-3)
    for name, value in state.items():
        new = ("neck.", "decoder.", "head.", "image_projector.", "image_encoder.pool.shortcut.")
        if name.startswith(new):  # not in CLIP, and therefore unchanged
            assert torch.equal(value, before[name]), name


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_seventeen_tokens_use_the_first_seventeen_positions_of_clip(
    towers: CLIP, tmp_path: Path
) -> None:
    write_clip(towers, tmp_path / "plain.pt")
    model = cris().eval()
    load_clip_weights(model, str(tmp_path / "plain.pt"))
    assert torch.equal(model.text_encoder.positional_embedding, towers.positional_embedding)
    with torch.no_grad():
        short = model.text_encoder(tokenize(["the man in red"], 17))
        long = towers.encode_text(tokenize(["the man in red"], 77))
    assert_close(short[1], long)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "deeper": (
        changed("vision_cfg", layers=[2, 2, 1, 1]),
        r"stages \[1, 2, 1, 1\].*stages \[2, 2, 1, 1\]",
    ),
    "wider": (changed("vision_cfg", width=32), "width 16 .*width 32 "),
    "another joint embedding": ({"embed_dim": 64}, "embedding 48.*embedding 64"),
    "another native size": (changed("vision_cfg", image_size=64), "at 96 pixels.*at 64 pixels"),
    "another context": (changed("text_cfg", context_length=40), "context 77.*context 40"),
    "another depth of the text encoder": (
        changed("text_cfg", layers=3),
        "text 2 layers.*text 3 layers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_of_another_architecture_are_refused_with_both_named(
    name: str, towers: CLIP, tmp_path: Path
) -> None:
    changes, expected = WRONG[name]
    write_clip(towers, tmp_path / "RN50.pt")
    with pytest.raises(InputError, match=f"(?s)RN50.pt holds the weights of .*{expected}"):
        load_clip_weights(cris(**changes), str(tmp_path / "RN50.pt"))


def test_an_architecture_of_openai_is_called_by_its_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        rn101 = build_cris(CRISConfig(clip="RN101-quickgelu"))
        sizes = open_clip.get_model_config("RN50")
        rn50 = CLIP(1024, sizes["vision_cfg"], sizes["text_cfg"])
    # Only shapes are compared before anything is loaded.
    shapes = {name: value.shape for name, value in rn50.state_dict().items()}
    zeros = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(zeros, tmp_path / "x.safetensors")
    message = r"CLIP's RN50 \(.*and the network is built on CLIP's RN101 \("
    with pytest.raises(InputError, match=message):
        load_clip_weights(rn101, str(tmp_path / "x.safetensors"))


def test_a_vision_transformer_is_refused(tmp_path: Path) -> None:
    state = {"visual.class_embedding": torch.zeros(8), "visual.proj": torch.zeros(8, 8)}
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(InputError, match="vision transformer"):
        load_clip_weights(cris(), str(tmp_path / "vit.pt"))


def test_missing_and_unexpected_weights_are_named(towers: CLIP, tmp_path: Path) -> None:
    state = dict(towers.state_dict()) | {"visual.extra": torch.zeros(1)}
    del state["visual.layer2.1.conv2.weight"]
    torch.save(state, tmp_path / "x.pt")
    message = r"missing visual.layer2.1.conv2.weight; unexpected visual.extra"
    with pytest.raises(InputError, match=message):
        load_clip_weights(cris(), str(tmp_path / "x.pt"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_damaged_and_missing_files_are_an_input_error(
    content: bytes, towers: CLIP, tmp_path: Path
) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read .*x\.pt"):
        load_clip_weights(cris(), str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match=r"no weights at .*y\.pt"):
        load_clip_weights(cris(), str(tmp_path / "y.pt"))


def test_a_truncated_archive_is_an_input_error(towers: CLIP, tmp_path: Path) -> None:
    write_clip(towers, tmp_path / "RN50.pt")
    content = (tmp_path / "RN50.pt").read_bytes()
    (tmp_path / "RN50.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot read .*RN50\.pt"):
        load_clip_weights(cris(), str(tmp_path / "RN50.pt"))


def test_a_shipped_name_is_never_a_path(
    towers: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    for name in ("assets/shipped.safetensors", "d.pt", "d.pt.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    assert clip_weights.find_weights_file("shipped") == tmp_path / "assets/shipped.safetensors"
    assert clip_weights.find_weights_file(str(tmp_path / "d.pt")) == tmp_path / "d.pt"
    assert clip_weights.find_weights_file("./shipped") == Path("shipped")
    with pytest.raises(InputError, match=r"no weights at other: .*one of the shipped shipped"):
        clip_weights.find_weights("RN50-quickgelu", "other")


# -- OpenAI's weights by name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and an empty cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    return tmp_path


def test_the_error_without_a_network_is_immediate_and_says_what_to_download(home: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        find_openai("RN50-quickgelu")
    assert time.perf_counter() - start < 5
    checksum = "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert f"put it at {home / '.cache/clip/RN50.pt'}" in str(caught.value)
    assert f"{checksum}/RN50.pt" in str(caught.value)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("needs OpenAI's RN50, which is not on this machine")
    assert all(len(re.sub(r"\S*/\S*", "", line)) < 80 for line in lines), "but for addresses"
    random = "  to train from random weights instead: model.clip_weights=null"
    assert lines[-1] == random + see("clip-weights")


def test_a_server_that_does_not_answer_is_an_error_at_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"(?s)127\.0\.0\.1:9 does not answer.*RN101\.pt"):
        find_openai("RN101-quickgelu")


def test_a_file_in_the_cache_is_used_if_it_is_openais(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / ".cache/clip/RN50.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not OpenAI's")
    with pytest.raises(InputError, match=r"RN50\.pt is not OpenAI's file"):
        find_openai("RN50-quickgelu")
    published = open_clip.get_pretrained_cfg("RN50", "openai")
    monkeypatch.setitem(published, "url", f"https://somewhere/{files.sha256(file)}/RN50.pt")
    assert find_openai("RN50-quickgelu") == file


def test_an_earlier_download_by_open_clip_is_used_without_a_network(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cache(repository: str, file: str) -> str | None:
        asked.append((repository, file))
        return str(home / "blob") if file == "open_clip_model.safetensors" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cache)
    assert find_openai("RN50-quickgelu") == home / "blob"
    assert asked == [("timm/resnet50_clip.openai", "open_clip_model.safetensors")]


def test_with_a_network_open_clip_downloads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(clip_weights, "unreachable", lambda _: "")
    downloads = []

    def download(published: dict[str, Any]) -> str:
        downloads.append(published["hf_hub"])
        return str(home / "file")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    assert find_openai("RN101-quickgelu") == home / "file"
    assert downloads == ["timm/resnet101_clip.openai/"]


@pytest.mark.parametrize("clip", [SIZES, "no-such-model"])
def test_openai_published_weights_of_its_own_models_only(clip: Any) -> None:
    with pytest.raises(InputError, match="OpenAI published no weights"):
        find_openai(clip)


# -- Runs


def test_a_run_starts_from_the_weights_and_records_them(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = compose_config()["model"]["clip"]
    torch.manual_seed(3)
    clip = CLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"], quick_gelu=True)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    data = f"data_root={small_shapes}"
    overrides = [data, "batch_size=48", "image_size=64", "recipe.optimizer.learning_rate=1e-9"]
    overrides.append(f"model.clip_weights={tmp_path}/clip.pt")
    results = run(monkeypatch, tmp_path / "run", *overrides, "recipe.epochs=1")
    recorded = results["initial_weights"]
    assert recorded.startswith(f"{tmp_path}/clip.pt (sha256 ")
    file = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = read_checkpoint(file)
    assert checkpoint.initial_weights == recorded
    trained = checkpoint.weights["text_encoder.text_projection"]
    torch.testing.assert_close(trained, clip.text_projection.detach(), atol=1e-6, rtol=0)
    # Evaluating and resuming record the same, and do not need the weights.
    (tmp_path / "clip.pt").unlink()
    evaluation = (data, f"checkpoint={file}")
    results = run(monkeypatch, tmp_path / "evaluation", *evaluation, program="evaluate")
    assert results["initial_weights"] == recorded
    overrides += ["recipe.epochs=2", f"resume={file}"]
    results = run(monkeypatch, tmp_path / "resumed", *overrides)
    assert results["initial_weights"] == recorded


def test_a_run_with_missing_weights_is_one_error_line(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = (f"data_root={small_shapes}", "model.clip_weights=nowhere.pt")
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", *overrides)
    assert "error: no weights at nowhere.pt" in capsys.readouterr().err
    assert not (tmp_path / "run/results.json").exists()
