"""The authors' released network: its parameters' names and ours, its sizes as its weights tell them, and its files."""

import logging
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crislit.errors import InputError
from crislit.models.cris import CRIS, build_cris
from crislit.pickles import rehearse_torch, told

log = logging.getLogger(__name__)

PREFIXES = (  # released, ours; the first that fits counts, either way
    ("backbone.visual.attnpool.connect.", "image_encoder.pool.shortcut."),
    ("backbone.visual.attnpool.", "image_encoder.pool."),
    ("backbone.visual.", "image_encoder.resnet."),
    ("backbone.", "text_encoder."),
    ("neck.txt_proj.", "neck.project_sentence."),
    ("neck.f1_v_proj.", "neck.project_c5."),
    ("neck.norm_layer.", "neck.normalise_product."),
    ("neck.f2_v_proj.", "neck.project_c4."),
    ("neck.f2_cat.", "neck.fuse_f4."),
    ("neck.f3_v_proj.", "neck.project_c3."),
    ("neck.f3_cat.", "neck.fuse_f3."),
    ("neck.f4_proj3.", "neck.smooth_f3."),
    ("neck.f4_proj4.", "neck.smooth_f4."),
    ("neck.f4_proj5.", "neck.smooth_f5."),
    ("neck.aggr.", "neck.aggregate."),
    ("neck.coordconv.0.conv1.", "neck.locate."),
    ("neck.coordconv.1.", "neck.refine."),
    ("decoder.", "decoder."),
    ("proj.vis.", "image_projector."),
    ("proj.txt.", "head.linear."),
)
INNER = (  # within a decoder layer
    (".norm1.", ".self_norm_in."),
    (".norm2.", ".cross_norm_in."),
    (".norm3.", ".ffn_norm_in."),
    (".self_attn.", ".self_attention."),
    (".self_attn_norm.", ".self_norm_out."),
    (".multihead_attn.", ".cross_attention."),
    (".cross_attn_norm.", ".cross_norm_out."),
)
NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
NUMBERS |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
"""Of weights, and of counters and what else lies beside them."""
NUMPY_SCALARS: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?"))]
NUMPY_SCALARS += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
"""What a checkpoint may hold beside tensors, such as the best IoU so far: building them runs no code."""

LOGIT_SCALE = "backbone.logit_scale"
"""CLIP's temperature: in every released checkpoint, and used by nothing."""


# -- Names ------------------------------------------------------------------------------------------------------------------


def rename_released(name: str) -> str:
    """Return our name of a released parameter or buffer.

    Raises:
        KeyError: If it belongs to no part of the released network.
    """
    return _rename(name, PREFIXES, INNER, "the released CRIS network")


def rename_ours(name: str) -> str:
    """Return the released name of a parameter or buffer of ours.

    Raises:
        KeyError: If the released network has no such part (table 1's rows without "Con.").
    """
    return _rename(name, [(ours, theirs) for theirs, ours in PREFIXES], [(ours, theirs) for theirs, ours in INNER], "CRIS")


def _rename(name: str, prefixes: Sequence[tuple[str, str]], inner: Sequence[tuple[str, str]], network: str) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            if new == "decoder.":
                for theirs, ours in inner:
                    name = name.replace(theirs, ours)
            return name
    raise KeyError(f"{name!r} is no parameter of {network}")


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict's entries to ours."""
    return {rename_released(name): value for name, value in state.items()}


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict's entries to the released ones.

    Raises:
        InputError: If the network has a part that was never released.
    """
    try:
        return {rename_ours(name): value for name, value in state.items()}
    except KeyError as error:
        raise InputError(f"the released format cannot hold this network: {error.args[0]}") from error


# -- Files ------------------------------------------------------------------------------------------------------------------


def load_released(path: str | Path, max_words: int, decoder_heads: int = 8, decoder_dropout: float = 0.1) -> CRIS:
    """Load a checkpoint of the authors' code, all sizes read off its weights.

    Args:
        path: ``.pth`` or ``.pt`` (weights alone or under ``state_dict``, parallel training's ``module.`` before the names or
            not) or ``.safetensors``. Reading it runs no code.
        max_words: L, tokens of the sentences it was trained on: 17 for RefCOCO and RefCOCO+, 22 for G-Ref (section 4.2).
        decoder_heads: What no weight tells; 8 in everything released. The encoders' heads follow CLIP's rule, 64 channels each.
        decoder_dropout: What no weight tells either; it matters in training only.

    Returns:
        The network in evaluation mode, float32.

    Raises:
        InputError: If there is no such file, or it does not hold exactly the released network's parameters; the message names
            those that are missing, unexpected, or of another shape.
    """
    settings, weights = read_released(Path(path), max_words, decoder_heads)
    check_finite(weights, str(path))
    model = build_cris(**(settings | {"decoder_dropout": decoder_dropout}))
    model.load_state_dict(weights)
    return model.eval()


def read_released(path: Path, max_words: int | None, decoder_heads: int = 8) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`load_released` loads: arguments of :func:`crislit.models.cris.build_cris`, and weights by our names."""
    state = read_weights(path.expanduser())
    if any(name.removeprefix("model.").startswith("image_encoder.") for name in state):
        raise InputError(f"{path} is crislit's own, not of the authors' code: `python -m crislit.convert` and evaluate read it")
    settings = released_settings(state, str(path), max_words, decoder_heads)
    if LOGIT_SCALE not in state:
        log.warning("%s lacks %s; nothing uses it, and CLIP's initial value stands in", path, LOGIT_SCALE)
        state[LOGIT_SCALE] = torch.tensor(math.log(1 / 0.07))
    return settings, from_released(state)


