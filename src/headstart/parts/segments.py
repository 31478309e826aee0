"""A network cut at its stages into segments that can be run one by one.

A stage is a module that the network names in its `feature_info` (timm), else a child of the network, or of a
Sequential in it, after which the map changes. The network may be cut behind a stage where exactly one tensor
is live: all that follows can be computed from it. This is read off the network's own forward, which torch.fx
follows down to the stages and no further. Numbers that it reads off the pictures' size do not count as live;
they keep the value they have for the example. No architecture is known by name.

Segments hold names and look modules up in the network as it is: nothing is registered twice, and moving,
copying, saving and replacing the head go on as if there were no segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headstart.errors import MethodError, unknown
from headstart.parts.blank import blank
from headstart.parts.forward import Forward


@dataclass(frozen=True)
class Boundary:
    """A place between two segments, across which goes exactly one tensor."""

    name: str  # of the module it lies behind
    channels: int
    stride: int  # pixels of the picture per position of the map
    kind: Literal["map", "map, channels last", "tokens"]
    size: tuple[int, int]  # of the map, for pictures of the example's size
    prefix: int = 0  # tokens in front of the map's: class and register tokens

    def to_map(self, x: Tensor) -> Tensor:
        """The tensor that goes across here, as a map [B, C, h, w] without the tokens in front of it."""
        if self.kind == "tokens":
            return x[:, self.prefix :].transpose(1, 2).reshape(len(x), -1, *self.size)
        return x.permute(0, 3, 1, 2) if self.kind == "map, channels last" else x

    def from_map(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """What goes across here, made of a map [B, C, h, w] and the tokens [B, P, C] in front of it."""
        if self.kind == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            return tokens if prefix is None else torch.cat([prefix.to(tokens.dtype), tokens], 1)
        return x.permute(0, 2, 3, 1) if self.kind == "map, channels last" else x


class Segments:
    """A network as a chain: `run(0, x)`, `run(1, ·)` ... `run(len(boundaries), ·)` make its logits.

    Run one after the other they give what the network gives, in training mode too, to the bit and with the
    same gradients. `segments` makes them; `cut` keeps some of the boundaries.
    """

    def __init__(
        self, net: nn.Module, forwards: Mapping[bool, Forward], boundaries: Sequence[Boundary], classes: int
    ) -> None:
        self.net = net
        self.boundaries = list(boundaries)
        self.classes = classes  # that the logits have
        self._forwards = forwards  # in training mode, and in eval mode
        names = [boundary.name for boundary in boundaries]
        self._programs = {training: forward.divide(names) for training, forward in forwards.items()}

    def run(self, k: int, x: Tensor) -> Tensor:
        """Segment k: from boundary k - 1 (for k = 0 the pictures) to boundary k (for the last the logits).

        What comes in stays as it is, also in networks that overwrite their maps.
        """
        return self._programs[self.net.training][k](self.net, x)

    def cut(self, names: Iterable[str]) -> Segments:
        """The same network, cut behind these stages only."""
        wanted, here = list(names), [boundary.name for boundary in self.boundaries]
        for name in wanted:
            if name not in here:
                raise MethodError(unknown(f"stage of {type(self.net).__name__}", name, here))
        kept = [boundary for boundary in self.boundaries if boundary.name in wanted]
        return Segments(self.net, self._forwards, kept, self.classes)

    def prefix(self, x: Tensor) -> Tensor | None:
        """The tokens [B, P, D] in front of the map as they enter the first stage; None where there are none.

        Class and register tokens with their positions, the same for all pictures x [B, C, H, W]. They come
        from the network as it is, and gradients reach them.
        """
        forward = self._forwards[self.net.training]
        if forward.entry is None or not any(boundary.prefix for boundary in self.boundaries):
            return None
        return forward.entry(self.net, x[:1])[:, : forward.prefix].expand(len(x), -1, -1)


def segments(net: nn.Module, example: Tensor) -> Segments:
    """Find the stages of a network, and cut it at all of them.

    Args:
        net: any network that makes logits of pictures.
        example: pictures [B, C, H, W] of the size that it will be used on.

    Raises:
        MethodError: it cannot see the example, its forward cannot be followed, or there is no stage behind
            which a single tensor is live.
    """
    like = next(net.parameters(), example)
    x = example[:1].to(device=like.device, dtype=like.dtype)
    with _as_it_was(net, x), torch.no_grad():
        logits = _logits(net, x)
        for find in (_declared, _children):
            stages = find(net)
            if not stages:
                continue
            forwards = {mode: Forward(net.train(mode), list(stages), x) for mode in (True, False)}
            boundaries = _boundaries(net, forwards, stages, x)
            made = Segments(net, forwards, boundaries, logits.shape[-1])
            if boundaries and _says(made, x, logits):
                return made
    raise MethodError(
        f"{type(net).__name__} cannot be cut into segments: it has no stage behind which a single tensor is "
        "live."
    )


def uncuttable(net: nn.Module, size: int) -> str | None:
    """Why a network cannot be cut behind its stages, for pictures of this size, in one line; None: it can."""
    try:
        segments(net, blank(net, size))
    except MethodError as error:
        return " ".join(str(error).split())
    return None


def pairs(
    ours: Sequence[Boundary], theirs: Sequence[Boundary], strides: Sequence[int] | None = None
) -> list[tuple[Boundary, Boundary]]:
    """Boundaries of two networks that belong together, in order: their maps have the same stride.

    Of several stages of one stride the last counts. The last of all belong together whatever their strides:
    what follows them only pools. A plain transformer has one stride throughout: there a
    stride r stands for the depth at which a network of four stages (4, 8, 16, 32) would end the one with
    stride r, (log2 r - 1)/4 of the blocks. Strides within a quarter of each other (14 and 16) count as equal.

    Args:
        ours: boundaries of one network.
        theirs: of the other.
        strides: those wanted; for one that is not there, the nearest that is and is not taken by a larger
            one. None: all there are.

    Raises:
        MethodError: they have no stride in common.
    """
    plain = [len(each) > 1 and len({boundary.stride for boundary in each}) == 1 for each in (ours, theirs)]
    if all(plain) and strides is None and _alike(ours[0].stride, theirs[0].stride):
        n = min(len(ours), len(theirs))
        return [(ours[len(ours) * i // n - 1], theirs[len(theirs) * i // n - 1]) for i in range(1, n + 1)]
    mapped = [side for side, is_plain in zip((ours, theirs), plain, strict=True) if not is_plain]
    there = {boundary.stride for side in mapped for boundary in side} or {4, 8, 16, 32}
    usable: dict[int, tuple[Boundary, Boundary]] = {}
    for r in sorted(there):
        a, b = (_at(each, r, is_plain) for each, is_plain in zip((ours, theirs), plain, strict=True))
        if a is not None and b is not None and _alike(a.stride, b.stride):
            usable[r] = (a, b)
    if not usable:
        has = [" ".join(map(str, sorted({each.stride for each in side}))) for side in (ours, theirs)]
        raise MethodError(
            f"The two networks have no stage of the same stride: one has {has[0]}, the other {has[1]}."
        )
    end = ours[-1], theirs[-1]
    usable = {r: pair for r, pair in usable.items() if pair[0] != end[0] and pair[1] != end[1]}
    usable[max(there)] = end
    if strides is not None:
        taken: set[int] = set()
        for asked in sorted(strides, reverse=True):
            taken.update(sorted(set(usable) - taken, key=lambda r: (abs(math.log2(r / asked)), -r))[:1])
        usable = {r: usable[r] for r in sorted(taken)}
    return list(dict.fromkeys(usable.values()))


def _at(boundaries: Sequence[Boundary], stride: int, plain: bool) -> Boundary | None:
    if plain:
        depth = round(len(boundaries) * (math.log2(stride) - 1) / 4)
        return boundaries[min(max(depth, 1), len(boundaries)) - 1]
    alike = [boundary for boundary in boundaries if _alike(boundary.stride, stride)]
    return alike[-1] if alike else None


def _alike(a: int, b: int) -> bool:
    return max(a, b) <= 1.25 * min(a, b)


# ---------------------------------------------------------------------- finding stages


def _declared(net: nn.Module) -> dict[str, int | None]:
    """The modules that a network names in its `feature_info`, and the stride it says they have."""
    modules = dict(net.named_modules())
    stages: dict[str, int | None] = {}
    info = getattr(net, "feature_info", None)
    for entry in info if isinstance(info, list | tuple) else ():
        if entry.get("module") and entry["module"] in modules:
            stages[entry["module"]] = entry.get("reduction")
    return stages


def _children(net: nn.Module) -> dict[str, int | None]:
    """The children; in the place of a plain Sequential or list its own, and of a network what it declares."""
    stages: dict[str, int | None] = {}
    for name, child in net.named_children():
        inside = _declared(child)
        if not inside and type(child) in (nn.Sequential, nn.ModuleList):
            inside = _children(child)
        stages |= {f"{name}.{each}": stride for each, stride in inside.items()} or {name: None}
    return stages


def _boundaries(
    net: nn.Module, forwards: Mapping[bool, Forward], stages: Mapping[str, int | None], x: Tensor
) -> list[Boundary]:
    """What goes across behind the stages where the network can be cut, in order."""
    forward = forwards[False]
    last = any(
        _channels_last(cut.shape, x) and not _channels_first(cut.shape, x) for cut in forward.cuts.values()
    )
    boundaries = []
    for name, cut in sorted(forward.cuts.items(), key=lambda item: item[1].behind):
        prefix = forward.prefix if cut.behind > forward.entered else 0
        found = _boundary(name, cut.shape, x, stages[name], prefix, last)
        if found is not None and name in forwards[True].cuts:
            boundaries.append(found)
    return boundaries if any(stages.values()) else _ends_of_stages(net, boundaries)


def _boundary(
    name: str, shape: torch.Size, x: Tensor, stride: int | None, prefix: int, last: bool
) -> Boundary | None:
    height, width = x.shape[2:]
    kind: Literal["map", "map, channels last", "tokens"] = "map"
    if len(shape) == 3:
        count, channels, kind = shape[1] - prefix, shape[2], "tokens"
        h = max(round(math.sqrt(max(count, 0) * height / width)), 1)
        if count < 1 or count % h:
            return None
        size = (h, count // h)
    elif len(shape) == 4:
        if _channels_last(shape, x) and (last or not _channels_first(shape, x)):
            channels, size, kind = shape[3], (shape[1], shape[2]), "map, channels last"
        else:
            channels, size = shape[1], (shape[2], shape[3])
    else:
        return None
    exact = height / size[0]
    stride = stride or (round(exact) if exact.is_integer() else 2 ** round(math.log2(exact)))
    return Boundary(name, channels, stride, kind, size, prefix if kind == "tokens" else 0)


def _channels_first(shape: torch.Size, x: Tensor) -> bool:
    """Whether the sides of a map [B, C, h, w] are to each other as those of the pictures."""
    return len(shape) == 4 and shape[2] * x.shape[3] == shape[3] * x.shape[2]


def _channels_last(shape: torch.Size, x: Tensor) -> bool:
    return len(shape) == 4 and shape[1] * x.shape[3] == shape[2] * x.shape[2]


def _ends_of_stages(net: nn.Module, boundaries: list[Boundary]) -> list[Boundary]:
    """Of successive maps of one shape the last, if anything that learns lies among them."""
    kept, learns = [], False
    shapes = [(boundary.channels, boundary.size) for boundary in boundaries]
    for i, here in enumerate(boundaries):
        learns = learns or any(True for _ in net.get_submodule(here.name).parameters())
        last = shapes[i] not in shapes[i + 1 : i + 2]
        if learns and (last or here.kind == "tokens"):
            kept.append(here)
        learns = learns and not last
    return kept


# ---------------------------------------------------------------------- looking at a network


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    try:
        logits = net.eval()(x)
    except Exception as error:
        given = f"{x.shape[1]} channels and {x.shape[2]} × {x.shape[3]} pixels"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MethodError(
            f"{type(net).__name__} cannot see pictures of {given}: {lines[0].rstrip('.')}. Give it the size "
            "and the channels that it was made for."
        ) from error
    if not isinstance(logits, Tensor):
        raise MethodError(f"{type(net).__name__} answers with a {type(logits).__name__}; logits are needed.")
    return logits


def _says(made: Segments, x: Tensor, logits: Tensor) -> bool:
    """Whether the segments say what the network says: a forward may do what leaves no trace in its steps."""
    for k in range(len(made.boundaries) + 1):
        x = made.run(k, x)
    return torch.allclose(x, logits, rtol=1e-4, atol=1e-5, equal_nan=True)


@contextmanager
def _as_it_was(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Inside, modes may change and random numbers may be drawn; afterwards nothing has happened."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
