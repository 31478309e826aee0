"""The weights of a network beside those it started from: paired by name and shape, and how far they went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    """A weight and where it started."""

    name: str
    weight: nn.Parameter
    start: Tensor  # the source's own storage: it follows the source to any device


class Paired(NamedTuple):
    """Every weight of a network, tied ones once."""

    shared: list[Pair]
    new: list[tuple[str, nn.Parameter]]  # those of a fresh head, and those without a counterpart
    unmatched: list[tuple[str, nn.Parameter]]  # those among the new ones that are not in the head


def paired(net: nn.Module, source: nn.Module, head: nn.Module | None = None) -> Paired:
    """Pair the weights of a network with those of its source.

    Args:
        net: that learns.
        source: that it started from.
        head: a part of `net` that is fresh, though the source may have weights of its names and shapes.
    """
    # Tied weights under all their names: which one comes first may change with the head.
    start = dict(source.named_parameters(remove_duplicate=False))
    fresh = set() if head is None else {id(each) for each in head.parameters()}
    found = Paired([], [], [])
    for name, weight in net.named_parameters():
        here = start.get(name)
        if id(weight) in fresh:
            found.new.append((name, weight))
        elif here is not None and here.shape == weight.shape:
            found.shared.append(Pair(name, weight, here))
        else:
            found.new.append((name, weight))
            found.unmatched.append((name, weight))
    return found


def distances(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How far weights are from where they started: plain numbers, for reports.

    Returns:
        `total`: ‖w − w⁰‖ over all of them; `relative`: that over ‖w⁰‖, None where that is 0; `layers`:
        ‖w − w⁰‖ by the name of the module that owns them.
    """
    layers: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        layers.setdefault(pair.name.rpartition(".")[0] or pair.name, []).append(i)
    with torch.no_grad():
        moved = [_norm(_wide(each.weight) - _wide(each.start)) for each in pairs]
        began = [_norm(_wide(each.start)) for each in pairs]
    total, size = math.hypot(*moved), math.hypot(*began)
    return {
        "total": _shown(total),
        "relative": _shown(total / size) if size else None,
        "layers": {name: _shown(math.hypot(*(moved[i] for i in own))) for name, own in layers.items()},
    }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _shown(number: float) -> float:
    return float(f"{number:.6g}")
