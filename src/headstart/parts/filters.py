"""The layers of a network whose filters can be chosen per picture, in the order in which they run.

Found by watching the network run: no architecture is known by name. A layer is a convolution or a linear
layer that is called exactly once, for each picture by itself, and a filter is one of its output channels or
features. Left out are

- the head;
- what sees a picture only after it was pooled to one position: squeeze-and-excite, and layers of the head;
- what is called never (its weights are read by somebody else) or more than once;
- what does not work on pictures (a network that computes a position bias).

A BatchNorm belongs to a layer if it is the only one to read what the layer makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from headstart.parts.forward import cannot_see

KINDS = {
    "conv": "convolutions with a kernel larger than 1×1",
    "grouped": "convolutions in groups, depthwise ones among them",
    "pointwise": "1×1 convolutions",
    "linear": "linear layers",
}
_POOLING = ("mean", "sum", "amax", "adaptive_avg_pool2d", "adaptive_max_pool2d")


class Site(NamedTuple):
    """A layer whose filters can be chosen."""

    layer: str  # dotted name
    norm: str | None  # of the BatchNorm that alone reads it
    kind: str  # of `KINDS`
    inputs: int  # channels or features
    filters: int
    dims: int  # of what it is given, and of what it makes
    pieces: int  # along the first dimension, per picture: more than one where a map is cut into windows


class _Call(NamedTuple):
    given: Tensor
    made: Tensor
    pooled: bool


def find_sites(net: nn.Module, head: str, example: Tensor) -> list[Site]:
    """Find the layers of a network whose filters can be chosen; it stays as it is.

    Args:
        net: any network that makes logits of pictures.
        head: dotted name of its head.
        example: pictures [B, C, H, W] of the size that it will be used on.

    Raises:
        MethodError: the network cannot see the example.
    """
    like = next(net.parameters(), example)
    x = example[:1].to(device=like.device, dtype=like.dtype)
    other = x + torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
    with _as_it_was(net):
        alone, _ = _watched(net, x)
        together, watch = _watched(net, torch.cat([x, other]))
        sites = []
        for name, calls in together.items():
            layer = net.get_submodule(name)
            kind = _kind(layer)
            inside = name == head or name.startswith(f"{head}.")
            if kind is None or inside or len(calls) != 1 or calls[0].pooled:
                continue
            call, single = calls[0], alone[name][0].made
            if not _by_picture(single, call.made):
                continue
            norm = _norm_of(net, call.made, watch, together)
            if norm is not None and not _in_order(net.get_submodule(norm), call.made):
                norm = None
            sites.append(Site(name, norm, kind, *_widths(layer), single.ndim, len(single)))
    return sites


def plainly_normalised(norm: nn.Module, z: Tensor) -> Tensor:
    """What a BatchNorm makes of a map before the activation that some have inside."""
    assert isinstance(norm, _BatchNorm)
    if any(norm.children()):
        return _BatchNorm.forward(norm, z)
    made: Tensor = type(norm).forward(norm, z)
    return made


def after_norm(norm: nn.Module, z: Tensor) -> Tensor:
    """And what it goes on with: dropout and activation, as timm's have them."""
    for child in norm.children():
        z = child(z)
    return z


def _kind(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Linear):
        return "linear"
    if not isinstance(layer, nn.Conv2d):
        return None
    if layer.groups > 1:
        return "grouped"
    return "pointwise" if tuple(layer.kernel_size) == (1, 1) else "conv"


def _widths(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _by_picture(one: Tensor, two: Tensor) -> bool:
    """Whether the first half of what two pictures give is what the first of them gives alone."""
    return 2 * len(one) == len(two) and torch.allclose(two[: len(one)], one, rtol=1e-3, atol=1e-4)


def _norm_of(net: nn.Module, z: Tensor, watch: _Watch, calls: Mapping[str, list[_Call]]) -> str | None:
    """The BatchNorm that reads a map, if nobody else does."""
    readers = watch.readers.get(id(z), [])
    if len(readers) != 1 or readers[0] is None:
        return None
    return readers[0] if len(calls[readers[0]]) == 1 else None


def _in_order(norm: nn.Module, z: Tensor) -> bool:
    """Whether a BatchNorm is a norm and then its children, and works on as many channels as there are."""
    try:
        return torch.equal(after_norm(norm, plainly_normalised(norm, z)), norm(z))
    except (RuntimeError, TypeError):
        return False


class _Watch(TorchFunctionMode):
    """Follows what is computed from the pictures: what was pooled to one position, and who reads what."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.pooled = {id(x): False}  # by tensor: what is not in here does not come from the pictures
        self.readers: dict[int, list[str | None]] = {}  # by tensor: each reader, by name if it is a norm
        self.inside: str | None = None  # the norm that runs
        self._alive: list[Any] = [x]  # an id is a tensor's only as long as the tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if id(each) in self.pooled]
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        if given and made:
            self._alive.append(out)
            for each in given:
                self.readers.setdefault(id(each), []).append(self.inside)
            pooled = all(self.pooled[id(each)] for each in given)
            pools = getattr(func, "__name__", "") in _POOLING
            self.pooled |= {id(each): pooled or (pools and _one_position(each)) for each in made}
        return out


def _one_position(x: Tensor) -> bool:
    return x.ndim > 1 and sum(size > 1 for size in x.shape[1:]) <= 1


def _watched(net: nn.Module, x: Tensor) -> tuple[dict[str, list[_Call]], _Watch]:
    """The calls of all layers and norms in a forward, in order."""
    calls: dict[str, list[_Call]] = {}
    watch = _Watch(x)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            watch.inside = name

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            watch.inside = None
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                pooled = watch.pooled.get(id(args[0]), True)
                calls.setdefault(name, []).append(_Call(args[0], out, pooled))

        return hook

    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(enter(name)))
        if isinstance(module, _BatchNorm | nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(leave(name)))
    try:
        with watch:
            net.eval()(x)
    except Exception as error:
        raise cannot_see(net, x, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls, watch


@contextmanager
def _as_it_was(net: nn.Module) -> Iterator[None]:
    """Inside, modes may change and random numbers may be drawn; afterwards nothing has happened."""
    modes = [(module, module.training) for module in net.modules()]
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
