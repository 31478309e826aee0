"""The head: the module whose output is the logits, found by one clear rule and replaced in place."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from headstart.errors import MethodError


@runtime_checkable
class Classifier(Protocol):
    """timm's classifier interface."""

    def get_classifier(self) -> nn.Module:
        """The module that makes the logits."""
        ...

    def reset_classifier(self, num_classes: int) -> None:
        """Replace it by a fresh one."""
        ...


def find_head(net: nn.Module) -> str:
    """The dotted name of the head.

    What timm's `get_classifier` gives where the network has it, or the layer as wide as the network's
    classes inside of that; else the last Linear (or 1×1 Conv2d) in the order in which modules were
    registered.

    Raises:
        MethodError: there is none, or there is more than one (distillation heads).
    """
    names: dict[int, str] = {id(module): name for name, module in net.named_modules()}
    if isinstance(net, Classifier):
        found = net.get_classifier()
        if isinstance(found, tuple | list):
            raise MethodError(_several(net, len(found)))
        if isinstance(found, nn.Module) and id(found) in names:
            if _makes_logits(found):
                return names[id(found)]
            inside = [module for module in found.modules() if _makes_logits(module)]
            wide = [module for module in inside if _width(module) == getattr(net, "num_classes", None)]
            if len(wide) > 1:
                raise MethodError(_several(net, len(wide)))
            if wide or inside:
                return names[id((wide or inside)[-1])]
            if not any(True for _ in found.parameters()):
                raise MethodError(
                    f"This {type(net).__name__} has no head. Build it with one: num_classes=... or "
                    "net.reset_classifier(...)."
                )
    last: list[str] = [name for name, module in net.named_modules() if name and _makes_logits(module)]
    if not last:
        raise MethodError(
            f"No head found in {type(net).__name__}: it has no Linear layer. Name it with head='...'."
        )
    return last[-1]


def replace_head(net: nn.Module, name: str, classes: int) -> None:
    """Put a fresh head for `classes` classes where the old one was, on its device and in its type.

    Weights and bias start at zero: every class is equally likely, and the first step moves the head and
    not yet the body.
    """
    old = net.get_submodule(name)
    like = next(old.parameters(), None)
    if like is None:
        raise MethodError(f"The head '{name}' has no parameters, so it cannot be replaced.")
    if isinstance(net, Classifier) and net.get_classifier() is old:
        net.reset_classifier(classes)  # keeps the pooling, and what else timm knows of this network
        fresh = net.get_submodule(name)
    else:
        if isinstance(old, nn.Conv2d):
            fresh = nn.Conv2d(old.in_channels, classes, 1, bias=old.bias is not None)
        elif isinstance(old, nn.Linear):
            fresh = nn.Linear(old.in_features, classes, bias=old.bias is not None)
        else:
            raise MethodError(f"The head '{name}' is a {type(old).__name__}; a Linear or a Conv2d is needed.")
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, fresh)
    fresh.to(device=like.device, dtype=like.dtype)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()


def _makes_logits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def _width(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else int(module.out_features)  # type: ignore[arg-type]


def _several(net: nn.Module, count: int) -> str:
    return (
        f"{type(net).__name__} answers with {count} heads at once, and a method trains one. "
        "Take a network of its kind that has a single head."
    )
