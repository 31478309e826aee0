"""A worker process of `headstart.comparison.processes`: `python -m headstart.comparison.worker FD`."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TextIO

from headstart.comparison.crew import Ended, Executor, Prepared, Task, attempt, reason_of
from headstart.errors import HeadstartError
from headstart.training.events import Reporter


class Told(Reporter):
    """Sends what a run tells to the process that leads."""

    def __init__(self, line: Connection) -> None:
        self.line = line

    def say(self, text: str) -> None:
        """A line for a person."""
        self.line.send(("say", text))

    def warned(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """`warnings.showwarning`, for a person: what is wrong, and not where in headstart it was noticed."""
        self.say(f"note: {message}")

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done."""
        shown = ("phase", "epoch", "epochs", "loss", "val_accuracy", "seconds")
        self.line.send(("epoch", {name: record.get(name) for name in shown}))


def serve(line: Connection) -> None:
    """Do tasks, one after another, until nobody is there who gives any."""
    paths, cores, lock = line.recv()
    sys.path[:] = paths
    if cores is not None:
        os.sched_setaffinity(0, cores)
    held = _hold(lock)
    executor: Executor = line.recv()
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()

    def listen() -> None:
        # All receiving is done here, so that the end of the other side is noticed in mid-training.
        while True:
            try:
                tasks.put(line.recv())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    share: Prepared | None = None
    while True:
        task = tasks.get()
        with suppress(BrokenPipeError):  # the listening thread ends us
            line.send(("begun", None))
            told = Told(line)
            warnings.showwarning = told.warned
            ended, share = _do(executor, task, share, told)
            line.send(("ended", (ended.reason, ended.trace)))
        assert held is None or not held.closed  # the lock is ours as long as we live


def _do(executor: Executor, task: Task, share: Prepared | None, told: Told) -> tuple[Ended, Prepared | None]:
    try:
        prepared = executor.prepare(task.run, share=share, say=lambda _: None)  # said by the one that leads
    except (HeadstartError, OSError) as error:
        return Ended(task, reason_of(error)), share
    return attempt(executor, task, prepared, told), prepared


def _hold(lock: str | None) -> Any:
    """Show that a worker is alive: a comparison that begins anew waits until the last one has gone."""
    if lock is None:
        return None
    import fcntl

    handle = open(lock, "w")  # noqa: SIM115, PTH123 - held for as long as this process lives
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    serve(Connection(int(sys.argv[1])))
