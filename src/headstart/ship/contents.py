"""What a model folder says in plain data: classes, preprocessing, calibration, card. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError
from headstart.ship import folder as files
from headstart.ship.calibration import Calibration
from headstart.ship.folder import CALIBRATION, CONFIG, LABELS, PREPROCESS, read_json

R = TypeVar("R", Preprocess, Calibration)


@dataclass(frozen=True)
class Contents:
    """A model folder without its network."""

    folder: Path
    document: dict[str, Any]  # config.json
    classes: list[str] | None  # in the order of the outputs; None: nobody named them
    preprocess: Preprocess | None  # None: only timm's own config says it
    calibration: Calibration
    card: dict[str, Any]  # what is known of its making

    @property
    def own(self) -> dict[str, Any]:
        """What headstart wrote into config.json beside timm's keys."""
        own = self.document.get("headstart", {})
        return own if isinstance(own, dict) else {}


def read(folder: Path) -> Contents:
    """Read the plain data of a model folder.

    Raises:
        ModelError: files are missing, were altered or are damaged.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"'{folder}' is no model folder: it has no {CONFIG}.")
    files.check(folder, (CONFIG, LABELS, PREPROCESS, CALIBRATION))
    document = read_json(folder / CONFIG)
    if not isinstance(document, dict):
        raise ModelError(f"'{folder / CONFIG}' is damaged: an object is expected.")
    own = document.get("headstart")
    card = own.get("card") if isinstance(own, dict) else None
    return Contents(
        folder=folder,
        document=document,
        classes=_classes(folder, document),
        preprocess=_record(folder / PREPROCESS, Preprocess),
        calibration=_record(folder / CALIBRATION, Calibration) or Calibration(),
        card=dict(card) if isinstance(card, dict) else {},
    )


def _classes(folder: Path, document: dict[str, Any]) -> list[str] | None:
    named: Any
    if (folder / LABELS).is_file():
        named = read_json(folder / LABELS)
    else:
        config = document.get("pretrained_cfg")
        named = document.get("label_names") or (
            config.get("label_names") if isinstance(config, dict) else None
        )
        if named is None:
            return None
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise ModelError(f"'{folder / LABELS}' is damaged: a list of class names is expected.")
    return list(named)


def count(folder: Path, classes: list[str], outputs: int) -> None:
    """See that there is a class name for each output."""
    if len(classes) != outputs:
        raise ModelError(f"'{folder}' names {len(classes)} classes, and its network has {outputs}.")


def _record(path: Path, kind: type[R]) -> R | None:
    if not path.is_file():
        return None
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise ModelError(f"'{path}' is damaged: {error.errors()[0]['msg']}.") from error
