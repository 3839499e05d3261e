"""Training and evaluation seldom wait for the device: they read no number of it at every step."""

import itertools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crislit.config import compose_config
from crislit.data.dataset import EvaluationBatch
from crislit.data.samplers import NO_SAMPLE
from crislit.errors import InputError
from crislit.training import nan_guard
from crislit.training import run as steps
from crislit.training.checkpointing import LastCheckpoint
from crislit.training.mask_counter import MaskCounter
from crislit.training.metrics import intersection_and_union
from crislit.training.nan_guard import CHECK_EVERY
from crislit.training.task import CRISTask
from crislit.transforms import restore

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""Operations whose result Python needs: on a GPU, they wait until all work is done."""
COPIES = {torch.ops.aten.lift_fresh.default}
"""Tensors made of Python's numbers: on a GPU, they are copied, and the copy waits."""
OF_DATA = ("data/dataset.py", "transforms/tokenizer.py")
"""Files of data workers, whose tensors are on the CPU."""


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers from where operations that wait for a GPU were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS | COPIES:
            self.remember(str(func))
        return func(*args, **(kwargs or {}))

    def remember(self, name: str) -> None:
        """Remember an operation, unless data workers would have called it."""
        files = [frame.filename for frame in traceback.extract_stack()]
        if not any(file.endswith(OF_DATA) for file in files):
            own = [file for file in files if "src/crislit" in file]
            self.places.append(f"{name} below {own[-1] if own else files[-1]}")

    def watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """Remember calls of a method that reads a tensor without an operation."""
        method = getattr(torch.Tensor, name)

        def remembered(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.remember(name)
            return method(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, remembered)


def test_steps_of_training_do_not_wait_for_the_device(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    waits = Waits()
    for name in ("tolist", "cpu", "numpy"):
        waits.watch(monkeypatch, name)

    def count(self: LastCheckpoint, trainer: Any, *arguments: Any) -> None:
        counts.append(len(waits.places))

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", count)
    config = compose_config(
        [
            *(f"data_root={small_shapes}", "image_size=64", "batch_size=4", "workers=0"),
            *("trainer=cpu", "callbacks.pictures=0", "model.clip_weights=null"),
            *("dataset.sentences_per_image=1", f"trainer.max_steps={2 * CHECK_EVERY + 1}"),
            *("logger=none", "trainer.check_val_every_n_epoch=9"),
        ]
    )
    started = steps.start(config, tmp_path)
    assert isinstance(started, steps.Start)
    training = steps.build(started)
    with waits:
        steps.fit(training)
    per_step = [after - before for before, after in itertools.pairwise(counts)]
    assert len(per_step) == 2 * CHECK_EVERY
    checked = [step for step, count in enumerate(per_step, start=2) if count]
    assert checked == [CHECK_EVERY, 13], waits.places


def test_a_step_that_is_refused_on_the_device_leaves_the_weights_for_the_report(
    small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nan_guard, "CHECK_EVERY", 5)
    loss, taken = CRISTask.loss, []

    def spoiled(self: CRISTask, batch: Any) -> torch.Tensor:
        taken.append({name: x.clone() for name, x in self.model.named_parameters()})
        value = loss(self, batch)
        return value * torch.nan if len(taken) == 3 else value

    monkeypatch.setattr(CRISTask, "loss", spoiled)
    config = compose_config(
        [
            *(f"data_root={small_shapes}", "image_size=64", "batch_size=4", "workers=0"),
            *("trainer=cpu", "callbacks.pictures=0", "model.clip_weights=null", "logger=none"),
        ]
    )
    started = steps.start(config, tmp_path)
    assert isinstance(started, steps.Start)
    training = steps.build(started)
    with pytest.raises(InputError, match=r"step 3 was not taken \(epoch 1, batch 3\): loss"):
        steps.fit(training)
    # Neither the third step nor a later one changed a weight.
    assert len(taken) >= 5
    for later in (taken[3], taken[4], dict(training.task.model.named_parameters())):
        assert all(torch.equal(x, later[name]) for name, x in taken[2].items())
    assert any(not torch.equal(x, taken[2][name]) for name, x in taken[1].items())
    assert not list(tmp_path.glob("checkpoints/*.ckpt"))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_count_masks_as_one_after_another(threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counter, expected = MaskCounter(0.35, threads), []
    for number in range(5):
        squares = torch.rand(4, 32, 32, generator=generator)
        sizes = [(20 + number, 30), (40, 25), (33, 33), (8, 64)]
        targets = [(torch.rand(s, generator=generator) > 0.5).byte().numpy() for s in sizes]
        targets[number % 4][:] = 0
        samples = [0, 1, NO_SAMPLE, 3]
        empty = torch.empty(0)
        counter.add(squares, EvaluationBatch(empty, empty, empty, targets, samples))
        for i in (0, 1, 3):
            mask = restore(squares[i].numpy(), *sizes[i]) > 0.35
            expected.append((*intersection_and_union(mask, targets[i]), not targets[i].any()))
    assert list(zip(*counter.finish(), strict=True)) == expected
    assert MaskCounter(0.35, threads).finish() == ((), (), ())


def test_a_network_that_computes_nan_is_an_error_in_threads_too() -> None:
    counter, empty = MaskCounter(0.35, 2), torch.empty(0)
    target = torch.zeros(9, 9, dtype=torch.uint8).numpy()
    squares = torch.full((1, 32, 32), torch.nan)
    counter.add(squares, EvaluationBatch(empty, empty, empty, [target], [0]))
    with pytest.raises(InputError, match="NaN or infinity"):
        counter.finish()
