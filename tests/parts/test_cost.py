"""FLOPs: counted on `meta`, by hand, and again on what was cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from headstart.parts.cost import Cost, count
from headstart.parts.coupling import find_coupling
from headstart.parts.cutting import cut
from headstart.parts.head import find_head


def by_hand(net: nn.Module, size: int) -> int:
    """Convolutions, linear layers and attention, from the maps they really make."""
    total = 0

    def look(module: nn.Module, given: Any, made: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1]
            total += 2 * made.numel() * kernel * module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            total += 2 * made.numel() * module.in_features
        else:  # queries with keys, and shares with values
            total += 4 * made.shape[1] ** 2 * module.attn_dim

    kinds = (nn.Conv2d, nn.Linear, timm.layers.Attention)
    hooks = [m.register_forward_hook(look) for m in net.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize(
    "name", ["test_resnet", "tf_efficientnet_lite0", "test_convnext", "test_vit", "regnety_002"]
)
def test_counts_are_those_by_hand_before_and_after(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **({"img_size": 32} if "vit" in name else {}))
    shape = (3, 32, 32)
    found = find_coupling(net, find_head(net), torch.zeros(1, *shape))
    cost = Cost(net, shape, found.out, found.into, found.heads)
    everything = torch.ones(found.units, dtype=torch.bool)
    assert cost.flops(everything) == cost.full == count(net, shape).total == by_hand(net, 32)
    assert cost.parameters(everything) == sum(p.numel() for p in net.parameters())
    keep = torch.rand(found.units) < 0.5
    keep[torch.cumsum(torch.tensor([0, *found.sizes[:-1]]), 0)] = True
    smaller = cut(copy.deepcopy(net), found.kept(keep))
    assert cost.flops(keep) == count(smaller, shape).total == by_hand(smaller, 32) < cost.full
    assert cost.parameters(keep) == sum(p.numel() for p in smaller.parameters())


def test_modules_add_up_and_nothing_is_computed() -> None:
    net = timm.create_model("test_vit", img_size=32)
    net.train()
    counted = count(net, (3, 32, 32))
    assert sum(counted.modules.values()) == counted.total
    assert counted.modules["blocks.0.attn"] > 0  # attention's own products
    assert net.training and next(net.parameters()).device.type == "cpu"
