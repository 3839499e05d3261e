"""The image encoder and its attention pooling."""

import torch
from torch import nn

from crislit.models.build import build_clip
from crislit.models.cris import CRIS
from crislit.models.image_encoder import SpatialAttentionPool
from tests.models.networks import CLIP, EMBED, random_images


def pool_of_native_size(side: int) -> SpatialAttentionPool:
    torch.manual_seed(0)
    clip = build_clip(CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"image_size": 32 * side}})
    return SpatialAttentionPool(clip.visual.attnpool)


def test_the_maps_have_the_shapes_of_the_paper(model: CRIS) -> None:
    with torch.no_grad():
        c3, c4, c5 = model.image_encoder(random_images(2, 64, 96))
    w = 16
    assert c3.shape == (2, 8 * w, 8, 12)
    assert c4.shape == (2, 16 * w, 4, 6)
    assert c5.shape == (2, EMBED, 2, 3)
    assert (c5 >= 0).all()


def test_the_pool_uses_its_positions_unchanged_at_its_native_size(model: CRIS) -> None:
    pool = model.image_encoder.pool
    assert torch.equal(pool.positions(2, 2), pool.positional_embedding[1:])


def test_the_pool_resizes_its_positions_row_by_row() -> None:
    pool = pool_of_native_size(3)
    # The class position, then a 3 x 3 grid that increases downwards.
    values = torch.tensor([5.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0])
    pool.positional_embedding = nn.Parameter(values[:, None].expand(-1, 512).clone())
    wider = pool.positions(3, 5).reshape(3, 5, 512)
    rows = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    torch.testing.assert_close(wider, rows.expand(3, 5, 512))
    larger = pool.positions(7, 4).reshape(7, 4, 512)[..., 0]
    assert (larger[1:] > larger[:-1]).all(), "still increases downwards"
    torch.testing.assert_close(larger, larger[:, :1].expand(7, 4))


def test_the_pool_does_not_use_the_class_position() -> None:
    pool = pool_of_native_size(2).eval()
    stage4 = torch.randn(1, 512, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = pool(stage4)
        pool.positional_embedding[0] = 1000
        assert torch.equal(pool(stage4), before)
        pool.positional_embedding[1] += 1
        assert not torch.equal(pool(stage4), before)


def test_the_heads_of_the_pool_have_64_channels(model: CRIS) -> None:
    assert model.image_encoder.pool.heads == 32 * 16 // 64
