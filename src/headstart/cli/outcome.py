"""How a command ends: exit codes, and the last lines on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from headstart.cli import INTERRUPTED
from headstart.disk import cache_dir

GOOD, MISTAKE, SOME_FAILED = 0, 1, 2

typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())  # what stands after `headstart`

# The machine says no: a disk, a right, a name. Nothing that a traceback would explain better.
_NOT_OURS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.EIO,
}


def say(text: str) -> None:
    """One message on stderr, marked as ours."""
    # stderr may be gone too: then there is nobody to tell.
    with contextlib.suppress(BrokenPipeError):
        print(f"headstart: {text}", file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """A value on stdout, for a machine to read."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def is_main() -> bool:
    """Whether this process speaks: of several that train together only the first does."""
    return os.environ.get("RANK", "0") == "0"


def refused(error: Exception) -> int:
    """Something a person can put right: one or two lines."""
    if isinstance(error, OSError):
        if error.errno not in _NOT_OURS:
            return broken(error)
        where = f"{error.filename}: " if error.filename is not None else ""
        say(f"{where}{error.strerror or error}.")
    else:
        say(str(error).strip())
    _show_if_debugging(error)
    return MISTAKE


def broken(error: Exception) -> int:
    """A mistake of ours: one line, and the traceback in a file."""
    name, text = type(error).__name__, " ".join(str(error).split())
    said = f"{name}: {text}" if text else name
    if len(said) > 300:
        said = f"{said[:300]} ..."
    say(f"{said}\nThis is a bug in headstart; details: {_note(error)}")
    _show_if_debugging(error)
    return MISTAKE


def interrupted(again: list[str] | None) -> int:
    """Stopped by the person or the machine; says how to go on."""
    say("interrupted." if again is None else f"interrupted. Go on with: {shlex.join(again)}")
    return INTERRUPTED


def pipe_closed() -> int:
    """Whoever read our output has read enough."""
    # What is still buffered would be written when Python ends, and fail again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return GOOD


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: a batch system that ends a job leaves a run that can go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _note(error: Exception) -> Path:
    """Write the traceback where it can be found, and say where that is."""
    text = "".join(traceback.format_exception(error))
    head = f"{shlex.join(['headstart', *typed.get()])}\nPython {sys.version}\n\n"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (cache_dir() / "errors", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(head + text, encoding="utf-8")
        except OSError:
            continue
        return folder / name
    return Path("(no file could be written; set HEADSTART_DEBUG=1 to see them)")


def _show_if_debugging(error: Exception) -> None:
    if os.environ.get("HEADSTART_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
