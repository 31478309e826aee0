"""How far maps vary: batch by batch as all at once."""

from __future__ import annotations

import pytest
import torch

from headstart.parts.spread import Spread


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
