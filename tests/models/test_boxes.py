"""Boxes of the network are replaced by classes that a configuration names."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crislit.checkpoints import Checkpoint
from crislit.errors import InputError
from crislit.models import (
    CRIS,
    CRISConfig,
    Neck,
    PixelClassifier,
    build_cris,
    check_boxes,
    optimize_for_inference,
    optimize_for_training,
)
from crislit.models.boxes import SeparateNeck, packages, require_trust
from tests.models.networks import SIZES, assert_close, random_images, sentences, with_statistics

CODE = """
import crislit.models
import torch
from torch import nn

class Decoder(nn.Module):
    def __init__(self, width, text_width, layers, gain=1.0):
        super().__init__()
        self.gain, self.layers = gain, layers
        self.norm = nn.BatchNorm2d(width)   # called before the layer that it follows
        self.film = nn.Linear(text_width, width)
        self.mix = nn.Conv2d(width, width, 1)
    def forward(self, fused, words, padding):
        words = words.masked_fill(padding[..., None], 0).sum(1)
        return fused + self.gain * self.mix(self.norm(fused)) * self.film(words)[..., None, None]

class Neck(nn.Module):
    def __init__(self, in_channels, out_channels, embed):
        super().__init__()
        self.image = nn.Conv2d(in_channels[1], out_channels[1], 1)
        self.text = nn.Linear(embed, out_channels[1])
    def forward(self, c3, c4, c5, sentence):
        return self.image(c4) * self.text(sentence)[..., None, None]

class Projector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width // 2, 4, stride=4)
    def forward(self, fused):
        return self.up(fused)

class Head(nn.Module):
    def __init__(self, embed, channels):
        super().__init__()
        self.key = nn.Linear(embed, channels)
    def forward(self, pixels, sentence):
        return (pixels * self.key(sentence)[..., None, None]).sum(1, keepdim=True)

class Narrow(Decoder):
    def forward(self, fused, words, padding):
        return fused[:, 1:]

class Pair(Decoder):
    def forward(self, fused, words, padding):
        return fused, words

class OneInput(Decoder):
    def forward(self, fused):
        return fused

class Squeezed(Decoder):
    def forward(self, fused, words, padding):
        return fused + words.squeeze(0)[:, 0, :1, None, None]

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        {}["nothing"]

class Nothing(nn.Module):
    def forward(self, fused, words, padding):
        return fused

class Rated(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, layers)]
    def forward(self, fused, words, padding):
        return fused

class Placed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(width, 4, 4))
    def forward(self, fused, words, padding):
        return fused + self.places

class HalfNeck(crislit.models.Neck):
    def forward(self, c3, c4, c5, sentence, image_indices=None):
        return 0 * super().forward(c3, c4, c5, sentence, image_indices)

class Tripled(crislit.models.TextProjector):
    def forward(self, pixels, sentence):
        return 3 * super().forward(pixels, sentence)

class Bare:
    pass

def make(width):
    return nn.Conv2d(width, 1, 1)
"""
BOXES: dict[str, dict[str, Any]] = {
    "neck": {"_target_": "mine.Neck"},
    "decoder": {"_target_": "mine.Decoder", "gain": 2.0},
    "image_projector": {"_target_": "mine.Projector"},
    "head": {"_target_": "mine.Head"},
}


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of a user, in a folder of the path."""
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def network(boxes: dict[str, dict[str, Any]], **sizes: Any) -> CRIS:
    """Return a small network with boxes of other classes."""
    model = build_cris(CRISConfig(**{**SIZES, **sizes}, boxes=boxes)).eval()
    check_boxes(model, 64)
    return model


@pytest.mark.parametrize("box", BOXES)
def test_each_box_is_replaced_alone_and_its_class_is_used(box: str) -> None:
    model = network({box: BOXES[box]})
    part: Any = getattr(model, box)
    part = part.box if isinstance(part, SeparateNeck) else part
    assert type(part).__module__ == "mine"
    logits = model(random_images(2, 64, 96), sentences(1, 3, 5, 6))
    assert logits.shape == (4, 1, 16, 24)


