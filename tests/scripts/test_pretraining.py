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
from crislit.data.expressions import Thing, clarity, has_place
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


def test_false_captions_are_contrasted_and_ignored_pairs_are_not() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sentences = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])  # the third is a false one
    ignored = torch.tensor([[False, True, False], [True, False, False]])
    # Left are 0.6 against 1 for the first image, 1 against 0 for the second; the columns of the
    # two captions have one entry each, and add nothing.
    by_hand = np.log1p(np.exp([1.0 - 0.6, 0.0 - 1.0])).mean() / 2
    loss = script.contrastive_loss(images, sentences, torch.tensor(1.0), ignored)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


# -- Scenes and views


@pytest.fixture(scope="module")
def scenes() -> list[script.Scene]:
    """Draw scenes of every kind."""
    drawn = [script.draw(number, name, "train", 128) for name in SETS for number in range(12)]
    return drawn + [script.draw_simple(n, name, 128) for name in SETS for n in range(12)]


@pytest.mark.parametrize("name", SETS)
def test_a_simple_scene_has_few_objects_and_is_always_the_same(name: str) -> None:
    for number in range(8):
        scene = script.draw_simple(number, name, 128)
        assert scene.image.shape == (128, 128, 3)
        fewest = 2 if name == "gshapes" else 1  # whose sentences are about relations
        assert len(scene.things) == max(script.OBJECTS[number % 4], fewest)
        again = script.draw_simple(number, name, 128)
        assert np.array_equal(scene.image, again.image)
        assert scene.things == again.things


def test_boxes_surround_the_objects_centres(scenes: list[script.Scene]) -> None:
    for scene in scenes:
        for thing, (left, top, right, bottom) in zip(scene.things, scene.boxes, strict=True):
            x, y = 0.4 * thing.x, 16 + 0.4 * thing.y  # 320 pixels on 128, 96 rows in the middle
            assert left < x < right
            assert top < y < bottom


def test_a_window_is_cut_around_an_object_and_describes_what_it_shows(
    scenes: list[script.Scene],
) -> None:
    rng = np.random.default_rng(0)
    counts = set()
    for scene in scenes * 3:
        view = script.window(rng, scene)
        assert view.image.shape == (script.WINDOW, script.WINDOW, 3)
        counts.add(len(view.things))
        assert view.present == scene.things
        ((top, left),) = [
            (top, left)
            for top in range(128 - 64 + 1)
            for left in range(128 - 64 + 1)
            if np.array_equal(scene.image[top : top + 64, left : left + 64], view.image)
        ]
        partly = 0
        for thing, box in zip(scene.things, scene.boxes, strict=True):
            width = max(min(box[2], left + 64) - max(box[0], left), 0)
            height = max(min(box[3], top + 64) - max(box[1], top), 0)
            share = width * height / ((box[2] - box[0]) * (box[3] - box[1]))
            if share >= script.SHOWN:
                assert thing in view.things
            elif thing in view.things:
                partly += 1
        assert partly <= 1, "only the object in the middle, if it is larger than the window"
    assert {1, 2} <= counts


def test_images_of_the_native_size_are_encoded_as_by_open_clip() -> None:
    clip, images = tiny_clip().eval(), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(script.encode_images(clip, images), clip.visual(images))
        assert script.encode_images(clip, images[..., :64, :64]).shape == (2, 128)


# -- Captions


def fits(thing: Thing, other: Thing, mention: Sequence[str]) -> bool:
    """Whether two objects share the mentioned attributes."""
    return all(getattr(thing, name) == getattr(other, name) for name in mention)


def is_true(part: script.Part, things: Sequence[Thing]) -> bool:
    """Whether some object of a scene fits a part of a caption, sizes and "closest" apart."""
    target, said = part
    for thing in things:
        if not fits(thing, target, said.mention):
            continue
        if said.place and not has_place(said.place, thing, []):
            continue
        if said.landmark is not None and said.relation != "closest to":
            marks = [t for t in things if fits(t, said.landmark, said.landmark_mention)]
            if not any(clarity(said.relation, thing, m) > 0 for m in marks if m is not thing):
                continue
        return True
    return False


def test_captions_are_true_and_altered_ones_are_false(scenes: list[script.Scene]) -> None:
    rng = np.random.default_rng(0)
    counts, altered_words = set(), set()
    for scene in scenes * 10:
        for view in (script.whole(scene), script.window(rng, scene)):
            parts = script.caption(rng, view)
            assert all(is_true(part, view.present) for part in parts)
            assert len({id(part.target) for part in parts}) == len(parts) <= script.MOST_PARTS
            counts.add(len(parts))
            false = script.falsify(rng, view, parts)
            if false is None:
                continue
            changed = [(old, new) for old, new in zip(parts, false, strict=True) if old != new]
            assert len(changed) == 1
            assert not is_true(changed[0][1], view.present)
            before, after = (part.description for part in changed[0])
            altered_words |= {after.place, after.relation} - {before.place, before.relation}
    assert counts == {1, 2, 3}
    assert {"left", "right", "top", "bottom", "left of", "right of", "above"} <= altered_words


