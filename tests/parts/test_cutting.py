"""Cutting by plain data: what is written can be read, and what does not fit is said."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

from headstart.errors import ModelError
from headstart.parts.cutting import cut, kept_of, read, written


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(144, 2)
    ).eval()


KEPT = {"0": {"out": "0-2 5"}, "1": {"out": "0-2 5"}, "3": {"in": "0-2 5"}}


@pytest.mark.parametrize("places", [[], [3], [0, 1, 2, 3, 5], [1, 4, 5, 9]])
def test_what_is_written_is_read(places: list[int]) -> None:
    assert read(written(places)) == places


def test_runs_are_short() -> None:
    assert written([0, 1, 2, 3, 5, 7, 8]) == "0-3 5 7-8"


def test_the_rows_that_stay_are_the_old_ones() -> None:
    net, smaller = small(), cut(small(), json.loads(json.dumps(KEPT)))
    rows = [0, 1, 2, 5]
    assert torch.equal(smaller[0].weight, net[0].weight[rows])
    assert torch.equal(smaller[0].bias, net[0].bias[rows])
    assert torch.equal(smaller[3].weight, net[3].weight[:, rows])
    assert smaller[1].num_features == 4 and smaller[1].running_var.shape == (4,)
    assert smaller[0].out_channels == smaller[3].in_channels == 4
    assert smaller(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    assert type(smaller[0]) is nn.Conv2d and smaller[5].weight.shape == (2, 144)


def test_it_keeps_type_flags_and_memory_apart() -> None:
    net = small().double()
    net[0].weight.requires_grad_(False)
    smaller = cut(copy.deepcopy(net), KEPT)
    assert smaller[0].weight.dtype == torch.float64
    assert not smaller[0].weight.requires_grad and smaller[3].weight.requires_grad
    assert smaller[0].weight.is_contiguous() and smaller[3].weight.is_contiguous()
    assert smaller[0].weight.untyped_storage().nbytes() == 4 * 27 * 8  # nothing of the rest is kept alive


def test_a_linear_layer_loses_rows_and_columns() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = copy.deepcopy(net)
    cut(net, {"0": {"out": "0 2"}, "1": {"in": "0 2"}})
    assert torch.equal(net[0].weight, before[0].weight[[0, 2]]) and net[0].out_features == 2
    assert torch.equal(net[1].weight, before[1].weight[:, [0, 2]]) and net[1].in_features == 2


def test_what_stays_whole_is_not_named() -> None:
    units = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, -1])}
    assert kept_of(units, {"c": torch.tensor([1, 1, 0])}, {}, torch.tensor([True, False, True])) == {
        "a": {"out": "0"},
        "c": {"in": "2"},
    }


def test_timm_is_told_how_wide_its_features_are() -> None:
    net = timm.create_model("test_resnet", num_classes=2)
    wide = net.num_features
    cut(net, {"fc": {"in": written(list(range(wide // 2)))}})
    assert net.num_features == net.fc.in_features == wide // 2


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"7": {"out": "0"}}, "no layer '7'"),
        ({"0": {"out": "0-9"}}, "'0' has not the channels"),
        ({"0": {"out": "many"}}, "no list of channels"),
        ({"2": {"out": "0"}}, "'2' is a ReLU"),
    ],
)
def test_what_does_not_fit_is_said(kept: dict[str, dict[str, str]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        cut(small(), kept)
