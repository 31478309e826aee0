"""`headstart check`: look a set of pictures over before training on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.asked import asked
from headstart.cli.options import Json, run_options
from headstart.disk import write_json
from headstart.errors import DataError, OutputError
from headstart.records import Run

if TYPE_CHECKING:
    from headstart.data.audit import Audit


@run_options("Data", without=("strict", "class_weights", "augment"))
def run(
    flags: dict[str, Any],
    data: Annotated[
        Path, typer.Argument(help="A folder of class folders, or a CSV file.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File for the findings (default: NAME.audit.json in this folder).",
            metavar="FILE",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split that is tried.")] = 0,
    json: Json = False,
    sets: list[str] | None = None,
    config: Path | None = None,
) -> int:
    """Look a set of pictures over: counts, balance, unreadable files, copies, classes too small to split.

    Ends with 1 where the pictures cannot be trained on as they are. Nothing in DATA is changed.

    Example: headstart check photos/
    """
    asked_for = Run.asked(**(asked(config=config, flags=flags, sets=sets) | {"data": str(data)}))

    from headstart.cli.progress import counting
    from headstart.data.audit import audit
    from headstart.data.facts import inspect
    from headstart.data.folder import SPLITS, scan
    from headstart.data.splits import split

    table = scan(
        asked_for.data,
        image_col=asked_for.image_col,
        label_col=asked_for.label_col,
        split_col=asked_for.split_col,
        group_col=asked_for.group_col,
    )
    target = out if out is not None else Path(f"{data.resolve().stem}.audit.json")
    _free(target)
    with counting("looking at pictures") as progress:
        facts = inspect(table.root, table.paths, progress=progress)
    found = audit(table, facts)
    sides, problem, notes = None, None, []
    try:
        split_seed = seed if asked_for.split_seed is None else asked_for.split_seed
        made = split(table, facts.hashes, shares=asked_for.split, seed=split_seed, near=facts.near)
        sides = {side: len(made.index(side)) for side in SPLITS}
        notes = [note for note in made.notes if note not in found.notes]
    except DataError as error:
        problem = str(error)
    record = found.model_dump(mode="json") | {"split": sides, "problem": problem}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from None
    write_json(target, record)
    if json:
        outcome.show_json(record)
    else:
        _show(found, sides, notes, target)
    if problem is not None:
        outcome.say(problem)
        return outcome.MISTAKE
    return outcome.GOOD


def _show(found: Audit, sides: dict[str, int] | None, notes: list[str], target: Path) -> None:
    for line in found.lines():
        print(line)
    width = max(map(len, found.classes))
    most = max(1, *found.classes.values())
    for name, count in list(found.classes.items())[:_SHOWN]:
        print(f"  {name:<{width}}  {count:>6}  {'▇' * round(24 * count / most)}")
    if len(found.classes) > _SHOWN:
        print(f"  and {len(found.classes) - _SHOWN} more classes")
    for note in notes:
        print(note)
    if sides is not None:
        print("A run would use: " + ", ".join(f"{count} {side}" for side, count in sides.items()) + ".")
    print(f"All findings: {target}")


_SHOWN = 30


def _free(target: Path) -> None:
    """Refuse to write over anything but an older audit."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder. Give a file with --out, such as --out {target}/audit.json.")
    if target.exists() and '"near_duplicates"' not in target.read_text(encoding="utf-8", errors="replace"):
        raise OutputError(f"{target} holds something else. Give another file with --out.")
