"""The optimized forms compute the same as the network, in inference and in training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crislit.config import compose_config
from crislit.data.dataset import EvaluationBatch
from crislit.errors import InputError
from crislit.models import optimized
from crislit.models.cris import CRIS
from crislit.models.optimized import (
    fold_batchnorms,
    optimize_for_inference,
    optimize_for_training,
    upsample2_and_convolve,
)
from crislit.models.recompute import Recomputable, recompute_activations
from crislit.training.build import apply_training_form, check_values
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.training.provenance import fingerprint
from crislit.training.task import CRISTask
from tests.models.networks import (
    ABLATIONS,
    assert_close,
    bytes_of,
    random_images,
    sentences,
    tiny,
    with_statistics,
)

# -- Inference


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 2**31),
)
def test_convolving_before_upsampling_equals_convolving_after_it(
    batch: int, h: int, w: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((batch, 3, h, w), (4, 3, k, k), (4,))
    )
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    expected = F.conv2d(doubled, weight, bias, padding=k // 2)
    assert_close(upsample2_and_convolve(x, weight, bias), expected)


@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@pytest.mark.parametrize("large", [False, True])
def test_the_network_for_inference_gives_the_same_logits(
    changes: dict[str, Any], size: tuple[int, int], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large maps are decoded one sentence at a time.
    monkeypatch.setattr(optimized, "LARGE_MAP", 1 if large else 2**62)
    model = with_statistics(tiny(**changes))
    network = optimize_for_inference(model)
    images, tokens = random_images(2, *size), sentences(1, 3, 4, 5, 6, 8)
    for image_indices in (None, torch.tensor([1, 0, 1, 1, 1, 0])):
        with torch.no_grad():
            expected = model(images, tokens, image_indices)
            assert_close(network(images, tokens, image_indices), expected)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    assert norms == [network.neck.normalise_product[0]], "all others are folded"


def test_optimizing_for_inference_leaves_the_model_unchanged_and_shares_weights() -> None:
    model = with_statistics(tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = optimize_for_inference(model)
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert network.text_encoder.token_embedding.weight is model.text_encoder.token_embedding.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folding_rejects_batchnorms_in_training_mode() -> None:
    with pytest.raises(AssertionError, match="eval"):
        fold_batchnorms(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


# -- Training


class Training(NamedTuple):
    losses: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    statistics: dict[str, Tensor]
    """Buffers of the BatchNorms after the first step."""


def train(
    changes: dict[str, Any], *, rearranged: bool, recomputed: bool, steps: int, rate: float
) -> Training:
    model = training_network(changes, rearranged, recomputed)
    torch.manual_seed(7)  # for dropout
    images, tokens = random_images(4), sentences(1, 3, 5, 6)
    masks = (torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    training = Training([], {}, {})
    for step in range(steps):
        loss = text_to_pixel_contrastive_loss(model(images, tokens), masks)
        adam.zero_grad()
        torch.autograd.backward(loss)
        if step == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    training.gradients[name] = parameter.grad.clone()
            for name, value in model.state_dict().items():
                if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    training.statistics[name] = value.clone()
        adam.step()
        training.losses.append(loss.item())
    return training


def training_network(changes: dict[str, Any], rearranged: bool, recomputed: bool) -> CRIS:
    model = tiny(**changes).train()
    if rearranged:
        model = optimize_for_training(model)
    recompute_activations(model, recomputed)
    return model


@pytest.mark.parametrize("changes", ABLATIONS)
def test_recomputing_activations_gives_bit_identical_training(changes: dict[str, Any]) -> None:
    expected, actual = (
        train(changes, rearranged=False, recomputed=recomputed, steps=3, rate=1e-3)
        for recomputed in (False, True)
    )
    assert actual.losses == expected.losses
    assert_equal(actual.gradients, expected.gradients)
    assert_equal(actual.statistics, expected.statistics)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_recomputing_stores_fewer_activations() -> None:
    def stored_bytes(model: CRIS) -> int:
        sizes = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(random_images(4), sentences(1, 3, 5, 6)).sum()
        return sum(sizes.values())

    without, recomputed = (
        stored_bytes(training_network({}, rearranged=False, recomputed=value))
        for value in (False, True)
    )
    assert recomputed < 0.6 * without


@pytest.mark.parametrize("rearrange", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_two_switches_are_independent(rearrange: bool, recompute: bool) -> None:
    network = apply_training_form(tiny(), {"rearrange": rearrange, "recompute": recompute})
    modules = [module for module in network.modules() if isinstance(module, Recomputable)]
    assert len(modules) > 2
    assert {module.recompute for module in modules} == {recompute}
    assert isinstance(network.neck, optimized.OptimizedNeck) == rearrange


@pytest.mark.parametrize("changes", ABLATIONS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_network_for_training_trains_like_the_original(
    changes: dict[str, Any], recomputed: bool
) -> None:
    steps, rate = 20, 1e-6
    expected = train(changes, rearranged=False, recomputed=False, steps=steps, rate=rate)
    actual = train(changes, rearranged=True, recomputed=recomputed, steps=steps, rate=rate)
    assert actual.losses == pytest.approx(expected.losses, rel=1e-3)
    assert actual.losses[-1] != actual.losses[0]
    ours, theirs = (
        torch.cat([training.gradients[name].flatten() for name in expected.gradients])
        for training in (actual, expected)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert list(actual.statistics) == list(expected.statistics)
    for name, value in expected.statistics.items():
        torch.testing.assert_close(actual.statistics[name], value, atol=1e-5, rtol=1e-4)


def test_the_network_for_training_has_the_same_parameters_under_the_same_names() -> None:
    model = tiny()
    network = optimize_for_training(model)
    assert list(network.state_dict()) == list(model.state_dict())
    assert [id(p) for p in network.parameters()] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_evaluation_uses_the_network_for_inference_and_checkpoints_never_contain_it(
    stage: str,
) -> None:
    model = with_statistics(tiny())
    task = CRISTask(model)
    targets = [np.ones((50, 70), np.uint8)] * 3
    indices = torch.tensor([0, 0, 0])
    batch = EvaluationBatch(
        bytes_of(random_images(1)), sentences(1, 3, 4), indices, targets, [0, 1, 2]
    )
    names = list(task.state_dict())
    expected = list(task.predict_probabilities(batch))
    getattr(task, f"on_{stage}_start")()
    actual = list(task.predict_probabilities(batch))
    assert list(task.state_dict()) == names
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not all_equal(actual, expected), "the order of operations differs"
    getattr(task, f"on_{stage}_end")()
    assert all_equal(list(task.predict_probabilities(batch)), expected)


def all_equal(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("dataset", "rearrange"), [("refcoco", False), ("shapes", True)])
def test_the_switches_do_not_change_the_fingerprint(dataset: str, rearrange: bool) -> None:
    default = compose_config([f"dataset={dataset}"])
    assert (default["rearrange"], default["recompute"]) == (rearrange, False)
    opposite = str(not rearrange).lower()
    overrides = [f"dataset={dataset}", f"rearrange={opposite}", "recompute=true"]
    assert fingerprint(compose_config(overrides)) == fingerprint(default)


@pytest.mark.parametrize("name", ["rearrange", "recompute"])
def test_a_switch_that_is_not_true_or_false_raises_input_error(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be true or false, got 'yes please'"):
        check_values(compose_config([f"{name}=yes please"]))
