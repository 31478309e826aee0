"""`headstart compare`: several methods, several seeds, one table and a verdict."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.asked import asked, check_hyper, write
from headstart.cli.options import Data, Json, Out, Track, run_options
from headstart.errors import ConfigError
from headstart.records import Run

if TYPE_CHECKING:
    from headstart.comparison.runner import Comparison
    from headstart.comparison.verdict import Range, Row

METHODS = "probe,full,lp-ft,l2-sp"
SEEDS = 3

# What a comparison takes beside the fields of a run; `compare` takes all of it under the same names.
_ASKED = (
    *("splits", "train_sizes", "trials", "budget", "learning_curve", "refit"),
    *("jobs", "on", "address", "track"),
)
_EXTRA = ("methods", "seeds", "baseline", *_ASKED)
_PER_RUN = {
    "method": "--methods",
    "preset": "--methods NAME:PRESET",
    "seed": "--seeds",
    "train_size": "--train-size, or train_sizes in a file",
    "trial": "--trials",
}


@run_options("Data", "Network", "Training", "Machine", without=("seed", "train_size"))
def run(
    flags: dict[str, Any],
    data: Data = None,
    out: Out = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help=f"Names, NAME:PRESET, NAME[KEY=VALUE,...], rooms, or 'all' (default: {METHODS}).",
            rich_help_panel="Method",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="K|A,B,...",
            help=f"How many, or which (default: {SEEDS}). A seed has a split of its own.",
            rich_help_panel="Method",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with (default: full, else the first).",
            rich_help_panel="Method",
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            metavar="K|A,B,...",
            help="How many splits, or which: every seed is run on each (not given: one per seed).",
            rich_help_panel="Method",
        ),
    ] = None,
    train_size: Annotated[
        str | None,
        typer.Option(
            metavar="N,...,all",
            help="Learn from so many training pictures, the smaller sets inside the larger.",
            rich_help_panel="Method",
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Search hyper-parameters: so many trials per method and split, scored on val alone.",
            rich_help_panel="Search",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Search for so long per method: 90s, 10m, 2h. With --trials, whichever ends first.",
            rich_help_panel="Search",
        ),
    ] = None,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve",
            help="Afterwards, the one to take on 25, 50 and 75 % of the labels: would more of them help?",
            rich_help_panel="Method",
        ),
    ] = False,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="At the end train the one to take on train and val, for the length learnt, and ship that.",
            rich_help_panel="Method",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Runs at once, each in a process of its own (not given: one per GPU).",
            rich_help_panel="Machine",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="ray", help="Do the runs on a Ray cluster.", rich_help_panel="Machine"),
    ] = None,
    track: Track = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Of the cluster (not given: this machine's).", rich_help_panel="Machine"
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train all runs anew, finished ones too.")
    ] = False,
    json: Json = False,
    sets: list[str] | None = None,
    config: Path | None = None,
) -> int:
    """Run several methods over several seeds on the same pictures, and say which to take.

    The same command again goes on where it was stopped; finished runs are never trained twice. Leaves in
    --out: verdict.json, results.csv, config.resolved.yaml and a folder per run under runs/.

    Hyper-parameters of one method: --set l2-sp.alpha=0.1, or the same method several times with its values
    in brackets: --methods "full,l2-sp[alpha=0.01],l2-sp[alpha=0.1]"

    Example: headstart compare photos/ --methods probe,full,lp-ft --seeds 3 --epochs 20 --out compared
    """
    given: dict[str, Any] = {
        "methods": methods,
        "seeds": seeds,
        "baseline": baseline,
        "splits": splits,
        "train_sizes": train_size,
        "trials": trials,
        "budget": budget,
        "learning_curve": learning_curve or None,
        "refit": refit or None,
        "jobs": jobs,
        "on": on,
        "address": address,
        "track": track,
    }
    flags |= {name: value for name, value in given.items() if value is not None}
    fields = asked(config=config, flags=flags, sets=sets, extra=_EXTRA, per_method=True)
    for name, instead in _PER_RUN.items():
        if name in fields:
            raise ConfigError(f"A comparison does not take '{name}'. Use {instead}.")
    if data is not None:
        fields["data"] = str(data)
    if "data" not in fields:
        raise ConfigError(
            "Which pictures? Give a folder of class folders or a CSV file: headstart compare DATA"
        )
    if out is None:
        raise ConfigError("Where should the comparison go? Give a new folder with --out.")
    shared = {name: value for name, value in fields.items() if name not in (*_EXTRA, "hyper")}
    Run.asked(**shared)  # before torch is loaded: what does not fit is said at once

    done = compared(fields, out, overwrite=overwrite)
    if json:
        outcome.show_json(done.judgement.model_dump(mode="json") | {"folder": str(out)})
    else:
        show(done)
        if done.judgement.take is not None:
            print(f"Look:      headstart report {out}")
            print(f"Next:      headstart predict {out} PICTURES")
    return outcome.SOME_FAILED if done.failed else outcome.GOOD


def compared(fields: Mapping[str, Any], out: Path, *, overwrite: bool = False) -> Comparison:
    """Run a comparison and write `config.resolved.yaml` beside it.

    Args:
        fields: fields of `Run`, and methods, seeds, baseline; `hyper` by method, or by its bare name for
            every method that has it.
        out: the comparison's folder.
        overwrite: train finished runs anew.
    """
    from headstart.cli.progress import reporter
    from headstart.comparison.runner import compare

    own = {name: value for name, value in fields.items() if name not in (*_EXTRA, "data", "hyper")}
    seeds = _numbers("seeds", fields.get("seeds", SEEDS))
    more = {name: fields[name] for name in _ASKED if fields.get(name) is not None}
    if "splits" in more:
        more["splits"] = _numbers("splits", more["splits"])
    if "train_sizes" in more:
        more["train_sizes"] = _sizes(more["train_sizes"])
    done = compare(
        fields["data"],
        fields.get("methods", METHODS),
        out=out,
        seeds=seeds,
        baseline=fields.get("baseline"),
        hyper=_by_method(fields.get("hyper", {}), fields),
        overwrite=overwrite,
        reporter=reporter(),
        command=shlex.join(["headstart", *outcome.typed.get()]),
        **more,
        **own,
    )
    settled: dict[str, dict[str, Any]] = {}
    for result, label in zip(done.results, done.labels, strict=True):
        recipe = {} if result.recipe is None else result.recipe.model_dump(mode="json")
        settled.setdefault(label, {"hyper": result.hyper, **recipe})
    write(out / "config.resolved.yaml", {**fields, **more, "seeds": seeds}, settled)
    return done


def _numbers(what: str, given: Any) -> int | list[int]:
    """3 -> 3 (so many), "0,4" -> [0, 4] (these), "4," -> [4] (this one)."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    words = given.rstrip(",").split(",") if isinstance(given, str) else given
    try:
        numbers = [int(word) for word in words]
    except (TypeError, ValueError):
        raise ConfigError(
            f"{what} takes a number (how many) or a list such as 0,1,2. Got {given!r}."
        ) from None
    return numbers[0] if isinstance(given, str) and "," not in given else numbers


