"""Taking channels out of a network for good, from plain data; it needs nothing but torch.

    {"layer1.0.conv1": {"out": "0-3 5"}, "layer1.0.conv2": {"in": "0-3 5"}, "blocks.0.attn": {"heads": "1"}}

says what stays of every layer that loses something: output channels, input channels, heads. Layers are
replaced by smaller ones of the same class in place, so that what is left is an ordinary network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.errors import ModelError

Kept = dict[str, dict[str, str]]


def kept_of(
    out: Mapping[str, Tensor], into: Mapping[str, Tensor], heads: Mapping[str, Tensor], keep: Tensor
) -> Kept:
    """What stays of each module; modules that lose nothing are left out.

    Args:
        out: module to the unit of each of its output channels, -1 where it is of none.
        into: the same for input channels.
        heads: the same for heads of attention.
        keep: which units stay, bool [units].
    """
    stays = torch.cat([keep.cpu(), torch.ones(1, dtype=torch.bool)])
    made: Kept = {}
    for side, units in (("out", out), ("in", into), ("heads", heads)):
        for name, unit in units.items():
            mine = stays[unit.cpu()]
            if not bool(mine.all()):
                made.setdefault(name, {})[side] = written(mine.nonzero().squeeze(1).tolist())
    return made


def cut(net: nn.Module, kept: Mapping[str, Mapping[str, str]]) -> nn.Module:
    """Take out of a network, in place, all that does not stay; gives the network back.

    Args:
        net: the network, with all its channels.
        kept: as described above.

    Raises:
        ModelError: the network has no such layer, or not so many channels.
    """
    modules = dict(net.named_modules())
    wide = getattr(net, "num_features", None)
    for name, sides in kept.items():
        if name not in modules:
            raise ModelError(f"The network has no layer '{name}' to take channels from.")
        module = modules[name]
        rows = {side: torch.tensor(read(places)) for side, places in sides.items()}
        try:
            if "heads" in rows:
                _keep_heads(module, len(rows["heads"]))
            elif isinstance(module, _BatchNorm):
                _keep_norm(module, rows["out"])
            elif isinstance(module, nn.Conv2d):
                _keep_conv(module, rows)
            elif isinstance(module, nn.Linear):
                _keep_linear(module, rows)
            else:
                raise ModelError(f"'{name}' is a {type(module).__name__}, from which nothing can be taken.")
        except (IndexError, KeyError) as error:
            raise ModelError(f"'{name}' has not the channels that should stay: {sides}.") from error
    _tell(net, wide)
    return net


def written(places: list[int]) -> str:
    """Ascending numbers as text: [0, 1, 2, 3, 5] is "0-3 5"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read(text: str) -> list[int]:
    """The numbers that `written` wrote.

    Raises:
        ModelError: it is no such text.
    """
    places: list[int] = []
    try:
        for run in text.split():
            first, _, last = run.partition("-")
            places += range(int(first), int(last or first) + 1)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{text!r} is no list of channels such as '0-3 5'.") from error
    return places


# ---------------------------------------------------------------------- layer by layer


def _keep_conv(conv: nn.Conv2d, rows: Mapping[str, Tensor]) -> None:
    weight = conv.weight
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    if "out" in rows:
        weight = _taken(weight, rows["out"])
        if conv.bias is not None:
            conv.bias = _like(conv.bias, _taken(conv.bias, rows["out"]))
    if depthwise:
        conv.in_channels = conv.groups = len(weight)
    elif "in" in rows:
        # A grouped convolution loses the same places in all its groups, so those of the first say it all.
        in_first = rows["in"] < conv.in_channels // conv.groups
        weight = _taken(weight.movedim(1, 0), rows["in"][in_first]).movedim(0, 1)
        conv.in_channels = len(rows["in"])
    conv.out_channels = len(weight)
    conv.weight = _like(conv.weight, weight)


def _keep_linear(linear: nn.Linear, rows: Mapping[str, Tensor]) -> None:
    weight = linear.weight
    if "out" in rows:
        weight = _taken(weight, rows["out"])
        if linear.bias is not None:
            linear.bias = _like(linear.bias, _taken(linear.bias, rows["out"]))
    if "in" in rows:
        weight = _taken(weight.movedim(1, 0), rows["in"]).movedim(0, 1)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = _like(linear.weight, weight)


def _keep_norm(norm: _BatchNorm, rows: Tensor) -> None:
    norm.num_features = len(rows)
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, _like(parameter, _taken(parameter, rows)))
    for name in ("running_mean", "running_var"):
        statistic = getattr(norm, name)
        if statistic is not None:
            setattr(norm, name, _taken(statistic, rows).clone())


def _keep_heads(attention: Any, heads: int) -> None:
    attention.num_heads = heads
    attention.attn_dim = heads * attention.head_dim


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    if len(rows) and int(rows.max()) >= len(tensor):
        raise IndexError
    return tensor.detach()[rows.to(tensor.device)]


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)


def _tell(net: nn.Module, wide: Any) -> None:
    """timm notes the width of the features on the network itself."""
    from headstart.parts.head import Classifier

    if not isinstance(net, Classifier) or not isinstance(wide, int):
        return
    head = net.get_classifier()
    inside = (
        [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if isinstance(head, nn.Module)
        else []
    )
    if len(inside) != 1:
        return
    now = inside[0].in_features if isinstance(inside[0], nn.Linear) else inside[0].in_channels
    for name in ("num_features", "head_hidden_size"):
        if getattr(net, name, None) == wide:
            setattr(net, name, now)
