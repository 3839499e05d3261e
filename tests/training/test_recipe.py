"""Section 4.2: learning rates in every epoch, as a Trainer applies them; table 2's settings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from crislit.config import compose_config
from crislit.data.dataset import TrainBatch
from crislit.errors import InputError, see
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.training.build import build_data
from crislit.training.task import CRISTask
from tests.runs import run

REAL = ("refcoco", "refcoco+", "grefcoco", "grefcoco_google")


def small_task(recipe: str) -> CRISTask:
    torch.manual_seed(0)
    clip: dict[str, Any] = {
        "embed_dim": 8,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 4, "image_size": 32},
        "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1},
    }
    decoder: dict[str, Any] = {"decoder_layers": 1, "decoder_heads": 2, "decoder_ffn": 8}
    model = build_cris(CRISConfig(clip=clip, neck=(4, 8, 8), max_tokens=6, **decoder))
    config = compose_config(["dataset=refcoco", f"recipe={recipe}"])
    return CRISTask(model, **config["recipe"]["optimizer"])


# -- The optimizer


class RateRecorder(L.Callback):
    """Records the rates of every step, or of the first step of every epoch."""

    def __init__(self, every_step: bool = False) -> None:
        self.every_step = every_step
        self.rates: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.every_step or batch_idx == 0:
            groups = trainer.optimizers[0].param_groups
            self.rates.append({group["name"]: group["lr"] for group in groups})


def fit(
    task: CRISTask, epochs: int, every_step: bool = False, **options: Any
) -> list[dict[str, float]]:
    """Train on two batches per epoch, and return the rates of every epoch or every step."""
    recorder = RateRecorder(every_step)
    build_trainer(recorder, max_epochs=epochs, **options).fit(task, batches(), batches())
    return recorder.rates


def build_trainer(callback: L.Callback, **options: Any) -> L.Trainer:
    """Build a trainer on the CPU that trains and does nothing else."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[callback],
        **options,
    )


def batches() -> Iterable[TrainBatch]:
    tokens = torch.tensor([[18, 3, 19, 0, 0, 0], [18, 4, 5, 19, 0, 0]])
    pixels = torch.randint(256, (2, 4, 64, 64), dtype=torch.uint8)
    batch = TrainBatch(pixels[:, :3], tokens, pixels[:, 3:])
    return DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]


def expected_rates(recipe: str, epoch: int) -> dict[str, float]:
    """Return the rates of an epoch, counted from 1, by hand."""
    if recipe == "paper":
        rate = 1e-4 if epoch <= 35 else 1e-5
        return {"encoders": rate, "rest": rate}
    encoders = 1e-4 if epoch == 1 else 1e-5 if epoch <= 35 else 1e-6
    return {"encoders": encoders, "rest": 1e-4 if epoch <= 35 else 1e-5}


def test_the_embedded_recipes_rates_fall_linearly_to_zero_over_the_last_steps() -> None:
    epochs = compose_config()["recipe"]["epochs"]
    rates = fit(small_task("shapes"), epochs, every_step=True)
    # Twelve steps, two per epoch; the rates fall over the last 4.8 of them.
    factors = [1] * 8 + [4 / 4.8, 3 / 4.8, 2 / 4.8, 1 / 4.8]
    expected = [{"encoders": 3e-4 * factor, "rest": 1e-3 * factor} for factor in factors]
    assert rates == [pytest.approx(values) for values in expected]


def test_a_cooldown_multiplies_the_rates_of_the_milestones_and_counts_optimizer_steps() -> None:
    task = small_task("released")
    task.milestones, task.gamma, task.cooldown = [1, 3], 0.5, 0.75
    rates = fit(task, 4, every_step=True)
    rest = [1, 1, 0.5, 0.5 * 5 / 6, 0.5 * 4 / 6, 0.5 * 3 / 6, 0.25 * 2 / 6, 0.25 * 1 / 6]
    assert [values["rest"] for values in rates] == pytest.approx([1e-4 * r for r in rest])
    encoders = [factor * (1 if step < 2 else 0.1) for step, factor in enumerate(rest)]
    assert [values["encoders"] for values in rates] == pytest.approx([1e-4 * r for r in encoders])

    task.cooldown = 1.0  # four steps of two batches each
    rates = fit(task, 4, every_step=True, accumulate_grad_batches=2)
    rest = [1, 1, 0.5 * 3 / 4, 0.5 * 3 / 4, 0.5 * 2 / 4, 0.5 * 2 / 4, 0.25 / 4, 0.25 / 4]
    assert [values["rest"] for values in rates] == pytest.approx([1e-4 * r for r in rest])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision: str) -> None:
    class Norms(L.Callback):
        """Records the norm of all gradients at every step."""

        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
            gradients = [p.grad for p in task.parameters() if p.grad is not None]
            if gradients:
                self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    task, recorded = small_task("released"), {}
    for limit in (None, 1e-3):
        norms = Norms()
        options = {"max_epochs": 1, "precision": precision, "gradient_clip_val": limit}
        build_trainer(norms, **options).fit(task, batches(), batches())
        recorded[limit] = norms.norms
    assert min(recorded[None]) > 1e-2
    assert recorded[1e-3] == pytest.approx([1e-3] * len(recorded[1e-3]), rel=1e-2)
    assert recorded[1e-3]


