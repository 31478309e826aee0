"""What would be left of a network's FLOPs and parameters without some of its channels, to the last one.

FLOPs are counted as in `parts.flops`, on the `meta` device and layer by layer: convolutions, linear layers,
matrix products and attention; a multiplication and the addition that follows it are two. Of a layer that
loses channels what it costs shrinks in proportion. On a network with masks there would be nothing to count,
as masking drops nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counted:
    """FLOPs for one picture."""

    total: int
    modules: dict[str, int]  # by dotted name; of each what it does itself, not what its children do


def count(net: nn.Module, shape: tuple[int, int, int]) -> Counted:
    """Count the FLOPs of a network for one picture [C, H, W]; nothing is computed."""
    bare = copy.deepcopy(net).to("meta").eval()
    like = next(bare.parameters())
    root = type(bare).__name__
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(torch.empty(1, *shape, device="meta", dtype=like.dtype))
    inside = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    counted = {name: inside.get(f"{root}.{name}", 0) for name, _ in bare.named_modules() if name}
    own = dict(counted)
    for name in counted:
        parent = name.rpartition(".")[0]
        if parent:
            own[parent] -= counted[name]
    return Counted(int(counter.get_total_flops()), {name: each for name, each in own.items() if each})


class Cost:
    """What a network costs when only some of its channels stay.

    Args:
        net: with all its channels.
        shape: of a picture [C, H, W].
        out: module to the unit of each of its output channels, -1 where it is of none.
        into: the same for input channels.
        heads: the same for heads of attention.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, int, int],
        out: Mapping[str, Tensor],
        into: Mapping[str, Tensor],
        heads: Mapping[str, Tensor],
    ) -> None:
        counted = count(net, shape)
        self.full = counted.total
        self.parameters_full = sum(parameter.numel() for parameter in net.parameters())
        self._terms = []  # (FLOPs, kernel, per output channel, units out, units in)
        for name in list(dict.fromkeys([*out, *into, *heads])):
            module = net.get_submodule(name)
            unit_out, unit_in = out.get(name, heads.get(name)), into.get(name)
            single = isinstance(module, _BatchNorm) or name in heads
            kernel = 0 if single else module.get_parameter("weight").numel()
            each = 0
            if name not in heads:
                own = sum(p.numel() for p in module.parameters(recurse=False))
                each = (own - kernel) // len(unit_out) if unit_out is not None else 0
            self._terms.append((counted.modules.get(name, 0), kernel, each, unit_out, unit_in))

    def flops(self, keep: Tensor) -> int:
        """FLOPs for one picture when these units stay, bool [units]."""
        left = self.full
        for flops, _, _, out, into in self._shares(keep):
            left -= flops - _share(flops, out, into)
        return left

    def parameters(self, keep: Tensor) -> int:
        """Parameters that are left when these units stay."""
        left = self.parameters_full
        for _, kernel, each, out, into in self._shares(keep):
            left -= kernel - _share(kernel, out, into)
            left -= each * (out[1] - out[0])
        return left

    def _shares(self, keep: Tensor) -> list[tuple[int, int, int, tuple[int, int], tuple[int, int]]]:
        stays = torch.cat([keep.cpu(), torch.ones(1, dtype=torch.bool)])

        def share(unit: Tensor | None) -> tuple[int, int]:
            return (1, 1) if unit is None else (int(stays[unit.cpu()].sum()), len(unit))

        return [
            (flops, kernel, each, share(out), share(into)) for flops, kernel, each, out, into in self._terms
        ]


def _share(whole: int, out: tuple[int, int], into: tuple[int, int]) -> int:
    """Exact: what a layer costs divides by its channels."""
    return whole * out[0] * into[0] // (out[1] * into[1])
