"""The contract that every method keeps, as a function anyone can run on theirs.

    from headstart.testing import check_method

    if __name__ == "__main__":      # two of the checks start processes of their own
        check_method(MyMethod)

Each check is a function below, named after what must hold; `CHECKS` lists them. A method that cannot keep
one of them says so in `known_failures`, with the reason; such a check must then really fail, so that the
note goes when the reason has gone. No test framework is needed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import math
import os
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from headstart.errors import ConfigError, MethodError, unknown
from headstart.method import Batch, Loss, Method, Phase
from headstart.parts.space import NOTHING
from headstart.registry import ROOMS, configure

CLASSES = 3
EPOCHS = 3  # the fewest in which an alternating plan is interrupted in each of its phases
SIZE = 32  # pixels


class ContractError(AssertionError):
    """A method breaks the contract: which check, what was given, what must hold."""


@dataclass(frozen=True)
class Case:
    """One method on one network, with pictures: what a check works with."""

    cls: type[Method]
    source: nn.Module  # never trained: every method gets a copy
    hyper: Mapping[str, Any] = field(default_factory=dict)

    def method(self, source: nn.Module | None = None, *, seed: int = 0) -> Method:
        """A new method, on a copy of the source network."""
        torch.manual_seed(seed)
        net = copy.deepcopy(self.source if source is None else source)
        return self.cls(net, CLASSES, example=self.train[0][0][:1], **self.hyper)

    @cached_property
    def seen(self) -> Seen:
        """A method trained from the first epoch to the last; not to be changed."""
        method, losses = self.method(), []
        losses.append(("outside any phase", method(*self.train[0])))
        train(method, self, look=lambda phase, loss: losses.append((phase, loss)))
        method.eval()
        return Seen(method, losses)

    @property
    def train(self) -> list[Batch]:
        """Two batches of pictures [6, 3, 32, 32] and labels [6]."""
        return _pictures(2, seed=1)

    @property
    def val(self) -> list[Batch]:
        """One such batch."""
        return _pictures(1, seed=2)


class Seen(NamedTuple):
    """A training, for the checks that only look."""

    method: Method
    losses: list[tuple[str, Loss]]  # what phase, and what one batch cost


def _pictures(batches: int, *, seed: int, size: int = 6) -> list[Batch]:
    made = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % CLASSES
    hue = torch.eye(CLASSES)[y][:, :, None, None]  # [B, 3, 1, 1]: a class is seen in its colour
    return [(torch.randn(size, 3, SIZE, SIZE, generator=made) + hue, y) for _ in range(batches)]


def networks() -> dict[str, Callable[[], nn.Module]]:
    """The small networks that `check_method` tries: with BatchNorm, with LayerNorm, a transformer."""
    import timm

    def make(name: str, **options: Any) -> Callable[[], nn.Module]:
        def net() -> nn.Module:
            torch.manual_seed(0)
            made: nn.Module = timm.create_model(name, pretrained=False, num_classes=7, **options)
            return made

        return net

    return {
        "BatchNorm (test_resnet)": make("test_resnet"),
        "LayerNorm (test_convnext)": make("test_convnext"),
        "transformer (test_vit)": make("test_vit", img_size=SIZE),
    }


# ---------------------------------------------------------------------- what it says about itself


def describes_itself(case: Case) -> None:
    """Name, room and paper are set; the module's docstring names the paper and what differs from it."""
    cls = case.cls
    for what in ("name", "paper"):
        value = getattr(cls, what, None)
        _require(isinstance(value, str) and value, f"{what} must be a text. Got {value!r}.")
    _require(
        cls.name == cls.name.lower().replace("_", "-").replace(" ", "-"),
        f"name must be lower case with dashes. Got {cls.name!r}.",
    )
    room = getattr(cls, "room", None)
    _require(room in ROOMS, f"room must be one of {', '.join(ROOMS)}. Got {room!r}.")
    about = sys.modules[cls.__module__].__doc__ or ""
    for heading in ("Paper:", "Differs from the paper"):
        _require(heading in about, f"The docstring of {cls.__module__} must have a passage '{heading}'.")


