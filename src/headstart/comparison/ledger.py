"""What lies in a comparison's folder: which runs are finished, and the table of all runs."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from headstart.comparison.statistics import Answers
from headstart.disk import write_text
from headstart.errors import OutputError
from headstart.records import Result, Run, Score

Status = Literal["pending", "finished", "failed", "interrupted", "skipped", "pruned"]
Role = Literal["run", "trial", "curve"]
SPLITS = ("val", "test")


class At(NamedTuple):
    """What runs that are compared have in common: pictures on the same sides, in the same order."""

    split: int  # seed of the split
    seed: int  # of order, augmentation and everything else that is drawn

    def __str__(self) -> str:
        return f"seed {self.seed}" if self.split == self.seed else f"split {self.split}, seed {self.seed}"


def at(run: Run) -> At:
    """Where a run stands: its split, which is drawn from its seed where nothing else was asked, and seed."""
    return At(run.seed if run.split_seed is None else run.split_seed, run.seed)


@dataclass
class Entry:
    """One run of the comparison, and how it stands."""

    label: str
    run: Run
    status: Status = "pending"
    reason: str | None = None
    folder: str | None = None  # relative to the comparison's folder; None until the data were looked at
    result: Result | None = None  # of a finished run
    answers: dict[str, Answers] = field(default_factory=dict)  # by split, of a finished run
    role: Role = "run"  # what counts in the verdict; trials chose its values, curves have fewer labels
    chosen: dict[str, Any] = field(default_factory=dict)  # what a search chose for it
    number: int = 0  # of a trial, in its search
    share: float | None = None  # of a point of the curve: of the labels there are

    @property
    def at(self) -> At:
        """Its split and seed: runs that agree in them are compared picture by picture."""
        return at(self.run)

    @property
    def split(self) -> int:
        """The seed of its split."""
        return self.at.split

    @property
    def train_size(self) -> int | None:
        """How many training pictures were asked for; None: all."""
        return self.run.train_size


class Unusable(Exception):
    """A finished run whose files cannot be used any more; the text says why."""


def look(folder: Path) -> tuple[Result, dict[str, Answers]] | None:
    """The finished run that lies in a folder; None where there is none, or one that did not finish.

    Raises:
        Unusable: files that are cut off or do not fit together. Such a run has to be done again.
    """
    try:
        result = Result.read(folder / "result.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Unusable("its result.json cannot be read") from error
    if result.status != "finished":
        return None
    if result.val is None or (result.test is None and not result.run.trial):
        raise Unusable("its result.json has no scores")
    return result, answers(folder, result)


def answers(folder: Path, result: Result) -> dict[str, Answers]:
    """Which pictures a run got right, by split, from its predictions.npz.

    Raises:
        Unusable: no such file, one that is cut off, or one of another run.
    """
    found = {}
    try:
        # Opened here, because np.load leaves a file open that it cannot read.
        with (folder / "predictions.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for split in SPLITS[:1] if result.run.trial else SPLITS:
                probabilities = arrays[f"{split}_probabilities"]  # [N, K]
                labels = arrays[f"{split}_labels"]
                hashes = arrays[f"{split}_hashes"].astype(np.str_)
                right = probabilities.argmax(axis=1) == labels
                # By content: files that were renamed between two runs are the same pictures all the same.
                order = np.lexsort((labels, hashes))
                found[split] = Answers(right[order], hashes[order])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unusable("its predictions.npz cannot be read") from error
    for split in found:
        score = result.val if split == "val" else result.test
        n = len(found[split].right)
        if score is None or n != score.n or n != len(found[split].hashes) or n == 0:
            raise Unusable("its predictions.npz and result.json are not of the same run")
    return found


COLUMNS = (
    *("label", "method", "preset", "seed", "train_size", "role", "status", "reason"),
    *(f"{split}_{name}" for split in SPLITS for name in Score.model_fields),
    *("seconds", "peak_memory_mb", "ms_per_image", "trained", "shipped", "flops"),
    *("epochs", "kept", "split_seed", "model", "hyper", "folder"),
)


def flat(entry: Entry) -> dict[str, Any]:
    """One run as one row of results.csv; what is not known is None."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "label": entry.label,
        "method": entry.run.method,
        "preset": entry.run.preset,
        "seed": entry.run.seed,
        "train_size": entry.train_size,
        "role": entry.role,
        "status": entry.status,
        "reason": entry.reason,
        "split_seed": entry.split,
        "model": entry.run.model,
        "hyper": json.dumps(entry.chosen, sort_keys=True) if entry.chosen else None,
        "folder": entry.folder,
    }
    result = entry.result
    if result is None:
        return row
    for split, score in (("val", result.val), ("test", result.test)):
        if score is not None:
            row |= {f"{split}_{name}": value for name, value in score.model_dump().items()}
    for name in ("seconds", "peak_memory_mb", "ms_per_image", "flops", "epochs", "kept"):
        row[name] = getattr(result, name)
    if result.parameters is not None:
        row |= result.parameters.model_dump()
    return row


def write_table(path: Path, entries: Sequence[Entry]) -> None:
    """Write results.csv: one row per run, in the order of the comparison."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(entry) for entry in entries)
    write_text(path, text.getvalue())


def gone(lock: Path, patience: float = 30.0) -> None:
    """Wait until the last worker process of an earlier comparison has ended; each holds this lock.

    Raises:
        OutputError: one is still at work after so many seconds.
    """
    try:
        import fcntl
    except ImportError:
        return
    until = time.monotonic() + patience
    with lock.open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OutputError(
                        f"A process of an earlier comparison is still at work in {lock.parent}. Wait for it, "
                        "or end it."
                    ) from None
                time.sleep(0.05)


class Looks:
    """The runs that ever looked at test pictures: a line each in looks.jsonl, never taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, list[str]] = {}  # by hash of the test pictures
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut off
                    look = json.loads(line)
                    self.runs.setdefault(look["test"], []).append(look["run"])

    def add(self, test: str, run: str, *, anew: bool) -> None:
        """A run has looked; one that had before counts again only where it was trained anew.

        Raises:
            OutputError: it could not be written down.
        """
        runs = self.runs.setdefault(test, [])
        if run in runs and not anew:
            return
        runs.append(run)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": test, "run": run}) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from error


def hash_of(answers: Answers) -> str:
    """SHA-256 over the contents of the pictures of a split."""
    return hashlib.sha256("\n".join(map(str, answers.hashes)).encode()).hexdigest()
