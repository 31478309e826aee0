"""Weights beside where they started."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from headstart.parts.pairs import Pair, distances, paired


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))


def test_pairs_by_name_and_shape() -> None:
    here, source = net(), net()
    source[2] = nn.Linear(3, 5)
    found = paired(here, source)
    assert [pair.name for pair in found.shared] == ["0.weight", "0.bias"]
    assert found.shared[0].weight is here[0].weight
    assert found.shared[0].start is source[0].weight  # its own storage, which follows it anywhere
    assert [name for name, _ in found.new] == [name for name, _ in found.unmatched] == ["2.weight", "2.bias"]


def test_a_fresh_head_is_new_and_no_mismatch() -> None:
    here = net()
    found = paired(here, net(), here[2])
    assert [name for name, _ in found.new] == ["2.weight", "2.bias"]
    assert found.unmatched == []


def test_tied_weights_come_once() -> None:
    here = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    here[1].weight = here[0].weight
    assert [pair.name for pair in paired(here, copy.deepcopy(here)).shared] == [
        "0.weight",
        "0.bias",
        "1.bias",
    ]


def test_distances() -> None:
    """By hand: ‖(3, 4)‖ = 5 in one layer, ‖(0, 12)‖ in the other, 13 in all; ‖w⁰‖ = 2."""
    pairs = [
        Pair("a.weight", nn.Parameter(torch.tensor([4.0, 1.0])), torch.tensor([1.0, 1.0])),
        Pair("a.bias", nn.Parameter(torch.tensor([5.0])), torch.tensor([1.0])),
        Pair("token", nn.Parameter(torch.tensor([1.0, 12.0])), torch.tensor([1.0, 0.0])),
    ]
    shown = distances(pairs)
    assert shown == {"total": 13.0, "relative": 6.5, "layers": {"a": 5.0, "token": 12.0}}
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_distances_in_any_type(dtype: torch.dtype) -> None:
    here, source = net().to(dtype), net().to(dtype)
    assert distances(paired(here, source).shared)["total"] == 0
    with torch.no_grad():
        here[0].bias.add_(0.5)
    expected = (here[0].bias.double() - source[0].bias.double()).norm().item()
    shown = distances(paired(here, source).shared)
    assert shown["total"] == shown["layers"]["0"] == pytest.approx(expected, rel=1e-5)


def test_distances_from_zero_and_of_nothing() -> None:
    zero = [Pair("w", nn.Parameter(torch.ones(1)), torch.zeros(1))]
    assert distances(zero) == {"total": 1.0, "relative": None, "layers": {"w": 1.0}}
    assert distances([]) == {"total": 0.0, "relative": None, "layers": {}}
