"""Hybrid Forward: let the student's and a frozen teacher's segments take turns in front of the task loss.

    L = L₃ + w₁·L₁ + w₂·L₂,    L_i = task loss of path i on the same pictures

Both networks are cut at K boundaries of equal stride into segments s_0 … s_K and t_0 … t_K.

    path 1:  s_0 → t_1 → s_2 → …      path 2:  t_0 → s_1 → t_2 → …      path 3:  s_0 → s_1 → … → s_K

Where channels differ, a 1×1 convolution leads across. The teacher learns nothing, but gradients pass through
it: what the student makes has to be of use to the teacher, and the other way round. Being the same loss on
the same labels, the three can be weighed against each other while training (no gradient through w):

    w_i = clip(κ/2 · m₃ / m_i, 0, w_max),    m_i = running mean of L_i with rate ρ

so that both transfer terms together count as much as the task. Only path 3 is left after training.

A step takes 2.1 plain steps' multiply-adds in a ResNet50 that is its own teacher, and keeps 1.5 times as much
for its backward pass, beside the teacher's weights (bench/hybrid_step.py).

Paper: Song, Wu, Yang, Zhang, Li, Yuan, AAAI 2021.
Official code: none was found for the paper. lsongx/dali-cls, the first author's repository, has the three
paths for compression on ImageNet, with weights that are set by hand.

From the abstract and a survey article: three paths, whose alternation updates every other layer of the
student; all three end in the head of the task, so that their losses can be compared; weights that are
computed while training, to make transfer and task equally important.
From the first author's repository: two cuts, behind the stages of stride 8 and 32; 1×1 adapters with bias
and without norm or activation, left out where channels are equal; running statistics of the student moved by
path 3 only; gradients through the teacher. Preset `author` restores what else it does.
Reconstruction, that is ours: the formula of the weights above (the survey shows its own as a picture that
could not be read), their limits, `balance="joint"`, and the student's head at the end of both crossing paths.

Differs from the paper:
- its text was not at hand; what is known of it is listed above, and no figure of it is quoted.
- the teacher is evaluated with its own BatchNorm statistics. The first author's repository leaves it in
  training mode, where it also drifts; `teacher_bn="batch"` normalises as there, and moves nothing.
- the source network is the teacher where no other is given: fine-tuning, where the repository compresses.
- maps and tokens (a convolutional network and a transformer) meet over 3×3 convolutions, as for the
  repository's DeiT, here with a norm that needs no batch, and at one cut in place of one drawn anew.
- in a plain transformer a stride stands for a depth, and a stride that is not there for the nearest that is;
  the ends of both backbones belong together, with maps resized where their strides differ.
- path 1 begins with what path 3 made of the same pictures, unless dropout or the like had a part in it: the
  numbers are the same, and a step takes a third less time.
- other ways to find the weights, none of them from the paper: the first author's hand-set ones, fixed
  ("static") or falling by the epoch ("schedule", which stands in the repository as a comment), and rules that
  are known from learning several tasks ("rates", "norms", "cosine"). Learned variances are not among them:
  they lead every w_i · L_i to 1 and know nothing of the task's loss.
- not offered: segments swapped at random; detection and segmentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.method import Data, Group, Loss, Method, Phase, Preset, Room
from headstart.parts.balance import Balance, Rule
from headstart.parts.blank import blank
from headstart.parts.crossing import Crossing
from headstart.parts.influence import influence
from headstart.parts.kernels import is_kernel
from headstart.parts.segments import Boundary, Segments, pairs, segments
from headstart.parts.space import Between
from headstart.parts.statistics import batch_statistics, uses_batch

Side = Literal["net", "source"]


class HybridForward(Method):
    """Fine-tune along three paths, two of which cross a frozen network.

    That is the source, or another network that is given as one.

    Args:
        cuts: strides of the stages to cut behind, such as "8 32", or "all". 8 and 32: the first author's.
        balance: how w₁ and w₂ are found: "dynamic" (each by its own loss; ours), "joint" (one for both,
            κ · m₃ / (m₁ + m₂)), "static" (1 - α, the first author's), "schedule" (κ times 0.8, then 0.4, 0.1
            and 0 from 1/3, 1/2 and 2/3 of the epochs on, the first author's), "rates" (by how fast each loss
            falls), "norms" (κ/2 · ‖∇L₃‖ / ‖∇L_i‖) or "cosine" (κ/2 where L_i pulls the way L₃ does, else 0);
            the last two look at gradients in every 50th step.
        kappa: κ, what both transfer terms count for together, × the task. 1: "equally important".
        rho: ρ, share of the running means that stays at each step. 0.9: ours.
        w_max: largest w. 1: ours.
        ramp: steps over which κ grows from nothing. 0: at once, as the losses start alike. Ours; about an
            epoch of steps is worth a try where adapters are new.
        alpha: α of "static". 0.9: the first author's for a student that differs much, 0.7 for another.
        ending: where the crossing path ends whose last turn is the teacher's: "shared" (in the student's
            head), "teacher" (in the teacher's own; the classes must be the same) or "new" (in a fresh head on
            the teacher's features).
        teacher_bn: the teacher's BatchNorm: "eval" (its own statistics) or "batch" (the batch's).
        adapter_lr: rate of the adapters, × the run's. 1: the first author's.
        body_lr: rate of the student's body, × the run's. 1.
        head_lr: rate of fresh heads, × the run's. 10, as for `full`: the two differ by the paths only.
    """

    name = "hybrid-forward"
    room: ClassVar[Room] = "constrain"
    paper = "Song, Wu, Yang, Zhang, Li, Yuan, AAAI 2021"
    keeps_source = True
    takes_source = True
    presets = {  # noqa: RUF012
        "author": Preset(
            "the first author's repository, but for its recipe, which is for ImageNet from scratch: fixed "
            "weights, the teacher's own head (the classes must be the same), batch statistics in the teacher",
            hyper={
                "balance": "static",
                "alpha": 0.9,
                "ending": "teacher",
                "teacher_bn": "batch",
                "cuts": "8 32",
            },
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        cuts: str | int = "8 32",
        balance: Rule = "dynamic",
        kappa: Annotated[NonNegativeFloat, Between(0.05, 5.0, log=True, off=0.0)] = 1.0,
        rho: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        w_max: NonNegativeFloat = 1.0,
        ramp: NonNegativeInt = 0,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
        ending: Literal["shared", "teacher", "new"] = "shared",
        teacher_bn: Literal["eval", "batch"] = "eval",
        adapter_lr: NonNegativeFloat = 1.0,
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        if balance == "static":
            self.balance = Balance("static", 2 * (1 - alpha), rho)
        else:
            self.balance = Balance(balance, kappa, rho, w_max, ramp)
        self.balance.begin(self.memory)
        self.off = not self.balance.kappa * self.balance.w_max  # plain fine-tuning
        self.teacher_bn = teacher_bn
        self.adapter_lr, self.body_lr, self.head_lr = adapter_lr, body_lr, head_lr
        if self.example is None:
            raise MethodError(
                "hybrid-forward has to see both networks run once: give example=..., a batch [1, C, H, W]."
            )
        like = next(self.source.net.parameters(), self.example)
        its_example = self.source.view(self.example.to(like))
        self.segments, self.cuts = _divided(self.net, self.source.net, self.example, its_example, cuts)
        self.routes = routes(len(self.cuts), shared=ending == "shared")
        if len(self.cuts) == 1 and ending != "teacher":
            raise MethodError(
                f"Cut once (behind {self.cuts[0][0].name}), path 1 never reaches the source, unless "
                "ending='teacher'. Give two strides."
            )
        self.crossings = nn.ModuleDict()
        self.fresh: nn.Module | None = None
        if not self.off:
            self._build(ending)
        self._kept: tuple[Tensor, int] | None = None  # from `watching` to `terms`, within one objective

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """The task loss of the student, and those of the two crossing paths by their weights."""
        with self.watching():
            logits = self.net(x)
        return self.loss(logits, y, **self.terms(x, y, logits))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the student's first segment says while the network runs inside: path 1 begins alike.

        Unless chance has a part in it: each path draws its own dropout.
        """
        dice: list[Tensor] = []

        def begins(_: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args[0]) == 1 and uses_batch(self.net):
                raise MethodError(
                    "hybrid-forward got a batch of one picture; BatchNorm needs two or more in training."
                )
            dice[:] = [_random_state(args[0])]

        def ends(_: nn.Module, __: tuple[Any, ...], out: Any) -> None:
            if isinstance(out, Tensor) and torch.equal(dice[0], _random_state(out)):
                self._kept = out, out._version

        self._kept = None
        first = self.net.get_submodule(self.cuts[0][0].name)
        hooks = [self.net.register_forward_pre_hook(begins), first.register_forward_hook(ends)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def terms(self, x: Tensor, y: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """w₁·L₁ and w₂·L₂ for pictures x [B, C, H, W], labels y and the student's logits [B, K]."""
        kept, self._kept = self._kept, None
        if self.off:
            return {}
        seen: dict[Side, Tensor] = {"net": x, "source": self.source.view(x)}
        by_batch = self.teacher_bn == "batch" and self.norm == "train" and self.training
        with batch_statistics(self.net), batch_statistics(self.source.net, always=by_batch):
            with torch.no_grad():
                its = self.segments["source"].run(0, seen["source"])
            if kept is not None and kept[0]._version == kept[1]:  # else what came after overwrote it
                mine = kept[0]
            else:
                mine = self.segments["net"].run(0, x)
            ends = [
                self._walk(route, begun, seen) for route, begun in zip(self.routes, (mine, its), strict=True)
            ]
        costs = [self._cost(each, y) for each in ends]
        if self.training:
            self._weigh(costs, self._cost(logits, y))
        w = self.memory["weights"].clone()  # what the graph holds must not change with the memory
        return {"path1": w[0] * costs[0], "path2": w[1] * costs[1]}

    def plan(self, epochs: int) -> list[Phase]:
        """One phase: the student, the adapters and fresh heads learn."""
        groups = self.groups(body_lr=self.body_lr, head_lr=self.head_lr)
        for label, rate, module in (
            ("adapters", self.adapter_lr, self.crossings),
            ("teacher's head", self.head_lr, self.fresh or nn.Identity()),
        ):
            kernels = [p for name, p in module.named_parameters() if is_kernel(name, p)]
            others = [p for name, p in module.named_parameters() if not is_kernel(name, p)]
            groups += [Group(f"{label}, kernels", kernels, rate)] if kernels else []
            groups += [Group(f"{label}, norms and biases", others, rate, 0.0)] if others else []
        if self.balance.rule != "schedule":
            return [Phase("fine-tune", epochs, groups, self.objective)]
        return [Phase("fine-tune", epochs, groups, self.objective, enter=partial(self._begin, epochs))]

    def observe(self) -> dict[str, Any]:
        """Running means of the three losses, and the weights of the crossing ones."""
        if self.off or not int(self.memory["steps"]):
            return {}
        losses, weights = self.balance.means(self.memory).tolist(), self.memory["weights"].tolist()
        return {
            "losses": dict(zip(("path1", "path2", "task"), losses, strict=True)),
            "weights": dict(zip(("path1", "path2"), weights, strict=True)),
        }

    def diagnostics(self) -> dict[str, Any]:
        """Where both networks were cut, which way the paths go, and what leads across."""
        return {
            "cuts": [{"net": _shown(a), "source": _shown(b)} for a, b in self.cuts],
            "paths": {f"path{i}": list(route) for i, route in enumerate(self.routes, start=1)},
            "adapters": {
                name: sum(parameter.numel() for parameter in crossing.parameters())
                for name, crossing in self.crossings.items()
            },
        }

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """Whether the network can be cut into segments; a source is looked at when it is given."""
        try:
            found = segments(net, blank(net, data["img_size"]))
        except MethodError as error:
            return " ".join(str(error).split())
        enough = len(found.boundaries) > 1
        return None if enough else f"{type(net).__name__} has one stage to cut behind, and two are needed."

    def _build(self, ending: str) -> None:
        """The adapters, where a path crosses, and the head on the teacher's features."""
        for route in self.routes:
            for k, (here, there) in enumerate(pairwise(route)):
                if here != there:
                    a, b = self.cuts[k] if there == "source" else self.cuts[k][::-1]
                    self.crossings[f"{there}_{k + 1}"] = Crossing(a, b)
        own, its = (self.segments[side].classes for side in ("net", "source"))
        if ending == "teacher" and own != its:
            raise MethodError(
                f"ending='teacher' ends a path in the source's own head, which knows {its} classes; here are "
                f"{own}. Use 'shared' or 'new'."
            )
        if ending == "new":
            self.fresh = nn.Linear(self.cuts[-1][1].channels, own)
            nn.init.zeros_(self.fresh.weight)
            nn.init.zeros_(self.fresh.bias)
        like = next(self.net.parameters())
        for module in (self.crossings, self.fresh):
            if module is not None:
                module.to(device=like.device, dtype=like.dtype)

    def _walk(self, route: tuple[Side, ...], x: Tensor, seen: Mapping[Side, Tensor]) -> Tensor:
        """The logits [B, K] at the end of a path, from what its first segment said."""
        for k, (here, there) in enumerate(pairwise(route), start=1):
            if here != there:
                crossing = self.crossings[f"{there}_{k}"]
                assert isinstance(crossing, Crossing)
                own = self.segments[there].prefix(seen[there]) if crossing.needs_prefix else None
                x = crossing(x, own)
            if self.fresh is not None and there == "source" and k == len(self.cuts):
                x = self.fresh(self.cuts[-1][1].to_map(x).mean((2, 3)))
            else:
                x = self.segments[there].run(k, x)
        return x

    def _weigh(self, costs: list[Tensor], task: Tensor) -> None:
        """Find the weights of both crossing losses anew."""
        gradients, share = None, 0.0
        if self.balance.looks(self.memory) and torch.is_grad_enabled():
            gradients = influence(task, costs, [p for p in self.net.parameters() if p.requires_grad])
        if "epochs" in self.memory:
            share = self._epochs_done / int(self.memory["epochs"])
        losses = torch.stack([*costs, task]).detach()
        self.balance.update(self.memory, losses, gradients=gradients, share=share)

    def _begin(self, epochs: int, _: Data) -> None:
        self.memory["epochs"] = torch.tensor(epochs)

    def _cost(self, logits: Tensor, y: Tensor) -> Tensor:
        cost: Tensor = self.criterion(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        return cost


def routes(cuts: int, *, shared: bool = True) -> tuple[tuple[Side, ...], tuple[Side, ...]]:
    """Whose segment each of the two crossing paths goes through, for `cuts` + 1 segments.

    Args:
        cuts: K.
        shared: end both in the student's head.
    """
    one: list[Side] = ["source" if k % 2 else "net" for k in range(cuts + 1)]
    two: list[Side] = ["net" if k % 2 else "source" for k in range(cuts + 1)]
    if shared:
        one[-1] = two[-1] = "net"
    return tuple(one), tuple(two)


def _divided(
    net: nn.Module, source: nn.Module, example: Tensor, its_example: Tensor, cuts: str | int
) -> tuple[dict[Side, Segments], list[tuple[Boundary, Boundary]]]:
    """Both networks cut at boundaries of the same strides."""
    words = str(cuts).replace(",", " ").split()
    if words != ["all"] and not (words and all(re.fullmatch(r"[1-9]\d*", word) for word in words)):
        raise MethodError(f"cuts = {cuts!r}: give one or more strides, such as '8 32', or 'all'.")
    mine, its = segments(net, example), segments(source, its_example)
    found = pairs(
        mine.boundaries, its.boundaries, None if words == ["all"] else [int(word) for word in words]
    )
    return {"net": mine.cut(a.name for a, _ in found), "source": its.cut(b.name for _, b in found)}, found


def _random_state(like: Tensor) -> Tensor:
    """Of the generator that draws on a tensor's device."""
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def _shown(boundary: Boundary) -> dict[str, Any]:
    return {
        "behind": boundary.name,
        "channels": boundary.channels,
        "stride": boundary.stride,
        "kind": boundary.kind,
        "size": list(boundary.size),
    }
