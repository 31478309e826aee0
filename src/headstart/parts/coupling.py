"""Which channels of a network can only go together, found over torch-pruning's dependency graph.

A unit is what can be taken out of a network by itself: a filter, and with it every other channel that is
added to it, multiplied with it, normalised or read behind it. Residual sums make one unit of a channel in
all blocks of a stage; a grouped convolution makes one of the same place in all its groups; a depthwise one
has none of its own. In a transformer the hidden features of an MLP are units, and so are heads of attention.

A unit is switched where its channel leaves a norm, before the activation, or the layer itself where no norm
follows (`gates`). Whether that takes it out is tried on the network: what reads the channel must be given
exactly nought, and the network that is really cut must say the same.

Left as they are, with the reason in `left`: channels that LayerNorm or GroupNorm normalises together (without
some of them the others come out differently), channels that a parameter of no layer goes with, and what the
network puts out.

Source of the graph: Fang, Ma, Song, Mi, Wang, "DepGraph: Towards Any Structural Pruning", CVPR 2023,
arXiv 2301.12900; the library is MIT licensed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.errors import MethodError
from headstart.parts.cutting import Kept, cut, kept_of
from headstart.parts.scaled import run_scaled


@dataclass
class Coupling:
    """The units of a network, numbered through; `Tensor` values are long, [channels], -1 for no unit."""

    layers: list[str] = field(default_factory=list)  # of each group of units, the layer it is named after
    sizes: list[int] = field(default_factory=list)  # units in each group
    out: dict[str, Tensor] = field(default_factory=dict)  # module: the unit of each channel it puts out
    into: dict[str, Tensor] = field(default_factory=dict)  # module: the unit of each channel it is given
    gates: dict[str, Tensor] = field(default_factory=dict)  # module: the unit of each channel switched there
    heads: dict[str, Tensor] = field(default_factory=dict)  # attention: the unit of each of its heads
    left: dict[str, str] = field(default_factory=dict)  # layer whose channels stay: why

    @property
    def units(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    @property
    def group(self) -> Tensor:
        """The group of each unit [units]."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def kept(self, keep: Tensor) -> Kept:
        """What stays of each module, from which units stay (bool [units]); what stays whole is left out."""
        return kept_of(self.out, self.into, self.heads, keep)


def find_coupling(
    net: nn.Module, head: str, example: Tensor, *, spare: Callable[[str], bool] = lambda _: False
) -> Coupling:
    """Find the units of a network; it stays as it is.

    Args:
        net: any network that makes logits of pictures.
        head: dotted name of its head, whose outputs stay.
        example: pictures [B, C, H, W] of the size that it will be used on.
        spare: layers that stay as they are, by dotted name.

    Raises:
        MethodError: torch-pruning is not installed, the network cannot be followed, or nothing can go.
    """
    x = example[:1].detach().cpu().float()
    x = x + torch.linspace(-1, 1, x.numel()).view_as(x)
    # A copy, all of whose weights ask for a gradient: the graph is read off autograd, and of a frozen
    # network there would be nothing to read.
    probe = copy.deepcopy(net).cpu().float().requires_grad_(True).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        groups, left = _groups(probe, head, x, spare)
        probe.requires_grad_(False)
        found = _joined(probe, groups, left)
        _require_units(net, found)
        return _tried(net, probe, found, groups, x)


