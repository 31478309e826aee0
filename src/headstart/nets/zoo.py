"""A pretrained network by name: the embedded default, any timm model, a local folder, or a weights file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained, split_model_name_tag
from torch import nn

from headstart.data.preprocess import Preprocess
from headstart.errors import MethodError, ModelError, Unreachable, first_line, nearest, unknown
from headstart.nets import embedded, hub
from headstart.nets.architecture import SOURCE_KEYS, Architecture, described, quiet
from headstart.nets.weights import Report, State, fit, read
from headstart.parts.fresh import reinitialise
from headstart.parts.head import find_head

DEFAULT = embedded.NAME

# A network that was published without a head gets one of this width; every method puts its own in place.
_PLACEHOLDER_CLASSES = 2

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


@dataclass(frozen=True)
class Pretrained:
    """A network with its source head, and all that is known of where it comes from."""

    net: nn.Module  # in eval mode, on the CPU
    name: str  # as it was asked for
    preprocess: Preprocess  # of the checkpoint, at the size that was asked for
    licence: str | None  # of the weights
    origin: str  # where the weights came from, for people
    matched: Report | None  # how a file's tensors fitted; None where timm loaded its own
    config: Architecture  # builds the network again, offline


def load(
    model: str = DEFAULT,
    *,
    weights: str | None = None,
    pretrained: bool = True,
    img_size: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Pretrained:
    """Build a network and fill it with pretrained weights.

    Args:
        model: "efficientnet-lite0" (weights in an installed package), any timm model ("resnet50",
            "resnet50.a1_in1k", "timm/resnet50.a1_in1k", "hf-hub:owner/name"), or a folder with
            config.json and weights in timm's layout ("local-dir:" may stand before it).
        weights: a file with weights for that architecture instead: safetensors or a state dict.
        pretrained: False: random weights, drawn as for `scratch`; nothing is read or fetched but a
            folder's config.json.
        img_size: side of the input in pixels; None: the checkpoint's own. Networks of a fixed size have
            their position embeddings resampled.
        say: told in one line each what a person may want to know.

    Raises:
        ModelError: no such model, or weights that cannot be read or do not belong to it.
        Unreachable: the weights are not on this machine and cannot be fetched.
    """
    if img_size is not None and img_size < 1:
        raise ModelError(f"img_size is a number of pixels above 0; {img_size} was given.")
    folder = _folder(model)
    architecture, own_weights = _from_folder(folder) if folder is not None else (_from_name(model), None)
    if not pretrained:
        architecture = _of_unknown_weights(architecture)
    elif weights is not None:
        own_weights = Path(weights).expanduser()
        architecture = _of_weights(own_weights, architecture)
    licence = architecture.pretrained_cfg.get("license")
    architecture = _sized(architecture, img_size)
    matched: Report | None = None
    if not pretrained:
        net, origin = _headed(architecture).build(), "random weights"
    elif own_weights is not None:
        state, wrapper = read(own_weights)
        net, matched = fit(_headed(architecture), state, where=str(own_weights), wrapper=wrapper)
        origin = str(own_weights)
        say(f"{own_weights.name}: {matched.sentence()}")
    elif model == DEFAULT:
        net = architecture.build()
        net.load_state_dict(embedded.weights(net.state_dict()))
        origin, licence = f"package {embedded.PACKAGE}", embedded.licence()
    else:
        net, origin = _from_timm(model, architecture, say)
    _check_head(net, model)
    if not pretrained:
        # timm starts the last norm of a residual block at zero, for long trainings: each block is nothing at
        # first. On a few hundred pictures that costs dearly, and `scratch` would be another start.
        reinitialise(net)
    preprocess = preprocessing(architecture, model)
    if img_size is not None:
        _try(net, img_size, model)
    return Pretrained(
        net=net,
        name=model,
        preprocess=preprocess,
        licence=licence,
        origin=origin,
        matched=matched,
        config=architecture.with_classes(_classes(net)),
    )


def names() -> list[str]:
    """Every name that `load` knows without a folder: the default, timm's architectures and their weights."""
    return [DEFAULT, *timm.list_models(), *timm.list_models(pretrained=True)]