@pytest.mark.parametrize("recipe", ["released", "paper"])
def test_every_group_has_the_recipes_rate_in_each_of_the_50_epochs(recipe: str) -> None:
    epochs = compose_config(["dataset=refcoco", f"recipe={recipe}"])["recipe"]["epochs"]
    assert epochs == 50
    rates = fit(small_task(recipe), epochs)
    assert len(rates) == 50
    for epoch, values in enumerate(rates, start=1):
        assert values == pytest.approx(expected_rates(recipe, epoch), rel=1e-9), epoch


def test_the_optimizer_is_adam_without_decay_or_clipping() -> None:
    adam = small_task("released").configure_optimizers()["optimizer"]
    assert type(adam) is torch.optim.Adam
    assert all(group["weight_decay"] == 0 for group in adam.param_groups)
    assert all(group["betas"] == (0.9, 0.999) for group in adam.param_groups)
    assert compose_config(["dataset=refcoco"])["trainer"]["gradient_clip_val"] is None


def test_the_fused_optimizer_takes_the_same_steps_as_the_default_one() -> None:
    fused, default = small_task("released"), small_task("released")
    adam = torch.optim.Adam(default.model.parameters(), lr=1e-4)
    optimizers = (fused.configure_optimizers()["optimizer"], adam)
    pairs = list(zip(fused.model.parameters(), default.model.parameters(), strict=True))
    for _ in range(3):
        for a, b in pairs:
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_groups_hold_every_parameter_once_and_position_embeddings_train_with_the_rest() -> None:
    task = small_task("released")
    groups = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    encoders = {names[id(parameter)] for parameter in groups["encoders"]}
    rest = {names[id(parameter)] for parameter in groups["rest"]}
    assert encoders | rest == set(names.values())
    assert not encoders & rest
    prefixes = ("image_encoder.", "text_encoder.")
    assert {name for name in names.values() if name.startswith(prefixes)} - encoders == {
        "image_encoder.pool.positional_embedding",
        "text_encoder.positional_embedding",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma must be a positive number"),
        ({"encoder_from": -1}, "encoder_from must be a whole number"),
        ({"milestones": [0]}, "milestones must be a whole number"),
        ({"cooldown": 1.5}, "cooldown must be a share of the training between 0 and 1, got 1.5"),
        ({"cooldown": None}, "cooldown must be a share of the training"),
    ],
)
def test_settings_of_the_optimizer_are_checked(options: dict[str, Any], message: str) -> None:
    model = small_task("released").model
    with pytest.raises(InputError, match=message):
        CRISTask(model, **options)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_clipped_at_the_scaled_limit(algorithm: str) -> None:
    task = small_task("released")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    task.trainer = trainer
    weights = nn.Parameter(torch.zeros(2))
    for gradients, clipped in (
        # Three and four times the scale: norm 5, clipped at 2.5; the largest value at 2.5.
        ([24.0, 32.0], [12.0, 16.0] if algorithm == "norm" else [20.0, 20.0]),
        ([8.0, -8.0], [8.0, -8.0]),
    ):
        weights.grad = torch.tensor(gradients)
        task.configure_gradient_clipping(torch.optim.Adam([weights], fused=True), 2.5, algorithm)
        torch.testing.assert_close(weights.grad, torch.tensor(clipped))


# -- Tables 1 and 2


@pytest.mark.parametrize("dataset", REAL)
def test_a_real_data_set_selects_the_authors_settings(dataset: str) -> None:
    config = compose_config([f"dataset={dataset}", "model=rn50"])
    assert (config["image_size"], config["batch_size"]) == (416, 64)
    assert config["recipe"]["epochs"] == 50
    assert config["recipe"] == compose_config([f"dataset={dataset}", "recipe=released"])["recipe"]
    assert config["threshold"] == 0.35
    assert config["dataset"]["sentences_per_image"] == 1
    assert config["dataset"]["max_words"] == (22 if dataset.startswith("grefcoco") else 17)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        is_group = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def test_the_users_command_composes_to_table_2() -> None:
    overrides = ["trainer=ddp", "trainer.devices=8", "model=rn101", "dataset=grefcoco"]
    command = flatten(compose_config(overrides))
    table2 = flatten(compose_config(["experiment=table2"]))
    pairs = {name: (command.get(name), table2.get(name)) for name in command | table2}
    assert {name: pair for name, pair in pairs.items() if pair[0] != pair[1]} == {
        "record": (None, "outputs/table1.csv"),
        "trainer.precision": ("auto", "16-mixed"),  # auto becomes this on CUDA
        "trainer.sync_batchnorm": ("auto", True),
    }


