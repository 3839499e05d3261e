"""Masks from sentences, for those who know neither Lightning nor Hydra."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from crislit.card import model_card
from crislit.checkpoint import CONFIG, WEIGHTS, Checkpoint, read_any, refuse_existing, write_folder, write_whole
from crislit.data.letterbox import Image, letterbox_image, normalise, restore, upsample_probabilities
from crislit.data.tokenizer import cut_words, tokenize
from crislit.errors import InputError
from crislit.models.cris import CRIS
from crislit.onnx_network import CONFIG as EXPORTED
from crislit.onnx_network import OnnxNetwork
from crislit.picture import Picture, open_picture

Precision = Literal["auto", "float32", "float16", "bfloat16"]

AT_ONCE = 32
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
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise InputError(f"threshold must be a number in [0, 1), got {threshold!r}")
        if image_size < 32 or image_size % 32:
            raise InputError(f"image_size must be a multiple of 32, got {image_size!r}")
        if precision not in ("auto", "float32", "float16", "bfloat16"):
            raise InputError(f"precision must be auto, float32, float16 or bfloat16, got {precision!r}")
        if isinstance(model, OnnxNetwork):
            if device not in (None, "cpu") or precision not in ("auto", "float32"):
                raise InputError(f"an exported network computes on the CPU in float32, not on {device} in {precision}")
            device = "cpu"
        self.device = choose_device(device)
        if precision == "auto":
            precision = "float16" if self.device.type == "cuda" else "float32"
        self.precision = precision
        if isinstance(model, CRIS):
            model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        settings = model.settings if isinstance(model, CRIS) else {}
        self.model = model
        self.about = about or Checkpoint(settings, {}, image_size, threshold, "unknown")
        self.image_size, self.threshold = image_size, threshold

    def __call__(self, image: Picture, sentences: str | Sequence[str]) -> list[Segmentation]:
        """Mark what each sentence means in one picture, which is encoded once.

        Args:
            image: A picture of any kind; transparency is laid over white.
            sentences: One or several.

        Returns:
            One result a sentence, in their order.

        Raises:
            InputError: If the picture cannot be read or is smaller than 8 pixels, or a sentence is empty.
        """
        return self.batch([image], [[sentences] if isinstance(sentences, str) else sentences])[0]

    def batch(self, images: Sequence[Picture], sentences: Sequence[Sequence[str]]) -> list[list[Segmentation]]:
        """Do the same for several pictures, each with its own sentences.

        Raises:
            InputError: See :meth:`__call__`; or if there are not as many lists of sentences as pictures.
        """
        if len(images) != len(sentences):
            raise InputError(f"expected a list of sentences for each of {len(images)} pictures, got {len(sentences)} lists")
        for said in sentences:
            self._check(said)
        found: list[list[Segmentation]] = []
        for numbers in portions([len(said) for said in sentences], AT_ONCE):
            pictures = [open_picture(images[i]) for i in numbers]
            asked = [list(sentences[i]) for i in numbers]
            found += self._segment(pictures, asked)
        return found

    @torch.inference_mode()
    def _segment(self, pictures: list[Image], sentences: list[list[str]]) -> list[list[Segmentation]]:
        found: list[list[Segmentation]] = [[] for _ in pictures]
        said = [(i, sentence) for i, own in enumerate(sentences) for sentence in own]
        if not said:
            return found
        squares = torch.stack([normalise(letterbox_image(picture, self.image_size)) for picture in pictures])
        with self._autocast():
            maps = self.model.encode_images(squares.to(self.device, memory_format=torch.channels_last))
        for start in range(0, len(said), AT_ONCE):
            part = said[start : start + AT_ONCE]
            owners = torch.tensor([i for i, _ in part], device=self.device)
            tokens = tokenize([sentence for _, sentence in part], self.model.max_words).to(self.device)
            with self._autocast():
                logits = self.model.ground(maps, tokens, owners)
            for (i, sentence), square in zip(part, self._probabilities(logits), strict=True):
                found[i].append(self._cut(sentence, restore(square, *pictures[i].shape[:2])))
        return found

    def _probabilities(self, logits: Tensor) -> npt.NDArray[np.float32]:
        squares: npt.NDArray[np.float32] = upsample_probabilities(logits, self.image_size).cpu().numpy()
        return squares

    def _cut(self, sentence: str, probability: npt.NDArray[np.float32]) -> Segmentation:
        mask = probability > self.threshold
        probability = probability.clip(0, 1)  # bicubic steps overshoot
        score = float(probability[mask].mean()) if mask.any() else 0.0
        return Segmentation(sentence, mask, probability, score)

    # -- Sharing

    def save_pretrained(self, folder: str | os.PathLike[str], name: str | None = None) -> None:
        """Write the network for others: ``model.safetensors``, ``config.json`` and a model card, ``README.md``.

        Args:
            folder: Where to; paths of this machine are left out of what is written.
            name: How the card calls the network; None: as the folder.

        Raises:
            InputError: If one of the files exists, or cannot be written.
        """
        if not isinstance(self.model, CRIS):
            raise InputError("an exported network cannot be shared so: share the network that it was exported from")
        target = Path(folder)
        weights = {key: value.cpu() for key, value in self.model.state_dict().items()}
        about = replace(
            self.about, config=without_paths(self.about.config), initial_weights=last_part(self.about.initial_weights)
        )
        checkpoint = replace(about, weights=weights, threshold=self.threshold)
        card = target / "README.md"
        refuse_existing(card)
        write_folder(checkpoint, target)
        text = model_card(checkpoint, name or target.resolve().name)
        write_whole(card, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None, **options: Any) -> "Segmenter":
        """Load a shared network.

        Args:
            source: A folder of :meth:`save_pretrained`, or a repository of the Hugging Face Hub (``user/name``).
            revision: Branch, tag or commit of the repository.
            options: ``device``, ``precision``, ``threshold`` as in :func:`load`.

        Raises:
            InputError: If there is none, or it is out of reach.
        """
        if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            return load(source, **options)
        try:
            files = [hf_hub_download(str(source), name, revision=revision) for name in (WEIGHTS, CONFIG)]
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"no network at {source}: neither a folder here nor within reach on the Hub ({reason})") from error
        return load(files[0], **options)

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish the network on the Hugging Face Hub, in a repository that is made if there is none; return its address.

        Args:
            repository: ``user/name``.
            private: Whether a new repository is visible to its owner alone.
            token: Write access; None: what ``hf auth login`` left.

        Raises:
            InputError: If the Hub is out of reach or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "network", name=repository)
            try:
                api = HfApi(token=token)
                address = api.create_repo(repository, private=private, exist_ok=True)
                api.upload_folder(repo_id=repository, folder_path=Path(folder) / "network", commit_message="Upload by crislit")
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise InputError(f"cannot publish {repository}: {reason}. `hf auth login` gives write access") from error
        return str(address)

    # -- Inside

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def _check(self, sentences: Sequence[str]) -> None:
        if isinstance(sentences, str):
            raise InputError(f"expected a list of sentences for each picture, got one string: write [{sentences!r}]")
        for sentence in sentences:
            if not isinstance(sentence, str):
                raise InputError(f"a sentence must be a string, got {sentence!r}")
            if not sentence.strip():
                raise InputError("a sentence is empty: say what is to be marked, for example 'the man in red'")
            if cut := cut_words(sentence, self.model.max_words):
                warnings.warn(
                    f"the network reads {self.model.max_words - 2} tokens of a sentence, and {sentence!r} has more: "
                    f"not read is {cut!r}",
                    stacklevel=4,
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
    exported = (Path(source) / EXPORTED).is_file()
    if backend == "onnx" and not exported:
        raise InputError(f"{source} is no exported network; `python -m crislit.export {source} DIR` makes one")
    if exported:
        if backend == "torch":
            raise InputError(f"{source} is an exported network, which ONNX Runtime computes: backend='onnx', or its origin")
        network = OnnxNetwork(Path(source))
        threshold = network.threshold if threshold is None else threshold
        return Segmenter(network, image_size=network.image_size, threshold=threshold, device=device, precision=precision)
    checkpoint = read_any(Path(source), max_words)
    return Segmenter(
        checkpoint.build(),
        image_size=checkpoint.image_size,
        threshold=checkpoint.threshold if threshold is None else threshold,
        device=device,
        precision=precision,
        about=replace(checkpoint, weights={}),
    )


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration without what names places on the machine it ran on."""
    kept = {key: value for key, value in config.items() if key not in ("data_root", "resume", "record")}
    for group, names in (("model", ["clip_weights"]), ("dataset", ["file", "sentences", "images"])):
        if group in kept:
            named = {name: last_part(kept[group][name]) for name in names if kept[group].get(name)}
            kept[group] = kept[group] | named
    return kept


def last_part(text: str) -> str:
    """Return what stands after the folders of a path, and the text itself where it is none."""
    return re.split(r"[/\\]", text)[-1]


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name, or the best there is.

    Raises:
        InputError: If the machine has none of this name.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(f"this machine cannot compute on device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def portions(counts: Sequence[int], most: int) -> Iterator[list[int]]:
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
