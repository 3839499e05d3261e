"""Segmenter: masks from sentences, without Lightning or Hydra."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import HfApi, snapshot_download

from crislit.checkpoints import CONFIG, WEIGHTS, Checkpoint, read_any, write_folder
from crislit.errors import InputError, check_integer, counted, first_line, require, see
from crislit.inference.description import describe_network
from crislit.inference.forks import check_process, prepare_forked_process
from crislit.inference.model_card import model_card
from crislit.inference.onnx_network import EXPORT_CONFIG, OnnxNetwork
from crislit.inference.segmentation import Segmentation, shorten
from crislit.io import Image, ImageSource, open_image
from crislit.models import (
    CRIS,
    check_compiler,
    check_max_tokens,
    compile_for_inference,
    optimize_for_inference,
)
from crislit.transforms import (
    has_words,
    letterbox_image,
    normalize,
    probability_maps,
    split_at_limit,
    stack_images,
    tokenize,
)

Precision = Literal["auto", "float32", "float16", "bfloat16"]

SENTENCE_BATCH = 32
"""Sentences per forward pass, so that any number of them fits in memory."""


class Segmenter:
    """Predicts masks from images and sentences. Several threads may share one.

    On a CPU, processes that are forked after it was created may use it, too. They compute with one
    thread each, because the threads of PyTorch and OpenCV do not survive a fork. On a GPU, and for
    several threads per process, start processes with ``multiprocessing.get_context("spawn")`` and
    load the network in each of them.

    Args:
        model: The network, which is put into evaluation mode, or an exported one, which runs on the
            CPU in float32.
        image_size: S, side of its square input in pixels.
        threshold: Probability above which a pixel belongs to the mask, in [0, 1).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None for a GPU if there is one.
        precision: ``auto`` is float16 on CUDA and float32 elsewhere.
        compile: Whether ``torch.compile`` compiles the network. The first images then take a minute
            or more, and later ones less time. Not for an exported network.
        about: The network's training, stored with it when it is shared.

    Raises:
        InputError: If the machine has no such device or cannot compile for it, or a value is out of
            its range.
    """

    def __init__(
        self,
        model: CRIS | OnnxNetwork,
        *,
        image_size: int,
        threshold: float = 0.35,
        device: str | None = None,
        precision: Precision = "auto",
        compile: bool = False,
        about: Checkpoint | None = None,
    ) -> None:
        require(
            isinstance(threshold, (int, float, np.number)) and 0 <= threshold < 1,
            f"threshold must be a number in [0, 1), got {threshold!r}; 35 percent is 0.35",
        )
        prepare_forked_process()
        check_integer("image_size", image_size, 32, multiple_of=32)
        require(
            precision in get_args(Precision),
            f"precision must be auto, float32, float16 or bfloat16, got {precision!r}",
        )
        if isinstance(model, OnnxNetwork):
            require(
                device in (None, "cpu") and precision in ("auto", "float32"),
                f"an exported network runs on the CPU in float32, not on {device} in {precision}"
                f"{see('onnx')}",
            )
            require(not compile, "an exported network cannot be compiled: leave compile out")
            require(
                image_size == model.image_size,
                f"this network was exported for images of {model.image_size} pixels, not of "
                f"{image_size}",
            )
            device = "cpu"
        self.device = choose_device(device)
        if precision == "auto":
            precision = "float16" if self.device.type == "cuda" else "float32"
        self.precision, self.about, self._process = precision, about, os.getpid()
        self.image_size, self.threshold = image_size, float(threshold)
        self.model = self.network = model
        if isinstance(model, CRIS):
            self.network = optimize_for_inference(
                model.to(self.device).to(memory_format=torch.channels_last).eval()
            )
        self._is_compiled = compile
        if compile:
            check_compiler(self.device)
            for name in ("encode_images", "ground"):
                compiled = compile_for_inference(getattr(self.network, name))
                setattr(self.network, name, compiled)

    def __repr__(self) -> str:
        """Return what the network is, where it computes, and its threshold, in one line."""
        network = describe_network(self, self.about.source if self.about else "")
        return (
            f"Segmenter({network}; {self.device}, {self.precision}, threshold {self.threshold:g})"
        )

    def __call__(self, image: ImageSource, sentences: str | Sequence[str]) -> list[Segmentation]:
        """Segment what each sentence refers to in one image, which is encoded once.

        Args:
            image: An image of any kind; transparent pixels are shown on white.
            sentences: One or several.

        Returns:
            One result per sentence, in their order.

        Raises:
            InputError: If the image cannot be read or has a side below 8 pixels, or a sentence is
                empty.
        """
        texts = self._validate_sentences(sentences)
        return [result for _, result in self._segment([open_image(image)], [texts])]

    def stream(self, image: ImageSource, sentences: str | Sequence[str]) -> Iterator[Segmentation]:
        """Yield the results one after another, so that any number of them fits in memory.

        Args:
            image: An image of any kind; transparent pixels are shown on white.
            sentences: One or several.

        Raises:
            InputError: See ``__call__``.
        """
        texts = self._validate_sentences(sentences)
        return (result for _, result in self._segment([open_image(image)], [texts]))

    def batch(
        self, images: Sequence[ImageSource], sentences: Sequence[Sequence[str]]
    ) -> list[list[Segmentation]]:
        """Segment several images, each with its own sentences.

        Raises:
            InputError: See ``__call__``; or if images and lists of sentences differ in number.
        """
        require(
            len(images) == len(sentences),
            f"expected as many lists of sentences as images, which is {len(images)}, got "
            f"{len(sentences)}",
        )
        if text := next((texts for texts in sentences if isinstance(texts, str)), None):
            raise InputError(
                f"expected a list of sentences for each image, got one string: write [{text!r}]"
            )
        lists = list(map(self._validate_sentences, sentences))  # map adds no frame for warnings
        results: list[list[Segmentation]] = [[] for _ in images]
        for group in group_by_sentences([len(texts) for texts in lists], SENTENCE_BATCH):
            opened = [open_image(images[i]) for i in group]
            for i, result in self._segment(opened, [lists[i] for i in group]):
                results[group[i]].append(result)
        return results

    @torch.inference_mode()
    def _segment(
        self, images: list[Image], sentences: list[list[str]]
    ) -> Iterator[tuple[int, Segmentation]]:
        pairs = [(i, sentence) for i, texts in enumerate(sentences) for sentence in texts]
        if not pairs:
            return
        check_process(self._process, self.device, self._is_compiled)
        prepare_forked_process()
        squares = stack_images([letterbox_image(image, self.image_size) for image in images])
        with self._autocast():
            maps = self.network.encode_images(normalize(squares.to(self.device)))
        for start in range(0, len(pairs), SENTENCE_BATCH):
            indices, texts = zip(*pairs[start : start + SENTENCE_BATCH], strict=True)
            tokens = tokenize(texts, self.model.max_tokens).to(self.device)
            with self._autocast():
                image_indices = torch.tensor(indices, device=self.device)
                logits = self.network.ground(maps, tokens, image_indices)
            sizes = [images[i].shape[:2] for i in indices]
            probabilities = probability_maps(logits, self.image_size, sizes)
            for i, text, probability in zip(indices, texts, probabilities, strict=True):
                yield i, replace(self._to_segmentation(text, probability), image=images[i])

    def _to_segmentation(self, sentence: str, probability: npt.NDArray[np.float32]) -> Segmentation:
        mask = probability > self.threshold
        probability = probability.clip(0, 1)  # bicubic interpolation overshoots
        score = float(probability[mask].mean()) if mask.any() else 0.0
        return Segmentation(sentence, mask, probability, score)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def _validate_sentences(self, sentences: str | Sequence[str]) -> list[str]:
        """Validate the sentences. Warnings point at the caller of the public method."""
        if not isinstance(sentences, Iterable) or isinstance(sentences, bytes):
            raise InputError(f"expected a sentence or a list of them, got {sentences!r}")
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        check_sentences(texts)
        if isinstance(self.model, CRIS):
            check_max_tokens(self.model, self.model.max_tokens)
        for text in texts:
            if message := truncation_warning(text, self.model.max_tokens):
                warnings.warn(f"{message}{see('tokens')}", stacklevel=3)
        return texts

    # -- Sharing

    def save_pretrained(
        self, folder: str | os.PathLike[str], name: str | None = None, *, license: str | None = None
    ) -> None:
        """Write the network for others: ``model.safetensors``, ``config.json``, ``README.md``.

        Args:
            folder: The folder; paths of this machine are left out of the files.
            name: The network's name in its model card; None for the folder's name.
            license: The license of the weights, as the Hub spells it (``mit``, ``cc-by-4.0``); the
                training data may restrict it. None: the card says that none is given, except for
                embedded data.

        Raises:
            InputError: If one of the files exists, or cannot be written.
        """
        if not isinstance(self.model, CRIS):
            raise InputError(
                "an exported network cannot be shared: share the one that it was exported from"
            )
        target = Path(folder).expanduser()
        require(target.suffix != ".safetensors", f"expected a folder, found {target}")
        weights = {key: value.cpu() for key, value in self.model.state_dict().items()}
        about = self.about or Checkpoint(self.model.config, {}, self.image_size, 0.35, "unknown")
        checkpoint = replace(about, weights=weights, threshold=self.threshold)
        card = model_card(checkpoint, name or target.resolve().name, license)
        write_folder(checkpoint, target, {"README.md": card})

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, **options: Any
    ) -> "Segmenter":
        """Load a shared network.

        Args:
            source: A folder of ``save_pretrained``, or a repository of the Hugging Face Hub
                (``user/name``).
            revision: Branch, tag or commit of the repository.
            options: As in ``load``: ``device``, ``precision``, ``compile``, ``threshold``,
                ``trust``.

        Raises:
            InputError: If there is none, or the Hub cannot be reached.
        """
        exists = Path(source).expanduser().exists()
        if not exists and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            try:
                source = snapshot_download(
                    str(source), revision=revision, allow_patterns=[WEIGHTS, CONFIG]
                )
            except Exception as error:  # the Hub's client raises its transport's exceptions, too
                raise InputError(
                    f"no network at {source}: it is not a folder here, and the Hub did not "
                    f"provide it ({first_line(error)})"
                ) from error
        return load(source, **options)

    def push_to_hub(
        self,
        repository: str,
        *,
        license: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Publish the network on the Hugging Face Hub; return its address.

        Args:
            repository: ``user/name``, created if it does not exist.
            license: See ``save_pretrained``.
            private: Whether a new repository is visible to its owner only.
            token: Write access; None for the one that ``hf auth login`` stored.

        Raises:
            InputError: If the Hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repository, license=license)
            try:
                api = HfApi(token=token)
                address = api.create_repo(repository, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repository, folder_path=folder, commit_message="Upload by crislit"
                )
            except Exception as error:  # the Hub's client raises its transport's exceptions, too
                raise InputError(
                    f"cannot publish {repository}: {first_line(error)}. `hf auth login` gives "
                    "write access"
                ) from error
        return str(address)


def check_sentences(sentences: Iterable[Any]) -> None:
    """Raise an ``InputError`` if a sentence is not text, or has nothing to read."""
    for sentence in sentences:
        text = shorten(repr(sentence))
        require(isinstance(sentence, str), f"a sentence must be a string, got {text}")
        require(
            has_words(sentence),
            f"a sentence is empty: say what to segment, for example 'the man in red', not {text}",
        )


def truncation_warning(sentence: str, max_tokens: int) -> str:
    """Return a warning with the text that the network does not read; empty if it reads all."""
    read, unread = split_at_limit(sentence, max_tokens)
    if not unread:
        return ""
    tokens = max_tokens - 2
    begin, end = re.split(r"\s", read)[-1], re.split(r"\s", unread)[0]
    where = f", which begins inside {shorten(begin + end, 80)!r}" if begin and end else ""
    return (
        f"the network reads {counted(tokens, 'token')} per sentence, and {shorten(sentence)!r} has "
        f"more: not read is {shorten(unread.lstrip())!r}{where}"
    )


def load(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Precision = "auto",
    compile: bool = False,
    threshold: float | None = None,
    max_words: int | None = None,
    backend: Literal["auto", "torch", "onnx"] = "auto",
    trust: Sequence[str] = (),
) -> Segmenter:
    """Load a network for prediction.

    Args:
        source: A run's checkpoint, a folder or safetensors file of ``crislit.convert``, a folder of
            ``crislit.export``, a ``.pth`` of the authors' code, or the name of a shipped network.
        device: See ``Segmenter``.
        precision: See ``Segmenter``.
        compile: See ``Segmenter``.
        threshold: Probability above which a pixel belongs to the mask; None for the one of the
            network's training.
        max_words: Tokens per sentence, only for a ``.pth`` of the authors' code, which does not
            store it: 17, or 22 for G-Ref.
        backend: ``onnx`` for ONNX Runtime, which needs an exported folder; ``auto`` follows the
            source.
        trust: Packages outside crislit whose classes the network may have, ``["my_package"]``.
            Loading it runs their code.

    Raises:
        InputError: If there is no such network, it has a class of another package, or the file is
            damaged or another program's.
    """
    prepare_forked_process()  # reading checks the weights, which takes several threads
    path = Path(source).expanduser()
    is_exported = (path / EXPORT_CONFIG).is_file()
    if is_exported:
        require(
            backend != "torch",
            f"{source} is an exported network, which needs ONNX Runtime: use backend='onnx', or "
            "the network that it was exported from",
        )
        require(
            max_words is None,
            f"{source} stores max_words itself; leave it out{see('released-sizes')}",
        )
    require(
        is_exported or backend != "onnx",
        f"{source} is not an exported network; `python -m crislit.export {source} DIR` makes one",
    )
    network = OnnxNetwork(path) if is_exported else read_any(path, max_words, trust=trust)
    return Segmenter(
        network.build() if isinstance(network, Checkpoint) else network,
        image_size=network.image_size,
        threshold=network.threshold if threshold is None else threshold,
        device=device,
        precision=precision,
        compile=compile,
        about=replace(network, weights={}) if isinstance(network, Checkpoint) else None,
    )


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name, or the best one.

    Raises:
        InputError: If the machine has no such device.
    """
    if name is None:
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
        name = next((x for x, backend in backends.items() if backend.is_available()), "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"this machine cannot compute on device {name!r}: {first_line(error)}{see('no-gpu')}"
        ) from error
    return device


def group_by_sentences(counts: Sequence[int], maximum: int) -> list[list[int]]:
    """Divide images, in order, into groups of at most so many sentences, or of a single image."""
    groups: list[list[int]] = []
    room = 0
    for number, count in enumerate(max(count, 1) for count in counts):
        if count > room:
            groups.append([])
            room = maximum
        groups[-1].append(number)
        room -= count
    return groups
