"""What a comparison concluded: plain data, JSON. `verdict.json` in its folder is exactly a `Verdict`.

It stands apart from the code that judges, so that the report reads it without loading that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from headstart.records import Record

Call = Literal["baseline", "helps", "no evidence", "hurts"]


class Range(Record):
    """A mean with its 95 % interval, as shares: 0.05 is five points."""

    mean: float
    lo: float
    hi: float


class Marks(Record):
    """Means over the seeds on the test split."""

    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float | None = None


class Row(Record):
    """One method."""

    method: str = Field(description="as it was asked for: 'l2-sp', or 'l2-sp:paper'")
    seeds: list[int] = Field(description="the seeds that finished")
    accuracy: Range | None = Field(
        None,
        description="on the test split, mean over the seeds; with one seed Wilson's interval of that model",
    )
    accuracy_over_seeds: Range | None = Field(None, description="Student's interval over the seeds' means")
    observed: float | None = Field(None, description="accuracy minus the baseline's, in shared seeds")
    difference: Range | None = Field(None, description="the same with its interval; None with one seed")
    difference_over_seeds: Range | None = Field(
        None, description="corrected resampled t over the splits; Student's where all seeds share one split"
    )
    p_over_seeds: float | None = Field(None, description="of that test")
    p_mcnemar: float | None = Field(
        None, description="exact McNemar against the baseline; only where there is one seed"
    )
    better: float | None = Field(None, description="probability of being better than the baseline")
    call: Call | None = Field(None, description="against the baseline; None where that can't be said")
    marks: Marks | None = None
    val_accuracy: float | None = Field(None, description="on the validation split, mean over the seeds")
    seconds: float | None = Field(None, description="of one run, mean over the seeds")
    peak_memory_mb: float | None = Field(None, description="largest over the seeds")
    ms_per_image: float | None = Field(None, description="of scoring, median over the seeds")
    trained: int | None = None
    shipped: int | None = None
    flops: int | None = Field(None, description="of what is shipped, for one picture")
    learnt_from: int | None = Field(None, description="training pictures, median over the seeds")
    front: bool = Field(False, description="no other method is more accurate in less time")
    failed: int = Field(0, description="runs that failed")
    skipped: int = Field(0, description="runs that this network cannot do")
    reason: str | None = Field(None, description="why the first of these failed, or was skipped")
    unfit: str | None = Field(None, description="why the first was skipped")


class Scored(Record):
    """One run on the test split."""

    method: str
    seed: int
    split: int = Field(description="seed of the split")
    run: str = Field(description="name of the run's folder, which lies under runs/")
    accuracy: Range = Field(description="with Wilson's interval: over pictures only")


class Choice(Record):
    """What to take."""

    method: str
    run: str = Field(description="name of the run's folder, which lies under runs/")
    seed: int
    why: str


class Luck(Record):
    """What choosing among methods on validation does to the leader's validation accuracy (BBC-CV).

    The choice among the trials of a search is not in it: both numbers are a little high where there was one.
    """

    method: str | None = Field(None, description="the leader on validation; None in files of older versions")
    naive: float = Field(description="as it looks on the pictures that chose it")
    corrected: Range = Field(description="as it is to be expected on fresh ones")
    candidates: int


class Failure(Record):
    """A run that failed; it is tried again by the same call."""

    method: str
    seed: int
    reason: str
    folder: str | None = None


class Verdict(Record):
    """The outcome of a comparison; `verdict.json` holds it."""

    format: int = 2
    sentence: str
    caution: str | None = Field(None, description="what to know before believing any number; first of all")
    take: Choice | None = None
    baseline: str | None = Field(None, description="what `difference` and `call` are against")
    rows: list[Row]
    runs: list[Scored] = Field(default_factory=list)
    failed: list[Failure] = Field(default_factory=list)
    pending: int = Field(0, description="runs that are still to come; above 0: the sentence may change")
    n_test: list[int] = Field(default_factory=list, description="test pictures, seed by seed")
    n_val: list[int] = Field(default_factory=list)
    distinct_test: int = Field(0, description="different test pictures over all seeds")
    smallest_difference: float | None = Field(
        None, description="median half width of the paired intervals: less than this could not be seen"
    )
    luck: Luck | None = None
    intervals: str = ""
    notes: list[str] = Field(default_factory=list)


def read(folder: Path) -> Verdict:
    """Read a comparison's verdict.json."""
    return Verdict.model_validate_json((folder / "verdict.json").read_text(encoding="utf-8"))
