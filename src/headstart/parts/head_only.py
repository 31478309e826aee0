"""A network's head trained alone, by steps on batches; of the rest only the output is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.statistics import has_batchnorm


def learn_head(
    net: nn.Module,
    head: str,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    gamma: float,
    hold_statistics: bool = False,
) -> None:
    """Train the head in place by SGD, with a rate that falls by a factor per epoch.

    The body runs without a graph. It is in training mode, so that BatchNorm normalises by the batch and its
    running statistics move to these pictures. Where they are held, or there are none, the pictures are walked
    once and all epochs learn from the same features.

    Args:
        net: left in eval mode.
        head: dotted name of the head.
        batches: gives the batches (x [B, C, H, W], y) of an epoch.
        loss: of logits [B, K] and labels.
        epochs: how often the pictures are walked.
        lr: rate of the first epoch.
        momentum: of SGD.
        weight_decay: of all of the head.
        gamma: what the rate is multiplied by after each epoch.
        hold_statistics: leave BatchNorm as it is.

    Raises:
        MethodError: there are no pictures, or the network does not call its head once.
    """
    module = net.get_submodule(head)
    seen: list[Tensor] = []
    net.requires_grad_(False).train(not hold_statistics)
    module.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)

    def looked_at() -> Iterable[tuple[Tensor, Tensor]]:
        for x, y in batches():
            seen.clear()
            hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            try:
                with torch.no_grad():
                    net(x)
            finally:
                hook.remove()
            if len(seen) != 1:
                raise MethodError(f"The network calls its head '{head}' {len(seen)} times; once is needed.")
            yield seen[0], y

    once = list(looked_at()) if hold_statistics or not has_batchnorm(net) else None
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * gamma**epoch
        batch = None
        for batch in looked_at() if once is None else once:
            features, y = batch
            logits = module(features).flatten(1)
            optimizer.zero_grad()
            cost = loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
            torch.autograd.backward(cost)
            optimizer.step()
        if batch is None:
            raise MethodError("There are no pictures to train a head on.")
    net.requires_grad_(False).eval()
