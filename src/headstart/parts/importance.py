"""How much a task would miss each unit of a network: Taylor scores, and the baselines they have to beat.

All give one number per unit [U], on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from headstart.parts.gates import Gates, per_group

# Pictures of which one gradient is taken, the same on every device and for every size of batches.
_AT_ONCE = 16


def taylor(
    gates: Gates,
    logits: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    of_mean: bool = False,
    signed: bool = False,
) -> Tensor:
    """|α · ∂L/∂α| of the gates of each unit, added up: to first order, what the loss changes without it.

    Args:
        gates: of the network.
        logits: of pictures [B, C, H, W] under given α [gates].
        loss: mean loss [] of logits [B, K] and labels.
        batches: pictures and labels.
        of_mean: the size of the mean over all pictures, instead of the mean over small batches of the size.
        signed: add up α · ∂L/∂α over a unit's gates before its size is taken.
    """
    alpha = gates.alpha.detach().requires_grad_()  # nothing else gets a gradient
    total: Tensor | float = 0.0
    count = 0
    for x, y in batches:
        for some, labels in zip(torch.split(x, _AT_ONCE), torch.split(y, _AT_ONCE), strict=True):
            (gradient,) = torch.autograd.grad(loss(logits(some, alpha), labels), [alpha])
            each = gradient * alpha.detach()
            total = total + (each if of_mean else _sizes(gates, each, signed))
            count += 1
    if count == 0:
        raise ValueError("There are no pictures to score filters on.")
    mean = total / count
    assert isinstance(mean, Tensor)
    return (_sizes(gates, mean, signed) if of_mean else mean).cpu()


def magnitudes(gates: Gates, net: nn.Module, group: Tensor, keep: Tensor) -> Tensor:
    """L2 norms of what goes together, over the mean of its group: norms of different layers say nothing."""
    norms = gates.norms(net).cpu()
    return norms / per_group(norms, group, keep)


def ranks(scores: Tensor, group: Tensor) -> Tensor:
    """The place of each unit in its group, up to 1: a threshold takes the same share of every group."""
    made = torch.zeros_like(scores)
    for i in range(int(group.max()) + 1):
        mine = (group == i).nonzero().squeeze(1)
        order = mine[torch.argsort(scores[mine], stable=True)]
        made[order] = torch.arange(1, len(mine) + 1).to(scores) / len(mine)
    return made


def _sizes(gates: Gates, each: Tensor, signed: bool) -> Tensor:
    return gates.per_unit(each).abs() if signed else gates.per_unit(each.abs())