@pytest.mark.parametrize("model", ["rn50", "rn101", "rn50x4"])
@pytest.mark.parametrize("dataset", ["refcoco", "grefcoco", "shapes", "gshapes", "custom"])
def test_every_network_of_clips_size_starts_from_clip(model: str, dataset: str) -> None:
    file = ["dataset.file=a.jsonl"] if dataset == "custom" else []
    options = [f"model={model}", f"dataset={dataset}", *file]
    assert compose_config(options)["model"]["clip_weights"] == "openai"
    assert compose_config([*options, "model.clip_weights=null"])["model"]["clip_weights"] is None


def test_without_clips_weights_the_papers_line_says_what_to_fetch_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "run", "model=rn101", "dataset=grefcoco", "data_root=nowhere")
    error = capsys.readouterr().err
    assert "needs OpenAI's RN101" in error
    assert "/RN101.pt" in error
    assert f"put it at {tmp_path}/.cache/clip/RN101.pt" in error
    random = "train from random weights instead: model.clip_weights=null"
    assert error.strip().endswith(random + see("clip-weights"))


def test_table_2_has_the_settings_of_section_4_2() -> None:
    config = compose_config(["experiment=table2"])
    assert config["model"]["clip"] == "RN101-quickgelu"
    dataset, optimizer = config["dataset"], config["recipe"]["optimizer"]
    assert dataset | {"refs": "refs(umd).p", "max_words": 22} == dataset
    assert config["decoder"] == {"layers": 3, "heads": 8, "ffn": 2048, "dropout": 0.1}
    assert config["recipe"]["epochs"] == 50
    assert optimizer | {"learning_rate": 1e-4, "milestones": [35], "gamma": 0.1} == optimizer
    assert (config["image_size"], config["batch_size"], config["threshold"]) == (416, 64, 0.35)
    assert (config["trainer"]["devices"], config["trainer"]["strategy"]) == (8, "ddp")
    assert build_data(config).accumulation(8) == 1  # eight samples on each of eight devices


@pytest.mark.parametrize("model", ["rn50", "rn101"])
@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "grefcoco"])
def test_every_row_of_table_2_takes_two_overrides(model: str, dataset: str) -> None:
    overrides = ["experiment=table2", f"model={model}", f"dataset={dataset}"]
    config = compose_config(overrides)
    assert config["model"]["clip"] == f"{model.upper()}-quickgelu"
    assert config["dataset"]["name"] == dataset
    assert config["dataset"]["max_words"] == (22 if dataset == "grefcoco" else 17)
    assert config["model"]["clip_weights"] == "openai"
    assert config["recipe"]["optimizer"]["encoder_factor"] == 0.1
    paper = compose_config([*overrides, "recipe=paper"])
    assert paper["recipe"]["optimizer"]["encoder_factor"] == 1.0


@pytest.mark.parametrize(
    ("row", "layers", "contrastive"), [("baseline", 0, False), ("con", 0, True), ("dec1", 1, False)]
)
def test_rows_of_table_1_can_be_trained_with_table_2s_settings(
    row: str, layers: int, contrastive: bool
) -> None:
    overrides = ["experiment=table2", f"ablation={row}", "model=rn50", "dataset=refcoco"]
    config = compose_config(overrides)
    assert (config["decoder"]["layers"], config["loss"]["contrastive"]) == (layers, contrastive)


# -- Batches


def accumulation(devices: int, per_device: int | None) -> int:
    """Return the batches per step of the released recipe's 64 samples."""
    size = "null" if per_device is None else per_device
    config = compose_config(["dataset=refcoco", f"batch_size_per_device={size}"])
    return build_data(config).accumulation(devices)


def test_fewer_devices_accumulate_to_the_same_batch() -> None:
    config = compose_config(["experiment=table2", "trainer.devices=2", "batch_size_per_device=8"])
    assert build_data(config).accumulation(2) == 4


@pytest.mark.parametrize(
    ("devices", "per_device", "steps"),
    [(1, 64, 1), (8, None, 1), (8, 4, 2), (4, 8, 2), (2, None, 1), (1, 16, 4)],
)
def test_batches_of_64_divide_over_devices_and_accumulate(
    devices: int, per_device: int | None, steps: int
) -> None:
    assert accumulation(devices, per_device) == steps
    assert (per_device or 64 // devices) * devices * steps == 64


@pytest.mark.parametrize(
    ("devices", "per_device"), [(3, None), (8, 5), (8, 16), (5, None), (64, None)]
)
def test_a_batch_that_does_not_divide_is_an_error(devices: int, per_device: int | None) -> None:
    with pytest.raises(InputError, match=r"batch_size=64 does not divide over|too small"):
        accumulation(devices, per_device)
