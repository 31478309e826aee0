"""What a comparison knows of its runs, and writes down: its table, its verdict, what was asked and tried."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

from headstart.comparison import ledger
from headstart.comparison.curve import curves
from headstart.comparison.grid import Grid
from headstart.comparison.ledger import Entry
from headstart.comparison.search import OBJECTIVE, Study
from headstart.comparison.verdict import Verdict, judge
from headstart.disk import write_text
from headstart.errors import OutputError
from headstart.training.events import Standing

MARKER = "compare.json"
RUNS = "runs"


@dataclass(frozen=True)
class Options:
    """How a comparison is run; what it compares stands in its grid."""

    trials: int | None = None  # of each search; None: as many as the budget allows
    budget: float | None = None  # seconds of each method's searches
    curve: bool = False
    resume: bool = True
    overwrite: bool = False
    command: str | None = None  # the line that asked for all this

    @property
    def searches(self) -> bool:
        """Whether hyper-parameters are looked for at all."""
        return self.trials is not None or self.budget is not None


class Books:
    """All runs of a comparison and how they stand."""

    def __init__(self, grid: Grid, folder: Path, options: Options, *, jobs: int) -> None:
        self.grid, self.folder, self.options, self.jobs = grid, folder, options, jobs
        self.entries = [Entry(cell.label, cell.run) for cell in grid.cells]
        self.trials: list[Entry] = []
        self.curve: list[Entry] = []
        self.studies: list[Study] = []
        self.unsearched = 0  # studies that are still to begin
        self.notes: list[str] = []
        self.looks = ledger.Looks(folder / "looks.jsonl")
        self._judging, self._judged = 0.0, -1e9  # seconds that the last verdict took, and when that was

    def note(self, text: str) -> bool:
        """Something people should know beside the verdict; True where it is new."""
        new = text not in self.notes
        if new:
            self.notes.append(text)
        return new

    def total(self) -> int:
        """Runs of the table, of the curve, and trials as far as they are known."""
        trials = len(self.trials)
        if self.options.trials is not None:
            trials = self.unsearched * self.options.trials
            asked = self.options.trials
            trials += sum(
                len(s.over) if s.given_up else max(len(s.over), asked) for s in self.studies if s.axes
            )
        return len(self.entries) + trials + len(self.curve)

    def standing(self, under_way: Mapping[str, Mapping[str, Any]]) -> Standing:
        """How far it is, what it took, and who leads.

        Args:
            under_way: by run that another process is at, its last epoch's record.
        """
        all_ = [*self.entries, *self.trials, *self.curve]
        over = [entry for entry in all_ if entry.status not in ("pending", "interrupted")]
        took: dict[str, list[float]] = {}
        accuracy: dict[str, list[float]] = {}
        for entry in over:
            if entry.result is not None:
                took.setdefault(entry.label, []).append(entry.result.seconds)
                if entry.role == "run" and entry.result.val is not None:
                    accuracy.setdefault(entry.label, []).append(entry.result.val.accuracy)
        spent = sum(map(sum, took.values()))
        total = self.total()
        left = None
        if took:
            usual = spent / sum(map(len, took.values()))
            left = (total - len(over)) * usual / self.jobs
        leader = max(accuracy, key=lambda label: mean(accuracy[label]), default=None)
        return Standing(
            done=len(over),
            total=total,
            failed=sum(entry.status == "failed" for entry in over),
            spent=spent,
            left=left,
            leader=leader,
            leads_with=None if leader is None else mean(accuracy[leader]),
            under_way=under_way,
        )

    # ------------------------------------------------------------------ files

    def counted(self) -> list[Entry]:
        """The runs that the verdict is about: those of the largest size."""
        return [entry for entry in self.entries if entry.train_size == self.grid.train_sizes[-1]]

    def judge(self, entries: list[Entry]) -> Verdict:
        """The verdict about some of the runs, with the notes."""
        found = judge(entries, labels=self.grid.labels, baseline=self.grid.baseline)
        return found.model_copy(update={"notes": [*found.notes, *self.notes]}) if self.notes else found

    def write_asked(self) -> None:
        """compare.json: what was asked, what searches took, how often test pictures were looked at."""
        from headstart import __version__

        asked = {
            "format": 2,
            "headstart": __version__,
            "command": self.options.command,
            "methods": self.grid.labels,
            "splits": self.grid.splits,
            "seeds": self.grid.seeds,
            "train_sizes": self.grid.train_sizes,
            "baseline": self.grid.baseline,
            "trials": self.options.trials,
            "budget": self.options.budget,
            "jobs": self.jobs,
            "runs": [
                {
                    "method": entry.label,
                    "split": entry.split,
                    "seed": entry.run.seed,
                    "train_size": entry.train_size,
                    "run": entry.run.model_dump(mode="json"),
                }
                for entry in self.entries
            ],
            **self.looked(),
        }
        if self.options.searches:
            asked["tuning"] = {
                "trials": self.options.trials,
                "budget_seconds": self.options.budget,
                "objective": OBJECTIVE,
                "space": {s.label: {n: a.space.plain() for n, a in s.axes.items()} for s in self.studies},
            }
            spent: dict[str, dict[str, float]] = {}
            for study in self.studies:
                mine = spent.setdefault(study.label, {"trials": 0, "seconds": 0.0})
                mine["trials"] += len(study.over)
                mine["seconds"] = round(mine["seconds"] + study.seconds, 2)
            asked["spent"] = spent
        write_text(self.folder / MARKER, _json(asked))
        try:
            (self.folder / RUNS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written to: {error.strerror or error}.") from error

    def looked(self) -> dict[str, Any]:
        """The test pictures of each split, and how often a run looked at them."""
        tests: dict[int, dict[str, Any]] = {}
        for entry in [*self.entries, *self.curve]:
            if entry.answers and entry.split not in tests:
                answers = entry.answers["test"]
                name = ledger.hash_of(answers)
                looks = len(self.looks.runs.get(name, []))
                tests[entry.split] = {
                    "split": entry.split,
                    "hash": name,
                    "n": len(answers.hashes),
                    "looks": looks,
                }
        if not tests:
            return {"test": []}
        each = [tests[split] for split in sorted(tests)]
        distinct = {test["hash"]: test for test in each}
        whole = sha256("\n".join(sorted(distinct)).encode()).hexdigest()
        one = next(iter(distinct)) if len(distinct) == 1 else whole
        return {
            "test": each,
            "test_split": {"sha256": one, "looks": sum(test["looks"] for test in distinct.values())},
        }

    def refitted(self, name: str, *, anew: bool) -> None:
        """A refit scores the test pictures once more: that look counts like those of the runs.

        Args:
            name: of the run's folder.
            anew: it was refitted now, and not by an earlier call.
        """
        entry = next(e for e in self.entries if e.folder == f"{RUNS}/{name}" and e.answers)
        self.looks.add(ledger.hash_of(entry.answers["test"]), f"{name}/refit", anew=anew)
        self.write_asked()

    def write_audit(self, found: dict[str, Any]) -> None:
        """audit.json: what there is to know about the pictures."""
        if found:
            write_text(self.folder / "audit.json", _json(found))

    def write_table(self) -> None:
        """results.csv: all runs, trials and points of the curve, as they stand."""
        labels, sizes = list(self.grid.labels), list(self.grid.train_sizes)
        # However many processes took part, and whichever was first: the same table.
        trials = sorted(
            self.trials,
            key=lambda e: (sizes.index(e.train_size), e.split, labels.index(e.label), e.number),
        )
        ledger.write_table(self.folder / "results.csv", [*self.entries, *trials, *self.curve])

    def write_soon(self) -> None:
        """The table now; the verdict now and then, so that judging takes a hundredth of the time at most."""
        self.write_table()
        now = time.perf_counter()
        if now - self._judged >= 100 * self._judging:
            self.write_verdict()
            self._judged = time.perf_counter()
            self._judging = self._judged - now

    def write_verdict(self) -> Verdict:
        """verdict.json, about the runs that are there."""
        found = self.judge(self.counted())
        write_text(self.folder / "verdict.json", _json(found.model_dump(mode="json")))
        return found

    def write_all(self) -> Verdict:
        """Every file of the comparison."""
        self.write_table()
        found = self.write_verdict()
        self.write_asked()
        self._write_rest(found)
        return found

    def curves(self, take: str | None) -> dict[str, Any] | None:
        """Accuracy against labels, and what more of them would bring; None where one size was run."""
        if len(self.grid.train_sizes) < 2 and not self.curve:
            return None
        return curves([*self.entries, *self.curve], take)

    def _write_rest(self, found: Verdict) -> None:
        for name in ("search.json", "sizes.json", "curve.json"):  # of an earlier call, which asked for more
            (self.folder / name).unlink(missing_ok=True)
        self.write_asked()
        if self.options.searches:
            searched = {
                "trials": self.options.trials,
                "budget": self.options.budget,
                "objective": OBJECTIVE,
                "studies": sorted(
                    (study.plain() for study in self.studies),
                    key=lambda plain: (plain["train_size"] or 0, plain["split"], plain["method"]),
                ),
            }
            write_text(self.folder / "search.json", _json(searched))
        curve = self.curves(None if found.take is None else found.take.method)
        if curve is not None:
            write_text(self.folder / "curve.json", _json(curve))
        if len(self.grid.train_sizes) > 1:
            sizes = [
                {
                    "train_size": size,
                    "verdict": self.judge(
                        [entry for entry in self.entries if entry.train_size == size]
                    ).model_dump(mode="json"),
                }
                for size in self.grid.train_sizes
            ]
            write_text(self.folder / "sizes.json", _json(sizes))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
