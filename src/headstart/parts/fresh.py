"""Random weights for a network that has pretrained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import init


def reinitialise(net: nn.Module) -> None:
    """Draw all weights anew, in place, from torch's global generator.

    Convolutions: He's normal with fan-out; linear layers and learned tokens: normal of 0.02, cut at two
    deviations, bias zero (the field's practice for residual networks and for transformers). Norms start at
    scale 1, shift 0, statistics 0 and 1. A head that is zero stays zero.
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                if bool(module.weight.any()):
                    init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                _zero(module.bias)
            elif isinstance(module, nn.Linear):
                if bool(module.weight.any()):
                    init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                _zero(module.bias)
            elif isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    _own(name, parameter)


def _own(name: str, parameter: nn.Parameter) -> None:
    """Parameters that belong to no layer of torch's: tokens, embeddings, layer scales."""
    if parameter.ndim >= 2:
        init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
    elif "bias" in name:
        init.zeros_(parameter)
    elif "gamma" in name:
        init.constant_(parameter, 1e-5)  # a layer scale starts its branch near nothing (CaiT, ConvNeXt)
    else:
        init.ones_(parameter)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        init.zeros_(bias)
