"""A network's head solved in place on its frozen features: seconds, and no step size to choose."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.features import features
from headstart.parts.logistic import GRID, Solution, set_head, solve


def solve_head(
    net: nn.Module,
    head: str,
    plain: Iterable[tuple[Tensor, Tensor]],
    val: Iterable[tuple[Tensor, Tensor]],
    *,
    C: float | None = None,
    class_weight: Tensor | None = None,
) -> Solution:
    """Solve the head on the features of the network as it is now, and put the solution in its place.

    Args:
        net: its head is overwritten.
        head: dotted name of the head.
        plain: pictures to learn from, (x [B, C, H, W], y [B]).
        val: pictures to choose C on; empty: by cross-validation.
        C: inverse strength of the penalty on features of unit variance; None: chosen.
        class_weight: [K], multiplies the loss of each picture by its class's weight.

    Raises:
        MethodError: the head is no linear layer on one vector of features per picture.
    """
    module = net.get_submodule(head)
    weight = module.get_parameter("weight")  # [K, D]
    x, y = features(net, head, plain)  # [N, D], [N]
    if x.shape[1] != weight[0].numel():
        raise MethodError(
            f"The head '{head}' takes {weight[0].numel()} features and is given {x.shape[1]} numbers "
            "per picture, so it stands before the pooling and cannot be solved. Use a method that trains it."
        )
    chosen_on = None if C is not None or next(iter(val), None) is None else features(net, head, val)
    grid = GRID if C is None else (C,)
    solution = solve(x, y, weight.shape[0], val=chosen_on, grid=grid, class_weight=class_weight)
    set_head(module, solution)
    return solution
