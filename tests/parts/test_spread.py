"""How far maps vary: batch by batch as all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.parts.spread import Spread, as_in_training


def maps(*sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    scale = torch.tensor([0.5, 2.0, 30.0])[:, None, None]
    return [100 + scale * torch.randn(size, 3, 4, 5) for size in sizes]


@pytest.mark.parametrize("sizes", [(6,), (1, 7, 2)])
def test_it_is_the_root_of_the_mean_variance_of_the_channels(sizes: tuple[int, ...]) -> None:
    spread, seen = Spread(), maps(*sizes)
    for each in seen:
        spread.see(each)
    together = torch.cat(seen).double().movedim(1, 0).flatten(1)
    expected = together.var(1, unbiased=False).mean().sqrt()
    torch.testing.assert_close(spread.value, expected, rtol=1e-12, atol=0.0)


def test_a_guess_that_knows_the_means_is_off_by_one_spread() -> None:
    seen = torch.cat(maps(9)).double()
    spread = Spread()
    spread.see(seen)
    off = (seen - seen.mean((0, 2, 3), keepdim=True)) / spread.value
    assert off.square().mean().item() == pytest.approx(1, rel=1e-12)


def test_maps_that_say_nothing_keep_their_scale() -> None:
    spread = Spread()
    assert spread.value == 1
    spread.see(torch.full((2, 3, 4, 4), 7.0))
    assert spread.value == 1


def test_looking_as_in_training_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    net[1].weight.data.fill_(2.0)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    x = torch.randn(6, 3, 8, 8)
    drawn = torch.random.get_rng_state()
    with as_in_training(net), torch.no_grad():
        assert net.training and net[2].training
        assert net[1](net[0](x)).std().item() == pytest.approx(2.0, rel=0.02)  # the batch's own statistics
        net(x)
    assert not any(module.training for module in net.modules())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
