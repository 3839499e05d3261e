"""Masks from any image and many sentences, and clear errors for bad input."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import crislit
from crislit.checkpoints.checkpoint import Checkpoint, write_folder
from crislit.checkpoints.released import to_released
from crislit.errors import InputError
from crislit.inference.segmentation import Segmentation
from crislit.inference.segmenter import Segmenter, group_by_sentences, truncation_warning
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.transforms.letterbox import (
    letterbox_image,
    normalize,
    probability_maps,
    restore,
    stack_images,
)
from crislit.transforms.tokenizer import split_at_limit
from tests.io.test_images import photo, saved

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
TINY = CRISConfig(clip=CLIP, neck=(16, 64, 32), decoder_layers=1, decoder_heads=4, decoder_ffn=64)
SENTENCES = ["the man in red", "leftmost dog", "star", "the big blue circle on the far left"]


@pytest.fixture(scope="module")
def model() -> CRIS:
    """A network whose logits vary over pixels and sentences."""
    torch.manual_seed(0)
    model = build_cris(TINY)
    with torch.no_grad():
        model.head.linear.weight.mul_(30)  # type: ignore[union-attr, operator]
    return model.eval()


@pytest.fixture(scope="module")
def segmenter(model: CRIS) -> Segmenter:
    return Segmenter(model, image_size=64, device="cpu")


def assert_same(result: Segmentation, expected: Segmentation, atol: float = 1e-5) -> None:
    assert result.sentence == expected.sentence
    np.testing.assert_allclose(result.probability, expected.probability, atol=atol)
    assert result.score == pytest.approx(expected.score, abs=10 * atol)


# -- Results


def test_a_mask_is_the_probability_above_the_threshold_at_the_images_own_size(
    segmenter: Segmenter, model: CRIS
) -> None:
    image = photo()
    # The median, so that the mask is neither empty nor full.
    threshold = float(np.median(segmenter(image, SENTENCES[1])[0].probability))
    results = Segmenter(model, image_size=64, device="cpu", threshold=threshold)(image, SENTENCES)
    assert [result.sentence for result in results] == SENTENCES
    square = normalize(stack_images([letterbox_image(image, 64)]))
    for result in results:
        with torch.no_grad():
            logits = model(square, crislit.tokenize([result.sentence], 17))
        (expected,) = probability_maps(logits, 64, [(50, 70)])
        np.testing.assert_allclose(result.probability, expected.clip(0, 1), atol=1e-5)
        assert result.probability.dtype == np.float32
        assert result.mask.dtype == bool
        assert result.probability.shape == result.mask.shape == (50, 70)
        clear = abs(expected - threshold) > 1e-4
        assert np.array_equal(result.mask[clear], expected[clear] > threshold)
        score = result.probability[result.mask].mean() if result.mask.any() else 0
        assert result.score == pytest.approx(score)
    assert 0.3 < results[1].mask.mean() < 0.7
    first, second = results[0].probability, results[1].probability
    assert not np.allclose(first, second, atol=1e-2), "the sentence matters"


def test_probabilities_stay_in_range_where_bicubic_interpolation_overshoots(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = np.where(np.arange(64)[:, None] % 8 < 4, 1.05, -0.05) * np.ones((64, 64))
    probability = restore(square.astype(np.float32), 50, 70)
    monkeypatch.setattr(
        "crislit.inference.segmenter.probability_maps", lambda *_: iter([probability])
    )
    (result,) = segmenter(photo(), "star")
    assert (result.probability.min(), result.probability.max()) == (0, 1)


def test_a_batch_gives_the_same_results_as_one_by_one(segmenter: Segmenter) -> None:
    images = [photo(50, 70, 1), photo(33, 90, 2), photo(64, 64, 3)]
    things = [f"{letter} thing" for letter in "abcdefghijklmnopqrstuvwxyz" * 2]
    lists = [SENTENCES, SENTENCES[1:2], things]
    batch = segmenter.batch(images, lists)
    assert [len(results) for results in batch] == [4, 1, 52]
    for image, sentences, results in zip(images, lists, batch, strict=True):
        for sentence, result in list(zip(sentences, results, strict=True))[::7]:
            assert_same(result, segmenter(image, sentence)[0])


def test_many_sentences_encode_the_image_once(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = segmenter.network.encode_images

    def encode_and_count(images: torch.Tensor) -> Any:
        calls.append(len(images))
        return encode(images)

    monkeypatch.setattr(segmenter.network, "encode_images", encode_and_count)
    segmenter(photo(), [f"number {i}" for i in range(70)])
    assert calls == [1]
    segmenter.batch([photo(seed=i) for i in range(5)], [SENTENCES] * 5)
    assert calls == [1, 5]


def test_groups_keep_the_order_and_the_limit() -> None:
    assert list(group_by_sentences([10, 20, 5, 40, 1, 1], 32)) == [[0, 1], [2], [3], [4, 5]]
    assert list(group_by_sentences([0] * 40, 32)) == [list(range(32)), list(range(32, 40))]
    assert list(group_by_sentences([], 32)) == []


def test_no_sentences_or_no_images_give_no_results(segmenter: Segmenter) -> None:
    assert segmenter(photo(), []) == []
    assert segmenter.batch([], []) == []
    batch = segmenter.batch([photo(), photo()], [[], ["star"]])
    assert [len(results) for results in batch] == [0, 1]


def test_threads_get_their_own_results(segmenter: Segmenter) -> None:
    images = [photo(40 + i, 60, i) for i in range(12)]
    expected = [segmenter(image, SENTENCES[i % 4])[0] for i, image in enumerate(images)]

    def segment(i: int) -> Segmentation:
        return segmenter(images[i], SENTENCES[i % 4])[0]

    with ThreadPoolExecutor(6) as pool:
        for i, result in enumerate(pool.map(segment, list(range(12)) * 3)):
            assert_same(result, expected[i % 12])


def test_half_precision_is_close(model: CRIS, segmenter: Segmenter) -> None:
    (half,) = Segmenter(model, image_size=64, device="cpu", precision="bfloat16")(photo(), "star")
    (full,) = segmenter(photo(), "star")
    assert abs(half.probability - full.probability).mean() < 0.05
    assert segmenter.precision == "float32"


def test_a_compiled_network_finds_the_same_in_threads_too(
    model: CRIS, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_function = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile_function)
    torch._dynamo.reset()
    compiled = Segmenter(model, image_size=64, device="cpu", compile=True)
    images = [photo(h, w) for h, w in ((40, 60), (64, 32), (33, 90))]
    with ThreadPoolExecutor(3) as pool:
        for image, results in zip(images, pool.map(compiled, images, 3 * [SENTENCES]), strict=True):
            for result, expected in zip(results, segmenter(image, SENTENCES), strict=True):
                assert_same(result, expected)
    lists = [SENTENCES[:1], [], SENTENCES[2:]]
    batches = compiled.batch(images, lists), segmenter.batch(images, lists)
    for results, wanted in zip(*batches, strict=True):
        for result, expected in zip(results, wanted, strict=True):
            assert_same(result, expected)
    torch._dynamo.reset()


# -- Images


def test_an_image_may_come_from_a_file_or_as_bytes(segmenter: Segmenter, tmp_path: Path) -> None:
    image, path = photo(), tmp_path / "photo.png"
    PIL.Image.fromarray(image).save(path)
    for source in (path, path.read_bytes()):
        assert_same(segmenter(source, "star")[0], segmenter(image, "star")[0], atol=0)


def test_a_mask_is_upright_like_its_image(segmenter: Segmenter) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = saved(PIL.Image.fromarray(photo(50, 70)), "PNG", exif=exif)
    assert segmenter(file, "star")[0].mask.shape == (70, 50)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 400), (300, 9), (1000, 1500)])
def test_any_size_from_8_pixels_is_segmented(height: int, width: int, segmenter: Segmenter) -> None:
    assert segmenter(photo(height, width), "star")[0].mask.shape == (height, width)


# -- Bad input


def test_a_stream_computes_results_one_by_one(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = segmenter(photo(), SENTENCES)
    computed: list[str] = []
    original = Segmenter._to_segmentation

    def record(self: Segmenter, sentence: str, probability: np.ndarray) -> Segmentation:
        computed.append(sentence)
        return original(self, sentence, probability)

    monkeypatch.setattr(Segmenter, "_to_segmentation", record)
    stream = segmenter.stream(photo(), SENTENCES)
    first = next(stream)
    assert computed == SENTENCES[:1]
    for result, reference in zip([first, *stream], expected, strict=True):
        assert np.array_equal(result.probability, reference.probability)


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [("", "empty"), (["star", " \t\n"], "empty"), ([7], "must be a string, got 7")],
)
def test_a_bad_sentence_is_an_error(sentences: Any, expected: str, segmenter: Segmenter) -> None:
    with pytest.raises(InputError, match=expected):
        segmenter(photo(), sentences)


def test_different_numbers_of_images_and_lists_are_an_error(segmenter: Segmenter) -> None:
    with pytest.raises(
        InputError, match=r"as many lists of sentences as images, which is 2, got 1$"
    ):
        segmenter.batch([photo(), photo()], [["star"]])
    with pytest.raises(InputError, match=r"write \['star'\]"):
        segmenter.batch([photo()], ["star"])


def test_truncated_words_are_named(segmenter: Segmenter) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    words += " fifteen"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter(photo(), words)
    message = "reads 15 tokens .* not read is 'sixteen seventeen'"
    with pytest.warns(UserWarning, match=message) as caught:
        (result,) = segmenter(photo(), f"{words} sixteen  seventeen")
    assert result.sentence == f"{words} sixteen  seventeen"
    assert caught[0].filename == __file__, "the warning points at the caller"
    with pytest.warns(UserWarning, match="not read is 'sixteen'") as caught:
        segmenter.batch([photo()], [[f"{words} sixteen"]])
    assert caught[0].filename == __file__
    assert_same(replace(result, sentence=words), segmenter(photo(), words)[0])


@pytest.mark.parametrize(
    ("end", "unread"),
    [
        ("Turquoiseish", "'iseish', which begins inside 'turquoiseish'"),
        ("Turquoiseish thing", "'iseish thing', which begins inside 'turquoiseish'"),
        ("red star", "'star'"),
        ("red-star", "'-star', which begins inside 'red-star'"),
        ("红星", "'红星'"),  # a part of the first character is kept, which is not readable
        ("x🟥🟥", "'🟥🟥', which begins inside 'x🟥🟥'"),
    ],
)
def test_the_text_that_is_not_read_is_named_to_the_character(end: str, unread: str) -> None:
    sentence = f"one two three four five six seven eight nine ten eleven twelve thirteen four {end}"
    assert truncation_warning(sentence, 17).endswith(f" has more: not read is {unread}")
    read, rest = split_at_limit(sentence, 17)
    assert read + rest == sentence.lower()
    # Reading only what is kept gives the same tokens, except for half a character.
    kept = crislit.tokenize([read], 17)[0].tolist()
    full = crislit.tokenize([sentence], 17)[0].tolist()
    assert kept[:14] == full[:14]


def test_a_network_that_reads_one_token_says_so_in_the_singular() -> None:
    assert truncation_warning("red star", 3).startswith("the network reads 1 token per sentence")
    assert truncation_warning("a red star", 4).startswith("the network reads 2 tokens per sentence")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": 1.0}, "threshold must be"),
        ({"threshold": "high"}, "threshold must be"),
        ({"image_size": 100}, "multiple of 32"),
        ({"image_size": 64.0}, "multiple of 32"),
        ({"device": "meta"}, "cannot compute on device 'meta'"),
        ({"device": "gpu"}, "cannot compute on device 'gpu'"),
        ({"device": "cuda:99"}, "cannot compute on device 'cuda:99'"),
        ({"precision": "int8"}, "precision must be"),
    ],
)
def test_bad_settings_are_an_error(options: dict[str, Any], expected: str, model: CRIS) -> None:
    settings: dict[str, Any] = {"image_size": 64, "device": "cpu"} | options
    with pytest.raises(InputError, match=expected):
        Segmenter(model, **settings)


# -- Loading


def test_load_reads_a_folder_its_safetensors_and_a_file_of_the_authors_code(
    model: CRIS, segmenter: Segmenter, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(model.config, model.state_dict(), 64, 0.4, "random")
    write_folder(checkpoint, tmp_path / "net")
    expected = segmenter(photo(), "star")[0].probability
    for source in (tmp_path / "net", str(tmp_path / "net/model.safetensors")):
        loaded = crislit.load(source, device="cpu")
        assert isinstance(loaded, crislit.Segmenter)
        assert isinstance(loaded.model, CRIS)
        assert (loaded.image_size, loaded.threshold, loaded.model.training) == (64, 0.4, False)
        np.testing.assert_allclose(loaded(photo(), "star")[0].probability, expected, atol=1e-6)
    assert crislit.load(tmp_path / "net", device="cpu", threshold=0.5).threshold == 0.5
    state = to_released(model.state_dict())
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "cris.pth")
    released = crislit.load(tmp_path / "cris.pth", device="cpu", max_words=22)
    assert (released.image_size, released.threshold, released.model.max_tokens) == (416, 0.35, 22)


def test_a_name_that_is_neither_a_file_nor_shipped_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "no network 'shapes-huge': neither a file here nor one of the shipped"
    with pytest.raises(InputError, match=message):
        crislit.load("shapes-huge")
    with pytest.raises(InputError, match=r"no checkpoint at .*nowhere\.ckpt"):
        crislit.load("runs/nowhere.ckpt")


def test_a_bad_image_or_sentence_is_an_error(segmenter: Segmenter) -> None:
    with pytest.raises(InputError, match=r"expected an image: a path, .* or an array, got"):
        segmenter(None, "star")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no image at nowhere"):
        segmenter("nowhere.jpg", "star")
    for sentences in (None, 5, b"star"):
        with pytest.raises(InputError, match="expected a sentence or a list of them, got"):
            segmenter(photo(), sentences)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a sentence is empty"):
        segmenter(photo(), "&nbsp;")


def test_a_numpy_number_is_a_threshold(model: CRIS) -> None:
    threshold: Any = np.float32(0.25)
    segmenter = Segmenter(model, image_size=64, threshold=threshold, device="cpu")
    assert segmenter.threshold == 0.25
