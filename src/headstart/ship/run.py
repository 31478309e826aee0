"""What a finished run left that its bundle needs: its scores, and the pictures that it did not learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headstart.data.folder import scan
from headstart.data.picture import EXTENSIONS
from headstart.data.splits import Split
from headstart.errors import DataError, ModelError, first_line
from headstart.records import Result

Scored = tuple[np.ndarray, np.ndarray]  # probabilities [N, K] and labels [N]


@dataclass(frozen=True)
class Finished:
    """The folder of a run whose model is exported."""

    folder: Path
    result: Result
    scored: dict[str, Scored]  # by split


def of_model(model: Path) -> Finished | None:
    """The run that a model folder belongs to; None where it stands alone.

    Raises:
        ModelError: a run whose predictions cannot be read.
    """
    folder = model.parent
    if model.name != "model" or not (folder / "result.json").is_file():
        return None
    try:
        result = Result.read(folder / "result.json")
        with (folder / "predictions.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            scored = {
                split: (arrays[f"{split}_probabilities"], arrays[f"{split}_labels"])
                for split in ("val", "test")
                if f"{split}_labels" in arrays and len(arrays[f"{split}_labels"])
            }
            if result.refit is not None and "refit_test_labels" in arrays:
                scored["test"] = (arrays["refit_test_probabilities"], arrays["refit_test_labels"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The run in '{folder}' cannot be read: {first_line(error)}") from error
    return Finished(folder, result, scored)


def held_out(finished: Finished, data: Path | None = None) -> list[Path]:
    """The pictures that what a run ships did not learn from: of test, then of val.

    Args:
        finished: the run.
        data: where its pictures lie now; None: where they lay.

    Raises:
        DataError: they are not there any more, or others are.
    """
    sides = labelled(finished, data)
    return [path for side in ("test", "val") for path, _ in sides.get(side, [])]


def labelled(finished: Finished, data: Path | None = None) -> dict[str, list[tuple[Path, int]]]:
    """The same pictures with their labels, by split; a refit has learnt from val, so that is left out.

    Args:
        finished: the run.
        data: where its pictures lie now; None: where they lay.

    Raises:
        DataError: they are not there any more, or others are.
    """
    run = finished.result.run
    table = scan(
        str(data) if data is not None else run.data,
        image_col=run.image_col,
        label_col=run.label_col,
        split_col=run.split_col,
        group_col=run.group_col,
    )
    divided = Split.read(finished.folder / "split.csv", table)
    sides = ("test", "val") if finished.result.refit is None else ("test",)
    return {side: [(table.paths[i], table.labels[i]) for i in divided.index(side)] for side in sides}


def pictures_of(folder: Path) -> list[Path]:
    """The pictures in any folder, for a model of which the run is not known.

    Raises:
        DataError: there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(f"'{folder}' has no pictures to verify with.")
    return found
