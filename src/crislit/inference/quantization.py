"""Quantizes an exported network to int8."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from crislit.inference.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.io.assets import Example
from crislit.io.images import open_image
from crislit.transforms.letterbox import letterbox_image, normalise, stack_images
from crislit.transforms.tokenizer import tokenize

Feed = dict[str, npt.NDArray[Any]]
"""One set of inputs of a graph, by name."""


def quantize(source: Path, target: Path, examples: Sequence[Example]) -> None:
    """Write the two graphs of an exported network with convolutions and linear layers in int8.

    Activations are unsigned with 8 bits. Weights have 7 bits and one scale per channel, because
    processors without VNNI add pairs of products in 16 bits.

    Args:
        source: The exported network's folder.
        target: The folder of the two new graphs.
        examples: Images with sentences, for calibration.

    Raises:
        InputError: If an image cannot be read.
    """
    network = OnnxNetwork(source)
    pairs = [calibration_feeds(network, path, sentences) for path, sentences in examples]
    image_feeds, grounding_feeds = zip(*pairs, strict=True)
    for name, feeds in ((IMAGE_ENCODER, image_feeds), (GROUNDING, grounding_feeds)):
        print(f"quantizing {name}", flush=True)
        quantize_graph(source / name, target / name, feeds)


def calibration_feeds(
    network: OnnxNetwork, path: Path, sentences: Sequence[str]
) -> tuple[Feed, Feed]:
    """Return the inputs of both graphs for an image and its sentences."""
    square = normalise(stack_images([letterbox_image(open_image(path), network.image_size)]))
    tokens = tokenize(sentences, network.max_tokens)
    indices = torch.zeros(len(tokens), dtype=torch.long)
    names = ("v3", "v4", "v5", "tokens", "image_indices")
    inputs = (*network.encode_images(square), tokens, indices)
    grounding = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return {"images": square.numpy()}, grounding


def quantize_graph(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
    """Quantize one graph, calibrated on these inputs."""
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
                nodes_to_exclude=find_upsampling(onnx.load(prepared)),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )
        finally:
            logging.disable(logging.NOTSET)


def find_upsampling(model: Any) -> list[str]:
    """Return the nodes that multiply by a matrix of mostly zeros, which upsamples."""
    from onnx import numpy_helper

    sparse = set()
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and (numpy_helper.to_array(tensor) == 0).mean() > 0.5:
            sparse.add(tensor.name)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if sparse & set(node.input)]
