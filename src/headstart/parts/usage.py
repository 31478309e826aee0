"""How often each of several choices is made: running shares while training, and what there is to see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.parts.memory import Memory
from headstart.parts.ranks import average


@dataclass(frozen=True)
class Usage:
    """Running shares v of L choices in a `Memory`, the same on all ranks.

    Args:
        choices: L.
        rho: share of the past that stays at each batch.
    """

    choices: int
    rho: float = 0.9

    def begin(self, memory: Memory) -> None:
        """Nothing was chosen yet."""
        memory["shares"] = torch.zeros(self.choices)  # too small by 1 - ρ^batches
        memory["batches"] = torch.zeros((), dtype=torch.long)
        memory["pictures"] = torch.zeros((), dtype=torch.long)

    def update(self, memory: Memory, chosen: Tensor) -> None:
        """Take in the choices [B, L] of a batch, each 0 or 1."""
        shares = memory["shares"]
        shares.mul_(self.rho).add_(average(chosen.to(shares).mean(0)), alpha=1 - self.rho)
        memory["batches"].add_(1)
        memory["pictures"].add_(len(chosen))

    def shares(self, memory: Memory) -> Tensor:
        """v [L], corrected for having begun at nought; nought before the first batch."""
        batches = memory["batches"].to(memory["shares"])
        return memory["shares"] / (1 - self.rho ** batches.clamp(min=1))

    def collapsed(self, memory: Memory, within: float = 0.02, after: int = 200) -> bool:
        """Whether every choice is made the same way for nearly all pictures, once enough were seen."""
        return int(memory["pictures"]) >= after and one_way(self.shares(memory), within)


FEW = 50
"""Pictures of which it cannot be said whether they go all the same way."""


def one_way(shares: Tensor, within: float = 0.02) -> bool:
    """Whether every choice is made the same way for nearly all pictures."""
    return bool((torch.minimum(shares, 1 - shares) <= within).all())


def entropy(shares: Tensor) -> Tensor:
    """-v log₂ v - (1 - v) log₂ (1 - v) of shares v: 1 bit where both ways are as likely, 0 for one way."""
    v = shares.double()
    return -(torch.xlogy(v, v) + torch.xlogy(1 - v, 1 - v)) / torch.log(torch.tensor(2.0, dtype=v.dtype))


def by_label(chosen: Tensor, labels: Tensor) -> list[list[float]]:
    """Shares of each choice among the pictures of each label, from choices [N, L] and labels [N].

    A label without pictures has no shares: an empty list.
    """
    labels = labels.to(chosen.device)
    groups = (chosen[labels == label].double() for label in range(int(labels.max()) + 1))
    return [group.mean(0).tolist() if len(group) else [] for group in groups]


def extremes(chosen: Tensor, count: int = 5) -> dict[str, list[dict[str, Any]]]:
    """The pictures with the most and the fewest choices made, by their place, from choices [N, L]."""
    sums = chosen.long().sum(1)
    ascending = torch.argsort(sums, stable=True).tolist()

    def shown(places: Sequence[int]) -> list[dict[str, Any]]:
        return [{"picture": place, "tuned": int(sums[place])} for place in places]

    return {"most": shown(ascending[::-1][:count]), "fewest": shown(ascending[:count])}


def agreement(
    routed: Callable[[Tensor], Tensor],
    static: Callable[[Tensor], Tensor],
    pictures: Iterable[tuple[Tensor, Tensor]],
    held_out: bool,
) -> Tensor:
    """How often a network with routes, and one without in its place, name the same class.

    Args:
        routed: logits [B, K] of pictures.
        static: the same of the other.
        pictures: batches (x, y).
        held_out: whether these are pictures that were not learnt from.

    Returns:
        [3]: the share, of how many pictures, and whether these were held out; for a `Memory`.
    """
    same = torch.cat([routed(x).argmax(1) == static(x).argmax(1) for x, _ in pictures])
    return torch.tensor([float(same.double().mean()), len(same), held_out])


def described(agreed: Tensor) -> dict[str, Any]:
    """What `agreement` found, as plain data."""
    share, of, held_out = agreed.tolist()
    return {
        "agreement": round(share, 4),
        "pictures": int(of),
        "of": "validation" if held_out else "training",
    }
