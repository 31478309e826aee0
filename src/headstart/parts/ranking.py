"""Which units go: the lowest of all, in one order over the whole network, until the rest is cheap enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_order(scores: Tensor, ties: Tensor) -> Tensor:
    """Numbers of the units, lowest score first [U]; equal scores go by `ties`, then by number."""
    order = torch.argsort(ties.cpu(), stable=True)
    return order[torch.argsort(scores.cpu()[order], stable=True)]


def floors(sizes: list[int], share: float, multiple: int) -> Tensor:
    """How many units each group keeps at the least: a share of it, one in any case, rounded up."""
    counts = [max(1, -(-round(share * size * 10**6) // 10**6)) for size in sizes]
    return torch.tensor([min(size, _up(n, multiple)) for n, size in zip(counts, sizes, strict=True)])


def without_lowest(
    z: int, order: Tensor, group: Tensor, keep: Tensor, floor: Tensor, multiple: int
) -> Tensor:
    """Which units stay (bool [U]) when the z lowest of those that are left go, as far as they may.

    Args:
        z: how many.
        order: from `in_order`.
        group: of each unit.
        keep: which are left, bool [U].
        floor: units that each group keeps.
        multiple: of it each group keeps a number of units, unless it had fewer.
    """
    left = order[keep[order]]
    has = torch.bincount(group[left], minlength=len(floor))
    stay = has - torch.bincount(group[left[:z]], minlength=len(floor))
    stay = torch.minimum(has, torch.maximum((stay + multiple - 1) // multiple * multiple, floor))
    best_first = left.flip(0)
    of = group[best_first]
    by_group = torch.argsort(of, stable=True)
    starts = torch.cumsum(has, 0) - has
    rank = torch.empty_like(best_first)
    rank[by_group] = torch.arange(len(best_first)) - starts[of[by_group]]
    made = torch.zeros_like(keep)
    made[best_first[rank < stay[of]]] = True
    return made


def cheapest_loss(
    order: Tensor,
    group: Tensor,
    keep: Tensor,
    floor: Tensor,
    cost: Callable[[Tensor], float],
    goal: float,
    *,
    multiple: int = 1,
    within: int = 1,
) -> Tensor:
    """Which units stay when as few as possible of the lowest go, so that the rest costs at most `goal`.

    Args:
        order: from `in_order`.
        group: of each unit.
        keep: which are left, bool [U].
        floor: units that each group keeps, whatever its scores.
        cost: of the units that stay; it falls when more go.
        goal: what they may cost. Where that cannot be reached, all go that may.
        multiple: of it each group keeps a number of units, unless it had fewer.
        within: how exactly the number is found: for costs that are slow to measure.
    """

    def left(z: int) -> Tensor:
        return without_lowest(z, order, group, keep, floor, multiple)

    if cost(keep) <= goal:
        return keep
    low, high = 0, int(keep.sum())  # too dear, cheap enough or all there is
    while high - low > within:
        middle = (low + high) // 2
        if cost(left(middle)) <= goal:
            high = middle
        else:
            low = middle
    return left(high)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
