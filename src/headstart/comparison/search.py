"""An equal chance for every method: so many trials, or so many seconds, to find its hyper-parameters.

Each method has a study of its own for each split and number of labels, so that no test picture of a split
has a part in what is tested on it. The first trial of a study is the method as it is; the second is the
method with all parts turned off that can be, so that it can lose to plain fine-tuning only by noise; the
others are Optuna's (TPE). Learning rate and weight decay are searched alike for all methods: between a tenth
and ten times the recipe's. Whatever was asked for by hand stays as it is.

Trials are scored on the validation split: accuracy, and log-loss where that is equal. The best is taken, the
earliest of equals. One that does worse than the median of the earlier ones, a third of its epochs into it, is
stopped (Optuna's MedianPruner); it counts as a trial all the same.

A budget in seconds is what trials took by the clock, failed ones too. A trial begins where it will most
likely end within the budget, taking as long as those before it did on average; the first begins in any case.
What has begun is let run to its end. After three failures in a row a search is given up: with so little
known of what would work, the next would fail as well, and none of them is worth its time.

What a study proposes depends on its own finished trials and on nothing else. So one that was killed goes on
to the same trials; these lie in Optuna's journal, `study/journal.log`, which its dashboard can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from headstart.errors import ConfigError, OutputError
from headstart.parts.space import NOTHING, Among, Between, Space
from headstart.records import Recipe, Record, Result, Run

if TYPE_CHECKING:
    import optuna

OBJECTIVE = "accuracy on val; where that is equal, log-loss"
FACTORS = {"lr": Between(0.1, 10.0, log=True), "weight_decay": Between(0.1, 10.0, log=True)}  # × the recipe's
NEVER_PRUNED = 2  # the default, and the method turned off
RANDOM_UNTIL = 5  # trials before TPE has seen enough to propose any
MOST = 1000  # trials of a study that only a time budget ends
FAILURES = 3  # trials in a row that fail before a search is given up

State = Literal["finished", "pruned", "failed"]
Kind = Literal["default", "off", "sampled"]


def objective(accuracy: float, log_loss: float) -> float:
    """What is maximised: accuracy, and among equals the lower log-loss, which moves less than one picture."""
    return accuracy - min(log_loss, 1e3) * 1e-9


@dataclass(frozen=True)
class Axis:
    """What may be varied of a method, and where it stands when nobody varies it."""

    space: Space
    default: Any
    factor_of: float | None = None  # the space holds factors of this


def axes(
    run: Run, recipe: Recipe, *, takes_steps: bool, hyper: Mapping[str, tuple[Any, Space | None]]
) -> dict[str, Axis]:
    """What a search varies of a run: the shared axes, and the spaces that its method declares.

    Args:
        run: what was asked for; whatever was given by hand is no axis.
        recipe: as it was settled for this run.
        takes_steps: whether the method has any use for a rate.
        hyper: of each hyper-parameter, the settled value and its space.
    """
    found: dict[str, Axis] = {}
    for name, space in FACTORS.items():
        value = getattr(recipe, name)
        if takes_steps and getattr(run, name) is None and value > 0:
            found[name] = Axis(space, value, factor_of=value)
    for name, (value, own) in hyper.items():
        if own is not None and name not in run.hyper:
            found[name] = Axis(own, value)
    return found


@dataclass(frozen=True)
class Proposal:
    """A trial to come."""

    number: int
    kind: Kind
    values: dict[str, Any]  # by axis; what is not named stays as it is

    def of(self, run: Run) -> Run:
        """The run to do."""
        return apply(run, self.values).model_copy(update={"trial": True})


def apply(run: Run, values: Mapping[str, Any]) -> Run:
    """A run with the values of a search in it."""
    shared = {name: values[name] for name in FACTORS if name in values}
    own = {name: value for name, value in values.items() if name not in FACTORS}
    return Run(**{**run.model_dump(exclude_unset=True), **shared, "hyper": {**run.hyper, **own}})


class Trial(Record):
    """A trial that is over."""

    number: int
    kind: Kind
    state: State
    values: dict[str, Any]
    val_accuracy: float | None = None
    val_log_loss: float | None = None
    value: float | None = None
    seconds: float = 0.0
    epochs: int = 0
    run: str | None = None  # its folder's name
    reason: str | None = None
    steps: list[float] = Field(default_factory=list, description="the objective after each epoch")

    @classmethod
    def of(cls, proposal: Proposal, result: Result, **more: Any) -> Trial:
        """What came out of a proposal.

        Args:
            proposal: what was tried.
            result: of its run: finished, pruned or failed.
            more: `run` and `steps`.
        """
        scored = result.status == "finished" and result.val is not None
        return cls(
            number=proposal.number,
            kind=proposal.kind,
            values=proposal.values,
            state="finished" if scored else "pruned" if result.status == "pruned" else "failed",
            val_accuracy=result.val.accuracy if scored and result.val else None,
            val_log_loss=result.val.log_loss if scored and result.val else None,
            value=objective(result.val.accuracy, result.val.log_loss) if scored and result.val else None,
            seconds=result.seconds,
            epochs=result.epochs,
            reason=result.reason,
            **more,
        )


@dataclass(frozen=True)
class Watch:
    """When a trial is worse than those before it; plain data, so that it can travel with the run."""

    earlier: tuple[tuple[float, ...], ...]  # the objective after each epoch, of each that ran to its end
    epochs: int

    def stops_at(self, steps: Sequence[float]) -> int | None:
        """The first epoch (from 1) after which a trial with these values is stopped; None: not yet.

        Args:
            steps: the objective after each epoch so far.
        """
        if len(self.earlier) < NEVER_PRUNED:
            return None
        optuna = _optuna()
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=NEVER_PRUNED, n_warmup_steps=max(1, self.epochs // 3)
        )
        study = optuna.create_study(direction="maximize", pruner=pruner)
        for each in self.earlier:
            study.add_trial(
                optuna.trial.create_trial(
                    value=each[-1] if each else 0.0, intermediate_values=dict(enumerate(each))
                )
            )
        trial = study.ask()
        for epoch, value in enumerate(steps, 1):
            trial.report(value, epoch - 1)
            if epoch < self.epochs and trial.should_prune():
                return epoch
        return None


class Study:
    """The trials of one method on one split."""

    def __init__(
        self,
        label: str,
        base: Run,
        axes: Mapping[str, Axis],
        *,
        name: str,
        journal: Journal | None,
        trials: int | None,
        seconds: float | None,
    ) -> None:
        self.label, self.base, self.axes = label, base, dict(axes)
        self.name, self.journal = name, journal
        self.most, self.budget = trials, seconds
        self.over: list[Trial] = [] if journal is None else journal.read(name)

    @property
    def seconds(self) -> float:
        """What its trials took, all together."""
        return sum(trial.seconds for trial in self.over)

    @property
    def too_small(self) -> bool:
        """Whether the budget was used up by the first trial alone."""
        return self.budget is not None and len(self.over) == 1 and self.most != 1 and not self._may_go_on()

    @property
    def given_up(self) -> bool:
        """Whether its last trials failed, one after the other."""
        last = self.over[-FAILURES:]
        return len(last) == FAILURES and all(trial.state == "failed" for trial in last)

    def next(self) -> Proposal | None:
        """What to try now; None: it is enough."""
        number = len(self.over)
        if not self.axes or not self._may_go_on():
            return None
        if number == 0:
            return Proposal(0, "default", {})
        off = {
            name: axis.space.off
            for name, axis in self.axes.items()
            if axis.space.off is not NOTHING and axis.space.off != axis.default
        }
        if number == 1 and off:
            return Proposal(1, "off", off)
        return Proposal(number, "sampled", self._sample(number))

    def tell(self, trial: Trial) -> None:
        """A trial is over."""
        self.over.append(trial)
        if self.journal is not None:
            self.journal.add(self.name, trial, self._expressed(trial), self._distributions())

    def watch(self) -> Watch:
        """What stops the next trial early."""
        full = tuple(tuple(each.steps) for each in self.over if each.state == "finished")
        return Watch(full, self.base.epochs)

    @property
    def chosen(self) -> Trial | None:
        """The best trial, the earliest of equals; None where none was scored."""
        scored = [trial for trial in self.over if trial.state == "finished" and trial.value is not None]
        return max(scored, key=lambda trial: (trial.value, -trial.number), default=None)

    def plain(self) -> dict[str, Any]:
        """This study as data that JSON holds."""
        best = self.chosen
        return {
            "method": self.label,
            "split": self.base.seed if self.base.split_seed is None else self.base.split_seed,
            "train_size": self.base.train_size,
            "seconds": round(self.seconds, 2),
            "chosen": None if best is None else best.number,
            "given_up": self.given_up,
            "axes": {
                name: axis.space.plain() | ({} if axis.factor_of is None else {"times": axis.factor_of})
                for name, axis in self.axes.items()
            },
            "trials": [trial.model_dump(mode="json", exclude={"steps"}) for trial in self.over],
        }

    # ------------------------------------------------------------------ what Optuna is told and asked

    def _may_go_on(self) -> bool:
        if len(self.over) >= (self.most or MOST) or self.given_up:
            return False
        if self.budget is None or not self.over:
            return True
        return self.seconds + self.seconds / len(self.over) <= self.budget

    def _sample(self, number: int) -> dict[str, Any]:
        optuna = _optuna()
        digest = hashlib.sha256(f"{self.name} {number}".encode()).digest()
        sampler = optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], "little"), n_startup_trials=RANDOM_UNTIL
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = self._distributions()
        for trial in self.over:
            params = self._expressed(trial)
            if params is not None and trial.state != "failed":
                study.add_trial(_frozen(trial, params, distributions))
        asked = study.ask(distributions).params
        return {name: self._value(name, value) for name, value in asked.items()}

    def _distributions(self) -> dict[str, Any]:
        optuna = _optuna()
        made: dict[str, Any] = {}
        for name, axis in self.axes.items():
            if isinstance(axis.space, Between):
                space = axis.space
                made[name] = optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)
            else:
                made[name] = optuna.distributions.CategoricalDistribution(_choices(axis))
        return made

    def _value(self, name: str, sampled: Any) -> Any:
        axis = self.axes[name]
        if not isinstance(axis.space, Between):
            return sampled
        # Four digits: nobody can tell more apart, and people read them.
        return float(f"{sampled * (axis.factor_of or 1.0):.4g}")

    def _expressed(self, trial: Trial) -> dict[str, Any] | None:
        """Where a trial lies in the space; None where it lies outside, such as a default that is None."""
        found = {}
        for name, axis in self.axes.items():
            value = trial.values.get(name, axis.default)
            if not isinstance(axis.space, Between):
                found[name] = value
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                return None
            share = value / (axis.factor_of or 1.0)
            # `off` is where a log scale never gets to: its lower end is next to it.
            found[name] = min(max(share, axis.space.low), axis.space.high)
        return found


def _choices(axis: Axis) -> list[Any]:
    """The values, with the default and `off` among them."""
    space = axis.space
    assert isinstance(space, Among)
    more = [axis.default, *(() if space.off is NOTHING else (space.off,))]
    return list(dict.fromkeys([*space.values, *more]))


def _frozen(trial: Trial, params: Mapping[str, Any], distributions: Mapping[str, Any]) -> Any:
    optuna = _optuna()
    state = optuna.trial.TrialState
    finished = trial.state == "finished"
    return optuna.trial.create_trial(
        state={"finished": state.COMPLETE, "pruned": state.PRUNED, "failed": state.FAIL}[trial.state],
        value=trial.value if finished else None,
        params=dict(params),
        distributions=dict(distributions),
        intermediate_values=dict(enumerate(trial.steps)),
    )


def _optuna() -> Any:
    """Optuna, told to say nothing: what happens is said by the comparison."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# ---------------------------------------------------------------------- the journal


