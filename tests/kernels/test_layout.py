"""Where the visual tokens of a sequence are found."""

import pytest
import torch

from lightning_quant.kernels.sparse_attention import Blocks, TokenLayout, find_layout


@pytest.mark.parametrize(
    ("tokens", "seen", "layout"),
    [
        (577, {"pictures": [(24, 24)], "joined": [(1, 576)]}, TokenLayout((24, 24), 1)),  # a class token
        (580, {"pictures": [(24, 24)], "joined": [(1, 3, 576)]}, TokenLayout((24, 24), 4)),  # and registers
        (64, {"pictures": [(16, 16)]}, TokenLayout((8, 8))),  # 64 is no multiple of 256, but a square
        (1300, {"pictures": [(16, 16)], "joined": [(20, 1280)]}, TokenLayout((5, 16, 16), 20)),  # frame by frame
        (150, {"pictures": [(3, 5, 8)], "joined": [(120, 30)]}, TokenLayout((3, 5, 8), 0, 30)),  # a video, text behind
        (4608, {"joined": [(512, 4096)]}, TokenLayout((64, 64), 512)),  # packed patches, no convolution
        (1000, {}, TokenLayout((1000,))),  # one row
        (1024, {"causal": True}, TokenLayout((1024,))),  # a causal sequence keeps its order
        (256, {"pictures": [(32, 32), (16, 16)]}, TokenLayout((16, 16))),  # a U-Net: the map of this level
    ],
)
def test_auto(tokens, seen, layout):
    assert find_layout(tokens, **seen) == layout
    assert layout.tokens == tokens


def test_what_the_user_says_counts():
    assert find_layout(577, (24, 24)) == TokenLayout((24, 24), 1)
    assert find_layout(150, (3, 5, 8), suffix=30) == TokenLayout((3, 5, 8), 0, 30)
    assert find_layout(150, (3, 5, 8), prefix=10) == TokenLayout((3, 5, 8), 10, 20)
    assert find_layout(150, (3, 5, 8), joined=[(120, 30)]) == TokenLayout((3, 5, 8), 0, 30)
    assert find_layout(110, prefix=4, suffix=6) == TokenLayout((10, 10), 4, 6)


@pytest.mark.parametrize(
    ("tokens", "said", "message"),
    [
        (197, {"grid": (24, 24)}, r"grid=\(24, 24\) has 576 tokens, .* does not make a sequence of 197"),
        (577, {"grid": (24, 24), "prefix": 0, "suffix": 0}, "does not make a sequence of 577"),
        (20, {"prefix": 15, "suffix": 5}, "prefix_tokens=15 and suffix_tokens=5 leave nothing of a sequence of 20"),
    ],
)
def test_what_does_not_add_up_is_refused(tokens, said, message):
    with pytest.raises(ValueError, match=message):
        find_layout(tokens, **said)


def test_the_tables_of_a_layout_cover_the_sequence():
    blocks = Blocks(TokenLayout((5, 7), prefix=2, suffix=3), block=8)
    assert blocks.count == 5
    assert torch.equal(blocks.order.sort().values, torch.arange(40))
    assert blocks.text.tolist() == [0, 1, 37, 38, 39]
    x = torch.randn(2, 3, 40, 4)
    assert torch.equal(blocks.join(x[:, :, blocks.visual], x[:, :, blocks.text]), x)
