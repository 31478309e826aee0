"""How much arithmetic a network does for one picture."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops(net: nn.Module, size: int) -> int | None:
    """Floating-point operations of convolutions, matrix products and attention for one picture.

    A multiplication and the addition that follows it are two. Counted on the `meta` device, where nothing
    is computed and attention is counted too (on the CPU it counts as none before torch 2.15). A network
    that looks at its numbers to decide what to do is counted on a picture of zeros instead.

    Args:
        net: in eval mode; neither moved nor changed.
        size: pixels of a side of the picture.

    Returns:
        The count, or None for a network that neither way could count.
    """
    tensors = {name: p.detach() for name, p in net.named_parameters(remove_duplicate=False)}
    tensors |= dict(net.named_buffers(remove_duplicate=False))
    first = next(iter(tensors.values()), torch.zeros(1))
    for device in ("meta", str(first.device)):
        there = {name: tensor.to(device) for name, tensor in tensors.items()}
        x = torch.zeros(1, 3, size, size, device=device, dtype=first.dtype)
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), warnings.catch_warnings(), counter:
                warnings.simplefilter("ignore")
                torch.func.functional_call(net, there, (x,))
        except Exception:  # noqa: BLE001, S112 - whatever a network can't do on `meta`, it may do on a picture
            continue
        return int(counter.get_total_flops())
    return None
