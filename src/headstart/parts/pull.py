"""Pulls of many weights towards fixed values, each at the price of a few passes over memory.

The penalty is one autograd operation with its closed gradient: the graph of a sum over a network's tensors
costs several small kernels per tensor, forward and backward. Being part of the graph it goes through gradient
accumulation, loss scaling and the averaging between ranks like any other term. It may instead be followed
by a step of its own after each of the optimiser's.

With Δ = w − a and r the root of the importance F of each number (1 where there is none), the forms are

    squares    strength/2 · Σ (r Δ)²            gradient  strength · r² Δ
    absolute   strength · Σ |r Δ|               gradient  strength · r sign Δ
    groups     strength · Σ_g s_g ‖r Δ_g‖       gradient  strength · s_g r² Δ_g / ‖r Δ_g‖

and every gradient is exactly 0 at Δ = 0. A group is all that shares the first index of a tensor: the fan-in
of an output channel or unit. s_g = √p_g, p_g its count of numbers; each number of a vector is a group alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from headstart.errors import MethodError

Form = Literal["squares", "absolute", "groups"]

# Numbers that are worked on at a time on a CPU: what was just written is then read again from its cache.
_AT_ONCE = 2**19

# Norms of groups below this count as zero: dividing by them could overflow.
_NOTHING = 1e-30


@dataclass
class Pull:
    """One penalty on some weights of a network.

    Args:
        form: as above.
        strength: 0 or more.
        weights: of any shapes and floating types; half precision is subtracted in float32.
        anchors: of the same shapes; none: zero.

    Where a method takes `roots` these are r, of the weights' shapes; none: 1.
    """

    form: Form
    strength: float
    weights: list[nn.Parameter]
    anchors: list[Tensor] = field(default_factory=list)

    def term(self, roots: Sequence[Tensor] = ()) -> Tensor:
        """The penalty with a gradient for the weights: [] in float32, in float64 for float64 weights."""
        if not self.weights or self.strength == 0:
            return torch.zeros((), device=self.weights[0].device if self.weights else None)
        counts = len(self.weights), len(self.anchors)
        tensors = (*self.weights, *self.anchors, *roots)
        total: Tensor = _Pull.apply(self.form, self.strength, *counts, *tensors)
        return total

    def check(self, optimizer: Optimizer, *, in_loss: bool, roots: Sequence[Tensor] = ()) -> None:
        """Refuse rates at which "squares" alone would send weights past their anchors and ever further.

        Args:
            optimizer: with its groups' rates.
            in_loss: whether the gradient goes through the optimiser, or `follow` is used.
            roots: r.
        """
        if self.form != "squares":
            return  # the size of a step is bounded
        largest = max((float(root.max()) ** 2 for root in roots if root.numel()), default=1.0)
        for group, _ in self._groups(optimizer):
            amount, limit = float(group["lr"]) * self.strength * largest, 1.0
            if in_loss:
                if "nesterov" not in group:  # only SGD takes the gradient as it is
                    continue
                momentum = group["momentum"]
                limit = 2 * (1 + momentum) / (1 + 2 * momentum * group["nesterov"])
            if amount >= limit:
                raise MethodError(
                    f"The pull of one step, rate × strength, is {amount:.3g}; from {limit:.3g} on weights go "
                    "past what they are pulled to, and further each time. Lower the strength or the rate."
                )

    def follow(self, optimizer: Optimizer, roots: Sequence[Tensor] = ()) -> None:
        """After a step of the optimiser: a step on the penalty alone, each weight at its group's rate η.

        squares: w ← w − η·strength·r² Δ. The others take the proximal step with t = η·strength, in which what
        is near enough lands on its anchor: |Δ| shrinks by t, or ‖Δ_g‖ by t·s_g, to no less than 0.
        """
        self.check(optimizer, in_loss=False)
        for group, own in self._groups(optimizer):
            amount = float(group["lr"]) * self.strength
            some = [[each[i] for i in own] if each else [] for each in (self.weights, self.anchors, roots)]
            if amount and self.form == "squares":
                _decay(amount, *some)
            elif amount:
                _shrink(self.form, amount, *some[:2])

    def _groups(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """The optimiser's groups as they are now, each with which of the weights it holds."""
        position = {id(weight): i for i, weight in enumerate(self.weights)}
        for group in optimizer.param_groups:
            own = [position[id(each)] for each in group["params"] if id(each) in position]
            if own:
                yield group, own


