"""How the learning rate goes over the steps of a phase, as a factor of its peak."""

from __future__ import annotations

import math

from headstart.records import Schedule


def factor(kind: Schedule, step: int, steps: int, warmup: float) -> float:
    """The rate at one step, as a share of the peak rate.

    Args:
        kind: "cosine" falls to 0 along half a cosine; "step" falls to a tenth after two thirds of the steps
            (the L2-SP and DELTA schedule); "constant" does not fall.
        step: 0 for the first step of the phase.
        steps: how many the phase has.
        warmup: share of the steps over which the rate first rises in a line; the first step is not 0.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if kind == "constant":
        return 1.0
    if kind == "step":
        return 1.0 if step < round(steps * 2 / 3) else 0.1
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
