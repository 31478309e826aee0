"""The one abstraction: a `Method` is a way to fine-tune a pretrained network.

Fine-tuning is  min over θ in Θ of  E[ℓ(f_θ(x), y)] + Ω(θ; θ⁰, x).  A method changes mainly one of four
things, and each is a question it may answer, with a default; plain fine-tuning is all four defaults:

    objective(x, y)   what is minimised?      the task loss
    predict(x)        what does it say?       the network's logits
    plan(epochs)      who learns when?        everything, for all epochs
    export()          what is left?           the network

The loop that trains any of them is the user's own, and eight lines long:

    method = L2SP(net, classes=200)
    for phase in method.phases(epochs=20, train=loader):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9)
        for _ in range(phase.epochs):
            for x, y in loader:
                method(x, y).total.backward()
                optimizer.step(); optimizer.zero_grad()
    net = method.export()
"""

from __future__ import annotations

import copy
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.errors import MethodError, unknown
from headstart.parts.depth import depths
from headstart.parts.frozen import Frozen
from headstart.parts.head import find_head, replace_head
from headstart.parts.kernels import is_kernel
from headstart.parts.memory import Memory
from headstart.parts.optimizers import Several
from headstart.parts.ranks import agree, agreed
from headstart.parts.space import Among, Between, Space
from headstart.parts.statistics import settle

Room = Literal["baseline", "constrain", "select", "reshape", "route"]
Batch = tuple[Tensor, Tensor]
Rule = Callable[..., Optimizer]


class Loss(NamedTuple):
    """What one batch cost."""

    total: Tensor  # []      backward() is called on this
    logits: Tensor  # [B, K]  detached; scored for the training accuracy
    parts: dict[str, Tensor]  # []  detached; they add up to total


class Group(NamedTuple):
    """Parameters that learn alike, and what they ask of the optimiser."""

    name: str
    params: list[nn.Parameter]
    lr: float = 1.0  # × the run's rate
    decay: float = 1.0  # × the run's weight decay; 0 where a penalty takes its place
    rule: Callable[[list[dict[str, Any]]], Optimizer] | None = None  # None: the run's optimiser


class Data(NamedTuple):
    """What a phase may look at before it begins; each yields batches (x, y) and can be walked again."""

    train: Iterable[Batch]  # as in training: shuffled, augmented
    val: Iterable[Batch]  # empty where there is none
    plain: Iterable[Batch]  # the training pictures in order, not augmented


def nothing(_: Any) -> None:
    """What a phase does on entering, and on meeting its optimiser, unless it says otherwise."""


@dataclass(frozen=True)
class Phase:
    """A stretch of ordinary training: who learns, from what, for how long."""

    name: str
    epochs: int
    groups: list[Group]  # exactly these learn; all else is frozen, statistics included
    objective: Callable[[Tensor, Tensor], Loss] = field(repr=False)
    enter: Callable[[Data], bool | None] = field(default=nothing, repr=False)  # once; False ends the plan
    bind: Callable[[Optimizer], None] = field(default=nothing, repr=False)  # for objectives that look ahead
    done: int = 0  # epochs that lie behind it already, after a resume

    def optimizer(self, rule: Rule, *, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
        """The optimiser of this phase: `rule` for every group that does not bring its own.

        Args:
            rule: such as `torch.optim.SGD`, called with parameter groups and `options`.
            lr: the run's rate; each group learns at `group.lr * lr`.
            weight_decay: the run's; each group decays by `group.decay * weight_decay`.
            options: passed on to `rule`.
        """
        usual = [
            {
                "params": group.params,
                "lr": lr * group.lr,
                "weight_decay": weight_decay * group.decay,
                "name": group.name,
            }
            for group in self.groups
            if group.rule is None and group.params
        ]
        optimizers = [rule(usual, **options)] if usual else []
        for group in self.groups:
            if group.rule is not None and group.params:
                optimizers.append(group.rule([{"params": group.params, "name": group.name}]))
        if not optimizers:
            raise MethodError(f"Phase '{self.name}' has nothing that learns, so it has no optimiser.")
        optimizer = optimizers[0] if len(optimizers) == 1 else Several(optimizers)
        self.bind(optimizer)
        return optimizer


class Preset(NamedTuple):
    """A named set of values: what a paper, or its code, did."""

    about: str  # where the values come from
    hyper: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] = {}  # fields of `headstart.records.Run`, overruled by what a person asks


