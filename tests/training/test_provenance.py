"""The fingerprint of a run: settings that change its numbers change it, and no others do."""

import csv
from pathlib import Path

import pytest

from crislit.config import compose_config
from crislit.data import SHAPES_VERSION
from crislit.training import provenance
from crislit.training.provenance import fingerprint

RESULTS = Path(__file__).parents[2] / "results"
RECORDS = ("make_train.csv", "random_weights.csv", "rounding.csv", "table1.csv")
"""Records of runs on the embedded data."""


FIRST_RECIPE = (
    *("recipe.epochs=3", "recipe.optimizer.milestones=[2]", "recipe.optimizer.cooldown=0"),
    "trainer.gradient_clip_val=null",
)
"""The recipe of the embedded data in version 0.1."""
FIRST_STEPS = "2250"
"""The number of its steps."""
FIRST_TINY_CLIP = "b7176eefa53ad8a27188a1e21ed9a62932083a437f0e3e334a34ab6cb68cc061"
"""The SHA-256 of tiny-clip in version 0.1."""


def experiment(*overrides: str) -> str:
    return fingerprint(compose_config(overrides))["experiment"]


def setting(*overrides: str) -> str:
    return fingerprint(compose_config(overrides))["setting"]


# -- Digests of version 0.1


def first_digests(*overrides: str) -> tuple[str, str]:
    """Return experiment and setting of a run with version 0.1's recipe and tiny-clip."""
    is_embedded = compose_config(overrides)["dataset"].get("embedded")
    config = compose_config([*(FIRST_RECIPE if is_embedded else ()), *overrides])
    is_tiny = config["model"]["clip_weights"] == "tiny-clip"
    weights = {"clip_weights": FIRST_TINY_CLIP, "init_from": ""} if is_tiny else None
    digests = fingerprint(config, weights=weights)
    return digests["experiment"], digests["setting"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", ("2ad844981e2e3f3b", "a273829d965bce41")),
        ("seed=3 ablation=dec1", ("84f18199de43a13b", "a273829d965bce41")),
        (
            "experiment=overfit recipe.epochs=260 recipe.optimizer.milestones=[200]",
            ("4f5d1197f1755afb", "f78261498f501c69"),
        ),
        ("trainer=ddp_cpu batch_size_per_device=4", ("932942d76317f725", "3f4ab32ceee4831e")),
        (
            "dataset=gshapes dataset.on_error=skip trainer.gradient_clip_val=0.1 resume=last.ckpt",
            ("7a629929d3826437", "abc7e0147d0b06c9"),
        ),
        (
            "dataset=refcoco model=rn50 model.clip_weights=null data_root=nowhere",
            ("bdb496ac040b6693", "24a7959aeeca864f"),
        ),
        (
            "dataset=refcoco+ dataset.on_error=skip data_root=nowhere protocol=first_sentence",
            ("ca550a640515a692", "2744cc7e73a298f8"),
        ),
        (
            "dataset=grefcoco_google recipe=paper data_root=nowhere",
            ("b900423872da7259", "029211497502a794"),
        ),
        (
            "experiment=table2 data_root=nowhere model.clip_weights=null",
            ("634731f29eef1a12", "6bddc33227a92fab"),
        ),
        (
            "dataset=custom dataset.file=nowhere.jsonl dataset.sentences=nowhere.csv",
            ("7097db76b27b1946", "d613b0e27d96e2c2"),
        ),
    ],
)
def test_digests_are_those_of_version_0_1(overrides: str, expected: tuple[str, str]) -> None:
    assert first_digests(*overrides.split()) == expected


@pytest.mark.parametrize("record", RECORDS)
def test_recorded_runs_keep_their_digests(record: str) -> None:
    with (RESULTS / record).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in {row["experiment"]: row for row in rows}.values():
        options = row["overrides"].split()
        is_first = row["steps"] == FIRST_STEPS
        digests = first_digests(*options) if is_first else (experiment(*options), setting(*options))
        assert digests == (row["experiment"], row["setting"]), options


# -- Settings that count


