"""An exported network in whole numbers: weights and activations of 8 bits, with scales from a few pictures."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crislit.data.letterbox import letterbox_image, normalise
from crislit.data.tokenizer import tokenize
from crislit.errors import InputError
from crislit.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.picture import open_picture, suffixes

EXAMPLES = Path(__file__).parent / "assets/examples"
"""Pictures that ship, each with its sentences in a text file of its name, one a line."""

Feed = dict[str, np.ndarray[Any, Any]]


def quantise(source: Path, target: Path, pictures: Path = EXAMPLES) -> None:
    """Write the two graphs of an exported network again, with convolutions and linear layers of 8 bits.

    Activations are unsigned, and weights have 7 of their bits, one scale a channel: processors without VNNI add pairs of
    products in 16 bits.

    Args:
        source: The exported network's folder.
        target: The folder of the two new graphs.
        pictures: A folder of pictures, each with its sentences in a text file of its name, one a line.

    Raises:
        InputError: If there are no such pictures.
    """
    network = OnnxNetwork(source)
    images, groundings = calibration(network, pictures)
    for name, feeds in ((IMAGE_ENCODER, images), (GROUNDING, groundings)):
        print(f"quantising {name}", flush=True)
        quantise_graph(source / name, target / name, feeds)


def calibration(network: OnnxNetwork, pictures: Path) -> tuple[list[Feed], list[Feed]]:
    """Return what both graphs are given for the pictures and their sentences."""
    images, groundings = [], []
    for path in sorted(path for path in pictures.glob("*") if path.suffix.lower() in suffixes()):
        text = path.with_suffix(".txt")
        sentences = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()] if text.is_file() else []
        if not sentences:
            continue
        square = normalise(letterbox_image(open_picture(path), network.image_size))[None]
        maps = network.encode_images(square)
        tokens = tokenize(sentences, network.max_words)
        given = (*maps, tokens, torch.zeros(len(tokens), dtype=torch.long))
        images.append({"images": square.numpy()})
        groundings.append({name: x.numpy() for name, x in zip(("v3", "v4", "v5", "tokens", "owners"), given, strict=True)})
    if not images:
        raise InputError(f"no picture with sentences in {pictures}: expected files such as a.jpg and a.txt, a sentence a line")
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
