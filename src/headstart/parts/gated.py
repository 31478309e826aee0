"""Layers that are two at once: per picture and filter, the fine-tuned or the pretrained one answers.

    out = G ⊙ BN^F(F ∗ x) + (1 - G) ⊙ BN^S(S ∗ x),    G in {0, 1}, [pictures, filters]

F learns, S does not, each channel is normalised by the BatchNorm of its source, and what follows (activation,
LayerNorm, the rest of the network) sees the mixture. All gates come from one recurrent network: that of layer
l from what the layer is given, pooled over positions, and from what the gates before it saw.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from headstart.parts import plain
from headstart.parts.blocks import replaced
from headstart.parts.filters import Site, after_norm, plainly_normalised
from headstart.parts.mixing import folded, masked, mixed, pooled

Norm = Literal["dense", "masked", "single"]
Carried = tuple[Tensor, Tensor] | None  # what the recurrent gate remembers of the layers before


class Choice(Protocol):
    """Turns what the gate says into gates of 0 and 1."""

    def __call__(self, site: int, preference: Tensor) -> Tensor:
        """[B, filters] of layer number `site`, 1 where the fine-tuned filter is preferred."""
        ...


class FilterGate(nn.Module):
    """The recurrent gate: an embedding and an answer for each layer, and one LSTM cell shared by all.

    Args:
        sites: the layers, in the order in which they run.
        width: of embeddings and of the cell's state.
        start: bias of all answers; above 0 the fine-tuned filter is chosen.
    """

    def __init__(self, sites: Sequence[Site], width: int, start: float) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(site.inputs, width) for site in sites)
        self.cell = nn.LSTMCell(width, width)
        self.answer = nn.ModuleList(nn.Linear(width, site.filters) for site in sites)
        for layer in self.answer:
            nn.init.constant_(layer.get_parameter("bias"), start)

    def forward(self, site: int, seen: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """By how much the fine-tuned filters are preferred, [B, filters], and what to carry on.

        Args:
            site: number of the layer.
            seen: what it is given, pooled, [B, inputs].
            carried: from the layer before; None for the first.
        """
        with torch.autocast(seen.device.type, enabled=False):  # a state that adds up over layers
            embedded = self.embed[site](seen.to(self.cell.weight_hh.dtype))
            carried = self.cell(embedded, carried)
            assert carried is not None
            return self.answer[site](carried[0]), carried


class Gated:
    """A network, its frozen source and a gate, run together.

    It holds names and looks modules up in the networks as they are. What the gate remembers lives in a call.

    Args:
        sites: the layers with gates.
        bn: "dense" (each source's BatchNorm sees all pictures), "masked" (in training, the fine-tuned one's
            statistics are of those pictures that chose the channel) or "single" (one, after mixing).
    """

    def __init__(self, sites: Sequence[Site], bn: Norm) -> None:
        self.sites, self.bn = list(sites), bn
        self.norms = {i: site.norm for i, site in enumerate(sites) if site.norm and bn != "single"}

    def run(
        self,
        net: nn.Module,
        source: nn.Module,
        gate: Callable[[int, Tensor, Carried], tuple[Tensor, Carried]],
        choose: Choice,
        x: Tensor,
        norms: Mapping[str, nn.Module] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, K] of pictures [B, C, H, W], and the gates [B, filters] of all layers.

        Args:
            net: with the fine-tuned filters; what has no gate runs as it is.
            source: with the pretrained ones.
            gate: as `FilterGate`.
            choose: makes gates of what it says.
            x: the pictures.
            norms: by layer, where another BatchNorm than the source's is behind its filters.
        """
        once = _Pass(self, source, gate, choose, norms or {})
        instead: dict[str, Callable[[Tensor], Tensor]] = {}
        for i, site in enumerate(self.sites):
            instead[site.layer] = partial(once.layer, i, net.get_submodule(site.layer).forward)
        for i, name in self.norms.items():
            instead[name] = partial(once.norm, i, net.get_submodule(name))
        with replaced(net, instead):
            logits: Tensor = net(x)
        return logits, once.gates

    def export(
        self,
        net: nn.Module,
        source: nn.Module,
        gate: FilterGate,
        example: Tensor,
        norms: Mapping[str, nn.Module] | None = None,
    ) -> fx.GraphModule:
        """The same computation, in eval mode and without noise, as a module of torch's own."""
        names = [site.layer for site in self.sites] + list(self.norms.values())
        made = plain.follow(net, names, example)
        made.add_submodule("filter_gate", _plain_copy(gate))
        carried: Any = None
        for i, site in enumerate(self.sites):
            node = plain.called(made, site.layer)
            own = f"pretrained.{site.layer}"
            made.add_submodule(own, _plain_copy(source.get_submodule(site.layer)))
            with made.graph.inserting_after(node):
                theirs = made.graph.call_module(own, node.args)
            with made.graph.inserting_before(node):
                seen: Any = fx.Proxy(node.all_input_nodes[0])
                seen = together(site, seen.mean(dims) if (dims := positions(site)) else seen).node
                embedded = made.graph.call_module(f"filter_gate.embed.{i}", (seen,))
                carried = made.graph.call_module(
                    "filter_gate.cell", (embedded,) if carried is None else (embedded, carried)
                )
                state = made.graph.call_function(operator.getitem, (carried, 0))
                answer: Any = fx.Proxy(made.graph.call_module(f"filter_gate.answer.{i}", (state,)))
                chosen = spread(site, answer >= 0)
            ours, norm = node, self.norms.get(i)
            if norm is not None:
                ours = plain.called(made, norm)
                made.add_submodule(
                    f"pretrained.{norm}", _plain_copy((norms or {}).get(norm, source.get_submodule(norm)))
                )
                with made.graph.inserting_after(ours):
                    theirs = made.graph.call_module(f"pretrained.{norm}", (theirs,))
            with made.graph.inserting_after(theirs):
                taken = made.graph.call_function(torch.where, (chosen.node, ours, theirs))
            ours.replace_all_uses_with(taken, delete_user_cb=partial(operator.is_not, taken))
        made = plain.finish(made)
        made.meta["routed"] = {
            "input": list(example.shape[1:]),
            "sites": [site._asdict() for site in self.sites],
            "bn": self.bn,
            "width": gate.cell.hidden_size,
        }
        return made


