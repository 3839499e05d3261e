"""Figures 4 and 5, attention, and the threshold, of barely trained networks."""

import csv
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from pycocotools import mask as coco_mask

from crislit import figures as figures_command
from crislit.checkpoints.checkpoint import KEY
from crislit.data import shapes
from crislit.errors import InputError
from crislit.experiments.failures import (
    FAILURE_KINDS,
    annotations_by_image,
    classify_failure,
    decode_annotation,
    draw_failures,
    find_failures,
)
from crislit.experiments.figures import (
    draw_attention,
    draw_comparison,
    draw_threshold,
    threshold_curve,
    word_attention,
)
from crislit.experiments.subjects import Subject, check_same_samples, evenly_spaced
from crislit.training import fonts
from crislit.training.metrics import intersection_and_union, iou
from crislit.transforms.tokenizer import tokenize


@pytest.fixture
def full(four_networks: list[Path], small_shapes: Path) -> Subject:
    """The network with a decoder of three layers."""
    return Subject(four_networks[3], str(small_shapes), "val")


def squares(*corners: tuple[int, int]) -> list[np.ndarray]:
    """Return masks of 20 x 20 pixels, with 4 x 4 pixels below and right of each corner."""
    masks = []
    for row, column in corners:
        mask = np.zeros((20, 20), dtype=bool)
        mask[row : row + 4, column : column + 4] = True
        masks.append(mask)
    return masks


def shown(axes: Axes) -> np.ndarray:
    """Return the image that was drawn on some axes."""
    return np.asarray(axes.images[0].get_array())


def darkened(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image darkened outside a mask."""
    return (image * np.where(mask, 1.0, 0.3)[..., None]).astype(np.uint8)


def set_predictions(
    subject: Subject, maps: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make a network predict these probability maps."""
    monkeypatch.setattr(subject, "predictions", lambda numbers: ((n, maps[n]) for n in numbers))


def image_id(subject: Subject, number: int) -> int:
    """Return the id of a sample's image."""
    return subject.module.index.image_id(int(subject.data.samples[number, 0]))


def object_masks(subject: Subject, number: int) -> list[np.ndarray]:
    """Return the masks of all objects in a sample's image."""
    annotations = annotations_by_image(subject)[image_id(subject, number)]
    shape = subject.data.target(number).shape
    return [decode_annotation(annotation, *shape) for annotation in annotations]


def test_failures_are_classified_by_the_objects_that_the_prediction_covers() -> None:
    target, other = squares((2, 2), (10, 10))
    nothing = np.zeros_like(target)
    half, quarter = np.roll(target, 2, axis=0), np.roll(target, 3, axis=0)
    assert classify_failure(target | other, target, [other]) == "ambiguous sentence"
    assert classify_failure(other, target, [other]) == "wrong object"
    assert classify_failure(target, target, [other]) == "poor boundary"
    assert classify_failure(half, target, [other]) == "poor boundary"
    assert classify_failure(quarter, target, [other]) == "missed"
    assert classify_failure(nothing, target, [other]) == "missed"
    assert classify_failure(other, target, [nothing]) == "missed", "an empty object is not covered"
    assert classify_failure(target, target, []) == "poor boundary"
    part = target.copy()
    part[:, :4] = False  # an object within the target, and predicted with it
    assert classify_failure(target, target, [part]) == "poor boundary"
    assert classify_failure(target | other, target, [part | other]) == "ambiguous sentence"


def test_attention_over_words_is_a_distribution_without_padding(full: Subject) -> None:
    tokens = tokenize(["red star", "the big blue circle on the left"], 12)
    images = torch.randn(2, 3, 64, 96)
    before = full.model(images, tokens)
    maps = word_attention(full.model, images, tokens)
    assert maps.shape == (2, 12, 4, 6)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 4, 6))
    ends = tokens.argmax(dim=1)
    assert float(maps[0, ends[0] + 1 :].abs().max()) == 0
    assert float(maps[1, : ends[1] + 1].min()) > 0
    torch.testing.assert_close(full.model(images, tokens), before)


def test_a_network_without_decoder_has_no_attention(
    four_networks: list[Path], small_shapes: Path
) -> None:
    subject = Subject(four_networks[1], str(small_shapes), "val")
    with pytest.raises(InputError, match="no decoder"):
        word_attention(subject.model, torch.zeros(1, 3, 64, 64), tokenize(["star"], 12))


