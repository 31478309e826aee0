"""What the accuracy of a winner is worth that was chosen for it.

The best of several is the best partly by luck, and the more there were to choose from, the more of it. On
the pictures that chose it, a winner looks better than it is; by how much depends on the number of pictures
and of candidates, and on how alike they are. Tsamardinos, Greasidou and Borboudakis (2018, Machine Learning
107(12)) take the luck out without training anything again: draw pictures with replacement, let these choose
the winner, and score it on the pictures that were not drawn. Over many draws that is the accuracy of
choosing-and-then-using, and its quantiles are an interval.

The candidates are the methods of a comparison, the pictures those of validation. A search chooses among its
trials on the same pictures before that; its trials are no candidates here, so their luck stays in. Test
pictures have a part in neither choice, and what was measured on them needs no correction.

Each draw chooses on fewer different pictures than there are (63 %), so the estimate is, if anything, a
little low.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from headstart.comparison.statistics import Answers, Interval

DRAWS = 1000


class Chosen(NamedTuple):
    """A winner's accuracy as it looks, and as it is to be expected."""

    naive: float  # on the pictures that chose it
    corrected: Interval
    candidates: int

    @property
    def optimism(self) -> float:
        """How much of the first was luck."""
        return self.naive - self.corrected.mean


def corrected(
    runs: Mapping[str, Mapping[Any, Answers]], *, draws: int = DRAWS, seed: int = 0
) -> Chosen | None:
    """Bootstrap bias-corrected accuracy of the candidate with the best mean over the seeds.

    Args:
        runs: answers by candidate and seed, on the pictures that choose. Candidates are compared over the
            seeds that all of them have; without such seeds there is nothing to correct.
        draws: how many.
        seed: of the draws.
    """
    seeds = sorted(set.intersection(*(set(of) for of in runs.values()))) if runs else []
    if not seeds:
        return None
    hashes = {s: next(iter(runs.values()))[s].hashes for s in seeds}
    pictures, codes = np.unique(np.concatenate(list(hashes.values())), return_inverse=True)
    n, start = len(pictures), 0
    # [N, S, 1 + C]: how often a picture lies in a seed's split; how often each candidate is right about it
    table = np.zeros((n, len(seeds), 1 + len(runs)), np.float32)
    for i, s in enumerate(seeds):
        here = codes[start : start + len(hashes[s])]
        start += len(here)
        table[:, i, 0] = np.bincount(here, minlength=n)
        for c, of in enumerate(runs.values(), 1):
            table[:, i, c] = np.bincount(here, weights=of[s].right, minlength=n)
    flat = table.reshape(n, -1)
    naive = _shares(flat.sum(0, keepdims=True), table.shape)[0].max()
    rng = np.random.default_rng(seed)
    bag = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)  # [draws, N]
    inside = _shares(bag @ flat, table.shape)  # [draws, C]
    outside = _shares((bag == 0).astype(np.float32) @ flat, table.shape)
    usable = np.isfinite(inside).all(1) & np.isfinite(outside).all(1)  # a split may be left without pictures
    if not usable.any():
        return None
    inside, outside = inside[usable], outside[usable]
    # Of equals the one is taken that chance names, not the one that was named first.
    best = (inside + rng.random(inside.shape) * 1e-6).argmax(1)
    found = outside[np.arange(len(best)), best]
    lo, hi = np.quantile(found, [0.025, 0.975])
    return Chosen(float(naive), Interval(float(found.mean()), float(lo), float(hi)), len(runs))


def _shares(sums: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Mean over the seeds of the share right: [draws, S * (1 + C)] to [draws, C]; nan where one is empty."""
    by_seed = sums.reshape(len(sums), shape[1], shape[2])
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = (by_seed[:, :, 1:] / by_seed[:, :, :1]).mean(1)
    return share
