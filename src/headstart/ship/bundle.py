"""A model as a folder that anyone can load: timm's hub layout, with labels and preprocessing inside.

    config.json         architecture, classes, exact preprocessing (timm's `pretrained_cfg`)
    model.safetensors   the weights; nothing is pickled
    labels.json         class names, in the order of the outputs
    preprocess.json     the same preprocessing, for those who do not use timm
    README.md           model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the network back. A network that timm cannot
build by name (one's own class, or one whose shapes a method changed) is stored as well, but its folder says
so, and who loads it brings the network. One in which each picture takes its own way
(`parts.routed`, `parts.gated`) is described in config.json and built from there: by headstart, not by timm.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import headstart
from headstart.data.transforms import Preprocess
from headstart.errors import MethodError, ModelError, OutputError
from headstart.nets.architecture import SOURCE_KEYS, Architecture, described, first_line
from headstart.parts import gated
from headstart.parts import routed as by_block

CONFIG, WEIGHTS, LABELS, PREPROCESS, CARD = (
    "config.json",
    "model.safetensors",
    "labels.json",
    "preprocess.json",
    "README.md",
)

# What the old head, the old size and the old source said; the new ones are written in their place.
_STALE = (
    "label_names",
    "label_descriptions",
    "label_offset",
    "test_input_size",
    "test_crop_pct",
    "test_pool_size",
)


@dataclass(frozen=True)
class Bundle:
    """A model folder that was read."""

    net: nn.Module  # in eval mode, on the CPU
    classes: list[str]  # in the order of the outputs
    preprocess: Preprocess
    config: Architecture | None  # None: not a network that timm builds by name
    card: dict[str, Any]  # what is known of its making


def save(
    folder: str | Path,
    net: nn.Module,
    *,
    config: Architecture | None,
    preprocess: Preprocess,
    classes: Sequence[str],
    card: Mapping[str, Any],
) -> None:
    """Write a model folder, whole or not at all; a model folder that was there before is replaced.

    Args:
        folder: where to; its parents are made.
        net: the network, with one output per class.
        config: the timm architecture it was built from; None for a network of one's own.
        preprocess: what was done to pictures when it was scored.
        classes: class names in the order of the outputs.
        card: plain data for the model card: method, model, licence, counts, val, test and so on.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise OutputError(f"'{target}' holds something else than a model; give another folder.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file; a model is a folder.")
    state = {name: value.detach().to("cpu").contiguous().clone() for name, value in net.state_dict().items()}
    architecture = _matching(config, net, len(classes))
    document = _config(architecture, net, preprocess, classes, card)
    routed = None if architecture is not None else _routed(config, net, len(classes))
    if routed is not None:
        document["headstart"]["routed"] = routed
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        _json(temporary / CONFIG, document)
        _json(temporary / LABELS, list(classes))
        _json(temporary / PREPROCESS, preprocess.to_dict())
        (temporary / CARD).write_text(
            _card(card, classes, architecture, net, routed is not None), encoding="utf-8"
        )
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"The model could not be written to '{target}': {_why(error)}") from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder: str | Path, net: nn.Module | None = None) -> Bundle:
    """Read a model folder; looks at no network.

    Args:
        folder: as `save` wrote it, or any timm model folder with safetensors weights.
        net: the network to fill, where timm cannot build it by name.

    Raises:
        ModelError: files are missing or damaged, or the network has to be given.
    """
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ModelError(f"'{path}' is no model folder: it has no {name}.")
    document = _read_json(path / CONFIG)
    if not isinstance(document, dict):
        raise ModelError(f"'{path / CONFIG}' is damaged: an object is expected.")
    own = document.get("headstart", {})
    own = own if isinstance(own, dict) else {}
    architecture: Architecture | None = None
    if document.get("architecture") is None and net is None and "routed" in own:
        net = _route(path, own["routed"])
    if document.get("architecture") is None and net is None:
        made = own.get("class", "a network of its own")
        raise ModelError(
            f"'{path}' holds {made}, which timm cannot build by name. "
            "Build it and give it: headstart.load(folder, net=...)."
        )
    if document.get("architecture") is not None:
        architecture = described(path)
        net = architecture.build() if net is None else net
    assert net is not None
    _fill(net, path / WEIGHTS)
    return Bundle(
        net=net.eval(),
        classes=_classes(path, document, architecture),
        preprocess=_preprocess(path, architecture),
        config=architecture,
        card=dict(own.get("card", {})),
    )


