"""From one network's boundary into another network's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from headstart.parts.crossing import Crossing
from headstart.parts.segments import Boundary

MAP = Boundary("a", 4, 8, "map", (2, 3))
WIDE = Boundary("b", 6, 8, "map", (2, 3))
LAST = Boundary("c", 6, 8, "map, channels last", (2, 3))
LARGE = Boundary("d", 4, 8, "map", (4, 6))
TOKENS = Boundary("e", 4, 8, "tokens", (2, 3), prefix=1)
MORE = Boundary("f", 6, 8, "tokens", (2, 3), prefix=1)
BARE = Boundary("g", 4, 8, "tokens", (2, 3))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_equal_maps_go_across_as_they_are() -> None:
    x = torch.randn(2, 4, 2, 3)
    crossing = Crossing(MAP, MAP)
    assert crossing(x) is x
    assert count(crossing) == 0
    tokens = torch.randn(2, 7, 4)
    crossing = Crossing(TOKENS, TOKENS)
    assert crossing(tokens) is tokens  # class token included
    assert count(crossing) == 0


def test_other_channels_take_a_convolution_of_one_pixel() -> None:
    x = torch.randn(2, 4, 2, 3)
    crossing = Crossing(MAP, WIDE)
    assert count(crossing) == 4 * 6 + 6
    weight, bias = crossing.adapter.weight[:, :, 0, 0], crossing.adapter.bias
    expected = torch.einsum("bchw,dc->bdhw", x, weight) + bias[:, None, None]
    torch.testing.assert_close(crossing(x), expected)
    last = Crossing(MAP, LAST)
    last.load_state_dict(crossing.state_dict())
    torch.testing.assert_close(last(x), expected.permute(0, 2, 3, 1))
    back = Crossing(LAST, WIDE)
    assert torch.equal(back(expected.permute(0, 2, 3, 1)), expected)


def test_other_tokens_take_a_linear_map_each() -> None:
    x = torch.randn(2, 7, 4)
    crossing = Crossing(TOKENS, MORE)
    assert count(crossing) == 4 * 6 + 6
    assert not crossing.needs_prefix
    torch.testing.assert_close(crossing(x), F.linear(x, crossing.adapter.weight, crossing.adapter.bias))


def test_another_size_is_resized() -> None:
    x = torch.randn(2, 4, 2, 3)
    expected = F.interpolate(x, (4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(Crossing(MAP, LARGE)(x), expected)
    assert Crossing(LARGE, WIDE)(expected).shape == (2, 6, 2, 3)


def test_a_map_becomes_tokens_behind_class_tokens_and_back() -> None:
    x, front = torch.randn(2, 4, 2, 3), torch.randn(2, 1, 4)
    there = Crossing(MAP, TOKENS)
    assert there.needs_prefix
    kinds = [type(layer) for layer in there.adapter]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Conv2d]
    assert count(there) == 2 * (4 * 4 * 9 + 4) + 8
    tokens = there(x, front)
    assert torch.equal(tokens[:, :1], front)
    torch.testing.assert_close(tokens[:, 1:].transpose(1, 2).reshape(2, 4, 2, 3), there.adapter(x))
    back = Crossing(TOKENS, MAP)
    torch.testing.assert_close(back(tokens), back.adapter(tokens[:, 1:].transpose(1, 2).reshape(2, 4, 2, 3)))


def test_tokens_with_and_without_a_class_token() -> None:
    crossing = Crossing(TOKENS, BARE)
    assert not crossing.needs_prefix
    assert crossing(torch.randn(2, 7, 4)).shape == (2, 6, 4)
    assert Crossing(BARE, TOKENS)(torch.randn(2, 6, 4), torch.zeros(2, 1, 4)).shape == (2, 7, 4)


def test_a_single_picture_is_enough() -> None:
    assert Crossing(MAP, TOKENS)(torch.randn(1, 4, 2, 3), torch.zeros(1, 1, 4)).isfinite().all()
