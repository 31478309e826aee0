"""Keeping the processes of one training run the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def agree(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0; nothing happens in a single process.

    Buffers may have been created on one rank only (what was measured there), so rank 0 first says which
    names, shapes and types there are.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    listed = [[(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]]
    dist.broadcast_object_list(listed, src=0)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    with torch.no_grad():
        for name, shape, dtype in listed[0]:
            here = tensors.get(name)
            if here is None or here.shape != shape or here.dtype != dtype:
                owner, _, last = name.rpartition(".")
                here = torch.empty(shape, dtype=dtype, device=device)
                module.get_submodule(owner).register_buffer(last, here)
            dist.broadcast(here.detach(), src=0)
