"""What of a run goes into its bundle: the facts of the model card, and the calibration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.records import Result, Run
from headstart.ship.calibration import Calibration, calibrate

if TYPE_CHECKING:
    from headstart.training.job import Prepared


def card(result: Result, prepared: Prepared) -> dict[str, Any]:
    """Plain data for the model card: where the network comes from, what it learnt from, how well.

    Places on this machine stay out of it.
    """
    run, counts = result.run, prepared.task.counts
    test, kept = result.test, result.kept
    if result.refit is not None:
        test, kept = result.refit.test, result.refit.said()
    return {
        "method": result.method,
        "paper": prepared.cls.paper,
        "model": _without_place(result.model),
        "hub_id": prepared.pretrained.config.pretrained_cfg.get("hf_hub_id"),
        "learnt_from": None if prepared.source is None else _without_place(prepared.source.name),
        "origin": _without_place(prepared.pretrained.origin),
        "licence": prepared.pretrained.licence,
        "data": _shown(Path(run.data).name),
        "counts": {side: sum(each.values()) for side, each in counts.items()},
        "per_class": counts.get("train", {}),
        "split": f"by the column {run.split_col}"
        if run.split_col
        else "{:.0%} train, {:.0%} val, {:.0%} test, drawn by class".format(*run.split),
        "command": _command(run) + (" --refit" if result.refit is not None else ""),
        "split_seed": result.split_seed,
        "seed": result.seed,
        "epochs": result.epochs if result.refit is None else result.refit.epochs,
        "kept": kept,
        "val": None if result.val is None else result.val.model_dump(),
        "test": None if test is None else test.model_dump(),
        "refit": None if result.refit is None else result.refit.model_dump(),
        "fingerprints": prepared.fingerprints.model_dump(),
        "versions": result.versions,
    }


def calibration(arrays: Mapping[str, np.ndarray]) -> Calibration | None:
    """Fitted on val, looked at on test; None where there is no val.

    Args:
        arrays: of predictions.npz.
    """
    scored = {
        split: (arrays[f"{split}_probabilities"], arrays[f"{split}_labels"])
        for split in ("val", "test")
        if f"{split}_labels" in arrays
    }
    return calibrate(*scored["val"], test=scored.get("test")) if "val" in scored else None


def _command(run: Run) -> str:
    """The command line that asks for this run, without where things lie on this machine."""
    hidden = {*Run.MACHINE, "data", "hyper"}
    words = ["headstart", "train", _shown(Path(run.data).name)]
    for name, field in Run.model_fields.items():
        value = getattr(run, name)
        if name in hidden or (value == field.default and name != "method"):
            continue
        if name in ("weights", "source_weights", "model", "source", "class_weights"):
            value = _without_place(value)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    words += [word for name, value in run.hyper.items() for word in ("--set", f"{name}={value}")]
    return shlex.join(words)


def _without_place(name: str) -> str:
    """A model by its name, a file or folder by its last one: where it lies is nobody's business."""
    path = Path(name).expanduser()
    # Where a run is trained for another machine, what is a place there need not exist here.
    return _shown(path.name) if path.is_absolute() or path.exists() else name


def _shown(name: str) -> str:
    """A file's name where only text can stand: what is no UTF-8 has backslashes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