def declares_its_hyper_parameters(case: Case) -> None:
    """Each is keyword-only, annotated, has a default and a line under Args; presets name only those.

    Where a space stands in the annotation, its ends and its `off` are values that fit.
    """
    own = inspect.signature(Method.__init__).parameters
    declared = case.cls.hyper()
    for name, parameter in inspect.signature(case.cls.__init__).parameters.items():
        if name in own or parameter.kind is parameter.VAR_KEYWORD:
            continue
        _require(parameter.kind is parameter.KEYWORD_ONLY, f"'{name}' must be keyword-only.")
        _require(parameter.annotation is not parameter.empty, f"'{name}' must be annotated.")
        _require(parameter.default is not parameter.empty, f"'{name}' must have a default.")
        _require(declared[name].about, f"'{name}' must be described under Args in the class's docstring.")
        space = declared[name].space
        for value in () if space is None else (*space.ends, *(() if space.off is NOTHING else (space.off,))):
            try:
                configure(case.cls, None, {name: value})
            except ConfigError as error:
                raise ContractError(f"the space of '{name}' must hold what fits. {error}") from None
    for label, preset in case.cls.presets.items():
        for name in preset.hyper:
            _require(name in declared, f"preset '{label}' sets '{name}', which is no hyper-parameter.")
        _require(preset.about, f"preset '{label}' must say where its values come from.")


def says_whether_it_fits(case: Case) -> None:
    """`fits` answers None, or the reason on one line."""
    answer = case.cls.fits(case.source, {"classes": CLASSES, "train": 18, "val": 6, "img_size": SIZE})
    good = answer is None or (isinstance(answer, str) and answer and "\n" not in answer)
    _require(good, f"fits() must return None or one line. Got {answer!r}.")


def shows_plain_data(case: Case) -> None:
    """What `observe` and `diagnostics` give is data that JSON holds, before training and after it."""
    line = case.method().headline()
    plain = line is None or (isinstance(line, str) and "\n" not in line)
    _require(plain, f"headline() must be one line of text, or None. Got {line!r}.")
    for method in (case.method(), case.seen.method):
        for what in ("observe", "diagnostics"):
            shown = getattr(method, what)()
            _require(isinstance(shown, dict), f"{what}() must give a dictionary. Got {type(shown).__name__}.")
            try:
                same = json.loads(json.dumps(shown, allow_nan=False)) == shown
            except (TypeError, ValueError) as error:
                raise ContractError(f"{what}() must give data that JSON holds: {error}.") from None
            _require(same, f"{what}() must come back from JSON as it was: lists and texts, no tuples.")


# ---------------------------------------------------------------------- the plan and the loss


def plans_add_up(case: Case) -> None:
    """The epochs of the phases add up to what was asked; who learns is the method's own, and once."""
    for epochs in (1, 2, 3, 10):
        method = case.method()
        plan = method.plan(epochs)
        given = [phase.epochs for phase in plan]
        _require(sum(given) == epochs and min(given) >= 0, f"{epochs} epochs were planned as {given}.")
        here = {id(parameter) for parameter in method.parameters()}
        for phase in plan:
            learning = [id(parameter) for group in phase.groups for parameter in group.params]
            twice = len(learning) - len(set(learning))
            _require(not twice, f"phase '{phase.name}': {twice} parameters are in two groups.")
            strange = len(set(learning) - here)
            _require(not strange, f"phase '{phase.name}': {strange} parameters are not the method's own.")
            _require(learning or not phase.epochs, f"phase '{phase.name}' has epochs, and nothing learns.")


