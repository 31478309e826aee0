"""How small a network is to become, in FLOPs, parameters or milliseconds, and whether it can."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.cost import Cost
from headstart.parts.coupling import Coupling
from headstart.parts.cutting import cut
from headstart.parts.latency import latency_ms

Kind = Literal["flops", "params", "latency_ms"]


class Budget:
    """What the network costs with some of its units, and what it may cost.

    Args:
        net: the network with all its units.
        coupling: its units.
        shape: of a picture [C, H, W].
        least: units that each group keeps [groups].
        kind: what is counted.
        target: a share of the whole, or milliseconds for one picture on this machine's CPU; None: no target.
        step: without a target, the share that one round takes.
    """

    def __init__(
        self,
        net: nn.Module,
        coupling: Coupling,
        shape: tuple[int, int, int],
        least: Tensor,
        *,
        kind: Kind = "flops",
        target: float | None = None,
        step: float = 0.1,
    ) -> None:
        self.coupling, self.shape, self.least = coupling, shape, least
        self.kind, self.target, self.step = kind, target, step
        self.counts = Cost(net, shape, coupling.out, coupling.into, coupling.heads)
        self.network = type(net).__name__
        if kind == "latency_ms":
            return
        floor = self._counted(self.smallest) / self._counted(self.whole)
        if target is not None and target < floor:
            raise MethodError(
                f"{kind} = {target:g} cannot be met: with what every layer keeps, {self.network} comes down "
                f"to {math.ceil(floor * 1000) / 1000:g} at the least. Ask for that or more, or lower floor "
                "or round_to."
            )

    @property
    def whole(self) -> Tensor:
        """All units, bool [U]."""
        return torch.ones(self.coupling.units, dtype=torch.bool)

    @property
    def smallest(self) -> Tensor:
        """As few units as every group may keep, bool [U]; which of a group makes no difference."""
        pairs = zip(self.coupling.sizes, self.least.tolist(), strict=True)
        return torch.cat([torch.arange(size) < least for size, least in pairs])

    def shares(self, keep: Tensor) -> dict[str, float]:
        """Shares of FLOPs and of parameters that are left."""
        counts = self.counts
        return {
            "flops": round(counts.flops(keep) / counts.full, 6),
            "params": round(counts.parameters(keep) / counts.parameters_full, 6),
        }

    def rounds(self) -> int | None:
        """As many as `step` needs to the target; None where that cannot be known."""
        if self.target is None or self.kind == "latency_ms":
            return None
        return max(1, math.ceil((1 - self.target) / self.step - 1e-9))

    def require_fast_enough(self, net: nn.Module) -> None:
        """Measure whether the network can become as fast as it has to, where that is asked.

        Raises:
            MethodError: it cannot; says how fast it can.
        """
        if self.kind != "latency_ms" or self.target is None:
            return
        least = self._measured(net)(self.smallest)
        if self.target < least:
            raise MethodError(
                f"latency_ms = {self.target:g} cannot be met: with what every layer keeps, {self.network} "
                f"takes {least:.3g} ms on this machine at the least. Ask for that or more."
            )

    def goal(
        self, net: nn.Module, keep: Tensor, done: int, rounds: int
    ) -> tuple[Callable[[Tensor], float], float, int]:
        """What is counted, what it may be, and how exactly the number of units has to be found.

        Args:
            net: the network as it is, with the weights of all units.
            keep: units that are left.
            done: rounds, this one included.
            rounds: of how many.
        """
        if self.kind == "latency_ms":
            cost = self._measured(net)
            now = cost(keep)  # measured anew: a machine is not as fast at all times
            assert self.target is not None
            goal = now - (now - self.target) / (rounds - done + 1)
            return cost, min(goal, now) if done < rounds else self.target, max(1, len(keep) // 100)
        gone = done * self.step if self.target is None else done / rounds * (1 - self.target)
        return self._counted, (1 - gone) * self._counted(self.whole), 1

    def _counted(self, keep: Tensor) -> float:
        return self.counts.parameters(keep) if self.kind == "params" else self.counts.flops(keep)

    def _measured(self, net: nn.Module) -> Callable[[Tensor], float]:
        def cost(keep: Tensor) -> float:
            smaller = cut(copy.deepcopy(net).cpu(), self.coupling.kept(keep))
            return latency_ms(smaller, self.shape, seconds=0.1)

        return cost
