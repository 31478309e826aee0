"""`headstart predict`: label pictures with a trained model."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.answers import FORMATS, Csv, JsonLines, opened, table
from headstart.errors import ConfigError, OutputError, unknown

if TYPE_CHECKING:
    from headstart.ship.explain import Explainer
    from headstart.ship.predict import Prediction, Predictor

_EVERY = 10.0  # seconds between two lines that say how far it is


def run(
    model: Annotated[
        Path, typer.Argument(help="The folder of a run, of a comparison, or of a model.", show_default=False)
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures and folders of pictures; - reads their names from stdin.", show_default=False
        ),
    ],
    format: Annotated[  # the flag is called that
        str | None,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            autocompletion=lambda: list(FORMATS),
            help="Not given: by the ending of --out, else a table.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where the rows go, not to stdout.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what --out has already.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out has.")] = False,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="The K most probable labels.")] = 1,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each picture with what its label hangs on (Grad-CAM)."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="auto|onnx|torch", help="What runs the network; auto: onnx where it can.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, mps")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 32,
) -> int:
    """Label pictures with a trained model. A picture that cannot be read is a row that says why.

    Below the model's threshold an answer is marked `unsure`. With --out the work can be interrupted at any
    moment and gone on with by --resume. Ends with 1 only where no picture at all could be read.

    Example: headstart predict runs/first photo.jpg more-photos/ --out labels.csv
    """
    format = _format(format, out)
    if out is None and (resume or overwrite):
        raise ConfigError("--resume and --overwrite are about the rows in a file: give it with --out.")
    if out is not None and out.exists() and not (resume or overwrite):
        raise OutputError(f"{out} is there already. Go on with --resume, or replace it with --overwrite.")
    if explain is not None and engine == "onnx":
        raise ConfigError("Explanations take the gradients of torch: leave --engine out.")

    from headstart.ship.predict import load

    predictor = load(model, device=device, engine="torch" if explain is not None else engine)
    top = min(top, len(predictor.classes))
    explainer = None
    if explain is not None:
        from headstart.ship.explain import Explainer

        explainer = Explainer(predictor, explain)
    done: set[str] = set()
    with contextlib.ExitStack() as stack:
        more = ("explanation",) if explainer is not None else ()
        fingerprint = predictor.fingerprint
        file = sys.stdout
        if out is not None:
            rows, done = opened(out, format, Csv.columns(top, more), fingerprint, resume=resume)
            file = stack.enter_context(rows)
        seen = _Seen(predictor.stream(_given(paths), batch_size=batch_size, skip=done))
        if format == "table":
            table(_explained_all(seen, explainer), top)
        else:
            writer: Csv | JsonLines = (
                Csv(file, top, fingerprint, more, header=out is None or file.tell() == 0)
                if format == "csv"
                else JsonLines(file, top, fingerprint)
            )
            for row in seen:
                writer.write(row, _explained(row, explainer))
    _say(seen, len(done), out, predictor)
    return outcome.GOOD if done or seen.all > seen.broken else outcome.MISTAKE


def _format(asked: str | None, out: Path | None) -> str:
    if asked is not None and asked not in FORMATS:
        raise ConfigError(unknown("format", asked, FORMATS))
    if out is None:
        return asked or "table"
    if asked == "table":
        raise ConfigError("A table is for the terminal. For a file ask for --format csv or jsonl.")
    return asked or ("jsonl" if out.suffix.lower() in (".jsonl", ".ndjson", ".json") else "csv")


def _given(paths: Iterable[Path]) -> Iterator[Path]:
    """The paths as they were given; '-' stands for those that come in on stdin, one per line."""
    for path in paths:
        if str(path) != "-":
            yield path
            continue
        for line in sys.stdin:
            name = line.rstrip("\r\n")
            if name:
                yield Path(name)


class _Seen:
    """Predictions as they come, counted; now and then stderr hears how many."""

    def __init__(self, rows: Iterable[Prediction]) -> None:
        self._rows = rows
        self.all = self.broken = self.unsure = 0

    def __iter__(self) -> Iterator[Prediction]:
        started = said = time.monotonic()
        terminal = sys.stderr.isatty() and not sys.stdout.isatty()
        for row in self._rows:
            self.all += 1
            self.broken += row.error is not None
            self.unsure += row.unsure
            now = time.monotonic()
            if now - said >= (0.5 if terminal else _EVERY):
                said = now
                text = f"{self.all:,} pictures, {self.all / (now - started):.0f} a second"
                if terminal:
                    print(f"\r{text} ", end="", file=sys.stderr, flush=True)
                else:
                    outcome.say(text)
            yield row
        if terminal and said != started:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def _explained(row: Prediction, explainer: Explainer | None) -> dict[str, Any]:
    if explainer is None:
        return {}
    return {"explanation": str(explainer.write(row)) if row.error is None else ""}


def _explained_all(rows: Iterable[Prediction], explainer: Explainer | None) -> Iterator[Prediction]:
    for row in rows:
        _explained(row, explainer)
        yield row


def _say(seen: _Seen, done: int, out: Path | None, predictor: Predictor) -> None:
    if seen.broken:
        outcome.say(f"{seen.broken} of {seen.all} could not be read.")
    if out is not None:
        before = f", {done} were there before" if done else ""
        threshold = predictor.calibration.threshold
        why = "" if threshold is None else f" (below {threshold:.3f})"
        outcome.say(f"{seen.all} rows in {out}{before}; {seen.unsure} unsure{why if seen.unsure else ''}.")
