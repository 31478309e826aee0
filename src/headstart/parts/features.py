"""What a network's head sees: the features of pictures, computed once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def features(net: nn.Module, head: str, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run the network in eval mode and keep the input of its head.

    Args:
        net: any network whose head is a module of its own.
        head: dotted name of the head.
        batches: pairs (x [B, C, H, W], y [B]).

    Returns:
        Features [N, D] as float32 and labels [N], both on the CPU.
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
    return torch.cat(seen).clone(), torch.cat(labels).clone()