def settled(made: fx.GraphModule, net: nn.Module) -> nn.Module:
    """The ordinary network with the same filters for all pictures, those of `meta["routed"]["static"]`.

    Args:
        made: from `Gated.export`, or `rebuilt`.
        net: a network of the architecture that was gated; its weights are replaced, in place.
    """
    about = made.meta["routed"]
    gated = Gated([Site(**site) for site in about["sites"]], about["bn"])
    tuned = [torch.tensor([stays == "1" for stays in layer]) for layer in about["static"]["tuned"]]
    plain.take(net, made)
    net.load_state_dict(merged(net, made.get_submodule("pretrained"), gated, tuned, {}), strict=False)
    return net.eval()


def rebuilt(net: nn.Module, about: Mapping[str, Any]) -> fx.GraphModule:
    """The network that `Gated.export` made, with other weights: for whoever has them in a file.

    Args:
        net: a network of the architecture that was gated.
        about: `meta["routed"]`.
    """
    sites = [Site(**site) for site in about["sites"]]
    gate = FilterGate(sites, about["width"], 0.0)
    return Gated(sites, about["bn"]).export(net, net, gate, torch.zeros(1, *about["input"]))


@torch.no_grad()
def merged(
    net: nn.Module,
    source: nn.Module,
    gated: Gated,
    tuned: Sequence[Tensor],
    norms: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """The weights and statistics of all layers with gates where the filters are the same for all pictures.

    Args:
        net: with the fine-tuned filters.
        source: with the pretrained ones.
        gated: which layers.
        tuned: for each layer which filters are the fine-tuned ones, bool [filters].
        norms: by layer, where another BatchNorm than the source's is behind its filters.

    Returns:
        By name in `net`.
    """
    found: dict[str, Tensor] = {}
    for i, (site, stay) in enumerate(zip(gated.sites, tuned, strict=True)):
        for name in filter(None, (site.layer, gated.norms.get(i))):
            theirs = (norms[name] if name in norms else source.get_submodule(name)).state_dict()
            for key, ours in net.get_submodule(name).state_dict().items():
                if ours.ndim and len(ours) == site.filters:
                    keep = stay.to(ours.device).view(-1, *[1] * (ours.ndim - 1))
                    found[f"{name}.{key}"] = torch.where(keep, ours, theirs[key].to(ours))
    return found


def positions(site: Site) -> tuple[int, ...]:
    """The dimensions of what a layer is given that are positions."""
    return (2, 3) if site.kind != "linear" else tuple(range(1, site.dims - 1))


def together(site: Site, seen: Any) -> Any:
    """The pieces of each picture as one: [B, inputs] from [B · pieces, inputs]."""
    return seen if site.pieces == 1 else seen.unflatten(0, (-1, site.pieces)).mean(1)


def spread(site: Site, gates: Any) -> Any:
    """Gates [B, filters], shaped so that they broadcast over what the layer makes."""
    if site.pieces > 1:
        gates = gates.repeat_interleave(site.pieces, 0)
    for _ in range(site.dims - 2):
        gates = gates.unsqueeze(-1 if site.kind != "linear" else 1)
    return gates


class _Pass:
    """One forward: made anew for each, so that nothing is carried from one batch to the next."""

    def __init__(
        self,
        gated: Gated,
        source: nn.Module,
        gate: Callable[[int, Tensor, Carried], tuple[Tensor, Carried]],
        choose: Choice,
        norms: Mapping[str, nn.Module],
    ) -> None:
        self.gated, self.source, self.gate, self.choose, self.norms = gated, source, gate, choose, norms
        self.carried: Carried = None
        self.gates: list[Tensor] = []
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}  # from a layer to its norm

    def layer(self, i: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """In the place of a layer's forward."""
        site = self.gated.sites[i]
        dims = positions(site)
        x, seen = pooled(x, dims) if dims else (x, x)
        preference, self.carried = self.gate(i, together(site, seen), self.carried)
        gates = self.choose(i, preference)
        self.gates.append(gates)
        their_layer, name = self.source.get_submodule(site.layer), self.gated.norms.get(i)
        if name is None:
            theirs = their_layer(x)
        elif name in self.norms:
            theirs = plainly_normalised(self.norms[name], their_layer(x))
        elif type(their_layer) is nn.Conv2d and torch.is_grad_enabled():
            # A pass over the map less, each way. Looking is exact to the bit, so there it is not done.
            theirs = folded(their_layer, self.source.get_submodule(name), x)
        else:
            theirs = plainly_normalised(self.source.get_submodule(name), their_layer(x))
        if name is not None:
            self.waiting[i] = (gates, theirs)
            return forward(x)
        return mixed(spread(site, gates), forward(x), theirs, last=site.kind == "linear")

    def norm(self, i: int, module: nn.Module, z: Tensor) -> Tensor:
        """In the place of the forward of the BatchNorm behind it."""
        gates, theirs = self.waiting.pop(i)
        spread_gates = spread(self.gated.sites[i], gates)
        if self.gated.bn == "masked" and module.training:
            ours = masked(module, z, spread_gates.detach())
        else:
            ours = plainly_normalised(module, z)
        return after_norm(module, mixed(spread_gates, ours, theirs))


def _plain_copy(module: nn.Module) -> nn.Module:
    """As torch's own classes have it: the gate's own class belongs to this library."""
    if isinstance(module, FilterGate):
        gate = nn.Module()
        for name, child in module.named_children():
            gate.add_module(name, copy.deepcopy(child))
        return gate.eval()
    return copy.deepcopy(module).eval()
