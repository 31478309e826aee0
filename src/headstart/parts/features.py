"""What a network's head sees: the features of pictures, computed once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from headstart.errors import MethodError


def features(net: nn.Module, head: str, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run the network in eval mode and keep the input of its head.

    Args:
        net: any network whose head is a module of its own.
        head: dotted name of the head.
        batches: pairs (x [B, C, H, W], y [B]).

    Returns:
        Features [N, D] as float32 and labels [N], both on the CPU.

    Raises:
        MethodError: no batches, or a head that the network does not call exactly once.
    """
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    was_training = [module for module in net.modules() if module.training]
    # A hook, not `forward_features`: it holds for any network, with pooling and norms as they are.
    hook = net.get_submodule(head).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(1).float().cpu())
    )
    try:
        net.eval()
        with torch.inference_mode():
            for x, y in batches:
                net(x)
                labels.append(y.cpu())
    finally:
        hook.remove()
        for module in was_training:
            module.training = True
    if not labels:
        raise MethodError("There are no pictures to take features from.")
    if len(seen) != len(labels):
        raise MethodError(
            f"The network calls its head '{head}' {len(seen)} times for {len(labels)} batches; once for each "
            "is needed. Name another head with head='...'."
        )
    return torch.cat(seen).clone(), torch.cat(labels).clone()
