"""What a network loses with each channel of a layer: its loss without that channel, minus its loss.

"Without" means that the channel of the layer's output is 0. For a convolution or a linear layer this is the
same as weights and bias of that channel set to 0; what follows (a norm, a sum) may make something else of it.

The plain way is one forward of the whole network per channel. Here what lies before the layer is computed
once, and only what comes after it runs again, on copies of the layer's output joined to one batch, each
without another channel. No weight is touched.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from headstart.errors import MethodError
from headstart.parts.taps import Tap

# Numbers of the layer's output that go on at once: on a CPU what its caches hold, a GPU wants more.
_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}

Criterion = Callable[[Tensor, Tensor], Tensor]


def ablation_scores(
    net: nn.Module, taps: Sequence[Tap], x: Tensor, y: Tensor, loss: Criterion, *, batch: int = 16
) -> dict[str, Tensor]:
    """Loss without a channel minus loss with all, for every channel of every tap.

    Args:
        net: in eval mode, so that every picture is judged alone; unchanged afterwards.
        taps: the layers.
        x: pictures [N, C, H, W].
        y: their labels [N], or class shares [N, K].
        loss: mean loss [] of logits [B, K] and labels.
        batch: pictures that go through the network at once.

    Returns:
        Tap name to scores [C], means over the pictures; above 0 where the channel is of use.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return {tap.name: _scores(net, tap, x, y, loss, batch) for tap in taps}


