"""AdaFilter: per picture and filter, the fine-tuned or the pretrained one, chosen by a recurrent gate.

    x_{l+1} = act( G_l ⊙ BN^F(F_l ∗ x_l) + (1 - G_l) ⊙ BN^S(S_l ∗ x_l) )
    h_l, c_l = LSTM(A_l mean(x_l) + a_l; h_{l-1}, c_{l-1}),    G_l = [σ(O_l h_l + o_l) >= 1/2]

S_l are the source's filters, frozen, F_l the fine-tuned ones, which start from them; each channel is
normalised by the BatchNorm of its source. One LSTM cell is shared by all layers and starts anew for every
batch; A_l and O_l only fit its width to the layer's. The gate is hard going forward, and its gradient is that
of the sigmoid (straight-through). The loss is the task's.

Paper: Guo, Li, Wang, Rosing, "AdaFilter: Adaptive Filter Fine-tuning for Deep Transfer Learning", AAAI 2020,
arXiv 1911.09659.
Official code: none was found.

From the abstract and the first figure: filters are chosen per example, by a recurrent gate that is shared by
all layers and fed by the activations of the layer before; the first gate reads the picture; the choice is
made on the outputs of the convolutions, then comes gated BatchNorm, with statistics of their own for channels
of either source, then the activation; all is trained end to end.
Reconstruction, that is ours: the formulas above, the width of the gate, where it starts, the sigmoid.

Differs from the paper:
- its text was not at hand; what is known of it is listed above, and no figure of it is quoted.
- any network: a filter is an output channel of a convolution or an output feature of a linear layer.
  LayerNorm and other norms without statistics of batches are not doubled: they see the mixture.
- what has no filters to choose from (norms of that kind, tokens, squeeze-and-excite) is shared by both sides
  and learns; `rest="frozen"` keeps it, so that choosing the source everywhere is the source.
- layers are gated in the order in which one forward was seen to call them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from headstart.errors import MethodError, unknown
from headstart.method import Batch, Data, Group, Loss, Method, Phase, Room
from headstart.parts import plain
from headstart.parts.blank import blank
from headstart.parts.filters import KINDS, Site, find_sites
from headstart.parts.gated import FilterGate, Gated, merged
from headstart.parts.head import find_head
from headstart.parts.space import Among, Between
from headstart.parts.straight_through import gumbel_noise, straight_through
from headstart.parts.usage import FEW, Usage, agreement, by_label, described, entropy, extremes, one_way


class AdaFilter(Method):
    """Choose per picture which filters are the source's and which are fine-tuned.

    Args:
        gate: what makes the choice differentiable: "sigmoid", "hard-sigmoid" (clip((u + 1)/2, 0, 1): no
            gradient beyond ±1) or "gumbel" (choices are drawn while training). Sigmoid: ours.
        tau: τ, temperature of "gumbel". 5: SpotTune's official code.
        width: of the embeddings and of the LSTM's state. 64: ours.
        start: o, bias of the gate at the start; above 0 all filters start as fine-tuned ones. 0: ours.
        layers: which are gated: "all", or some of "conv", "grouped", "pointwise" and "linear", such as
            "conv pointwise".
        bn: "dense" (the BatchNorm of each source sees all pictures), "masked" (the fine-tuned one's sees
            those that chose the channel) or "single" (one BatchNorm, behind the mixture: the ablation).
        source_bn: BatchNorm of the source's filters: "eval" (as it was) or "adapt" (a copy of it learns).
        rest: what has no gate, but for the head: "train" or "frozen".
        lam: λ, adds λ · (share of fine-tuned filters) to the loss. 0: the paper's loss is the task's alone.
        inference: once trained: "routed" (each picture has filters of its own) or "static" (all have those
            that most training pictures took: an ordinary network is scored and shipped).
        gate_lr: rate of the gate, × the run's. 1: ours.
        body_lr: rate of the body, × the run's. 1.
        head_lr: rate of the head, × the run's. 10, as for `full`: the two differ by the gates only.
    """

    name = "adafilter"
    room: ClassVar[Room] = "route"
    paper = "Guo, Li, Wang, Rosing, AAAI 2020, arXiv 1911.09659"
    keeps_source = True

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        gate: Literal["sigmoid", "hard-sigmoid", "gumbel"] = "sigmoid",
        tau: PositiveFloat = 5.0,
        width: PositiveInt = 64,
        start: Annotated[float, Among(0.0, 2.0, off=8.0)] = 0.0,
        layers: str = "all",
        bn: Literal["dense", "masked", "single"] = "dense",
        source_bn: Literal["eval", "adapt"] = "eval",
        rest: Literal["train", "frozen"] = "train",
        lam: NonNegativeFloat = 0.0,
        inference: Literal["routed", "static"] = "routed",
        gate_lr: Annotated[NonNegativeFloat, Between(0.1, 10.0, log=True, off=0.0)] = 1.0,
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.kind, self.tau, self.lam, self.rest = gate, tau, lam, rest
        self.static = inference == "static"
        self.gate_lr, self.body_lr, self.head_lr = gate_lr, body_lr, head_lr
        if self.example is None:
            raise MethodError(
                "adafilter has to see the network run once: give example=..., a batch [1, C, H, W]."
            )
        self.sites = [
            site for site in find_sites(net, self.head, self.example) if site.kind in _kinds(layers)
        ]
        if not self.sites:
            raise MethodError(
                f"adafilter found no layer of {type(net).__name__} to gate (layers='{layers}')."
            )
        _check_source(self.sites, net, self.source.net)
        self.gated = Gated(self.sites, bn)
        like = next(net.parameters())
        self.gate = FilterGate(self.sites, width, start).to(like.device, like.dtype)
        own = self.gated.norms.values() if source_bn == "adapt" else ()
        self.source_norms = nn.ModuleList(copy.deepcopy(self.source.net.get_submodule(name)) for name in own)
        self.policy: Callable[[int, Tensor], Tensor] | None = None  # chooses in the place of the gate
        self.usage = Usage(sum(site.filters for site in self.sites))
        self.usage.begin(self.memory)
        self._warned = False
        self.export()  # what cannot be exported is better known before it is trained

    def plan(self, epochs: int) -> list[Phase]:
        """One phase in which filters, gate and head learn together, and a look at what was learnt."""
        return [
            Phase("fine-tune", epochs, self._groups(), self.objective),
            Phase("look", 0, [], self.objective, enter=self._look),
        ]

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """The task loss behind the gates, and the price of fine-tuned filters, if they have one."""
        if y.ndim == 2 and bool(((y > 0).sum(1) > 1).any()):
            raise MethodError(
                "adafilter chooses filters for one picture, and mixup shows it two at once. Train without "
                "mixup and cutmix."
            )
        logits, gates = self.run(x)
        if self.training:
            self.usage.update(self.memory, torch.cat([each.detach() for each in gates], 1))
        if not self.lam:
            return self.loss(logits, y)
        chosen = torch.stack([each.sum() for each in gates]).sum()
        return self.loss(logits, y, filters=self.lam * chosen / sum(each.numel() for each in gates))

    def predict(self, x: Tensor) -> Tensor:
        """Logits behind the gates, each picture with filters of its own, or all with the same."""
        if self._settled():
            logits: Tensor = functional_call(self.net, self._merged(self._mostly()), (x,))
            return logits
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, K] and the gates [B, filters] of all layers in the order of `sites`; 1: fine-tuned."""
        return self.gated.run(self.net, self.source.net, self.gate, self._choose, x, self._norms())

    def export(self, *, static: bool = False) -> nn.Module:
        """The network with its gates as a plain module, or one ordinary network in its place.

        Args:
            static: the network that was given, with filters merged: each is the fine-tuned one where that was
                chosen for half of the training pictures or more. It is as large and as fast as the source;
                how often it says the same stands in `diagnostics()`.

        Raises:
            MethodError: static, and no pictures were looked at yet.
        """
        if not static and not self._settled():
            made = self.gated.export(self.net, self.source.net, self.gate, self._example(), self._norms())
            if "usage" in self.memory:  # what `gated.settled` makes an ordinary network of
                tuned = ["".join("01"[stays] for stays in layer.tolist()) for layer in self._mostly()]
                made.meta["routed"]["static"] = {"tuned": tuned, **described(self.memory["agreement"])}
            return made
        if "usage" not in self.memory:
            raise MethodError(
                "A static export needs to know which filters are chosen, and adafilter has looked at no "
                "pictures yet: train it to the end, or call look(batches)."
            )
        return self.merged(self._mostly())

    def _settled(self) -> bool:
        return self.static and "usage" in self.memory

    def _merged(self, tuned: list[Tensor]) -> dict[str, Tensor]:
        return merged(self.net, self.source.net, self.gated, tuned, self._norms())

    def merged(self, tuned: Iterable[Tensor]) -> nn.Module:
        """One ordinary network with these filters fine-tuned, for each of `sites` bool [filters]."""
        net = copy.deepcopy(self.net)
        net.load_state_dict(self._merged(list(tuned)), strict=False)
        return net.requires_grad_(True).eval()

    @torch.no_grad()
    def look(self, pictures: Iterable[Batch], check: Iterable[Batch] | None = None) -> None:
        """See which filters are chosen for which pictures; `diagnostics()` and a static export tell.

        Args:
            pictures: batches (x [B, C, H, W], y [B]) in order, not augmented.
            check: batches on which the static export is compared; None: `pictures`.
        """
        before = [(module, module.training) for module in self.modules()]
        self.eval()
        chosen, labels, ones = [], [], torch.zeros(self.usage.choices)
        for x, y in pictures:
            gates = self.run(x)[1]
            ones += torch.cat(gates, 1).sum(0).to(ones)
            chosen.append(torch.stack([each.sum(1, dtype=torch.int32) for each in gates], 1).cpu())
            labels.append((y.argmax(1) if y.ndim == 2 else y).cpu())
        if chosen:
            self.memory["chosen"] = torch.cat(chosen)  # [N, layers], how many filters were fine-tuned ones
            self.memory["labels"] = torch.cat(labels)
            self.memory["usage"] = ones / len(self.memory["chosen"])
            self.memory["agreement"] = agreement(
                lambda x: self.run(x)[0],
                self.export(static=True),
                pictures if check is None else check,
                held_out=check is not None,
            )
        for module, training in before:
            module.training = training

    def observe(self) -> dict[str, Any]:
        """Of how many pictures the filters were the fine-tuned ones, lately."""
        if not self.memory["batches"]:
            return {}
        shares = self.usage.shares(self.memory).cpu()
        self._warn(shares)
        return {
            "tuned": _mean(shares),
            "entropy": _mean(entropy(shares)),
            "layers": [_mean(each) for each in self._by_site(shares)],
        }

    def diagnostics(self) -> dict[str, Any]:
        """Which filters were chosen for the training pictures, by layer, class and picture."""
        layers: list[dict[str, Any]] = [
            {"layer": site.layer, "kind": site.kind, "filters": site.filters} for site in self.sites
        ]
        if "usage" not in self.memory:
            return {"layers": layers}
        usage, chosen = self.memory["usage"].cpu(), self.memory["chosen"].cpu()
        for layer, shares in zip(layers, self._by_site(usage), strict=True):
            layer |= {
                "tuned": _mean(shares),
                "entropy": _mean(entropy(shares)),  # bits per filter: 0 where it never depends on the picture
                "always": int((shares == 1).sum()),
                "never": int((shares == 0).sum()),
                "histogram": [int(n) for n in torch.histc(shares.float(), 10, 0, 1)],
            }
        widths = torch.tensor([site.filters for site in self.sites])
        return {
            "tuned": _mean(usage),
            "entropy": _mean(entropy(usage)),
            "filters": self.usage.choices,
            "layers": layers,
            "classes": [
                [round(share, 4) for share in shares]
                for shares in by_label(chosen / widths, self.memory["labels"].cpu())
            ],
            "pictures": extremes(chosen.sum(1, keepdim=True)),
            "collapsed": one_way(usage),
            "static": described(self.memory["agreement"]),
        }

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """Whether the network has layers to gate, and a forward that an export can be made of."""
        example = blank(net, data["img_size"])
        try:
            sites = find_sites(net, find_head(net), example)
            plain.follow(net, [site.layer for site in sites], example)
        except MethodError as error:
            return " ".join(str(error).split())
        return None if sites else f"{type(net).__name__} has no layer to gate."

    def _look(self, data: Data) -> None:
        held_out = any(True for _ in data.val)
        self.look(data.plain, data.val if held_out else None)
        if "usage" not in self.memory:
            return
        usage = self.memory["usage"]
        self._warn(usage)
        if not (self._warned or self.static) and len(self.memory["chosen"]) >= FEW and one_way(usage):
            self._warned = True
            warnings.warn(
                "adafilter takes the same filters for nearly all pictures: a network of half the size says "
                "the same, export(static=True).",
                stacklevel=2,
            )

    def _choose(self, site: int, preference: Tensor) -> Tensor:
        if self.policy is not None:
            return self.policy(site, preference)
        if self.kind == "hard-sigmoid":
            return straight_through(preference, share=_hard_sigmoid)
        if self.kind == "gumbel" and self.training:
            noise = gumbel_noise(preference.shape, device=preference.device)
            return straight_through(preference, tau=self.tau, noise=noise)
        return straight_through(preference, tau=self.tau if self.kind == "gumbel" else 1.0)

    def _groups(self) -> list[Group]:
        groups = self.groups(body_lr=self.body_lr, head_lr=self.head_lr)
        if self.rest == "frozen":
            kept = {id(each) for each in self.head_module.parameters()}
            for name in [*(site.layer for site in self.sites), *self.gated.norms.values()]:
                kept |= {id(each) for each in self.net.get_submodule(name).parameters()}
            groups = [g._replace(params=[p for p in g.params if id(p) in kept]) for g in groups]
        gate, adapted = list(self.gate.parameters()), list(self.source_norms.parameters())
        return [
            *(group for group in groups if group.params),
            Group("gate, kernels", [each for each in gate if each.ndim > 1], self.gate_lr),
            Group("gate, biases", [each for each in gate if each.ndim == 1], self.gate_lr, decay=0.0),
            *([Group("source, norms", adapted, self.body_lr, decay=0.0)] if adapted else []),
        ]

    def _norms(self) -> dict[str, nn.Module]:
        return (
            dict(zip(self.gated.norms.values(), self.source_norms, strict=True)) if self.source_norms else {}
        )

    def _example(self) -> Tensor:
        assert self.example is not None
        like = next(self.net.parameters())
        return self.example[:1].to(like.device, like.dtype)

    def _mostly(self) -> list[Tensor]:
        """By layer, which filters half of the pictures or more took fine-tuned: bool [filters]."""
        return [shares >= 0.5 for shares in self._by_site(self.memory["usage"])]

    def _by_site(self, every: Tensor) -> list[Tensor]:
        return list(torch.split(every, [site.filters for site in self.sites]))

    def _warn(self, shares: Tensor) -> None:
        tuned = float(shares.mean())
        if self._warned or 0.02 < tuned < 0.98:
            return
        self._warned = True
        side = "fine-tuned" if tuned > 0.5 else "pretrained"
        warnings.warn(
            f"adafilter: the gate has collapsed: {max(tuned, 1 - tuned):.1%} of all choices are the {side} "
            "filter, whatever the picture. Try another start or gate_lr.",
            stacklevel=3,
        )


def _hard_sigmoid(u: Tensor) -> Tensor:
    return ((u + 1) / 2).clamp(0, 1)


def _mean(shares: Tensor) -> float:
    return round(float(shares.mean()), 4)


def _kinds(layers: str) -> set[str]:
    kinds = set(KINDS) if layers == "all" else set(layers.split())
    for kind in sorted(kinds - set(KINDS)):
        raise MethodError(unknown("kind of layer", kind, ["all", *KINDS]))
    return kinds


def _check_source(sites: Iterable[Site], net: nn.Module, source: nn.Module) -> None:
    """Whether the source has filters of the same shapes."""
    theirs = dict(source.named_modules())
    for site in sites:
        for name in filter(None, (site.layer, site.norm)):
            ours = _shapes(net.get_submodule(name))
            if name not in theirs or _shapes(theirs[name]) != ours:
                raise MethodError(
                    f"adafilter chooses between filters of one shape, and '{name}' is not the same in the "
                    "source. Give a source of the network's own architecture."
                )


def _shapes(module: nn.Module) -> Mapping[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