def parts_add_up(case: Case) -> None:
    """The parts of the loss are detached scalars and add up to the total, in every phase."""
    for phase, loss in case.seen.losses:
        _require(loss.total.ndim == 0, f"{phase}: total must be a scalar. Got {tuple(loss.total.shape)}.")
        for name, part in loss.parts.items():
            _require(part.ndim == 0, f"{phase}: part '{name}' must be a scalar. Got {tuple(part.shape)}.")
            _require(not part.requires_grad, f"{phase}: part '{name}' must be detached.")
        total, parts = loss.total.item(), sum(part.item() for part in loss.parts.values())
        close = math.isclose(total, parts, rel_tol=1e-5, abs_tol=1e-6)
        _require(close, f"{phase}: the parts add up to {parts}, the total is {total}.")


def logits_are_detached(case: Case) -> None:
    """The loss brings logits [B, K] without a graph, for the training accuracy."""
    for phase, loss in case.seen.losses:
        shape = tuple(loss.logits.shape)
        _require(shape == (6, CLASSES), f"{phase}: logits must be [6, {CLASSES}]. Got {list(shape)}.")
        _require(not loss.logits.requires_grad, f"{phase}: logits must be detached.")


def takes_class_shares(case: Case) -> None:
    """Labels may be class shares [B, K], as mixup gives them; all on one class is that class's label."""
    method = case.seen.method  # a fresh head says the same whatever the labels
    x, y = case.train[0]
    totals = []
    for labels in (y, torch.eye(CLASSES)[y]):
        torch.manual_seed(0)
        totals.append(method(x, labels).total.item())
    close = math.isclose(*totals, rel_tol=1e-4, abs_tol=1e-6)
    _require(close, f"labels give a loss of {totals[0]}, the same labels as shares one of {totals[1]}.")


# ---------------------------------------------------------------------- who learns


def frozen_means_frozen(case: Case) -> None:
    """What is in no group of a phase does not change in it: no weight, and no BatchNorm statistic."""
    method = case.method()
    for phase in method.phases(EPOCHS, case.train, case.val):
        learning = {id(parameter) for group in phase.groups for parameter in group.params}
        still = {n: p for n, p in method.named_parameters() if id(p) not in learning}
        for prefix, module in method.net.named_modules():
            own = [id(parameter) for parameter in module.parameters()]
            if own and learning.isdisjoint(own):
                still |= {f"net.{prefix}.{name}": buffer for name, buffer in module.named_buffers()}
        before = {name: tensor.detach().clone() for name, tensor in still.items()}
        _train_phase(method, phase, case)
        moved = [name for name, tensor in still.items() if not torch.equal(tensor, before[name])]
        _require(not moved, f"phase '{phase.name}' changed what is in none of its groups: {_few(moved)}.")


def what_learns_changes(case: Case) -> None:
    """Every group of a phase moves: a group that gets no gradient is not part of the objective."""
    method = case.method()
    for phase in method.phases(EPOCHS, case.train, case.val):
        before = [[p.detach().clone() for p in group.params] for group in phase.groups]
        _train_phase(method, phase, case)
        for group, old in zip(phase.groups, before, strict=True):
            moved = any(not torch.equal(p, q) for p, q in zip(group.params, old, strict=True))
            idle = not moved and group.lr > 0 and group.params
            _require(not idle, f"phase '{phase.name}': nothing in group '{group.name}' moved.")


def source_stays_as_it_was(case: Case) -> None:
    """Training changes no bit of the source, and the source shares no memory with what learns."""
    given = copy.deepcopy(case.source)
    torch.manual_seed(0)
    method = case.cls(copy.deepcopy(given), CLASSES, source=given, example=case.train[0][0][:1], **case.hyper)
    sources = {"the network given as source": given}
    if case.cls.keeps_source:
        sources["the method's own source"] = method.source.net
    before = {what: _values(net) for what, net in sources.items()}
    train(method, case)
    learning = {p.untyped_storage().data_ptr() for p in method.parameters()}
    for what, net in sources.items():
        changed = _differing(before[what], _values(net))
        _require(not changed, f"training changed {what}: {_few(changed)}.")
        shared = [n for n, p in net.named_parameters() if p.untyped_storage().data_ptr() in learning]
        _require(not shared, f"{what} shares its memory with what learns: {_few(shared)}.")
    inside = {id(p) for p in method.parameters()} & {
        id(p) for net in sources.values() for p in net.parameters()
    }
    _require(not inside, "the source must not be among the method's own parameters.")


