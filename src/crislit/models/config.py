"""The sizes of a network, checked once. Symbols: see ``cris.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from crislit.config import BOXES, TARGET
from crislit.errors import InputError, check_integer, require

MAX_LAYERS = 100
"""Maximum for the decoder, the text encoder and each stage of the ResNet. Building a billion layers
because a checkpoint asks for them would take years."""
DECODER_SIZES = ("layers", "heads", "ffn", "dropout")
"""Keys of the configuration group ``decoder``."""


@dataclass(frozen=True)
class CRISConfig:
    """The sizes of a network.

    Attributes:
        clip: The two encoders: an open_clip model by name (``RN50-quickgelu``), or a mapping in
            open_clip's format (``embed_dim``, ``vision_cfg``, ``text_cfg``). The activation is
            always QuickGELU.
        neck: Widths (a, b, c) of the neck. b is the decoder's width D and must equal the text
            encoder's width.
        decoder_layers: n, 0 for no decoder ("Dec." of table 1).
        decoder_heads: Number of attention heads of the decoder.
        decoder_ffn: Hidden width of the decoder's feed-forward networks.
        decoder_dropout: Dropout rate of the decoder, in [0, 1).
        contrastive: Whether the text projector computes the logits ("Con." of table 1). If not, a
            convolution does, the same for all sentences.
        kernel_size: k, side of the kernel that computes the logits, odd.
        max_tokens: L, maximum number of tokens per sentence, [SOS] and [EOS] included.
            Configurations and checkpoints call it ``max_words``.
        boxes: Classes that replace crislit's, by box (``BOXES``): ``_target_``, the class's full
            name, and its arguments.

    Raises:
        InputError: If a value is out of its range.
    """

    clip: str | Mapping[str, Any]
    neck: Sequence[int] = (256, 512, 1024)
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_ffn: int = 2048
    decoder_dropout: float = 0.1
    contrastive: bool = True
    kernel_size: int = 3
    max_tokens: int = 17
    boxes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.clip, (str, Mapping)):
            raise InputError(
                "model.clip must be the name of a model or a mapping in open_clip's format, "
                f"got {self.clip!r}"
            )
        if isinstance(self.neck, str) or not isinstance(self.neck, Sequence) or len(self.neck) != 3:
            raise InputError(f"model.neck must be three widths, got {self.neck!r}")
        check_integer("decoder.layers", self.decoder_layers, 0, maximum=MAX_LAYERS)
        check_integer("decoder.heads", self.decoder_heads, 1)
        check_integer("decoder.ffn", self.decoder_ffn, 1)
        check_integer("projector.kernel_size", self.kernel_size, 1)
        require(
            self.kernel_size % 2 == 1, f"projector.kernel_size must be odd, got {self.kernel_size}"
        )
        check_integer("max_words", self.max_tokens, 3)
        require(
            isinstance(self.decoder_dropout, (int, float)) and 0 <= self.decoder_dropout < 1,
            f"decoder.dropout must be a rate in [0, 1), got {self.decoder_dropout!r}",
        )
        for width in self.neck:
            check_integer("each width of model.neck", width, 1)
        object.__setattr__(self, "neck", list(self.neck))
        require(
            isinstance(self.boxes, Mapping), f"boxes must be a mapping, got {self.boxes!r:.200}"
        )
        for box, spec in self.boxes.items():
            check_box(box, spec)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON types, as checkpoints store them."""
        values = asdict(self)
        if not values["boxes"]:  # absent before version 0.3
            del values["boxes"]
        return values | {"max_words": values.pop("max_tokens")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CRISConfig":
        """Read what ``to_dict`` returned.

        Raises:
            InputError: If a value is out of its range.
            TypeError: If a key is missing or unknown.
        """
        return cls(**{"max_tokens" if key == "max_words" else key: v for key, v in values.items()})

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> "CRISConfig":
        """Read the sizes from the configuration of a run."""
        boxes = {}
        for box in BOXES:
            spec = config.get(box) or {}
            if TARGET in spec:
                sizes = DECODER_SIZES if box == "decoder" else ()
                boxes[box] = {name: value for name, value in spec.items() if name not in sizes}
        return cls(
            clip=config["model"]["clip"],
            neck=config["model"]["neck"],
            contrastive=config["loss"]["contrastive"],
            kernel_size=config["projector"]["kernel_size"],
            max_tokens=config["dataset"]["max_words"],
            **{f"decoder_{name}": config["decoder"][name] for name in DECODER_SIZES},
            boxes=boxes,
        )

    def to_run_config(self) -> dict[str, Any]:
        """Return the part of a run's configuration that builds this network."""
        sizes = {name: getattr(self, f"decoder_{name}") for name in DECODER_SIZES}
        return {
            "model": {"clip": self.clip, "neck": self.neck},
            **{box: dict(spec) for box, spec in self.boxes.items()},
            "decoder": {**sizes, **self.boxes.get("decoder", {})},
            "loss": {"contrastive": self.contrastive},
            "projector": {"kernel_size": self.kernel_size},
        }


def check_box(box: str, spec: Any) -> None:
    """Check what describes the class that replaces a box.

    Args:
        box: The box.
        spec: ``_target_``, the class's full name, and its arguments.

    Raises:
        InputError: If there is no such box, or its arguments are not plain.
    """
    require(box in BOXES, f"{box!r:.200} is not a box of the network: {', '.join(BOXES)}")
    target = spec.get(TARGET) if isinstance(spec, Mapping) else None
    require(
        isinstance(target, str)
        and len(target) <= 200
        and "." in target
        and all(map(str.isidentifier, target.split("."))),
        f"{box}._target_ must be the full name of a class, my_package.MyClass, got {target!r:.200}",
    )
    for name, value in spec.items():
        require(
            isinstance(name, str) and is_plain(value),
            f"{box}.{name!s:.200} must be a number, text, true, false, null or a list of these",
        )


def is_plain(value: Any) -> bool:
    """Whether a value is a number, text, a truth value, None or a list of these."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))
