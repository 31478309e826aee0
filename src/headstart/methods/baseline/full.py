"""Plain fine-tuning: every weight learns, from a fresh head.

    min over θ of  E[ℓ(f_θ(x), y)],   θ starts at θ⁰

Paper: the practice everybody compares with; as a strong baseline in Kornblith, Shlens, Le,
"Do Better ImageNet Models Transfer Better?", CVPR 2019, arXiv 1805.08974.

Differs from the paper: the recipe (optimiser, rate, length) is that of the network's family, see
`headstart.nets.recipe`, and the head starts at zero and learns at ten times the body's rate.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import NonNegativeFloat, PositiveFloat
from torch import nn

from headstart.method import Method, Phase, Room
from headstart.parts.space import Among


class Full(Method):
    """Fine-tune everything.

    Args:
        head_lr: rate of the fresh head, × the body's. 10 is the usual ratio where the head was not solved
            beforehand (TLlib's scripts, DELTA's and Co-Tuning's recipes).
        layer_decay: γ, the body's rate falls by this factor per stage (or block) below the head. 1 is plain.
    """

    name = "full"
    room: ClassVar[Room] = "baseline"
    paper = "Kornblith, Shlens, Le, CVPR 2019, arXiv 1805.08974"

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        head_lr: NonNegativeFloat = 10.0,
        layer_decay: Annotated[PositiveFloat, Among(1.0, 0.9, 0.75, off=1.0)] = 1.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.head_lr = head_lr
        self.layer_decay = layer_decay

    def plan(self, epochs: int) -> list[Phase]:
        """One phase: everything learns."""
        groups = self.groups(head_lr=self.head_lr, layer_decay=self.layer_decay)
        return [Phase("fine-tune", epochs, groups, self.objective)]
