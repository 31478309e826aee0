"""The weighted squared distance of two maps, one of which learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headstart.errors import MethodError


def gap(ours: Tensor, theirs: Tensor, rates: Tensor) -> Tensor:
    """½ · Σ rates · (ours − theirs)², with the gradient rates · (ours − theirs) for `ours` alone.

    Written as one operation that works in the memory of `theirs`: on a CPU fresh memory for a map costs more
    than all the arithmetic. Maps in half precision are subtracted and summed in float32.

    Args:
        ours: any shape.
        theirs: of the same shape; used up.
        rates: 0 or more, in a shape that goes with the maps.

    Returns:
        [] in float32, in float64 for float64 maps.

    Raises:
        MethodError: the maps are of different shapes.
    """
    if ours.shape != theirs.shape:
        raise MethodError(
            f"Maps of {list(ours.shape)} and {list(theirs.shape)} cannot be compared: both networks must "
            "give maps of one size."
        )
    value: Tensor = _Gap.apply(ours, theirs.detach(), rates)
    return value


class _Gap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, rates: Tensor) -> Tensor:
        wide = torch.promote_types(ours.dtype, torch.float32)
        roots = rates.to(wide).sqrt()
        scaled = theirs.to(wide).sub_(ours).mul_(roots)
        value: Tensor = 0.5 * torch.linalg.vector_norm(scaled).square()
        ctx.save_for_backward(scaled.mul_(-roots))  # the gradient, while it is in the cache
        ctx.dtype = ours.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (pull,) = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:
            pull = pull * grad
        return pull.to(ctx.dtype), None, None
