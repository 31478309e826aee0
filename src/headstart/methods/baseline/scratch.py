"""No head start: the same network from random weights, to see what the pretrained ones are worth.

    min over θ of  E[ℓ(f_θ(x), y)],   θ starts at random

Paper: He, Girshick, Dollár, "Rethinking ImageNet Pre-training", ICCV 2019, arXiv 1811.08883.

Differs from the paper: at equal epochs, on purpose; the paper shows that with several times as many
epochs and enough data random weights catch up.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import PositiveFloat
from torch import nn

from headstart.method import Method, Phase, Room
from headstart.parts.fresh import reinitialise


class Scratch(Method):
    """Train from random weights.

    Args:
        lr_scale: rate of everything, × the run's. Random weights bear and need larger steps than
            pretrained ones; 10 turns the family's fine-tuning rate into its usual training rate. Where the
            network came with random weights the run's rate is such a one already, and is taken as it is,
            as are the weights: all methods then start from the same.
    """

    name = "scratch"
    room: ClassVar[Room] = "baseline"
    paper = "He, Girshick, Dollár, ICCV 2019, arXiv 1811.08883"
    keeps_statistics = False  # those of the source say nothing about random weights

    def __init__(
        self, net: nn.Module, classes: int | None = None, *, lr_scale: PositiveFloat = 10.0, **given: Any
    ) -> None:
        super().__init__(net, classes, **given)
        self.lr_scale = lr_scale
        if self.pretrained:
            reinitialise(self.net)

    def plan(self, epochs: int) -> list[Phase]:
        """One phase: everything learns."""
        scale = self.lr_scale if self.pretrained else 1.0
        groups = self.groups(body_lr=scale, head_lr=scale)
        return [Phase("train", epochs, groups, self.objective)]
