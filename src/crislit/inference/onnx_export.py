"""Exports a network to ONNX, in float32 or int8."""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crislit.checkpoints.checkpoint import read_any
from crislit.errors import InputError
from crislit.inference.onnx_network import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.io.assets import Example, find_examples
from crislit.io.files import refuse_existing, text_writer, write_files
from crislit.io.images import open_image
from crislit.models.cris import CRIS
from crislit.models.optimized import optimize_for_inference
from crislit.transforms.letterbox import letterbox_image, normalise, stack_images
from crislit.transforms.tokenizer import tokenize

Feed = dict[str, np.ndarray[Any, Any]]


class ImageGraph(nn.Module):
    """What :meth:`CRIS.encode_images` does, as a module of its own."""

    def __init__(self, model: CRIS) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(P, 3, S, S) -> three maps."""
        return self.model.encode_images(images)


class GroundingGraph(nn.Module):
    """What :meth:`CRIS.ground` does, as a module of its own."""

    def __init__(self, model: CRIS) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, v3: Tensor, v4: Tensor, v5: Tensor, tokens: Tensor, image_indices: Tensor
    ) -> Tensor:
        """Three maps, (B, L), (B,) -> (B, 1, S/4, S/4)."""
        return self.model.ground((v3, v4, v5), tokens, image_indices)


def trace_graphs(
    model: CRIS, image_size: int
) -> tuple[torch.export.ExportedProgram, torch.export.ExportedProgram]:
    """Trace both graphs with ``torch.export``; the numbers of pictures and of sentences stay free, sizes do not."""
    model = optimize_for_inference(model)
    pictures, sentences = torch.export.Dim("pictures", min=1), torch.export.Dim("sentences", min=1)
    images = torch.zeros(2, 3, image_size, image_size)
    tokens = torch.zeros(3, model.max_tokens, dtype=torch.long)
    tokens[:, 2] = 1  # [EOS] is the largest
    with torch.no_grad():
        maps = model.encode_images(images)
        image_graph = torch.export.export(
            ImageGraph(model), (images,), dynamic_shapes=({0: pictures},), strict=False
        )
        given = (*maps, tokens, torch.tensor([0, 1, 1]))
        free = ({0: pictures}, {0: pictures}, {0: pictures}, {0: sentences}, {0: sentences})
        grounding = torch.export.export(
            GroundingGraph(model), given, dynamic_shapes=free, strict=False
        )
    return image_graph, grounding


def export_onnx(
    source: Path, target: Path, max_tokens: int | None = None, calibrate: Path | None = None
) -> None:
    """Write a network's two graphs and what it takes to use them.

    Args:
        source: The network.
        target: The folder.
        max_words: Tokens of a sentence, for a ``.pth`` of the authors' code.
        calibrate: A folder of pictures and sentences, see :func:`crislit.quantise.find_examples`: graphs of 8 bits are written.

    Raises:
        InputError: If the network or a picture cannot be read, a file exists, or ONNX is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError('ONNX is not installed: pip install "crislit[onnx]"') from error
    checkpoint = read_any(source, max_tokens)
    files = [target / name for name in (IMAGE_ENCODER, GROUNDING, EXPORT_CONFIG)]
    refuse_existing(*files)
    examples = find_examples(calibrate) if calibrate else []
    model = checkpoint.build()
    print("tracing the network", flush=True)
    image_graph, grounding = trace_graphs(model, checkpoint.image_size)
    about = {
        "image_size": checkpoint.image_size,
        "threshold": checkpoint.threshold,
        "max_words": model.max_tokens,
    }
    writers: dict[Path, Callable[[Path], Any]] = {
        files[0]: lambda part: save_onnx(image_graph, part, ["v3", "v4", "v5"]),
        files[1]: lambda part: save_onnx(grounding, part, ["logits"]),
        files[2]: text_writer(json.dumps(about, indent=2) + "\n"),
    }
    if not examples:
        write_files(writers)
        return
    with tempfile.TemporaryDirectory() as folder:
        exact, whole = Path(folder, "exact"), Path(folder, "whole")
        for place in (exact, whole):
            place.mkdir()
        for file, write in writers.items():
            write(exact / file.name)
        quantize(exact, whole, examples)
        shutil.copy(exact / EXPORT_CONFIG, whole)
        write_files({file: lambda part: shutil.copyfile(whole / part.name, part) for file in files})


def save_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str]) -> None:
    """Write a traced graph as one ONNX file, weights and all."""
    print(f"writing {path.name}", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        found = torch.onnx.export(program, dynamo=True, output_names=list(outputs), verbose=False)
    assert found is not None
    found.save(str(path), external_data=False)


def quantize(source: Path, target: Path, examples: Sequence[Example]) -> None:
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
    images, groundings = calibration_inputs(network, examples)
    for name, feeds in ((IMAGE_ENCODER, images), (GROUNDING, groundings)):
        print(f"quantising {name}", flush=True)
        quantize_graph(source / name, target / name, feeds)


def calibration_inputs(
    network: OnnxNetwork, examples: Sequence[Example]
) -> tuple[list[Feed], list[Feed]]:
    """Return what both graphs are given for the pictures and their sentences."""
    images, groundings = [], []
    for path, sentences in examples:
        square = normalise(stack_images([letterbox_image(open_image(path), network.image_size)]))
        maps = network.encode_images(square)
        tokens = tokenize(sentences, network.max_tokens)
        given = (*maps, tokens, torch.zeros(len(tokens), dtype=torch.long))
        images.append({"images": square.numpy()})
        groundings.append(
            {
                name: x.numpy()
                for name, x in zip(
                    ("v3", "v4", "v5", "tokens", "image_indices"), given, strict=True
                )
            }
        )
    return images, groundings


def quantize_graph(source: Path, target: Path, feeds: Iterable[Feed]) -> None:
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
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and sparse & set(node.input)
    ]
