"""Run a network with the channels of some layers multiplied by factors; no weight and no module is touched.

A layer's output channel is multiplied by multiplying what makes it: the scale and shift of a norm, the filter
and bias of a convolution or linear layer. That costs a multiplication per weight instead of one per number of
the map, needs no hook, and a factor of 1 changes no bit. A factor of 0 switches a channel off: it says
nothing, and what made it learns nothing. The gradient of a factor is that of a gate on the layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def run_scaled(
    net: nn.Module, factors: Mapping[str, Tensor], x: Tensor, rates: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The network's output for pictures x, with factors [channels] at the outputs of layers.

    Args:
        net: its parameters get the gradients of a network with gates.
        factors: module to factors; norms with scale and shift, convolutions and linear layers.
        x: pictures [B, C, H, W].
        rates: module to what the gradient of each filter is multiplied by.
    """
    given = scaled_parameters(net, factors)
    for name, rate in (rates or {}).items():
        for kind, parameter in net.get_submodule(name).named_parameters(recurse=False):
            place = f"{name}.{kind}"
            given[place] = _Hastened.apply(given.get(place, parameter), _along(rate, parameter))
    out: Tensor = functional_call(net, given, (x,))
    return out


def scaled_parameters(net: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name to value of every parameter that a factor changes."""
    return {
        f"{name}.{kind}": parameter * _along(factor, parameter)
        for name, factor in factors.items()
        for kind, parameter in net.get_submodule(name).named_parameters(recurse=False)
    }


def fold(net: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Multiply the factors into the weights, so that the network says the same without them."""
    with torch.no_grad():
        for name, value in scaled_parameters(net, factors).items():
            net.get_parameter(name).copy_(value)


class _Hastened(torch.autograd.Function):
    """The same weights, with gradients multiplied."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(rate)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None


def _along(factor: Tensor, parameter: Tensor) -> Tensor:
    """Factors of output channels, shaped to multiply a parameter."""
    return factor.to(parameter.dtype).view(-1, *[1] * (parameter.ndim - 1))
