"""TransTailor: cut the network to the task while fine-tuning it; what is left is small, fast and ordinary.

    1. solve the head on the frozen network; W_o = W
    2. repeat, for rounds r = 1, 2, ...
       weigh   α* = argmin_α L(W ⊙ α)               a gate α for every filter; nothing else learns
       score   β_ij = mean over batches |α_ij · ∂L/∂α_ij|
       prune   the filters with the lowest β of the whole network, until this round's share of FLOPs is gone
       tune    min_W L(W ⊙ β̂)                       β̂ is frozen: what is important learns faster
       stop    if Acc(W_o) - Acc(W) > τ and keep W_o; else W_o = W

Filters that can only go together (`parts.coupling`) have the sum of their scores. In training a filter that
went is masked: it says nothing and receives nothing. `export` really cuts.

With a target, `flops`, `params` or `latency_ms`, the rounds lead there in equal steps; without one each takes
`step` of the FLOPs, and τ decides when to stop. `importance` puts the baselines in the place of the score:
the same rounds, the same FLOPs, no weighing.

Paper: Liu, Wang, Li, Lin, Zhou, Ji, "TransTailor: Pruning the Pre-trained Model for Improved Transfer
Learning", AAAI 2021, arXiv 2103.01542, equations 3 to 6 and algorithm 1. There is no official code.

Differs from the paper:
- the gate stands behind the norm, and BatchNorm keeps its statistics while weighing (the paper does not say).
  Before a norm that looks at the batch a gate has no gradient, and at 0 it takes nothing out.
- α starts at 1 (`init`). Drawn from U(0, 1), as published, it brings deep networks down to chance.
- the gradient of the score is taken batch by batch (`score`): at the α* that is asked for, that of all
  pictures together is nought.
- β̂ is β over its layer's mean, within 0.1 to 10, and is put in without changing what the network says:
  filters are stored as W / β̂ (`mode`). The bare product of equation 6 ("literal") has values of about 1e-5
  and brings the network down to chance.
- α is multiplied into the weights before tuning, as the score was that of the scaled network.
- every layer keeps a tenth of its filters (`floor`), and rounds are judged on validation pictures.
- equal budgets: rounds share the epochs of the run; the paper tunes 40 to 60 epochs in every round. The rate
  is that of the network's family.
- preset `paper` is the published form, where it is known; it is of little use on deep networks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.errors import MethodError
from headstart.method import Batch, Data, Group, Loss, Method, Phase, Preset, Room
from headstart.parts.blank import blank
from headstart.parts.budget import Budget, Kind
from headstart.parts.coupling import find_coupling, stem_of
from headstart.parts.cutting import cut
from headstart.parts.gates import Gates, per_group
from headstart.parts.head import find_head
from headstart.parts.importance import magnitudes, ranks, taylor
from headstart.parts.latency import latency_ms as measured_ms
from headstart.parts.ranking import cheapest_loss, floors, in_order
from headstart.parts.scaled import fold
from headstart.parts.solved import solve_head
from headstart.parts.space import Among, Between

_ROUNDS = 5  # where no target says how many


class TransTailor(Method):
    """Cut the network to the task while fine-tuning it.

    Args:
        flops: target, the share of the network's FLOPs that is left. None: τ decides.
        params: target, the share of its parameters.
        latency_ms: target, milliseconds for one picture on the CPU of the machine that trains.
        importance: "taylor" (the paper), or a baseline: "magnitude" (L2 norm of the filters that go together,
            over their layer's mean), "random", "uniform" (the same share of every layer, by magnitude).
        rounds: how many at most. None: as `step` needs for the target, else 5; never more than the epochs
            allow.
        step: share of the FLOPs that one round takes without a target. 0.1: the paper.
        tau: τ, in points of accuracy. None: 0.3 (the paper) without a target; with one, no round is refused.
        reference: a round is compared with the "last" accepted network (the paper: τ may be lost in every
            round) or with the "best" one.
        weigh_epochs: epochs in which the gates of a round learn, where there are enough. 1: ours.
        finish: share of the tuning epochs that the last round gets. None: half with a target; without one
            all rounds get the same, as any may be the last.
        init: α at the start: "ones", "normal" (1 ± 0.1) or "uniform" (from 0 to 1; the paper).
        score: "mean_of_abs" (batch by batch) or "abs_of_mean" (the paper's equation 5, of all pictures).
        signed: filters that go together have |Σ α ∂L/∂α| instead of the sum of sizes.
        per_layer: divide scores by their layer's mean; the paper compares them as they are.
        mode: what β does in tuning: "reparam" (see above), "grad" (multiplies gradients), "literal"
            (equation 6: multiplies outputs) or "none".
        normalizer: what β is divided by in mode "literal": "none" (the paper), "layer_mean", "layer_max" or
            "global_mean".
        carry_alpha: keep the gates from round to round, instead of multiplying them in and starting at 1.
        alpha_lr: rate of the gates (SGD with momentum 0.9, no decay). 0.05: ours.
        floor: share of its channels that every layer keeps. 0.1: Gate Decorator's code; the paper has none.
        round_to: every layer keeps a multiple of so many channels; 8 suits most processors. 1: ours, exact.
        stem: whether the layer that is given the pictures may lose channels.
        C: inverse strength of the head's L2 penalty when it is solved. None chooses the best on validation:
            filters are weighed by what this head makes of them, and one that is held back says less.
        head_lr: rate of the head, × the body's. 5, as for `lp-ft`; the paper: 10.
    """

    name = "transtailor"
    room: ClassVar[Room] = "reshape"
    paper = "Liu, Wang, Li, Lin, Zhou, Ji, AAAI 2021, arXiv 2103.01542"
    presets = {  # noqa: RUF012
        "paper": Preset(
            "sections 3 and 4: SGD 0.9 at 0.0005 (head 0.005), decay 0.005, 40 epochs a round for ResNet-101 "
            "(60 for VGG-16), to be given as --epochs",
            hyper={
                "init": "uniform",
                "score": "abs_of_mean",
                "mode": "literal",
                "normalizer": "none",
                "carry_alpha": True,
                "step": 0.1,
                "tau": 0.3,
                "reference": "last",
                "floor": 0.0,
                "head_lr": 10.0,
            },
            recipe={
                "optimizer": "sgd",
                "lr": 0.0005,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 0.005,
                "schedule": "constant",
                "warmup": 0.0,
                "label_smoothing": 0.0,
            },
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        flops: Annotated[float, Field(gt=0, le=1)] | None = None,
        params: Annotated[float, Field(gt=0, le=1)] | None = None,
        latency_ms: PositiveFloat | None = None,
        importance: Literal["taylor", "magnitude", "random", "uniform"] = "taylor",
        rounds: PositiveInt | None = None,
        step: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        tau: NonNegativeFloat | None = None,
        reference: Literal["last", "best"] = "last",
        weigh_epochs: NonNegativeInt = 1,
        finish: Annotated[float, Field(ge=0, lt=1)] | None = None,
        init: Literal["ones", "normal", "uniform"] = "ones",
        score: Literal["mean_of_abs", "abs_of_mean"] = "mean_of_abs",
        signed: bool = False,
        per_layer: bool = False,
        mode: Annotated[
            Literal["reparam", "grad", "literal", "none"], Among("reparam", "grad", off="none")
        ] = "reparam",
        normalizer: Literal["none", "layer_mean", "layer_max", "global_mean"] = "layer_mean",
        carry_alpha: bool = False,
        alpha_lr: Annotated[PositiveFloat, Between(0.005, 0.5, log=True)] = 0.05,
        floor: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        round_to: PositiveInt = 1,
        stem: bool = True,
        C: PositiveFloat | None = None,
        head_lr: NonNegativeFloat = 5.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        kind, target = _target(flops, params, latency_ms)
        self.importance, self.rounds, self.reference = importance, rounds, reference
        self.tau = 0.3 if tau is None and target is None else tau
        self.finish = (None if target is None else 0.5) if finish is None else finish
        self.weigh_epochs = weigh_epochs if importance == "taylor" else 0
        self.init, self.score, self.signed, self.per_layer = init, score, signed, per_layer
        self.mode = mode if importance == "taylor" else "none"
        self.normalizer, self.carry_alpha, self.alpha_lr = normalizer, carry_alpha, alpha_lr
        self.round_to, self.C, self.head_lr = round_to, C, head_lr
        weight = self.head_module.get_parameter("weight")
        if len(weight) < 2:
            raise MethodError("transtailor weighs filters by a classification loss; that needs two classes.")
        if self.example is None:
            raise MethodError(
                "transtailor has to see the network run once: give example=..., a batch [1, C, H, W]."
            )
        kept_whole = None if stem else stem_of(self.net, self.example)
        self.coupling = find_coupling(
            self.net, self.head, self.example, spare=lambda name: name == kept_whole
        )
        self.group = self.coupling.group
        self.least = floors(self.coupling.sizes, floor, round_to)
        shape = (int(self.example.shape[1]), int(self.example.shape[2]), int(self.example.shape[3]))
        self.budget = Budget(self.net, self.coupling, shape, self.least, kind=kind, target=target, step=step)
        self.gates = Gates(self.net, self.coupling)
        self.memory["kept"] = self.budget.whole  # m
        self.memory["scores"] = torch.zeros(self.coupling.units)  # β of the last round
        self.memory["rate"] = torch.ones(self.coupling.units)  # β̂ while tuning, else 1
        self.memory["tuning"] = torch.tensor(False)

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """The task loss of what is left of the network, with its gates."""
        return self.loss(self.predict(x), y)

    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, K] of the network without what was pruned."""
        return self._gated(x, None)

    def plan(self, epochs: int) -> list[Phase]:
        """The head; rounds of weighing (only gates learn) and tuning (all else), each judged at its end."""
        head = [group for group in self.groups() if group.name.startswith("head")]
        rule = partial(torch.optim.SGD, lr=self.alpha_lr, momentum=0.9)
        gates = [Group("gates", [self.gates.delta], decay=0.0, rule=rule)]
        phases = [Phase("solve head", 0, head, self.objective, enter=self._solve)]
        rounds = self._rounds(epochs)
        for i, (weigh, tune) in enumerate(rounds, 1):
            begin, prune = partial(self._begin, i), partial(self._prune, i, len(rounds))
            phases.append(Phase(f"weigh {i}", weigh, gates, self.objective, enter=begin))
            everything = self.groups(head_lr=self.head_lr)
            phases.append(Phase(f"tune {i}", tune, everything, self.objective, enter=prune))
        return [*phases, Phase("judge", 0, [], self.objective, enter=self._accept)]

    # ------------------------------------------------------------------ a round

    def _solve(self, data: Data) -> None:
        """W_o: the head that suits the network as it was given."""
        weight = self.criterion.weight if isinstance(self.criterion, nn.CrossEntropyLoss) else None
        solve_head(self.net, self.head, data.plain, data.val, C=self.C, class_weight=weight)

    def _begin(self, i: int, data: Data) -> bool:
        """Judge the round before. Then what it left is multiplied in, and new gates stand open."""
        if i == 1:
            self._begin_judging(data)
            self.budget.require_fast_enough(self.net)
            self._open_gates()
        elif not self._accept(data):
            return False
        elif self.mode == "reparam":
            self.gates.multiply_filters(self.net, self.memory["rate"])  # β̂ · (W / β̂)
        elif self.mode == "literal":  # β stays in the network
            self.gates.multiply_in(self.net, self.gates.of_units(self.memory["rate"]))
            if not self.carry_alpha:
                self.gates.delta.data.zero_()
        self.memory["rate"] = torch.ones_like(self.memory["rate"])
        self.memory["tuning"] = torch.tensor(False)
        return True

    def _prune(self, i: int, rounds: int, data: Data) -> None:
        """Score the units, let the lowest go, and give β its part in the tuning that follows."""
        before = self.memory["kept"].cpu()
        scores = self._scores(data, before)
        ties = self.gates.per_unit(self.gates.alpha.detach().abs()).cpu()
        cost, goal, within = self.budget.goal(self.net, before, i, rounds)
        keep = cheapest_loss(
            in_order(scores, ties),
            self.group,
            before,
            self.least,
            cost,
            goal,
            multiple=self.round_to,
            within=within,
        )
        self.memory["kept"], self.memory["scores"] = keep, scores
        self.memory["tuning"] = torch.tensor(True)
        if self.mode == "literal":  # α is out of the way, β in its place
            self.memory["rate"] = self._normalized(scores, keep)
            self._measure_statistics(data.plain)
            return
        if not self.carry_alpha:
            self.gates.multiply_in(self.net)
        if self.mode != "none":
            relative = scores / per_group(scores, self.group, keep)
            rate = relative.clamp(0.1, 10).where(keep & relative.isfinite(), torch.ones_like(scores))
            self.memory["rate"] = rate
        if self.mode == "reparam":
            self.gates.multiply_filters(self.net, 1 / self.memory["rate"])  # with β̂ it says what it said

    def _scores(self, data: Data, keep: Tensor) -> Tensor:
        """β, or what a baseline has in its place [U]."""
        if self.importance == "random":
            return torch.rand(len(keep))
        if self.importance != "taylor":
            scores = magnitudes(self.gates, self.net, self.group, keep)
            return ranks(scores, self.group) if self.importance == "uniform" else scores
        self.eval()  # BatchNorm by its statistics, as while weighing
        scores = taylor(
            self.gates,
            self._gated,
            lambda logits, y: self.loss(logits, y).total,
            data.plain,
            of_mean=self.score == "abs_of_mean",
            signed=self.signed,
        )
        return scores / per_group(scores, self.group, keep) if self.per_layer else scores

    def _gated(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        given = self._given() if alpha is None else {"alpha": alpha}
        hasten = self.memory["rate"] if self.mode == "grad" else None
        return self.gates.run(self.net, x, self.memory["kept"], hasten=hasten, **given)

    def _given(self) -> dict[str, Tensor]:
        """What β does to the network's outputs while tuning."""
        if self.mode == "reparam":
            return {"rate": self.memory["rate"]}
        if self.mode == "literal" and bool(self.memory["tuning"]):
            return {"alpha": self.gates.of_units(self.memory["rate"])}
        return {}

    def _open_gates(self) -> None:
        with torch.no_grad():
            if self.init == "uniform":
                self.gates.delta.uniform_(-1, 0)
            elif self.init == "normal":
                self.gates.delta.normal_(0, 0.1)

    def _normalized(self, scores: Tensor, keep: Tensor) -> Tensor:
        """β as equation 6 multiplies it in, divided as was asked [U]."""
        by = {
            "none": lambda: torch.ones_like(scores),
            "global_mean": lambda: scores[keep].mean().expand_as(scores),
            "layer_mean": lambda: per_group(scores, self.group, keep),
            "layer_max": lambda: per_group(scores, self.group, keep, largest=True),
        }[self.normalizer]()
        return torch.where(by > 0, scores / by, torch.ones_like(scores))

    @torch.no_grad()
    def _measure_statistics(self, batches: Iterable[Batch]) -> None:
        """BatchNorm's statistics of what stands before it now: the mean over all batches."""
        norms = [m for m in self.net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        momenta = [norm.momentum for norm in norms]
        self.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for x, _ in batches:
            self.predict(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False

    # ------------------------------------------------------------------ judging a round

    def _begin_judging(self, data: Data) -> None:
        accuracy, n = self._accuracy(data.val)
        self.memory["reference"] = torch.tensor(accuracy, dtype=torch.float64)
        self.memory["rounds"] = torch.zeros(
            0, 4, dtype=torch.float64
        )  # FLOPs, parameters, accuracy, accepted
        self.memory["kept_by_round"] = torch.zeros(0, self.coupling.units, dtype=torch.bool)
        if self.tau is None:
            return
        if n == 0:
            raise MethodError(
                "Without a target transtailor stops by validation accuracy, and there are no validation "
                "pictures. Give some, or a target such as flops=0.5."
            )
        if self.tau * n < 100:
            low, high = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
            warnings.warn(
                f"tau = {self.tau:g} points means little on {n} validation pictures, one of which makes "
                f"{100 / n:.2g} points: {accuracy:.1%} may be {low:.1%} to {high:.1%}. Give more of them, a "
                "larger tau, or a target such as flops=0.5.",
                stacklevel=2,
            )
        self._remember()

    def _accept(self, data: Data) -> bool:
        """Note the round that is over. Where it lost more than τ, go back to W_o: False ends the plan."""
        accuracy, n = self._accuracy(data.val)
        reference, kept = float(self.memory["reference"]), self.memory["kept"].cpu()
        accepted = self.tau is None or 100 * (reference - accuracy) <= self.tau + 1e-9
        shares = self.budget.shares(kept)
        noted = [shares["flops"], shares["params"], accuracy if n else -1.0, float(accepted)]
        row = torch.tensor([noted], dtype=torch.float64)
        self.memory["rounds"] = torch.cat([self.memory["rounds"].cpu(), row])
        self.memory["kept_by_round"] = torch.cat([self.memory["kept_by_round"].cpu(), kept[None]])
        if not accepted:
            with torch.no_grad():
                for name, value in self._own().items():
                    value.copy_(self.memory[_place(name)])
            return False
        better = self.reference == "last" or accuracy > reference
        self.memory["reference"] = torch.tensor(accuracy if better else reference, dtype=torch.float64)
        if self.tau is not None:
            self._remember()
        return True

    def _remember(self) -> None:
        """W_o = W."""
        for name, value in self._own().items():
            self.memory[_place(name)] = value

    def _own(self) -> dict[str, Tensor]:
        """All that makes the network what it is."""
        own = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        own |= {name: self.memory[name] for name in ("kept", "scores", "rate", "tuning")}
        return own | {"gates": self.gates.delta.data}

    @torch.no_grad()
    def _accuracy(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Share of right answers, and among how many."""
        self.eval()
        right = seen = 0
        for x, y in batches:
            truth = y if y.ndim == 1 else y.argmax(1)
            right += int((self.predict(x).argmax(1) == truth).sum())
            seen += len(y)
        return (right / seen if seen else 0.0), seen

    def _rounds(self, epochs: int) -> list[tuple[int, int]]:
        """Epochs of weighing and of tuning for every round; they add up to all of them."""
        wanted = self.rounds or self.budget.rounds() or _ROUNDS
        rounds = max(1, min(wanted, epochs // (self.weigh_epochs + 1)))
        weigh = min(self.weigh_epochs, epochs - 1)
        left = epochs - rounds * weigh  # at least one for each
        last = -(-left // rounds) if self.finish is None else max(round(self.finish * left), left // rounds)
        last = left if rounds == 1 else min(last, left - (rounds - 1))
        before = [
            (left - last) * (i + 1) // (rounds - 1) - (left - last) * i // (rounds - 1)
            for i in range(rounds - 1)
        ]
        return [(weigh, tune) for tune in [*before, last]]

    # ------------------------------------------------------------------ what is left

    def export(self) -> nn.Module:
        """The network without the channels that were pruned: ordinary, and really smaller.

        What was cut, and how it came to that, is plain data in its attribute `pruned`; with it and the
        weights a bundle builds the network again.
        """
        net = copy.deepcopy(self.net)
        fold(net, self.gates.factors(self.memory["kept"], **self._given()))
        kept = self.coupling.kept(self.memory["kept"])
        net = cut(net, kept).requires_grad_(True).eval()
        vars(net)["pruned"] = {"kept": kept, "rounds": self._history()}
        return net

    def observe(self) -> dict[str, Any]:
        """Shares of FLOPs and parameters that are left."""
        return dict(self.budget.shares(self.memory["kept"]))

    def diagnostics(self) -> dict[str, Any]:
        """Costs before and after, measured; channels kept by layer and round; accuracy against FLOPs."""
        counts, kept = self.budget.counts, self.memory["kept"]
        sizes = {
            when: {
                "flops": flops,
                "params": sum(p.numel() for p in net.parameters()),
                "bytes": sum(t.numel() * t.element_size() for t in net.state_dict().values()),
                "latency_ms": round(measured_ms(net, self.budget.shape), 3),
            }
            for when, net, flops in (
                ("before", self.net, counts.full),
                ("after", self.export(), counts.flops(kept)),
            )
        }
        return sizes | {
            "channels": dict(zip(self.coupling.layers, self.coupling.sizes, strict=True)),
            "rounds": self._history(),
            "left_as_they_are": dict(self.coupling.left),
        }

    def _history(self) -> list[dict[str, Any]]:
        """Round by round: shares of FLOPs and parameters, accuracy, whether accepted, channels by layer."""
        if "rounds" not in self.memory:
            return []
        made = []
        for row, kept in zip(self.memory["rounds"].tolist(), self.memory["kept_by_round"].cpu(), strict=True):
            counts = torch.bincount(self.group[kept], minlength=len(self.coupling.sizes)).tolist()
            made.append(
                {
                    "flops": row[0],
                    "params": row[1],
                    "accuracy": None if row[2] < 0 else row[2],
                    "accepted": bool(row[3]),
                    "kept": dict(zip(self.coupling.layers, counts, strict=True)),
                }
            )
        return made

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """Whether anything of the network can be cut, and torch-pruning is there to say what."""
        if data["classes"] < 2:
            return "it weighs filters by a classification loss; that needs two classes."
        try:
            find_coupling(net, find_head(net), blank(net, data["img_size"]))
        except MethodError as error:
            return " ".join(str(error).split())
        return None


def _target(flops: float | None, params: float | None, latency_ms: float | None) -> tuple[Kind, float | None]:
    """The one that was given."""
    given: dict[Kind, float | None] = {"flops": flops, "params": params, "latency_ms": latency_ms}
    asked = [(kind, value) for kind, value in given.items() if value is not None]
    if len(asked) > 1:
        names = " and ".join(f"{kind}={value:g}" for kind, value in asked)
        raise MethodError(f"One target at a time: {names} were given.")
    return asked[0] if asked else ("flops", None)


def _place(name: str) -> str:
    """Where a tensor of the accepted network is remembered; no dots, which stand for modules."""
    return f"accepted/{name.replace('.', '/')}"
