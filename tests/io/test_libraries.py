"""Errors that do not come from an image keep their type: only damage is called damage."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import PIL.Image
import pytest

from crislit.errors import InputError
from crislit.io import decode_image, libraries, open_image, read_upright_size
from crislit.io.images import image_errors
from tests.io.test_images import photo, saved

SIZE = (50, 70)
READERS: dict[str, Callable[[Path], Any]] = {
    "of a user": open_image,
    "of a data set": lambda path: decode_image(path, SIZE),
    "of custom data": read_upright_size,
}
reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(saved(PIL.Image.fromarray(photo(*SIZE)), "PNG").getvalue())
    return path


@pytest.fixture(autouse=True)
def _check_opencv_again() -> Iterator[None]:
    libraries.require_opencv.cache_clear()
    yield
    libraries.require_opencv.cache_clear()


# -- OpenCV


@pytest.mark.parametrize("version", ["4.12.0", "4.5.5.64", "3.4.18-dev", "unknown"])
@pytest.mark.parametrize("name", ["of a user", "of a data set"])
def test_another_opencv_is_an_error_that_names_both_versions(
    name: str, version: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "__version__", version)
    expected = rf"^OpenCV {version} is installed, but crislit needs version 5 .*pip install 'opencv"
    with pytest.raises(InputError, match=expected) as caught:
        READERS[name](image)
    assert "damaged" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["5.0.0", "5.1.0-dev", "12.0"])
def test_the_required_opencv_and_later_ones_are_accepted(
    version: str, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "__version__", version)
    assert open_image(image).shape == (*SIZE, 3)
    assert decode_image(image, SIZE).shape == (*SIZE, 3)


def test_the_required_version_is_the_one_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"opencv-python-headless>={libraries.OPENCV}.' in text


def test_a_function_that_opencv_lacks_is_not_called_damage(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    with pytest.raises(AttributeError, match="IMREAD_COLOR_RGB"):
        decode_image(image, SIZE)


# -- Faults and damage


FAULTS = [AttributeError, TypeError, NameError, AssertionError, ImportError, MemoryError]


@pytest.mark.parametrize("fault", FAULTS)
@reader
def test_faults_of_the_program_keep_their_type(
    read: Callable[[Path], Any],
    fault: type[Exception],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise fault("ours")

    monkeypatch.setattr("crislit.io.images._BoundedHeader.__init__", fail)
    with pytest.raises(fault, match="ours"):
        read(image)


@pytest.mark.parametrize("fault", [MemoryError, ImportError, KeyboardInterrupt])
@reader
def test_lack_of_memory_or_of_a_library_inside_pil_is_not_damage(
    read: Callable[[Path], Any],
    fault: type[BaseException],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raise_in_pil(monkeypatch, fault)
    with pytest.raises(fault):
        read(image)


@pytest.mark.parametrize(
    "error", [TypeError, AttributeError, AssertionError, SyntaxError, KeyError]
)
@reader
def test_errors_of_any_type_inside_pil_are_damage(
    read: Callable[[Path], Any],
    error: type[Exception],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged file can lead PIL to any of them."""
    raise_in_pil(monkeypatch, error)
    with pytest.raises(InputError, match=r"photo\.png is (damaged|not an image that can be read)"):
        read(image)


def raise_in_pil(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Make opening a PNG raise an error as if PIL's code did."""
    scope: dict[str, Any] = {"__name__": "PIL.PngImagePlugin", "error": error}
    exec("def fail(*arguments):\n    raise error('in PIL')", scope)
    PIL.Image.init()
    _, accept = PIL.Image.OPEN["PNG"]
    monkeypatch.setitem(PIL.Image.OPEN, "PNG", (scope["fail"], accept))


@pytest.mark.parametrize("error", [cv2.error("damaged"), ValueError("damaged")])
def test_errors_of_opencv_are_damage(
    error: Exception, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(InputError, match=r"photo\.png is damaged"):
        decode_image(image, SIZE)


# -- The system


@reader
def test_what_the_system_refuses_is_not_called_damage(
    read: Callable[[Path], Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=rf"^cannot read {image}: Permission denied$"):
        read(image)


def test_a_failing_disk_is_named_with_the_file() -> None:
    with (
        pytest.raises(InputError, match=r"^a\.png cannot be read: Input/output error$"),
        image_errors("a.png cannot be read"),
    ):
        raise OSError(5, "Input/output error")


@reader
def test_a_path_below_a_file_is_missing_and_not_damaged(
    read: Callable[[Path], Any], image: Path
) -> None:
    with pytest.raises(InputError, match=r"no image at .*below\.png|below\.png is missing"):
        read(image / "below.png")
