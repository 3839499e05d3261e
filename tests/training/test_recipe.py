"""Section 4.2: the learning rate of every group in every epoch, as a real Trainer applies it, and the settings of table 2."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from crislit.config import compose_config
from crislit.data.dataset import TrainBatch
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.training.build import build_data
from crislit.training.task import CRISTask

REAL = ("refcoco", "refcoco+", "grefcoco", "grefcoco_google")


def small_task(recipe: str) -> CRISTask:
    torch.manual_seed(0)
    clip: dict[str, Any] = {
        "embed_dim": 8,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 4, "image_size": 32},
        "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1},
    }
    model = build_cris(
        CRISConfig(
            clip=clip,
            neck=(4, 8, 8),
            decoder_layers=1,
            decoder_heads=2,
            decoder_ffn=8,
            max_tokens=6,
        )
    )
    return CRISTask(
        model, **compose_config(["dataset=refcoco", f"recipe={recipe}"])["recipe"]["optimizer"]
    )


class Rates(L.Callback):
    """Notes the rates of the first step of every epoch."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.rates.append(
                {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
            )


def fit(task: CRISTask, epochs: int) -> list[dict[str, float]]:
    rates = Rates()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[rates],
    )
    trainer.fit(task, batches(), batches())
    return rates.rates


def batches() -> Iterable[TrainBatch]:
    tokens = torch.tensor([[18, 3, 19, 0, 0, 0], [18, 4, 5, 19, 0, 0]])
    pixels = torch.randint(256, (2, 4, 64, 64), dtype=torch.uint8)
    batch = TrainBatch(pixels[:, :3], tokens, pixels[:, 3:])
    return DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]


def expected(recipe: str, epoch: int) -> dict[str, float]:
    """The rates of an epoch, counted from 1, written out."""
    if recipe == "paper":
        rate = 1e-4 if epoch <= 35 else 1e-5
        return {"encoders": rate, "rest": rate}
    encoders = 1e-4 if epoch == 1 else 1e-5 if epoch <= 35 else 1e-6
    return {"encoders": encoders, "rest": 1e-4 if epoch <= 35 else 1e-5}


def test_the_embedded_recipe_trains_the_encoders_at_a_lower_rate_from_the_start() -> None:
    rates = fit(small_task("shapes"), 3)
    assert rates == [
        pytest.approx({"encoders": 0.3 * rate, "rest": rate}) for rate in (1e-3, 1e-3, 1e-4)
    ]


@pytest.mark.parametrize("recipe", ["released", "paper"])
def test_every_group_has_the_recipes_rate_in_each_of_the_50_epochs(recipe: str) -> None:
    epochs = compose_config(["dataset=refcoco", f"recipe={recipe}"])["recipe"]["epochs"]
    assert epochs == 50
    rates = fit(small_task(recipe), epochs)
    assert len(rates) == 50
    for epoch, found in enumerate(rates, start=1):
        assert found == pytest.approx(expected(recipe, epoch), rel=1e-9), epoch


def test_the_optimizer_is_adam_without_decay_or_clipping() -> None:
    adam = small_task("released").configure_optimizers()["optimizer"]
    assert type(adam) is torch.optim.Adam
    assert all(
        group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999) for group in adam.param_groups
    )
    assert "gradient_clip_val" not in compose_config(["dataset=refcoco"])["trainer"]


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one() -> None:
    fused, plain = small_task("released"), small_task("released")
    optimizers = (
        fused.configure_optimizers()["optimizer"],
        torch.optim.Adam(plain.model.parameters(), lr=1e-4),
    )
    for _ in range(3):
        for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_groups_hold_every_parameter_once_and_position_embeddings_learn_with_the_rest() -> None:
    task = small_task("released")
    groups = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    encoders = {names[id(parameter)] for parameter in groups["encoders"]}
    rest = {names[id(parameter)] for parameter in groups["rest"]}
    assert encoders | rest == set(names.values())
    assert not encoders & rest
    backbone = {
        name for name in names.values() if name.startswith(("image_encoder.", "text_encoder."))
    }
    assert backbone - encoders == {
        "image_encoder.pool.positional_embedding",
        "text_encoder.positional_embedding",
    }