def stem_of(net: nn.Module, example: Tensor) -> str | None:
    """The layer that is given the pictures: the first convolution or linear layer that runs."""
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, __, name=name: ran.append(name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(example[:1].to(next(net.parameters())))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return ran[0] if ran else None


# ---------------------------------------------------------------------- groups of channels

# (module, side, rows of its channels, the channel of the root layer that each row goes with)
_Item = tuple[str, str, Tensor, Tensor]


@dataclass
class _Group:
    root: str
    units: int
    items: list[_Item] = field(default_factory=list)  # rows go with units
    gates: list[str] = field(default_factory=list)  # norms; where there are none, layers
    more: list[str] = field(default_factory=list)  # layers that no norm follows
    heads: tuple[str, Tensor] | None = None


def _groups(
    net: nn.Module, head: str, x: Tensor, spare: Callable[[str], bool]
) -> tuple[list[_Group], dict[str, str]]:
    attention, inside = _attention(net, spare)
    graph = _graph(net, x)
    names = {module: name for name, module in net.named_modules()}
    groups, left, seen = list(attention), {}, set(inside)
    for name, layer in net.named_modules():
        plain = isinstance(layer, nn.Conv2d | nn.Linear) and layer in graph.module2node
        if not plain or name in seen or _depthwise(layer):
            continue
        pruner = graph.get_pruner_of_module(layer)
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        try:
            traced = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(width)))
        except Exception as error:  # noqa: BLE001  # the library fails in its own ways
            left[name] = f"torch-pruning cannot follow its channels ({type(error).__name__}: {error})"
            continue
        seen |= {
            names[item.dep.target.module]
            for item in traced.items
            if item.dep.target.module in names and graph.is_out_channel_pruning_fn(item.dep.handler)
        }
        reason = _reason(traced, names, head, inside, spare)
        if reason is None:
            made = _group(graph, traced, names, name, width)
            if isinstance(made, _Group):
                groups.append(made)
                continue
            reason = made
        left[name] = reason
    return groups, left


def _graph(net: nn.Module, x: Tensor) -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise MethodError(
            "Cutting channels needs the package torch-pruning: pip install 'headstart[prune]'."
        ) from None
    graph = torch_pruning.DependencyGraph()
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            # A fresh list: the library keeps what it adds to its default for the next network.
            graph.build_dependency(net, x, unwrapped_parameters=[], ignored_params=[], verbose=False)
    except Exception as error:
        where = _where(error, {module: name for name, module in net.named_modules()})
        raise MethodError(
            f"The channels of {type(net).__name__} cannot be followed by torch-pruning{where}: "
            f"{type(error).__name__}: {error}. Take another network, or a method that cuts nothing."
        ) from error
    return graph