def _matching(config: Architecture | None, net: nn.Module, classes: int) -> Architecture | None:
    """The architecture that gives exactly this network back, or None."""
    if config is None:
        return None
    wanted = config.with_classes(classes)
    try:
        with torch.device("meta"):  # shapes are enough; no memory, no random numbers
            again = wanted.build()
    except (ModelError, NotImplementedError):
        with torch.random.fork_rng(devices=[]):
            again = wanted.build()
    same = type(again) is type(net) and _shapes(again) == _shapes(net)
    return wanted if same else None


def _routed(config: Architecture | None, net: nn.Module, classes: int) -> dict[str, Any] | None:
    """What builds exactly this network again where each picture takes its own way through it, or None."""
    about = net.meta.get("routed") if isinstance(net, fx.GraphModule) else None
    if config is None or about is None:
        return None
    wanted = config.with_classes(classes)
    with torch.random.fork_rng(devices=[]):
        same = _shapes(_rebuilt(wanted.build(), about)) == _shapes(net)
    return {"net": asdict(wanted), **about} if same else None


def _route(path: Path, routed: Any) -> nn.Module:
    """The network that `_routed` described."""
    try:
        with torch.random.fork_rng(devices=[]):
            return _rebuilt(Architecture(**routed["net"]).build(), routed)
    except (TypeError, KeyError, ValueError, AttributeError, MethodError) as error:
        raise ModelError(
            f"'{path / CONFIG}' is damaged: it describes no network with routes. ({first_line(error)})"
        ) from error


def _rebuilt(net: nn.Module, about: Mapping[str, Any]) -> nn.Module:
    """A network in which each picture takes its own way: by filter, or by block."""
    return gated.rebuilt(net, about) if "sites" in about else by_block.rebuilt(net, about)


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def _config(
    architecture: Architecture | None,
    net: nn.Module,
    preprocess: Preprocess,
    classes: Sequence[str],
    card: Mapping[str, Any],
) -> dict[str, Any]:
    source = architecture.pretrained_cfg if architecture is not None else {}
    kept = {k: v for k, v in source.items() if k not in (*SOURCE_KEYS, *_STALE, "architecture", "tag")}
    size = preprocess.size
    if tuple(source.get("input_size", (3, size, size))) != (3, size, size):
        kept["pool_size"] = None
    kept |= {
        "input_size": [3, size, size],
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_pct,
        "crop_mode": preprocess.crop_mode,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": len(classes),
    }
    if "licence" in card:  # what is known of the weights themselves, rather than of timm's usual ones
        kept["license"] = card["licence"]
    document: dict[str, Any] = {
        "architecture": None if architecture is None else architecture.name,
        "num_classes": len(classes),
        "label_names": list(classes),
        "pretrained_cfg": kept,
        "headstart": {"version": headstart.__version__, "class": _class(net), "card": dict(card)},
    }
    features = getattr(net, "num_features", None)
    if isinstance(features, int):
        document["num_features"] = features
    if architecture is not None and architecture.kwargs:
        document["model_args"] = dict(architecture.kwargs)
    return document


def _fill(net: nn.Module, weights: Path) -> None:
    try:
        state: dict[str, Tensor] = load_file(weights, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"'{weights}' is damaged; was it cut off on the way? ({first_line(error)})"
        ) from error
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"The weights in '{weights}' do not fit the network that {CONFIG} beside it describes."
        ) from error