class _Pull(torch.autograd.Function):
    """The gradient is computed with the value, while the differences are still in the cache."""

    @staticmethod
    def forward(ctx: Any, form: Form, strength: float, n: int, a: int, *tensors: Tensor) -> Tensor:
        ctx.form, ctx.strength, ctx.n, ctx.a = form, strength, n, a
        ctx.save_for_backward(*tensors)  # no copies, and only for a graph that is walked twice
        ctx.dtypes = [weight.dtype for weight in tensors[:n]]
        value, ctx.pulls = _measured(form, strength, *_divided(tensors, n, a))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise MethodError("A pull has no second derivative here: leave out create_graph=True.")
        pulls, ctx.pulls = ctx.pulls, None
        if pulls is None:  # walked before: what was handed out then may be somebody's .grad by now
            _, pulls = _measured(ctx.form, ctx.strength, *_divided(ctx.saved_tensors, ctx.n, ctx.a))
        if grad.device.type != "cpu" or grad != 1:
            torch._foreach_mul_(pulls, grad)
        own = [each.to(dtype) for each, dtype in zip(pulls, ctx.dtypes, strict=True)]
        return (*[None] * 4, *own, *[None] * (len(ctx.needs_input_grad) - 4 - ctx.n))


def _divided(tensors: Sequence[Tensor], n: int, a: int) -> tuple[Sequence[Tensor], ...]:
    return tensors[:n], tensors[n : n + a], tensors[n + a :]


def _measured(
    form: Form,
    strength: float,
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    roots: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The penalty [] and its gradient."""
    sums: list[Tensor] = []
    pulls: list[Tensor] = []
    for part, delta in _differences(weights, anchors):
        own = list(roots[part])
        if own:
            torch._foreach_mul_(delta, own)
        if form == "squares":
            sums += [0.5 * norm.square() for norm in torch._foreach_norm(delta)]
            torch._foreach_mul_(delta, strength)
        elif form == "absolute":
            sums += [each.sum() for each in torch._foreach_abs(delta)]  # the 1-norm is slower on a CPU
            torch._foreach_sign_(delta)
            torch._foreach_mul_(delta, strength)
        else:
            for each in delta:
                norms, size = _norms(each)
                sums.append(size * norms.sum())
                each.mul_(_along(torch.where(norms > _NOTHING, strength * size / norms, 0), each))
        if own:
            torch._foreach_mul_(delta, own)
        pulls += delta
    return strength * torch.stack(sums).sum(), pulls


def _decay(
    amount: float, weights: Sequence[Tensor], anchors: Sequence[Tensor], roots: Sequence[Tensor]
) -> None:
    with torch.no_grad():
        for part, delta in _differences(weights, anchors):
            for own in [list(roots[part])] * 2 if roots else []:
                torch._foreach_mul_(delta, own)
            for weight, each in zip(weights[part], delta, strict=True):
                weight.copy_(weight - amount * each)


def _shrink(form: Form, amount: float, weights: Sequence[Tensor], anchors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for part, delta in _differences(weights, anchors):
            for weight, anchor, each in zip(weights[part], anchors[part], delta, strict=True):
                if form == "absolute":
                    kept = functional.softshrink(each, amount)
                else:
                    norms, size = _norms(each)
                    kept = each * _along((1 - amount * size / norms.clamp(min=_NOTHING)).clamp(min=0), each)
                weight.copy_(anchor + kept)


def _differences(
    weights: Sequence[Tensor], anchors: Sequence[Tensor]
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Δ of some tensors at a time, as new tensors of at least float32."""
    start, count = 0, 0
    for i, weight in enumerate(weights, 1):
        count += weight.numel()
        if i < len(weights) and (weight.device.type != "cpu" or count < _AT_ONCE):
            continue
        part = slice(start, i)
        delta = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in weights[part]]
        if anchors:
            fixed = [each.to(own.dtype) for each, own in zip(anchors[part], delta, strict=True)]
            delta = list(torch._foreach_sub(delta, fixed))
        else:
            delta = [each.clone() for each in delta]
        yield part, delta
        start, count = i, 0


def _norms(delta: Tensor) -> tuple[Tensor, float]:
    """‖Δ_g‖ of every group [G], and √p."""
    if delta.ndim < 2:
        return delta.abs(), 1.0
    norms = torch.linalg.vector_norm(delta, dim=tuple(range(1, delta.ndim)))
    return norms, math.sqrt(delta[0].numel() if len(delta) else 0)


def _along(groups: Tensor, like: Tensor) -> Tensor:
    """One number per group [G], in a shape that multiplies the numbers of the group."""
    return groups.reshape(-1, *[1] * (like.ndim - 1)) if like.ndim > 1 else groups
