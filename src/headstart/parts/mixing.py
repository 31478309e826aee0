"""Two maps mixed channel by channel as gates say, and what is made of the maps before, at little cost.

A training step of two networks at once is mostly memory traffic. What is here does the plain computation that
it describes, in fewer passes over maps than autograd would.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def mixed(gates: Tensor, tuned: Tensor, source: Tensor, *, last: bool = False) -> Tensor:
    """What each picture and filter takes: `tuned` where its gate is 1, else `source`.

    Args:
        gates: of 0 and 1, shaped to broadcast; their gradient is that of the weighted sum.
        tuned: a map [B, C, ...], or [B, ..., C].
        source: the same of the other side.
        last: whether channels come last.
    """
    out: Tensor = _Mixed.apply(gates, tuned, source, last)
    return out


def folded(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """A frozen convolution and the BatchNorm behind it, in eval mode, as one."""
    assert isinstance(layer, nn.Conv2d) and isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    before = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
    shift = -before * scale if not norm.affine else norm.bias - before * scale
    out: Tensor = layer._conv_forward(x, layer.weight * scale.view(-1, 1, 1, 1), shift)
    return out


def pooled(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A map for a layer to be given, and its mean over some dimensions.

    The first is to be read by two layers or more and by nobody else: to their gradient it is added in place.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, x.mean(dims)
    out: tuple[Tensor, Tensor] = _Pooled.apply(x, dims)
    return out


def masked(norm: nn.Module, z: Tensor, gates: Tensor) -> Tensor:
    """BatchNorm by those pictures of the batch [B, C, H, W] that chose the channel, gates [B, C, 1, 1].

    A channel that fewer than two chose keeps its running statistics.
    """
    assert isinstance(norm, _BatchNorm)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    gates = gates.to(wide.dtype)
    pictures = gates.sum((0, 2, 3))  # [C]
    enough = pictures >= 2
    count = (pictures * z.shape[2] * z.shape[3]).clamp(min=1)
    mean = (wide * gates).sum((0, 2, 3)) / count
    var = ((wide - mean[:, None, None]).square() * gates).sum((0, 2, 3)) / count
    if norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                running.copy_(torch.where(enough, torch.lerp(running, now.to(running), share), running))
        mean = torch.where(enough, mean, norm.running_mean.to(mean))
        var = torch.where(enough, var, norm.running_var.to(var))
    out = (wide - mean[:, None, None]) * (var + norm.eps).rsqrt()[:, None, None]
    if norm.affine:
        out = out * norm.weight[:, None, None] + norm.bias[:, None, None]
    return out.to(z.dtype)


class _Mixed(torch.autograd.Function):
    """`g · a + (1 - g) · b` for gates of 0 and 1: chosen, not multiplied, and in few passes over maps.

    What is not a number on the side that is not taken stays there. Backward a buffer is written twice: fresh
    memory costs more than the sums do.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, tuned: Tensor, source: Tensor, last: bool) -> Tensor:
        chosen = gates > 0.5
        ctx.save_for_backward(chosen, tuned, source)
        ctx.last, ctx.dtype = last, gates.dtype
        return torch.where(chosen, tuned, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, tuned, source = ctx.saved_tensors
        gain = to_tuned = to_source = None
        off = tuned - source if ctx.needs_input_grad[0] else torch.empty_like(grad)
        if ctx.needs_input_grad[0]:
            dims = tuple(range(1, grad.ndim - 1) if ctx.last else range(2, grad.ndim))
            gain = torch.mul(grad, off, out=off)
            gain = (gain.sum(dims, keepdim=True) if dims else gain.clone()).to(ctx.dtype)
            # A side that overflowed says nothing of which one is better.
            gain = torch.where(gain.isfinite(), gain, 0)
        if ctx.needs_input_grad[2]:
            to_source = torch.mul(grad, (~chosen).to(grad.dtype), out=off)
        if ctx.needs_input_grad[1]:
            to_tuned = grad * chosen.to(grad.dtype)
        return gain, to_tuned, to_source, None


class _Pooled(torch.autograd.Function):
    """What a layer is given, and the same pooled; its small gradient is added without a map of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        ctx.dims, ctx.shape = dims, x.shape
        return x.view_as(x), x.mean(dims)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, to_pooled: Tensor) -> tuple[Tensor, None]:
        positions = math.prod(ctx.shape[dim] for dim in ctx.dims)
        for dim in ctx.dims:
            to_pooled = to_pooled.unsqueeze(dim)
        # The sum of what two layers gave: nobody else holds it.
        return grad.add_(to_pooled, alpha=1 / positions), None
