"""What is needed to build a network again: timm's name for it, its arguments and its pretrained config."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model
from torch import nn

from headstart.errors import ModelError, first_line, unknown

# Where weights came from; a saved architecture is built without them.
SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


@dataclass(frozen=True)
class Architecture:
    """A timm architecture with everything that shapes it; plain data.

    Args:
        name: timm's name without a weights tag, such as "resnet50".
        num_classes: width of the head.
        kwargs: further arguments of `timm.create_model`, such as `img_size`.
        pretrained_cfg: timm's config of the weights: preprocessing, licence, names of stem and head.
    """

    name: str
    num_classes: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network with random weights, in eval mode; nothing is read and nothing fetched.

        Raises:
            ModelError: timm has no such architecture, or it does not take these arguments.
        """
        config = {key: value for key, value in self.pretrained_cfg.items() if key not in SOURCE_KEYS}
        with quiet():
            try:
                net = timm.create_model(
                    self.name,
                    pretrained=False,
                    pretrained_cfg=config or None,
                    num_classes=self.num_classes,
                    **self.kwargs,
                )
            except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
                given = ", ".join(f"{key}={value}" for key, value in self.kwargs.items())
                raise ModelError(
                    f"'{self.name}' cannot be built{f' with {given}' if given else ''}: {first_line(error)}"
                ) from error
        module: nn.Module = net.eval()
        return module

    def with_classes(self, classes: int) -> Architecture:
        """The same architecture with a head of another width."""
        return replace(self, num_classes=classes)


def described(folder: Path) -> Architecture:
    """The architecture that a folder's config.json describes.

    Raises:
        ModelError: not JSON, or not of a timm architecture.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(
            f"'{path}' names no timm architecture, so the network cannot be built from it by name."
        )
    name = str(config["architecture"])
    if not is_model(name):
        raise ModelError(f"{path}: {unknown('architecture', name, timm.list_models())}")
    # Before timm 0.9 all of it lay on one level.
    cfg = config.get("pretrained_cfg", {k: v for k, v in config.items() if k != "num_features"})
    known = set(PretrainedCfg.__dataclass_fields__) - set(SOURCE_KEYS)
    cfg = {key: _frozen(value) for key, value in cfg.items() if key in known}
    classes = config.get("num_classes", cfg.get("num_classes"))
    kwargs = dict(config.get("model_args") or {})
    kwargs.pop("num_classes", None)
    cfg["architecture"] = name
    base = get_pretrained_cfg(name)
    return Architecture(
        name,
        int(classes) if isinstance(classes, int) else int(base.num_classes if base else 1000),
        kwargs,
        {**cfg, "num_classes": classes} if isinstance(classes, int) else cfg,
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and log lines of timm and the Hugging Face client to themselves."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub", "httpx", "httpx2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
