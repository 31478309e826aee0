"""What lies in a comparison's folder, read without believing that all of it is whole."""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart import judgement
from headstart.errors import OutputError
from headstart.judgement import Verdict
from headstart.records import Result


class Said(NamedTuple):
    """What one run said about the test pictures."""

    probabilities: NDArray[np.float32]  # [N, K]
    labels: NDArray[np.int64]  # [N]
    hashes: NDArray[np.str_]  # [N]

    @property
    def answers(self) -> NDArray[np.int64]:
        """[N] the class with the largest probability."""
        found: NDArray[np.int64] = self.probabilities.argmax(1)
        return found

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """[N] where that is another class than the label."""
        found: NDArray[np.bool_] = self.answers != self.labels
        return found


@dataclass
class Seen:
    """One finished run."""

    label: str
    folder: Path
    result: Result

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per epoch; a last line that is cut off is left out."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        read = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if isinstance(record, dict):
                read.append(record)
        return read

    @cached_property
    def said(self) -> Said | None:
        """Its answers to the test pictures; None where the file is cut off or not there."""
        try:
            # Opened here, because np.load leaves a file open that it cannot read.
            with (
                (self.folder / "predictions.npz").open("rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                said = Said(
                    arrays["test_probabilities"],
                    arrays["test_labels"],
                    arrays["test_hashes"].astype(np.str_),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None
        shape = said.probabilities.shape
        whole = len(shape) == 2 and len(said.labels) == len(said.hashes) == shape[0] > 0
        return said if whole and said.labels.max() < shape[1] else None

    def over_time(self) -> list[dict[str, Any]]:
        """What the method let be seen after each epoch."""
        seen = self.result.diagnostics.get("over_time")
        return [each for each in seen if isinstance(each, dict)] if isinstance(seen, list) else []


@dataclass
class Evidence:
    """A comparison as its files tell it."""

    folder: Path
    verdict: Verdict
    asked: dict[str, Any]
    runs: list[Seen]
    curve: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # files that are cut off or gone
    trials: int = 0

    def of(self, label: str) -> list[Seen]:
        """The runs of one method."""
        return [run for run in self.runs if run.label == label]

    @property
    def labels(self) -> list[str]:
        """The methods, in the order of the table."""
        return [row.method for row in self.verdict.rows]

    @cached_property
    def taken(self) -> Seen | None:
        """The run whose model is to be taken."""
        take = self.verdict.take
        return next((run for run in self.runs if take is not None and run.folder.name == take.run), None)


def read(folder: Path) -> Evidence:
    """Read a comparison's folder.

    Raises:
        OutputError: it holds no comparison, or its verdict cannot be read.
    """
    if not (folder / "verdict.json").is_file():
        raise OutputError(
            f"{folder} holds no comparison: there is no verdict.json. Give the folder that compare's --out "
            "named."
        )
    try:
        verdict = judgement.read(folder)
    except (OSError, ValueError):
        raise OutputError(
            f"{folder / 'verdict.json'} is cut off or of another version. The same compare command writes it "
            "anew from the finished runs."
        ) from None
    unreadable: list[str] = []
    runs, trials = _runs(folder, {scored.run for scored in verdict.runs}, unreadable)
    return Evidence(
        folder=folder,
        verdict=verdict,
        asked=_json(folder / "compare.json", unreadable),
        runs=runs,
        curve=_json(folder / "curve.json", unreadable) or _by_size(folder / "sizes.json", unreadable),
        audit=_json(folder / "audit.json", unreadable),
        search=_json(folder / "search.json", unreadable),
        unreadable=unreadable,
        trials=trials,
    )


def _runs(folder: Path, counted: set[str], unreadable: list[str]) -> tuple[list[Seen], int]:
    """The finished runs that the verdict is about, and how many trials there were."""
    try:
        with (folder / "results.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        unreadable.append("results.csv")
        return [], 0
    seen, trials = [], 0
    for row in rows:
        trials += row.get("role") == "trial"
        if row.get("role") not in (None, "", "run") or row.get("status") != "finished":
            continue
        if Path(str(row.get("folder"))).name not in counted:  # one of fewer labels
            continue
        preset = f":{row['preset']}" if row.get("preset") else ""
        label = row.get("label") or f"{row.get('method')}{preset}"
        where = folder / str(row["folder"])
        try:
            result = Result.read(where / "result.json")
        except (OSError, ValueError):
            unreadable.append(f"{row['folder']}/result.json")
            continue
        seen.append(Seen(label, where, result))
    return seen, trials


def _by_size(path: Path, unreadable: list[str]) -> dict[str, Any]:
    """The verdicts by number of training pictures, as curves by method; empty where there are none."""
    if not path.is_file():
        return {}
    curves: dict[str, list[dict[str, Any]]] = {}
    try:
        for each in json.loads(path.read_text(encoding="utf-8")):
            verdict = Verdict.model_validate(each["verdict"])
            for row in verdict.rows:
                if row.accuracy is not None and row.learnt_from:
                    point = {"labels": row.learnt_from, **row.accuracy.model_dump()}
                    if len(row.seeds) == 1:  # that interval is of one trained model, and of no method
                        point |= {"lo": None, "hi": None}
                    curves.setdefault(row.method, []).append(point)
    except (OSError, ValueError, TypeError, KeyError):
        unreadable.append(path.name)
        return {}
    return {"curves": [{"method": method, "points": points} for method, points in curves.items()]}


def _json(path: Path, unreadable: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        unreadable.append(path.name)
        return {}
    return read if isinstance(read, dict) else {}
