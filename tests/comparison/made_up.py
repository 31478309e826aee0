"""An executor that makes up its predictions, so that a comparison takes no time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import MethodError, TrainingError
from headstart.records import Parameters, Recipe, Result, Run, Score
from headstart.training.events import Reporter

RIGHT = {"scratch": 0.4, "probe": 0.8, "full": 0.8, "lp-ft": 0.8, "l2-sp": 0.8}
SECONDS = {"scratch": 60.0, "probe": 4.0, "full": 61.0, "lp-ft": 65.0, "l2-sp": 63.0}


@dataclass(frozen=True)
class Ready:
    run: Run
    name: str
    shared: str | None
    unfit: str | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(optimizer="sgd", lr=0.01, weight_decay=1e-4))
    learnt_from: int = 90
    audited: dict[str, Any] = field(default_factory=lambda: {"pictures": 150, "readable": 150})


@dataclass
class MadeUp:
    """Says 'right' with a given probability per method; the pictures of a seed are the same for all."""

    right: dict[str, float] = field(default_factory=lambda: dict(RIGHT))
    val_right: dict[str, float] = field(default_factory=dict)  # where validation differs from test
    seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS))
    n: int = 150
    one_split: bool = False  # the same test pictures in every seed
    exact: bool = False  # exactly that share right, the first pictures of the split
    broken: dict[str, Exception] = field(default_factory=dict)  # by method, when trained
    unfit: dict[str, Exception] = field(default_factory=dict)  # by method, when prepared
    before: Callable[[Run], None] = lambda run: None  # called when a run is trained
    trained: list[tuple[str, int]] = field(default_factory=list)
    prepared: list[Ready] = field(default_factory=list)

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Ready:
        if run.method in self.unfit:
            raise self.unfit[run.method]
        label = run.method if run.preset is None else f"{run.method}-{run.preset}"
        key = run.key(data=f"pictures of seed {run.seed}", source="weights", settled={})
        ready = Ready(run, f"{label}-{key}-s{run.seed}", None if share is None else share.name)
        self.prepared.append(ready)
        return ready

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        run = prepared.run
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and overwrite:
            (folder / "last.pt").unlink(missing_ok=True)
        resumed = (folder / "last.pt").exists()
        (folder / "run.json").write_text("{}")
        (folder / "last.pt").write_text("half")
        self.trained.append((run.method, run.seed))
        self.before(run)
        if run.method in self.broken:
            raise self.broken[run.method]
        arrays, scores = {}, {}
        for split, rates in (("val", {**self.right, **self.val_right}), ("test", self.right)):
            right = self._answers(run, rates[run.method], split)
            pictures = 0 if self.one_split else run.seed
            arrays[f"{split}_probabilities"] = np.stack([right, ~right], 1).astype(np.float32)
            arrays[f"{split}_labels"] = np.zeros(self.n, np.int64)
            arrays[f"{split}_hashes"] = np.array([f"{split}{pictures}-{i}" for i in range(self.n)])
            scores[split] = Score(
                n=self.n,
                accuracy=right.mean(),
                balanced_accuracy=0.5,
                macro_f1=0.5,
                log_loss=1 - right.mean(),
            )
        np.savez_compressed(folder / "predictions.npz", **arrays)
        result = Result(
            status="finished",
            run=run,
            method=run.method,
            preset=run.preset,
            model=run.model,
            split_seed=run.seed,
            seed=run.seed,
            epochs=run.epochs,
            seconds=self.seconds[run.method],
            peak_memory_mb=100.0,
            parameters=Parameters(trained=10, shipped=20),
            diagnostics={"resumed": resumed},
            **scores,
        )
        (folder / "result.json").write_text(json.dumps(result.model_dump(mode="json")))
        (folder / "last.pt").unlink()
        reporter.row(result)
        return result

    def _answers(self, run: Run, rate: float, split: str) -> np.ndarray:
        if self.exact:
            return np.arange(self.n) < round(rate * self.n)
        text = f"{run.method}{run.preset}{run.seed}{split}"
        rng = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
        return rng.random(self.n) < rate


class Heard(Reporter):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows: list[Result] = []
        self.runs: list[tuple[str, int, int]] = []
        self.ended = 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def run(self, name: str, index: int, total: int) -> None:
        self.runs.append((name, index, total))

    def row(self, result: Result) -> None:
        self.rows.append(result)

    def end(self) -> None:
        self.ended += 1


NO_MEMORY = TrainingError("Out of memory on cuda. Use a smaller --batch-size.")
NOT_HERE = MethodError("l2-sp cannot run here: no source.")
