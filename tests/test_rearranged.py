"""The network in fewer multiplications is the network: in evaluation, in training, and in memory."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crislit.config import load_settings
from crislit.data.dataset import EvaluationBatch
from crislit.errors import InputError
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.models import rearranged
from crislit.models.cris import CRIS
from crislit.models.rearranged import fold_batchnorms, for_inference, rearrange, upsample2_and_convolve
from crislit.models.recompute import Recomputable, recompute_activations
from crislit.record import identify
from crislit.task import CRISTask
from crislit.train import prepare_training
from tests.test_models import assert_close, bytes_of, experienced, pictures, sentences, tiny

ABLATIONS: list[dict[str, Any]] = [
    {"contrastive": contrastive, "decoder_layers": layers, "kernel_size": k}
    for contrastive, layers, k in ((True, 2, 3), (True, 0, 1), (False, 0, 3), (False, 1, 1))
]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 5]), st.integers(0, 2**31))
def test_convolving_before_upsampling_is_convolving_after_it(batch: int, h: int, w: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((batch, 3, h, w), (4, 3, k, k), (4,)))
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert_close(upsample2_and_convolve(x, weight, bias), F.conv2d(doubled, weight, bias, padding=k // 2))


@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@pytest.mark.parametrize("large", [False, True])
def test_the_network_for_inference_gives_the_same_logits(
    changes: dict[str, Any], size: tuple[int, int], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rearranged, "LARGE_MAP", 1 if large else 2**62)  # sentence by sentence, or together
    model = experienced(tiny(**changes))
    quick = for_inference(model)
    images, tokens = pictures(2, *size), sentences(1, 3, 4, 5, 6, 8)
    for owners in (None, torch.tensor([1, 0, 1, 1, 1, 0])):
        with torch.no_grad():
            assert_close(quick(images, tokens, owners), model(images, tokens, owners))
    assert not [
        norm for norm in quick.modules() if isinstance(norm, _BatchNorm) and norm is not quick.neck.normalise_product[0]
    ]


def test_a_network_made_for_inference_leaves_its_origin_as_it_was_and_shares_what_it_can() -> None:
    model = experienced(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quick = for_inference(model)
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert quick.text_encoder.token_embedding.weight is model.text_encoder.token_embedding.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folding_refuses_statistics_that_are_still_counted() -> None:
    with pytest.raises(AssertionError, match="eval"):
        fold_batchnorms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


# -- Training


def variants(changes: dict[str, Any], rearranged: bool, recomputed: bool) -> CRIS:
    model = tiny(**changes).train()
    model = rearrange(model) if rearranged else model
    if recomputed:
        recompute_activations(model)
    return model


def losses_and_gradients(model: CRIS, steps: int, rate: float) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Train a few steps; return the losses, and the first step's gradients and BatchNorm's statistics after it."""
    torch.manual_seed(7)  # of the decoder's dropout
    images, tokens = pictures(4), sentences(1, 3, 5, 6)
    masks = (torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    losses, gradients, statistics = [], {}, {}
    for step in range(steps):
        loss = text_to_pixel_contrastive_loss(model(images, tokens), masks)
        adam.zero_grad()
        torch.autograd.backward(loss)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            counted = ("running_mean", "running_var", "num_batches_tracked")
            statistics = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(counted)}
        adam.step()
        losses.append(loss.item())
    return losses, gradients, statistics


@pytest.mark.parametrize("changes", ABLATIONS)
def test_recomputed_activations_change_no_bit_of_a_training(changes: dict[str, Any]) -> None:
    expected = losses_and_gradients(variants(changes, rearranged=False, recomputed=False), 3, 1e-3)
    found = losses_and_gradients(variants(changes, rearranged=False, recomputed=True), 3, 1e-3)
    assert found[0] == expected[0]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_recomputing_keeps_less() -> None:
    def kept(model: CRIS) -> int:
        sizes = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(pictures(4), sentences(1, 3, 5, 6)).sum()
        return sum(sizes.values())

    full, less = (kept(variants({}, rearranged=False, recomputed=recomputed)) for recomputed in (False, True))
    assert less < 0.6 * full


@pytest.mark.parametrize("rearranging", [False, True])
@pytest.mark.parametrize("recomputing", [False, True])
def test_each_switch_does_its_own_whatever_the_other_is(rearranging: bool, recomputing: bool) -> None:
    network = prepare_training(tiny(), {"rearrange": rearranging, "recompute": recomputing})
    boxes = [module for module in network.modules() if isinstance(module, Recomputable)]
    assert len(boxes) > 2
    assert {box.recompute for box in boxes} == {recomputing}
    assert isinstance(network.neck, rearranged.RearrangedNeck) == rearranging


@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_rearranged_network_trains_like_the_one_as_written(changes: dict[str, Any], recomputed: bool) -> None:
    expected = losses_and_gradients(variants(changes, rearranged=False, recomputed=False), 20, 1e-6)
    found = losses_and_gradients(variants(changes, rearranged=True, recomputed=recomputed), 20, 1e-6)
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert found[0][-1] != found[0][0]
    flat = [torch.cat([gradients[name].flatten() for name in expected[1]]) for gradients in (found[1], expected[1])]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-4
    assert list(found[2]) == list(expected[2])
    for name, value in expected[2].items():
        torch.testing.assert_close(found[2][name], value, atol=1e-5, rtol=1e-4)


def test_a_rearranged_network_has_the_same_names_and_the_very_same_weights() -> None:
    model = tiny()
    other = rearrange(model)
    assert list(other.state_dict()) == list(model.state_dict())
    assert [id(p) for p in other.parameters()] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("moment", ["validation", "test"])
def test_what_is_evaluated_is_the_network_for_inference_and_no_checkpoint_ever_holds_it(moment: str) -> None:
    model = experienced(tiny())
    task = CRISTask(model)
    truths = [np.ones((50, 70), np.uint8)] * 3
    batch = EvaluationBatch(bytes_of(pictures(1)), sentences(1, 3, 4), torch.tensor([0, 0, 0]), truths, [0, 1, 2])
    names = list(task.state_dict())
    expected = list(task.predict_probabilities(batch))
    getattr(task, f"on_{moment}_start")()
    found = list(task.predict_probabilities(batch))
    assert list(task.state_dict()) == names
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert any(not np.array_equal(one, other) for one, other in zip(found, expected, strict=True)), (
        "another order of operations"
    )
    getattr(task, f"on_{moment}_end")()
    for one, other in zip(task.predict_probabilities(batch), expected, strict=True):
        assert np.array_equal(one, other)


def test_the_switches_change_no_digest() -> None:
    for dataset, on in (("refcoco", False), ("shapes", True)):
        default = load_settings([f"dataset={dataset}"])
        assert (default["rearrange"], default["recompute"]) == (on, False)
        switched = load_settings([f"dataset={dataset}", f"rearrange={str(not on).lower()}", "recompute=true"])
        assert identify(switched) == identify(default)


@pytest.mark.parametrize("name", ["rearrange", "recompute"])
def test_a_switch_that_is_neither_on_nor_off_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be true or false, got 'yes please'"):
        prepare_training(tiny(), load_settings([f"{name}=yes please"]))
