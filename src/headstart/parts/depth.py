"""How far below the head each parameter lies, for rates that fall with depth."""

from __future__ import annotations

import re
from typing import Any, Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Grouped(Protocol):
    """timm's interface for layer-wise rates: patterns that sort parameter names into layers."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer name to a pattern, or to a list of (pattern, order)."""
        ...


def depths(net: nn.Module) -> dict[str, int]:
    """Layers between each parameter and the head: 0 for the head's own layer, largest for the stem.

    timm's own grouping where the network has one: stages for convolutional networks, blocks for
    transformers. Otherwise each top-level child that has parameters is a layer.
    """
    layers = _by_timm(net) if isinstance(net, Grouped) else _by_children(net)
    ids = sorted(set(layers.values()))
    top = len(ids) - 1
    return {name: top - ids.index(layer) for name, layer in layers.items()}


def _by_timm(net: Grouped) -> dict[str, int]:
    from timm.models._manipulate import group_with_matcher

    assert isinstance(net, nn.Module)
    # Convolutions that overlap: patch embeddings and pointwise ones do not, and stems have few.
    overlapping = sum(isinstance(m, nn.Conv2d) and m.kernel_size[0] > m.stride[0] for m in net.modules())
    try:
        matcher = net.group_matcher(coarse=overlapping > 4)
    except AssertionError:  # RDNet knows its blocks only
        matcher = net.group_matcher(coarse=False)
    layers: dict[str, int] = group_with_matcher(net.named_parameters(), matcher, reverse=True)
    return layers


def _by_children(net: nn.Module) -> dict[str, int]:
    order: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, _ in net.named_parameters():
        child = re.split(r"\.", name, maxsplit=1)[0]
        layers[name] = order.setdefault(child, len(order))
    return layers