# ---------------------------------------------------------------------- stopping, copying, moving


def resumes_bit_equal(case: Case) -> None:
    """Stopped after every epoch and resumed in a new method, training ends with the very same bits.

    The state of method and optimiser goes through `torch.save` and `torch.load(weights_only=True)`.
    Random numbers of Python and NumPy differ on purpose: only torch's are saved.
    """
    straight = case.method()
    random.seed(0)
    np.random.seed(0)
    train(straight, case)

    state: bytes | None = None
    for stop in range(1, EPOCHS + 1):
        method = case.method(seed=0 if state is None else stop)  # where it starts may be drawn too
        random.seed(stop)
        np.random.seed(stop)
        state = train(method, case, resume=state, stop=stop, fresh=0 if state is None else None)
        if state is None:
            break  # this plan was over before its epochs were
    else:
        method = case.method(seed=EPOCHS + 1)
        train(method, case, resume=state)
    differing = _differing(straight.state_dict(), method.state_dict())
    _require(not differing, f"after resuming, these differ from the straight run: {_few(differing)}.")
    x = case.val[0][0]
    with torch.no_grad():
        same = torch.equal(straight.predict(x), method.predict(x))
    _require(same, "after resuming, the weights are those of the straight run and predict() is not.")


def refuses_another_source(case: Case) -> None:
    """A method that keeps a source refuses a state that was saved with other source weights."""
    saved = case.method().state_dict()
    other = copy.deepcopy(case.source)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    method = case.method(other)
    if not case.cls.keeps_source:
        method.load_state_dict(saved)
        return
    try:
        method.load_state_dict(saved)
    except MethodError:
        return
    raise ContractError("a state that was saved with other source weights was loaded without an error.")


def copies_are_independent(case: Case) -> None:
    """A deep copy, taken in mid-training, trains as the original would and leaves it alone."""
    method = case.method()
    train(method, case, stop=1)
    twin = copy.deepcopy(method)
    before = _values(method)
    train(twin, case, fresh=7)
    touched = _differing(before, method.state_dict())
    _require(not touched, f"training a copy changed the original: {_few(touched)}.")
    train(method, case, fresh=7)
    differing = _differing(method.state_dict(), twin.state_dict())
    _require(not differing, f"a copy trains otherwise than the original: {_few(differing)}.")


def keeps_its_type(case: Case) -> None:
    """In float64 everything is float64: the loss, the weights after training, the logits, the export."""
    method = case.method().double()
    totals: list[Loss] = []
    train(method, case, dtype=torch.float64, look=lambda _, loss: totals.append(loss))
    totals.append(method(case.val[0][0].double(), case.val[0][1]))
    _require(
        all(loss.total.dtype == torch.float64 for loss in totals),
        f"the loss must be float64. Got {totals[0].total.dtype}.",
    )
    floating = {n: t for n, t in method.net.state_dict().items() if t.is_floating_point()}
    floating |= dict(method.named_parameters())
    wrong = [name for name, tensor in floating.items() if tensor.dtype != torch.float64]
    _require(not wrong, f"these must be float64: {_few(wrong)}.")
    with torch.no_grad():
        x = case.val[0][0].double()
        for what, logits in {"predict()": method.predict(x), "the export": method.export()(x)}.items():
            _require(logits.dtype == torch.float64, f"{what} must answer in float64. Got {logits.dtype}.")