def _folder(model: str) -> Path | None:
    """The model folder that `model` names, or None where it is a name of timm's or the hub's."""
    if model.startswith("local-dir:"):
        path = Path(model.removeprefix("local-dir:")).expanduser()
    elif model == DEFAULT or is_model(model) or model.startswith("hf-hub:"):
        return None
    else:
        path = Path(model).expanduser()
        looks_like_one = model.startswith((".", "/", "~")) or "\\" in model or path.suffix in _SUFFIXES
        if not path.exists() and not looks_like_one:
            return None
    if path.is_file():
        if path.name in _WEIGHT_FILES and (path.parent / "config.json").is_file():
            return path.parent
        raise ModelError(
            f"'{model}' is a file. Weights go in --weights, and --model names their architecture."
        )
    if not path.is_dir():
        raise ModelError(f"There is no model folder '{path}'.")
    for candidate in (path, path / "model"):  # the second: the folder of a run
        if (candidate / "config.json").is_file():
            return candidate
    raise ModelError(f"'{path}' is no model folder: it has no config.json. (timm's layout is expected.)")


_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def _from_folder(folder: Path) -> tuple[Architecture, Path]:
    architecture = described(folder)
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return architecture, folder / name
    found = sorted(each for each in folder.iterdir() if each.suffix in _SUFFIXES)
    if len(found) != 1:
        held = f"{len(found)} weights files" if found else "no weights"
        raise ModelError(f"'{folder}' has {held}; {_WEIGHT_FILES[0]} is expected beside config.json.")
    return architecture, found[0]


def _from_name(model: str) -> Architecture:
    name = f"{embedded.TIMM_NAME}.{embedded.TAG}" if model == DEFAULT else model
    name = name.removeprefix("hf-hub:")
    short = name.removeprefix("timm/")
    if not is_model(short):
        if "/" in name:
            return hub.described(name)
        raise ModelError(unknown("model", model, names(), hint="headstart models lists them."))
    base, tag = split_model_name_tag(short)
    config = (
        get_pretrained_cfg(short, allow_unregistered=False) if not tag or is_model_pretrained(short) else None
    )
    if tag and config is None:
        tags = [
            each for each in timm.list_models(f"{base}.*", pretrained=True) if each.startswith(f"{base}.")
        ]
        raise ModelError(unknown("weights", model, tags) if tags else f"timm has no weights for '{base}'.")
    cfg: dict[str, Any] = config.to_dict() if config is not None else {}  # type: ignore[no-untyped-call]
    return Architecture(base, int(cfg.get("num_classes", 1000)), {}, cfg)


def _of_weights(weights: Path, architecture: Architecture) -> Architecture:
    """The architecture with what the config.json beside a weights file says, where it is of the same one.

    Without one the preprocessing is that of the architecture's usual weights; who made these and under
    which licence is not known.
    """
    if (weights.parent / "config.json").is_file() and weights.name in _WEIGHT_FILES:
        found = described(weights.parent)
        if found.name == architecture.name:
            return found
    return _of_unknown_weights(architecture)


def _of_unknown_weights(architecture: Architecture) -> Architecture:
    gone = (*SOURCE_KEYS, "license", "tag", "origin_url", "description", "label_names")
    cfg = {key: value for key, value in architecture.pretrained_cfg.items() if key not in gone}
    return replace(architecture, pretrained_cfg=cfg)


def _sized(architecture: Architecture, img_size: int | None) -> Architecture:
    if img_size is None:
        return architecture
    cfg = architecture.pretrained_cfg
    sized = replace(architecture, pretrained_cfg=resized(cfg, img_size))
    if cfg.get("fixed_input_size") or "img_size" in architecture.kwargs:
        sized = replace(sized, kwargs={**architecture.kwargs, "img_size": img_size})
    return sized


def resized(cfg: dict[str, Any], size: int) -> dict[str, Any]:
    """A pretrained config for another input size; what held for the old size only is left out."""
    left_out = ("test_input_size", "test_crop_pct", "pool_size", "test_pool_size")
    kept = {key: value for key, value in cfg.items() if key not in left_out}
    return {**kept, "input_size": (3, size, size)}


