"""A model as a folder that anyone can load: timm's hub layout, with labels and preprocessing inside.

    config.json         architecture, classes, exact preprocessing (timm's `pretrained_cfg`)
    model.safetensors   the weights; nothing is pickled
    labels.json         class names, in the order of the outputs
    preprocess.json     the same preprocessing, for those who do not use timm
    calibration.json    temperature, and the threshold below which a human should look
    README.md           model card
    SHA256SUMS          hashes of all of these

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the network back. A network that timm cannot
build by name (one's own class, or one whose shapes a method changed) is stored as well, but its folder says
so, and who loads it brings the network. Some of these are described in config.json and built from there:
by headstart, not by timm (`ship.rebuild`). `ship.export` puts further files beside these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart
from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError, OutputError, first_line
from headstart.nets.architecture import SOURCE_KEYS, Architecture, described
from headstart.ship import contents, rebuild
from headstart.ship import folder as files
from headstart.ship.calibration import Calibration
from headstart.ship.card import write as write_card
from headstart.ship.folder import CALIBRATION, CARD, CONFIG, LABELS, PREPROCESS, WEIGHTS

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
    calibration: Calibration = field(default_factory=Calibration)


def save(
    folder: str | Path,
    net: nn.Module,
    *,
    config: Architecture | None,
    preprocess: Preprocess,
    classes: Sequence[str],
    card: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Write a model folder, whole or not at all; a model folder that was there before is replaced.

    Args:
        folder: where to; its parents are made.
        net: the network, with one output per class.
        config: the timm architecture it was built from; None for a network of one's own.
        preprocess: what was done to pictures when it was scored.
        classes: class names in the order of the outputs.
        card: plain data for the model card: method, model, licence, counts, val, test and so on.
        calibration: of its probabilities; None: they are taken as they come.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    state = {name: value.detach().to("cpu").contiguous().clone() for name, value in net.state_dict().items()}
    architecture = _matching(config, net, len(classes))
    document = _config(architecture, net, preprocess, classes, card)
    if architecture is None:
        document["headstart"] |= rebuild.describe(config, net, len(classes))
    with files.whole(folder) as fresh:
        try:
            save_file(state, fresh / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(f"The model could not be written to '{folder}': {first_line(error)}") from error
        files.write_json(fresh / CONFIG, document)
        files.write_json(fresh / LABELS, list(classes))
        files.write_json(fresh / PREPROCESS, preprocess.to_dict())
        if calibration is not None:
            files.write_json(fresh / CALIBRATION, calibration.to_dict())
        files.write_text(fresh / CARD, write_card(document, calibration=calibration))


def read(folder: str | Path, net: nn.Module | None = None) -> Bundle:
    """Read a model folder; looks at no network.

    Args:
        folder: as `save` wrote it, or any timm model folder with safetensors weights.
        net: the network to fill, where timm cannot build it by name.

    Raises:
        ModelError: files are missing, altered or damaged, or the network has to be given.
    """
    path = Path(folder)
    found = contents.read(path)
    if not (path / WEIGHTS).is_file() and not files.listed(path, WEIGHTS):
        raise ModelError(f"'{path}' has no {WEIGHTS}, the weights that torch reads.")
    files.check(path, (WEIGHTS,))
    architecture: Architecture | None = None
    if found.document.get("architecture") is not None:
        architecture = described(path)
        net = architecture.build() if net is None else net
    elif net is None:
        net = rebuild.build(path, found.own)
    if net is None:
        made = found.own.get("class", "a network of its own")
        raise ModelError(
            f"'{path}' holds {made}, which timm cannot build by name. "
            "Build it and give it: headstart.load(folder, net=...)."
        )
    _fill(net, path / WEIGHTS)
    classes = found.classes
    if architecture is not None:
        classes = classes or [str(index) for index in range(architecture.num_classes)]
        contents.count(path, classes, architecture.num_classes)
    if classes is None:
        raise ModelError(f"'{path}' has no {LABELS}, so nobody knows what its outputs are called.")
    return Bundle(
        net=net.eval(),
        classes=classes,
        preprocess=found.preprocess or _preprocess(path, architecture),
        config=architecture,
        card=found.card,
        calibration=found.calibration,
    )


def settled(model: Bundle) -> Bundle:
    """One ordinary network in the place of one in which each picture takes its own way.

    Its card says how often the two agree (`settled`). Scores and calibration were those of the other, and
    are left out.

    Raises:
        ModelError: it is an ordinary network already.
    """
    net, architecture, agreement = rebuild.settle(model.net)
    card = {name: value for name, value in model.card.items() if name not in ("val", "test")}
    return replace(
        model, net=net, config=architecture, card=card | {"settled": agreement}, calibration=Calibration()
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
    same = type(again) is type(net) and rebuild.shapes(again) == rebuild.shapes(net)
    return wanted if same else None


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


def _preprocess(path: Path, architecture: Architecture | None) -> Preprocess:
    if architecture is None:
        raise ModelError(f"'{path}' has no {PREPROCESS}, so pictures cannot be prepared for it.")
    from headstart.nets.zoo import preprocessing

    return preprocessing(architecture, str(path))


def _class(net: nn.Module) -> str:
    return f"{type(net).__module__}.{type(net).__qualname__}"
