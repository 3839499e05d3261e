"""Masks from sentences, for those who know neither Lightning nor Hydra."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import HfApi, snapshot_download

from crislit.checkpoints.checkpoint import CONFIG, WEIGHTS, Checkpoint, read_any, write_folder
from crislit.errors import InputError, check_integer, first_line
from crislit.inference.model_card import model_card
from crislit.inference.onnx_network import EXPORT_CONFIG, OnnxNetwork
from crislit.io.images import Image, ImageSource, open_image
from crislit.models.cris import CRIS, check_max_tokens
from crislit.models.optimized import optimize_for_inference
from crislit.transforms.letterbox import (
    letterbox_image,
    normalise,
    probability_maps,
    stack_images,
)
from crislit.transforms.tokenizer import has_words, tokenize, truncated_words

Precision = Literal["auto", "float32", "float16", "bfloat16"]
SENTENCE_BATCH = 32
"""Sentences in one pass through the network, so that any number of them fits in memory."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a sentence means in a picture.

    Attributes:
        sentence: The sentence.
        mask: (h, w) bool at the picture's own size, upright as EXIF says.
        probability: (h, w) float32 in [0, 1].
        score: Mean probability inside the mask, 0 where it is empty.
    """

    sentence: str
    mask: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.float32]
    score: float


class Segmenter:
    """Marks what sentences mean in pictures. Several threads may use one.

    Args:
        model: The network, which is put into evaluation mode; or an exported one, which computes on the CPU in float32.
        image_size: S, side of its square input in pixels.
        threshold: Where a probability becomes a mask, in [0, 1).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; None: a GPU if there is one.
        precision: ``auto`` is float16 on CUDA and float32 elsewhere.
        about: What is known of the network's training, which goes with it when it is shared.

    Raises:
        InputError: If the machine has no such device, or a value is out of its range.
    """

    def __init__(
        self,
        model: CRIS | OnnxNetwork,
        *,
        image_size: int,
        threshold: float = 0.35,
        device: str | None = None,
        precision: Precision = "auto",
        about: Checkpoint | None = None,
    ) -> None:
        if not isinstance(threshold, (int, float, np.number)) or not 0 <= threshold < 1:
            raise InputError(f"threshold must be a number in [0, 1), got {threshold!r}")
        check_integer("image_size", image_size, 32, multiple_of=32)
        if precision not in ("auto", "float32", "float16", "bfloat16"):
            raise InputError(
                f"precision must be auto, float32, float16 or bfloat16, got {precision!r}"
            )
        if isinstance(model, OnnxNetwork):
            if device not in (None, "cpu") or precision not in ("auto", "float32"):
                raise InputError(
                    f"an exported network computes on the CPU in float32, not on {device} in {precision}"
                )
            if image_size != model.image_size:
                raise InputError(
                    f"this network was exported for pictures of {model.image_size} pixels, not of {image_size}"
                )
            device = "cpu"
        self.device = choose_device(device)
        if precision == "auto":
            precision = "float16" if self.device.type == "cuda" else "float32"
        self.precision = precision
        if isinstance(model, CRIS):
            model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.model = model
        self.network = optimize_for_inference(model) if isinstance(model, CRIS) else model
        self.about = about
        self.image_size, self.threshold = image_size, float(threshold)

    def __call__(self, image: ImageSource, sentences: str | Sequence[str]) -> list[Segmentation]:
        """Mark what each sentence means in one picture, which is encoded once.

        Args:
            image: A picture of any kind; transparency is laid over white.
            sentences: One or several.

        Returns:
            One result a sentence, in their order.

        Raises:
            InputError: If the picture cannot be read or is smaller than 8 pixels, or a sentence is empty.
        """
        said = self._checked(sentences)
        return [result for _, result in self._segment([open_image(image)], [said])]

    def stream(self, image: ImageSource, sentences: str | Sequence[str]) -> Iterator[Segmentation]:
        """Do the same, and hand each result over before the next one is made: any number of them fits in memory.

        Raises:
            InputError: See :meth:`__call__`.
        """
        said = self._checked(sentences)
        return (result for _, result in self._segment([open_image(image)], [said]))

    def batch(
        self, images: Sequence[ImageSource], sentences: Sequence[Sequence[str]]
    ) -> list[list[Segmentation]]:
        """Do the same for several pictures, each with its own sentences.

        Raises:
            InputError: See :meth:`__call__`; or if there are not as many lists of sentences as pictures.
        """
        if len(images) != len(sentences):
            raise InputError(
                f"expected a list of sentences for each of {len(images)} pictures, got {len(sentences)} lists"
            )
        if one := next((said for said in sentences if isinstance(said, str)), None):
            raise InputError(
                f"expected a list of sentences for each picture, got one string: write [{one!r}]"
            )
        lists = list(map(self._checked, sentences))
        found: list[list[Segmentation]] = [[] for _ in images]
        for numbers in group_by_sentences([len(said) for said in lists], SENTENCE_BATCH):
            pictures = [open_image(images[i]) for i in numbers]
            for i, result in self._segment(pictures, [lists[i] for i in numbers]):
                found[numbers[i]].append(result)
        return found

    @torch.inference_mode()
    def _segment(
        self, pictures: list[Image], sentences: list[list[str]]
    ) -> Iterator[tuple[int, Segmentation]]:
        said = [(i, sentence) for i, own in enumerate(sentences) for sentence in own]
        if not said:
            return
        squares = stack_images(
            [letterbox_image(picture, self.image_size) for picture in pictures]
        ).to(self.device)
        with self._autocast():
            maps = self.network.encode_images(normalise(squares))
        for start in range(0, len(said), SENTENCE_BATCH):
            part = said[start : start + SENTENCE_BATCH]
            image_indices = torch.tensor([i for i, _ in part], device=self.device)
            tokens = tokenize([sentence for _, sentence in part], self.model.max_tokens).to(
                self.device
            )
            with self._autocast():
                logits = self.network.ground(maps, tokens, image_indices)
            sizes = [pictures[i].shape[:2] for i, _ in part]
            probabilities = probability_maps(logits, self.image_size, sizes)
            for (i, sentence), probability in zip(part, probabilities, strict=True):
                yield i, self._cut(sentence, probability)

    def _cut(self, sentence: str, probability: npt.NDArray[np.float32]) -> Segmentation:
        mask = probability > self.threshold
        probability = probability.clip(0, 1)  # bicubic steps overshoot
        score = float(probability[mask].mean()) if mask.any() else 0.0
        return Segmentation(sentence, mask, probability, score)

    # -- Sharing

    def save_pretrained(
        self, folder: str | os.PathLike[str], name: str | None = None, *, licence: str | None = None
    ) -> None:
        """Write the network for others: ``model.safetensors``, ``config.json`` and a model card, ``README.md``.

        Args:
            folder: Where to; paths of this machine are left out of what is written.
            name: How the card calls the network; None: as the folder.
            licence: Under which you publish the weights, in the Hub's spelling (``mit``, ``cc-by-4.0``): the data that they
                were trained on may restrict it. None: the card says that none is given, except for embedded data.

        Raises:
            InputError: If one of the files exists, or cannot be written.
        """
        if not isinstance(self.model, CRIS):
            raise InputError(
                "an exported network cannot be shared so: share the network that it was exported from"
            )

        target = Path(folder).expanduser()
        if target.suffix == ".safetensors":
            raise InputError(f"expected a folder, found {target}")
        weights = {key: value.cpu() for key, value in self.model.state_dict().items()}
        about = self.about or Checkpoint(self.model.config, {}, self.image_size, 0.35, "unknown")
        checkpoint = replace(about, weights=weights, threshold=self.threshold)
        write_folder(
            checkpoint,
            target,
            {"README.md": model_card(checkpoint, name or target.resolve().name, licence)},
        )

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, **options: Any
    ) -> "Segmenter":
        """Load a shared network.

        Args:
            source: A folder of :meth:`save_pretrained`, or a repository of the Hugging Face Hub (``user/name``).
            revision: Branch, tag or commit of the repository.
            options: As in :func:`load`: ``device``, ``precision``, ``threshold``.

        Raises:
            InputError: If there is none, or it is out of reach.
        """
        if Path(source).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            return load(source, **options)
        try:
            folder = snapshot_download(
                str(source), revision=revision, allow_patterns=[WEIGHTS, CONFIG]
            )
        except Exception as error:  # the Hub's client lets its transport's own exceptions through
            raise InputError(
                f"no network at {source}: neither a folder here nor within reach on the Hub ({first_line(error)})"
            ) from error
        return load(folder, **options)

    def push_to_hub(
        self,
        repository: str,
        *,
        licence: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Publish the network on the Hugging Face Hub, in a repository that is made if there is none; return its address.

        Args:
            repository: ``user/name``.
            licence: See :meth:`save_pretrained`.
            private: Whether a new repository is visible to its owner alone.
            token: Write access; None: what ``hf auth login`` left.

        Raises:
            InputError: If the Hub is out of reach or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "network", name=repository, licence=licence)
            try:
                api = HfApi(token=token)
                address = api.create_repo(repository, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repository,
                    folder_path=Path(folder) / "network",
                    commit_message="Upload by crislit",
                )
            except (
                Exception
            ) as error:  # the Hub's client lets its transport's own exceptions through
                raise InputError(
                    f"cannot publish {repository}: {first_line(error)}. `hf auth login` gives write access"
                ) from error
        return str(address)

    # -- Inside

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def _checked(self, sentences: str | Sequence[str]) -> list[str]:
        """Return the sentences as a list; called by what users call, to whom the warning is."""
        if not isinstance(sentences, Iterable) or isinstance(sentences, bytes):
            raise InputError(f"expected a sentence or a list of them, got {sentences!r}")
        said = [sentences] if isinstance(sentences, str) else list(sentences)
        check_sentences(said)
        if isinstance(self.model, CRIS):
            check_max_tokens(self.model, self.model.max_tokens)
        for sentence in said:
            if told := truncation_warning(sentence, self.model.max_tokens):
                warnings.warn(told, stacklevel=3)
        return said


def check_sentences(sentences: Iterable[Any]) -> None:
    """Refuse what is no sentence.

    Raises:
        InputError: If one is no text, or leaves nothing to read.
    """
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise InputError(f"a sentence must be a string, got {shorten(repr(sentence))}")
        if not has_words(sentence):
            said = shorten(repr(sentence))
            raise InputError(
                f"a sentence is empty: say what is to be marked, for example 'the man in red', not {said}"
            )


def truncation_warning(sentence: str, max_tokens: int) -> str:
    """Say which words of a sentence the network does not read; empty if it reads all."""
    cut = truncated_words(sentence, max_tokens)
    if not cut:
        return ""
    return (
        f"the network reads {max_tokens - 2} tokens of a sentence, and {shorten(sentence)!r} has more: "
        f"not read is {shorten(cut)!r}"
    )


def load(
    source: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Precision = "auto",
    threshold: float | None = None,
    max_words: int | None = None,
    backend: Literal["auto", "torch", "onnx"] = "auto",
) -> Segmenter:
    """Load a network to use.

    Args:
        source: A run's checkpoint, a folder or safetensors file that ``crislit.convert`` wrote, a folder that
            ``crislit.export`` wrote, a ``.pth`` of the authors' code, or the name of a network that ships with the package.
        device: See :class:`Segmenter`.
        precision: See :class:`Segmenter`.
        threshold: Where a probability becomes a mask; None: what the network's own training used.
        max_words: Tokens of a sentence, for a ``.pth`` of the authors' code, which does not tell: 17, or 22 for G-Ref.
        backend: ``onnx`` for ONNX Runtime, which needs an exported folder; ``auto``: what the source is for.

    Raises:
        InputError: If there is no such network, or the file is damaged or another program's.
    """
    path = Path(source).expanduser()
    exported = (path / EXPORT_CONFIG).is_file()
    if backend == "onnx" and not exported:
        raise InputError(
            f"{source} is no exported network; `python -m crislit.export {source} DIR` makes one"
        )
    if exported:
        if backend == "torch":
            raise InputError(
                f"{source} is an exported network, which ONNX Runtime computes: backend='onnx', or its origin"
            )
        if max_words is not None:
            raise InputError(f"{source} says itself what max_words would; leave it out")
        network = OnnxNetwork(path)
        threshold = network.threshold if threshold is None else threshold
        return Segmenter(
            network,
            image_size=network.image_size,
            threshold=threshold,
            device=device,
            precision=precision,
        )
    checkpoint = read_any(path, max_words)
    return Segmenter(
        checkpoint.build(),
        image_size=checkpoint.image_size,
        threshold=checkpoint.threshold if threshold is None else threshold,
        device=device,
        precision=precision,
        about=replace(checkpoint, weights={}),
    )


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name, or the best there is.

    Raises:
        InputError: If the machine has none of this name.
    """
    if name is None:
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        raise InputError(
            f"this machine cannot compute on device {name!r}: {first_line(error)}"
        ) from error
    return device


def shorten(text: str, most: int = 200) -> str:
    """Return a text, or the beginning of a long one."""
    return text if len(text) <= most else f"{text[:most]}..."


def group_by_sentences(counts: Sequence[int], most: int) -> Iterator[list[int]]:
    """Divide pictures, in order, into groups with so many sentences at most, or of a single picture with more."""
    group: list[int] = []
    total = 0
    for number, count in enumerate(max(count, 1) for count in counts):
        if group and total + count > most:
            yield group
            group, total = [], 0
        group.append(number)
        total += count
    if group:
        yield group