@pytest.mark.parametrize("dataset", REAL)
def test_a_real_data_set_selects_what_the_authors_ran(dataset: str) -> None:
    settings = compose_config([f"dataset={dataset}", "model=rn50"])
    assert (settings["image_size"], settings["batch_size"], settings["recipe"]["epochs"]) == (
        416,
        64,
        50,
    )
    assert settings["recipe"] == compose_config([f"dataset={dataset}", "recipe=released"])["recipe"]
    assert settings["threshold"] == 0.35
    assert settings["dataset"]["sentences_per_image"] == 1
    assert settings["dataset"]["max_words"] == (22 if dataset.startswith("grefcoco") else 17)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def test_the_papers_command_composes_to_table_2_but_for_clips_weights() -> None:
    command = flat(
        compose_config(["trainer=ddp", "trainer.devices=8", "model=rn101", "dataset=grefcoco"])
    )
    table2 = flat(compose_config(["experiment=table2"]))
    different = {
        name: (command.get(name), table2.get(name))
        for name in command | table2
        if command.get(name) != table2.get(name)
    }
    assert different == {
        "model.clip_weights": (None, "openai"),  # nobody downloads without having asked
        "record": (None, "results/table1.csv"),
        "trainer.precision": ("auto", "16-mixed"),  # what auto becomes on CUDA
        "trainer.sync_batchnorm": ("auto", True),
    }


def test_table_2_is_the_papers_section_4_2() -> None:
    settings = compose_config(["experiment=table2"])
    assert settings["model"]["clip"] == "RN101-quickgelu"
    assert settings["dataset"] | {"refs": "refs(umd).p", "max_words": 22} == settings["dataset"]
    assert settings["decoder"] == {"layers": 3, "heads": 8, "ffn": 2048, "dropout": 0.1}
    assert settings["recipe"]["epochs"] == 50
    assert (
        settings["recipe"]["optimizer"] | {"learning_rate": 1e-4, "milestones": [35], "gamma": 0.1}
        == settings["recipe"]["optimizer"]
    )
    assert (settings["image_size"], settings["batch_size"], settings["threshold"]) == (
        416,
        64,
        0.35,
    )
    assert (settings["trainer"]["devices"], settings["trainer"]["strategy"]) == (8, "ddp")
    assert build_data(settings).accumulation(8) == 1  # eight samples on each of eight devices


@pytest.mark.parametrize("model", ["rn50", "rn101"])
@pytest.mark.parametrize("dataset", ["refcoco", "refcoco+", "grefcoco"])
def test_every_row_of_table_2_is_two_words_away(model: str, dataset: str) -> None:
    settings = compose_config(["experiment=table2", f"model={model}", f"dataset={dataset}"])
    assert settings["model"]["clip"] == f"{model.upper()}-quickgelu"
    assert settings["dataset"]["name"] == dataset
    assert settings["dataset"]["max_words"] == (22 if dataset == "grefcoco" else 17)
    assert settings["model"]["clip_weights"] == "openai"
    assert settings["recipe"]["optimizer"]["encoder_factor"] == 0.1
    paper = compose_config(
        ["experiment=table2", f"model={model}", f"dataset={dataset}", "recipe=paper"]
    )
    assert paper["recipe"]["optimizer"]["encoder_factor"] == 1.0


@pytest.mark.parametrize(
    ("row", "layers", "contrastive"), [("baseline", 0, False), ("con", 0, True), ("dec1", 1, False)]
)
def test_the_papers_settings_leave_table_1_its_rows(
    row: str, layers: int, contrastive: bool
) -> None:
    settings = compose_config(
        ["experiment=table2", f"ablation={row}", "model=rn50", "dataset=refcoco"]
    )
    assert (settings["decoder"]["layers"], settings["loss"]["contrastive"]) == (layers, contrastive)


def test_fewer_devices_accumulate_to_the_same_batch() -> None:
    settings = compose_config(["experiment=table2", "trainer.devices=2", "batch_size_per_device=8"])
    assert build_data(settings).accumulation(2) == 4


@pytest.mark.parametrize(
    ("devices", "per_device", "steps"),
    [(1, 64, 1), (8, None, 1), (8, 4, 2), (4, 8, 2), (2, None, 1), (1, 16, 4)],
)
def test_batches_of_64_divide_over_devices_and_accumulate(
    devices: int, per_device: int | None, steps: int
) -> None:
    settings = compose_config(
        ["dataset=refcoco", f"batch_size_per_device={'null' if per_device is None else per_device}"]
    )
    assert build_data(settings).accumulation(devices) == steps
    assert (per_device or 64 // devices) * devices * steps == 64


@pytest.mark.parametrize(
    ("devices", "per_device"), [(3, None), (8, 5), (8, 16), (5, None), (64, None)]
)
def test_a_batch_that_does_not_divide_is_an_error(devices: int, per_device: int | None) -> None:
    settings = compose_config(
        ["dataset=refcoco", f"batch_size_per_device={'null' if per_device is None else per_device}"]
    )
    with pytest.raises(ValueError, match=r"batch_size=64 does not divide over|too small"):
        build_data(settings).accumulation(devices)
