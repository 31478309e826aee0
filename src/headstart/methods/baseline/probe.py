"""Linear probe: the network stays as it is, only a linear head is solved. Seconds, not epochs.

    min over W, b of  Σ_i ℓ(W φ(x_i) + b, y_i) + 1/(2C) ‖W‖²,   φ = the frozen network up to its head

φ is computed once per picture and the problem is convex, so the head is solved by L-BFGS instead of
trained; C is chosen on the validation split.

Paper: the linear evaluation protocol of Kornblith, Shlens, Le, CVPR 2019, arXiv 1805.08974, section 4.1
(multinomial logistic regression by L-BFGS, the penalty chosen on a validation split).

Differs from the paper: features are scaled to unit variance before the penalty (folded back into W), the
grid of C is coarser (half decades instead of 45 values), and the head is not refitted on train + val.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import PositiveFloat
from torch import nn

from headstart.method import Data, Method, Phase, Room
from headstart.parts import solved
from headstart.parts.space import Between


def solve_head(method: Method, data: Data, C: float | None) -> None:
    """Solve a method's head on its frozen features and note the chosen penalty in its memory.

    Args:
        method: its network is evaluated as it is now; its head is overwritten.
        data: features come from `data.plain`, C is chosen on `data.val` (cross-validation without one).
        C: inverse strength of the penalty; None: chosen.
    """
    solution = solved.solve_head(
        method.net,
        method.head,
        data.plain,
        data.val,
        C=C,
        class_weight=method.criterion.weight if isinstance(method.criterion, nn.CrossEntropyLoss) else None,
    )
    method.memory["probe_C"] = torch.tensor(solution.C)


def chosen(method: Method) -> dict[str, float]:
    """The penalty that `solve_head` chose, if it has run."""
    if "probe_C" not in method.memory:
        return {}
    return {"C": float(f"{float(method.memory['probe_C']):.6g}")}  # as it stands in the grid, not in float32


class Probe(Method):
    """Solve a linear head on frozen features.

    Args:
        C: inverse strength of the L2 penalty on features of unit variance. None, the default, chooses it
            on the validation split.
    """

    name = "probe"
    room: ClassVar[Room] = "baseline"
    paper = "Kornblith, Shlens, Le, CVPR 2019, arXiv 1805.08974, section 4.1"
    takes_steps = False

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        C: Annotated[PositiveFloat | None, Between(1e-5, 10.0, log=True)] = None,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.C = C

    def plan(self, epochs: int) -> list[Phase]:
        """One phase that is over on entering: the head is solved, and nothing is left to train."""
        head = [group for group in self.groups() if group.name.startswith("head")]
        return [Phase("solve head", epochs, head, self.objective, enter=self._solve)]

    def _solve(self, data: Data) -> bool:
        solve_head(self, data, self.C)
        return False

    def diagnostics(self) -> dict[str, Any]:
        """The penalty that was chosen."""
        return chosen(self)
