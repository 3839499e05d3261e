"""CRIS: the boxes of the paper's figure 3, put together.

Symbols used in all files of ``models/``:

    B      sentences of a batch
    P      images of a batch; several sentences may share one image
    L      tokens per sentence, [SOS] and [EOS] included
    H, W   height and width of the input, multiples of 32
    h, w'  height and width of the fused map, H/16 and W/16
    N      cells of the fused map, h w'
    w      width of CLIP's ResNet, 64 for RN50 and RN101
    E      width of CLIP's joint embedding, 1024 for RN50 and 512 for RN101
    D      width of the decoder and of CLIP's word features, 512
    n      layers of the decoder
    k      side of the text projector's kernel
"""

import logging
from typing import Any

from torch import Tensor, nn

from crislit.errors import require
from crislit.models.config import CRISConfig
from crislit.models.decoder import Decoder
from crislit.models.image_encoder import ImageEncoder
from crislit.models.neck import Maps, Neck
from crislit.models.projector import ImageProjector
from crislit.models.text_encoder import TextEncoder, padding_mask

log = logging.getLogger(__name__)
VOCABULARY_SIZE = 49_408
"""Number of tokens of CLIP's tokenizer."""


class CRIS(nn.Module):
    """CLIP-driven referring image segmentation.

    Args:
        image_encoder: Maps images to the feature maps c3, c4 and c5.
        text_encoder: Maps sentences to word features and a sentence feature.
        neck: Fuses the feature maps with the sentence feature.
        decoder: Attends from the fused map to the words. None for the rows of table 1 without
            "Dec." (n = 0).
        image_projector: Maps the decoded map to z_v.
        head: Computes logits from z_v and the sentence feature: a ``TextProjector``, or a
            ``PixelClassifier`` for the rows of table 1 without "Con.".
            Other classes can replace neck, decoder, image projector and head (``boxes.py``).
        config: The sizes from which the network was built. Checkpoints store them.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        neck: Neck,
        decoder: Decoder | None,
        image_projector: ImageProjector,
        head: nn.Module,
        config: CRISConfig,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.neck = neck
        self.decoder = decoder
        self.image_projector = image_projector
        self.head = head
        self.config = config

    @property
    def max_tokens(self) -> int:
        """L, the sentence length that the network is meant for."""
        return self.config.max_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """The former name of ``config``, as a dictionary."""
        log.warning("CRIS.settings is now CRIS.config")
        return self.config.to_dict()

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        image_indices: Tensor | None = None,
        *,
        owners: Tensor | None = None,
    ) -> Tensor:
        """Predict the mask of the object that each sentence refers to.

        Args:
            images: (P, 3, H, W), normalized with CLIP's mean and standard deviation. Sentences that
                share an image share its encoding.
            tokens: (B, L) long, as ``crislit.tokenize`` returns them.
            image_indices: (B,) long, the index of each sentence's image. None if each image has
                B/P sentences, in the order of the images.
            owners: The former name of ``image_indices``.

        Returns:
            Logits, (B, 1, H/4, W/4), both in training and in evaluation.

        Raises:
            ValueError: If H or W is not a multiple of 32, B is not a multiple of P, or L exceeds
                the text encoder's context.
        """
        if owners is not None:
            log.warning("the argument owners is now image_indices")
            image_indices = owners
        return self.ground(self.encode_images(images), tokens, image_indices)

    def encode_images(self, images: Tensor) -> Maps:
        """Compute everything that depends on the images only.

        Args:
            images: (P, 3, H, W).

        Returns:
            The maps of ``Neck.project_maps``.

        Raises:
            ValueError: If H or W is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"image sides must be multiples of 32, got ({height}, {width})")
        return self.neck.project_maps(*self.image_encoder(images))

    def ground(self, maps: Maps, tokens: Tensor, image_indices: Tensor | None = None) -> Tensor:
        """Predict masks from encoded images: the second half of ``forward``.

        Args:
            maps: The output of ``encode_images``.
            tokens: (B, L).
            image_indices: (B,), or None.

        Returns:
            Logits, (B, 1, H/4, W/4).

        Raises:
            ValueError: If B is not a multiple of P, or L exceeds the text encoder's context.
        """
        if image_indices is None and len(tokens) % len(maps[0]):
            raise ValueError(f"cannot divide {len(tokens)} sentences over {len(maps[0])} images")
        words, sentence = self.text_encoder(tokens)  # (B, L, D), (B, E)
        fused = self.neck.fuse(maps, sentence, image_indices)  # (B, D, h, w')
        return self.decode_mask(fused, words, padding_mask(tokens), sentence)

    def decode_mask(
        self, fused: Tensor, words: Tensor, padding: Tensor, sentence: Tensor
    ) -> Tensor:
        """Decode the fused map and compute the logits.

        Args:
            fused: (B, D, h, w').
            words: (B, L, D).
            padding: (B, L) bool, True after [EOS].
            sentence: (B, E).

        Returns:
            Logits, (B, 1, H/4, W/4).
        """
        if self.decoder is not None:
            fused = self.decoder(fused, words, padding)  # (B, D, h, w')
        pixels = self.image_projector(fused)  # (B, D/2, H/4, W/4)
        logits: Tensor = self.head(pixels, sentence)  # (B, 1, H/4, W/4)
        return logits


def check_max_tokens(model: CRIS, max_tokens: int) -> None:
    """Check that a model's text encoder takes sentences of this length and all tokens of CLIP.

    Raises:
        InputError: If it cannot.
    """
    context = len(model.text_encoder.positional_embedding)
    vocabulary = model.text_encoder.token_embedding.num_embeddings
    require(
        max_tokens <= context,
        f"dataset.max_words={max_tokens} exceeds the text encoder's context of {context}",
    )
    require(
        vocabulary >= VOCABULARY_SIZE,
        f"the text encoder knows {vocabulary} tokens, expected the {VOCABULARY_SIZE} tokens of "
        "CLIP's tokenizer",
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters ("Params" of table 1)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