@pytest.mark.parametrize(
    "override",
    [
        *("data_root=elsewhere", "workers=0", "logger=none", "eval_batch_size=3", "trainer=ddp"),
        *("trainer=gpu", "trainer=cpu", "+trainer.enable_progress_bar=false"),
        *("dataset.evaluation_splits=[val]", "checkpoint_every=7", "callbacks.pictures=0"),
        *("record=null", "resume=auto", "augment=none"),
    ],
)
def test_settings_that_change_no_number_do_not_change_the_experiment(override: str) -> None:
    assert experiment(override) == experiment()


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "decoder.layers=2", "loss.contrastive=false", "projector.kernel_size=1"),
        *("dataset=shapes+", "dataset.sentences_per_image=1", "image_size=96", "batch_size=64"),
        *("recipe.epochs=1", "trainer.max_steps=2", "recipe.optimizer.learning_rate=2e-3"),
        *("threshold=0.5", "protocol=first_sentence"),
        "batch_size_per_device=8",  # BatchNorm sees fewer samples at once
        "trainer=ddp_cpu",  # there, too: CPUs have no SyncBN
        *("trainer.precision=16-mixed", "trainer.sync_batchnorm=true"),
        "trainer.check_val_every_n_epoch=3",  # decides which checkpoint is the best
        *("trainer.gradient_clip_val=0.1", "recipe.optimizer.cooldown=0.2"),
        "+trainer.limit_train_batches=0.1",
        *("+trainer.limit_test_batches=1", "+trainer.fast_dev_run=true", "resume=last.ckpt"),
        *("model.clip_weights=null", "model.clip_weights=openai", "augment=flip_color"),
    ],
)
def test_settings_that_change_a_number_change_the_experiment(override: str) -> None:
    base = ["model.clip_weights=other"] if override == "model.clip_weights=null" else []
    assert experiment(override) != experiment(*base)


def test_values_of_an_augmentation_change_the_experiment() -> None:
    flipped = experiment("augment=flip_color")
    assert experiment("augment=flip_color", "augment.flip=0.3") != flipped
    assert experiment("augment=flip_color", "augment.transforms=[]") != flipped


def test_rows_of_one_table_share_their_setting() -> None:
    for same in (
        ["seed=4"],
        ["dataset=gshapes"],
        ["ablation=baseline"],
        ["ablation=con_dec4", "dataset=shapes+"],
    ):
        assert setting(*same) == setting(), same
    for other in (
        *("recipe.optimizer.learning_rate=2e-3", "batch_size=32", "decoder.ffn=64"),
        *("dataset.sentences_per_image=1", "augment=flip_color"),
    ):
        assert setting(other) != setting(), other


# -- Content, not places


def test_weights_count_by_their_content(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("c.pt", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (experiment(f"model.clip_weights={tmp_path}/{name}.pt") for name in "abc")
    assert a == b != c


def test_the_version_of_the_embedded_data_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    embedded, real = experiment(), experiment("dataset=refcoco")
    monkeypatch.setattr(provenance, "SHAPES_VERSION", SHAPES_VERSION + 1)
    assert experiment() != embedded
    assert experiment("dataset=refcoco") == real


@pytest.mark.parametrize(
    "dataset", ["dataset=refcoco", "dataset=grefcoco", "dataset=custom dataset.file=a.jsonl"]
)
def test_real_and_custom_data_count_by_their_digest(dataset: str) -> None:
    config = compose_config(dataset.split())
    first, second = fingerprint(config, "0123"), fingerprint(config, "4567")
    assert first["experiment"] != second["experiment"]
    assert first["setting"] == second["setting"]
    assert (first["data"], second["data"]) == ("0123", "4567")


def test_embedded_data_keep_the_experiment_of_their_version() -> None:
    config = compose_config()
    assert fingerprint(config, "0123")["experiment"] == experiment()
    assert fingerprint(config, "0123")["data"] == "0123"


def test_the_network_that_a_run_starts_from_counts_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a.ckpt", b"\x801"), ("b.ckpt", b"\x801"), ("c.ckpt", b"\x802")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (experiment(f"init_from={tmp_path}/{name}.ckpt") for name in "abc")
    assert a == b != c != experiment()
