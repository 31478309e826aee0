"""FitNets: teach the lower half of a network what another network sees half way up, then teach the whole.

    hint     L_HT = β ‖ u(x) − r(v(x)) ‖²
    distil   L_KD = H(y, p) + λ(t) · H(p_T^τ, p^τ),   p^τ = softmax(logits / τ)
    joint    L    = H(y, p) + β ‖ u(x) − r(v(x)) ‖²

u is the source's map at the hint layer, v the network's at the guided layer, r a regressor that learns with
it. The norm is a mean over channels and positions, every loss one over the batch, and λ falls linearly.
mode="staged" is the paper: first L_HT, which moves the guided layer and what lies below it and nothing above,
then L_KD without r. mode="joint" is what is mostly called FitNets today.

Multiply-adds by a plain step's: 0.56 in L_HT, 1.07 in L_KD, 1.02 jointly (ResNet18 from EfficientNet-lite0,
128 px; bench/fitnets_step.py).

It is made for a network that has no pretrained weights. Where there are some, fine-tuning them is the first
thing to try, and where the source's own architecture will do, fine-tuning the source.

Paper: Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets",
ICLR 2015, arXiv 1412.6550.
Official code: adri-romsor/FitNets (Theano, pylearn2). The joint form: HobbitLong/RepDistiller.

Differs from the paper (where its text could not be checked, from the official code):
- who teaches. There a network that was trained for the same task; here the source usually was not. So kd
  "probe" first solves a linear head for the task on the source's frozen features and distils what that says.
- the hint loss is a mean over channels and positions, so that it bears any recipe's rates; reduction="sum"
  sums over them.
- u and v are divided by their spreads (`norm_maps`; not with the presets), which bears any two networks.
- r is a 1×1 convolution, or nothing where the channels are as many (as in the code), and the larger map is
  averaged down to the size of the smaller. The code's r is a convolution as large as the sizes differ, ends
  in the hint layer's non-linearity, starts at U(-0.05, 0.05) and has bounded kernels.
- λ falls over the shares of the phase that its released configuration has of 500 epochs; decay_in="epochs"
  takes the epochs themselves.
- the optimiser and the length are the run's. The code has RMSProp and stops when validation stands still.
- one pair of layers, found where both networks have the same stride, in the middle of those there are.
- without another network as source both start alike: staged, no epoch goes to a hint; joint, the hint only
  holds the lower half where it started.
- not offered: the hint phase's own early stopping by validation; hints for several layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.method import Batch, Data, Group, Loss, Method, Phase, Preset, Room
from headstart.parts.features import features
from headstart.parts.head import find_head
from headstart.parts.kernels import is_kernel
from headstart.parts.logistic import solve
from headstart.parts.matching import spreads, spreads_of_ours
from headstart.parts.regressor import (
    RegressorName,
    common_size,
    regressor_between,
    resized,
    squared_distance,
)
from headstart.parts.segments import Segments, pairs, segments, uncuttable
from headstart.parts.space import Among, Between

Share = Annotated[float, Field(ge=0, le=1)]


class FitNets(Method):
    """Learn from another network: its features half way up, then its answers.

    Args:
        mode: "staged" (hints, then distillation: the paper) or "joint" (the task and the hint at once).
        regressor: r, from our channels to the source's. "auto": "identity" where they are as many (official
            code), else "conv1x1"; "conv+bn" adds BatchNorm, "conv+bn+relu" fits hints that are never
            negative (RepDistiller).
        pair: guided and hint layer by name, as in "layer2,blocks.2". Empty: the middle one of the pairs with
            equal strides.
        beta: β, weight of the hint. 0.5: L2T-ww's weight of matched features (RepDistiller: 100). Jointly, 5
            gave 2 and 5 points more where both were measured (docs/evidence.md): search it.
        norm_maps: divide the maps of both networks by their spread over the training pictures before the
            first step, so that β means the same whatever the networks. On: ours.
        reduction: "mean" over channels and positions (ours), or their "sum", as the loss is usually written.
        hint_share: share of the epochs that goes to the hint. 0.3: ours.
        kd: whose answers are distilled: the source's own "logits", or those of a linear "probe" that is
            solved for the task on its features; or "none". "auto": "none" if joint; "logits" where the
            network keeps its head and the source has as many classes; else "probe".
        temperature: τ. 3: official code.
        lam: λ at first. 4: official code.
        lam_end: λ at last. 1: official code for CIFAR (MNIST: 0).
        decay_from: when λ begins to fall. 0.01 of the phase: official code, epoch 5 of 500.
        decay_until: when λ has fallen. 0.8 of the phase: official code, epoch 400 of 500.
        decay_in: what these two count: shares of the phase or epochs.
        head_lr: rate of the head and the regressor, × the run's. None: 10, as for `full`; 1 with another
            network as source, for then ours mostly starts from random weights and λ raises the head's
            rate besides.
    """

    name = "fitnets"
    room: ClassVar[Room] = "select"
    paper = "Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550"
    keeps_source = True
    takes_source = True
    presets = {  # noqa: RUF012
        "paper": Preset(
            "the released configuration for CIFAR; AdamW without momentum and decay in place of its RMSProp, "
            "half of the epochs for the hint",
            hyper={
                "mode": "staged",
                "beta": 0.5,
                "reduction": "sum",
                "norm_maps": False,
                "hint_share": 0.5,
                "temperature": 3.0,
                "lam": 4.0,
                "lam_end": 1.0,
                "decay_from": 5.0,
                "decay_until": 400.0,
                "decay_in": "epochs",
                "head_lr": 1.0,
            },
            recipe={
                "optimizer": "adamw",
                "lr": 2.5e-4,  # 0.005, and 0.05 of that for convolutions
                "momentum": 0.0,
                "weight_decay": 0.0,
                "schedule": "constant",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 128,
                "norm": "train",
            },
        ),
        "repdistiller": Preset(
            "RepDistiller's script: joint, 100 × the mean; it divides the rate at 150, 180 and 210 of 240 "
            "epochs, this at two thirds",
            hyper={
                "mode": "joint",
                "regressor": "conv+bn+relu",
                "beta": 100.0,
                "norm_maps": False,
                "kd": "none",
                "head_lr": 1.0,
            },
            recipe={
                "optimizer": "sgd",
                "lr": 0.05,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 5e-4,
                "schedule": "step",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 64,
                "norm": "train",
            },
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        mode: Literal["staged", "joint"] = "staged",
        regressor: RegressorName = "auto",
        pair: str = "",
        beta: Annotated[NonNegativeFloat, Between(0.05, 50.0, log=True, off=0.0)] = 0.5,
        norm_maps: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
        hint_share: Annotated[Share, Among(0.1, 0.3, 0.5, off=0.0)] = 0.3,
        kd: Annotated[Literal["auto", "logits", "probe", "none"], Among("auto", "none", off="none")] = "auto",
        temperature: PositiveFloat = 3.0,
        lam: NonNegativeFloat = 4.0,
        lam_end: NonNegativeFloat = 1.0,
        decay_from: NonNegativeFloat = 0.01,
        decay_until: NonNegativeFloat = 0.8,
        decay_in: Literal["share", "epochs"] = "share",
        head_lr: NonNegativeFloat | None = None,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.mode, self.beta, self.reduction, self.hint_share = mode, beta, reduction, hint_share
        self.norm_maps = norm_maps
        self.temperature, self.lam, self.lam_end = temperature, lam, lam_end
        self.decay_from, self.decay_until, self.decay_in = decay_from, decay_until, decay_in
        self._fresh = classes is not None
        self._alone = given.get("source") is None
        self.head_lr = (10.0 if self._alone else 1.0) if head_lr is None else head_lr
        if self.example is None:
            raise MethodError("fitnets has to see the networks run once: give it an example of [1, C, H, W].")
        example = self.example.to(next(net.parameters()))
        self._ours, self._theirs = self._cut(pair, example)
        self._below = _below(self._ours, example)
        guided, hint = self._ours.boundaries[0], self._theirs.boundaries[0]
        self.regressor = regressor_between(regressor, guided.channels, hint.channels)
        self.regressor.to(next(net.parameters()))
        self.kd = self._whose_answers(kd)

    def plan(self, epochs: int) -> list[Phase]:
        """Staged: the hint for its share of the epochs, then the whole network. Joint: all at once."""
        groups = self.groups(head_lr=self.head_lr)
        rest = partial(Phase, objective=self._follow_task)
        if self.mode == "joint":
            return [rest("joint", epochs, groups + self._regressor(), enter=partial(self._enter, epochs))]
        hint = 0 if self._alone else min(round(self.hint_share * epochs), epochs - 1)
        below = {id(each) for each in self._below}
        lower = [
            group._replace(params=[each for each in group.params if id(each) in below]) for group in groups
        ]
        learning = [group for group in lower + self._regressor() if group.params]
        return [
            Phase("hint", hint, learning, self._follow_hint, enter=self._measure),
            rest("distil", epochs - hint, groups, enter=partial(self._enter, epochs - hint)),
        ]

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """The task, the hint where both go together, and the answers of a teacher where there is one."""
        joint, taught = self.mode == "joint", self.kd == "logits" or "head_weight" in self.memory
        terms: dict[str, Tensor] = {}
        # The source first: what it needed is free again before our own maps have to be kept for backward.
        theirs = self._to_hint(x) if joint or taught else None
        middle = self._ours.run(0, x) if joint else None
        logits = self.net(x) if middle is None else self._ours.run(1, middle)  # [B, K]
        if middle is not None and theirs is not None:
            terms["hint"] = self._hint_loss(middle, theirs)
        if taught and theirs is not None:
            terms["kd"] = self._lambda() * self._kd_loss(logits, self._answers(theirs))
        return self.loss(logits, y, **terms)

    def _follow_task(self, x: Tensor, y: Tensor) -> Loss:
        loss = self.objective(x, y)
        if "seen" in self.memory:
            self.memory["seen"].add_(len(x))
        return loss

    def _follow_hint(self, x: Tensor, y: Tensor) -> Loss:
        """The network up to the guided layer, the source up to the hint layer, and no labels."""
        theirs = self._to_hint(x)  # first, as above
        middle = self._ours.run(0, x)
        hint = self._hint_loss(middle, theirs)
        if self._fresh:  # a fresh head is zero, does not learn here, and says the same of everything
            logits = hint.new_zeros(len(x), _width(self.head_module))
        else:
            with torch.no_grad():
                logits = self._ours.run(1, middle.detach())
        return Loss(hint, logits, {"hint": hint.detach()})

    def _hint_loss(self, middle: Tensor, theirs: Tensor) -> Tensor:
        v, u = self._ours.boundaries[0].to_map(middle), self._theirs.boundaries[0].to_map(theirs)
        if "their_spread" in self.memory:
            v = v / self.memory["our_spread"].to(v.dtype)
            u = u / self.memory["their_spread"].to(u.dtype)
        size = common_size(v, u)
        gap = squared_distance(resized(u, size), self.regressor(resized(v, size)))  # [B, C, h, w]
        return self.beta * (gap.mean() if self.reduction == "mean" else gap.sum() / len(gap))

    def _kd_loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        """H(p_T^τ, p^τ), without the factor τ² that is usual elsewhere."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        soft = (answers.to(wide) / self.temperature).softmax(1)
        return -(soft * (logits.to(wide) / self.temperature).log_softmax(1)).sum(1).mean()

    @torch.no_grad()
    def _to_hint(self, x: Tensor) -> Tensor:
        """What the source has at its hint layer."""
        return self._theirs.run(0, self.source.view(x))

    @torch.no_grad()
    def _answers(self, theirs: Tensor) -> Tensor:
        """The teacher's logits [B, K], from what it has at its hint layer."""
        if self.kd == "logits":
            return self._theirs.run(1, theirs)
        seen: list[Tensor] = []
        head = self.source.net.get_submodule(self._source_head)
        hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(1)))
        try:
            self._theirs.run(1, theirs)
        finally:
            hook.remove()
        return F.linear(seen[0], self.memory["head_weight"], self.memory["head_bias"])

    def _lambda(self) -> Tensor:
        """λ(t), where t is how far the phase has come."""
        if "seen" not in self.memory:
            return torch.tensor(self.lam)
        t = self.memory["seen"] / self.memory["pictures"]  # in epochs
        if self.decay_in == "share":
            t = t / self.memory["epochs"]
        fallen = (t - self.decay_from) / max(self.decay_until - self.decay_from, 1e-9)
        return self.lam + (self.lam_end - self.lam) * fallen.clamp(0, 1)

    def _enter(self, epochs: int, data: Data) -> None:
        """Find out how long the phase is, and solve the teacher's head where it needs one."""
        if self.mode == "joint":
            self._measure(data)
        if self.kd == "none":
            return
        self.memory["seen"] = torch.tensor(0)
        self.memory["pictures"] = torch.tensor(_count(data.train))
        self.memory["epochs"] = torch.tensor(epochs)
        if self.kd == "probe":
            like = next(self.net.parameters())
            weight = self.criterion.weight if isinstance(self.criterion, nn.CrossEntropyLoss) else None
            val = None if next(iter(data.val), None) is None else self._features(data.val)
            head = solve(*self._features(data.plain), _width(self.head_module), val=val, class_weight=weight)
            self.memory["head_weight"], self.memory["head_bias"] = head.weight.to(like), head.bias.to(like)
            self.memory["head_C"] = torch.tensor(head.C)

    def _measure(self, data: Data) -> None:
        """How far both maps vary before the first step, which is what they are counted in."""
        if self.norm_maps and self.beta > 0 and not self._alone:
            views = (self.source.view(x) for x, _ in data.plain)
            self.memory["their_spread"] = spreads(self._theirs, views, norm_tokens=False)
            own = (x for x, _ in data.plain)
            self.memory["our_spread"] = spreads_of_ours(self, self._ours, own, norm_tokens=False)

    def _features(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        return features(self.source.net, self._source_head, ((self.source.view(x), y) for x, y in batches))

    def _whose_answers(self, kd: str) -> str:
        if kd == "none" or (kd == "auto" and self.mode == "joint"):
            return "none"
        self._source_head = self.head if self._alone else find_head(self.source.net)
        ours = _width(self.head_module)
        theirs = _width(self.source.net.get_submodule(self._source_head))
        if kd == "auto":
            return "probe" if self._fresh or ours != theirs else "logits"
        if kd == "logits" and ours != theirs:
            raise MethodError(
                f"kd = 'logits' distils the source's own answers: it has {theirs} classes, the task {ours}. "
                "Use kd = 'probe', which solves a head for the task on its features, or 'none'."
            )
        return kd

    def _cut(self, pair: str, example: Tensor) -> tuple[Segments, Segments]:
        """The network cut behind its guided layer, the source behind its hint layer."""
        ours, theirs = segments(self.net, example), segments(self.source.net, self.source.view(example))
        names = [name.strip() for name in pair.split(",")]
        if not pair:
            try:
                found = pairs(ours.boundaries, theirs.boundaries)
            except MethodError as error:
                raise MethodError(f"{error} Name the two with pair = 'guided,hint'.") from None
            names = [each.name for each in found[(len(found) - 1) // 2]]
        if len(names) != 2:
            raise MethodError(
                f"pair = '{pair}' must name two stages, the guided one of the network and the hint of the "
                "source, such as 'layer2,blocks.2'."
            )
        return ours.cut(names[:1]), theirs.cut(names[1:])

    def _regressor(self) -> list[Group]:
        """What learns with the hint and is thrown away."""
        named = dict(self.regressor.named_parameters())
        kernels = [each for name, each in named.items() if is_kernel(name, each)]
        others = [each for name, each in named.items() if not is_kernel(name, each)]
        groups = [("kernels", kernels, 1.0), ("norms and biases", others, 0.0)]
        return [Group(f"regressor, {n}", each, self.head_lr, decay) for n, each, decay in groups if each]

    def headline(self) -> str:
        """Which mode runs, between which layers, and who teaches."""
        guided, hint = self._ours.boundaries[0].name, self._theirs.boundaries[0].name
        answers = "" if self.kd == "none" else f", answers of the source's {self.kd}"
        if self._alone and self.mode == "staged":
            return f"fitnets, staged: no other network as source, so no hint{answers}"
        return f"fitnets, {self.mode}: the source's {hint} is the hint for {guided}{answers}"

    def observe(self) -> dict[str, Any]:
        """λ, where answers are distilled."""
        return {"lambda": round(float(self._lambda()), 4)} if "seen" in self.memory else {}

    def diagnostics(self) -> dict[str, Any]:
        """What ran: the mode, the pair of layers, the regressor, and who taught."""
        guided, hint = (
            f"{each.name} ({each.channels} × {each.size[0]} × {each.size[1]})"
            for each in (self._ours.boundaries[0], self._theirs.boundaries[0])
        )
        kinds = [type(each).__name__ for each in self.regressor.modules() if not any(each.children())]
        shown = {
            "mode": self.mode,
            "guided": guided,
            "hint": hint,
            "regressor": " ".join(kinds),
            "kd": self.kd,
        }
        solved = {"kd_C": float(f"{float(self.memory['head_C']):.6g}")} if "head_C" in self.memory else {}
        return shown | solved

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """None where the network can be cut behind its stages, else why it cannot."""
        return uncuttable(net, data["img_size"])


def _width(head: nn.Module) -> int:
    return len(head.get_parameter("weight"))


def _count(batches: Iterable[Batch]) -> int:
    """Pictures in an epoch, from the first batch where the number of batches is known."""
    if isinstance(batches, Sized):
        return len(batches) * len(next(iter(batches))[1])
    return sum(len(y) for _, y in batches)


def _below(cut: Segments, example: Tensor) -> list[nn.Parameter]:
    """The parameters that have a part in what goes across the first boundary."""
    apart = copy.deepcopy(cut)  # so that modes and flags of the network itself stay
    named = dict(apart.net.eval().requires_grad_(True).named_parameters())
    with torch.enable_grad():
        out = apart.boundaries[0].to_map(apart.run(0, example))
        grads = torch.autograd.grad(out.sum(), list(named.values()), allow_unused=True)
    part = [name for name, grad in zip(named, grads, strict=True) if grad is not None]
    return [cut.net.get_parameter(name) for name in part]
