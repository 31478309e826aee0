"""Run a comparison: one folder per run, finished ones never again, failed ones as rows with their reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.comparison import ledger
from headstart.comparison.books import MARKER, RUNS, Books, Options
from headstart.comparison.crew import Alone, Crew, Executor, Here
from headstart.comparison.grid import plan
from headstart.comparison.processes import Processes, visible
from headstart.comparison.search import budget as seconds_of
from headstart.comparison.verdict import Failure, Verdict
from headstart.comparison.walk import Walk
from headstart.disk import alone
from headstart.errors import ConfigError, OutputError
from headstart.records import Result
from headstart.training.events import Reporter
from headstart.training.trackers import tracked

if TYPE_CHECKING:
    from headstart.ship.predict import Predictor

METHODS = ("probe", "full", "lp-ft", "l2-sp")


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

    @cached_property
    def curve(self) -> dict[str, Any] | None:
        """Accuracy against the number of labels, and advice in numbers; None where one size was run."""
        path = self.folder / "curve.json"
        if not path.is_file():
            return None
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read

    @property
    def failed(self) -> list[Failure]:
        """The runs that did not finish, and why."""
        return self.judgement.failed

    def report(self, path: str | Path | None = None) -> Path:
        """Write the comparison as one HTML file; see `headstart.report.write`.

        Args:
            path: of the page; None: `report.html` in the comparison's folder.
        """
        from headstart.report import write

        return write(self.folder, path)

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
    splits: int | Iterable[int] | None = None,
    train_sizes: int | str | Iterable[int | str | None] | None = None,
    trials: int | None = None,
    budget: str | float | None = None,
    learning_curve: bool = False,
    refit: bool = False,
    jobs: int | None = None,
    on: str | None = None,
    address: str | None = None,
    track: str | Sequence[str] | None = None,
    command: str | None = None,
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
        executor: how a run is prepared and trained; None: as `headstart.train` does it.
        splits: how many, or which: every seed is run on each of these splits. None: every seed draws one
            of its own.
        train_sizes: numbers of training pictures, or "all": every method learns from each; the verdict is
            about the largest. The pictures of a smaller size are among those of a larger.
        trials: how many trials every method has, on each split, to find its hyper-parameters; see
            `headstart.comparison.search`.
        budget: how long each method's trials may take, all together: seconds, or a text such as "2h".
        learning_curve: afterwards, train the one to take on 25, 50 and 75 % of the labels.
        refit: at the end train the one to take once more, on train and val, for the length learnt; that is
            what it then ships. The verdict is about the runs before.
        jobs: processes on this machine, each doing a run at a time. None: one per GPU; else this one alone.
        on: "ray": do the runs on a Ray cluster.
        address: of the cluster; None: the one this machine belongs to, or a new one on this machine.
        track: trackers that are told: "tensorboard", "mlflow", "wandb", "trackio"; None: none of them.
        command: the line that asks for all this, for the report.
        fields: fields of `headstart.Run` that all runs share, such as `epochs=20`.

    Raises:
        HeadstartError: what was given cannot be used. A run that fails is no error but a row.
        KeyboardInterrupt: after what is finished was written down.
    """
    grid = plan(
        str(data),
        methods,
        seeds=seeds,
        splits=splits,
        train_sizes=train_sizes,
        baseline=baseline,
        hyper=hyper,
        **fields,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A comparison runs in one process. Start it without accelerate or torchrun; to train one run "
            "on several devices use: headstart train"
        )
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise ConfigError(f"trials is how many, from 1. Got {trials!r}.")
    options = Options(
        trials=trials,
        budget=seconds_of(budget),
        curve=learning_curve,
        resume=resume,
        overwrite=overwrite,
        command=command,
    )
    if jobs is None and executor is not None and on is None:
        jobs = 1  # only those that ask for it have to be fit to be sent to other processes
    where = _where(jobs, on, address, str(fields.get("device", "auto")))
    folder = Path(out)
    _claim(folder)
    reporter, executor = tracked(reporter or Reporter(), track, folder), executor or Here()
    with alone(folder, "comparison"):
        crew = where(executor, reporter, folder)
        books = Books(grid, folder, options, jobs=crew.size)
        books.write_asked()
        Walk(books, reporter, executor, crew).go()
        done = _outcome(books)
        if refit and done.judgement.take is not None:
            name = done.judgement.take.run
            books.refitted(name, anew=_refit(folder / RUNS / name, reporter))
        return done


def _where(
    jobs: int | None, on: str | None, address: str | None, device: str
) -> Callable[[Executor, Reporter, Path], Crew]:
    """Who does the runs; mistakes are found before a folder is made."""
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise ConfigError(f"jobs is how many processes, from 1. Got {jobs!r}.")
    if on not in (None, "ray"):
        raise ConfigError(f"on is 'ray', or is left out for this machine alone. Got {on!r}.")
    if on is None and address is not None:
        raise ConfigError("address is of a Ray cluster. Say so with --on ray.")
    if on == "ray":
        from headstart.comparison.cluster import Cluster, connect

        connection = connect(address)
        return lambda executor, reporter, folder: Cluster(
            executor, reporter, connection=connection, jobs=jobs, device=device
        )
    if jobs is None:
        jobs = max(1, len(visible())) if device in ("auto", "cuda") else 1
    if jobs == 1:
        return lambda executor, reporter, folder: Alone(executor, reporter)

    def processes(executor: Executor, reporter: Reporter, folder: Path) -> Crew:
        lock = folder / ".lock.workers"
        ledger.gone(lock)
        return Processes(executor, reporter, jobs=jobs, device=device, lock=lock)

    return processes


def _refit(folder: Path, reporter: Reporter) -> bool:
    """Train the run that is taken once more, on train and val; False where that was done before."""
    from headstart.training.job import prepare
    from headstart.training.refit import refit

    finished = Result.read(folder / "result.json")
    prepared = prepare(finished.run, say=reporter.say)
    reporter.begin(1)
    reporter.run(prepared.name, 1, 1)
    try:
        refit(prepared, folder, reporter=reporter)
    finally:
        reporter.end()
    return finished.refit is None


def _outcome(books: Books) -> Comparison:
    verdict = books.write_all()
    done = [entry for entry in books.counted() if entry.result is not None]
    return Comparison(
        books.folder,
        verdict,
        results=[entry.result for entry in done if entry.result is not None],
        labels=[entry.label for entry in done],
        folders=[books.folder / (entry.folder or "") for entry in done],
    )


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
