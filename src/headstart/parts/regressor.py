"""Regressors that bring a map to another network's channels, and how far two maps are apart."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError

RegressorName = Literal["auto", "identity", "conv1x1", "conv+bn", "conv+bn+relu"]


def regressor_between(kind: RegressorName, ours: int, theirs: int) -> nn.Module:
    """A module from maps [B, `ours`, h, w] to maps [B, `theirs`, h, w].

    Args:
        kind: "identity"; "conv1x1" (with a bias); "conv+bn" (1×1 without, then BatchNorm); "conv+bn+relu",
            for maps of theirs that are nowhere negative; or "auto": the identity where the channels are as
            many, else "conv1x1".
        ours: channels that come in.
        theirs: channels that go out.

    Raises:
        MethodError: the identity between unequal numbers of channels.
    """
    if kind == "auto":
        kind = "identity" if ours == theirs else "conv1x1"
    if kind == "identity" and ours != theirs:
        raise MethodError(
            f"regressor = 'identity' needs maps of as many channels; here {ours} would have to be {theirs}. "
            "Use conv1x1, or auto."
        )
    if kind == "identity":
        return nn.Identity()
    if kind == "conv1x1":
        return nn.Conv2d(ours, theirs, 1)
    layers = [nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)]
    return nn.Sequential(*layers, nn.ReLU()) if kind == "conv+bn+relu" else nn.Sequential(*layers)


def common_size(one: Tensor, other: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps [B, C, h, w]."""
    return min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] averaged down to `size`: every position of it counts."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="area")


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """(one − other)² of two maps of a shape, in float32 at least: [B, C, h, w]."""
    wide = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
    return (one.to(wide) - other.to(wide)).square()
