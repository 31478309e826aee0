"""A quadratic pull of many weights towards fixed values, at the price of a few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Anchor(torch.autograd.Function):
    """strength/2 · Σ_i ‖w_i − a_i‖² as a scalar whose gradient is strength · (w_i − a_i).

    Written as one operation because the graph of the sum over a network's tensors costs several small
    kernels per tensor, forward and backward; this is one multi-tensor pass for the difference, one for its
    norm and one to scale it. Being part of the graph, it goes through gradient accumulation, loss scaling
    and the averaging between ranks like any other term.

    Call as `Anchor.apply(strength, n, *weights, *anchors)`: n weights, then n anchors of the same shapes, or
    none of them for a pull towards zero. Half-precision weights are subtracted in float32.
    """

    @staticmethod
    def forward(ctx: Any, strength: float, n: int, *tensors: Tensor) -> Tensor:
        """The value [] in float32 (float64 for float64 weights)."""
        weights, anchors = list(tensors[:n]), list(tensors[n:])
        ctx.strength, ctx.n, ctx.given = strength, n, len(tensors)
        if not weights or strength == 0:
            return torch.zeros((), device=tensors[0].device if tensors else None)
        wide = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
        weights = [weight.to(dtype) for weight, dtype in zip(weights, wide, strict=True)]
        if anchors:
            anchors = [anchor.to(dtype) for anchor, dtype in zip(anchors, wide, strict=True)]
            weights = list(torch._foreach_sub(weights, anchors))
        ctx.save_for_backward(*weights)
        ctx.dtypes = [tensor.dtype for tensor in tensors[:n]]
        norms = torch.stack(torch._foreach_norm(weights))
        return 0.5 * strength * norms.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """strength · (w − a) for the weights, nothing for the anchors."""
        if ctx.strength == 0 or ctx.n == 0:
            return (None, None, *([None] * ctx.given))
        pulls = list(torch._foreach_mul(list(ctx.saved_tensors), grad * ctx.strength))
        pulls = [pull.to(dtype) for pull, dtype in zip(pulls, ctx.dtypes, strict=True)]
        return (None, None, *pulls, *([None] * (ctx.given - ctx.n)))
