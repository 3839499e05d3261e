"""Parity with numbers computed by the released network, see ``tests/golden/README.md``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import crislit
from crislit.checkpoints.released import rename_released
from crislit.models.cris import CRIS
from crislit.models.text_encoder import padding_mask
from crislit.training.losses import text_to_pixel_contrastive_loss
from tests.conftest import shared
from tests.golden import weights


@pytest.fixture(scope="module")
def facts(golden: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((golden / "tiny_a.json").read_text())
    return facts


@pytest.fixture(scope="module")
def activations(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "tiny_a.activations.safetensors")


def load_golden(checkpoint: Path, facts: dict[str, Any], dropout: float = 0.1) -> CRIS:
    max_words, heads = facts["config"]["word_len"], facts["config"]["nhead"]
    return crislit.load_released(checkpoint, max_words, heads, dropout)


def assert_agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_every_activation_agrees_with_the_released_network(
    golden_checkpoint: Path, facts: dict[str, Any], activations: dict[str, Tensor]
) -> None:
    model = load_golden(golden_checkpoint, facts).eval()
    images, tokens = activations["in.image"], activations["in.tokens"]
    with torch.no_grad():
        c3, c4, c5 = model.image_encoder(images)
        words, sentence = model.text_encoder(tokens)
        neck = model.neck(c3, c4, c5, sentence)
        assert model.decoder is not None
        decoded = model.decoder(neck, words, padding_mask(tokens))
        logits = model(images, tokens)
    assert_agree(c3, activations["out.c3"])
    assert_agree(c4, activations["out.c4"])
    assert_agree(c5, activations["out.c5"])
    assert_agree(words, activations["out.tokens"])
    assert_agree(sentence, activations["out.sentence"])
    assert_agree(neck, activations["out.neck"])
    assert_agree(decoded.flatten(2), activations["out.decoder"].reshape(decoded.flatten(2).shape))
    assert_agree(logits, activations["out.logits"])


def test_five_training_steps_follow_the_released_losses(
    golden_checkpoint: Path, facts: dict[str, Any], activations: dict[str, Tensor]
) -> None:
    model = load_golden(golden_checkpoint, facts, dropout=0.0).train()
    backbone = [p for name, p in model.named_parameters() if is_backbone(name)]
    others = [p for name, p in model.named_parameters() if not is_backbone(name)]
    rates = facts["adam"]
    adam = torch.optim.Adam(
        [
            {"params": backbone, "lr": rates["lr_backbone"]},
            {"params": others, "lr": rates["lr_head"]},
        ]
    )
    for step, expected in enumerate(facts["losses"]):
        logits = model(activations["in.image"], activations["in.tokens"])
        loss = text_to_pixel_contrastive_loss(logits, activations["in.mask"])
        assert loss.item() == pytest.approx(expected, rel=1e-4), step
        adam.zero_grad()
        torch.autograd.backward(loss)
        if step == 0:
            check_gradients(model, facts["grad_norms"])
        adam.step()


def check_gradients(model: nn.Module, expected: dict[str, float]) -> None:
    norms = {
        name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None
    }
    compared = {rename_released(name): norm for name, norm in expected.items() if norm > 1e-5}
    assert len(compared) > 190
    for name, norm in compared.items():
        assert norms[name] == pytest.approx(norm, rel=1e-2), name


def is_backbone(name: str) -> bool:
    is_encoder = name.startswith(("image_encoder.", "text_encoder."))
    return is_encoder and "positional_embedding" not in name


# -- The rule of the weights


def test_generated_weights_equal_the_originals_bit_for_bit(golden_checkpoint: Path) -> None:
    originals = load_file(shared("golden") / "tiny_a.checkpoint.safetensors")
    ours = load_file(golden_checkpoint)
    assert len(ours) == 320
    assert set(ours) == set(originals)
    for name, original in originals.items():
        assert ours[name].dtype == original.dtype, name
        assert torch.equal(ours[name], original), name


def test_a_change_of_numpys_generator_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: generator(seed + 1))
    with pytest.raises(weights.WeightsChangedError, match=r"^NumPy .* draws other random numbers"):
        weights.make_checkpoint()


@pytest.mark.parametrize("name", weights.CHECKSUMS)
def test_a_change_of_our_rule_is_reported_with_the_tensors_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = weights.make_tensor
    monkeypatch.setattr(weights, "make_tensor", lambda n, shape: make(n, shape) * (1 + (n == name)))
    with pytest.raises(weights.WeightsChangedError, match=f"makes other weights for {name},"):
        weights.make_checkpoint()
