"""A run's folder: whose it is, what lies in it, and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headstart.errors import OutputError
from headstart.records import Result


def claim(
    folder: Path, key: str, asked: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Result | None:
    """Make a folder this run's own; the result that lies there, if the run is finished already.

    Args:
        folder: need not exist.
        key: the run's hash; a folder with another one in it is another run's.
        asked: the run as plain data, for `run.json`.
        resume: an unfinished run of this key may lie there; it is gone on with.
        overwrite: whatever run lies there makes room.

    Raises:
        OutputError: something else lies there, or it cannot be written to.
    """
    note = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"{folder} cannot be used for the run: {error.strerror or error}.") from error
    # A kill or a full disk in the first moment leaves these without a run.json beside them.
    begun = (".run.json.", "error.txt")
    if "run.json" not in holds and not all(name.startswith(begun) for name in holds):
        raise OutputError(
            f"{folder} holds something else ({', '.join(sorted(holds)[:3])}). "
            "Give an empty or new folder with --out."
        )
    if "run.json" in holds:
        there = read_json(note).get("key")
        if there == key:
            finished = read_result(folder)
            if finished is not None and finished.status == "finished":
                return finished
            if not resume and not overwrite:
                raise OutputError(
                    f"{folder} holds this run, unfinished. Go on with --resume, or start over with "
                    "--overwrite."
                )
        elif not overwrite:
            raise OutputError(
                f"{folder} holds another run ({there}; this one is {key}). "
                "Give another --out, or replace it with --overwrite."
            )
        if overwrite and (there != key or not resume):
            for name in ("last.pt", "metrics.jsonl", "result.json", "predictions.npz", "run.json"):
                (folder / name).unlink(missing_ok=True)
            # Left there, it would be taken for the new run's as long as that has no result.
            shutil.rmtree(folder / "model", ignore_errors=True)
    if not note.exists():
        write_json(note, {"key": key, "run": asked})
    return None


def read_result(folder: Path) -> Result | None:
    """The `result.json` of a run's folder; None where there is none that can be read."""
    try:
        return Result.read(folder / "result.json")
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all."""
    # Paths that are no UTF-8 hold lone surrogates; spelled with a backslash these are JSON's own escapes.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole(path) as fresh:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, whole or not at all."""
    with whole(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when all is written, or never."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield fresh
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        fresh.unlink(missing_ok=True)
