"""An exported network in whole numbers: weights and activations of 8 bits, with scales from a few pictures."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crislit.data.letterbox import letterbox_image, normalise, stack_images
from crislit.data.tokenizer import tokenize
from crislit.errors import InputError
from crislit.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.picture import open_picture, suffixes

EXAMPLES = Path(__file__).parent / "assets/examples"
"""Pictures that ship, each with its sentences in a text file of its name, one a line."""

Feed = dict[str, np.ndarray[Any, Any]]


Example = tuple[Path, list[str]]
"""A picture and its sentences."""


def find_examples(pictures: Path) -> list[Example]:
    """Return the pictures of a folder that have sentences, in a text file of the same name, one a line.

    Raises:
        InputError: If there are none, or a text cannot be read.
    """
    found = []
    for path in sorted(path for path in pictures.glob("*") if path.suffix.lower() in suffixes()):
        text = path.with_suffix(".txt")
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines() if text.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the sentences in {text}: {error}") from error
        if sentences := [line.strip() for line in lines if line.strip()]:
            found.append((path, sentences))
    if not found:
        raise InputError(f"no picture with sentences in {pictures}: expected files such as a.jpg and a.txt, a sentence a line")
    return found


def quantise(source: Path, target: Path, examples: Sequence[Example]) -> None:
    """Write the two graphs of an exported network again, with convolutions and linear layers of 8 bits.

    Activations are unsigned, and weights have 7 of their bits, one scale a channel: processors without VNNI add pairs of
    products in 16 bits.

    Args:
        source: The exported network's folder.
        target: The folder of the two new graphs.
        examples: Pictures and sentences, see :func:`find_examples`.

    Raises:
        InputError: If a picture cannot be read.
    """
    network = OnnxNetwork(source)
    images, groundings = calibration(network, examples)
    for name, feeds in ((IMAGE_ENCODER, images), (GROUNDING, groundings)):
        print(f"quantising {name}", flush=True)
        quantise_graph(source / name, target / name, feeds)


def calibration(network: OnnxNetwork, examples: Sequence[Example]) -> tuple[list[Feed], list[Feed]]:
    """Return what both graphs are given for the pictures and their sentences."""
    images, groundings = [], []
    for path, sentences in examples:
        square = normalise(stack_images([letterbox_image(open_picture(path), network.image_size)]))
        maps = network.encode_images(square)
        tokens = tokenize(sentences, network.max_words)
        given = (*maps, tokens, torch.zeros(len(tokens), dtype=torch.long))
        images.append({"images": square.numpy()})
        groundings.append({name: x.numpy() for name, x in zip(("v3", "v4", "v5", "tokens", "owners"), given, strict=True)})
    return images, groundings


def quantise_graph(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
    """Quantise one graph, given some of its inputs."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds: Iterator[Feed] = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            prepared = Path(folder) / source.name
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                target,
                Reader(),
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                nodes_to_exclude=mostly_zero(onnx.load(prepared)),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logging.disable(logging.NOTSET)


def mostly_zero(model: Any) -> list[str]:
    """Return the nodes that multiply by a matrix of mostly zeros: the upsampling, which is no weight."""
    from onnx import numpy_helper

    sparse = set()
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and (numpy_helper.to_array(tensor) == 0).mean() > 0.5:
            sparse.add(tensor.name)
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and sparse & set(node.input)]
