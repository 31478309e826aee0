"""L2T-w and L2T-ww: learn which channels to match, and between which layers, by what it did to the task loss.

    L_total = L_org(θ; x, y) + L_wfm(θ; x, φ)
    L_wfm   = β Σ_(m,n) mean_b  λ_mn(x_b; φ) Σ_c w_mn,c(x_b; φ) · mean_ij (S^m(x_b) − r_mn(T^n(x_b)))²_c,ij
    w = softmax(f_mn(mean_ij S^m)),   λ = ReLU6(g_mn(mean_ij S^m))

S^m are the source's maps, brought to the size of T^n, those of the network that learns; r is a 1×1
convolution that learns with it, f and g are linear, and φ are their weights. In l2t-w λ = 1. For every batch:

    θ ← one step of SGD on L_total
    θ_0 = θ,  θ_t+1 = θ_t one step on L_wfm, T times,  θ_T+1 = θ_T one step on L_org
    φ ← one step of Adam on L_org(θ_T+1; x, y), through all T + 1 steps;  θ_1 ... θ_T+1 are forgotten

These steps carry SGD's momentum and weight decay on. Here all of it is one objective: the step on L_total can
be foreseen exactly, so the way ahead starts behind it, and `backward` hands out gradients that are known by
then. That holds for SGD, Nesterov's too, and for steps of one batch without clipping: otherwise there is an
error or a warning. A run takes SGD unless another is asked for. Outside a phase, or before it has its
optimiser, φ gets no gradient.

What a step takes, in multiply-adds of a plain one (bench/l2t_step.py; the official code takes 19.3 with T = 2
where ResNet18 learns from ResNet34):

    T                                           0     1     2     5     2, replay   2, every 4th
    ResNet18 from ResNet34, 224 px            1.9   8.7  12.4  23.2         14.8            4.5
    ResNet18 from EfficientNet-lite0, 128 px  1.1   7.7  10.9  20.5         13.0            3.6

It is made for a network that has no pretrained weights. Where there are some, fine-tuning them is the first
thing to try, and where the source's own architecture will do, fine-tuning the source.

Paper: Jang, Lee, Hwang, Shin, "Learning What and Where to Transfer", ICML 2019, arXiv 1905.05901.
Official code: alinlab/L2T-ww.

Differs from the paper, of which the official code is taken as the full statement:
- S^m and T^n are divided by their spreads (`norm_maps`; not with preset `paper`). Those of EfficientNet-lite0
  are so large that its own training with the code's β = 0.5 ended in nan at the sixth step.
- stages are found in any network, and "all" pairs have strides within a factor of 4; with preset `paper` they
  are the code's 16 for two ResNets. Maps of tokens are normalised at each position (`norm_tokens`).
- BatchNorm's running statistics see no virtual step; in the code the first one leaks in, as with parity=true.
- dropout draws new masks at every virtual step; the code's networks have none.
- norms and biases do not decay unless decay=all. Rate, schedule (the code's falls once an epoch) and length
  are the run's; the rate of φ stays the same throughout.
- l2t-ww[what=false] takes the mean over channels; the code, which never gets there, has their sum.
- l2t-w[what=false] is feature matching: everything counts the same, nothing is looked ahead.
- in several processes the steps ahead are those of the joined batch; the code knows one process.
- not offered: a batch of its own for φ, another β or loss for the steps ahead, several sources. Pictures have
  one size for both networks, and the source's maps are brought to ours bilinearly, as in the code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from headstart.errors import MethodError, TrainingError
from headstart.method import Batch, Data, Group, Loss, Method, Phase, Preset, Room
from headstart.parts.lookahead import Path, apart, averaged, derivative, look_ahead, norm, planted, said_with
from headstart.parts.matching import (
    Chooser,
    Student,
    candidates,
    evenness,
    maps_of,
    mismatch,
    spreads,
    spreads_of_ours,
    to_size,
)
from headstart.parts.segments import segments, uncuttable
from headstart.parts.space import Between

_SHOWN = (
    "lambda",
    "entropy",
    "at_0",
    "at_6",
)  # of w by its largest value; share of pictures where λ saturates
_KEEP = 0.9  # what is shown is about the last ten batches


class Transfer(Method):
    """What l2t-w and l2t-ww share; abstract.

    Args:
        T: steps on L_wfm that are looked ahead. 2: official code and paper. 0 leaves φ to its decay.
        beta: β, weight of the matching. 0.5: official code.
        what: learn w; without it all channels count the same.
        pairs: "all" (every stage to every stage), "one2one" (equal strides), "single" (the last of those), or
            by number, source first: "1-1,2-3". "auto": all for l2t-ww, one2one for l2t-w.
        reach: "all" means all whose strides are within this factor. 4: ours; 8 takes all 16 of two ResNets.
        meta_lr: rate of φ, the same throughout. 1e-4: official code. 0 leaves φ where it starts.
        meta_decay: weight decay of φ. 1e-4: official code.
        every: look ahead at every so many batches only. 1: official code; more is cheaper, and φ slower.
        replay: run the steps again on the way back instead of holding their graphs: less memory, more time.
        parity: let BatchNorm's running statistics see the first step ahead, as in the official code.
        norm_maps: divide the maps of both networks by their spread over the training pictures before the
            first step, a number for each stage, so that β means the same whatever the networks. On: ours.
        norm_tokens: normalise maps made of tokens over their channels, at each position. On: ours.
        decay: what the run's weight decay is for: "kernels", or "all" (official code).
        head_lr: rate of head and regressors, × the run's. 1: official code.
    """

    room: ClassVar[Room] = "select"
    paper = "Jang, Lee, Hwang, Shin, ICML 2019, arXiv 1905.05901"
    keeps_source = True
    takes_source = True
    follows = "sgd"
    where: ClassVar[bool]  # learn λ
    presets = {  # noqa: RUF012
        "paper": Preset(
            "the official code at 224 pixels, where ResNet34 teaches ResNet18 from scratch for 200 epochs",
            hyper={
                "T": 2,
                "beta": 0.5,
                "reach": 8.0,
                "norm_maps": False,
                "decay": "all",
                "head_lr": 1.0,
            },
            recipe={
                "optimizer": "sgd",
                "lr": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
                "schedule": "cosine",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 64,
                "norm": "train",
            },
        )
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        T: NonNegativeInt = 2,
        beta: Annotated[NonNegativeFloat, Between(0.05, 5.0, log=True, off=0.0)] = 0.5,
        what: bool = True,
        pairs: str = "auto",
        reach: PositiveFloat = 4.0,
        meta_lr: Annotated[NonNegativeFloat, Between(1e-5, 1e-2, log=True)] = 1e-4,
        meta_decay: NonNegativeFloat = 1e-4,
        every: PositiveInt = 1,
        replay: bool = False,
        parity: bool = False,
        norm_maps: bool = True,
        norm_tokens: bool = True,
        decay: Literal["kernels", "all"] = "kernels",
        head_lr: NonNegativeFloat = 1.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        if self.example is None:
            raise MethodError(f"{self.name} has to see both networks run once. Give example=, one picture.")
        self.T, self.beta, self.every, self.replay, self.parity = T, beta, every, replay, parity
        self.meta_lr, self.meta_decay = meta_lr, meta_decay
        self.norm_maps, self.norm_tokens = norm_maps, norm_tokens
        self.decay, self.head_lr = decay, head_lr
        ours, theirs = segments(net, self.example), segments(self.source.net, self.source.view(self.example))
        asked = ("all" if self.where else "one2one") if pairs == "auto" else pairs
        chosen = candidates(theirs.boundaries, ours.boundaries, asked, reach=reach)
        self.pairs = [(theirs.boundaries[m], ours.boundaries[n]) for m, n in chosen]
        self._theirs = theirs.cut({m.name for m, _ in self.pairs})
        self._ours = ours.cut({n.name for _, n in self.pairs})
        like = next(net.parameters())
        self.regressors = nn.ModuleList(nn.Conv2d(n.channels, m.channels, 1) for m, n in self.pairs).to(like)
        self.choosers = nn.ModuleList(
            Chooser(m.channels, what=what, where=self.where) for m, _ in self.pairs
        ).to(like)
        self._phi = list(self.choosers.parameters())
        self._learns = bool(self._phi) and meta_lr > 0 and beta > 0
        self._optimizers: list[Optimizer] | None = None  # None: nobody said how the weights will move
        self._looked = False  # since φ's last step
        self._warned = False
        self._foreseen: Tensor | None = None  # the norm of the gradient that the next step is to be made with

    def plan(self, epochs: int) -> list[Phase]:
        """One phase; φ learns by a rule of its own."""
        groups = self.groups(head_lr=self.head_lr)
        kernels, biases = ([getattr(r, kind) for r in self.regressors] for kind in ("weight", "bias"))
        groups.append(Group("regressors, kernels", kernels, self.head_lr))
        groups.append(Group("regressors, biases", biases, self.head_lr, 0.0))
        if self.decay == "all":
            groups = [group._replace(decay=1.0) for group in groups]
        if not self._learns:
            return [Phase("match", epochs, groups, self.objective, enter=self._begin)]
        groups.append(Group("choosers", self._phi, rule=self._adam))
        return [Phase("match", epochs, groups, self.objective, enter=self._begin, bind=self._bind)]

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """Task and matching loss; in a phase with its optimiser also the gradient of φ, by looking ahead."""
        try:
            return self._objective(x, y)
        except torch.OutOfMemoryError as error:
            ahead, less = "", ""
            if self._learns and self.T:
                ahead = f", looking {self.T} steps ahead"
                less = ", a smaller T" if self.replay else ", a smaller T or replay=true"
            raise TrainingError(
                f"Out of memory: {self.name} matches {len(self.pairs)} pairs{ahead}. "
                f"Set fewer pairs{less}, or use a smaller --batch-size."
            ) from error

    def _objective(self, x: Tensor, y: Tensor) -> Loss:
        theirs, chosen = self._source_says(x)
        choices = [each.detach() for each in chosen]  # per pair shares [B, C] and strength [B]
        student = self._student()
        maps, logits = student(x)
        both = zip(self.pairs, maps, strict=True)
        goals = [to_size(theirs[m.name], ours.shape[2:]) for (m, _), ours in both]
        loss = self.loss(logits, y, match=self._match(goals, maps, choices))
        if self._phase is None or self._optimizers is None or not torch.is_grad_enabled():
            return loss
        turn = self.every == 1 or int(self.memory["batches"][0]) % self.every == 0
        self._note(choices, turn)
        self._looked |= turn
        if not turn or self.T == 0:
            nothing = [torch.zeros_like(each) for each in self._phi]
            return loss._replace(total=planted(loss.total, self._phi, nothing))
        return self._look(loss, student, (x, y), goals, chosen)

    def headline(self) -> str:
        """How many pairs of layers, and how far it looks ahead."""
        n = len(self.pairs)
        matched = f"{self.name} matches {n} pair{'s' if n > 1 else ''} of layers"
        return f"{matched} and looks {self.T} steps ahead" if self._learns else matched

    def observe(self) -> dict[str, Any]:
        """What φ chose lately, pair by pair; how often it was looked ahead, and how often in vain."""
        if "chosen" not in self.memory or not self.memory["chosen"][0, -1]:
            return {}
        seen = self.memory["chosen"]
        pairs = [
            {"source": m.name, "net": n.name} | dict(zip(_SHOWN, values, strict=True))
            for (m, n), values in zip(self.pairs, (seen[:, :-1] / seen[:, -1:]).tolist(), strict=True)
        ]
        _, looked, lost = self.memory["batches"].tolist()
        return {"pairs": pairs, "look_aheads": looked, "lost": lost}

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """None where the network can be cut behind its stages, else why it cannot."""
        return uncuttable(net, data["img_size"])

    # ------------------------------------------------------------------ matching

    def _source_says(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The source's maps [B, C, h, w] by stage; for each pair shares [B, C] and strength [B]."""
        with torch.no_grad():
            maps = maps_of(self._theirs, self.source.view(x), norm_tokens=self.norm_tokens)
        if "their_spread" in self.memory:
            spread = self.memory["their_spread"].to(x.dtype)
            maps = {stage: seen / by for (stage, seen), by in zip(maps.items(), spread, strict=True)}
        with torch.autocast(x.device.type, enabled=False):
            both = zip(self.choosers, self.pairs, strict=True)
            return maps, [each for choose, (m, _) in both for each in choose(maps[m.name].mean((2, 3)))]

    def _student(self) -> Student:
        stages = [n for _, n in self.pairs]
        spread = self.memory.get("our_spread")
        return Student(self._ours, self.regressors, stages, norm_tokens=self.norm_tokens, spread=spread)

    def _theta(self) -> list[nn.Parameter]:
        return [each for each in self._student().parameters() if each.requires_grad]

    def _match(self, goals: Sequence[Tensor], maps: Sequence[Tensor], choices: Sequence[Tensor]) -> Tensor:
        each = zip(goals, maps, choices[::2], choices[1::2], strict=True)
        return self.beta * torch.stack([mismatch(*pair) for pair in each]).sum()

    # ------------------------------------------------------------------ looking ahead

    def _look(
        self, loss: Loss, student: Student, batch: Batch, goals: list[Tensor], chosen: list[Tensor]
    ) -> Loss:
        """The loss with all its gradients: that of θ, and that of φ where the step on it will have led."""
        assert self._optimizers is not None
        (x, y), device = batch, batch[0].device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise MethodError(
                f"{self.name} cannot look ahead in fp16, which scales losses. Use bf16 or fp32."
            )
        weights = self._theta()
        choices = [each.detach().requires_grad_() for each in chosen]
        leak = self.parity

        def match(values: list[Tensor]) -> Tensor:
            nonlocal leak
            leaks, leak = leak, False
            maps, _ = said_with(values, student, x, task=leaks, leave_trace=leaks)
            return self._match(goals, maps, choices)

        def task(values: list[Tensor]) -> Tensor:
            return self.loss(said_with(values, student, x, match=False)[1], y).total

        path = Path(self._optimizers, weights)
        first = averaged(derivative([loss.total], weights))
        path.step(first)
        outcome = look_ahead(path, [match] * self.T + [task], task, choices, replay=self.replay)
        gradients = derivative(chosen, self._phi, outcome.gradients)
        good = torch.stack([outcome.value.isfinite(), *(each.isfinite().all() for each in gradients)]).all()
        if averaged([good.float()])[0] < 1:  # in one process is in all: φ must stay the same everywhere
            self._looked = False
            self.memory["batches"][2] += 1
            gradients = [torch.zeros_like(each) for each in gradients]
        self._foreseen = norm(first)
        total = planted(loss.total.detach(), [*weights, *self._phi], [*first, *gradients])
        return loss._replace(total=total)

    def _note(self, choices: Sequence[Tensor], turn: bool) -> None:
        """Remember what φ chose, the same in all processes."""
        seen = [
            torch.stack([s.mean(), evenness(w), (s <= 0).to(s).mean(), (s >= 6).to(s).mean(), s.new_ones(())])
            for w, s in zip(choices[::2], choices[1::2], strict=True)
        ]
        into = self.memory["chosen"]
        into.lerp_(averaged([torch.stack(seen).to(into)])[0], 1 - _KEEP)
        batches = self.memory["batches"]
        batches += batches.new_tensor([1, turn and self.T > 0, 0])

    def _begin(self, data: Data) -> None:
        if self.norm_maps and self.beta > 0:
            views = (self.source.view(x) for x, _ in data.plain)
            self.memory["their_spread"] = spreads(self._theirs, views, norm_tokens=self.norm_tokens)
            own = (x for x, _ in data.plain)
            self.memory["our_spread"] = spreads_of_ours(self, self._ours, own, norm_tokens=self.norm_tokens)
        if not self._learns:
            return
        self.memory["chosen"] = torch.zeros(len(self.pairs), len(_SHOWN) + 1)
        self.memory["batches"] = torch.zeros(3, dtype=torch.int64)  # all, looked ahead at, of these in vain

    def _bind(self, optimizer: Optimizer) -> None:
        self._optimizers, self._foreseen = apart(optimizer), None
        Path(self._optimizers, self._theta())  # says now, not at the first batch, that it cannot be followed
        optimizer.register_step_pre_hook(self._compare)

    def _compare(self, *_: Any) -> None:
        """Before the real step: is it the one that was foreseen?"""
        if self._foreseen is None:
            return
        made = norm([each.grad for each in self._theta() if each.grad is not None])
        same, self._foreseen = torch.allclose(made, self._foreseen, rtol=1e-3, equal_nan=True), None
        if not same and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name} looked ahead from another step than is made: gradients were clipped, or are of"
                " several micro-batches. Its choices learn from an approximation.",
                stacklevel=2,
            )

    def _adam(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = Adam(groups, lr=self.meta_lr, weight_decay=self.meta_decay)
        optimizer.register_step_pre_hook(self._before_phi)
        return optimizer

    def _before_phi(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.meta_lr  # a schedule is meant for θ
            for each in group["params"]:
                each.grad = each.grad if self._looked else None  # None is left alone, zero would still decay
        self._looked = False


@final
class L2TW(Transfer):  # noqa: D101  # described by what it shares
    name = "l2t-w"
    where = False


@final
class L2TWW(Transfer):  # noqa: D101
    name = "l2t-ww"
    where = True
