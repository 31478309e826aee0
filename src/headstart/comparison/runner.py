"""Run a comparison: one folder per run, finished ones never again, failed ones as rows with their reason."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headstart.comparison import ledger
from headstart.comparison.grid import Cell, Grid, plan
from headstart.comparison.ledger import Entry, Unusable
from headstart.comparison.statistics import Answers
from headstart.comparison.verdict import Failure, Verdict, judge
from headstart.errors import ConfigError, DataError, HeadstartError, ModelError, OutputError, Unreachable
from headstart.records import Result, Run
from headstart.training import job
from headstart.training.events import Reporter

if TYPE_CHECKING:
    from headstart.ship.predict import Predictor

METHODS = ("probe", "full", "lp-ft", "l2-sp")
MARKER = "compare.json"
RUNS = "runs"


class Prepared(Protocol):
    """A run that is ready to be trained."""

    @property
    def name(self) -> str:
        """Its folder's name: method, hash of all that was asked, seed."""
        ...


class Executor(Protocol):
    """Where runs are prepared and trained."""

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> Prepared:
        """Load what a run needs; `share` is an earlier one whose pictures and network may be used again."""
        ...

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        """Train it, and leave result.json and predictions.npz in the folder."""
        ...


class Here:
    """This process, one run after another."""

    def prepare(self, run: Run, *, share: Any, say: Callable[[str], None]) -> job.Prepared:
        """See `headstart.training.job.prepare`."""
        return job.prepare(run, share=share, say=say)

    def execute(
        self, prepared: Any, folder: Path, *, resume: bool, overwrite: bool, reporter: Reporter
    ) -> Result:
        """See `headstart.training.job.execute`."""
        try:
            return job.execute(prepared, folder, resume=resume, overwrite=overwrite, reporter=reporter)
        finally:
            _free_memory()


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`."""

    folder: Path
    judgement: Verdict
    results: list[Result]  # of the runs that finished, in the order of the table
    labels: list[str]  # what the table calls the method of each of them
    folders: list[Path]  # where each of them lies

    @property
    def verdict(self) -> str:
        """What to take, and whether the difference is real: one to three sentences."""
        return self.judgement.sentence

    @property
    def table(self) -> list[dict[str, Any]]:
        """One plain dict per method; see `headstart.comparison.verdict.Row`."""
        return [row.model_dump() for row in self.judgement.rows]

    @property
    def failed(self) -> list[Failure]:
        """The runs that did not finish, and why."""
        return self.judgement.failed

    @cached_property
    def best(self) -> Predictor:
        """The model to take, ready to predict.

        Raises:
            OutputError: no run finished.
        """
        from headstart.ship.predict import load

        if self.judgement.take is None:
            raise OutputError(f"{self.folder} holds no finished run. {self.verdict}")
        return load(self.folder / RUNS / self.judgement.take.run)


def compare(
    data: str | Path,
    methods: str | Iterable[str] = METHODS,
    *,
    out: str | Path,
    seeds: int | Iterable[int] = 3,
    baseline: str | None = None,
    hyper: Mapping[str, Mapping[str, Any]] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    executor: Executor | None = None,
    **fields: Any,
) -> Comparison:
    """Fine-tune with several methods on the same pictures, and say which to take.

    A run lies in `out/runs/METHOD-HASH-sSEED`, where the hash stands for everything that was asked of it,
    its pictures and its source weights. So the same call again, after a crash, a kill or Ctrl-C, goes on
    where it was; runs that failed are tried again; and a call with other methods, seeds or settings adds
    its runs beside those that are there. The verdict is about the runs asked for in this call.

    `out` then holds `compare.json` (what was asked), `results.csv` (a row per run) and `verdict.json`,
    all written anew after every run.

    Args:
        data: a folder of class folders, or a CSV file.
        methods: names, 'name:preset', rooms or 'all'.
        out: the comparison's folder: new, empty, or of an earlier comparison.
        seeds: how many, or which.
        baseline: what the others are compared with; None: 'full' where it is among the methods, else
            the first of them. It is added where it is missing.
        hyper: hyper-parameters by method, such as {"l2-sp": {"alpha": 0.1}}.
        resume: go on with runs that were interrupted; False starts these over.
        overwrite: train all runs asked for anew, finished ones too.
        reporter: told what happens; None is quiet.
        executor: where runs are trained; None: here, one after another.
        fields: fields of `headstart.Run` that all runs share, such as `epochs=20`.

    Raises:
        HeadstartError: what was given cannot be used. A run that fails is no error but a row.
        KeyboardInterrupt: after what is finished was written down.
    """
    grid = plan(str(data), methods, seeds=seeds, baseline=baseline, hyper=hyper, **fields)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A comparison runs in one process. Start it without accelerate or torchrun; to train one run "
            "on several devices use: headstart train"
        )
    folder = Path(out)
    _claim(folder)
    with ledger.alone(folder):
        return _Runner(grid, folder, resume, overwrite, reporter or Reporter(), executor or Here()).walk()


def _claim(folder: Path) -> None:
    """Refuse a folder that holds anything but a comparison."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used for the comparison: {error.strerror or error}."
        ) from error
    begun = (".lock", f".{MARKER}.")  # all there is after a kill in the first moment
    if MARKER not in holds and not all(name.startswith(begun) for name in holds):
        raise OutputError(
            f"{folder} holds something else ({', '.join(holds[:3])}). Give an empty or new folder with --out."
        )


class _Runner:
    """One call of `compare`."""

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        resume: bool,
        overwrite: bool,
        reporter: Reporter,
        executor: Executor,
    ) -> None:
        self.grid, self.folder = grid, folder
        self.resume, self.overwrite = resume, overwrite
        self.reporter, self.executor = reporter, executor
        self.entries = [Entry(cell.label, cell.run) for cell in grid.cells]

    def walk(self) -> Comparison:
        """All runs, one after another."""
        self._write_asked()
        self.reporter.begin(len(self.entries))
        share: Prepared | None = None  # the last run that could be prepared: its pictures and network
        refused: HeadstartError | None = None  # the first that could not
        try:
            for index, (cell, entry) in enumerate(zip(self.grid.cells, self.entries, strict=True), 1):
                try:
                    prepared = self.executor.prepare(cell.run, share=share, say=self.reporter.say)
                except HeadstartError as error:
                    if share is None and isinstance(
                        error, DataError | ModelError | Unreachable | OutputError
                    ):
                        raise  # the pictures or the network: no run can do without them
                    refused = refused or error
                    self._failed(cell, entry, index, error)
                    continue
                share = prepared
                entry.folder = f"{RUNS}/{prepared.name}"
                self._one(cell, entry, prepared, index)
            if share is None and refused is not None:
                raise refused
        except KeyboardInterrupt:
            with contextlib.suppress(OutputError):  # what matters now is that the interrupt gets through
                self._write_outcome()
            self.reporter.say("Interrupted. The same command goes on where it stopped.")
            raise
        finally:
            self.reporter.end()
        return self._write_outcome()

    def _one(self, cell: Cell, entry: Entry, prepared: Prepared, index: int) -> None:
        folder = self.folder / RUNS / prepared.name
        self.reporter.run(prepared.name, index, len(self.entries))
        found, anew = None, self.overwrite or not self.resume
        try:
            found = ledger.look(folder)
        except Unusable as reason:
            self.reporter.say(f"{folder} was finished, but {reason}: it is trained again.")
            _set_aside(folder)
            anew = True
        if found is not None and self.overwrite:
            _set_aside(folder)
            found = None
        if found is not None:
            self._finished(entry, *found)
            self.reporter.row(found[0])
            return
        try:
            self.executor.execute(prepared, folder, resume=not anew, overwrite=anew, reporter=self.reporter)
            found = ledger.look(folder)
            if found is None:
                raise OutputError(f"{folder} has no finished result, though the run ended.")
        except KeyboardInterrupt:
            entry.status, entry.reason = (
                "interrupted",
                "interrupted by hand; it goes on with the same command",
            )
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the other runs go on
            self._failed(cell, entry, index, error)
            traceback.clear_frames(error.__traceback__)  # they hold the network that did not fit
            _free_memory()
        else:
            self._finished(entry, *found)
            with contextlib.suppress(OSError):
                (folder / "error.txt").unlink(missing_ok=True)
            self._write_outcome()

    def _finished(self, entry: Entry, result: Result, answers: dict[str, Answers]) -> None:
        for other in self.entries:
            if other.status != "finished" or other.at != entry.at:
                continue
            if any(list(other.answers[s].hashes) != list(answers[s].hashes) for s in ledger.SPLITS):
                raise OutputError(
                    f"{entry.folder} and {other.folder} were scored on other pictures, though both have "
                    f"{entry.at}. Delete the one that was changed and run again."
                )
        entry.status, entry.reason = "finished", None
        entry.result, entry.answers = result, answers

    def _failed(self, cell: Cell, entry: Entry, index: int, error: Exception) -> None:
        entry.status, entry.reason = "failed", _reason(error)
        if entry.folder is None:  # it could not even be prepared
            self.reporter.run(f"{cell.label} s{cell.run.seed}", index, len(self.entries))
        else:
            text = "".join(traceback.format_exception(error))
            # Without the folder, the run never began; made here, it would look like somebody else's.
            with contextlib.suppress(OSError):  # a full disk may be the very reason
                (self.folder / entry.folder / "error.txt").write_text(text, encoding="utf-8")
        run = cell.run
        self.reporter.row(
            Result(
                status="failed",
                reason=entry.reason,
                run=run,
                method=run.method,
                preset=run.preset,
                model=run.model,
                split_seed=run.seed if run.split_seed is None else run.split_seed,
                seed=run.seed,
                epochs=0,
            )
        )
        self._write_outcome()

    # ------------------------------------------------------------------ what is written

    def _write_asked(self) -> None:
        from headstart import __version__

        asked = {
            "format": 1,
            "headstart": __version__,
            "methods": self.grid.labels,
            "seeds": self.grid.seeds,
            "baseline": self.grid.baseline,
            "runs": [
                {"method": cell.label, "run": cell.run.model_dump(mode="json")} for cell in self.grid.cells
            ],
        }
        text = json.dumps(asked, indent=2, ensure_ascii=False) + "\n"
        ledger.write(self.folder / MARKER, text)
        try:
            (self.folder / RUNS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written to: {error.strerror or error}.") from error

    def _write_outcome(self) -> Comparison:
        ledger.write_table(self.folder / "results.csv", self.entries)
        found = judge(self.entries, labels=self.grid.labels, baseline=self.grid.baseline)
        text = json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        ledger.write(self.folder / "verdict.json", text)
        done = [entry for entry in self.entries if entry.result is not None]
        return Comparison(
            self.folder,
            found,
            results=[entry.result for entry in done if entry.result is not None],
            labels=[entry.label for entry in done],
            folders=[self.folder / (entry.folder or "") for entry in done],
        )


def _set_aside(folder: Path) -> None:
    """A run is finished by its result.json: without it, it is done again; the old one can still be read."""
    try:
        (folder / "result.json").replace(folder / "result.old.json")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror or error}.") from error


def _reason(error: Exception) -> str:
    """Why a run failed: our own errors as they are, others with their type and last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, HeadstartError):
        return " ".join(line.strip() for line in lines) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Out of memory. Use a smaller --batch-size or --img-size."
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def _free_memory() -> None:
    """The next run starts with what the last one held: cycles hold networks, and CUDA keeps its blocks."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
