"""A gate on every filter of a network, a mask that takes some away, and how fast each filter learns.

    y = m · α · β̂ F(x; W)

α [gates] is one number per channel that is switched (`Coupling.gates`), m is 0 for units that went and 1 for
the others, and β̂ belongs to filters that are stored as W / β̂: it changes nothing of what the network says,
and everything of how fast it learns, as the step of β̂ W is β̂² times that of W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.parts.coupling import Coupling
from headstart.parts.scaled import fold, run_scaled


class Gates(nn.Module):
    """Gates on the units of a network, all 1 at first, in its type and on its device.

    Args:
        net: the network; not held.
        coupling: its units.
    """

    gate_unit: Tensor
    filter_unit: Tensor

    def __init__(self, net: nn.Module, coupling: Coupling) -> None:
        super().__init__()
        self.units = coupling.units
        filters = {
            name: unit
            for name, unit in coupling.out.items()
            if not isinstance(net.get_submodule(name), _BatchNorm)
        }
        self._gates = {name: len(unit) for name, unit in coupling.gates.items()}
        self._filters = {name: len(unit) for name, unit in filters.items()}
        # The unit of every gate and of every filter; -1 for none. What can be found again is not saved.
        self.register_buffer("gate_unit", torch.cat([*coupling.gates.values()]), persistent=False)
        self.register_buffer("filter_unit", torch.cat([*filters.values()]), persistent=False)
        # Kept as the distance from 1: next to a 1 the steps of a gate that matters little would be lost.
        self.delta = nn.Parameter(torch.zeros(len(self.gate_unit)))
        like = next(net.parameters())
        self.to(device=like.device, dtype=like.dtype)

    @property
    def alpha(self) -> Tensor:
        """α [gates]."""
        return 1 + self.delta

    def run(
        self,
        net: nn.Module,
        x: Tensor,
        keep: Tensor,
        *,
        alpha: Tensor | None = None,
        rate: Tensor | None = None,
        hasten: Tensor | None = None,
    ) -> Tensor:
        """The network's output for pictures x.

        Args:
            net: the network.
            x: pictures [B, C, H, W].
            keep: units that stay, bool [U].
            alpha: in the place of the gates [gates].
            rate: β̂ of units whose filters are divided by it [U].
            hasten: what the gradients of their filters are multiplied by [U].
        """
        slow = None if hasten is None else self.filters(hasten)
        return run_scaled(net, self.factors(keep, alpha=alpha, rate=rate), x, slow)

    def factors(
        self, keep: Tensor, *, alpha: Tensor | None = None, rate: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Layer to what its outputs are multiplied by; arguments as for `run`."""
        alpha = self.alpha if alpha is None else alpha
        made = self.by_layer(alpha * _spread(keep.to(alpha.dtype), self.gate_unit))
        for name, each in {} if rate is None else self.filters(rate).items():
            made[name] = made[name] * each if name in made else each
        return made

    def by_layer(self, per_gate: Tensor) -> dict[str, Tensor]:
        """Values [gates] by layer."""
        return dict(zip(self._gates, torch.split(per_gate, [*self._gates.values()]), strict=True))

    def filters(self, per_unit: Tensor) -> dict[str, Tensor]:
        """Values [U] by layer, for each of its filters; 1 for filters of no unit."""
        per_filter = _spread(per_unit.to(self.delta.dtype), self.filter_unit)
        return dict(zip(self._filters, torch.split(per_filter, [*self._filters.values()]), strict=True))

    def of_units(self, per_unit: Tensor) -> Tensor:
        """Values [gates] where all gates of a unit have its value [U]."""
        return _spread(per_unit.to(self.delta.dtype), self.gate_unit)

    def multiply_in(self, net: nn.Module, alpha: Tensor | None = None) -> None:
        """Multiply the gates, or others in their place, into the weights; the network then says the same.

        Afterwards the gates are 1, unless others were given.
        """
        fold(net, self.by_layer((self.alpha if alpha is None else alpha).detach()))
        if alpha is None:
            with torch.no_grad():
                self.delta.zero_()

    def multiply_filters(self, net: nn.Module, per_unit: Tensor) -> None:
        """Multiply the filters of each unit by its value [U]."""
        fold(net, self.filters(per_unit))

    def per_unit(self, per_gate: Tensor) -> Tensor:
        """Sums of values [gates] over the gates of each unit [U]."""
        return _summed(per_gate, self.gate_unit, self.units)

    def norms(self, net: nn.Module) -> Tensor:
        """L2 norm of all filters of each unit [U]."""
        squares = [
            net.get_submodule(name).get_parameter("weight").detach().flatten(1).square().sum(1)
            for name in self._filters
        ]
        return _summed(torch.cat(squares), self.filter_unit, self.units).sqrt()


def per_group(values: Tensor, group: Tensor, keep: Tensor, *, largest: bool = False) -> Tensor:
    """The mean (or the largest) of values [U] over the units of each group that stay, for each unit [U]."""
    groups = int(group.max()) + 1
    how = "amax" if largest else "mean"
    made = torch.zeros(groups, dtype=values.dtype)
    made = made.scatter_reduce(0, group[keep], values[keep], how, include_self=False)
    return made[group]


def _spread(per_unit: Tensor, unit: Tensor) -> Tensor:
    per_unit = per_unit.to(unit.device)
    return torch.cat([per_unit, per_unit.new_ones(1)])[unit]  # -1 is the last


def _summed(values: Tensor, unit: Tensor, units: int) -> Tensor:
    made = values.new_zeros(units + 1)
    return made.index_add(0, torch.where(unit < 0, units, unit), values)[:units]
