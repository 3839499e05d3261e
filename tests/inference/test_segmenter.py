"""Masks from any image and many sentences, and clear errors for bad input."""

import io
import os
import re
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from crislit.inference.segmenter import Segmentation, Segmenter, group_by_sentences
from crislit.io.images import ImageSource, open_image
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from crislit.models.cris import CRIS
from crislit.transforms.letterbox import (
    letterbox_image,
    normalise,
    probability_maps,
    restore,
    stack_images,
)

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


def photo(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """An image of smooth random colours."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC))


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
    square = normalise(stack_images([letterbox_image(image, 64)]))
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


# -- Images of every kind


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def test_an_image_is_the_same_as_path_file_pil_image_and_array(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    image, path = photo(), tmp_path / "photo.png"
    PIL.Image.fromarray(image).save(path)
    with path.open("rb") as file:
        sources: list[ImageSource] = [path, str(path), file, PIL.Image.fromarray(image), image]
        for source in sources:
            assert np.array_equal(open_image(source), image)
    assert_same(segmenter(path, "star")[0], segmenter(image, "star")[0], atol=0)


def test_grey_images_of_8_and_16_bits_have_three_equal_channels() -> None:
    grey = photo()[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    deep = grey.astype(np.uint16) * 257
    for image in (
        grey,
        deep,
        saved(PIL.Image.fromarray(grey), "PNG"),
        saved(PIL.Image.fromarray(deep), "PNG"),
        saved(PIL.Image.fromarray(deep), "TIFF"),
        PIL.Image.fromarray(deep.astype(np.int32)),
    ):
        assert np.array_equal(open_image(image), expected)
    assert np.array_equal(open_image(deep[..., None]), expected)
    # PIL has no 16-bit colours.
    assert np.array_equal(open_image(photo().astype(np.uint16) * 257), photo())
    one_bit = open_image(PIL.Image.fromarray(grey > 128))
    assert np.array_equal(one_bit, np.where(expected > 128, 255, 0))


def test_transparency_is_shown_on_white() -> None:
    image = photo()
    alpha = np.zeros(image.shape[:2], dtype=np.uint8)
    alpha[:, :35] = 255
    rgba = np.dstack([image, alpha])
    png = saved(PIL.Image.fromarray(rgba), "PNG")
    webp = saved(PIL.Image.fromarray(rgba), "WEBP", lossless=True)
    for source in (rgba, png, webp):
        rgb = open_image(source)
        assert np.array_equal(rgb[:, :35], image[:, :35])
        assert (rgb[:, 35:] == 255).all()
    grey = PIL.Image.fromarray(np.dstack([image[..., 0], alpha]), "LA")
    assert (open_image(saved(grey, "PNG"))[:, 35:] == 255).all()


def test_a_palette_and_its_transparent_colour_are_converted() -> None:
    image = PIL.Image.fromarray(photo()).quantize(16)
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(open_image(saved(image, "PNG")), expected)
    assert np.array_equal(open_image(saved(image, "GIF")), expected)
    first = np.array(image) == 0
    rgb = open_image(saved(image, "PNG", transparency=0))
    assert (rgb[first] == 255).all()
    assert np.array_equal(rgb[~first], expected[~first])


def test_cmyk_is_converted() -> None:
    cmyk = PIL.Image.fromarray(photo()).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        rgb = open_image(saved(cmyk, kind, quality=95))
        assert abs(rgb.astype(int) - photo()).mean() < 6


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_the_exif_orientation_is_applied(
    orientation: int, upright: Callable[[np.ndarray], np.ndarray], segmenter: Segmenter
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = saved(PIL.Image.fromarray(photo()), "PNG", exif=exif)
    expected = upright(photo())
    assert np.array_equal(open_image(file), expected)
    file.seek(0)
    assert segmenter(file, "star")[0].mask.shape == expected.shape[:2]


def test_an_image_with_damaged_exif_is_read() -> None:
    file = saved(PIL.Image.fromarray(photo()), "PNG", exif=b"Exif\0\0not valid")
    with pytest.warns(UserWarning, match="its EXIF cannot be read"):
        assert np.array_equal(open_image(file), photo())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 400), (300, 9), (1000, 1500)])
def test_any_size_from_8_pixels_is_segmented(height: int, width: int, segmenter: Segmenter) -> None:
    assert segmenter(photo(height, width), "star")[0].mask.shape == (height, width)


# -- Bad input


def bomb() -> io.BytesIO:
    """A PNG that claims to have 30,000 x 30,000 pixels."""
    file = saved(PIL.Image.new("1", (8, 8)), "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return io.BytesIO(bytes(content))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.jpg", "no image at nowhere.jpg"),
        (".", "in a format that cannot be read"),
        (io.BytesIO(b""), "not an image that can be read"),
        (io.BytesIO(b"<html>not found</html>"), "not an image that can be read"),
        (bomb(), "too large"),
        (np.zeros((7, 100, 3), np.uint8), "100 x 7 pixels; both sides need at least 8"),
        (np.zeros((100, 7, 3), np.uint8), "7 x 100 pixels"),
        (np.zeros((0, 7, 3), np.uint8), "expected an image as uint8 array"),
        (np.zeros((20, 20, 3), np.float32), "got float32 of shape"),
        (np.zeros((3, 20, 20), np.uint8), "of shape"),
        (np.zeros((20, 20, 3), np.int32), "got int32"),
        (PIL.Image.new("F", (20, 20)), "no agreed range"),
        (PIL.Image.fromarray(np.full((20, 20), 70000, np.int32)), "expected 16 bits"),
    ],
)
def test_a_bad_image_is_one_clear_error(source: Any, expected: str, segmenter: Segmenter) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        segmenter(source, "star")
    assert "\n" not in str(caught.value)


class OnlyRead:
    """A stream that cannot seek."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def test_an_image_may_come_from_a_pipe() -> None:
    content = saved(PIL.Image.fromarray(photo()), "PNG").getvalue()
    assert np.array_equal(open_image(OnlyRead(content)), photo())  # type: ignore[arg-type]
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb") as other:
        threading.Thread(target=other.write, args=(content,)).start()
        threading.Timer(0.2, other.close).start()
        assert np.array_equal(open_image(pipe), photo())


def test_a_truncated_image_is_an_input_error(segmenter: Segmenter, tmp_path: Path) -> None:
    content = saved(PIL.Image.fromarray(photo(200, 300)), "JPEG").getvalue()
    for tenth in range(10):
        path = tmp_path / f"cut{tenth}.jpg"
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(InputError, match=path.name):
            segmenter(path, "star")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "JPEG2000", "GIF", "ICO", "PPM"])
