"""Predictions as rows: a table for people, CSV or JSON lines for programs, a file that is gone on with."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from headstart.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from headstart.ship.predict import Prediction

FORMATS = ("table", "csv", "jsonl")


def best(row: Prediction, top: int) -> list[tuple[str, float]]:
    """The most probable labels of a picture."""
    return list(row.probabilities.items())[:top]


def table(rows: Iterable[Prediction], top: int) -> None:
    """A row per picture, as wide as the paths need; all are known before the first is printed."""
    every = [(row.path, row.error, row.unsure, best(row, top)) for row in rows]
    width = max((len(path) for path, *_ in every), default=0)
    wide = max((len(label) for *_, said in every for label, _ in said), default=0)
    for path, error, unsure, said in every:
        if error is not None:
            print(f"{path:<{width}}  cannot be read: {error}")
        else:
            shown = "  ".join(f"{label:<{wide}} {share:.3f}" for label, share in said)
            print(f"{path:<{width}}  {shown}{'  unsure' if unsure else ''}")


class Csv:
    """Rows as CSV: path, label, probability, the next labels, unsure, error, which model said it.

    Args:
        file: to write to.
        top: labels per picture.
        model: fingerprint of the model.
        more: names of further columns.
        header: whether the names of the columns come first.
    """

    def __init__(
        self, file: IO[str], top: int, model: str, more: Iterable[str] = (), *, header: bool = True
    ) -> None:
        self._file, self._top, self._model, self._more = file, top, model, tuple(more)
        self._writer = csv.writer(file, lineterminator="\n")
        if header:
            self._writer.writerow(self.columns(top, self._more))

    @staticmethod
    def columns(top: int, more: Iterable[str] = ()) -> list[str]:
        """The names of the columns."""
        next_ = [f"{what}_{k}" for k in range(2, top + 1) for what in ("label", "probability")]
        return ["path", "label", "probability", *next_, "unsure", "error", *more, "model"]

    def write(self, row: Prediction, more: Mapping[str, Any] | None = None) -> None:
        """One picture, on the disk or in the pipe when this returns."""
        said: list[Any] = [
            value for label, share in best(row, self._top) for value in (label, f"{share:.6f}")
        ]
        said += [""] * (2 * self._top - len(said))
        rest = [(more or {}).get(name, "") for name in self._more]
        unsure = "" if row.error is not None else str(row.unsure).lower()
        self._writer.writerow([row.path, *said, unsure, row.error or "", *rest, self._model])
        self._file.flush()


class JsonLines:
    """Rows as one JSON object per line.

    Args:
        file: to write to.
        top: labels per picture.
        model: fingerprint of the model.
    """

    def __init__(self, file: IO[str], top: int, model: str) -> None:
        self._file, self._top, self._model = file, top, model

    def write(self, row: Prediction, more: Mapping[str, Any] | None = None) -> None:
        """One picture, on the disk or in the pipe when this returns."""
        record = row.as_dict() | {"probabilities": dict(best(row, self._top))} | dict(more or {})
        text = json.dumps(record | {"model": self._model}, ensure_ascii=False)
        # Paths that are no UTF-8 hold lone surrogates; with a backslash these are JSON's own escapes.
        self._file.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
        self._file.flush()


def opened(
    path: Path, format: str, columns: list[str], model: str, *, resume: bool
) -> tuple[IO[str], set[str]]:
    """A file of rows to go on writing to, and the paths of the pictures that it has.

    A last line that was cut off is taken away: its picture comes again.

    Args:
        path: of the file; it need not be there.
        format: 'csv' or 'jsonl'.
        columns: of the CSV.
        model: fingerprint of the model; rows of another one are not mixed in.
        resume: whether to go on with what is there; else it is replaced.

    Raises:
        OutputError: it cannot be read or written.
        ConfigError: its rows are of another form, or of another model.
    """
    done: set[str] = set()
    try:
        if resume and path.is_file():
            with path.open("r+b") as file:
                content = file.read()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    file.truncate(whole)
            text = content[:whole].decode("utf-8", "surrogateescape")
            done = set(_paths(path, text, format, columns, model))
        return path.open("a" if resume else "w", encoding="utf-8", errors="surrogateescape", newline=""), done
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _paths(path: Path, text: str, format: str, columns: list[str], model: str) -> Iterator[str]:
    try:
        if format == "csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            if text and reader.fieldnames != columns:
                raise ConfigError(
                    f"{path} has other columns ({', '.join(reader.fieldnames or [])}). "
                    "Give the same --top, or start over with --overwrite."
                )
            rows: Iterable[dict[str, Any]] = reader
        else:
            rows = (json.loads(line) for line in text.splitlines())
        for row in rows:
            if row["model"] != model:
                raise ConfigError(
                    f"{path} has rows of another model ({row['model']}; this one is {model}). Give another "
                    "--out, or start over with --overwrite."
                )
            yield os.fspath(row["path"])
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(
            f"{path} holds no rows of headstart predict. Give another --out, or replace it with --overwrite."
        ) from error
