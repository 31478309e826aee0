"""Files that are whole or not there, folders that one process works in, and where the cache lies."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headstart.errors import OutputError

LOCK = ".lock"
"""Lies in a folder that `alone` was held in: an empty file, without meaning once its process has ended."""


def cache_dir() -> Path:
    """Where lies what can be made again: $HEADSTART_CACHE, else headstart in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("HEADSTART_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "headstart"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when all is written and on the disk, or never.

    Raises:
        OutputError: it cannot be written; what was there before is still there.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    # Paths that are no UTF-8 hold lone surrogates; spelled with a backslash these are JSON's own escapes.
    with (
        whole(path) as fresh,
        fresh.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep others out of a folder; the lock goes with the process, however it ends.

    Args:
        folder: has to be there.
        what: what is at work in it, for people: "run", "comparison".

    Raises:
        OutputError: another process is at work there, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; two in one folder are the user's to avoid
        yield
        return
    try:
        handle = (folder / LOCK).open("w")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror or error}.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"Another process is at work on the {what} in {folder}. Wait for it, or give another --out."
            ) from None
        except OSError:
            pass  # a disk without locks is used without
        yield
