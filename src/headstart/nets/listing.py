"""Which networks there are: names, size, licence, and which are on this machine already."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from headstart.errors import ModelError
from headstart.nets import embedded, hub
from headstart.nets.architecture import Architecture

# Counting builds a network without memory, 0.1 s each; a list of hundreds goes without.
COUNTED = 40


@dataclass(frozen=True)
class ModelRow:
    """One network with published weights."""

    name: str  # what `load` takes
    parameters: int | None  # head included; None where more rows match than are counted
    licence: str | None  # of the weights
    input_size: int  # pixels, the longer side
    offline: bool  # whether the weights are on this machine


def models(pattern: str | None = None, *, counted: int = COUNTED) -> list[ModelRow]:
    """The networks that can be had with pretrained weights, the embedded default first.

    Args:
        pattern: with * or ? a pattern for the whole name, otherwise a part of it; None: all of them.
        counted: parameters are counted where at most so many networks match.
    """
    wanted = "*" if pattern is None else pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    wanted = wanted.casefold()
    every = [embedded.NAME, *timm.list_models(pretrained=True)]
    found = [name for name in every if fnmatch.fnmatchcase(name.casefold(), wanted)]
    count = len(found) <= counted
    return [_row(name, count) for name in found]


def _row(name: str, count: bool) -> ModelRow:
    default = name == embedded.NAME
    known = get_pretrained_cfg(f"{embedded.TIMM_NAME}.{embedded.TAG}" if default else name)
    cfg: dict[str, Any] = known.to_dict() if known is not None else {}  # type: ignore[no-untyped-call]
    architecture = str(cfg.get("architecture") or (embedded.TIMM_NAME if default else name.partition(".")[0]))
    if default:
        offline = embedded.installed()
        licence = embedded.licence() if offline else cfg.get("license")
    else:
        offline, licence = hub.cached(cfg) is not None, cfg.get("license")
    return ModelRow(
        name=name,
        parameters=_parameters(architecture, cfg) if count else None,
        licence=None if licence == "unknown" else licence,
        input_size=max(cfg.get("input_size", (3, 224, 224))[1:]),
        offline=offline,
    )


def _parameters(architecture: str, cfg: dict[str, Any]) -> int | None:
    try:
        with torch.device("meta"):
            net = Architecture(architecture, int(cfg.get("num_classes", 1000)), {}, cfg).build()
    except (ModelError, NotImplementedError):
        return None  # a network that computes with its weights while it is built
    return sum(parameter.numel() for parameter in net.parameters())
