"""A run's folder: whose it is, and what lies in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headstart.disk import LOCK, alone, read_json, whole, write_json
from headstart.errors import OutputError
from headstart.records import Result


@contextlib.contextmanager
def claimed(
    folder: Path, key: str, asked: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[Result | None]:
    """Make a folder this run's own, and keep other processes out of it inside the block.

    Args:
        folder: need not exist.
        key: the run's hash; a folder with another one in it is another run's.
        asked: the run as plain data, for `run.json`.
        resume: an unfinished run of this key may lie there; it is gone on with.
        overwrite: whatever run lies there makes room.

    Yields:
        The result that lies there, if the run is finished already; it is only read then.

    Raises:
        OutputError: something else lies there, another process is at work, or it cannot be written to.
    """
    _refuse_what_is_no_run(folder)
    finished = _finished(folder, key)
    if finished is not None:
        yield finished
        return
    with alone(folder, "run"):
        # Once more: another process may have finished it, or begun another run, a moment ago.
        finished = _finished(folder, key)
        if finished is None:
            _take(folder, key, asked, resume=resume, overwrite=overwrite)
        yield finished


def _refuse_what_is_no_run(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise OutputError(f"{folder} cannot be used for the run: {error.strerror or error}.") from error
    # A kill or a full disk in the first moment leaves these without a run.json beside them.
    begun = (".run.json.", "error.txt", LOCK)
    if "run.json" not in holds and not all(name.startswith(begun) for name in holds):
        raise OutputError(
            f"{folder} holds something else ({', '.join(sorted(holds)[:3])}). "
            "Give an empty or new folder with --out."
        )


def _finished(folder: Path, key: str) -> Result | None:
    if read_json(folder / "run.json").get("key") != key:
        return None
    result = read_result(folder)
    return result if result is not None and result.status == "finished" else None


def _take(folder: Path, key: str, asked: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    note = folder / "run.json"
    if note.exists():
        there = read_json(note).get("key")
        if not overwrite and there == key and not resume:
            raise OutputError(
                f"{folder} holds this run, unfinished. Go on with --resume, or start over with --overwrite."
            )
        if not overwrite and there != key:
            raise OutputError(
                f"{folder} holds another run ({there}; this one is {key}). "
                "Give another --out, or replace it with --overwrite."
            )
        if overwrite and (there != key or not resume):
            for name in ("last.pt", "metrics.jsonl", "result.json", "predictions.npz", "run.json"):
                (folder / name).unlink(missing_ok=True)
            # Left there, it would be taken for the new run's as long as that has no result.
            shutil.rmtree(folder / "model", ignore_errors=True)
            shutil.rmtree(folder / "refit", ignore_errors=True)
    if not note.exists():
        write_json(note, {"key": key, "run": asked})


def read_result(folder: Path) -> Result | None:
    """The `result.json` of a run's folder; None where there is none that can be read."""
    try:
        return Result.read(folder / "result.json")
    except (OSError, ValueError):
        return None


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, whole or not at all."""
    with whole(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
