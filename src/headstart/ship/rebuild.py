"""Networks that timm cannot build by name, described as plain data in config.json and built again from it.

One in which each picture takes its own way, by block (`parts.routed`) or by filter (`parts.gated`), carries
what builds it again in its `meta["routed"]`; config.json holds that under "routed", with the architecture.
`settle` makes an ordinary network of it.

One that lost channels (`parts.cutting`) says what was kept of each layer, and how it came to that, in its
attribute `pruned`; config.json holds that under "pruned".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from headstart.errors import MethodError, ModelError, first_line
from headstart.nets.architecture import Architecture
from headstart.parts import gated
from headstart.parts import routed as by_block
from headstart.parts.cutting import cut
from headstart.ship.folder import CONFIG


def describe(config: Architecture | None, net: nn.Module, classes: int) -> dict[str, Any]:
    """What config.json has to say, by kind, so that `build` makes exactly this network; else nothing.

    Args:
        config: the architecture it was made of.
        net: the network.
        classes: its outputs.
    """
    routed = net.meta.get("routed") if isinstance(net, fx.GraphModule) else None
    kind, about = ("pruned", vars(net).get("pruned")) if routed is None else ("routed", routed)
    if not isinstance(about, Mapping):
        return {}
    if "net" in about:  # it was built from a description itself
        config = Architecture(**about["net"])
    if config is None:
        return {}
    wanted = config.with_classes(classes)
    with torch.random.fork_rng(devices=[]):
        same = shapes(_again(wanted.build(), kind, about)) == shapes(net)
    return {kind: {**about, "net": asdict(wanted)}} if same else {}


def build(folder: Path, own: Mapping[str, Any]) -> nn.Module | None:
    """The network that `describe` described, with random weights; None where nothing is described.

    Args:
        folder: the model folder, for errors.
        own: what config.json holds under "headstart".

    Raises:
        ModelError: a description of no network.
    """
    kind = next((each for each in _WHAT if each in own), None)
    if kind is None:
        return None
    about = own[kind]
    try:
        with torch.random.fork_rng(devices=[]):
            return _again(Architecture(**about["net"]).build(), kind, about)
    except (TypeError, KeyError, ValueError, AttributeError, MethodError, ModelError) as error:
        raise ModelError(
            f"'{folder / CONFIG}' is damaged: it describes no network {_WHAT[kind]}. ({first_line(error)})"
        ) from error


_WHAT = {"routed": "with routes", "pruned": "that lost channels"}


def _again(net: nn.Module, kind: str, about: Mapping[str, Any]) -> nn.Module:
    """The network that was described; it knows so itself, so that it can be saved again."""
    if kind == "pruned":
        net = cut(net, about["kept"])
        vars(net)["pruned"] = about
        return net
    routed = _rebuilt(net, about)
    routed.meta["routed"] = about
    return routed


def settle(net: nn.Module) -> tuple[nn.Module, Architecture, dict[str, Any]]:
    """One ordinary network in the place of one in which each picture takes its own way.

    It has the copy of each block, or the filters, that most training pictures took, and is as large and as
    fast as the network that was fine-tuned.

    Args:
        net: as it was read from a model folder; it stays as it is.

    Returns:
        The network, its architecture, and how often the two name the same class: `agreement`, a share of
        so many `pictures`, `of` validation or training.

    Raises:
        ModelError: it is an ordinary network already, or does not say which way is taken most.
    """
    about = net.meta.get("routed", {}) if isinstance(net, fx.GraphModule) else {}
    if not isinstance(net, fx.GraphModule) or "net" not in about:
        raise ModelError("All pictures go one way through this network already; there is nothing to settle.")
    if "static" not in about:
        raise ModelError("This model does not say which way most pictures take. Train it again.")
    architecture = Architecture(**about["net"])
    with torch.random.fork_rng(devices=[]):
        plain = architecture.build()
    settled = gated.settled if "sites" in about else by_block.settled
    found = {name: value for name, value in about["static"].items() if name != "tuned"}
    return settled(net, plain), architecture, found


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a network, by name."""
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def _rebuilt(net: nn.Module, about: Mapping[str, Any]) -> fx.GraphModule:
    """A network in which each picture takes its own way: by filter, or by block."""
    return gated.rebuilt(net, about) if "sites" in about else by_block.rebuilt(net, about)