def _where(error: BaseException, names: dict[nn.Module, str]) -> str:
    """The layer at which the library gave up, as far as its own variables tell."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        queue: list[Any] = [node]
        met: list[Any] = []
        while queue and len(met) < 200:
            each = queue.pop(0)
            met.append(each)
            name = names.get(getattr(each, "module", None))  # type: ignore[arg-type]
            if name:
                found = f" behind '{name}'"
                break
            queue += [before for before in getattr(each, "inputs", []) if before not in met]
        trace = trace.tb_next
    return found


def _reason(
    traced: Any, names: dict[nn.Module, str], head: str, inside: set[str], spare: Callable[[str], bool]
) -> str | None:
    """Why these channels have to stay, or None."""
    for item in traced.items:
        node = item.dep.target
        module = node.module
        if isinstance(module, nn.Parameter):
            return "a parameter that belongs to no layer goes with its channels"
        name = names.get(module)
        if name is None:
            if node.type == traced._DG.ops.OPTYPE.OUTPUT:
                return "the network puts its channels out"
            continue
        out = traced._DG.is_out_channel_pruning_fn(item.dep.handler)
        if name in inside:
            return f"attention '{name}' reads or writes its channels"
        if out and (name == head or name.startswith(f"{head}.")):
            return "the network puts its channels out"
        if spare(name) and out:
            return "it was asked to stay"
        if not isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm) and any(
            True for _ in module.parameters()
        ):
            return f"'{name}' ({type(module).__name__}) works on all its channels together"
        if any(root is None for root in item.root_idxs):
            return f"it cannot be told which channels of '{name}' go with its own"
    return None


def _group(graph: Any, traced: Any, names: dict[nn.Module, str], root: str, width: int) -> _Group | str:
    blocks = 1
    items: list[_Item] = []
    made = _Group(root, width)
    for item in traced.items:
        module = item.dep.target.module
        if module not in names:
            continue
        name, out = names[module], graph.is_out_channel_pruning_fn(item.dep.handler)
        rows, channels = torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs))
        if _grouped(module):
            blocks = max(blocks, module.groups)
        side = "out" if out else "in"
        items.append((name, side, rows, channels))
        if not out:
            continue
        if isinstance(module, _BatchNorm):
            made.gates.append(name)
        elif not any(isinstance(after.module, _BatchNorm) for after in item.dep.target.outputs):
            made.more.append(name)
    if width % blocks:
        return f"its {width} channels do not divide into {blocks} groups"
    made.units = width // blocks  # the same place in all groups of a grouped convolution
    made.items = [(name, side, rows, channels % made.units) for name, side, rows, channels in items]
    bare = [name for name in made.gates if graph.model.get_submodule(name).weight is None]
    if bare:
        return f"'{bare[0]}' has no scale that could switch a channel"
    if not made.gates:
        made.gates, made.more = made.more, []
    return made


def _attention(net: nn.Module, spare: Callable[[str], bool]) -> tuple[list[_Group], set[str]]:
    """Heads of timm's attention, and the layers of any attention, which have no other units."""
    from timm.layers.attention import Attention

    groups, inside = [], set()
    for name, module in net.named_modules():
        qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
        if isinstance(module, nn.MultiheadAttention) or qkv is not None:
            inside |= {f"{name}.{each}" for each, _ in module.named_modules() if each}
        known = type(module) is Attention and hasattr(module, "attn_dim")  # else its forward needs the width
        if not known or not isinstance(module.norm, nn.Identity) or getattr(module, "gate", None) is not None:
            continue
        if module.num_heads < 2 or spare(name):
            continue
        rows = torch.arange(module.attn_dim)
        unit = rows // module.head_dim  # of the values of a head, as of its queries and keys
        group = _Group(name, module.num_heads, heads=(name, torch.arange(module.num_heads)))
        group.items = [(f"{name}.qkv", "out", torch.arange(3 * module.attn_dim), unit.repeat(3))]
        group.items.append((f"{name}.proj", "in", rows, unit))
        # Attention is linear in the values: a head's output is switched by switching these.
        group.items.append((f"{name}.qkv", "gate", rows + 2 * module.attn_dim, unit))
        assert isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear)
        groups.append(group)
    return groups, inside


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels


def _grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and not _depthwise(module)


# ---------------------------------------------------------------------- put together, and tried


def _joined(net: nn.Module, groups: Iterable[_Group], left: dict[str, str]) -> Coupling:
    """Number the units through, and say for every module which of its channels is of which."""
    made = Coupling(left=dict(left))
    for group in groups:
        first = made.units
        made.layers.append(group.root)
        made.sizes.append(group.units)
        for name, side, rows, unit in group.items:
            where = {"out": made.out, "in": made.into, "gate": made.gates}[side]
            _put(where, name, _width(net.get_submodule(name), side), rows, first + unit)
            if side == "out" and name in group.gates:
                _put(made.gates, name, _width(net.get_submodule(name), side), rows, first + unit)
        if group.heads is not None:
            made.heads[group.heads[0]] = first + group.heads[1]
    return made


def _put(where: dict[str, Tensor], name: str, width: int, rows: Tensor, unit: Tensor) -> None:
    if name not in where:
        where[name] = torch.full((width,), -1, dtype=torch.long)
    where[name][rows] = unit


def _width(module: nn.Module, side: str) -> int:
    if isinstance(module, nn.Conv2d):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    assert isinstance(module, _BatchNorm)
    return module.num_features


