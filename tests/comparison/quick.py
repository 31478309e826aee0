"""Executors that can be sent to other processes; most take milliseconds and know no network."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.comparison.crew import Here
from headstart.disk import write_json
from headstart.errors import TrainingError
from headstart.records import Parameters, Recipe, Result, Run, Score
from headstart.training.events import Reporter
from headstart.training.folder import claimed, write_npz

N = 40  # pictures in val, and in test


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def side(run: Run) -> int:
    """The seed of its split."""
    return run.seed if run.split_seed is None else run.split_seed


@dataclass(frozen=True)
class Ready:
    run: Run
    name: str
    unfit: str | None
    recipe: Recipe = field(default_factory=lambda: Recipe(optimizer="sgd", lr=0.01, weight_decay=1e-4))
    learnt_from: int = 80
    audited: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Quick:
    """Right more often near a rate of 0.02 and with more labels; every epoch is noted and checkpointed."""

    pause: float = 0.0  # seconds of an epoch
    unfit: tuple[str, ...] = ()  # methods
    uneven: int = 0  # training pictures that each split has more than the one before
    breaks: tuple[tuple[int, int], ...] = ()  # split and train_size of runs that fail
    log: str | None = None  # a file that gets a line for every epoch that is trained
    gate: str | None = None  # a file: while it is there, no more lines than it has bytes

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Ready:
        split = side(run)
        key = run.key(data=f"split {split}, {run.train_size}", source="weights", settled={})
        unfit = "no filters" if run.method in self.unfit else None
        learnt_from = run.train_size or 80 + self.uneven * split
        return Ready(run, f"{run.method}-{key}-s{run.seed}", unfit, learnt_from=learnt_from)

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        with claimed(folder, prepared.name, {}, resume=resume, overwrite=overwrite) as found:
            return found or self._train(prepared, folder, reporter)

    def _train(self, prepared: Any, folder: Path, reporter: Reporter) -> Result:
        run: Run = prepared.run
        if (side(run), run.train_size) in self.breaks:
            raise TrainingError("It broke.")
        last = folder / "last.pt"
        records: list[dict[str, Any]] = json.loads(last.read_text()) if last.exists() else []
        for epoch in range(len(records) + 1, run.epochs + 1):
            time.sleep(self.pause)
            while self._shut():
                time.sleep(0.005)
            if self.log is not None:
                with Path(self.log).open("a") as file:
                    file.write(f"{prepared.name} {epoch}\n")
            score = self.score(run, "val", epoch)[0]
            record = {
                "phase": "fit",
                "epoch": epoch,
                "epochs": run.epochs,
                "loss": 1.0,
                "val_accuracy": score.accuracy,
                "val_log_loss": score.log_loss,
                "seconds": 0.25,
            }
            records.append(record)
            write_json(last, records)
            (folder / ".m").write_text("".join(json.dumps(each) + "\n" for each in records))
            (folder / ".m").replace(folder / "metrics.jsonl")
            reporter.epoch(record)
        arrays, scores = {}, {}
        for split in ("val",) if run.trial else ("val", "test"):
            scores[split], right = self.score(run, split, run.epochs)
            arrays[f"{split}_probabilities"] = np.stack([right, ~right], 1).astype(np.float32)
            arrays[f"{split}_labels"] = np.zeros(N, np.int64)
            arrays[f"{split}_hashes"] = np.array([f"{split}{side(run)}-{i}" for i in range(N)])
        write_npz(folder / "predictions.npz", arrays)
        result = Result(
            status="finished",
            run=run,
            method=run.method,
            model=run.model,
            split_seed=side(run),
            seed=run.seed,
            epochs=run.epochs,
            n_train=prepared.learnt_from,
            seconds=0.25 * run.epochs,
            parameters=Parameters(trained=10, shipped=20),
            recipe=prepared.recipe,
            **scores,
        )
        write_json(folder / "result.json", result.model_dump(mode="json"))
        last.unlink(missing_ok=True)
        reporter.row(result)
        return result

    def _shut(self) -> bool:
        if self.gate is None or self.log is None:
            return False
        try:
            allowed = Path(self.gate).stat().st_size
        except FileNotFoundError:
            return False
        return lines(Path(self.log)) >= allowed

    def score(self, run: Run, split: str, epoch: int) -> tuple[Score, np.ndarray]:
        off = abs(math.log10((run.lr or 0.01) / 0.02))
        rate = 0.9 - 0.25 * off - 0.3 / epoch - 4.0 / (run.train_size or 80)
        text = (
            f"{run.method}{sorted(run.hyper.items())}{run.seed}{run.split_seed}{split}{epoch}{run.train_size}"
        )
        rng = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
        right = rng.random(N) < rate
        share = float(right.mean())
        return Score(n=N, accuracy=share, balanced_accuracy=share, macro_f1=share, log_loss=1 - share), right


@dataclass(frozen=True)
class Located(Quick):
    """On a Ray cluster: its diary gets a line where a run begins and where it ends, and on which machine."""

    diary: str = ""

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        self._note("begins", prepared.name)
        result = super().execute(prepared, folder, resume=resume, overwrite=overwrite, reporter=reporter)
        self._note("ends", prepared.name)
        return result

    def _note(self, what: str, name: str) -> None:
        import ray

        with Path(self.diary).open("a") as file:
            file.write(f"{what} {name} {ray.get_runtime_context().get_node_id()}\n")


@dataclass(frozen=True)
class Far(Here):
    """Real runs on machines that have none of the files: they are gone where the first one is trained."""

    prepared_at: int = field(default_factory=os.getpid)

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        assert os.getpid() != self.prepared_at
        assert prepared.task.pictures.where is None  # nothing is mapped from the disk of the one that leads
        for gone in (prepared.run.data, prepared.run.model):
            shutil.rmtree(gone, ignore_errors=True)  # what is prepared later shares what is in memory
        return super().execute(prepared, folder, resume=resume, overwrite=overwrite, reporter=reporter)
