"""Keeping the processes of one training run the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def agree(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0; nothing happens in a single process.

    Buffers may have been created on some ranks only (what was measured there), so rank 0 first says which
    names, shapes and types there are. What another rank has beyond that is dropped.
    """
    if alone():
        return
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    listed = [[(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]]
    dist.broadcast_object_list(listed, src=0)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    for name in set(dict(module.named_buffers())) - {name for name, _, _ in listed[0]}:
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)
    for name, shape, dtype in listed[0]:
        here = tensors.get(name)
        if here is None or here.shape != shape or here.dtype != dtype:
            owner, _, last = name.rpartition(".")
            here = torch.empty(shape, dtype=dtype, device=device)
            module.get_submodule(owner).register_buffer(last, here)
        _broadcast(here)


def agreed(answer: bool) -> bool:
    """Rank 0's answer, on every rank: ranks that go different ways wait for each other for ever."""
    if alone():
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]


def average(tensor: Tensor) -> Tensor:
    """The mean over all ranks, on every rank; without a graph."""
    mean = tensor.detach().clone()
    if not alone():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def alone() -> bool:
    """Whether this process is the only one of its run."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _broadcast(tensor: Tensor) -> None:
    # As bytes in row-major order: a broadcast copies storage, so that a transposed or channels-last tensor
    # on one rank and a plain one on the other would end up different, and gloo knows no 16-bit integers.
    with torch.no_grad():
        flat = tensor.detach().contiguous().reshape(-1)
        wire = flat.view(torch.uint8).clone()
        dist.broadcast(wire, src=0)
        tensor.copy_(wire.view(tensor.dtype).reshape(tensor.shape))
