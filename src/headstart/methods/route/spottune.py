"""SpotTune: each picture goes through either the pretrained or the fine-tuned copy of every block.

    x_l = I_l(x) F̂_l(x_{l-1}) + (1 - I_l(x)) F_l(x_{l-1}),   I_l(x) = argmax (z_l(x) + G)

F_l is a block with its pretrained weights, which stay, and F̂_l the copy that learns. A small network looks
at the picture and gives two logits z_l for every block. In training a choice is drawn (G is Gumbel noise),
and its gradient is that of softmax((z_l + G)/τ); afterwards the larger logit counts. With
`routing="global"` the choice is driven to be the same for all pictures, and to tune k blocks:

    task + λ₁ (Σ_l v_l - k)² + λ₂ Σ_l -v_l log v_l,   v_l: share of pictures in the batch that take F̂_l

Then the k blocks that are tuned most often stay so, all others are the pretrained ones for good, and training
goes on with that network.

Paper: Guo, Shi, Kumar, Grauman, Rosing, Feris, "SpotTune: Transfer Learning through Adaptive Fine-tuning",
CVPR 2019, arXiv 1811.08737.
Official code: gyhui14/spottune (Visual Decathlon, one choice per picture and block; no global form).

Differs from the paper:
- its text was not at hand. The formulas are known from a transcription and the official code; λ₁, λ₂, the
  ranking of blocks and the training after it are ours.
- outputs of whole blocks are chosen between, behind their last ReLU, as the code does.
- the frozen copies keep statistics, scales and shifts of their BatchNorm. In the code these go on learning:
  `frozen_norm="adapt"`.
- choices are without noise once trained. The code draws them in testing too: `eval_routing="sample"`.
- the policy network sees the picture reduced, is narrow, and normalises each picture by itself; the code's
  is a sibling of the network, at full size, with BatchNorm. It learns at the run's rate, the code's at a
  tenth of it for 110 epochs.
- blocks are found in the network. What changes the map between two of them is a block of its own.
- pictures that are mixed with each other are refused.
- preset `decathlon-official` leaves out what a run here does not have: a weight decay of 1e-3 for the policy
  alone, weight decay and cropping by data set, a rate that falls at epoch 40 of 110 and then no more (here at
  two thirds), training on train and val together. Norms do not decay. Its policy keeps the norms and the
  pooling of ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.errors import MethodError
from headstart.method import Data, Group, Loss, Method, Phase, Preset, Room
from headstart.parts.blank import blank
from headstart.parts.blocks import Blocks, find_blocks, replaced
from headstart.parts.kernels import is_kernel
from headstart.parts.routed import blend, partition, policy_network, preferences, routed
from headstart.parts.space import Between
from headstart.parts.statistics import uses_batch
from headstart.parts.straight_through import gumbel_noise, straight_through
from headstart.parts.usage import FEW, Usage, agreement, by_label, described, entropy, extremes, one_way


class SpotTune(Method):
    """Fine-tune a copy of every block, and choose for each picture between it and the pretrained one.

    Args:
        routing: "picture" (each picture its own choice) or "global" (k blocks are tuned, the same for all).
        k: how many blocks "global" tunes. 3: ours.
        lam_k: λ₁, strength of the pull to k blocks. 0.1: ours; the paper's is not known here.
        lam_e: λ₂, strength of the pull to one choice for all. 0.1: ours; the paper's is not known here.
        settle: share of the epochs at the end in which "global" trains with its k blocks fixed. 0.2: ours.
        tau: τ, temperature of the gradient. 5: the official code, constant.
        frozen_norm: BatchNorm of the frozen copies: "eval" (as it was given) or "adapt" (scales and shifts
            learn, statistics follow the pictures; the official code).
        stem: what lies before the first block: "train" (one copy that learns; the official code), "frozen" or
            "routed" (a block like the others). Tokens and positions learn with "train" only.
        downsample: what changes the map between blocks: "own" (a block of its own), "merge" (goes with the
            next block) or "train" (one copy that learns).
        inference: once trained per picture: "routed" (each picture its own way) or "static" (all that of most
            training pictures: an ordinary network is scored and shipped).
        eval_routing: in `predict`: "argmax" (the preferred copy) or "sample" (drawn; the official code).
        policy_width: channels of the policy network's first stage. 16: ours, under 3 % of efficientnet-lite0.
        policy_size: pixels to which pictures are reduced for it; 0: not at all. 64: ours.
        policy_lr: rate of the policy network, × the run's. 1: ours; the official code: 0.1.
        body_lr: rate of the body, × the run's. 1.
        head_lr: rate of the head, × the run's. 10, as for `full`: the two differ by the routes only.
    """

    name = "spottune"
    room: ClassVar[Room] = "route"
    paper = "Guo, Shi, Kumar, Grauman, Rosing, Feris, CVPR 2019, arXiv 1811.08737"
    keeps_source = True
    known_failures = {  # noqa: RUF012
        "ranks_average_like_one_process": "routes are drawn, and halves of a batch draw others than the whole"
    }
    presets = {  # noqa: RUF012
        "decathlon-official": Preset(
            "gyhui14/spottune: SGD 0.9 at 0.1 (policy: a tenth of it), batch 128, for 110 epochs; BatchNorm "
            "of the frozen copies learns, routes are drawn in testing too",
            hyper={
                "routing": "picture",
                "tau": 5.0,
                "frozen_norm": "adapt",
                "stem": "train",
                "eval_routing": "sample",
                "policy_width": 64,
                "policy_size": 0,
                "policy_lr": 0.1,
                "body_lr": 1.0,
                "head_lr": 1.0,
            },
            recipe={
                "optimizer": "sgd",
                "lr": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "schedule": "step",
                "warmup": 0.0,
                "label_smoothing": 0.0,
                "batch_size": 128,
                "augment": "no-flip",
                "norm": "train",
            },
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        routing: Literal["picture", "global"] = "picture",
        k: PositiveInt = 3,
        lam_k: NonNegativeFloat = 0.1,
        lam_e: NonNegativeFloat = 0.1,
        settle: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        tau: Annotated[PositiveFloat, Between(1.0, 10.0, log=True)] = 5.0,
        frozen_norm: Literal["eval", "adapt"] = "eval",
        stem: Literal["train", "frozen", "routed"] = "train",
        downsample: Literal["own", "merge", "train"] = "own",
        inference: Literal["routed", "static"] = "routed",
        eval_routing: Literal["argmax", "sample"] = "argmax",
        policy_width: Annotated[int, Field(ge=4, multiple_of=4)] = 16,
        policy_size: NonNegativeInt = 64,
        policy_lr: Annotated[NonNegativeFloat, Between(0.1, 10.0, log=True)] = 1.0,
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.routing, self.k, self.lam_k, self.lam_e, self.settle = routing, k, lam_k, lam_e, settle
        self.tau, self.stem, self.eval_routing = tau, stem, eval_routing
        self.static = inference == "static"
        self.policy_lr, self.body_lr, self.head_lr = policy_lr, body_lr, head_lr
        example = self._example()
        found = find_blocks(self.net, example)
        self.units = _units(found, stem, downsample)  # the modules that each choice is about
        self.names = [name for unit in self.units for name in unit]
        if routing == "global" and k > len(self.units):
            raise MethodError(f"k = {k}: {type(net).__name__} has {len(self.units)} blocks to choose among.")
        for name in self.names:
            _require_alike(self.net, self.source.net, name)
        self._still = (
            [] if stem == "train" else _bare(self.net, found)
        )  # what there is once and does not learn
        if stem == "frozen":
            self._still += [
                n for n, _ in self.net.named_parameters() if n.startswith(tuple(f"{p}." for p in found.stem))
            ]
        self._policy_shape = {"width": policy_width, "size": min(policy_size, *example.shape[2:])}
        like = next(self.net.parameters())
        self.policy = policy_network(example.shape[1], len(self.units), **self._policy_shape)
        self.policy.to(device=like.device, dtype=like.dtype)
        # What learns has to be the method's own; the source is none of its modules.
        self.adapted = nn.ModuleList()
        if frozen_norm == "adapt":
            self.adapted.extend(copy.deepcopy(self.source.net.get_submodule(name)) for name in self.names)
        self.routes: Callable[[Tensor], Tensor] | None = None  # chooses in the place of the policy: I [B, L]
        self.usage = Usage(len(self.units))
        self.usage.begin(self.memory)
        self._warned = False

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """The task loss along routes that are drawn, and for the global form what drives them together."""
        if y.ndim == 2 and bool((y.amax(1) < 1).any()):
            raise MethodError(
                "spottune chooses a way for each picture, and two that are mixed have none: train without "
                "mixup and cutmix."
            )
        if "kept" in self.memory:
            return self.loss(self._constant(x, self._kept()), y)
        chosen = self.choices(x, drawn=True)  # I [B, L]
        logits = self._along(x, chosen, blend)
        if self.training:
            self.usage.update(self.memory, chosen.detach())
        if self.routing == "picture":
            return self.loss(logits, y)
        v = chosen.mean(0)  # [L]
        surely = v.clamp(1e-6, 1)
        count = self.lam_k * (v.sum() - self.k).square()
        return self.loss(logits, y, count=count, entropy=-self.lam_e * (surely * surely.log()).sum())

    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, K]; a picture runs through the copies that the policy prefers for it, and no others."""
        if "kept" in self.memory:
            return self._constant(x, self._kept())
        chosen = self.choices(x, drawn=self.eval_routing == "sample")
        # Dividing a batch says the same only where no layer looks across it.
        return self._along(x, chosen, blend if uses_batch(self) else partition)

    def choices(self, x: Tensor, *, drawn: bool = False) -> Tensor:
        """I [B, L]: 1 where a picture of [B, C, H, W] takes the tuned copy, preferred or drawn."""
        if self.routes is not None:
            return self.routes(x)
        u = preferences(self.policy(x))
        noise = gumbel_noise(u.shape, device=u.device) if drawn else None
        return straight_through(u, tau=self.tau, noise=noise)

    def plan(self, epochs: int) -> list[Phase]:
        """Network and policy together; the global form then trains the network that was chosen."""
        net, policy = self._groups(), self._groups_of_policy()
        if self.routing == "picture":
            return [
                Phase("fine-tune", epochs, [*net, *policy], self.objective),
                Phase("look", 0, [], self.objective, enter=self._look),
            ]
        last = round(self.settle * epochs)
        return [
            Phase("choose", epochs - last, [*net, *policy], self.objective),
            Phase("settle", last, net, self.objective, enter=self._choose),
        ]

    def train(self, mode: bool = True) -> SpotTune:
        """As every method; of the frozen copies at most BatchNorm is in training mode, and no dropout."""
        if "kept" in self.memory:  # nothing asks for the other copies any more
            left = self._without(self._kept())
            for name in self.names:
                unused = self.net.get_submodule(name) if name in left else self._frozen(name)
                unused.requires_grad_(False)
        super().train(mode)
        for module in self.adapted.modules():
            module.training = module.training and isinstance(module, _BatchNorm)
        return self

    def export(self, *, static: bool = False) -> nn.Module:
        """What `predict` does, without noise: a torch.fx graph, or the network itself in the global form.

        Args:
            static: in any case the network itself: each block is the copy that most training pictures take.
                How often the two agree stands in `diagnostics()["static"]`.
        """
        if "kept" not in self.memory and not static:
            source = copy.deepcopy(self.source.net)
            for name in self.names:
                source.set_submodule(name, copy.deepcopy(self._frozen(name)))
            made = routed(self.net, source, self.policy, self.units, self._example(), self._policy_shape)
            if "routes" in self.memory:  # what `routed.settled` makes an ordinary network of
                tuned = [int(each) for each in self._kept()]
                made.meta["routed"]["static"] = {"tuned": tuned, **described(self.memory["agreement"])}
            return made
        net = copy.deepcopy(self.net)
        for name in self._without(self._kept()):
            net.set_submodule(name, copy.deepcopy(self._frozen(name)))
        return net.requires_grad_(True).eval()

    def observe(self) -> dict[str, Any]:
        """How often each block's tuned copy was taken lately, and its entropy; warns of a collapse."""
        if "kept" in self.memory or not int(self.memory["batches"]):
            return {}
        v = self.usage.shares(self.memory)
        if self.routing == "picture" and self.usage.collapsed(self.memory):
            self._warn()
        return {"tuned": _by_name(self.units, v), "bits": _by_name(self.units, entropy(v))}

    def diagnostics(self) -> dict[str, Any]:
        """Which way the training pictures go: by block, by class, the extremes, and what is lost without."""
        shown: dict[str, Any] = {"blocks": [_label(unit) for unit in self.units]}
        if "kept" in self.memory:
            shown["kept"] = self._kept_labels()
        if "likely" in self.memory:
            shown["likely"] = _by_name(self.units, self.memory["likely"])
        if "routes" in self.memory:
            routes, labels = self.memory["routes"], self.memory["labels"]
            v = routes.double().mean(0)
            shown |= {
                "tuned": _by_name(self.units, v),
                "bits": _by_name(self.units, entropy(v)),
                "by_class": by_label(routes, labels),
                "pictures": extremes(routes),
                "collapsed": one_way(v),
                "static": {"kept": self._kept_labels(), **described(self.memory["agreement"])},
            }
        return shown

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """Whether the network's forward can be followed and it has blocks to choose among."""
        try:
            find_blocks(net, blank(net, data["img_size"]))
        except MethodError as error:
            return " ".join(str(error).split())
        return None

    # ------------------------------------------------------------------ on entering a phase

    def _choose(self, data: Data) -> None:
        """Keep the k blocks that the training pictures take most often; without noise, so that none tie."""
        self.eval()
        with torch.no_grad():
            shares = [torch.sigmoid(preferences(self.policy(x))) for x, _ in data.plain]
        likely = torch.cat(shares).mean(0)
        kept = torch.zeros_like(likely, dtype=torch.bool)
        kept[likely.topk(self.k).indices] = True
        self.memory["likely"], self.memory["kept"] = likely, kept

    def _look(self, data: Data) -> None:
        """Which way each training picture goes; and whether one way for all would say the same."""
        self.eval()
        with torch.no_grad():
            seen = [(self.choices(x), y if y.ndim == 1 else y.argmax(1)) for x, y in data.plain]
            self.memory["routes"] = torch.cat([chosen for chosen, _ in seen]).to(torch.uint8)  # [N, L]
            self.memory["labels"] = torch.cat([labels for _, labels in seen])
            kept = self._kept()
            held_out = any(True for _ in data.val)
            self.memory["agreement"] = agreement(
                self.predict,
                partial(self._constant, kept=kept),
                data.val if held_out else data.plain,
                held_out,
            )
        if self.static:
            self.memory["kept"] = torch.tensor(kept)
        elif len(self.memory["routes"]) >= FEW and one_way(self.memory["routes"].double().mean(0)):
            self._warn()

    # ------------------------------------------------------------------ routes

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            "spottune sends nearly all pictures the same way: a network of half the size says the same, "
            "export(static=True).",
            stacklevel=3,
        )

    def _example(self) -> Tensor:
        if self.example is None:
            raise MethodError(
                "spottune has to see the network run once: give example=..., a batch [1, C, H, W]."
            )
        return self.example

    def _along(self, x: Tensor, chosen: Tensor, how: Callable[..., Tensor]) -> Tensor:
        """Logits [B, K] of pictures along their routes, with `blend` or `partition` at each block."""
        instead = {
            name: partial(how, chosen[:, i], self.net.get_submodule(name).forward, self._frozen(name))
            for i, unit in enumerate(self.units)
            for name in unit
        }
        with replaced(self.net, instead):
            logits: Tensor = self.net(x)
        return logits

    def _constant(self, x: Tensor, kept: list[bool]) -> Tensor:
        """Logits [B, K] where all pictures take the tuned copies of these blocks, else the frozen ones."""
        with replaced(self.net, {name: self._frozen(name) for name in self._without(kept)}):
            logits: Tensor = self.net(x)
        return logits

    def _frozen(self, name: str) -> nn.Module:
        if self.adapted:
            return self.adapted[self.names.index(name)]
        return self.source.net.get_submodule(name)

    def _kept(self) -> list[bool]:
        """Which blocks are tuned where all pictures go one way: those chosen, or what most pictures take."""
        if "kept" in self.memory:
            return [bool(each) for each in self.memory["kept"]]
        if "routes" in self.memory:
            return (self.memory["routes"].double().mean(0) >= 0.5).tolist()
        return (self.usage.shares(self.memory) >= 0.5).tolist()

    def _kept_labels(self) -> list[str]:
        return [_label(unit) for unit, kept in zip(self.units, self._kept(), strict=True) if kept]

    def _without(self, kept: list[bool]) -> list[str]:
        """The modules of all other blocks."""
        return [name for unit, here in zip(self.units, kept, strict=True) if not here for name in unit]

    # ------------------------------------------------------------------ who learns

    def _groups(self) -> list[Group]:
        """The network, and BatchNorm of the frozen copies where it learns."""
        still = {id(self.net.get_parameter(name)) for name in self._still}
        groups = [
            group._replace(params=[each for each in group.params if id(each) not in still])
            for group in self.groups(body_lr=self.body_lr, head_lr=self.head_lr)
        ]
        norms = [m for m in self.adapted.modules() if isinstance(m, _BatchNorm)]
        adapted = [parameter for norm in norms for parameter in norm.parameters()]
        groups.append(Group("frozen copies, norms", adapted, self.body_lr, 0.0))
        return [group for group in groups if group.params]

    def _groups_of_policy(self) -> list[Group]:
        named = list(self.policy.named_parameters())
        kernels = [parameter for name, parameter in named if is_kernel(name, parameter)]
        others = [parameter for name, parameter in named if not is_kernel(name, parameter)]
        return [
            Group("policy, kernels", kernels, self.policy_lr),
            Group("policy, norms and biases", others, self.policy_lr, 0.0),
        ]