@dataclass
class Journal:
    """Optuna's journal of all studies of a comparison: one file, to which lines are added."""

    path: Path
    _storage: Any = None
    _studies: dict[str, optuna.Study] = field(default_factory=dict)

    def read(self, name: str) -> list[Trial]:
        """The trials of a study that are over, in order."""
        try:
            told = [trial.user_attrs["trial"] for trial in self._study(name).get_trials(deepcopy=False)]
            return sorted((Trial.model_validate(each) for each in told), key=lambda trial: trial.number)
        except (KeyError, ValueError) as error:
            raise OutputError(
                f"{self.path} cannot be read ({error}). Delete it to search anew, or give another --out."
            ) from error

    def add(
        self,
        name: str,
        trial: Trial,
        params: Mapping[str, Any] | None,
        distributions: Mapping[str, Any],
    ) -> None:
        """Write down a trial that is over.

        Args:
            name: of the study.
            trial: what came out.
            params: where it lies in the space; None: outside.
            distributions: the space.

        Raises:
            OutputError: it could not be written.
        """
        frozen = _frozen(trial, params or {}, distributions if params else {})
        frozen.set_user_attr("trial", trial.model_dump(mode="json"))
        frozen.datetime_complete = frozen.datetime_complete or datetime.now()
        try:
            self._study(name).add_trial(frozen)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from error

    def forget(self) -> None:
        """Begin anew."""
        for path in self.path.parent.glob(f"{self.path.name}*"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def _study(self, name: str) -> Any:
        if name not in self._studies:
            self._studies[name] = _optuna().create_study(
                storage=self._open(), study_name=name, direction="maximize", load_if_exists=True
            )
        return self._studies[name]

    def _open(self) -> Any:
        if self._storage is None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _mend(self.path)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    lock = JournalFileOpenLock(str(self.path))
                    self._storage = JournalStorage(JournalFileBackend(str(self.path), lock_obj=lock))
            except OSError as error:
                raise OutputError(f"{self.path} could not be opened: {error.strerror or error}.") from error
        return self._storage


def _mend(path: Path) -> None:
    """What a kill left behind: a lock that nobody holds (we are alone in the folder), half a last line."""
    for stale in path.parent.glob(f"{path.name}.lock*"):
        with contextlib.suppress(FileNotFoundError):
            stale.unlink()
    if not path.exists():
        return
    kept = bytearray()
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        kept += line
    if len(kept) < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(len(kept))


# ---------------------------------------------------------------------- what was asked for


def budget(given: str | float | None) -> float | None:
    """Seconds out of 90, '90', '90s', '5m', '2h' or '1h30m'.

    Raises:
        ConfigError: it is none of these.
    """
    if given is None:
        return None
    wrong = f"budget is a time such as 90s, 5m, 2h or 1h30m, above 0. Got {given!r}."
    seconds = 0.0
    if isinstance(given, int | float) and not isinstance(given, bool):
        seconds = float(given)
    elif isinstance(given, str):
        parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", given.strip().lower())
        try:
            seconds = sum(
                float(number) * unit
                for number, unit in zip(parts.groups() if parts else (), (3600, 60, 1), strict=False)
                if number
            )
        except ValueError:
            raise ConfigError(wrong) from None
    if not 0 < seconds < float("inf"):
        raise ConfigError(wrong)
    return seconds
