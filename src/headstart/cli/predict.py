"""`headstart predict`: label pictures with a trained model."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.errors import ConfigError, unknown

if TYPE_CHECKING:
    from headstart.ship.predict import Prediction

FORMATS = ("table", "csv", "jsonl")


def run(
    model: Annotated[
        Path, typer.Argument(help="The folder of a run, of a comparison, or of a model.", show_default=False)
    ],
    paths: Annotated[
        list[Path], typer.Argument(help="Pictures and folders of pictures.", show_default=False)
    ],
    format: Annotated[  # the flag is called that
        str, typer.Option("--format", metavar="|".join(FORMATS), autocompletion=lambda: list(FORMATS))
    ] = "table",
    top: Annotated[int, typer.Option(min=1, metavar="K", help="The K most probable labels.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, mps")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
) -> int:
    """Label pictures with a trained model. A picture that cannot be read is a row that says why.

    Ends with 1 only where no picture at all could be read.

    Example: headstart predict runs/first photo.jpg more-photos/ --format csv
    """
    if format not in FORMATS:
        raise ConfigError(unknown("format", format, FORMATS))

    from headstart.ship.predict import load

    predictor = load(model, device=device)
    seen = _Seen(predictor.stream(paths, batch_size=batch_size))
    top = min(top, len(predictor.classes))
    {"table": _table, "csv": _csv, "jsonl": _jsonl}[format](seen, top)
    if seen.broken:
        outcome.say(f"{seen.broken} of {seen.all} could not be read.")
    return outcome.GOOD if seen.all > seen.broken else outcome.MISTAKE


class _Seen:
    """Predictions as they come, counted."""

    def __init__(self, rows: Iterable[Prediction]) -> None:
        self._rows = rows
        self.all = self.broken = 0

    def __iter__(self) -> Iterator[Prediction]:
        for row in self._rows:
            self.all += 1
            self.broken += row.error is not None
            yield row


def _best(row: Prediction, top: int) -> list[tuple[str, float]]:
    return list(row.probabilities.items())[:top]


def _table(rows: Iterable[Prediction], top: int) -> None:
    """A row per picture, as wide as the paths need; all are known before the first is printed."""
    every = list(rows)
    width = max((len(row.path) for row in every), default=0)
    wide = max((len(label) for row in every for label, _ in _best(row, top)), default=0)
    for row in every:
        if row.error is not None:
            print(f"{row.path:<{width}}  cannot be read: {row.error}")
        else:
            said = "  ".join(f"{label:<{wide}} {share:.3f}" for label, share in _best(row, top))
            print(f"{row.path:<{width}}  {said}")


def _csv(rows: Iterable[Prediction], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    more = [f"{what}_{k}" for k in range(2, top + 1) for what in ("label", "probability")]
    writer.writerow(["path", "label", "probability", *more, "error"])
    for row in rows:
        said: list[Any] = [value for label, share in _best(row, top) for value in (label, f"{share:.6f}")]
        said += [""] * (2 * top - len(said))
        writer.writerow([row.path, *said, row.error or ""])
        sys.stdout.flush()


def _jsonl(rows: Iterable[Prediction], top: int) -> None:
    for row in rows:
        record = row.as_dict() | {"probabilities": dict(_best(row, top))}
        print(json.dumps(record, ensure_ascii=False), flush=True)
