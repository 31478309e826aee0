"""`headstart report`: a comparison as one HTML file, or several comparisons against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.options import Json
from headstart.errors import ConfigError

if TYPE_CHECKING:
    from headstart.comparison.significance import OverSets


def run(
    folders: Annotated[
        list[Path], typer.Argument(help="What compare's --out named; several for a test over data sets.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Where the page goes (default: report.html in the folder)."
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Write a comparison as one HTML file: verdict, table, figures, errors, and what was done.

    It is built from files alone and opens offline: it loads nothing and sends nothing. With several folders,
    one per data set, each gets its page, and the methods are tested over the sets (Wilcoxon, Holm).

    Example: headstart report compared
    """
    if out is not None and len(folders) > 1:
        raise ConfigError("--out names one page, and several folders were given. Leave it out.")
    from headstart.report import write

    pages = [write(folder, out) for folder in folders]
    rows = over(folders) if len(folders) > 1 else []
    if json:
        outcome.show_json(
            {"pages": [str(page) for page in pages], "over_sets": [row._asdict() for row in rows]}
        )
        return outcome.GOOD
    for page in pages:
        print(f"Report:    {page}")
    if rows:
        _show(rows, len(folders))
    return outcome.GOOD


def over(folders: list[Path]) -> list[OverSets]:
    """Every method against the baseline over several comparisons, one per data set.

    Raises:
        ConfigError: the comparisons share no baseline.
    """
    from headstart import judgement
    from headstart.comparison.significance import over_sets

    accuracies: dict[str, dict[str, float]] = {}
    baselines: list[Any] = []
    for place, folder in enumerate(folders):
        verdict = judgement.read(folder)
        baselines.append(verdict.baseline)
        for row in verdict.rows:
            if row.accuracy is not None:  # by place: two folders of one name are two sets
                accuracies.setdefault(row.method, {})[f"{place} {folder}"] = row.accuracy.mean
    if len(set(baselines)) != 1 or baselines[0] not in accuracies:
        names = ", ".join(str(name) for name in dict.fromkeys(baselines))
        raise ConfigError(
            f"The comparisons have different baselines ({names}). Give them the same --baseline."
        )
    return over_sets(accuracies, baselines[0])


def _show(rows: list[OverSets], sets: int) -> None:
    width = max([len("method"), *(len(row.method) for row in rows)])
    print(f"\nOver {sets} data sets, against the baseline (Wilcoxon's signed ranks; p corrected after Holm):")
    print(f"{'method':<{width}}  {'sets':>4}  {'mean':>6}  {'wins':>4}  {'p':>6}  {'Holm':>6}")
    for row in rows:
        print(
            f"{row.method:<{width}}  {row.sets:>4}  {100 * row.mean:>+6.1f}  {row.wins:>4}  {row.p:>6.3f}  "
            f"{row.p_holm:>6.3f}"
        )
    if sets < 6:
        print("Fewer than six data sets can never reach p < 0.05 in this test.")
