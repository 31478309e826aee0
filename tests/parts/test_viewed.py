from __future__ import annotations

import copy

import torch
from torch import nn

from headstart.parts.frozen import Frozen, fingerprint
from headstart.parts.viewed import Viewed

OURS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ITS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def viewed() -> Viewed:
    torch.manual_seed(0)
    return Viewed(nn.Conv2d(3, 4, 3), given=OURS, own=ITS)


def prepared(
    picture: torch.Tensor, normalisation: tuple[tuple[float, ...], tuple[float, ...]]
) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=picture.dtype).view(1, 3, 1, 1) for values in normalisation)
    return (picture - mean) / std


def test_the_source_sees_what_its_own_preprocessing_would_have_shown() -> None:
    picture = torch.rand(2, 3, 8, 8)
    seen = viewed().view(prepared(picture, OURS))
    torch.testing.assert_close(seen, prepared(picture, ITS), rtol=1e-5, atol=1e-5)


def test_the_same_normalisation_changes_no_bit() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Viewed(nn.Identity(), given=ITS, own=ITS).view(x), x)


def test_frozen_shows_the_network_inside_and_still_views() -> None:
    net = viewed()
    frozen = Frozen(net)
    x = torch.randn(2, 3, 8, 8)
    assert isinstance(frozen.net, nn.Conv2d)
    assert torch.equal(frozen.net(frozen.view(x)), frozen(x))
    assert torch.equal(frozen(x), net(x))
    assert frozen.fingerprint == fingerprint(net.net)  # however its pictures come
    assert not frozen.net.weight.requires_grad


def test_a_network_given_plainly_is_not_viewed() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert Frozen(nn.Conv2d(3, 4, 3)).view(x) is x


def test_moves_with_its_owner() -> None:
    frozen = copy.deepcopy(Frozen(viewed()))
    frozen.apply(lambda tensor: tensor.double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert frozen.view(x).dtype == torch.float64
    assert frozen(x).dtype == torch.float64
