"""The reference forward pass computes what the network computes."""

from typing import Any

import pytest
import torch

from crislit.benchmarks.inference import build_network
from crislit.benchmarks.reference import reference_logits
from crislit.benchmarks.timing import count_cost
from tests.models.networks import (
    ABLATIONS,
    assert_close,
    random_images,
    sentences,
    tiny,
    with_statistics,
)


@pytest.mark.parametrize("changes", ABLATIONS)
def test_the_reference_computes_the_networks_logits(changes: dict[str, Any]) -> None:
    model = with_statistics(tiny(**changes))
    images, tokens = random_images(3, 96, 64), sentences(1, 4, 6)
    with torch.no_grad():
        assert_close(reference_logits(model, images, tokens), model(images, tokens))


def test_the_reference_calls_no_forward_that_may_be_optimized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_statistics(tiny())
    images, tokens = random_images(1), sentences(4)
    with torch.no_grad():
        expected = model(images, tokens)

    def forbidden(*_: Any) -> None:
        raise AssertionError

    for box in (model, *model.children(), model.image_encoder.pool, *model.decoder.layers):  # type: ignore[union-attr]
        monkeypatch.setattr(box, "forward", forbidden)
    with torch.no_grad():
        assert_close(reference_logits(model, images, tokens), expected)


def test_the_reference_has_the_networks_gradients() -> None:
    gradients = []
    for compute in (reference_logits, lambda model, *inputs: model(*inputs)):
        model = tiny().train()
        torch.manual_seed(3)  # the same dropout
        logits = compute(model, random_images(4), sentences(1, 3, 4, 6))
        torch.autograd.backward(logits.square().mean())
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


def test_the_references_number_of_operations_does_not_change() -> None:
    model = build_network("rn50")
    with torch.device("meta"):
        images, tokens = torch.empty(1, 3, 416, 416), torch.ones(1, 17, dtype=torch.long)
    cost = count_cost(lambda: reference_logits(model.to("meta"), images, tokens))
    assert cost.flops / 1e9 == pytest.approx(131.9261, abs=1e-4)