def _classes(path: Path, document: dict[str, Any], architecture: Architecture | None) -> list[str]:
    named: Any
    if (path / LABELS).is_file():
        named = _read_json(path / LABELS)
    else:
        config = document.get("pretrained_cfg")
        named = document.get("label_names") or (
            config.get("label_names") if isinstance(config, dict) else None
        )
        if named is None and architecture is not None:
            named = [str(index) for index in range(architecture.num_classes)]
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise ModelError(f"'{path / LABELS}' is damaged: a list of class names is expected.")
    if architecture is not None and len(named) != architecture.num_classes:
        raise ModelError(
            f"'{path}' names {len(named)} classes, and its network has {architecture.num_classes}."
        )
    return list(named)


def _preprocess(path: Path, architecture: Architecture | None) -> Preprocess:
    if (path / PREPROCESS).is_file():
        given = _read_json(path / PREPROCESS)
        try:
            return Preprocess.from_dict(given)
        except ValidationError as error:
            raise ModelError(f"'{path / PREPROCESS}' is damaged: {error.errors()[0]['msg']}.") from error
    if architecture is None:
        raise ModelError(f"'{path}' has no {PREPROCESS}, so pictures cannot be prepared for it.")
    from headstart.nets.zoo import preprocessing

    return preprocessing(architecture, str(path))


def _card(
    card: Mapping[str, Any],
    classes: Sequence[str],
    architecture: Architecture | None,
    net: nn.Module,
    routed: bool,
) -> str:
    licence = card.get("licence")
    header = {
        "library_name": "timm" if architecture is not None else "pytorch",
        "pipeline_tag": "image-classification",
        "license": licence or "unknown",
        "base_model": card.get("model"),
        "tags": ["image-classification", "headstart", *([str(card["method"])] if card.get("method") else [])],
    }
    header = {key: value for key, value in header.items() if value is not None}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {card.get('model') or _class(net)}, fine-tuned for {len(classes)} classes",
        "",
        f"Classes: {', '.join(classes)}.",
        "",
    ]
    facts = {
        "Method": " - ".join(str(card[key]) for key in ("method", "paper") if card.get(key)),
        "Source network": card.get("model"),
        "Source weights": card.get("origin"),
        "Licence": f"{licence or 'unknown'} (inherited from the source weights)",
        "Pictures": _counts(card.get("counts")),
        "Epochs": card.get("epochs"),
        "Weights kept": card.get("kept"),
        "Seeds": _seeds(card),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    scores = {split: card[split] for split in ("val", "test") if isinstance(card.get(split), Mapping)}
    if scores:
        columns = list(dict.fromkeys(key for score in scores.values() for key in score))
        lines += ["", f"| split | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
        lines += [
            f"| {split} | {' | '.join(_number(score.get(key)) for key in columns)} |"
            for split, score in scores.items()
        ]
    lines += ["", "## Use", ""]
    lines += ["```", "headstart predict THIS_FOLDER photo.jpg", "```", ""]
    if architecture is not None:
        call = 'net = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)'
        lines += ["```python", "import timm", call, "```", ""]
        lines += ["Class names are in labels.json, the preprocessing in preprocess.json.", ""]
    elif routed:
        lines += [
            "Each picture takes its own way through this network, so timm cannot build it by name; "
            "`headstart.load(folder)` does.",
            "",
        ]
    else:
        lines += [
            f"timm cannot build this network ({_class(net)}) by name. Build it in Python, then "
            "`headstart.load(folder, net=...)`.",
            "",
        ]
    return "\n".join(lines)


def _counts(counts: Any) -> str | None:
    if not isinstance(counts, Mapping):
        return None
    return ", ".join(f"{number} {split}" for split, number in counts.items())


def _seeds(card: Mapping[str, Any]) -> str | None:
    given = [f"{name.replace('_', ' ')} {card[name]}" for name in ("seed", "split_seed") if name in card]
    return ", ".join(given) or None


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _class(net: nn.Module) -> str:
    return f"{type(net).__module__}.{type(net).__qualname__}"


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {first_line(error)}") from error


def _why(error: Exception) -> str:
    return f"{error.strerror}." if isinstance(error, OSError) and error.strerror else first_line(error)
