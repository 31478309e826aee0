"""Claim: a comparison's bookkeeping costs at most 2 % of its runs' time, and Ray at most 1 s a run.

100 runs (5 methods, 5 splits, 4 seeds) of 5 s each that only wait, so that all other time is bookkeeping:
preparing, looking for what is finished, the table after every run, the verdict, the standing. They leave
predictions of 200 test pictures, as real runs do. Then the same with nothing to wait for on a Ray cluster of
this machine alone: seconds per run once the first has come home. Ray is the extra 'cluster'; where it is
missing, that half is left out and said so.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import measurement
from headstart.comparison.runner import compare
from headstart.records import Parameters, Recipe, Result, Run, Score
from headstart.training.events import Reporter
from measurement import Check

N = 200  # pictures in val, and in test
METHODS = ("probe", "full", "lp-ft", "l2-sp", "delta")


@dataclass(frozen=True)
class Ready:
    run: Run
    name: str
    unfit: str | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(optimizer="sgd", lr=0.01, weight_decay=1e-4))
    learnt_from: int = 300
    audited: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Waits:
    """Waits where a run would train, and leaves what a run leaves."""

    seconds: float

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Ready:
        key = run.key(data=f"split {run.split_seed}", source="weights")
        return Ready(run, f"{run.method}-{key}-s{run.seed}")

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        run = prepared.run
        time.sleep(self.seconds)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {}
        scores = {}
        for split in ("val", "test"):
            text = f"{run.method} {run.seed} {run.split_seed} {split}"
            rng = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
            right = rng.random(N) < 0.8
            arrays[f"{split}_probabilities"] = np.stack([right, ~right], 1).astype(np.float32)
            arrays[f"{split}_labels"] = np.zeros(N, np.int64)
            arrays[f"{split}_hashes"] = np.array([f"{split}{run.split_seed}-{i:04d}" for i in range(N)])
            share = float(right.mean())
            scores[split] = Score(
                n=N, accuracy=share, balanced_accuracy=share, macro_f1=share, log_loss=1 - share
            )
        np.savez_compressed(folder / "predictions.npz", **arrays)
        result = Result(
            status="finished",
            run=run,
            method=run.method,
            model=run.model,
            split_seed=run.split_seed or 0,
            seed=run.seed,
            epochs=run.epochs,
            seconds=self.seconds,
            parameters=Parameters(trained=10, shipped=20),
            recipe=prepared.recipe,
            **scores,
        )
        (folder / "result.json").write_text(json.dumps(result.model_dump(mode="json")))
        reporter.row(result)
        return result


class Ends(Reporter):
    """When each run was over."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def row(self, result: Result) -> None:
        self.at.append(time.perf_counter())


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run")
    options = parser.parse_args()
    seconds = 0.05 if options.quick else options.seconds
    splits, seeds = (2, 2) if options.quick else (5, 4)
    here = measurement.begin("scheduling")
    runs = len(METHODS) * splits * seeds
    asked: dict[str, Any] = {"methods": METHODS, "splits": splits, "seeds": seeds, "baseline": "full"}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        compare("pictures", out=Path(folder) / "here", executor=Waits(seconds), jobs=1, **asked)
        wall = time.perf_counter() - begun
        share = (wall - runs * seconds) / (runs * seconds)
        begun = time.perf_counter()
        compare("pictures", out=Path(folder) / "here", executor=Waits(seconds), jobs=1, **asked)
        again = time.perf_counter() - begun
        what = f"bookkeeping of {runs} runs of {seconds:g} s, of their time"
        checks = [Check(what, share, 0.02, at_least=False)]
        details: dict[str, Any] = {
            "runs": runs,
            "seconds_of_a_run": seconds,
            "wall_seconds": round(wall, 2),
            "milliseconds_of_a_run": round((wall - runs * seconds) / runs * 1000, 2),
            "same_command_again_seconds": round(again, 2),
        }
        try:
            import ray  # noqa: F401
        except ImportError:
            details["ray"] = "is not installed: pip install 'headstart[cluster]'"
        else:
            os.environ["RAY_ADDRESS"] = "local"
            ends = Ends()
            compare(
                *("pictures",),
                out=Path(folder) / "ray",
                executor=Waits(0.0),
                reporter=ends,
                on="ray",
                jobs=1,
                **asked,
            )
            each = (ends.at[-1] - ends.at[0]) / (len(ends.at) - 1)
            gaps = [b - a for a, b in zip(ends.at, ends.at[1:], strict=False)]
            checks.append(
                Check("Ray, of a run", each, 1.0, at_least=False, unit=" s", spread=(min(gaps), max(gaps)))
            )
            details["ray_runs"] = len(ends.at)
    return measurement.finish(
        "scheduling",
        "A comparison's bookkeeping costs at most 2 % of its runs' time, and Ray at most 1 s a run.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