def test_a_caption_may_be_true_of_the_scenes_that_have_all_of_its_attributes(
    scenes: list[script.Scene],
) -> None:
    rng = np.random.default_rng(0)
    views = [script.whole(scene) for scene in scenes]
    captions = [script.caption(rng, view) for view in views]
    found = script.may_be_true(captions, views)
    assert found.diagonal().all()
    for i, parts in enumerate(captions):
        named = [(part.target, part.description.mention) for part in parts]
        named += [
            (part.description.landmark, part.description.landmark_mention)
            for part in parts
            if part.description.landmark is not None
        ]
        for j, view in enumerate(views):
            expected = all(any(fits(t, x, m) for t in view.present) for x, m in named)
            assert bool(found[i, j]) == expected
    assert 0.05 < found.float().mean() < 0.5


def test_a_batch_contrasts_each_image_with_its_own_false_caption(
    scenes: list[script.Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[torch.Tensor] = []

    def loss(images: Any, sentences: Any, scale: Any, ignored: torch.Tensor) -> torch.Tensor:
        assert ignored.shape == (len(images), len(sentences))
        masks.append(ignored)
        return torch.zeros(())

    monkeypatch.setattr(script, "contrastive_loss", loss)
    views = [script.whole(scene) for scene in scenes[:16]]
    script.batch_loss(tiny_clip(), views, np.random.default_rng(0))
    (ignored,) = masks
    assert not ignored.diagonal().any()
    assert ignored[:, :16].any(), "some captions may be true of other images"
    false = ignored.shape[1] - 16
    assert false > 8
    assert (~ignored[:, 16:]).any(dim=0).all(), "a false caption is contrasted with its own image"


@pytest.mark.parametrize("name", SETS)
def test_training_scenes_are_not_scenes_of_an_evaluation_split(name: str) -> None:
    drawn = {script.draw_simple(number, name, 64).image.tobytes() for number in range(20)}
    drawn |= {script.draw(number, name, "train", 64).image.tobytes() for number in range(20)}
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
    boxes = np.zeros((0, 4), dtype=np.int64)
    images = [np.full((32, 32, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    scenes = [
        script.Scene(image, [], boxes, "absolute", [[f"sentence {i}"]])
        for i, image in enumerate(images)
    ]

    def encode(clip: Any, sentences: Sequence[str]) -> torch.Tensor:
        return torch.eye(20)[[int(sentence.split()[1]) for sentence in sentences]]

    monkeypatch.setattr(script, "encode", encode)
    recalls = script.retrieval(IdealEncoder(), scenes, 1)
    assert recalls["image_to_text_R@1"] == recalls["text_to_image_R@1"] == 1.0
    assert recalls["chance_R@5"] == 0.25
    monkeypatch.setattr(script, "encode", lambda clip, sentences: torch.eye(20).roll(1, dims=0))
    assert script.retrieval(IdealEncoder(), scenes, 1)["image_to_text_R@1"] == 0.0


def test_windows_come_first_and_every_step_has_its_own_seed(scenes: list[script.Scene]) -> None:
    schedule = script.Schedule(window_steps=2, scene_steps=1, batch=4, seed=0)
    sizes = [[len(view.image) for view in schedule.views(scenes, step)[0]] for step in range(3)]
    assert sizes == [[64] * 12, [64] * 12, [128] * 4]
    first, again = (schedule.views(scenes, 0)[0][0].image for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, schedule.views(scenes, 1)[0][0].image)


def test_a_resumed_training_ends_like_an_uninterrupted_one(
    scenes: list[script.Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "EVERY", 2)
    schedule = script.Schedule(window_steps=1, scene_steps=3, batch=4, seed=0)
    expected = tiny_clip()
    script.train(expected, scenes, schedule, tmp_path / "uninterrupted")

    batch_loss, calls = script.batch_loss, []

    def interrupt(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return batch_loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "batch_loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.train(tiny_clip(), scenes, schedule, tmp_path / "interrupted")
    resumed = tiny_clip()
    script.train(resumed, scenes, schedule, tmp_path / "interrupted")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(SystemExit, match="delete it to start from the beginning"):
        script.train(tiny_clip(), scenes, schedule._replace(seed=1), tmp_path / "interrupted")


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
