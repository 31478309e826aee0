"""Several processes on this machine, one per device or group of cores, each doing one run at a time.

A process that is killed costs the epoch it was in: another takes its place, and its run goes on from the
last checkpoint. When this process is killed, the others end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from headstart.comparison.crew import Ended, Executor, Prepared, Task, again
from headstart.errors import ConfigError
from headstart.training.events import Reporter

DEATHS = 3  # of a run's process with no epoch in between, before it is given up: it may be what kills it
UNBORN = 20


@dataclass
class _Worker:
    """A process, the line to it, and what it is doing."""

    process: subprocess.Popen[bytes]
    line: Connection
    slot: int
    task: Task | None = None
    begun: bool = False  # it has the task in its hands
    last: dict[str, Any] = field(default_factory=dict)


class Processes:
    """A crew of worker processes; they are started when they are needed."""

    tells = False

    def __init__(
        self, executor: Executor, reporter: Reporter, *, jobs: int, device: str, lock: Path | None = None
    ) -> None:
        if os.name != "posix":
            raise ConfigError("--jobs needs Linux or macOS. Leave it out to train one run after another.")
        self.executor, self.reporter, self.size = executor, reporter, jobs
        self.lock = lock
        self._places = places(jobs, device)
        self._workers: dict[int, _Worker] = {}
        self._deaths: Counter[str] = Counter()
        self._unborn = 0  # processes in a row that were killed before they began anything

    @property
    def busy(self) -> int:
        """How many runs are under way."""
        return sum(worker.task is not None for worker in self._workers.values())

    @property
    def under_way(self) -> dict[str, dict[str, Any]]:
        """The last epoch of each."""
        return {w.task.name: w.last for w in self._workers.values() if w.task is not None}

    def start(self, task: Task, prepared: Prepared) -> None:
        """Give it to a worker that has nothing to do."""
        slot = next(s for s in range(self.size) if s not in self._workers or not self._workers[s].task)
        self._give(slot, task)

    def next(self, patience: float) -> Ended | None:
        """Listen to the workers until one has ended its run, or has told something."""
        lines = {worker.line: worker for worker in self._workers.values() if worker.task is not None}
        for ready in wait(list(lines), timeout=patience):
            assert isinstance(ready, Connection)
            worker = lines[ready]
            try:
                what, said = worker.line.recv()
            except (EOFError, OSError):
                return self._died(worker)
            assert worker.task is not None
            if what == "begun":
                worker.begun = True
            elif what == "epoch":
                worker.last = said
                del self._deaths[worker.task.name]  # it gets on
            elif what == "say":
                self.reporter.say(f"{worker.task.name}: {said}")
            else:
                task, worker.task, worker.last = worker.task, None, {}
                return Ended(task, *said)
            return None
        return None

    def close(self) -> None:
        """End the workers: they notice that nobody listens any more."""
        for worker in self._workers.values():
            worker.line.close()
        for worker in self._workers.values():
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self._workers.clear()

    def _give(self, slot: int, task: Task) -> None:
        worker = self._workers.get(slot) or self._begin(slot)
        worker.task, worker.begun, worker.last = task, False, {}
        with contextlib.suppress(OSError):  # it died while it had nothing to do; `next` hears of it
            worker.line.send(task)

    def _begin(self, slot: int) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "headstart.comparison.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=os.environ | self._places[slot].environment,
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout belongs to the results
                start_new_session=True,  # Ctrl-C is for us to handle
            )
        line = Connection(ours.detach())
        worker = self._workers[slot] = _Worker(process, line, slot)
        with contextlib.suppress(OSError):  # it died at once; `next` hears of it
            line.send((sys.path, self._places[slot].cores, None if self.lock is None else str(self.lock)))
            line.send(self.executor)
        return worker

    def _died(self, worker: _Worker) -> Ended | None:
        """Begin its run again in a new process; give up a run that keeps killing its process."""
        task = worker.task
        assert task is not None
        worker.line.close()
        code = worker.process.wait()
        del self._workers[worker.slot]
        self._deaths[task.name] += worker.begun or code >= 0  # killed before it began: not the run's doing
        self._unborn = 0 if worker.begun else self._unborn + 1
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if self._deaths[task.name] >= DEATHS or self._unborn >= UNBORN:
            times = max(self._deaths[task.name], self._unborn)
            return Ended(
                task,
                f"Its process {how}, {times} times. Where memory ran out, use fewer --jobs or a smaller "
                "--batch-size.",
            )
        self.reporter.say(f"{task.name}: its process {how}; it goes on in another one.")
        self._give(worker.slot, again(task))
        return None


# ---------------------------------------------------------------------- who computes where


@dataclass(frozen=True)
class Place:
    """What one process has to itself."""

    environment: dict[str, str]
    cores: tuple[int, ...] | None = None  # None: the system decides


def places(jobs: int, device: str) -> list[Place]:
    """A device or a group of cores for each of so many processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    count = os.cpu_count() or 1 if cores is None else len(cores)
    threads = str(max(1, count // jobs))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    devices = visible() if device in ("auto", "cuda") else []
    if devices:
        return [Place(environment | {"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(jobs)]
    if cores is None or jobs > len(cores):
        return [Place(environment)] * jobs
    return [
        Place(environment, tuple(cores[len(cores) * i // jobs : len(cores) * (i + 1) // jobs]))
        for i in range(jobs)
    ]


def visible() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(i) for i in range(torch.cuda.device_count())]
