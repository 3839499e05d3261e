"""``scripts/pretrain_tiny_clip.py``: its loss, its scenes, resuming, and the shipped weights."""

import json
from collections.abc import Sequence
from pathlib import Path
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
from crislit.training.build import build_model, load_initial_weights
from crislit.transforms.letterbox import letterbox_image
from scripts import pretrain_tiny_clip as script

RECORD = Path(__file__).parents[2] / "results/tiny_clip.json"


def tiny_clip() -> CLIP:
    """Build the encoders with random weights, always the same."""
    torch.manual_seed(0)
    return build_clip(compose_config()["model"]["clip"])


def test_the_loss_is_clips_symmetric_cross_entropy() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sentences = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    # Similarities [[0.6, 0], [0.8, 1]] times 2. Rows give log(1 + e^-1.2) and log(1 + e^-0.4),
    # columns log(1 + e^0.4) and log(1 + e^-2).
    by_hand = np.log1p(np.exp([-1.2, -0.4, 0.4, -2.0])).mean()
    loss = script.contrastive_loss(images, sentences, torch.tensor(2.0))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_caption_describes_one_to_all_objects_each_once() -> None:
    described = [["a", "b"], ["c"], ["d", "e", "f"]]
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        parts = script.caption(rng, described).split(", ")
        objects = [next(i for i, known in enumerate(described) if part in known) for part in parts]
        assert len(set(objects)) == len(objects)
        counts.add(len(objects))
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("name", SETS)
def test_a_simple_scene_has_few_objects_and_is_always_the_same(name: str) -> None:
    for number in range(8):
        image, described = script.draw_simple(number, name, 128)
        assert image.shape == (128, 128, 3)
        assert 1 <= len(described) <= max(script.OBJECTS[number % 4], 2 if name == "gshapes" else 1)
        assert all(described)
        again, described_again = script.draw_simple(number, name, 128)
        assert np.array_equal(image, again)
        assert described == described_again
    if name != "gshapes":  # whose sentences are about relations
        assert all(len(script.draw_simple(number, name, 128)[1]) == 1 for number in (0, 1, 4, 5))


@pytest.mark.parametrize("name", SETS)
def test_training_scenes_are_not_scenes_of_an_evaluation_split(name: str) -> None:
    drawn = {script.draw_simple(number, name, 64)[0].tobytes() for number in range(20)}
    drawn |= {script.draw(number, name, "train", 64)[0].tobytes() for number in range(20)}
    for split in SETS[name].splits:
        if split != "train":
            scenes = (make_scene(0, name, split, number)[0] for number in range(20))
            assert drawn.isdisjoint(letterbox_image(scene, 64).tobytes() for scene in scenes)


def test_only_training_and_simple_scenes_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, dict[str, Any], range]] = []

    class Pool:
        """Records what is to be drawn."""

        def __init__(self, _: int) -> None: ...

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...

        def map(self, work: Any, numbers: range, chunksize: int) -> list[Any]:
            calls.append((work.func, work.keywords, numbers))
            return []

    monkeypatch.setattr(script, "ProcessPoolExecutor", Pool)
    script.draw_all(8000, 64)
    training = [(keywords, numbers) for work, keywords, numbers in calls if work is script.draw]
    assert training == [
        ({"name": name, "split": "train", "size": 64}, range(spec.splits["train"]))
        for name, spec in SETS.items()
    ]
    assert {work for work, _, _ in calls} == {script.draw, script.draw_simple}


class IdealEncoder(torch.nn.Module):
    """Gives the image of number i, by brightness, the i-th unit vector."""

    def visual(self, images: torch.Tensor) -> torch.Tensor:
        return torch.eye(20)[images.mean(dim=(1, 2, 3)).argsort().argsort()]


def test_retrieval_is_perfect_with_ideal_encoders_and_zero_with_shifted_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenes = [
        (np.full((32, 32, 3), 10 * i, dtype=np.uint8), [[f"sentence {i}"]]) for i in range(20)
    ]

    def encode(clip: Any, sentences: Sequence[str]) -> torch.Tensor:
        return torch.eye(20)[[int(sentence.split()[1]) for sentence in sentences]]

    monkeypatch.setattr(script, "encode", encode)
    recalls = script.retrieval(IdealEncoder(), scenes, 1)
    assert recalls["image_to_text_R@1"] == recalls["text_to_image_R@1"] == 1.0
    assert recalls["chance_R@5"] == 0.25
    monkeypatch.setattr(script, "encode", lambda clip, sentences: torch.eye(20).roll(1, dims=0))
    assert script.retrieval(IdealEncoder(), scenes, 1)["image_to_text_R@1"] == 0.0


def test_a_resumed_training_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EVERY", 2)
    scenes = [script.draw(number, "shapes", "train", 128) for number in range(6)]
    expected = tiny_clip()
    script.train(expected, scenes, 4, 4, 0, tmp_path / "uninterrupted")

    batch_loss, calls = script.batch_loss, []

    def interrupt(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "batch_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.train(tiny_clip(), scenes, 4, 4, 0, tmp_path / "interrupted")
    resumed = tiny_clip()
    script.train(resumed, scenes, 4, 4, 0, tmp_path / "interrupted")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_scaling_the_sentences_changes_no_similarity() -> None:
    clip = tiny_clip().eval()
    sentences = ["red star", "the big blue ring on the left", "heart with dots"]
    with torch.no_grad():
        before = script.encode(clip, sentences)
    script.scale_sentences(clip, sentences)
    torch.testing.assert_close(script.encode(clip, sentences).detach(), before)
    norm = script.project(clip, sentences).norm(dim=-1).mean()
    assert norm.item() == pytest.approx(script.SENTENCE_NORM, rel=1e-4)


# -- The shipped weights


def test_the_shipped_weights_are_small_and_record_how_they_were_made() -> None:
    path = ASSETS / "tiny-clip.safetensors"
    assert path.stat().st_size <= 15 * 2**20
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["pretraining"])
    assert facts == json.loads(RECORD.read_text())
    assert {"command", "seed", "seconds", "date", "commit", "hardware", "retrieval"} <= set(facts)


def test_the_shipped_weights_retrieve_as_recorded() -> None:
    clip = tiny_clip()
    weights = load_file(ASSETS / "tiny-clip.safetensors")
    clip.load_state_dict({name: value.float() for name, value in weights.items()})
    count = SETS["shapes"].splits["val"]
    scenes = [script.draw(number, "shapes", "val", 128) for number in range(count)]
    recalls = script.retrieval(clip, scenes, 2)
    recorded = json.loads(RECORD.read_text())["retrieval"]["shapes, 2 objects"]
    for name, value in recorded.items():
        assert recalls[name] == pytest.approx(value, abs=0.01), name
    assert recalls["image_to_text_R@10"] > 10 * recalls["chance_R@10"]


def test_the_tiny_network_starts_from_the_shipped_weights() -> None:
    config = compose_config()
    model = build_model(config)
    assert load_initial_weights(model, config).startswith("tiny-clip (sha256 ")
    weights = load_file(ASSETS / "tiny-clip.safetensors")
    expected = weights["text_projection"].float(), weights["visual.conv1.weight"].float()
    assert torch.equal(model.text_encoder.text_projection, expected[0])
    assert torch.equal(model.image_encoder.resnet.conv1.weight, expected[1])