class Parameter(NamedTuple):
    """One hyper-parameter of a method, as read from its signature and docstring."""

    name: str
    default: Any
    annotation: Any  # the plain type
    about: str
    schema: Any = Any  # the type with its bounds, as pydantic checks it
    space: Space | None = None  # where a tuner may look; None: it stays as it is

    @property
    def choices(self) -> list[Any] | None:
        """The allowed values where the annotation is a Literal, else None."""
        return (
            list(typing.get_args(self.annotation)) if typing.get_origin(self.annotation) is Literal else None
        )


class Method(nn.Module):
    """One way to fine-tune a pretrained network: four questions, each with a default.

    Args:
        net: the pretrained network with the head it was pretrained with; it is used, not copied.
        classes: how many classes the task has; None keeps the head as it is.
        source: the network to stay close to or learn from, where it is another one than `net`.
        head: dotted name of the module that makes the logits; None finds it.
        example: one input batch [1, C, H, W], for methods that have to see the network run once.
        pretrained: False: `net` came with random weights, and the run's rate is made for these.

    Keyword arguments that a subclass adds are its hyper-parameters; `hyper()` reads them.
    """

    name: ClassVar[str]
    room: ClassVar[Room]
    paper: ClassVar[str]
    keeps_source: ClassVar[bool] = False  # hold a Frozen copy of the net as it was given
    takes_source: ClassVar[bool] = False  # may learn from another network, of any architecture
    keeps_statistics: ClassVar[bool] = True  # may train with the source's BatchNorm statistics held
    follows: ClassVar[Literal["sgd", "adamw"] | None] = (
        None  # whose steps it foresees; taken unless one is asked for
    )
    takes_steps: ClassVar[bool] = True  # False: solved, so that the run's rate and decay change nothing
    presets: ClassVar[Mapping[str, Preset]] = {}
    known_failures: ClassVar[Mapping[str, str]] = {}  # contract check: the reason why it cannot hold

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        source: nn.Module | None = None,
        head: str | None = None,
        example: Tensor | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        # The copy is taken before the head is replaced: some methods need the source's own logits.
        self._source = Frozen(net if source is None else source) if self.keeps_source else None
        self.net = net
        self.head = find_head(net) if head is None else head
        modules = dict(net.named_modules())
        if self.head not in modules:
            layers = [name for name, module in modules.items() if name and not any(module.children())]
            raise MethodError(unknown(f"head of {type(net).__name__}", self.head, layers))
        if classes is not None:
            replace_head(net, self.head, classes)
        self.example = example
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.norm: Literal["train", "eval"] = "train"  # "eval": BatchNorm keeps its statistics throughout
        self.pretrained = pretrained
        self.memory = Memory()  # what `enter` measured: saved, moved, the same on every rank
        self._phase: Phase | None = None
        self._at, self._epochs_done, self._entered = 0, 0, -1
        self.register_load_state_dict_post_hook(_bring_memory)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ answered by each method

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """What is minimised?

        Args:
            x: pictures [B, C, H, W].
            y: labels [B], or class shares [B, K] under mixup.
        """
        return self.loss(self.net(x), y)

    def predict(self, x: Tensor) -> Tensor:
        """What does it say? Logits [B, K] for pictures [B, C, H, W]."""
        logits: Tensor = self.net(x)
        return logits

    def plan(self, epochs: int) -> list[Phase]:
        """Who learns when? The epochs of the phases add up to `epochs`."""
        return [Phase("fine-tune", epochs, self.groups(), self.objective)]

    def export(self) -> nn.Module:
        """What is left? A plain module, in eval mode, with no class of headstart's inside."""
        return copy.deepcopy(self.net).requires_grad_(True).eval()

    def headline(self) -> str | None:
        """One line on what will run, told when training begins; None: the name says it all."""
        return None

    def observe(self) -> dict[str, Any]:
        """What there is to see after an epoch, as plain data that JSON holds; empty by default."""
        return {}

    def diagnostics(self) -> dict[str, Any]:
        """What there is to see when all is done, as plain data that JSON holds; empty by default."""
        return {}

    # ------------------------------------------------------------------ the same for all

    @final  # type: ignore[misc]  # nn.Module declares it as an attribute
    def forward(self, x: Tensor, y: Tensor) -> Loss:
        """The objective of the phase we are in: what is called in training, and what DDP wraps."""
        return self.objective(x, y) if self._phase is None else self._phase.objective(x, y)

    @final
    def phases(
        self,
        epochs: int,
        train: Iterable[Batch],
        val: Iterable[Batch] = (),
        plain: Iterable[Batch] | None = None,
    ) -> Iterator[Phase]:
        """Walk the plan: freeze and unfreeze, let each phase measure, and hand it out for training.

        After `load_state_dict` the walk goes on where the saved one stood: with the phase that was under
        way, `done` epochs of it behind us (all of them, when it was saved just before the next began).

        Args:
            epochs: how long, over all phases.
            train: batches (x, y), as in training.
            val: batches for phases that choose something; never the test split.
            plain: the training pictures without augmentation; None: `train`.
        """
        plan = self.plan(epochs)
        planned = sum(phase.epochs for phase in plan)
        if planned != epochs:
            raise MethodError(f"The plan of {self.name} has {planned} epochs; {epochs} were given.")
        data = Data(train, val, train if plain is None else plain)
        while self._at < len(plan):
            phase = plan[self._at]
            self.requires_grad_(False)
            for group in phase.groups:
                for parameter in group.params:
                    parameter.requires_grad_(True)
            self._phase = phase
            if self._entered < self._at:
                self.train()
                ended = agreed(phase.enter(data) is False)
                _bring_memory(self)
                agree(self)  # ranks that measured different things would train different networks
                self._entered = self._at
                if ended:
                    self._at = len(plan)
                    break
            self.train()
            if phase.epochs:
                yield replace(phase, done=self._epochs_done)
            self._at, self._epochs_done = self._at + 1, 0
        self._phase = None
        self.eval()

    @final
    def finished_epoch(self) -> None:
        """Note that one more epoch of this phase is done, so that a saved method resumes after it."""
        self._epochs_done += 1

    @final
    def loss(self, logits: Tensor, y: Tensor, **terms: Tensor) -> Loss:
        """The task loss on logits [B, K], plus named terms that each are a scalar tensor."""
        wide = torch.promote_types(logits.dtype, torch.float32)  # float64 stays as it is
        task = self.criterion(logits.to(wide), y)
        total = task
        for term in terms.values():
            total = total + term
        parts = {"task": task.detach()} | {name: term.detach() for name, term in terms.items()}
        return Loss(total, logits.detach(), parts)

    @final
    def groups(
        self, body_lr: float = 1.0, decay: float = 1.0, *, head_lr: float = 1.0, layer_decay: float = 1.0
    ) -> list[Group]:
        """All parameters of the network in groups: body and head, norms and biases without decay.

        Args:
            body_lr: rate of the body, × the run's.
            decay: weight decay of kernels, × the run's.
            head_lr: rate of the head, × the run's; at most the body's where the network came with random
                weights, since the head is then as new as the rest and the run's rate is made for that.
            layer_decay: γ; a layer `d` steps below the head learns at `body_lr * γ**d`.
        """
        if not self.pretrained:
            head_lr = min(head_lr, body_lr)
        in_head = {id(parameter) for parameter in self.head_module.parameters()}
        depth = depths(self.net) if layer_decay != 1.0 else {}
        sorted_: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, parameter in self.net.named_parameters():  # tied weights come once
            kind = "kernels" if is_kernel(name, parameter) else "norms and biases"
            own_decay = decay if kind == "kernels" else 0.0
            if id(parameter) in in_head:
                key = (f"head, {kind}", head_lr, own_decay)
            else:
                below = depth.get(name, 0)
                label = f"body, {kind}" if layer_decay == 1.0 else f"body -{below}, {kind}"
                key = (label, body_lr * layer_decay**below, own_decay)
            sorted_.setdefault(key, []).append(parameter)
        return [Group(name, params, lr, own) for (name, lr, own), params in sorted_.items()]

    @property
    def source(self) -> Frozen:
        """The network as it was given, frozen; only for methods with `keeps_source`."""
        if self._source is None:
            raise MethodError(
                f"{self.name} keeps no source: set keeps_source = True on {type(self).__name__}."
            )
        return self._source

    @property
    def head_module(self) -> nn.Module:
        """The module that makes the logits."""
        return self.net.get_submodule(self.head)

    @classmethod
    def hyper(cls) -> dict[str, Parameter]:
        """The hyper-parameters: keyword arguments beyond `Method`'s own, described in the docstring."""
        own = inspect.signature(Method.__init__).parameters
        hints = typing.get_type_hints(cls.__init__)
        bounds = typing.get_type_hints(cls.__init__, include_extras=True)
        about = _described(inspect.getdoc(cls) or "")
        return {
            name: Parameter(
                name,
                parameter.default,
                hints.get(name, Any),
                about.get(name, ""),
                bounds.get(name, Any),
                _space(bounds.get(name)),
            )
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name not in own and parameter.kind is parameter.KEYWORD_ONLY
        }

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """None where this method can run, else the one-line reason why it cannot.

        Args:
            net: the network, as given.
            data: `classes`, `train`, `val` and `img_size` of the task.
        """
        return None

    # ------------------------------------------------------------------ nn.Module, told about us

    def train(self, mode: bool = True) -> Method:
        """Like `nn.Module.train`, but what does not learn stays in eval mode, statistics included."""
        super().train(mode)
        if mode:
            settle(self, hold_statistics=self.norm == "eval" and self.keeps_statistics)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._source is not None:
            self._source.apply(fn)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Where the plan stands, and which source this belongs to: saved with the weights."""
        source = None if self._source is None else self._source.fingerprint
        return {"at": self._at, "epochs_done": self._epochs_done, "entered": self._entered, "source": source}

    def set_extra_state(self, state: Any) -> None:
        """Go on where the saved plan stood; refuses a state that was saved with another source."""
        source = None if self._source is None else self._source.fingerprint
        if state["source"] != source:
            raise MethodError(
                f"This {self.name} state was saved with other source weights "
                f"({str(state['source'])[:12]}, here {str(source)[:12]}). "
                "Start from the network it was made with."
            )
        self._at, self._epochs_done, self._entered = state["at"], state["epochs_done"], state["entered"]


def _space(annotation: Any) -> Space | None:
    """The space that stands in an annotation, as in `Annotated[float, Between(0.1, 1.0)]`."""
    told = [each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, Between | Among)]
    return told[-1] if told else None


def _bring_memory(method: nn.Module, _: Any = None) -> None:
    """What was measured, or loaded, lies where the network lies."""
    assert isinstance(method, Method)
    at = next(method.net.parameters(), None)
    if at is not None:
        method.memory.to(at.device)


def _described(docstring: str) -> dict[str, str]:
    """The entries of a docstring's Args section: name to description on one line."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries: dict[str, str] = {}
    current = None
    for line in section.group(1).splitlines() if section else []:
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            current = entry.group(1)
            entries[current] = entry.group(2).strip()
        elif current and line.strip():
            entries[current] += " " + line.strip()
    return entries
