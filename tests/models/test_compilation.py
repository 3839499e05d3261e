"""Compiled networks compute the same, without graph breaks, for any number of sentences."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from crislit.errors import InputError
from crislit.models.compilation import check_compiler, compile_for_inference
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_inference, optimize_for_training
from crislit.models.recompute import recompute_activations
from crislit.training.losses import text_to_pixel_contrastive_loss
from tests.models.networks import (
    ABLATIONS,
    assert_close,
    random_images,
    sentences,
    tiny,
    with_statistics,
)

COMPILE = torch.compile
FORMS = {"plain": lambda model: model, "rearranged": optimize_for_training}


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    """Start without compiled functions: PyTorch limits their number."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Let torch.compile trace and count graphs, without a compiler; a graph break is an error."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=counter, fullgraph=True))
    return counter


def gradients(network: CRIS, compute: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's loss, all gradients, and the statistics of all BatchNorms after it."""
    torch.manual_seed(4)
    network.zero_grad()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    masks = (random_images(4)[:, :1] > 0.5).to(next(network.parameters()).dtype)
    images = random_images(2).to(masks.dtype)
    loss = text_to_pixel_contrastive_loss(compute(images, sentences(1, 3, 5, 6)), masks)
    torch.autograd.backward(loss)
    found = [x.grad.flatten() for x in network.parameters() if x.grad is not None]
    statistics = [x.flatten() for name, x in network.state_dict().items() if "running" in name]
    network.load_state_dict(before)
    return loss.detach(), torch.cat(found), torch.cat(statistics)


@pytest.mark.parametrize(
    ("row", "form"), [*((row, "plain") for row in range(len(ABLATIONS))), (0, "rearranged")]
)
def test_training_has_no_graph_break_and_the_same_gradients(
    row: int, form: str, counter: CompileCounter
) -> None:
    network = FORMS[form](tiny(**ABLATIONS[row], decoder_dropout=0.1).double().train())
    expected = gradients(network, network.forward)
    compiled = gradients(network, torch.compile(network.forward))
    assert counter.frame_count == 1
    for actual, value in zip(compiled, expected, strict=True):
        assert_close(actual, value)


def test_recomputing_while_compiled_repeats_dropout_and_counts_statistics_once() -> None:
    network = tiny(decoder_layers=1, decoder_dropout=0.5).double().train()
    expected = gradients(network, network.forward)
    recompute_activations(network)
    compiled = torch.compile(network.forward, backend="aot_eager", fullgraph=True)
    for actual, value in zip(gradients(network, compiled), expected, strict=True):
        assert_close(actual, value)


@pytest.mark.parametrize("row", [0, 3])
def test_inference_is_compiled_once_for_several_images_and_sentences(
    row: int, counter: CompileCounter
) -> None:
    network = optimize_for_inference(with_statistics(tiny(**ABLATIONS[row])))
    compiled = compile_for_inference(network.forward)
    with torch.no_grad():
        for images, lengths in ((2, (1, 3, 5)), (3, (2, 4, 6, 8)), (4, (1, 1, 2, 3, 9))):
            indices = torch.arange(len(lengths)) % images
            inputs = random_images(images), sentences(*lengths), indices
            assert_close(compiled(*inputs), network(*inputs))
        assert counter.frame_count == 1
        one = random_images(1), sentences(4), torch.zeros(1, dtype=torch.long)
        assert_close(compiled(*one), network(*one))
    assert counter.frame_count == 2


def test_a_missing_compiler_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin (None, 'g++')")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler .* found in \(None, 'g\+\+'\)\."):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
def test_the_compiler_of_this_machine_keeps_the_numbers() -> None:
    check_compiler(torch.device("cpu"))
    # A training step of the same network, in float64, is beyond CI's time: 2e-8, see
    # results/speed_log.md.
    network = optimize_for_inference(with_statistics(tiny(decoder_layers=1)))
    inputs = random_images(2), sentences(1, 3, 5), torch.tensor([1, 0, 1])
    with torch.no_grad():
        assert_close(compile_for_inference(network.forward)(*inputs), network(*inputs))
