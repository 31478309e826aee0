"""A network's forward as a list of steps, followed by torch.fx down to given modules and no further."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from headstart.errors import MethodError


def cannot_see(net: nn.Module, x: Tensor, error: Exception) -> MethodError:
    """What to say of a network that failed on pictures [B, C, H, W]."""
    given = f"{x.shape[1]} channels and {x.shape[2]} × {x.shape[3]} pixels"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return MethodError(f"{type(net).__name__} cannot see pictures of {given}: {lines[0]}")


@dataclass(frozen=True)
class _Earlier:
    """Stands among a step's arguments for the result of an earlier one."""

    name: str


class Step(NamedTuple):
    """One thing that a forward does: a node of torch.fx, with names in the place of nodes."""

    name: str
    op: str
    target: Any
    given: tuple[Any, Any]  # positional and keyword arguments

    def needs(self) -> list[str]:
        """The earlier steps whose results it takes."""
        names: list[str] = []
        _filled(self.given, _Earlier, lambda earlier: names.append(earlier.name))
        return names

    def calls(self, module: str) -> bool:
        """Whether it calls the module of that name."""
        return self.op == "call_module" and self.target == module

    def takes_apart(self, name: str) -> bool:
        """Whether it takes an element out of that result."""
        return self.target is operator.getitem and name in self.needs()

    def do(self, net: nn.Module, values: Mapping[str, Any]) -> Any:
        """Its result in a network, from those of earlier steps."""
        args, kwargs = _filled(self.given, _Earlier, lambda earlier: values[earlier.name])
        if self.op == "call_module":
            return net.get_submodule(self.target)(*args, **kwargs)
        if self.op == "get_attr":
            return operator.attrgetter(self.target)(net)
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