def keeps_its_device(case: Case) -> None:
    """Moved to an accelerator, everything is there, what was measured included; needs one to be seen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = case.seen.method
    if device.type != "cpu":
        method = case.method().to(device)
        train(method, case, device=device)
    tensors = dict(method.named_parameters()) | dict(method.named_buffers())
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device.type]
    _require(not elsewhere, f"these must be on {device}: {_few(elsewhere)}.")
    again = case.method().to(device)
    again.load_state_dict(torch.load(io.BytesIO(_saved(method.state_dict())), map_location="cpu"))
    elsewhere = [name for name, tensor in again.named_buffers() if tensor.device.type != device.type]
    _require(not elsewhere, f"after loading, these must be on {device}: {_few(elsewhere)}.")


def stays_finite_in_bf16(case: Case) -> None:
    """Under bfloat16 autocast the loss, its parts and all weights stay finite."""

    def look(phase: str, loss: Loss) -> None:
        for name, value in {"total": loss.total, **loss.parts}.items():
            _require(bool(value.isfinite()), f"{phase}: {name} is {value.item()} under bfloat16.")

    method = case.method()
    with torch.autocast("cpu", torch.bfloat16):
        train(method, case, look=look)
    wrong = [name for name, parameter in method.named_parameters() if not parameter.isfinite().all()]
    _require(not wrong, f"not finite after training under bfloat16: {_few(wrong)}.")


# ---------------------------------------------------------------------- what is left


def export_says_what_predict_says(case: Case) -> None:
    """The export's logits are those of `predict` in eval mode, to 1e-6 of their size."""
    method = case.seen.method
    before = _values(method)
    net = method.export()
    x = case.val[0][0]
    _require(not any(module.training for module in net.modules()), "the export must be in eval mode.")
    with torch.no_grad():
        ours, theirs = method.predict(x), net(x)
    worst = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
    _require(worst <= 1e-6, f"export and predict differ by {worst:.1e} of the logits' size.")
    changed = _differing(before, method.state_dict())
    _require(not changed, f"export() changed the method: {_few(changed)}.")
    ours_at = {p.untyped_storage().data_ptr() for p in method.parameters()}
    shared = [n for n, p in net.named_parameters() if p.untyped_storage().data_ptr() in ours_at]
    _require(not shared, f"the export shares its memory with the method: {_few(shared)}.")


def export_is_plain(case: Case) -> None:
    """The export holds no class of headstart's, and no hooks that the source did not have."""
    net = case.seen.method.export()
    for name, module in net.named_modules():
        ours = [each for each in type(module).__mro__ if each.__module__.split(".")[0] == "headstart"]
        _require(not ours, f"the export's '{name}' is a {type(module).__name__}, a class of headstart's.")
    hooks = [sum(map(_hooks, each.modules())) for each in (case.source, net)]
    _require(hooks[1] <= hooks[0], f"the export has {hooks[1]} hooks, the source had {hooks[0]}.")


def predicts_each_picture_alone(case: Case) -> None:
    """In eval mode the answer for a picture does not depend on the others of its batch."""
    method = case.seen.method
    x = case.val[0][0]
    with torch.no_grad():
        together = method.predict(x)
        alone = torch.cat([method.predict(x[i : i + 1]) for i in range(len(x))])
    worst = float((together - alone).abs().max() / together.abs().max().clamp(min=1))
    _require(worst <= 1e-4, f"alone and in a batch, the logits of a picture differ by {worst:.1e}.")


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


# ---------------------------------------------------------------------- two processes


def ranks_stay_identical(case: Case) -> None:
    """Two processes with different data and random numbers hold the same bits after training."""
    _require_none(two_ranks([case])[0].apart)


def ranks_average_like_one_process(case: Case) -> None:
    """The gradient averaged over two processes is that of one process on the joined batch."""
    _require_none(two_ranks([case])[0].gradients)


class Ranks(NamedTuple):
    """What two processes found out about one method; None where all is well."""

    apart: str | None
    gradients: str | None


