"""Quantizes an exported network to int8."""

import logging
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from crislit.inference.onnx_network import GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.io import Example, open_image
from crislit.transforms import letterbox_image, normalize, stack_images, tokenize

Feed = dict[str, npt.NDArray[Any]]
"""One set of inputs of a graph, by name."""


def quantize(folder: Path, examples: Sequence[Example]) -> None:
    """Replace convolutions and linear layers by int8 ones in the graphs of an exported network.

    Activations are unsigned with 8 bits. Weights have 7 bits and one scale per channel, because
    processors without VNNI add pairs of products in 16 bits.

    Args:
        folder: The exported network's folder.
        examples: Images with sentences, for calibration.

    Raises:
        InputError: If an image cannot be read.
    """
    network = OnnxNetwork(folder)
    image_feeds, grounding_feeds = zip(
        *(calibration_feeds(network, *example) for example in examples), strict=True
    )
    for name, feeds in ((IMAGE_ENCODER, image_feeds), (GROUNDING, grounding_feeds)):
        print(f"quantizing {name}", flush=True)
        quantize_graph(folder / name, feeds)


def calibration_feeds(
    network: OnnxNetwork, path: Path, sentences: Sequence[str]
) -> tuple[Feed, Feed]:
    """Return the inputs of both graphs for an image and its sentences."""
    square = normalize(stack_images([letterbox_image(open_image(path), network.image_size)]))
    tokens = tokenize(sentences, network.max_tokens)
    names = ("v3", "v4", "v5", "tokens", "image_indices")
    inputs = (*network.encode_images(square), tokens, torch.zeros(len(tokens), dtype=torch.long))
    grounding = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return {"images": square.numpy()}, grounding


def quantize_graph(path: Path, feeds: Iterable[Feed]) -> None:
    """Quantize one graph in place, calibrated on these inputs."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    remaining = iter(feeds)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feed | None:
            return next(remaining, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            prepared = Path(folder) / path.name
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
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

    sparse = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and (numpy_helper.to_array(tensor) == 0).mean() > 0.5
    }
    return [x.name for x in model.graph.node if x.op_type == "MatMul" and sparse & set(x.input)]