def test_attention_is_the_softmax_over_words_of_queries_and_keys(full: Subject) -> None:
    model = full.model
    assert model.decoder is not None
    images, tokens = torch.randn(2, 3, 64, 96), tokenize(["red star", "the big blue circle"], 12)
    layer = model.decoder.layers[-1].cross_attention
    assert isinstance(layer, torch.nn.MultiheadAttention)
    inputs: dict[str, torch.Tensor] = {}
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.update(
            cells=args[0], words=args[1], padding=kwargs["key_padding_mask"]
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(images, tokens)
        hook.remove()
        width, heads = layer.embed_dim, layer.num_heads
        weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
        queries, keys = (
            (inputs[name] @ weights[i].T + biases[i])
            .reshape(2, -1, heads, width // heads)
            .transpose(1, 2)
            for i, name in enumerate(("cells", "words"))
        )
        scores = queries @ keys.transpose(2, 3) / (width // heads) ** 0.5
        scores = scores.masked_fill(inputs["padding"][:, None, None], -torch.inf)
        by_hand = scores.softmax(-1).mean(1)  # (B, cells, L)
        maps = word_attention(model, images, tokens)
    for y, x in ((0, 0), (0, 5), (3, 0), (2, 4)):
        torch.testing.assert_close(maps[:, :, y, x], by_hand[:, 6 * y + x])


def test_networks_are_named_as_in_figure_4(four_networks: list[Path], small_shapes: Path) -> None:
    titles = [Subject(path, str(small_shapes), "val").title for path in four_networks]
    assert titles == ["baseline", "without decoder", "without contrastive, n = 1", "full, n = 3"]


def test_all_objects_of_an_image_are_listed_and_the_target_is_one_of_them(full: Subject) -> None:
    for number in range(0, len(full.data), 5):
        target, masks = full.data.target(number), object_masks(full, number)
        assert len(masks) >= 4
        assert sum(np.array_equal(mask, target) for mask in masks) == 1


def test_the_threshold_curve_agrees_with_masks_cut_by_hand(full: Subject) -> None:
    numbers = [0, 7, 11]
    curve = dict(threshold_curve(full, numbers))
    assert list(curve) == [round(0.05 * step, 2) for step in range(1, 20)]
    for threshold in (0.05, 0.35, 0.5):
        by_hand = [
            iou(*intersection_and_union(probability > threshold, full.data.target(number)))
            for number, probability in full.predictions(numbers)
        ]
        assert curve[threshold] == pytest.approx(np.mean(by_hand))


def test_samples_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 3) == [0, 4, 9]
    assert evenly_spaced(2, 6) == [0, 1]


def test_figure_4_shows_each_networks_mask_of_the_same_samples(
    four_networks: list[Path], small_shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [Subject(path, str(small_shapes), "val") for path in four_networks]
    data, numbers = subjects[0].data, [0, 7]
    predicted = {}
    for i, subject in enumerate(subjects):
        maps = {number: np.full(data.target(number).shape, 0.34, np.float32) for number in numbers}
        for number in numbers:
            maps[number][: 30 * (i + 1), : 50 + number] = 0.36  # the threshold is 0.35
            predicted[i, number] = maps[number] == np.float32(0.36)
        set_predictions(subject, maps, monkeypatch)
    grid = np.array(draw_comparison(subjects, numbers).axes).reshape(2, 6)
    names = ["baseline", "without decoder", "without contrastive, n = 1", "full, n = 3"]
    assert [axes.get_title() for axes in grid[0]] == ["image", "target", *names]
    for row, number in zip(grid, numbers, strict=True):
        image, target = data.image(number), data.target(number)
        assert row[0].get_xlabel() == f"“{data.sentence(number)}”"
        assert np.array_equal(shown(row[0]), image)
        assert np.array_equal(shown(row[1]), darkened(image, target))
        for i, axes in enumerate(row[2:]):
            score = iou(*intersection_and_union(predicted[i, number], target))
            assert np.array_equal(shown(axes), darkened(image, predicted[i, number]))
            assert axes.get_xlabel() == f"IoU {score:.2f}"


def test_figure_5_shows_the_worst_of_each_kind(
    full: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = full.data.image_ids
    numbers = [int(np.flatnonzero(images == image)[0]) for image in np.unique(images)]
    kinds = ["right", "ambiguous sentence", "wrong object", "poor boundary", "missed", "missed"]
    predicted = {}
    for number, kind in zip(numbers, kinds, strict=True):
        target = full.data.target(number).astype(bool)
        masks = object_masks(full, number)
        others = [mask & ~target for mask in masks if not np.array_equal(mask, target)]
        all_others = np.logical_or.reduce(others)
        predicted[number] = {
            "right": target,
            "ambiguous sentence": target | all_others,
            "wrong object": max(others, key=np.count_nonzero),
            "poor boundary": target | ~all_others,
            "missed": np.zeros_like(target),
        }[kind]
    maps = {number: mask.astype(np.float32) for number, mask in predicted.items()}
    set_predictions(full, maps, monkeypatch)
    failures = find_failures(full, numbers)
    expected = sorted(zip(numbers[1:], kinds[1:], strict=True))
    assert sorted((failure["sample"], failure["sort"]) for failure in failures) == expected
    scores = [failure["IoU"] for failure in failures]
    assert scores == sorted(scores)

    grid = np.array(draw_failures(full, failures, per_kind=2).axes).reshape(4, 4)
    for row, (kind, rule) in zip(grid, FAILURE_KINDS.items(), strict=True):
        members = [failure for failure in failures if failure["sort"] == kind]
        assert row[0].get_ylabel() == f"{kind}\n{len(members)} of 5"
        assert row[0].get_title(loc="left") == rule
        for i, failure in enumerate(members):
            number = failure["sample"]
            image, target = full.data.image(number), full.data.target(number)
            score = iou(*intersection_and_union(predicted[number], target))
            left, right = row[2 * i], row[2 * i + 1]
            assert np.array_equal(shown(left), darkened(image, target))
            assert np.array_equal(shown(right), darkened(image, predicted[number]))
            assert right.get_xlabel() == f"predicted, IoU {score:.2f}"
            assert failure["IoU"] == pytest.approx(score)
        assert not any(axes.images for axes in row[2 * len(members) :])


def test_figure_5_shows_sentences_in_any_script_without_warnings(
    full: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fonts, "installed_fonts", lambda: [])
    image = full.data.image(0)
    prediction = coco_mask.encode(np.zeros(image.shape[:2], np.uint8, order="F"))
    failure = {"sample": 0, "sentence": "红 $x_\x07", "IoU": 0.0, "sort": "missed"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure = draw_failures(full, [failure | {"prediction": prediction}], per_kind=1)
        figure.savefig(tmp_path / "figure.png")
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert labels == [f"“{fonts.MISSING} $x_ ”", "predicted, IoU 0.00"]


def test_attention_has_one_panel_per_word_with_its_range(full: Subject) -> None:
    numbers = [0, 9]
    grid = np.array(draw_attention(full, numbers).axes).reshape(2, -1)
    for row, number in zip(grid, numbers, strict=True):
        panels = [axes for axes in row[1:] if axes.images]
        titles = [axes.get_title().split("\n") for axes in panels]
        assert [word for word, _ in titles] == full.data.sentence(number).split()
        limits = [axes.images[1].get_clim() for axes in panels]
        ranges = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in limits]
        assert [text for _, text in titles] == ranges


def test_the_threshold_is_drawn_in_percent_with_the_papers_marked() -> None:
    (axes,) = draw_threshold({"full": [(0.3, 0.5), (0.4, 0.25)]}).axes
    curve, mark = axes.lines
    assert np.asarray(curve.get_xydata()).tolist() == [[0.3, 50.0], [0.4, 25.0]]
    assert np.unique(np.asarray(mark.get_xdata())).tolist() == [0.35]


def test_annotations_may_be_compressed_and_invalid_ones_are_named() -> None:
    box = np.zeros((6, 8), np.uint8)
    box[2:4, 3:6] = 1
    counts = coco_mask.encode(np.asfortranarray(box))["counts"].decode()
    compressed = {"id": 1, "segmentation": {"size": [6, 8], "counts": counts}}
    assert np.array_equal(decode_annotation(compressed, 6, 8), box)
    two_points = {"id": 1, "segmentation": [[1, 1, 2, 2]]}
    assert not decode_annotation(two_points, 6, 8).any()
    with pytest.raises(InputError, match="annotation 7 cannot be drawn"):
        decode_annotation({"id": 7, "segmentation": [["x"]]}, 6, 8)


def test_a_figure_is_written_to_outputs_by_default(
    four_networks: list[Path], small_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data-root", str(small_shapes), "--samples", "1"]
    figures_command.main(["threshold", str(four_networks[0]), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "threshold.png",
        "threshold.csv",
    }


@pytest.mark.parametrize("kind", ["compare", "failures", "attention", "threshold"])
def test_each_figure_is_one_command(
    kind: str, four_networks: list[Path], small_shapes: Path, tmp_path: Path
) -> None:
    checkpoints = four_networks if kind in ("compare", "threshold") else four_networks[-1:]
    output = tmp_path / f"deep/{kind}.png"
    options = ["--data-root", str(small_shapes), "--samples", "4", "--output", str(output)]
    figures_command.main([kind, *map(str, checkpoints), *options])
    image = matplotlib.image.imread(output)[..., :3]
    assert image.shape[0] > 200
    assert image.std() > 0.05, "something is drawn"
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 1).all(), "nothing is cut off"
    if kind in ("threshold", "failures"):
        with output.with_suffix(".csv").open() as file:
            rows = list(csv.DictReader(file))
        if kind == "threshold":
            assert len(rows) == 4 * 19
        else:
            scores = [float(row["IoU"]) for row in rows]
            assert scores == sorted(scores)
            assert all(score < 0.5 for score in scores)
            assert {row["sort"] for row in rows} <= set(FAILURE_KINDS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["failures", "CHECKPOINT", "CHECKPOINT"], "failures takes one checkpoint, not 2"),
        (["compare", "nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["compare", "CHECKPOINT", "--split", "testC"], "no split 'testC'"),
        (["threshold", "CHECKPOINT", "--samples", "-3"], "--samples must be 1 or more, got -3"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], expected: str, four_networks: list[Path], small_shapes: Path
) -> None:
    checkpoint = str(four_networks[0])
    arguments = [checkpoint if value == "CHECKPOINT" else value for value in arguments]
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        figures_command.main([*arguments, "--data-root", str(small_shapes)])


def change_config(path: Path, target: Path, **changes: Any) -> None:
    """Copy a checkpoint, with other settings and digests in it."""
    checkpoint = torch.load(path, weights_only=True)
    for name, value in changes.items():
        place = checkpoint[KEY] if name == "fingerprint" else checkpoint[KEY]["config"]
        place[name] = place.get(name, {}) | value if isinstance(value, dict) else value
    torch.save(checkpoint, target)


@pytest.fixture(scope="module")
def two_sets(small_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a small `shapes` and a small `shapes+`."""
    root = tmp_path_factory.mktemp("two")
    (root / f"shapes-v{shapes.VERSION}").symlink_to(small_shapes / f"shapes-v{shapes.VERSION}")
    scenes = {"train": 2, "val": 6, "testA": 2, "testB": 2}
    folder = shapes.write_shapes(root, "shapes+", scenes=scenes)
    folder.rename(root / f"shapes+-v{shapes.VERSION}")
    return root


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"protocol": "first_sentence"},
            "different samples .*: protocol=all_sentences .* protocol=first_sentence",
        ),
        (
            {"dataset": {"name": "shapes+", "folder": "shapes+"}},
            r"different data cannot be compared: shapes shapes .* and shapes\+ shapes\+",
        ),
        (
            {"fingerprint": {"data": "b" * 16}},
            "trained on different sentences or masks of shapes .*: digest [0-9a-f]{16} and b{16}",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["compare", "threshold"])
def test_networks_with_different_samples_are_an_error(
    kind: str,
    change: dict[str, Any],
    expected: str,
    four_networks: list[Path],
    two_sets: Path,
    tmp_path: Path,
) -> None:
    one, other = four_networks[0], tmp_path / "other.ckpt"
    change_config(four_networks[0], other, **change)
    with pytest.raises(SystemExit, match=f"error: .*{expected}"):
        figures_command.main([kind, str(one), str(other), "--data-root", str(two_sets)])


def test_one_data_set_under_two_names_is_the_same_data(
    four_networks: list[Path], small_shapes: Path, tmp_path: Path
) -> None:
    change_config(four_networks[0], tmp_path / "other.ckpt", dataset={"name": "mine"})
    paths = (four_networks[0], tmp_path / "other.ckpt")
    check_same_samples([Subject(path, str(small_shapes), "val") for path in paths])


def test_a_network_trained_on_data_that_changed_since_is_shown_with_a_warning(
    four_networks: list[Path],
    small_shapes: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = Subject(four_networks[0], str(small_shapes), "val").module.index.digest
    assert caplog.text == ""
    change_config(four_networks[0], tmp_path / "old.ckpt", fingerprint={"data": "a" * 16})
    Subject(tmp_path / "old.ckpt", str(small_shapes), "val")
    expected = f"trained on other sentences or masks (digest {'a' * 16}, here {here})"
    assert expected in caplog.text


def test_attention_of_another_decoder_is_refused_with_what_is_needed(full: Subject) -> None:
    class Mine(torch.nn.Module):
        """A decoder without layers."""

    class WithLayers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    for decoder in (Mine(), WithLayers()):
        full.model.decoder = decoder  # type: ignore[assignment]
        expected = f"a decoder whose last layer has a cross_attention .*{type(decoder).__name__}$"
        with pytest.raises(InputError, match=expected):
            word_attention(full.model, torch.zeros(1, 3, 64, 64), tokenize(["star"], 12))