def _scores(net: nn.Module, tap: Tap, x: Tensor, y: Tensor, loss: Criterion, batch: int) -> Tensor:
    rest = Rest(net, tap.name, x)
    scores = torch.zeros(tap.channels, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    for pictures, labels in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        whole = rest.begin(pictures)
        intact = _losses(rest(whole), labels, loss, 1)
        copies = max(_AT_ONCE.get(x.device.type, _AT_ONCE["cpu"]) // whole.numel(), 1)
        found = []
        for channels in torch.split(torch.arange(tap.channels), copies):
            without = _times(whole, 0, len(channels))
            for copy, channel in zip(without.chunk(len(channels)), channels.tolist(), strict=True):
                copy.select(tap.axis, channel).zero_()
            found.append(_losses(rest(without), labels, loss, len(channels)))
        scores += (torch.cat(found) - intact) * (len(pictures) / len(x))
    return scores


def _losses(logits: Tensor, y: Tensor, loss: Criterion, copies: int) -> Tensor:
    """The loss of each copy [copies], for logits [copies · B, K]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([loss(each, y) for each in wide.chunk(copies)])


# ---------------------------------------------------------------------- resuming from a layer

_Run = tuple[str, int]  # a module, and the how-manieth of its runs


@dataclass
class _Part:
    """A tensor, or anything else, among what a module gave."""

    value: Any
    version: int = 0
    overwritten: bool = False  # by what ran later
    axis: int | None = None  # of the pictures; None: it is the same for all
    each: int = 0  # of that axis's size per picture
    needed: bool = True  # by what comes after the layer

    def handed(self, copies: int, pictures: int) -> Any:
        """What is handed out in its place for so many copies, which are so many pictures."""
        if self.axis is None:
            return self.value
        if not self.needed:
            return _shaped(self.value, self.axis, self.each * pictures)
        return self.value if copies == 1 and not self.overwritten else _times(self.value, self.axis, copies)


@dataclass
class _Given:
    """What a run of a module gave."""

    form: TreeSpec
    parts: list[_Part]


class Rest:
    """What a network does behind one of its layers:  out = rest.begin(x);  logits = rest(out).

    In one forward the outputs of all modules that ended before the layer began are kept, but for those that
    ran inside another such module. When the network runs again these modules hand out what was kept, the
    layer hands out what it is given, and only what follows is computed. Which outputs are needed is read off
    an autograd graph; the others only have to have the right shape.

    Args:
        net: in eval mode; it has to treat every picture alone.
        layer: dotted name of a module that runs once.
        x: pictures [N, C, H, W]; the first is looked at.

    Attributes:
        resumes: whether that gives what the network gives. Where it does not, because the forward does what
            cannot be seen from its modules, it runs from the start: as right, and slow.

    Raises:
        MethodError: the layer does not run exactly once, or its first axis is not that of the pictures.
    """

    def __init__(self, net: nn.Module, layer: str, x: Tensor) -> None:
        self.net, self.layer = net, layer
        self._given: dict[_Run, _Given] = {}
        with torch.no_grad():
            two = torch.cat([x[:1], x[:1].flip(-1)])
            given, out = self._look(two)
            again, of_three = self._look(torch.cat([two, x[:1]]))
            if 3 * len(out) != 2 * len(of_three):
                raise MethodError(f"The first axis of what '{layer}' gives is not that of the pictures.")
            self._x, self._x_needed, self._rows = two, True, len(out)
            slow = self._both(out)
            self.resumes = _axes(given, again)
            if self.resumes:
                self._given = given
                self.resumes = self._sees_what_is_needed(out) and _alike(self._both(out), slow)
        if not self.resumes:
            self._given, self._x_needed = {}, True

    def begin(self, x: Tensor) -> Tensor:
        """The layer's output for pictures [B, C, H, W], which what follows starts from."""
        runs = Counter[str]()
        seen: list[Tensor] = []

        def keep(name: str, out: Any) -> None:
            if name == self.layer:
                seen.append(out.clone())
            elif not seen:
                runs[name] += 1
                given = self._given.get((name, runs[name]))
                for part, value in zip(given.parts if given else (), tree_flatten(out)[0], strict=False):
                    if part.axis is not None and part.needed:
                        part.value = value.clone() if part.overwritten else value

        names = {self.layer} | {
            name
            for (name, _), given in self._given.items()
            if any(part.axis is not None and part.needed for part in given.parts)
        }
        with _hooked(self.net, names, after=keep), torch.no_grad():
            self.net(x)
        self._x, self._rows = x, len(seen[0])
        return seen[0]

    def __call__(self, out: Tensor) -> Tensor:
        """The logits that follow from this output of the layer; it may hold the pictures several times."""
        copies = len(out) // self._rows
        with self._handing_out(out, copies):
            x = self._x if copies == 1 else _times(self._x, 0, copies)
            logits: Tensor = self.net(x if self._x_needed else _shaped(x, 0, len(x)))
        return logits

    @contextmanager
    def _handing_out(self, out: Tensor, copies: int) -> Iterator[None]:
        """Inside, modules hand out what was kept as often as they ran before the layer did, and then run."""
        kept: dict[str, deque[_Given]] = {self.layer: deque()}
        for (name, _), given in self._given.items():
            kept.setdefault(name, deque()).append(given)

        def instead(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if name == self.layer:
                return out
            if not kept[name]:
                return forward(*args, **kwargs)
            given = kept[name].popleft()
            values = [part.handed(copies, copies * len(self._x)) for part in given.parts]
            return tree_unflatten(values, given.form)

        modules = {name: self.net.get_submodule(name) for name in kept}
        own = {name: vars(module).get("forward") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.forward = partial(instead, name, module.forward)
            yield
        finally:
            for name, module in modules.items():
                del module.forward
                if own[name] is not None:
                    vars(module)["forward"] = own[name]

    def _look(self, x: Tensor) -> tuple[dict[_Run, _Given], Tensor]:
        """What the modules gave that ended before the layer began, and what the layer gave."""
        given: dict[_Run, _Given] = {}
        open_: list[int] = []  # how much was there when each module that has not ended began
        runs = Counter[str]()
        seen: list[Tensor] = []
        begun: list[str] = []

        def before(name: str) -> None:
            if name == self.layer:
                begun.append(name)
            if not begun:
                open_.append(len(given))

        def after(name: str, out: Any) -> None:
            if name == self.layer:
                seen.append(out.clone() if isinstance(out, Tensor) else out)
            if not begun:
                runs[name] += 1
                for inside in list(given)[open_.pop() :]:
                    del given[inside]
                parts, form = tree_flatten(out)
                given[name, runs[name]] = _Given(form, [_Part(each, _version(each)) for each in parts])

        names = {name for name, _ in self.net.named_modules() if name}
        with _hooked(self.net, names, before=before, after=after):
            self.net(x)
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            raise MethodError(f"'{self.layer}' has to run once and give a tensor; it ran {len(seen)} times.")
        for each in given.values():
            for part in each.parts:
                part.overwritten = _version(part.value) != part.version
        return given, seen[0]

    def _sees_what_is_needed(self, out: Tensor) -> bool:
        """Find out which of what is kept has a part in the logits; False where nothing has."""
        parts = [part for given in self._given.values() for part in given.parts if part.axis is not None]
        known = [part.value for part in parts]
        differentiable = [part for part in parts if part.value.is_floating_point()]
        x = self._x
        with torch.enable_grad():
            leaves = [each.detach().clone().requires_grad_() for each in (out, x)]
            leaves += [part.value.detach().clone().requires_grad_() for part in differentiable]
            for part, leaf in zip(differentiable, leaves[2:], strict=True):
                part.value = leaf.clone()  # what follows may overwrite it
            self._x = leaves[1].clone()
            logits = self(leaves[0].clone())
            if not logits.requires_grad:
                return False
            grads = torch.autograd.grad(logits.sum(), leaves, allow_unused=True)
        self._x = x
        for part, value in zip(parts, known, strict=True):
            part.value = value
        self._x_needed = grads[1] is not None
        for part, grad in zip(differentiable, grads[2:], strict=True):
            part.needed = grad is not None
        return grads[0] is not None

    def _both(self, out: Tensor) -> Tensor:
        """The logits for twice the layer's output: as it is, and half of it."""
        return self(torch.cat([out, out / 2]))


def _axes(given: dict[_Run, _Given], again: dict[_Run, _Given]) -> bool:
    """Find the axis of the pictures in every tensor, from runs with two and three; False without one."""
    if given.keys() != again.keys():
        return False
    for run, each in given.items():
        if each.form != again[run].form:
            return False
        for part, other in zip(each.parts, again[run].parts, strict=True):
            if not isinstance(part.value, Tensor):
                if part.value != other.value:
                    return False
                continue
            sizes = list(zip(part.value.shape, other.value.shape, strict=False))
            differing = [axis for axis, (a, b) in enumerate(sizes) if a != b]
            if len(part.value.shape) != len(other.value.shape) or len(differing) > 1:
                return False
            for axis in differing:
                if 3 * sizes[axis][0] != 2 * sizes[axis][1]:
                    return False
                part.axis, part.each = axis, sizes[axis][0] // 2
    return True


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(a.dtype).eps ** 0.6  # 7e-5 in float32, 4e-10 in float64
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()), equal_nan=True)


def _times(x: Tensor, axis: int, copies: int) -> Tensor:
    return x.repeat([copies if i == axis else 1 for i in range(x.ndim)])


def _shaped(x: Tensor, axis: int, size: int) -> Tensor:
    """Like x but for one size, and without memory: nothing may depend on what is in it."""
    return x.new_zeros(()).expand([size if i == axis else each for i, each in enumerate(x.shape)])


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


@contextmanager
def _hooked(
    net: nn.Module,
    names: Iterable[str],
    after: Callable[[str, Any], None],
    before: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Inside, these are told when a module begins, and when it ends and with what."""
    hooks: list[RemovableHandle] = []
    for name in names:
        module = net.get_submodule(name)
        if before is not None:
            hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: before(name)))
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name: after(name, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
