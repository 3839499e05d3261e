"""CLIP's weights, from files laid out like OpenAI's and open_clip's."""

import time
import warnings
from collections.abc import Callable
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
from crislit.errors import InputError
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
    """CLIP as open_clip builds it, with weights and statistics that are nowhere trivial."""
    torch.manual_seed(0)
    clip = CLIP(SIZES["embed_dim"], SIZES["vision_cfg"], SIZES["text_cfg"], quick_gelu=True)
    with torch.no_grad():
        for name, value in clip.state_dict().items():
            if value.is_floating_point():
                spread = (
                    0.5 + torch.rand_like(value)
                    if name.endswith("running_var")
                    else 0.1 * torch.randn_like(value)
                )
                value.copy_(spread.half().float())  # exact in half precision, as OpenAI's are kept
        clip.logit_scale.fill_(4.6055)
    return clip.eval()


class Archive(nn.Module):
    """The layout of OpenAI's archives: the weights, half of them in half precision, and three numbers beside them."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        for name, value in clip.state_dict().items():
            place: nn.Module = self
            *parts, last = name.split(".")
            for part in parts:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            half = (
                value.half() if last in ("weight", "text_projection") and value.ndim >= 2 else value
            )
            place.register_buffer(last, half.clone())
        for name, number in (
            ("input_resolution", 96),
            ("context_length", 77),
            ("vocab_size", 49408),
        ):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return x


def as_torchscript(clip: CLIP, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Archive(clip), torch.zeros(1)), path)  # type: ignore[no-untyped-call]


def as_traced(clip: CLIP, path: Path) -> None:
    example = (torch.zeros(1, 3, 96, 96), torch.zeros(1, 77, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(clip, example, strict=False, check_trace=False), path)  # type: ignore[no-untyped-call]


FORMS: dict[str, Callable[[CLIP, Path], None]] = {
    "RN50.pt": as_torchscript,
    "traced.pt": as_traced,
    "plain.pt": lambda clip, path: torch.save(clip.state_dict(), path),
    "parallel.pth": lambda clip, path: torch.save(
        {
            "epoch": 3,
            "state_dict": {f"module.{name}": value for name, value in clip.state_dict().items()},
        },
        path,
    ),
    "open_clip_model.safetensors": lambda clip, path: save_file(
        {
            name: value.half() if value.is_floating_point() else value
            for name, value in clip.state_dict().items()
        },
        path,
    ),
    "without_logit_scale.pt": lambda clip, path: torch.save(
        {name: value for name, value in clip.state_dict().items() if name != "logit_scale"}, path
    ),
    "without_counters.pt": lambda clip, path: torch.save(
        {
            name: value
            for name, value in clip.state_dict().items()
            if "num_batches_tracked" not in name
        },
        path,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_clips_weights_gives_clips_features(
    form: str, towers: CLIP, tmp_path: Path
) -> None:
    FORMS[form](towers, tmp_path / form)
    model = cris()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = load_clip_weights(model.eval(), str(tmp_path / form))
    assert told.startswith(str(tmp_path / form))
    assert "sha256" in told
    images, tokens = torch.randn(2, 3, 96, 96), tokenize(["the man in red", "left"], 77)
    with torch.no_grad():
        theirs = towers.visual.forward_intermediates(
            images, indices=[2, 3, 4], intermediates_only=True
        )["image_intermediates"]
        c3, c4, _ = model.image_encoder(images)
        _, sentence = model.text_encoder(tokens)
        expected = towers.encode_text(tokens)
        # At the native size the pooling is CLIP's own, but for the mean token: its keys, values and queries agree.
        x = theirs[2].flatten(2).transpose(1, 2) + towers.visual.attnpool.positional_embedding[1:]
        assert_close(model.image_encoder.pool.k_proj(x), towers.visual.attnpool.k_proj(x))
        assert torch.equal(
            model.image_encoder.pool.positions(3, 3),
            towers.visual.attnpool.positional_embedding[1:],
        )
    assert_close(c3, theirs[0])
    assert_close(c4, theirs[1])
    assert_close(sentence, expected)
    assert all(value.dtype != torch.float16 for value in model.state_dict().values())
    scale = 2.6593 if form == "without_logit_scale.pt" else 4.6055
    assert model.text_encoder.logit_scale.item() == pytest.approx(scale, abs=2e-3)
    for name, value in model.state_dict().items():
        new = ("neck.", "decoder.", "head.", "image_projector.", "image_encoder.pool.shortcut.")
        if name.startswith(new):  # what CLIP has not is as it was
            assert torch.equal(value, before[name]), name


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_seventeen_words_use_the_first_seventeen_positions_of_clip(
    towers: CLIP, tmp_path: Path
) -> None:
    FORMS["plain.pt"](towers, tmp_path / "plain.pt")
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
def test_weights_of_another_architecture_are_refused_and_both_are_named(
    name: str, towers: CLIP, tmp_path: Path
) -> None:
    changes, expected = WRONG[name]
    FORMS["RN50.pt"](towers, tmp_path / "RN50.pt")
    with pytest.raises(InputError, match=f"(?s)RN50.pt holds the weights of .*{expected}"):
        load_clip_weights(cris(**changes), str(tmp_path / "RN50.pt"))


def test_an_architecture_of_openais_is_called_by_its_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        rn101 = build_cris(CRISConfig(clip="RN101-quickgelu"))
        rn50 = CLIP(
            1024,
            **{k: v for k, v in open_clip.get_model_config("RN50").items() if k.endswith("cfg")},
        )
    # Shapes alone are looked at before anything is loaded.
    save_file(
        {
            name: torch.zeros(value.shape, dtype=torch.float16)
            for name, value in rn50.state_dict().items()
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(
        InputError, match=r"CLIP's RN50 \(.*and the network is built on CLIP's RN101 \("
    ):
        load_clip_weights(rn101, str(tmp_path / "x.safetensors"))


def test_a_vision_transformer_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"visual.class_embedding": torch.zeros(8), "visual.proj": torch.zeros(8, 8)},
        tmp_path / "vit.pt",
    )
    with pytest.raises(InputError, match="vision transformer"):
        load_clip_weights(cris(), str(tmp_path / "vit.pt"))


def test_a_missing_and_a_strange_weight_are_named(towers: CLIP, tmp_path: Path) -> None:
    state = dict(towers.state_dict()) | {"visual.extra": torch.zeros(1)}
    del state["visual.layer2.1.conv2.weight"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"missing visual.layer2.1.conv2.weight; unexpected visual.extra"
    ):
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
    as_torchscript(towers, tmp_path / "RN50.pt")
    whole = (tmp_path / "RN50.pt").read_bytes()
    (tmp_path / "RN50.pt").write_bytes(whole[: len(whole) // 2])
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


# -- OpenAI's, by name --------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, where no weights are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    return tmp_path


def test_without_a_network_the_error_comes_at_once_and_says_what_to_put_where(home: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        find_openai("RN50-quickgelu")
    assert time.perf_counter() - start < 5
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert f"put it at {home / '.cache/clip/RN50.pt'}" in str(caught.value)
    assert "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt" in str(
        caught.value
    )


def test_a_server_that_does_not_answer_is_not_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*RN101\.pt"):
        find_openai("RN101-quickgelu")


def test_a_file_that_the_user_put_there_is_used_if_it_is_openais(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = home / ".cache/clip/RN50.pt"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"not OpenAI's")
    with pytest.raises(InputError, match=r"RN50\.pt is not OpenAI's file"):
        find_openai("RN50-quickgelu")
    known = open_clip.get_pretrained_cfg("RN50", "openai")
    monkeypatch.setitem(known, "url", f"https://somewhere/{files.sha256(place)}/RN50.pt")
    assert find_openai("RN50-quickgelu") == place


def test_what_open_clip_downloaded_before_is_used_without_a_network(
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
    wanted = []

    def download(known: dict[str, Any]) -> str:
        wanted.append(known)
        return str(home / "got")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    assert find_openai("RN101-quickgelu") == home / "got"
    assert wanted[0]["hf_hub"] == "timm/resnet101_clip.openai/"


@pytest.mark.parametrize("clip", [SIZES, "no-such-model"])
def test_openai_has_weights_of_its_own_models_only(clip: Any) -> None:
    with pytest.raises(InputError, match="OpenAI published no weights"):
        find_openai(clip)


# -- In a run -----------------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_and_says_so(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    settings = compose_config()["model"]["clip"]
    torch.manual_seed(3)
    clip = CLIP(
        settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"], quick_gelu=True
    )
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    short = [
        f"data_root={small_shapes}",
        "batch_size=48",
        "image_size=64",
        "recipe.epochs=1",
        "callbacks.pictures=0",
    ]
    short += ["recipe.optimizer.learning_rate=1e-9", f"model.clip_weights={tmp_path}/clip.pt"]
    results = run(monkeypatch, tmp_path / "run", *short)
    assert results["initial_weights"].startswith(f"{tmp_path}/clip.pt (sha256 ")
    kept = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert kept.initial_weights == results["initial_weights"]
    torch.testing.assert_close(
        kept.weights["text_encoder.text_projection"],
        clip.text_projection.detach(),
        atol=1e-6,
        rtol=0,
    )
    # Evaluation and going on tell the same, and need the file no more.
    (tmp_path / "clip.pt").unlink()
    checkpoint = f"{tmp_path}/run/checkpoints/last.ckpt"
    assert (
        run(
            monkeypatch,
            tmp_path / "evaluation",
            f"checkpoint={checkpoint}",
            f"data_root={small_shapes}",
            program="evaluate",
        )["initial_weights"]
        == results["initial_weights"]
    )
    short[3] = "recipe.epochs=2"
    onward = run(monkeypatch, tmp_path / "onward", *short, f"resume={checkpoint}")
    assert onward["initial_weights"] == results["initial_weights"]


def test_a_run_with_missing_weights_is_one_error_line(
    small_shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run(
            monkeypatch,
            tmp_path / "run",
            f"data_root={small_shapes}",
            "model.clip_weights=nowhere.pt",
        )
    assert "error: no weights at nowhere.pt" in capsys.readouterr().err
    assert not (tmp_path / "run/results.json").exists()
