"""How several losses pull at the weights they share: lengths and angles of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.parts.lookahead import averaged, norm


def influence(task: Tensor, others: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compare the gradient of each loss with the task's, on the weights that the loss reaches.

    The graphs stay. In several processes the gradients are those of the joined batch.

    Args:
        task: its loss [].
        others: losses [].
        weights: that they share.

    Returns:
        ‖∇task‖ / ‖∇L‖ [len(others)] and ⟨∇task, ∇L⟩ / (‖∇task‖ ‖∇L‖) [len(others)]; no number where one of
        the two gradients is 0.
    """
    first = _gradients(task, weights)
    lengths, cosines = [], []
    for loss in others:
        pairs = [(a, b) for a, b in zip(first, _gradients(loss, weights), strict=True) if b is not None]
        own = averaged([b for _, b in pairs])
        its = averaged([torch.zeros_like(b) if a is None else a for a, b in pairs])
        product = torch.stack([(a * b).sum() for a, b in zip(own, its, strict=True)]).sum()
        lengths.append(norm(its) / norm(own))
        cosines.append(product / (norm(its) * norm(own)))
    return torch.stack(lengths), torch.stack(cosines)


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # Not under autocast: it would take the products of the way back in half precision.
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(loss, list(weights), retain_graph=True, allow_unused=True)