def test_damaged_files_of_every_kind_are_input_errors(kind: str) -> None:
    content = saved(PIL.Image.fromarray(photo(64, 64)), kind).getvalue()
    rng, messages = np.random.default_rng(0), []
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 8):
            damaged[position] = rng.integers(256)
        try:
            image = open_image(io.BytesIO(bytes(damaged[: rng.integers(1, len(content) + 1)])))
            assert image.ndim == 3  # some damage only changes pixels
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 10
    for message in messages:
        assert re.search("is damaged|is not an image|is too large|has .* pixels", message)


def test_formats_that_start_other_programs_are_refused(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "drawn.eps")
    with pytest.raises(InputError, match="not an image that can be read"):
        open_image(tmp_path / "drawn.eps")


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
    with pytest.raises(InputError, match="a list of sentences for each of 2 images, got 1 lists"):
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
    # A word is named even if a part of it is read.
    with pytest.warns(UserWarning, match="not read is 'turquoiseish'"):
        segmenter(photo(), f"{words.removesuffix(' fifteen')} Turquoiseish")


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


def test_bytes_are_an_image_and_other_types_are_errors(segmenter: Segmenter) -> None:
    content = saved(PIL.Image.fromarray(photo()), "PNG").getvalue()
    assert_same(segmenter(content, "star")[0], segmenter(photo(), "star")[0])
    for other in (None, 7, [[1, 2]], {"a": 1}):
        with pytest.raises(InputError, match=r"expected an image: a path, .* or an array, got"):
            segmenter(other, "star")  # type: ignore[arg-type]
    for sentences in (None, 5, b"star"):
        with pytest.raises(InputError, match="expected a sentence or a list of them, got"):
            segmenter(photo(), sentences)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a sentence is empty"):
        segmenter(photo(), "&nbsp;")


def test_a_numpy_number_is_a_threshold(model: CRIS) -> None:
    threshold: Any = np.float32(0.25)
    segmenter = Segmenter(model, image_size=64, threshold=threshold, device="cpu")
    assert segmenter.threshold == 0.25


def test_16_bit_grey_that_is_almost_black_is_warned_about() -> None:
    deep = PIL.Image.fromarray(np.linspace(0, 4000, 900).reshape(30, 30).astype(np.uint16))
    with pytest.warns(UserWarning, match="reach only 4000 of 65535, which is almost black"):
        assert open_image(deep).max() == 16


def test_transparency_of_16_bit_and_of_premultiplied_grey_is_shown_on_white() -> None:
    deep = PIL.Image.fromarray(np.full((10, 10), 20_000, np.uint16))
    deep.info["transparency"] = 20_000
    assert (open_image(deep) == 255).all()
    clear = PIL.Image.new("LA", (10, 10), (0, 0)).convert("La")
    assert (open_image(clear) == 255).all()