def two_ranks(cases: Sequence[Case]) -> list[Ranks]:
    """Train methods in two processes (gloo, float64, BatchNorm statistics held), one after the other.

    Both checks on ranks come from one such run, and starting processes takes most of the time, so whoever
    checks several methods gives all of them at once.

    Args:
        cases: methods that can be imported by a new process (none defined inside a function).
    """
    found: dict[int, Ranks] = {}
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < len(cases):
            left = {i: replace(case) for i, case in enumerate(cases) if i not in found}
            found |= _in_two_processes(left, Path(folder), attempt=len(found))
    return [found[i] for i in range(len(cases))]


def _in_two_processes(cases: dict[int, Case], folder: Path, attempt: int) -> dict[int, Ranks]:
    """What came of the cases, up to the first that broke: its two processes cannot go on together."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    meeting = folder / f"meeting-{attempt}"
    unpicklable = {i: _unpicklable(case) for i, case in cases.items()}
    if any(unpicklable.values()):
        return {i: Ranks(reason, reason) for i, reason in unpicklable.items() if reason}
    broken = None
    try:
        start_processes(  # type: ignore[no-untyped-call]
            _rank, (cases, meeting), nprocs=2, start_method="spawn"
        )
    except (ProcessRaisedException, ProcessExitedException) as error:
        broken = str(error).strip().splitlines()[-1]
    found = {}
    for i in cases:
        ours = [Path(f"{meeting}-{i}-{rank}") for rank in (0, 1)]
        if all(path.exists() for path in ours):
            halves = [Ranks(*pickle.loads(path.read_bytes())) for path in ours]
            found[i] = Ranks(halves[0].apart or halves[1].apart, halves[0].gradients or halves[1].gradients)
        else:
            noted = Path(f"{meeting}-{i}-broke")
            reason = noted.read_text(encoding="utf-8") if noted.exists() else broken
            found[i] = Ranks(*(f"in two processes: {reason or 'they ended early'}",) * 2)
            break
    return found


def _unpicklable(case: Case) -> str | None:
    try:
        pickle.dumps(case)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return f"the checks on two ranks start new processes, and these cannot import the method: {error}"
    return None


def _rank(rank: int, cases: dict[int, Case], meeting: Path) -> None:
    import torch.distributed as dist

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name has to be resolved
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    try:
        for i, case in cases.items():
            try:
                found = tuple(_train_as_rank(rank, case))
            except Exception as error:
                _note(Path(f"{meeting}-{i}-broke"), f"{type(error).__name__}: {error}")
                raise
            Path(f"{meeting}-{i}-{rank}").write_bytes(pickle.dumps(found))
    finally:
        dist.destroy_process_group()


def _note(path: Path, what: str) -> None:
    """Write it down unless the other rank has: what breaks second only lost its partner."""
    with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(what)


def _train_as_rank(rank: int, case: Case) -> Ranks:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    joined = [(x.double(), y) for x, y in _pictures(2, seed=3, size=12)]
    mine = [(x[rank::2], y[rank::2]) for x, y in joined]
    method = case.method(seed=rank).double()
    method.norm = "eval"
    worst = 0.0
    for phase in method.phases(EPOCHS, mine, mine[:1]):
        optimizer = _sgd(phase)
        wrapped = DistributedDataParallel(method)
        for step in range(phase.epochs * len(mine)):
            alone = copy.deepcopy(method)
            for each, (x, y) in ((alone, joined[step % 2]), (wrapped, mine[step % 2])):
                torch.manual_seed(step)
                each(x, y).total.backward()
            for p, q in zip(alone.parameters(), method.parameters(), strict=True):
                if p.grad is not None and q.grad is not None:
                    size = p.grad.abs().max().clamp(min=1e-6)
                    worst = max(worst, float((p.grad - q.grad).abs().max() / size))
            optimizer.step()
            optimizer.zero_grad()
    digests: list[Any] = [None, None]
    ours = {name: _bytes(value) for name, value in method.state_dict().items()}
    dist.all_gather_object(digests, ours)
    names = digests[0].keys() | digests[1].keys()
    apart = sorted(name for name in names if digests[0].get(name) != digests[1].get(name))
    return Ranks(
        f"after training, two ranks differ in: {_few(apart)}." if apart else None,
        f"averaged and joined gradients differ by {worst:.1e} of their size." if worst > 1e-7 else None,
    )


# ---------------------------------------------------------------------- running the checks

CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        describes_itself,
        declares_its_hyper_parameters,
        says_whether_it_fits,
        shows_plain_data,
        plans_add_up,
        parts_add_up,
        logits_are_detached,
        takes_class_shares,
        frozen_means_frozen,
        what_learns_changes,
        source_stays_as_it_was,
        resumes_bit_equal,
        refuses_another_source,
        copies_are_independent,
        keeps_its_type,
        keeps_its_device,
        stays_finite_in_bf16,
        export_says_what_predict_says,
        export_is_plain,
        predicts_each_picture_alone,
        ranks_stay_identical,
        ranks_average_like_one_process,
    )
}
ON_RANKS = ("ranks_stay_identical", "ranks_average_like_one_process")


def check_method(
    cls: type[Method],
    *,
    make_net: Callable[[], nn.Module] | None = None,
    hyper: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
) -> dict[str, str]:
    """Check that a method keeps the contract.

    Args:
        cls: the method.
        make_net: makes a network with a head, for pictures [B, 3, 32, 32]; None: three small ones from
            timm (`networks`), those that the method says it fits.
        hyper: hyper-parameters, where the defaults are not what should be checked.
        only: names of checks; None: all of `CHECKS`.

    Returns:
        Check to "holds" or "known failure: " and the reason.

    Raises:
        ContractError: all that does not hold.
    """
    cases = cases_of(cls, make_net=make_net, hyper=hyper)
    wanted = list(CHECKS if only is None else only)
    for name in wanted:
        if name not in CHECKS:
            raise ContractError(unknown("check", name, CHECKS))
    ranks = two_ranks([for_ranks(cases)])[0] if set(wanted) & set(ON_RANKS) else None
    report, broken = {}, []
    for name in wanted:
        try:
            report[name] = run_check(name, cases, ranks=ranks)
        except ContractError as error:
            broken.append(str(error))
    if broken:
        raise ContractError("\n".join(broken))
    return report


def cases_of(
    cls: type[Method],
    *,
    make_net: Callable[[], nn.Module] | None = None,
    hyper: Mapping[str, Any] | None = None,
) -> dict[str, Case]:
    """The networks a method is checked on, by name: those it says it fits."""
    stray = [name for name in cls.known_failures if name not in CHECKS]
    if stray:
        raise ContractError(f"{cls.__name__}.known_failures: {unknown('check', stray[0], CHECKS)}")
    made = {name: make() for name, make in (networks() if make_net is None else {"it": make_net}).items()}
    task = {"classes": CLASSES, "train": 18, "val": 6, "img_size": SIZE}
    reasons = {name: cls.fits(net, task) for name, net in made.items()}
    cases = {name: Case(cls, net, dict(hyper or {})) for name, net in made.items() if reasons[name] is None}
    if not cases:
        raise ContractError(f"{cls.__name__} fits none of the networks; give make_net. It says: {reasons}")
    return cases


def for_ranks(cases: Mapping[str, Case]) -> Case:
    """The case to check on two ranks: a network without BatchNorm where there is one.

    Batch statistics of two halves are not those of the whole, and not every method can hold them.
    """

    def normed(case: Case) -> bool:
        return any(isinstance(module, _BatchNorm) for module in case.source.modules())

    return min(cases.values(), key=normed)


def run_check(name: str, cases: Mapping[str, Case], *, ranks: Ranks | None = None) -> str:
    """Run one check on every network; "holds", or "known failure: " and the reason.

    Args:
        name: a key of `CHECKS`.
        cases: network to case, of one method.
        ranks: what `two_ranks` found for this method, if it ran already.

    Raises:
        ContractError: it does not hold; or it was declared to fail and holds on all networks.
    """
    failures = []
    if name in ON_RANKS:
        given = two_ranks([for_ranks(cases)])[0] if ranks is None else ranks
        reason = given.apart if name == "ranks_stay_identical" else given.gradients
        failures = [reason] if reason else []
    else:
        for network, case in cases.items():
            try:
                CHECKS[name](case)
            except ContractError as error:
                failures.append(f"on {network}: {error}")
            except Exception as error:  # noqa: BLE001  # whatever a method raises, it does not hold
                failures.append(f"on {network}: {type(error).__name__}: {error}")
    cls = next(iter(cases.values())).cls
    declared = cls.known_failures.get(name)
    if declared is None:
        if failures:
            raise ContractError(f"{cls.__name__} / {name}: {failures[0]}")
        return "holds"
    if not failures:
        raise ContractError(
            f"{cls.__name__} / {name} is declared a known failure ({declared}) and holds: take the note away."
        )
    return f"known failure: {declared}"


# ---------------------------------------------------------------------- training, as a careful user would


def train(
    method: Method,
    case: Case,
    *,
    resume: bytes | None = None,
    stop: int | None = None,
    fresh: int | None = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    look: Callable[[str, Loss], None] | None = None,
) -> bytes | None:
    """Train for `EPOCHS` epochs, or go on with a training.

    Args:
        method: new, or stopped in mid-training.
        case: where the pictures come from.
        resume: what an earlier call with `stop` returned.
        stop: epochs, over all phases, after which to stop.
        fresh: seed of torch's random numbers; None, or resuming: they go on.
        dtype: of the pictures.
        device: of the pictures.
        look: called with the phase's name and each batch's loss.

    Returns:
        The state to resume from when it stopped, None when it went to the end.
    """
    if fresh is not None:
        torch.manual_seed(fresh)
    saved: dict[str, Any] = {"optimizer": None, "done": 0}
    if resume is not None:
        saved = torch.load(io.BytesIO(resume), weights_only=True)
        method.load_state_dict(saved["method"])
        torch.set_rng_state(saved["rng"])
    done = saved["done"]
    data, val = ([(x.to(device, dtype), y.to(device)) for x, y in part] for part in (case.train, case.val))
    for phase in method.phases(EPOCHS, data, val):
        optimizer = _sgd(phase)
        if phase.done and resume is not None:
            optimizer.load_state_dict(saved["optimizer"])
        for _ in range(phase.done, phase.epochs):
            _epoch(method, phase, optimizer, data, look)
            method.finished_epoch()
            done += 1
            if done == stop:
                return _saved(
                    {
                        "method": method.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "rng": torch.get_rng_state(),
                        "done": done,
                    }
                )
    return None


def _train_phase(method: Method, phase: Phase, case: Case) -> None:
    optimizer = _sgd(phase)
    for _ in range(phase.epochs):
        _epoch(method, phase, optimizer, case.train)


def _epoch(
    method: Method,
    phase: Phase,
    optimizer: Optimizer,
    data: list[Batch],
    look: Callable[[str, Loss], None] | None = None,
) -> None:
    for x, y in data:
        loss = method(x, y)
        if look is not None:
            look(f"phase '{phase.name}'", loss)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()


def _sgd(phase: Phase) -> Optimizer:
    return phase.optimizer(torch.optim.SGD, lr=0.005, weight_decay=1e-3, momentum=0.9)


# ---------------------------------------------------------------------- comparing


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _require_none(failure: str | None) -> None:
    _require(failure is None, failure or "")


def _values(module: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(module.state_dict())


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of entries that are not the same bits in both, or missing in one."""
    names = list(dict.fromkeys([*a, *b]))
    return [name for name in names if name not in a or name not in b or _bytes(a[name]) != _bytes(b[name])]


def _bytes(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Tensor):
        return (repr(value),)
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(value.shape), str(value.dtype), flat.numpy().tobytes()


def _saved(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