def test_all_forms_of_a_network_with_other_boxes_agree() -> None:
    model = with_statistics(network(BOXES))
    decoder: Any = model.decoder
    assert (decoder.gain, decoder.layers) == (2.0, 2)
    images, tokens = random_images(2, 64, 96), sentences(1, 3, 5, 6)
    with torch.no_grad():
        expected = model(images, tokens)
        for form in (optimize_for_training(model), optimize_for_inference(model)):
            assert_close(form(images, tokens), expected)
        alone = [model(images[[i // 2]], tokens[[i]]) for i in range(4)]
    assert_close(torch.cat(alone), expected)


def test_a_class_of_crislit_and_a_subclass_of_the_neck_fit() -> None:
    spec = {"_target_": "crislit.models.Neck"}
    model = network({"neck": spec})
    assert type(model.neck) is Neck
    head = {"_target_": "crislit.models.PixelClassifier"}
    assert isinstance(network({"head": head}).head, PixelClassifier)


def test_zero_layers_leave_out_any_decoder() -> None:
    assert network({"decoder": BOXES["decoder"]}, decoder_layers=0).decoder is None


def test_a_decoder_of_another_class_may_have_another_width_than_the_text() -> None:
    decoder: Any = network({"decoder": BOXES["decoder"]}, neck=(8, 32, 16)).decoder
    assert decoder.mix.in_channels == 32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_target_": "nowhere.Decoder"}, "cannot be imported: ModuleNotFoundError: No module"),
        ({"_target_": "broken.Decoder"}, "No module named 'nowhere' (broken.py, line 1)"),
        ({"_target_": "mine.Missing"}, "mine has no such class; expected the class of a torch.nn"),
        ({"_target_": "mine.Decoder", "gian": 1}, "got an unexpected keyword argument 'gian'"),
        ({"_target_": "mine.Head"}, "missing a required argument: 'channels'"),
        ({"_target_": "mine.Bare"}, "mine has no such class; expected the class of a torch.nn"),
        ({"_target_": "mine.Narrow"}, "returns (2, 63, 4, 4) for inputs of (2, 64, 4, 4), (2, 1"),
        ({"_target_": "mine.Pair"}, "returns tuple for inputs of"),
        ({"_target_": "mine.OneInput"}, "fails on inputs of (2, 64, 4, 4), (2, 17, 64), (2, 17): "),
        ({"_target_": "mine.make"}, "mine has no such class; expected the class of a torch.nn"),
        ({"_target_": "mine.Squeezed"}, "fails on inputs of (1, 64, 4, 4), (1, 17, 64), (1, 17): "),
        (
            {"_target_": "mine.Raises"},
            "mine.Raises cannot be built: KeyError: 'nothing' (mine.py",
        ),
        ({"_target_": "crislit.errors.require"}, "is none of crislit's boxes: crislit.models.Dec"),
        ({"_target_": "crislit.errors.os.system"}, "is none of crislit's boxes"),
        ({"_target_": "crislit.models.build.CLIP"}, "is none of crislit's boxes"),
        (
            {"_target_": "crislit.models.Decoder", "layers": 10**9},
            "leave out layers",
        ),
        ({"_target_": "torch.hub.load"}, "torch.hub has no such class"),
        ({"_target_": "d." + "a" * 300}, "must be the full name of a class"),
        ({"_target_": "Decoder"}, "must be the full name of a class, my_package.MyClass"),
        ({"_target_": "mine.Decoder", "x": {"_target_": "os.system"}}, "decoder.x must be a num"),
        ({"_target_": "mine.Decoder", 3: 1}, "decoder.3 must be a number, text"),
        ({}, "must be the full name of a class, my_package.MyClass, got None"),
        ("mine.Decoder", "must be the full name of a class, my_package.MyClass, got None"),
    ],
)
def test_a_class_that_does_not_fit_is_one_error_that_names_the_box(
    spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        network({"decoder": spec})
    assert "decoder" in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["Nothing", "Rated", "Placed"])
def test_a_decoder_without_arguments_or_for_one_size_fits(name: str) -> None:
    model = network({"decoder": {"_target_": f"mine.{name}"}})
    assert type(model.decoder).__name__ == name


def test_subclasses_of_crislits_boxes_are_used_in_every_form() -> None:
    images, tokens = random_images(2), sentences(1, 3, 5, 6)
    for boxes in (
        {"head": {"_target_": "mine.Tripled"}},
        {"head": {"_target_": "mine.Tripled"}, "neck": {"_target_": "mine.HalfNeck"}},
    ):
        torch.manual_seed(0)
        model = network(boxes)
        torch.manual_seed(0)
        plain = network({})
        with torch.no_grad():
            logits = model(images, tokens)
            for form in (optimize_for_training(model), optimize_for_inference(model)):
                assert_close(form(images, tokens), logits)
            is_half = isinstance(model.neck, SeparateNeck)
            fused = model.neck.fuse(model.encode_images(images), torch.ones(4, 128))
            assert (fused == 0).all() == is_half
            if not is_half:
                assert_close(logits, 3 * plain(images, tokens))


def test_an_unknown_box_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^'encoder' is not a box of the network: neck, decoder"):
        CRISConfig(**SIZES, boxes={"encoder": {"_target_": "mine.Neck"}})
    for odd in ([1], "abc", 5):
        boxes: Any = odd
        with pytest.raises(InputError, match=r"^boxes must be a mapping, got "):
            CRISConfig(**SIZES, boxes=boxes)


def test_packages_outside_crislit_need_trust() -> None:
    boxes = {"neck": {"_target_": "crislit.models.Neck"}, "head": {"_target_": "mine.sub.Head"}}
    assert packages(boxes) == {"mine"}
    require_trust(boxes, ["other", "mine"], "a.ckpt")
    with pytest.raises(InputError, match=r"^a.ckpt runs code outside crislit \(head=mine\.sub"):
        require_trust(boxes, ["min"], "a.ckpt")
    for trust in ("mine", None, 5, [1]):
        odd: Any = trust
        with pytest.raises(InputError, match=r"^trust must be a list of packages, got "):
            require_trust(boxes, odd, "a.ckpt")
    assert packages({"head": {"_target_": "crislit.models.build.CLIP"}}) == {"crislit"}


def test_sizes_of_a_checkpoint_with_boxes_of_crislit_take_no_memory() -> None:
    boxes = {"decoder": {"_target_": "crislit.models.Decoder"}}
    network = CRISConfig(**{**SIZES, "decoder_ffn": 2**36}, boxes=boxes)  # 17 TB per layer
    checkpoint = Checkpoint(network, {}, 64, 0.35, "random")
    with pytest.raises(InputError, match="do not fit the network that it describes: missing"):
        checkpoint.check()


def test_a_configuration_with_boxes_survives_every_form() -> None:
    config = CRISConfig(**SIZES, boxes=BOXES)
    assert CRISConfig.from_dict(config.to_dict()) == config
    run = config.to_run_config() | {"dataset": {"max_words": config.max_tokens}}
    assert CRISConfig.from_run_config(run) == config
    assert "boxes" not in CRISConfig(**SIZES).to_dict()