def released_settings(
    state: Mapping[str, Tensor], source: str, max_words: int | None, decoder_heads: int = 8
) -> dict[str, Any]:
    """Return what :func:`crislit.models.cris.build_cris` needs to build the network that a released state dict belongs to.

    Args:
        state: Weights under their released names.
        source: What an error shall call them.
        max_words: See :func:`load_released`; None takes RefCOCO's 17, or the context where that is shorter.
        decoder_heads: Attention heads of the decoder.

    Raises:
        InputError: If the weights are not exactly those of such a network.
    """
    needed = {
        "a": "neck.f3_v_proj.0.weight",
        "b": "neck.f2_v_proj.0.weight",
        "c": "neck.txt_proj.0.weight",
        "z_v": "proj.vis.4.weight",
        "z_t": "proj.txt.weight",
    }
    layers = count_blocks(state, "decoder.layers.")
    if layers:
        needed["ffn"] = "decoder.layers.0.ffn.0.weight"
    if any(key not in state for key in (*needed.values(), *clip_needed("backbone.").values())):
        check_parts(state, source)  # names everything that is missing, not only what tells a size
    clip = clip_sizes(state, source, "backbone.")
    size = {name: shape[0] for name, shape in _shapes(state, needed, source).items()}
    kernel_size = round((max(size["z_t"] - 1, 0) / max(size["z_v"], 1)) ** 0.5)
    settings: dict[str, Any] = {
        "clip": clip,
        "neck": [size["a"], size["b"], size["c"]],
        "decoder_layers": layers,
        "decoder_heads": decoder_heads,
        "kernel_size": kernel_size,
        "max_words": min(17, clip["text_cfg"]["context_length"]) if max_words is None else max_words,
    }
    if layers:
        settings["decoder_ffn"] = size["ffn"]
    try:
        with torch.device("meta"):  # shapes alone
            model = build_cris(**settings)
            expected = to_released(model.state_dict())
    except InputError as error:
        told = ", ".join(f"{key} ({_shape(state[key])})" for key in (*needed.values(), *clip_needed("backbone.").values()))
        raise InputError(f"{source} is not the released CRIS network: {error}; such sizes are read off {told}") from error
    if LOGIT_SCALE not in state:
        del expected[LOGIT_SCALE]
    check_names(state, expected, f"{source} is not the released CRIS network")
    return model.settings


def check_parts(state: Mapping[str, Tensor], source: str) -> None:
    """Compare the names alone of a released state dict with those of a network of as many blocks, whatever their sizes.

    Raises:
        InputError: Naming what is missing or unexpected.
    """
    if "backbone.visual.class_embedding" in state:
        raise InputError(f"{source} holds a CLIP with a vision transformer; CRIS needs one with a ResNet, such as RN50")
    stages = [max(count_blocks(state, f"backbone.visual.layer{stage}."), 1) for stage in (1, 2, 3, 4)]
    texts = max(count_blocks(state, "backbone.transformer.resblocks."), 1)
    with torch.device("meta"):
        smallest = build_cris(
            clip={
                "embed_dim": 1,
                "vision_cfg": {"layers": stages, "width": 2, "image_size": 32},
                "text_cfg": {"context_length": 3, "vocab_size": 1, "width": 4, "heads": 1, "layers": texts},
            },
            neck=(1, 4, 1),
            decoder_layers=count_blocks(state, "decoder.layers."),
            decoder_heads=1,
            decoder_ffn=1,
            max_words=3,
        )
        names = to_released(smallest.state_dict())
    if LOGIT_SCALE not in state:
        del names[LOGIT_SCALE]
    expected = {name: state.get(name, value) for name, value in names.items()}  # of whatever shapes
    check_names(state, expected, f"{source} is not the released CRIS network")


def clip_needed(prefix: str) -> dict[str, str]:
    """Return which of CLIP's weights tell its sizes."""
    needed = {
        "stem": "visual.layer1.0.conv1.weight",
        "joint": "visual.attnpool.c_proj.weight",
        "grid": "visual.attnpool.positional_embedding",
        "context": "positional_embedding",
        "words": "token_embedding.weight",
    }
    return {name: prefix + key for name, key in needed.items()}