def _units(found: Blocks, stem: str, downsample: str) -> list[list[str]]:
    """The modules that each choice is about, in the order in which they run."""
    units = [found.stem] if stem == "routed" else []
    for block in found.blocks:
        before = [name for name, following in found.between.items() if following == block]
        if downsample == "own":
            units += [[name] for name in before]
        units.append([*before, block] if downsample == "merge" else [block])
    return units


def _bare(net: nn.Module, found: Blocks) -> list[str]:
    """Parameters that lie in none of the modules found: tokens, positions."""
    parts = (*found.stem, *found.blocks, *found.between, *found.tail)
    return [name for name, _ in net.named_parameters() if not name.startswith(tuple(f"{p}." for p in parts))]


def _require_alike(net: nn.Module, source: nn.Module, name: str) -> None:
    """The source has this block, with weights of the same shapes."""
    theirs = dict(source.named_modules()).get(name)
    shapes = [
        {key: tuple(value.shape) for key, value in module.state_dict().items()}
        for module in (net.get_submodule(name), theirs or nn.Identity())
    ]
    if shapes[0] != shapes[1]:
        raise MethodError(
            f"The source's '{name}' has other shapes than the network's, or is not there; spottune takes "
            "either copy of a block, so both networks must be of one architecture."
        )


def _label(unit: list[str]) -> str:
    return " + ".join(unit)


def _by_name(units: list[list[str]], values: Tensor) -> dict[str, float]:
    return {_label(unit): round(float(value), 4) for unit, value in zip(units, values, strict=True)}