class Program(NamedTuple):
    """The steps from one tensor of a forward to another."""

    given: str
    wanted: str
    numbers: Mapping[str, Any]  # results of earlier steps that are the same for all pictures
    steps: list[tuple[Step, list[str]]]  # and whose results nobody needs after it
    overwrites: bool  # what is given

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Run them; x stays as it is."""
        values = {**self.numbers, self.given: x.clone() if self.overwrites else x}
        for step, done_with in self.steps:
            values[step.name] = step.do(net, values)
            for name in done_with:
                del values[name]
        result: Tensor = values[self.wanted]
        return result


class Cut(NamedTuple):
    """A place behind a module where one tensor is live: all that follows can be computed from it."""

    behind: int  # so many steps
    live: str  # the step that made the tensor
    shape: torch.Size  # of it, for the example


class Forward:
    """The forward of a network in the mode it is in, and the modules behind which it can be cut.

    Leaves the network in eval mode. A number that depends on the size of the batch counts as live.

    Args:
        net: the network.
        modules: dotted names of the modules down to which it is followed.
        x: a picture [1, C, H, W].

    Attributes:
        cuts: module to the place behind it, where there is one.
        prefix: how many tokens in front of the map's are the same for all pictures; 0 without tokens.
        entry: from the pictures to the last tokens [B, N, D] for which that holds; None without them.
        entered: how many steps lie before those.

    Raises:
        MethodError: it cannot be followed.
    """

    def __init__(self, net: nn.Module, modules: Sequence[str], x: Tensor) -> None:
        other = x + torch.linspace(0, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)
        both = torch.cat([x, other])
        self._start, self._end, self._steps = _follow(net, modules, both)
        net.eval()  # the mode is in the steps by now, and a single picture should move no statistics
        one, self._overwritten = self._results(net, x)
        two, _ = self._results(net, both)
        self._numbers: dict[str, Any] = {}  # read off the pictures' size
        self._varies = {self._start}  # with the pictures; what does not is computed wherever it is needed
        for step in self._steps:
            if not self._varies.isdisjoint(step.needs()):
                fixed = not _holds_tensor(one[step.name]) and one[step.name] == two[step.name]
                if fixed:
                    self._numbers[step.name] = one[step.name]
                else:
                    self._varies.add(step.name)
        calls = {name: [i for i, step in enumerate(self._steps) if step.calls(name)] for name in modules}
        cuts = {name: self._cut(at[0], one) for name, at in calls.items() if len(at) == 1}
        self.cuts = {name: cut for name, cut in cuts.items() if cut is not None}
        self.prefix, self.entry, self.entered = 0, None, len(self._steps)
        for i, step in enumerate(self._steps):
            leading = _leading(two[step.name]) if step.name in self._varies else 0
            if leading:
                self.prefix, self.entered = leading, i
                self.entry = self._program(self._start, 0, step.name, i + 1)

    def divide(self, names: Sequence[str]) -> list[Program]:
        """The programs between the pictures, the cuts behind these modules in order, and the logits."""
        programs, given, start = [], self._start, 0
        for cut in (self.cuts[name] for name in names):
            programs.append(self._program(given, start, cut.live, cut.behind))
            given, start = cut.live, cut.behind
        return [*programs, self._program(given, start, self._end, len(self._steps))]

    def _program(self, given: str, start: int, wanted: str, end: int) -> Program:
        """From a result that is live behind `start` steps to one among the first `end`."""
        there = {given} | {step.name for step in self._steps[:start] if step.name in self._numbers}
        steps: list[tuple[Step, list[str]]] = []
        later = {wanted}
        for step in _needed_for(wanted, [each for each in self._steps[:end] if each.name not in there])[::-1]:
            steps.insert(0, (step, sorted(set(step.needs()) - later)))
            later.update(step.needs())
        numbers = {name: number for name, number in self._numbers.items() if name in there & later}
        return Program(given, wanted, numbers, steps, given in self._overwritten)

    def _cut(self, call: int, results: Mapping[str, Any]) -> Cut | None:
        """Behind this step, and behind those that only take its result apart."""
        name, behind = self._steps[call].name, call + 1
        while behind < len(self._steps) and self._steps[behind].takes_apart(name):
            behind += 1
        before = self._varies & {self._start, *(step.name for step in self._steps[:behind])}
        live = before & {each for step in self._steps[behind:] for each in step.needs()}
        made_here = live & {step.name for step in self._steps[call:behind]}
        if len(live) != 1 or not made_here:
            return None
        tensor = results[next(iter(live))]
        return Cut(behind, live.pop(), tensor.shape) if isinstance(tensor, Tensor) else None

    def _results(self, net: nn.Module, x: Tensor) -> tuple[dict[str, Any], set[str]]:
        """Those of all steps, and which of them a later step overwrites."""
        results: dict[str, Any] = {self._start: x}
        versions = {self._start: x._version}
        for step in self._steps:
            results[step.name] = result = step.do(net, results)
            versions[step.name] = result._version if isinstance(result, Tensor) else 0
        tensors = {name: result for name, result in results.items() if isinstance(result, Tensor)}
        return results, {name for name, tensor in tensors.items() if tensor._version != versions[name]}


class Tracer(fx.Tracer):
    """Follows a forward into what contains one of the modules, and steps over everything else.

    Where the forward asks for a number (most ask for the pictures' size), it gets the example's.
    """

    proxy_buffer_attributes = True  # what is computed of a buffer must move with it

    def __init__(self, modules: Sequence[str], x: Tensor) -> None:
        super().__init__()
        self._opened = {name[:i] for name in modules for i, letter in enumerate(name) if letter == "."}
        self._x, self._values, self._looking = x, dict[str, Any](), False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step, and not followed."""
        return module_qualified_name not in self._opened

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Which way to go; what depends on the pictures cannot be written down as steps."""
        value = self._value(obj.node)
        return super().to_bool(obj) if isinstance(value, Tensor) else bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The elements of a result: as many as there are for the example."""
        return iter([operator.getitem(obj, i) for i in range(len(self._value(obj.node)))])

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A step, or to look: the call itself."""
        return forward(*args, **kwargs) if self._looking else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A step for a parameter or buffer, or to look: its value."""
        return attr_val if self._looking else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _value(self, node: fx.Node) -> Any:
        """What comes of a step for the example."""
        assert isinstance(self.root, nn.Module)
        training = self.root.training
        self.root.eval()  # to look moves no statistics
        self._looking = True
        for each in self.graph.nodes:
            if each.name not in self._values:
                first = not self._values
                held = each.op == "placeholder"
                given = self._x if first else next(iter(each.args), None)
                self._values[each.name] = given if held else _step(each).do(self.root, self._values)
        self._looking = False
        self.root.train(training)
        return self._values[node.name]


def _follow(net: nn.Module, modules: Sequence[str], x: Tensor) -> tuple[str, str, list[Step]]:
    """Names of what comes in and of the result, and the steps between them."""
    options = list(inspect.signature(net.forward).parameters.values())[1:]
    defaults = {each.name: each.default for each in options if each.default is not each.empty}
    before = set(vars(net))
    try:
        graph = Tracer(modules, x).trace(net, concrete_args=defaults or None)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MethodError(
            f"The forward of {type(net).__name__} cannot be followed by torch.fx: {lines[0]}"
        ) from error
    finally:
        own = set(vars(net)) - before  # tensors that the forward makes of nothing torch.fx knows
        for name in own:
            delattr(net, name)
    steps = [_step(node) for node in graph.nodes]
    start, end = steps[0].name, steps[-1].needs()[0]
    steps = _needed_for(end, steps[1:-1])
    if any(step.op == "placeholder" or (step.op == "get_attr" and step.target in own) for step in steps):
        raise MethodError(f"The forward of {type(net).__name__} makes a tensor that belongs to no module.")
    return start, end, steps


def _step(node: fx.Node) -> Step:
    given = _filled((node.args, node.kwargs), fx.Node, lambda each: _Earlier(each.name))
    return Step(node.name, node.op, node.target, given)


def _needed_for(wanted: str, steps: Sequence[Step]) -> list[Step]:
    names, needed = {wanted}, []
    for step in reversed(steps):
        if step.name in names:
            needed.append(step)
            names.update(step.needs())
    return needed[::-1]


def _filled(given: Any, kind: type, what: Callable[[Any], Any]) -> Any:
    """Arguments as they are, but for those of a kind."""
    if isinstance(given, kind):
        return what(given)
    if isinstance(given, tuple | list):
        filled = [_filled(each, kind, what) for each in given]
        return filled if isinstance(given, list) else tuple(filled)
    if isinstance(given, dict):
        return {key: _filled(each, kind, what) for key, each in given.items()}
    if isinstance(given, slice):
        return slice(*(_filled(each, kind, what) for each in (given.start, given.stop, given.step)))
    return given


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensor(each) for each in value)
    return isinstance(value, Tensor)


def _leading(value: Any) -> int:
    """How many leading tokens [2, N, D] two pictures have in common, where others differ."""
    if not isinstance(value, Tensor) or value.ndim != 3 or len(value) != 2:
        return 0
    differs = (value[0] != value[1]).any(1)
    return int(differs.int().argmax()) if differs.any() else 0