def _headed(architecture: Architecture) -> Architecture:
    """Published without a head: a small one, so that there is something to replace."""
    return architecture if architecture.num_classes > 0 else architecture.with_classes(_PLACEHOLDER_CLASSES)


def _from_timm(model: str, architecture: Architecture, say: Callable[[str], None]) -> tuple[nn.Module, str]:
    """Let timm load its own weights, from this machine where they are here, else from the network."""
    cfg = architecture.pretrained_cfg
    if not any(cfg.get(key) for key in ("url", "hf_hub_id", "file")):
        others = timm.list_models(f"{architecture.name[:6]}*", pretrained=True)
        guess = nearest(architecture.name, others)
        raise ModelError(
            f"timm has no pretrained weights for '{model}'. Give a file with --weights, or another model"
            + (f", such as '{guess}'." if guess else ".")
        )
    local = hub.cached(cfg)
    place = cfg.get("hf_hub_id") or cfg.get("url")
    if local is not None:
        own_format = {"custom_load": True} if local.suffix == ".npz" and cfg.get("custom_load") else {}
        cfg = {key: value for key, value in cfg.items() if key not in SOURCE_KEYS}
        cfg = {**cfg, **own_format, "file": str(local)}
    else:
        if not hub.reachable(str(place)):
            raise Unreachable(_unreachable(model, place))
        say(f"Fetching the weights of {model} from {place}.")
    headless = architecture.num_classes == 0
    with quiet(), hub.no_bars():
        try:
            net: nn.Module = timm.create_model(
                architecture.name,
                pretrained=True,
                pretrained_cfg=cfg,
                num_classes=architecture.num_classes,
                **architecture.kwargs,
            )
            if headless:
                net.reset_classifier(_PLACEHOLDER_CLASSES)  # type: ignore[operator]
        except hub.FAILURES as error:
            if local is None and hub.offline(error):
                raise Unreachable(_unreachable(model, place)) from error
            again = "" if local is None else f" Delete '{local}' to fetch it again."
            raise ModelError(f"'{model}' cannot be loaded: {first_line(error)}{again}") from error
    return net.eval(), str(local or place)


def _unreachable(model: str, place: Any) -> str:
    return (
        f"The weights of '{model}' are not on this machine and {place} cannot be reached. Give them with "
        f"--weights FILE, or use the default model '{DEFAULT}', which needs no network."
    )


def _check_head(net: nn.Module, model: str) -> None:
    try:
        find_head(net)
    except MethodError as error:
        raise ModelError(f"'{model}' cannot be fine-tuned here. {error}") from error
    if getattr(net, "num_classes", None) != _classes(net):  # encoders that timm has for language models
        raise ModelError(f"'{model}' is not a classifier: it has no layer that gives one number per class.")


def _classes(net: nn.Module) -> int:
    return len(net.get_submodule(find_head(net)).get_parameter("weight"))


def preprocessing(architecture: Architecture, model: str) -> Preprocess:
    """What the config of an architecture's weights says of preprocessing.

    Raises:
        ModelError: not square, or not RGB.
    """
    found: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=architecture.pretrained_cfg or {"input_size": (3, 224, 224)}
    )
    channels, height, width = found["input_size"]
    if channels != 3 or len(found["mean"]) != 3:
        raise ModelError(f"'{model}' takes {channels} channels; headstart works with 3 (RGB).")
    if height != width:
        raise ModelError(
            f"'{model}' takes {width}×{height} pixels; headstart works with squares: give img_size."
        )
    return Preprocess.from_dict(
        {
            "size": int(height),
            "crop_pct": found["crop_pct"],
            "interpolation": found["interpolation"],
            "mean": found["mean"],
            "std": found["std"],
            "crop_mode": found["crop_mode"],
        }
    )


def _try(net: nn.Module, size: int, model: str) -> None:
    """One blank picture: a size that does not work is found now, not after the data is prepared."""
    try:
        with torch.inference_mode(), quiet():
            net(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        multiple = 32 * max(1, math.ceil(size / 32))
        raise ModelError(
            f"'{model}' does not work at {size}×{size} pixels. ({first_line(error)}) "
            f"Try --img-size {multiple}."
        ) from error


__all__ = ["DEFAULT", "Architecture", "Pretrained", "Report", "State", "load", "names"]
