"""Network, loss and way back create no tensor on the CPU and read none, on a device that is not."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from crislit.config import compose_config
from crislit.data.dataset import EvaluationBatch, TrainBatch
from crislit.experiments.paper import TABLE1
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_inference, optimize_for_training
from crislit.training.build import build_model
from crislit.training.losses import text_to_pixel_contrastive_loss
from crislit.training.task import CRISTask
from crislit.transforms import normalize, probability_squares

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class NoCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails when a tensor is copied to another device: the copy would wait for all of its work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            assert result.device == args[0].device, f"{args[0].device} -> {result.device}"
        return result


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device without memory; an operation that mixes it with the CPU raises an error."""
    # A copied tensor stays in its mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
    name = getattr(request, "param", "cuda")
    with FakeTensorMode() if name == "cuda" else nullcontext():
        yield name


def build(device: str, *overrides: str) -> CRIS:
    with torch.device(device):
        return build_model(compose_config(["dataset=refcoco", *overrides]))


def inputs(device: str, size: int = 416) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, and four sentences about them."""
    images = torch.empty(2, 3, size, size, dtype=torch.uint8, device=device)
    tokens = torch.empty(4, 17, dtype=torch.long, device=device)
    return images, tokens, torch.empty(4, dtype=torch.long, device=device)


NETWORKS = {
    **{f"rn50 {row}": ["model=rn50", f"ablation={row}"] for row in TABLE1},
    **{name: [f"model={name}"] for name in ("rn101", "rn50x4", "tiny")},
    "kernel of 1": ["model=rn50", "projector.kernel_size=1"],
}


@pytest.mark.parametrize(
    ("name", "device"),
    [*((name, "cuda") for name in NETWORKS), ("rn50 con_dec3", "meta")],
    indirect=["device"],
)
def test_the_whole_way_from_bytes_to_loss_and_probabilities_stays_on_the_device(
    name: str, device: str
) -> None:
    model = build(device, *NETWORKS[name])
    images, tokens, image_indices = inputs(device)
    masks = torch.empty(4, 1, 416, 416, dtype=torch.uint8, device=device)
    forms = (model.train(), optimize_for_training(model), optimize_for_inference(model.eval()))
    for form in forms:
        with NoCopies():  # type: ignore[no-untyped-call]
            logits = form(normalize(images), tokens, image_indices)
            loss = text_to_pixel_contrastive_loss(logits, masks / 255)
            squares = probability_squares(logits, 416)
        assert (logits.device.type, loss.device.type, squares.device.type) == 3 * (device,)
        assert (logits.shape, loss.shape, squares.shape) == ((4, 1, 104, 104), (), (4, 416, 416))


def test_a_step_of_the_task_stays_on_the_device_in_every_precision(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with unset_fake_temporarily():  # its metrics cannot be built there
        task = CRISTask(build_model(compose_config(["model=tiny"])))
    task.model = build(device, "model=rn50")
    images, tokens, image_indices = inputs(device)
    masks = torch.empty(4, 1, 416, 416, dtype=torch.uint8, device=device)
    batch = TrainBatch(images, tokens, masks)
    with NoCopies():  # type: ignore[no-untyped-call]
        assert task.loss(batch).device.type == device
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast(device, dtype):
                assert task.loss(batch).device.type == device
        evaluated = EvaluationBatch(images, tokens, image_indices, [], [])
        assert task._logits(evaluated).dtype == torch.float32


def test_a_tensor_on_the_wrong_device_is_noticed(device: str) -> None:
    model = build(device, "model=tiny").train()
    images, tokens, _ = inputs(device)
    maps = model.encode_images(normalize(images))
    on_cpu = [torch.empty(x.shape) for x in maps]
    with pytest.raises(RuntimeError, match="device"):
        model.ground((on_cpu[0], maps[1], maps[2]), tokens)