def _tried(net: nn.Module, probe: nn.Module, found: Coupling, groups: list[_Group], x: Tensor) -> Coupling:
    """Switch half of all units off: nothing of them may arrive anywhere, and cutting must say the same."""
    x = torch.cat([x, x.flip(-1)])
    arrived = _arrives(probe, found, _half(found), x)
    if arrived and any(groups[i].more for i in arrived):
        for i in arrived:
            groups[i].gates += groups[i].more
        found = _joined(probe, groups, found.left)
        arrived = _arrives(probe, found, _half(found), x)
    if arrived:
        why = "switched off, its channels are not nought where they are read"
        found, groups = _without(probe, found, groups, dict.fromkeys(arrived, why))
        _require_units(net, found)
    wrong = _differing(probe, found, _half(found), x)
    if wrong is not None:  # which of them is it?
        alone = {
            i: "without some of its channels the network "
            + ("does not run" if math.isinf(off) else f"says something else than with these off ({off:.0e})")
            for i in range(len(groups))
            if (off := _differing(probe, found, _half(found, only=i), x)) is not None
        }
        found, groups = _without(probe, found, groups, alone)
        _require_units(net, found)
        if not alone or _differing(probe, found, _half(found), x) is not None:
            raise MethodError(
                f"{type(net).__name__} cannot be cut: without half of its channels it says something else "
                f"than with these switched off (by {wrong:.0e} of the logits' size)."
            )
    return found


def _without(
    net: nn.Module, found: Coupling, groups: list[_Group], why: dict[int, str]
) -> tuple[Coupling, list[_Group]]:
    stay = [group for i, group in enumerate(groups) if i not in why]
    return _joined(net, stay, found.left | {groups[i].root: reason for i, reason in why.items()}), stay


def _half(found: Coupling, only: int | None = None) -> Tensor:
    """Every other unit of each group stays, or of one group alone [units]."""
    keep = torch.cat([torch.arange(size) % 2 == 0 for size in found.sizes])
    return keep if only is None else keep | (found.group != only)


def _arrives(net: nn.Module, found: Coupling, keep: Tensor, x: Tensor) -> list[int]:
    """Groups of which something arrives where it is read, though it is switched off."""
    groups = set()

    def look(name: str, given: Tensor) -> None:
        unit = found.into[name].clamp(min=0)
        off = ~keep[unit] & (found.into[name] >= 0)
        axis = 1 if isinstance(net.get_submodule(name), nn.Conv2d) else given.ndim - 1
        given = given.movedim(axis, 0).flatten(1)
        groups.update(found.group[unit[off & (given != 0).any(1)]].tolist())

    hooks = [
        net.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
        for name in found.into
    ]
    try:
        with torch.no_grad():
            run_scaled(net, _switched(found, keep), x)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(groups)


def _differing(net: nn.Module, found: Coupling, keep: Tensor, x: Tensor) -> float | None:
    """By how much the cut network differs from the switched one, of the logits' size; None: it does not."""
    with torch.no_grad():
        switched = run_scaled(net, _switched(found, keep), x)
        try:
            smaller: Tensor = cut(copy.deepcopy(net), found.kept(keep))(x)
        except (RuntimeError, ValueError):  # shapes that do not go together
            return float("inf")
        worst = float((switched - smaller).abs().max() / switched.abs().max().clamp(min=1e-12))
    return None if worst <= 1e-4 else worst


def _switched(found: Coupling, keep: Tensor) -> dict[str, Tensor]:
    factor = torch.cat([keep.float(), torch.ones(1)])  # -1: no unit
    return {name: factor[unit] for name, unit in found.gates.items()}


def _require_units(net: nn.Module, found: Coupling) -> None:
    if found.sizes:
        return
    reasons = list(dict.fromkeys(f"'{name}': {why}" for name, why in found.left.items()))
    shown = "; ".join(reasons[:3]) or "it has no convolution or linear layer besides its head"
    raise MethodError(f"Nothing of {type(net).__name__} can be cut. {shown}.")
