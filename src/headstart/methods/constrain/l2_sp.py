"""L2-SP: decay the weights towards where they started, not towards zero.

    J(w) + α/2 · ‖w_S − w⁰_S‖² + β/2 · ‖w_S̄‖²

S are the weights shared with the source network, S̄ those of the new head, w⁰ the source's values. Both
norms sum over all elements, with no division by the number of weights, layers or pictures. The penalty is
part of the loss (coupled: its gradient goes through the momentum like that of the data), and takes the
place of weight decay.

Paper: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018, arXiv 1802.01483.
Official code: holyseven/TransferLearningClassification (TensorFlow 1, MIT), penalty mode 1.

Differs from the paper:
- which weights: the formula speaks of all shared weights; the official code's scripts penalise kernels
  only, no biases and no BatchNorm scales. `params="kernels"` (default) follows the code, `params="all"`
  the formula.
- α has no single published value. 0.01 is the code's default; its script for a target that is close to
  the source (Stanford Dogs) uses 0.1. The pull of one step is rate × α, so α cannot be read without it.
- the optimiser, the schedule and the rates are the run's, as for every other method; preset `paper`
  restores the paper's.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.method import Loss, Method, Phase, Preset, Room
from headstart.parts.anchor import Anchor
from headstart.parts.kernels import is_kernel


class L2SP(Method):
    """Fine-tune with a quadratic pull towards the source weights.

    Args:
        alpha: α, strength of the pull on the weights shared with the source. 0.01: default of the official
            code (Dogs script: 0.1).
        beta: β, strength of the decay of the new head. 0.01: the paper found it best throughout.
        params: which weights are pulled: "kernels" (two or more dimensions, no learned tokens; the official
            code) or "all" (also norms, biases and tokens; the paper's formula, and TLlib).
        body_lr: rate of the body, × the run's. 1.
        head_lr: rate of the head, × the run's. 10, as for `full`, so that the two differ by the penalty only.
    """

    name = "l2-sp"
    room: ClassVar[Room] = "constrain"
    paper = "Li, Grandvalet, Davoine, ICML 2018, arXiv 1802.01483"
    keeps_source = True
    presets = {  # noqa: RUF012
        "paper": Preset(
            "ICML 2018 and its code: SGD 0.9 without Nesterov, one rate of 0.01, ÷10 at two thirds, batch 64",
            hyper={"alpha": 0.01, "beta": 0.01, "params": "kernels", "body_lr": 1.0, "head_lr": 1.0},
            recipe={
                "optimizer": "sgd",
                "lr": 0.01,
                "momentum": 0.9,
                "nesterov": False,
                "schedule": "step",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 64,
                "norm": "train",
            },
        ),
        "tllib": Preset(
            "Transfer-Learning-Library's script: all weights, body at a tenth of the rate, batch 48",
            hyper={"alpha": 0.01, "beta": 0.01, "params": "all", "body_lr": 0.1, "head_lr": 1.0},
            recipe={
                "optimizer": "sgd",
                "lr": 0.01,
                "momentum": 0.9,
                "nesterov": True,
                "schedule": "step",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 48,
                "norm": "train",
            },
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        alpha: NonNegativeFloat = 0.01,
        beta: NonNegativeFloat = 0.01,
        params: Literal["kernels", "all"] = "kernels",
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.alpha, self.beta = alpha, beta
        self.body_lr, self.head_lr = body_lr, head_lr
        # Tied weights under all their names: which one comes first may change with the head.
        start = dict(self.source.net.named_parameters(remove_duplicate=False))
        fresh = {id(each) for each in self.head_module.parameters()} if classes is not None else set()
        unmatched = []
        self._shared: list[nn.Parameter] = []  # S
        self._start: list[Tensor] = []  # w⁰, the source's own storage: follows it to any device
        self._new: list[nn.Parameter] = []  # S̄
        for name, parameter in self.net.named_parameters():
            if params == "kernels" and not is_kernel(name, parameter):
                continue
            here = start.get(name)
            if id(parameter) in fresh:
                self._new.append(parameter)
            elif here is not None and here.shape == parameter.shape:
                self._shared.append(parameter)
                self._start.append(here)
            else:
                self._new.append(parameter)
                unmatched.append(name)
        if not self._shared:
            raise MethodError(
                "l2-sp found no weight that the network shares with its source by name and shape."
            )
        if unmatched:
            warnings.warn(
                f"l2-sp: the source has no weight of this name and shape, so these decay like a new head: "
                f"{', '.join(unmatched[:5])}{' ...' if len(unmatched) > 5 else ''}.",
                stacklevel=2,
            )

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """Task loss, the pull to the source and the decay of the head."""
        shared = Anchor.apply(self.alpha, len(self._shared), *self._shared, *self._start)
        new = Anchor.apply(self.beta, len(self._new), *self._new)
        return self.loss(self.net(x), y, shared=shared, new=new)

    def plan(self, epochs: int) -> list[Phase]:
        """One phase; the penalties take the place of weight decay."""
        groups = self.groups(body_lr=self.body_lr, decay=0.0, head_lr=self.head_lr)
        return [Phase("fine-tune", epochs, groups, self.objective)]

    def membership(self) -> dict[str, int]:
        """How many numbers are pulled to the source, decayed as new, and left alone."""
        shared = sum(each.numel() for each in self._shared)
        new = sum(each.numel() for each in self._new)
        free = sum(each.numel() for each in self.net.parameters()) - shared - new
        return {"shared": shared, "new": new, "free": free}
