"""The pretraining of the tiny CLIP: its loss by hand, its scenes, and going on after an interruption."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import load_file

from crislit.config import compose_config
from crislit.data.shapes import SETS, make_scene
from crislit.io.assets import ASSETS
from crislit.models.build import build_clip
from crislit.training.build import build_model, initialize_encoders
from crislit.transforms.letterbox import letterbox_image


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts/pretrain_tiny_clip.py"
    spec = importlib.util.spec_from_file_location("pretrain_tiny_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_loss_is_clips_symmetric_cross_entropy(script: ModuleType) -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sentences = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # Similarities [[0.6, 0], [0.8, 1]] times 2: rows give log(1 + e^-1.2) and log(1 + e^-0.4), columns log(1 + e^0.4) and
    # log(1 + e^-2).
    by_hand = (
        np.log1p(np.exp(-1.2))
        + np.log1p(np.exp(-0.4))
        + np.log1p(np.exp(0.4))
        + np.log1p(np.exp(-2.0))
    ) / 4
    assert script.contrastive_loss(images, sentences, torch.tensor(2.0)).item() == pytest.approx(
        by_hand, rel=1e-6
    )


def test_a_caption_describes_one_to_all_different_objects(script: ModuleType) -> None:
    said = [["a", "b"], ["c"], ["d", "e", "f"]]
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(60):
        parts = script.caption(rng, said).split(", ")
        image_indices = [
            next(i for i, sentences in enumerate(said) if part in sentences) for part in parts
        ]
        assert len(set(image_indices)) == len(image_indices)
        counts.append(len(image_indices))
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("name", SETS)
def test_a_simple_scene_shows_few_objects_and_says_something_of_each_it_can(
    name: str, script: ModuleType
) -> None:
    for number in range(8):
        image, said = script.draw_simple(number, name, 128)
        assert image.shape == (128, 128, 3)
        assert 1 <= len(said) <= max(script.FEW[number % 4], 2 if name == "gshapes" else 1)
        assert all(sentences for sentences in said)
        again = script.draw_simple(number, name, 128)
        assert np.array_equal(image, again[0])
        assert said == again[1]
    lone = [script.draw_simple(number, name, 128)[1] for number in (0, 1, 4, 5)]
    assert all(len(said) == 1 for said in lone) or name == "gshapes"


@pytest.mark.parametrize("name", SETS)
def test_training_scenes_are_never_those_of_an_evaluation_split(
    name: str, script: ModuleType
) -> None:
    drawn = [script.draw_simple(number, name, 64)[0].tobytes() for number in range(20)]
    drawn += [script.draw(number, name, "train", 64)[0].tobytes() for number in range(20)]
    places = [
        (split, number) for split in SETS[name].splits if split != "train" for number in range(20)
    ]
    evaluated = {letterbox_image(make_scene(0, name, *place)[0], 64).tobytes() for place in places}
    assert not evaluated.intersection(drawn)


def test_all_that_is_learnt_from_is_drawn_as_training_scenes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, dict[str, Any], range]] = []

    class Pool:
        """Takes down what is to be drawn."""

        def __init__(self, _: int) -> None: ...

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, work: Any, numbers: range, chunksize: int) -> list[Any]:
            asked.append((work.func, work.keywords, numbers))
            return []

    monkeypatch.setattr(script, "ProcessPoolExecutor", Pool)
    script.draw_all(8000, 64)
    scenes = [(keywords, numbers) for work, keywords, numbers in asked if work is script.draw]
    assert scenes == [
        ({"name": name, "split": "train", "size": 64}, range(SETS[name].splits["train"]))
        for name in SETS
    ]
    assert {work for work, _, _ in asked} == {script.draw, script.draw_simple}, (
        "which the test above shows to be others"
    )


def test_retrieval_of_towers_that_know_is_perfect_and_of_others_is_chance(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [
        (np.full((32, 32, 3), 10 * i, dtype=np.uint8), [[f"sentence {i}"]]) for i in range(20)
    ]

    class Knowing(torch.nn.Module):
        def visual(self, pictures: torch.Tensor) -> torch.Tensor:
            order = pictures.mean(dim=(1, 2, 3)).argsort().argsort()
            return torch.eye(20)[order]

    monkeypatch.setattr(
        script,
        "encode",
        lambda towers, sentences: torch.eye(20)[[int(s.split()[1]) for s in sentences]],
    )
    found = script.retrieval(Knowing(), scenes, 1)
    assert found["image_to_text_R@1"] == found["text_to_image_R@1"] == 1.0
    assert found["chance_R@5"] == 0.25
    monkeypatch.setattr(script, "encode", lambda towers, sentences: torch.eye(20).roll(1, dims=0))
    assert script.retrieval(Knowing(), scenes, 1)["image_to_text_R@1"] == 0.0


def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EVERY", 2)
    scenes = [script.draw(number, "shapes", "train", 128) for number in range(6)]

    def towers() -> CLIP:
        torch.manual_seed(0)
        return build_clip(compose_config()["model"]["clip"])

    whole, halves = towers(), towers()
    script.train(whole, scenes, 4, 4, 0, tmp_path / "whole")

    def interrupt(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*arguments)

    calls: list[int] = []
    original = script.batch_loss
    with monkeypatch.context() as patch:
        patch.setattr(script, "batch_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.train(halves, scenes, 4, 4, 0, tmp_path / "halves")
    again = towers()
    script.train(again, scenes, 4, 4, 0, tmp_path / "halves")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_scaling_the_sentences_changes_no_similarity(script: ModuleType) -> None:
    torch.manual_seed(0)
    towers = build_clip(compose_config()["model"]["clip"]).eval()
    sentences = ["red star", "the big blue ring on the left", "heart with dots"]
    with torch.no_grad():
        before = script.encode(towers, sentences)
    script.scale_sentences(towers, sentences)
    torch.testing.assert_close(script.encode(towers, sentences).detach(), before)
    assert script.project(towers, sentences).norm(dim=-1).mean().item() == pytest.approx(
        script.SENTENCE_NORM, rel=1e-4
    )


# -- What ships ---------------------------------------------------------------------------------------------------------------


def test_the_shipped_weights_are_small_and_record_how_they_were_made() -> None:
    path = ASSETS / "tiny-clip.safetensors"
    assert path.stat().st_size <= 15 * 2**20
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["pretraining"])
    recorded = json.loads((Path(__file__).parents[2] / "results/tiny_clip.json").read_text())
    assert facts == recorded
    assert {"command", "seed", "seconds", "date", "commit", "hardware", "retrieval"} <= set(facts)


def test_the_shipped_weights_retrieve_as_recorded(script: ModuleType) -> None:
    towers = build_clip(compose_config()["model"]["clip"])
    towers.load_state_dict(
        {name: value.float() for name, value in load_file(ASSETS / "tiny-clip.safetensors").items()}
    )
    scenes = [
        script.draw(number, "shapes", "val", 128) for number in range(SETS["shapes"].splits["val"])
    ]
    recorded = json.loads((Path(__file__).parents[2] / "results/tiny_clip.json").read_text())[
        "retrieval"
    ]["shapes, 2 objects"]
    found = script.retrieval(towers, scenes, 2)
    for name, value in recorded.items():
        assert found[name] == pytest.approx(value, abs=0.01), name
    assert found["image_to_text_R@10"] > 10 * found["chance_R@10"]


def test_they_are_the_default_of_the_tiny_network() -> None:
    settings = compose_config()
    model = build_model(settings)
    assert initialize_encoders(model, settings).startswith("tiny-clip (sha256 ")
    weights = load_file(ASSETS / "tiny-clip.safetensors")
    assert torch.equal(model.text_encoder.text_projection, weights["text_projection"].float())
    assert torch.equal(
        model.image_encoder.resnet.conv1.weight, weights["visual.conv1.weight"].float()
    )
