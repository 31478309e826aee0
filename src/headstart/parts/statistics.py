"""Which modules are in training mode: frozen means statistics too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def settle(module: nn.Module, *, hold_statistics: bool = False) -> None:
    """Put every part of a module that has parameters, none of which learns, into eval mode.

    A module without parameters of its own (Dropout, pooling) follows what it is part of. BatchNorm whose
    scale and shift are frozen would otherwise go on changing its running statistics.

    Args:
        module: a module in training mode.
        hold_statistics: keep the statistics of all BatchNorm layers, also of those that learn.
    """
    for child in module.children():
        parameters = list(child.parameters())
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        if frozen or (hold_statistics and isinstance(child, _BatchNorm)):
            child.eval()
        else:
            settle(child, hold_statistics=hold_statistics)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any layer keeps running statistics of batches."""
    return any(isinstance(each, _BatchNorm) for each in module.modules())


def uses_batch(module: nn.Module) -> bool:
    """Whether any BatchNorm layer normalises by its batch."""
    return any(isinstance(each, _BatchNorm) and each.training for each in module.modules())


@contextmanager
def batch_statistics(module: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalises by its batch and leaves its running statistics alone.

    Args:
        module: whose BatchNorm layers are meant.
        always: also those in eval mode, which otherwise go on using their running statistics.
    """
    layers = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    before = [(each, each.training, each.track_running_stats) for each in layers if each.training or always]
    try:
        for layer, _, _ in before:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training, tracks in before:
            layer.training, layer.track_running_stats = training, tracks
