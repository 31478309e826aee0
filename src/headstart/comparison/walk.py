"""All runs of a comparison, in order: searches first, then what waits for them, each as soon as may be."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart import registry
from headstart.comparison import ledger
from headstart.comparison.books import RUNS, Books
from headstart.comparison.crew import Crew, Ended, Executor, Prepared, Task, epochs_of, reason_of, steps_of
from headstart.comparison.curve import SHARES
from headstart.comparison.ledger import Entry, Unusable
from headstart.comparison.search import FAILURES, Journal, Proposal, Study, Trial, apply, axes
from headstart.errors import DataError, HeadstartError, ModelError, OutputError, Unreachable
from headstart.records import Result
from headstart.training.events import Reporter

_PATIENCE = 1.0  # seconds after which the standing is told again though nothing happened


@dataclass
class _Work:
    """A run to come: one of the table, or a trial of a search."""

    entry: Entry
    study: Study | None = None
    proposal: Proposal | None = None
    begun: float = field(default_factory=time.perf_counter)
    before: float = 0.0  # seconds of its epochs that an earlier call of the command has done

    @property
    def seconds(self) -> float:
        """How long it has been under way, by the clock: one that fails leaves no other record of it."""
        return round(self.before + time.perf_counter() - self.begun, 2)


@dataclass
class _Search:
    """Runs of one method, split and size, which wait for what a search will choose for them."""

    entries: list[Entry]


class Walk:
    """One walk through all runs; `books` says afterwards what came out."""

    def __init__(self, books: Books, reporter: Reporter, executor: Executor, crew: Crew) -> None:
        self.books, self.reporter, self.executor, self.crew = books, reporter, executor, crew
        self.folder, self.options = books.folder, books.options
        self.journal = Journal(self.folder / "study" / "journal.log")
        self.queue: deque[_Work | _Search] = deque()
        self.under_way: dict[str, _Work] = {}  # by name
        self.waiting: dict[str, list[Entry]] = {}  # by name of their study
        self.shares: dict[Any, Prepared] = {}  # by split and size: pictures and network, to be used again
        self.last: Prepared | None = None
        self.refused: HeadstartError | None = None  # the first run that could not be prepared
        self.skipped: dict[str, str] = {}  # by label: why it cannot run here
        self.pictures: dict[int, int] = {}  # by split: how many training pictures there are
        self._begun = 0
        self._said: set[str] = set()

    def go(self) -> None:
        """Do all runs, and then those of the learning curve.

        Raises:
            HeadstartError: no run can be done.
            KeyboardInterrupt: after what is finished was written down.
        """
        if self.options.overwrite:
            self.journal.forget()
        try:
            self._plan()
            self.reporter.begin(self.books.total())
            self._work()
            if self.last is None and self.refused is not None:
                raise self.refused
            if self.options.curve:
                self._plan_curve()
                self._work()
        except KeyboardInterrupt:
            for work in self.under_way.values():
                work.entry.status = "interrupted"
                work.entry.reason = "interrupted by hand; it goes on with the same command"
            with contextlib.suppress(OutputError):  # what matters now is that the interrupt gets through
                self.books.write_all()
            self.reporter.say("Interrupted. The same command goes on where it stopped.")
            raise
        finally:
            self.crew.close()
            self.reporter.end()

    # ------------------------------------------------------------------ what there is to do

    def _plan(self) -> None:
        """Put all runs in line; with a search, those of one method, split and size wait for it together."""
        if not self.options.searches:
            self.queue.extend(_Work(entry) for entry in self.books.entries)
            return
        together: dict[Any, _Search] = {}
        for entry in self.books.entries:
            key = (entry.train_size, entry.split, entry.label)
            together.setdefault(key, _Search([])).entries.append(entry)
        self.queue.extend(together.values())
        self.books.unsearched = len(together)

    def _plan_curve(self) -> None:
        """The one to take again, with fewer labels."""
        take = self.books.judge(self.books.counted()).take
        for entry in self.books.counted():
            if take is None or entry.label != take.method or entry.status != "finished":
                continue
            pictures = entry.train_size or self.pictures[entry.split]
            for share in SHARES:
                run = entry.run.model_copy(update={"train_size": max(1, round(share * pictures))})
                self.books.curve.append(
                    Entry(entry.label, run, role="curve", chosen=entry.chosen, share=share)
                )
        self.books.curve.sort(key=lambda entry: (entry.at, entry.train_size or 0))
        self.queue.extend(_Work(entry) for entry in self.books.curve)

    def _work(self) -> None:
        while self.queue or self.crew.busy:
            while self.queue and self.crew.busy < self.crew.size:
                self._begin(self.queue.popleft())
            if self.crew.busy:
                ended = self.crew.next(_PATIENCE)
                if ended is not None:
                    self._ended(ended)
            self.reporter.standing(self.books.standing(self.crew.under_way))

    # ------------------------------------------------------------------ one run

    def _begin(self, work: _Work | _Search) -> None:
        """Give a run to the crew, unless it is finished, cannot be prepared, or cannot run here."""
        if isinstance(work, _Search):
            self._search(work.entries)
            return None
        entry, work.begun = work.entry, time.perf_counter()
        prepared = self._prepare(work)
        if prepared is None:
            return None
        entry.folder = f"{RUNS}/{prepared.name}"
        folder = self.folder / entry.folder
        if prepared.name in self.under_way:  # asked for twice: the second finds what the first has left
            self.queue.append(work)
            return self._wait()
        self._announce(prepared.name)
        anew = self.options.overwrite or not self.options.resume
        found: Result | None = None
        try:
            found = self._found(work)
        except Unusable as reason:
            self.reporter.say(f"{folder} was finished, but {reason}: it is trained again.")
            _set_aside(folder)
            anew = True
        if found is not None and not self.options.overwrite:
            self._settle(work, found, anew=False)
            self.reporter.row(found)
            return None
        if found is not None:
            _set_aside(folder)
        watch = None if work.study is None else work.study.watch()
        work.before = 0.0 if anew else sum(record.get("seconds", 0.0) for record in epochs_of(folder))
        self.under_way[prepared.name] = work
        self.crew.start(
            Task(entry.run, prepared.name, folder, resume=not anew, overwrite=anew, watch=watch), prepared
        )
        return None

    def _wait(self) -> None:
        ended = self.crew.next(_PATIENCE)
        if ended is not None:
            self._ended(ended)

    def _prepare(self, work: _Work) -> Prepared | None:
        """Pictures and network of a run; None where it cannot be prepared, or cannot run here."""
        entry = work.entry
        if entry.label in self.skipped:
            entry.status, entry.reason = "skipped", self.skipped[entry.label]
            return None
        key = (entry.split, entry.train_size)
        try:
            prepared = self.executor.prepare(
                entry.run, share=self.shares.get(key, self.last), say=self._say_once
            )
        except HeadstartError as error:
            ours = isinstance(error, DataError | ModelError | Unreachable | OutputError)
            if self.last is None and ours:
                raise  # the pictures or the network: no run can do without them
            self.refused = self.refused or error
            self._announce(f"{entry.label} s{entry.run.seed}")
            self._failed(work, reason_of(error), "".join(traceback.format_exception(error)))
            return None
        if self.last is None:
            self.books.write_audit(prepared.audited)
        self.shares[key] = self.last = prepared
        if entry.train_size is None:
            self.pictures[entry.split] = prepared.learnt_from
        if prepared.unfit is not None:
            # No failure: it was asked for with all the others.
            self.skipped[entry.label] = prepared.unfit
            self.reporter.say(f"{entry.label} is skipped: {prepared.unfit}")
            entry.status, entry.reason = "skipped", prepared.unfit
            return None
        return prepared

    def _found(self, work: _Work) -> Result | None:
        """What lies in its folder, where that is all that there will be.

        Raises:
            Unusable: it is damaged.
        """
        folder = self.folder / (work.entry.folder or "")
        if work.study is not None:
            with contextlib.suppress(OSError, ValueError):
                pruned = Result.read(folder / "result.json")
                if pruned.status == "pruned":
                    return pruned
        found = ledger.look(folder)
        if found is None:
            return None
        work.entry.answers = found[1]
        return found[0]

    def _ended(self, ended: Ended) -> None:
        work = self.under_way.pop(ended.task.name)
        folder = ended.task.folder
        found, reason, trace = None, ended.reason, ended.trace
        if reason is None:
            try:
                found = self._found(work)
                if found is None:
                    reason = f"{folder} has no finished result, though the run ended."
            except Unusable as error:
                reason = f"{folder} ended, but {error}."
        if not self.crew.tells:
            self._announce(ended.task.name, begun=False)
            self.reporter.history(epochs_of(folder))
            if found is not None:
                self.reporter.row(found)
        if found is None:
            self._failed(work, reason or "", trace)
            return
        self._settle(work, found, anew=True)
        with contextlib.suppress(OSError):
            (folder / "error.txt").unlink(missing_ok=True)
        self.books.write_soon()

    def _settle(self, work: _Work, result: Result, *, anew: bool) -> None:
        """A finished run, or a trial that was stopped, takes its place."""
        entry = work.entry
        entry.status = "pruned" if result.status == "pruned" else "finished"
        entry.result, entry.reason = result, result.reason
        name = Path(entry.folder or "").name
        if work.study is not None:
            assert work.proposal is not None
            steps = steps_of(self.folder / (entry.folder or ""))[: result.epochs]
            self._told(work.study, Trial.of(work.proposal, result, run=name, steps=steps))
            return
        for other in [*self.books.entries, *self.books.curve]:
            if other is entry or other.status != "finished" or other.at != entry.at:
                continue
            if any(list(other.answers[s].hashes) != list(entry.answers[s].hashes) for s in ledger.SPLITS):
                raise OutputError(
                    f"{entry.folder} and {other.folder} were scored on other pictures, though both have "
                    f"{entry.at}. Delete the one that was changed and run again."
                )
        self.books.looks.add(ledger.hash_of(entry.answers["test"]), name, anew=anew)

    def _failed(self, work: _Work, reason: str, trace: str) -> None:
        entry, run = work.entry, work.entry.run
        entry.status, entry.reason = "failed", reason
        folder = None if entry.folder is None else self.folder / entry.folder
        if folder is not None:
            # Without the folder, the run never began; made here, it would look like somebody else's.
            with contextlib.suppress(OSError):  # a full disk may be the very reason
                (folder / "error.txt").write_text(trace, encoding="utf-8")
        result = Result(
            status="failed",
            reason=reason,
            run=run,
            method=run.method,
            preset=run.preset,
            model=run.model,
            split_seed=entry.split,
            seed=run.seed,
            epochs=0,
            seconds=work.seconds,
        )
        self.reporter.row(result)
        if work.study is not None and work.proposal is not None:
            self._told(
                work.study, Trial.of(work.proposal, result, run=None if folder is None else folder.name)
            )
        self.books.write_soon()

    # ------------------------------------------------------------------ searching

    def _search(self, entries: Sequence[Entry]) -> None:
        """Begin the study of one method, split and size."""
        self.books.unsearched -= 1
        first = entries[0]
        work = _Work(Entry(first.label, Proposal(0, "default", {}).of(first.run), role="trial"))
        prepared = self._prepare(work)
        if prepared is None:
            for entry in entries:
                entry.status, entry.reason = work.entry.status, work.entry.reason
            return
        cls = registry.get(first.run.method)
        settled = registry.configure(cls, first.run.preset, first.run.hyper)
        spaces = {name: (settled[name], parameter.space) for name, parameter in cls.hyper().items()}
        study = Study(
            first.label,
            first.run,
            axes(first.run, prepared.recipe, takes_steps=cls.takes_steps, hyper=spaces),
            name=f"{first.label} {prepared.name}",
            journal=self.journal,
            trials=self.options.trials,
            seconds=self._share_of_budget(),
        )
        self.books.studies.append(study)
        self.waiting[study.name] = list(entries)
        for trial in study.over:  # of before
            self.books.trials.append(self._row_of(study, trial))
        self._go_on(study)

    def _row_of(self, study: Study, trial: Trial) -> Entry:
        run = Proposal(trial.number, trial.kind, trial.values).of(study.base)
        entry = Entry(study.label, run, trial.state, trial.reason, role="trial", chosen=trial.values)
        entry.number = trial.number
        if trial.run is not None:
            entry.folder = f"{RUNS}/{trial.run}"
            with contextlib.suppress(OSError, ValueError):
                entry.result = Result.read(self.folder / entry.folder / "result.json")
        return entry

    def _told(self, study: Study, trial: Trial) -> None:
        study.tell(trial)
        self._go_on(study)

    def _go_on(self, study: Study) -> None:
        """The next trial of a study, or the runs that waited for it."""
        proposal = study.next()
        if proposal is not None:
            entry = Entry(study.label, proposal.of(study.base), role="trial", chosen=proposal.values)
            entry.number = proposal.number
            self.books.trials.append(entry)
            self.queue.appendleft(_Work(entry, study, proposal))
            return
        text = self._cut_short(study)
        if text is not None and self.books.note(text):
            self.reporter.say(text)
        best = study.chosen
        for entry in reversed(self.waiting.pop(study.name)):
            if best is not None and best.values:
                entry.run, entry.chosen = apply(entry.run, best.values), dict(best.values)
            self.queue.appendleft(_Work(entry))

    def _cut_short(self, study: Study) -> str | None:
        """Why a search found nothing to choose from, or stopped looking; None where it did neither."""
        if study.given_up:
            return (
                f"A search for {study.label} was given up: {FAILURES} trials in a row failed. "
                "To search anew, delete study/journal.log in the comparison's folder. "
                f"The last of them: {study.over[-1].reason or ''}"
            )
        if not study.too_small or study.budget is None or self.options.budget is None:
            return None
        text, searches = f"The budget of {self.options.budget:g} s per method", self._searches()
        if searches == 1:
            text += f" is too small for a second trial of {study.label}, which stays as it is."
        else:
            text += (
                f", {study.budget:g} s for each of its {searches} searches, is too small for a second trial "
                f"of {study.label} in one of them or more; there it stays as it is."
            )
        if study.seconds > study.budget:
            text += " Its first took longer than that, and was let run to its end."
        return text

    def _share_of_budget(self) -> float | None:
        """Seconds of one study."""
        return None if self.options.budget is None else self.options.budget / self._searches()

    def _searches(self) -> int:
        """Studies of one method: as many as there are splits and sizes."""
        return len({(entry.train_size, entry.split) for entry in self.books.entries})

    # ------------------------------------------------------------------ what is told

    def _announce(self, name: str, *, begun: bool = True) -> None:
        """Say which run it is: when it begins, or, where runs tell nothing themselves, when it is over."""
        self._begun += begun
        if begun is self.crew.tells:
            total = self.books.total()
            self.reporter.run(name, min(self._begun, total), total)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.reporter.say(text)


def _set_aside(folder: Path) -> None:
    """A run is finished by its result.json: without it, it is done again; the old one can still be read."""
    try:
        (folder / "result.json").replace(folder / "result.old.json")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror or error}.") from error