def clip_sizes(state: Mapping[str, Tensor], source: str, prefix: str = "") -> dict[str, Any]:
    """Read CLIP's sizes off its weights, under OpenAI's names after a prefix, as a mapping in open_clip's format.

    Raises:
        InputError: If they are no CLIP with a ResNet, or lack what tells a size.
    """
    if f"{prefix}visual.class_embedding" in state:
        raise InputError(f"{source} holds a CLIP with a vision transformer; CRIS needs one with a ResNet, such as RN50")
    shapes = _shapes(state, clip_needed(prefix), source)
    if any(len(shapes[name]) < 2 for name in ("context", "words")):
        raise InputError(f"{source} is damaged: its embeddings have no width")
    width = shapes["words"][1]
    return {
        "embed_dim": shapes["joint"][0],
        "vision_cfg": {
            "layers": [max(count_blocks(state, f"{prefix}visual.layer{stage}."), 1) for stage in (1, 2, 3, 4)],
            "width": shapes["stem"][0],
            "image_size": 32 * round((shapes["grid"][0] - 1) ** 0.5),
        },
        "text_cfg": {
            "context_length": shapes["context"][0],
            "vocab_size": shapes["words"][0],
            "width": width,
            "heads": max(width // 64, 1),  # CLIP's rule
            "layers": max(count_blocks(state, f"{prefix}transformer.resblocks."), 1),  # CLIP has no fewer
        },
    }


def count_blocks(state: Mapping[str, Any], prefix: str) -> int:
    """Return how many numbered blocks there are under a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def check_names(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str) -> None:
    """Compare a state dict with the expected one.

    Raises:
        InputError: Naming what is missing, unexpected, or of another shape.
    """
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} ({_shape(found[name])} instead of {_shape(value)})"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
        "of another kind": [
            f"{name} ({found[name].dtype} instead of {value.dtype})"
            for name, value in expected.items()
            if name in found and value.is_floating_point() and not found[name].is_floating_point()
        ],
    }
    told = [f"{what} {_list(names)}" for what, names in differences.items() if names]
    if told:
        raise InputError(f"{complaint}: {'; '.join(told)}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file of safetensors or of PyTorch; nothing in it can run code.

    What stands under ``state_dict`` is taken, and parallel training's ``module.`` left away.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path}: expected a .pth, .pt or .safetensors file")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict: expected tensors by name, alone or under 'state_dict'")
    check_held(state, str(path))
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def check_held(weights: Mapping[str, Any], source: str) -> None:
    """Raise an :class:`InputError` if tensors are not plain numbers, or larger than what the file holds.

    A few bytes may pose as gigabytes.
    """
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    odd = [f"{name} ({v.dtype})" for name, v in weights.items() if isinstance(v, Tensor) and not is_plain(v)]
    if odd:
        raise InputError(f"{source} holds tensors that are not the plain numbers of a network: {_list(odd)}")
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    if sum(value.numel() * value.element_size() for value in tensors) > 2 * sum(held.values()):  # tied weights are held once
        raise InputError(f"{source} is damaged: its tensors are larger than what it holds of them")


def is_plain(value: Tensor) -> bool:
    """Whether a tensor holds numbers of a usual kind, each at a place of its own."""
    special = value.is_nested or value.is_quantized or value.device.type == "meta"
    return not special and value.layout == torch.strided and value.dtype in NUMBERS


def check_finite(weights: Mapping[str, Any], source: str) -> None:
    """Raise an :class:`InputError` if weights are not finite: nothing can be computed with them."""
    odd = [n for n, v in weights.items() if isinstance(v, Tensor) and v.is_floating_point() and not torch.isfinite(v).all()]
    if odd:
        raise InputError(
            f"{source} holds numbers that are NaN or infinite: its training went wrong, or it is damaged: {_list(odd)}"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: If it is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: it is damaged, or no safetensors file ({error})") from error


def read_torch(path: Path) -> Any:
    """Read what PyTorch saved, plain containers and tensors only; weights stay on disk until they are used.

    Raises:
        InputError: If it is damaged, or would run code.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("it is compressed, which PyTorch's are not")  # and may be larger than the memory
        rehearse_torch(path, zipped)
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:  # PyTorch's text advises to run its code
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {code[1]}, and only tensors and plain containers are read" if code else "its bytes make no sense"
        if not str(error).startswith("Weights only load failed"):  # ours
            reason = told(error)
        raise InputError(f"cannot read {path}: it is damaged, or no PyTorch checkpoint ({reason})") from error
    except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read {path}: it is damaged, or no PyTorch checkpoint ({reason})") from error


def _shapes(state: Mapping[str, Tensor], needed: Mapping[str, str], source: str) -> dict[str, tuple[int, ...]]:
    missing = [key for key in needed.values() if key not in state]
    if missing:
        raise InputError(f"{source} does not hold the expected network: missing {_list(missing)}")
    flat = [key for key in needed.values() if not state[key].ndim or not state[key].numel()]
    if flat:
        raise InputError(f"{source} is damaged: {_list(flat)} should have dimensions, and none of them zero")
    return {name: tuple(state[key].shape) for name, key in needed.items()}


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"


def _list(names: Sequence[str], most: int = 20) -> str:
    told = ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:most])
    return told + (f" and {len(names) - most} more" if len(names) > most else "")
