"""Which maps of two networks are compared, and how much each counts: pairs of stages and their choosers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.parts.segments import Boundary, Segments
from headstart.parts.spread import Spread, as_in_training

ALIKE = 1.25  # strides within this factor are taken as equal: 14 and 16
PER_STRIDE = 4  # taps of one network at one stride: of a plain transformer's blocks, four

Pair = tuple[int, int]  # number of the source's stage and of ours, from 0


def candidates(
    theirs: Sequence[Boundary], ours: Sequence[Boundary], asked: str, *, reach: float
) -> list[Pair]:
    """The pairs of stages (source's, ours) that are compared.

    Stages of a stride below 4 (a stem) are left out where two or more others are left, and of more than four
    stages at one stride four are taken, evenly spread, the last among them. Pairs named by number may be any.

    Args:
        theirs: stages of the source.
        ours: stages of the network that learns.
        asked: "all" (strides within `reach` of each other), "one2one" (equal strides), "single" (the last of
            those), or pairs by number from 0, source's first: "1-1,2-3".
        reach: largest ratio of two strides.

    Raises:
        MethodError: there are none, or what was asked cannot be read; says which stages there are.
    """
    stages = f"The source has {_listed(theirs)}; the network has {_listed(ours)}."
    if asked in ("all", "one2one", "single"):
        both = itertools.product(_taps(theirs), _taps(ours))
        ratio = {(m, n): _ratio(theirs[m].stride, ours[n].stride) for m, n in both}
        found = [pair for pair, r in ratio.items() if r <= (reach if asked == "all" else ALIKE)]
        if asked != "all":
            found = _abreast(found)
        if not found:
            why = f"have strides within a factor of {reach:g}" if asked == "all" else "have the same stride"
            raise MethodError(
                f"No two stages {why}: try pairs = all, a larger reach, or name pairs. {stages}"
            )
        return found[-1:] if asked == "single" else found
    if not re.fullmatch(r"\s*\d+-\d+\s*(,\s*\d+-\d+\s*)*", asked):
        raise MethodError(
            f"pairs = '{asked}' cannot be read. Allowed: all, one2one, single, or numbers such as 1-1,2-3."
        )
    named = [(int(m), int(n)) for m, n in (each.split("-") for each in asked.split(","))]
    for m, n in named:
        if m >= len(theirs) or n >= len(ours):
            raise MethodError(f"pairs names {m}-{n}, which is not there. {stages}")
    return list(dict.fromkeys(named))


def _taps(stages: Sequence[Boundary]) -> list[int]:
    deep = [i for i, stage in enumerate(stages) if stage.stride >= 4]
    kept = deep if len(deep) >= 2 else list(range(len(stages)))
    taps: list[int] = []
    for stride in dict.fromkeys(stages[i].stride for i in kept):
        same = [i for i in kept if stages[i].stride == stride]
        few = min(len(same), PER_STRIDE)
        taps += [same[len(same) * (k + 1) // few - 1] for k in range(few)]
    return taps


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _abreast(equal: list[Pair]) -> list[Pair]:
    """Of pairs of equal stride those that lie equally deep, from the last backwards; each stage once."""
    kept: list[Pair] = []
    for m, n in reversed(equal):
        if all(m < other and n < another for other, another in kept):
            kept.append((m, n))
    return kept[::-1]


def _listed(stages: Sequence[Boundary]) -> str:
    return ", ".join(f"{i}: {stage.name} (stride {stage.stride})" for i, stage in enumerate(stages))


class Chooser(nn.Module):
    """What and where of one pair: shares of the source's channels, and how much the pair counts.

    Both are read off the mean of the source's map, picture by picture. The shares start out equal, the
    strength near 1; it lies in [0, 6].

    Args:
        channels: of the source's map.
        what: choose channels; without it all have the same share.
        where: choose a strength; without it it is 1.
    """

    def __init__(self, channels: int, *, what: bool, where: bool) -> None:
        super().__init__()
        self.what = nn.Linear(channels, channels) if what else None
        self.where = nn.Linear(channels, 1) if where else None
        if self.what is not None:
            nn.init.zeros_(self.what.weight)
            nn.init.zeros_(self.what.bias)
        if self.where is not None:
            nn.init.ones_(self.where.bias)

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Shares [B, C] that add up to 1 and strengths [B], for means [B, C] of the source's map."""
        alike = torch.full_like(mean, 1 / mean.shape[1])
        shares = alike if self.what is None else self.what(mean).softmax(1)
        strength = mean.new_ones(len(mean)) if self.where is None else F.relu6(self.where(mean)).squeeze(1)
        return shares, strength


def mismatch(theirs: Tensor, ours: Tensor, shares: Tensor, strength: Tensor) -> Tensor:
    """mean_b strength[b] · Σ_c shares[b, c] · mean_ij (theirs − ours)²: [], for maps [B, C, h, w]."""
    distance = (theirs - ours).square().mean((2, 3))  # [B, C]
    return (strength * (shares * distance).sum(1)).mean()


def to_size(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map [B, C, h, w] in another size, bilinear as in the official code."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def evenness(shares: Tensor) -> Tensor:
    """Entropy of shares [B, C] by its largest value, the mean of a batch: 1 is all alike. []"""
    if shares.shape[1] == 1:
        return shares.new_ones(())
    return -torch.xlogy(shares, shares).sum(1).mean() / math.log(shares.shape[1])


def to_map(stage: Boundary, x: Tensor, *, norm_tokens: bool) -> Tensor:
    """What goes across behind a stage as a map [B, C, h, w] in float32 at least.

    Args:
        stage: which.
        x: what goes across there.
        norm_tokens: where it is tokens, normalise each over its channels.
    """
    made = stage.to_map(x).to(torch.promote_types(x.dtype, torch.float32))
    if norm_tokens and stage.kind == "tokens":
        made = F.layer_norm(made.movedim(1, -1), made.shape[1:2]).movedim(-1, 1)
    return made


def maps_of(chain: Segments, x: Tensor, *, norm_tokens: bool) -> dict[str, Tensor]:
    """The map [B, C, h, w] behind each stage, by its name; nothing above the last is run."""
    maps: dict[str, Tensor] = {}
    for k, stage in enumerate(chain.boundaries):
        x = chain.run(k, x)
        maps[stage.name] = to_map(stage, x, norm_tokens=norm_tokens)
    return maps


@torch.no_grad()
def spreads(chain: Segments, pictures: Iterable[Tensor], *, norm_tokens: bool) -> Tensor:
    """How far the maps behind each stage vary over pictures, in the mode that the network is in: [stages]."""
    found = [Spread() for _ in chain.boundaries]
    for x in pictures:
        for spread, seen in zip(found, maps_of(chain, x, norm_tokens=norm_tokens).values(), strict=True):
            spread.see(seen)
    return torch.stack([each.value for each in found])


def spreads_of_ours(
    method: nn.Module, chain: Segments, pictures: Iterable[Tensor], *, norm_tokens: bool
) -> Tensor:
    """`spreads` of the network that learns, as it is while learning; no trace is left in the method."""
    several = (x for x in pictures if len(x) > 1)  # one picture has no statistics
    with as_in_training(method):
        return spreads(chain, several, norm_tokens=norm_tokens)


class Student(nn.Module):
    """A network and the regressors on its stages as one module, so that all weights can be put in its place.

    Args:
        chain: the network, cut at the stages that are compared.
        regressors: one per pair, from our channels to the source's.
        stages: one per pair, the stage it starts from.
        norm_tokens: see `to_map`.
        spread: what the map behind each stage of the chain is divided by, [stages]; None: as they are.
    """

    def __init__(
        self,
        chain: Segments,
        regressors: nn.ModuleList,
        stages: Sequence[Boundary],
        *,
        norm_tokens: bool,
        spread: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spread = spread
        self.net, self.regressors = chain.net, regressors
        self.chain, self.stages, self.norm_tokens = chain, stages, norm_tokens

    def forward(self, x: Tensor, *, match: bool = True, task: bool = True) -> tuple[list[Tensor], Tensor]:
        """The regressed maps [B, C_m, h, w], none without `match`; logits, or without `task` anything."""
        maps: dict[str, Tensor] = {}
        for k, stage in enumerate(self.chain.boundaries):
            x = self.chain.run(k, x)
            if match:
                seen = to_map(stage, x, norm_tokens=self.norm_tokens)
                maps[stage.name] = seen if self.spread is None else seen / self.spread[k].to(seen.dtype)
        if task:
            x = self.chain.run(len(self.chain.boundaries), x)
        if not match:
            return [], x
        with torch.autocast(x.device.type, enabled=False):
            both = zip(self.regressors, self.stages, strict=True)
            return [regressor(maps[stage.name]) for regressor, stage in both], x
