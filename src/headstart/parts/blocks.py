"""The residual blocks of a network, found from its forward; and that forward with other blocks in it.

The stream is the one tensor that everything behind a place can be computed from. A block is a module on the
stream inside of which there is no such place: a shortcut goes past all of its layers. Classes are told from
what torch.fx sees, and all modules of a class count alike: blocks that change the size of the map have no
shortcut, and are blocks all the same. So is what lies where blocks lie and is no plain chain. No architecture
is known by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.forward import Cut, Forward, cannot_see


@dataclass(frozen=True)
class Blocks:
    """Where a network's weights lie, as dotted names of modules in the order in which they run."""

    stem: list[str]  # before the first block
    blocks: list[str]
    between: dict[str, str]  # what changes the stream between blocks, and the block that comes next
    tail: list[str]  # behind the last block, the head included


def find_blocks(net: nn.Module, example: Tensor) -> Blocks:
    """Find the residual blocks of a network.

    Args:
        net: any network that makes logits of pictures.
        example: pictures [B, C, H, W] of the size that it will be used on.

    Raises:
        MethodError: it cannot see the example, its forward cannot be followed, or there are fewer than two
            blocks.
    """
    x = _like(example, net)
    with _untouched(net, x):
        try:
            net.eval()(x)
        except Exception as error:
            raise cannot_see(net, x, error) from error
        names = _blocks(net, x)
        if len(names) < 2:
            found = f"only one block, '{names[0]}'" if names else "no residual blocks"
            raise MethodError(f"{type(net).__name__} has {found}; two or more are needed.")
        others = _others(net, "", set(names))
        cuts = Forward(net.eval(), [*names, *others], x).cuts
    blocks = sorted((name for name in names if name in cuts), key=lambda name: cuts[name].behind)
    behind = {name: cut.behind for name, cut in cuts.items()}
    order = {name: i for i, (name, _) in enumerate(net.named_modules())}
    first, last = behind[blocks[0]], behind[blocks[-1]]
    stem, between, tail = [], {}, []
    for name in others:
        if name in behind:
            at, start, end = behind[name], first, last
        else:  # not on the stream: where it was registered tells
            at, start, end = order[name], order[blocks[0]], order[blocks[-1]]
        if at < start:
            stem.append(name)
        elif at > end:
            tail.append(name)
        elif name in behind:
            between[name] = next(block for block in blocks if behind[block] > at)
    return Blocks(stem, blocks, between, tail)


@contextmanager
def replaced(net: nn.Module, instead: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, the network runs other things in the place of some of its modules.

    Args:
        net: the network.
        instead: dotted name of a module to what is called with its arguments.
    """
    before: list[tuple[dict[str, Any], Any]] = []
    try:
        for name, what in instead.items():
            own = vars(net.get_submodule(name))  # what is set as an attribute would be registered as a module
            before.append((own, own.get("forward")))
            own["forward"] = what
        yield
    finally:
        for own, forward in before:
            del own["forward"]
            if forward is not None:
                own["forward"] = forward


# ---------------------------------------------------------------------- finding them


def _blocks(net: nn.Module, x: Tensor) -> list[str]:
    """Names of the blocks, from the outside in: what is a chain is looked into, down to shortcuts."""
    closed: list[str] = []  # looked into as far as needed
    shortcut: set[type] = set()  # classes that a shortcut goes past
    seen = _inside(net, "")
    while seen:
        cuts = Forward(net.eval(), [*closed, *seen], x).cuts
        chains = {n: _inside(net.get_submodule(n), n) for n in seen if n in cuts}
        chains = {n: c for n, c in chains.items() if c and type(net.get_submodule(n)) not in shortcut}
        closed += [name for name in seen if name not in chains]
        seen = []
        for kind in dict.fromkeys(type(net.get_submodule(name)) for name in chains):
            ours = {name: chain for name, chain in chains.items() if type(net.get_submodule(name)) is kind}
            others = [
                n for n in chains if n not in ours and not any(each.startswith(f"{n}.") for each in seen)
            ]
            # The last one of its class is enough where it has a shortcut: the first often changes the map.
            for some in ([list(ours)[-1]], list(ours)):
                opened = [each for name in some for each in ours[name]]
                left = [name for name in ours if name not in some]
                cuts = _cuts(net, [*closed, *seen, *others, *left, *opened], x)
                whole = [name for name in some if cuts.keys().isdisjoint(ours[name])]
                if whole and not issubclass(kind, nn.Sequential):
                    shortcut.add(kind)
                    whole = list(ours)
                    break
            closed += whole
            seen += [each for name, chain in ours.items() if name not in whole for each in chain]
    # What multiplies the stream by a gate of its own looks like a shortcut; it lies among layers, in blocks.
    found = {name: net.get_submodule(name) for name in closed if type(net.get_submodule(name)) in shortcut}
    parts = {
        type(part) for block in found.values() for part in block.modules() if type(part) is not type(block)
    }
    blocks = [n for n, block in found.items() if type(block) not in parts and not _among_layers(net, n)]
    return _on_stream(net, blocks, x)


def _cuts(net: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Cut]:
    """Where the stream can be cut behind these modules; nowhere if the forward cannot be followed to them."""
    try:
        return Forward(net.eval(), names, x).cuts
    except MethodError:
        return {}


def _among_layers(net: nn.Module, name: str) -> bool:
    """Whether it lies side by side with single layers, in something with a forward of its own."""
    parent = name.rpartition(".")[0]
    around = net.get_submodule(parent)
    if not parent or isinstance(around, nn.Sequential) or type(around) in (nn.ModuleList, nn.ModuleDict):
        return False
    learns = (child for child in around.children() if any(True for _ in child.parameters()))
    return any(not any(True for _ in child.children()) for child in learns)


def _on_stream(net: nn.Module, blocks: list[str], x: Tensor) -> list[str]:
    """Those that make maps or tokens, and what lies in places like theirs and is no plain chain of layers."""
    places = {re.sub(r"\d+", "#", name) for name in blocks}
    peers = [
        name
        for name, module in net.named_modules()
        if name not in blocks
        and re.sub(r"\d+", "#", name) in places
        and not isinstance(module, nn.Sequential)
        and _inside(module, name)
    ]
    if not blocks:
        return []
    cuts = Forward(net.eval(), [*blocks, *peers], x).cuts
    return [name for name in [*blocks, *peers] if name in cuts and len(cuts[name].shape) > 2]


def _inside(module: nn.Module, name: str) -> list[str]:
    """Names of the children that learn; in the place of a list or dictionary of modules its own."""
    names = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if type(child) in (nn.ModuleList, nn.ModuleDict):
            names += _inside(child, full)
        elif any(True for _ in child.parameters()):
            names.append(full)
    return names


def _others(net: nn.Module, name: str, blocks: set[str]) -> list[str]:
    """The largest modules that learn and hold no block."""
    found = []
    for each in _inside(net.get_submodule(name), name):
        if any(block.startswith(f"{each}.") for block in blocks):
            found += _others(net, each, blocks)
        elif each not in blocks:
            found.append(each)
    return found


def _like(example: Tensor, net: nn.Module) -> Tensor:
    like = next(net.parameters(), example)
    return example[:1].to(device=like.device, dtype=like.dtype)


@contextmanager
def _untouched(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Inside, modes may change and random numbers may be drawn; afterwards nothing has happened."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