def _sizes(given: Any) -> list[int | str]:
    """100 -> [100], "100,300,all" -> [100, 300, "all"]; what is no number is refused by the comparison."""
    words = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    texts = [str(word).strip() for word in words]
    return [int(text) if text.isdigit() else text for text in texts if text]


def _by_method(hyper: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method; one given without a method goes to all that have it."""
    from headstart import registry
    from headstart.comparison.grid import named, plan

    owned = {name: dict(value) for name, value in hyper.items() if isinstance(value, Mapping)}
    loose = {name: value for name, value in hyper.items() if not isinstance(value, Mapping)}
    if not loose:
        return owned
    labels = plan(
        fields["data"], fields.get("methods", METHODS), seeds=1, baseline=fields.get("baseline")
    ).labels
    methods = list(dict.fromkeys(named(label).method for label in labels))
    check_hyper({"hyper": loose}, methods)
    for method in methods:
        known = registry.get(method).hyper()
        mine = {name: value for name, value in loose.items() if name in known}
        if mine:
            owned[method] = mine | owned.get(method, {})
    return owned


def show(done: Comparison) -> None:
    """The table, what failed, the verdict, and where things lie."""
    verdict = done.judgement
    heads = [
        "method",
        "runs",
        "test accuracy, 95 %",
        f"against {verdict.baseline}, 95 %",
        "",
        "seconds",
        "peak MB",
        "trained",
        "shipped",
    ]
    rows = [
        [
            row.method,
            _runs(row),
            _percent(row.accuracy),
            _points(row.difference),
            row.call or "",
            _number(row.seconds, 1),
            _number(row.peak_memory_mb),
            _short(row.trained),
            _short(row.shipped),
        ]
        for row in verdict.rows
    ]
    _table(heads, rows)
    for failure in verdict.failed:
        print(f"{failure.method}, seed {failure.seed}: {failure.reason}")
    for row in verdict.rows:
        if row.unfit:
            print(f"{row.method}, skipped: {row.unfit}")
    for note in [verdict.caution, *verdict.notes]:
        if note:
            print(note)
    print(f"\nVerdict:   {verdict.sentence}")
    labels = done.curve and (done.curve["advice"] or done.curve["why"])
    if labels:
        print(f"Labels:    {labels}")
    print(f"Results:   {done.folder}  (verdict.json, results.csv, runs/)")


def _runs(row: Row) -> str:
    """6, or '4, 2 failed'."""
    others = {"failed": row.failed, "skipped": row.skipped}
    return ", ".join([str(len(row.seeds)), *(f"{count} {how}" for how, count in others.items() if count)])


def _percent(share: Range | None) -> str:
    return "" if share is None else f"{share.mean:.1%}  {share.lo:.1%} to {share.hi:.1%}"


def _points(share: Range | None) -> str:
    if share is None:
        return ""
    mean, lo, hi = (100 * value for value in (share.mean, share.lo, share.hi))
    return f"{mean:+.1f}  {lo:+.1f} to {hi:+.1f}"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _short(count: int | None) -> str:
    """3374851 -> 3.37 M."""
    if count is None:
        return ""
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with lines on a terminal, aligned text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i in _WORDS else "right", no_wrap=i == 0)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        cells = [
            f"{cell:<{width}}" if i in _WORDS else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


_WORDS = (0, 1, 4)  # columns of words; the others are numbers
