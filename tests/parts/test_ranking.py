"""The lowest go, up to what every group keeps, until the rest is cheap enough; always the same ones."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from headstart.parts.ranking import cheapest_loss, floors, in_order, without_lowest


def test_ties_go_by_the_second_number_and_then_in_order() -> None:
    scores = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    ties = torch.tensor([2.0, 1.0, 0.0, 1.0, 3.0])
    assert in_order(scores, ties).tolist() == [1, 3, 0, 4, 2]


def test_floors_are_rounded_up_and_no_layer_goes_away() -> None:
    assert floors([5, 30, 64, 3], 0.1, 1).tolist() == [1, 3, 7, 1]
    assert floors([5, 30, 64], 0.1, 8).tolist() == [5, 8, 8]
    assert floors([5, 1], 0.0, 1).tolist() == [1, 1]


def test_the_lowest_go_subject_to_floors() -> None:
    """Against the plainest loop: take the lowest one whose group may still lose one."""
    generator = torch.Generator().manual_seed(0)
    group = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 6, 10]))
    scores = torch.rand(20, generator=generator) + group  # the first group is the lowest
    keep = torch.rand(20, generator=generator) < 0.9
    floor = torch.tensor([2, 1, 1])
    order = in_order(scores, torch.zeros(20))
    for z in range(21):
        expected = keep.clone()
        for unit in [u for u in order.tolist() if keep[u]][:z]:
            if int((expected & (group == group[unit])).sum()) > int(floor[group[unit]]):
                expected[unit] = False
        assert torch.equal(without_lowest(z, order, group, keep, floor, 1), expected), z


def test_multiples() -> None:
    group = torch.zeros(20, dtype=torch.long)
    order = torch.arange(20)
    keep = torch.ones(20, dtype=torch.bool)
    left = [int(without_lowest(z, order, group, keep, torch.tensor([8]), 8).sum()) for z in range(21)]
    assert set(left) == {20, 16, 8} and left == sorted(left, reverse=True)
    assert without_lowest(5, order, group, keep, torch.tensor([8]), 8).tolist() == [False] * 4 + [True] * 16


def test_no_more_go_than_the_goal_needs() -> None:
    price = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]).double()
    order = torch.tensor([5, 0, 1, 2, 3, 4, 6, 7])
    group, keep = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.bool)

    def cost(stays: Tensor) -> float:
        return float(price[stays].sum())

    for goal in (31, 30, 22, 20, 12, 8.5):
        left = cheapest_loss(order, group, keep, torch.tensor([1]), cost, goal)
        gone = next(z for z in itertools.count() if price[order[z:]].sum() <= goal)
        assert torch.equal(left, without_lowest(gone, order, group, keep, torch.tensor([1]), 1))
    unreachable = cheapest_loss(order, group, keep, torch.tensor([2]), cost, 0.0)
    assert unreachable.nonzero().squeeze(1).tolist() == [6, 7]


def test_what_is_cheap_enough_stays() -> None:
    keep = torch.tensor([True, False, True])
    args = (torch.arange(3), torch.zeros(3, dtype=torch.long), keep, torch.tensor([1]))
    assert torch.equal(cheapest_loss(*args, lambda stays: float(stays.sum()), 2.0), keep)
