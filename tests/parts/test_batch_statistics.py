"""Statistics of the batch, without moving those that are kept."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from headstart.parts.statistics import batch_statistics, uses_batch


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3), lambda: timm.layers.BatchNormAct2d(3)])
def test_normalises_by_the_batch_and_moves_nothing(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    norm, x = make(), torch.randn(4, 3, 5, 5) * 2 + 1
    plain = copy.deepcopy(norm)
    before = copy.deepcopy(norm.state_dict())
    with batch_statistics(norm):
        inside = norm(x)
    assert torch.equal(inside, plain(x))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert not torch.equal(plain.running_mean, before["running_mean"])
    assert (norm.training, norm.track_running_stats, norm.momentum) == (True, True, 0.1)


def test_eval_mode_stays_unless_always() -> None:
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 5, 5) * 2 + 1
    expected = norm(x)
    with batch_statistics(norm):
        assert torch.equal(norm(x), expected)
    with batch_statistics(norm, always=True):
        assert not torch.allclose(norm(x), expected)
        assert norm(x).mean().abs() < 1e-6
    assert torch.equal(norm(x), expected)
    assert not norm.training


def test_all_is_as_before_when_something_breaks() -> None:
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    with pytest.raises(ZeroDivisionError), batch_statistics(norm, always=True):
        raise ZeroDivisionError
    assert [each.training for each in norm] == [True, False]
    assert all(each.track_running_stats for each in norm)


def test_uses_batch() -> None:
    assert uses_batch(nn.Sequential(nn.BatchNorm2d(3)))
    assert not uses_batch(nn.Sequential(nn.BatchNorm2d(3)).eval())
    assert not uses_batch(nn.LayerNorm(3))
