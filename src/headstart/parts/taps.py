"""Taps: layers of a network whose outputs are looked at while it runs, found from its stages.

A stage is a module that the network names in its `feature_info` (timm), else, of its parts in order, the last
one before the map changes its size. Its tap is the last convolution or linear layer on the way to its output:
of the layers whose own output has the channels and positions of the stage's, the one that most layers lie
in front of. So a shortcut is none; and no gate either, which sees the pictures only through averages over all
positions. In a ResNet this is the last convolution of each stage, before its norm, the sum and the ReLU; in a
transformer or a ConvNeXt the second layer of the last block's MLP. Where no layer's output has the stage's
shape (DenseNet and others that concatenate) the stage itself is tapped.

All of it is read off one forward pass and its autograd graph; no architecture is known by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from headstart.errors import MethodError, unknown


class NoStages(MethodError):
    """No stage was found in a network; its layers can still be named."""


PER_STRIDE = 4  # taps of a network that has one stride throughout: of a plain transformer's blocks


@dataclass(frozen=True)
class Tap:
    """A module by name, and what its output is like."""

    name: str
    axis: int  # of the channels, from the front or from the back
    channels: int
    positions: int  # of the map, for pictures of the example's size; class tokens are positions too
    stride: int  # pixels of the picture per position, along one side
    overwritten: bool = False  # by what comes after it, as an in-place ReLU does

    def along(self, values: Tensor, like: Tensor) -> Tensor:
        """Numbers [C] in a shape that goes with an output of this tap."""
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return values.view(shape)


def find_taps(
    net: nn.Module, example: Tensor, *, names: Sequence[str] = (), head: str | None = None
) -> list[Tap]:
    """The taps of a network in the order in which it runs through them.

    Stages of a stride below 4 (a stem) are left out where two or more others are left. Of more than four at
    one stride four are taken, evenly spread, the last among them.

    Args:
        net: any network that makes maps or tokens of pictures; it stays as it is.
        example: pictures [B, C, H, W] of the size that it will be used on.
        names: dotted names of modules, in the place of what would be found.
        head: dotted name of the module that makes the logits; nothing from there on is tapped.

    Raises:
        NoStages: none were found.
        MethodError: the network cannot run; or a name is not there, runs more than once or gives no map.
    """
    like = next(net.parameters(), example)
    calls = _followed(net, example[:1].to(device=like.device, dtype=like.dtype))
    if names:
        found = [_named(net, name, calls, example) for name in dict.fromkeys(names)]
        return [tap for _, tap in sorted(found, key=lambda each: each[0])]
    end = min((call.at for call in calls if call.name == head), default=len(calls))
    calls = calls[:end]
    stages = _declared(net, calls) or _ends_of_sizes(net, calls, example)
    start = 0
    for stage in stages:
        stage.layers = [call for call in calls[start : stage.call.at + 1] if isinstance(call.module, _LAYERS)]
        start = stage.call.at + 1
    found_in = (_tap_of(stage, example) for stage in _spread([each for each in stages if each.layers]))
    taps = [tap for tap in found_in if tap is not None]
    if not taps:
        raise NoStages(
            f"No stages were found in {type(net).__name__}; name layers to look at with taps='a,b'."
        )
    return taps


@contextmanager
def watching(net: nn.Module, taps: Sequence[Tap], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward of the network leaves the outputs of its taps, by name; no hook stays behind.

    Args:
        net: where the taps are.
        taps: what to look at.
        stop: end the forward, and what is inside, once all taps have been seen.

    Raises:
        MethodError: a tap was not run; ran twice with unlike outputs; was overwritten, though not in
            the forward in which it was found; or ran without a graph inside a forward that makes one.
    """
    seen: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    grad = torch.is_grad_enabled()

    def look(tap: Tap, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise MethodError(f"'{tap.name}' gives a {type(out).__name__}, which is no map.")
        if tap.name in seen and seen[tap.name].shape != out.shape:
            raise MethodError(f"'{tap.name}' ran twice in one forward, with outputs of unlike shapes.")
        if grad and not torch.is_grad_enabled():
            raise MethodError(
                f"'{tap.name}' ran without a graph (reentrant checkpointing); use use_reentrant=False."
            )
        seen[tap.name] = out.clone() if tap.overwritten else out
        versions[tap.name] = seen[tap.name]._version
        if stop and len(seen) == len(taps):
            raise _Enough

    hooks = [
        net.get_submodule(tap.name).register_forward_hook(lambda _, __, out, tap=tap: look(tap, out))
        for tap in taps
    ]
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for tap in taps:
        if tap.name not in seen:
            raise MethodError(f"'{tap.name}' was not run, so there is nothing to look at.")
        if seen[tap.name]._version != versions[tap.name]:
            raise MethodError(
                f"What '{tap.name}' gave was overwritten in place afterwards. Tap another layer, or make "
                "what follows it work out of place (inplace=False)."
            )


class _Enough(BaseException):
    """Ends a forward whose rest is not needed; nothing that catches exceptions should catch it."""


# ---------------------------------------------------------------------- following a forward


@dataclass(eq=False)
class _Call:
    """A module that ran, once or more."""

    name: str
    module: nn.Module
    at: int  # in the order in which modules end
    out: Tensor
    version: int
    node: Node | None
    once: bool = True
    layers: int = 0  # that lie in front of its output, itself included
    open: bool = False  # the pictures reach it other than through averages over all positions


@dataclass
class _Stage:
    """A module that a stage ends with."""

    call: _Call
    stride: int | None = None
    channels: int | None = None
    shapes: set[tuple[int, int]] = field(default_factory=set)  # channels and positions, as they can be read
    layers: list[_Call] = field(default_factory=list)  # since the stage before it


_LAYERS = (nn.Conv2d, nn.Linear)


def _followed(net: nn.Module, x: Tensor) -> list[_Call]:
    """Every module with a tensor as output, in the order in which they ended."""
    calls: dict[str, _Call] = {}

    def look(name: str, module: nn.Module, out: Any) -> None:
        if isinstance(out, Tensor):
            once = name not in calls
            calls.pop(name, None)
            calls[name] = _Call(name, module, 0, out, out._version, out.grad_fn, once)

    modes = [(module, module.training) for module in net.modules()]
    hooks = [
        module.register_forward_hook(lambda module, _, out, name=name: look(name, module, out))
        for name, module in net.named_modules()
        if name
    ]
    try:
        net.eval()
        with torch.enable_grad():
            entry = x.detach().requires_grad_() * 1
            begin = entry.grad_fn
            net(entry)
    except Exception as error:
        given = f"{x.shape[1]} channels and {x.shape[2]} × {x.shape[3]} pixels"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MethodError(
            f"{type(net).__name__} cannot see pictures of {given}: {lines[0].rstrip('.')}. Give it the size "
            "and the channels that it was made for."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    ordered = list(calls.values())
    layers = {call.node for call in ordered if isinstance(call.module, _LAYERS)}
    known: dict[Node, tuple[int, bool]] = {}
    for at, call in enumerate(ordered):
        call.at = at
        if call.node is not None:
            call.layers, call.open = _way(call.node, begin, layers, known)
    return ordered


def _way(
    end: Node, begin: Node | None, layers: set[Node | None], known: dict[Node, tuple[int, bool]]
) -> tuple[int, bool]:
    """The most layers on a way to a node, and whether a way comes from the pictures openly."""
    stack = [end]
    while stack:
        node = stack[-1]
        below = [each for each, _ in node.next_functions if each is not None]
        unknown_yet = [each for each in below if each not in known]
        if node not in known and unknown_yet:
            stack += unknown_yet
            continue
        stack.pop()
        most = max((known[each][0] for each in below), default=0)
        arrives = node is begin or any(known[each][1] for each in below)
        averages = node.name().startswith(("Mean", "AdaptiveAvgPool"))
        known[node] = most + (node in layers), arrives and not averages
    return known[end]


# ---------------------------------------------------------------------- stages and their taps


def _declared(net: nn.Module, calls: Sequence[_Call]) -> list[_Stage]:
    """The modules that the network, or the first network inside of it, names in its `feature_info`."""
    ran = {call.name: call for call in calls}
    for prefix, module in net.named_modules():
        info = getattr(module, "feature_info", None)
        if not isinstance(info, list | tuple):
            continue
        stages = []
        for entry in info:
            call = ran.get(f"{prefix}.{entry.get('module')}".lstrip("."))
            if call is not None and call.out.ndim in (3, 4):
                stage = _Stage(call, entry.get("reduction"), entry.get("num_chs"))
                stage.shapes = _shapes(call.out)
                stages.append(stage)
        return sorted(stages, key=lambda stage: stage.call.at)
    return []


def _ends_of_sizes(net: nn.Module, calls: Sequence[_Call], example: Tensor) -> list[_Stage]:
    """Of the parts of the network in order the last at each size of the map; all that give tokens."""
    ran = {call.name: call for call in calls if call.out.ndim in (3, 4)}
    parts = sorted((ran[name] for name in _parts(net, "", ran) if name in ran), key=lambda call: call.at)
    parts = [call for call in parts if call.once]
    stages: dict[Any, _Stage] = {}
    for call in parts:
        tap = _tap(call, example)
        key = call.name if call.out.ndim == 3 else tap.positions
        stages.pop(key, None)
        stages[key] = _Stage(call, tap.stride, tap.channels, {(tap.channels, tap.positions)})
    tokens = {stage.stride for stage in stages.values() if stage.call.out.ndim == 3}
    return [
        stage
        for stage in stages.values()
        if (
            any(isinstance(each, _LAYERS) for each in stage.call.module.modules())
            if stage.call.out.ndim == 3
            else stage.stride not in tokens  # no map that tokens are only made of
        )
    ]


def _parts(module: nn.Module, name: str, ran: dict[str, _Call]) -> list[str]:
    """The children; in the place of a plain container its own, and of a row of alike blocks the blocks."""
    parts: list[str] = []
    for last, child in module.named_children():
        inner = f"{name}.{last}".lstrip(".")
        containers = [each for each in (child, *child.children()) if type(each) in _CONTAINERS]
        opened = type(child) in _CONTAINERS or any(_is_row(each, ran) for each in containers)
        parts += _parts(child, inner, ran) if opened and any(True for _ in child.children()) else [inner]
    return parts


_CONTAINERS = (nn.Sequential, nn.ModuleList)


def _is_row(container: nn.Module, ran: dict[str, _Call]) -> bool:
    """Whether it holds three or more blocks of one class that keep the shape of what goes through."""
    blocks = list(container.children())
    shapes = {call.out.shape for call in ran.values() if call.module in blocks}
    return len(blocks) >= 3 and len({type(block) for block in blocks}) == 1 and len(shapes) == 1


def _spread(stages: list[_Stage]) -> list[_Stage]:
    deep = [stage for stage in stages if stage.stride is None or stage.stride >= 4]
    kept = deep if len(deep) >= 2 else stages
    taken: list[_Stage] = []
    for stride in dict.fromkeys(stage.stride for stage in kept):
        same = [stage for stage in kept if stage.stride == stride]
        few = min(len(same), PER_STRIDE)
        taken += [same[len(same) * (k + 1) // few - 1] for k in range(few)]
    return taken


def _tap_of(stage: _Stage, example: Tensor) -> Tap | None:
    """The tap of a stage, where it has one."""
    shapes = {shape for shape in stage.shapes if stage.channels in (None, shape[0])}
    fitting = []
    for call in stage.layers:
        if call.once and call.open and call.out.ndim >= 3:
            axis = _axis(call, example)
            if (call.out.shape[axis], _positions(call.out, axis)) in shapes:
                fitting.append(call)
    if fitting:
        return _tap(max(fitting, key=lambda call: (call.layers, call.at)), example, stage.stride)
    if stage.call.once and stage.call.open:
        return _tap(stage.call, example, stage.stride, stage.channels)
    return None


def _tap(call: _Call, example: Tensor, stride: int | None = None, channels: int | None = None) -> Tap:
    axis, shape = _axis(call, example), call.out.shape
    if channels is not None and shape[axis] != channels and channels in (shape[1], shape[-1]):
        axis = 1 if shape[1] == channels else -1
    positions = _positions(call.out, axis)
    if stride is None:
        stride = max(round(math.sqrt(example.shape[2] * example.shape[3] / positions)), 1)
    return Tap(call.name, axis, shape[axis], positions, stride, call.out._version != call.version)


def _named(net: nn.Module, name: str, calls: Sequence[_Call], example: Tensor) -> tuple[int, Tap]:
    """A tap that a person named, and when it ran."""
    modules = [each for each, _ in net.named_modules() if each]
    if name not in modules:
        raise MethodError(unknown(f"layer of {type(net).__name__}", name, modules))
    call = next((call for call in calls if call.name == name), None)
    if call is None or call.out.ndim < 2:
        raise MethodError(f"'{name}' gives no map: it does not run, or its output is no tensor.")
    if not call.once:
        raise MethodError(f"'{name}' runs more than once in one forward; name a layer that runs once.")
    return call.at, _tap(call, example)


def _axis(call: _Call, example: Tensor) -> int:
    """Where the channels are: what the layer says, else what has not the proportions of the picture."""
    shape = call.out.shape
    if isinstance(call.module, nn.Conv2d):
        return 1
    if isinstance(call.module, nn.Linear) or len(shape) == 3:
        return -1
    height, width = example.shape[2:]
    if len(shape) == 4 and shape[1] * width == shape[2] * height and shape[2] * width != shape[3] * height:
        return -1
    return 1


def _positions(out: Tensor, axis: int) -> int:
    return out[0].numel() // out.shape[axis]


def _shapes(out: Tensor) -> set[tuple[int, int]]:
    """Channels and positions of an output [B, C, h, w], [B, h, w, C] or [B, N, D]."""
    ends = (1, -1) if out.ndim == 4 else (-1,)
    return {(out.shape[axis], _positions(out, axis)) for axis in ends}
