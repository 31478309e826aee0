"""Runs on a Ray cluster: each is a task with resources of its own, begun again where its node is lost.

Pictures and networks go out through Ray's object store, once each, and what a run leaves behind comes back
the same way: no disk has to be shared, and a lost node costs the runs that were under way on it. What the
other machines need is headstart, installed in the same version, and a file that a method itself reads
(`fisher` of l2-sp) at the same place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headstart.comparison.crew import Ended, Executor, Prepared, Task, again, attempt
from headstart.data.loader import Task as Pieces
from headstart.disk import LOCK, whole
from headstart.errors import ConfigError, OutputError, Unreachable
from headstart.training.events import Reporter
from headstart.training.job import Prepared as Whole

ANSWERS_IN = 10.0  # seconds a cluster has to answer at its address
JOINED_IN = 60.0  # and to take us in
LOSSES = 3  # of the machine under one run, before the run is given up
CORES = 4  # of one run where there is no GPU: small networks use no more


@dataclass(frozen=True)
class Connection:
    """A cluster that has taken us in."""

    ray: Any
    ours: bool  # begun by us, and ended by us


def connect(address: str | None) -> Connection:
    """Join a cluster.

    Args:
        address: such as 'auto', '10.0.0.1:6379' or 'ray://10.0.0.1:10001'. None: the one that this machine
            belongs to (or RAY_ADDRESS names), else a new one on this machine alone.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
        Unreachable: nobody answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--on ray needs Ray, which is not installed: pip install 'headstart[cluster]'"
        ) from None
    if ray.is_initialized():
        return Connection(ray, ours=False)
    asked = address or os.environ.get("RAY_ADDRESS")
    if asked is not None and asked not in ("auto", "local"):
        _knock(asked)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if asked is not None:
        _join(ray, asked, quiet)
    else:
        try:
            _join(ray, "auto", quiet)
        except Unreachable:
            _join(ray, "local", quiet | {"include_dashboard": False})
    return Connection(ray, ours=True)


def _knock(address: str) -> None:
    """Fail at once, and in words, where nobody listens: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"address is host:port, ray://host:port or auto. Got {address!r}. `ray status` shows it on the "
            "cluster's head."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_IN).close()
    except (OSError, OverflowError) as error:
        raise Unreachable(
            f"No Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error}). "
            "Begin one there with `ray start --head`, or check the address and the firewall."
        ) from None


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    outcome: list[BaseException | None] = []

    def join() -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=address, ignore_reinit_error=True, **options)
        except BaseException as error:  # noqa: BLE001 - it is looked at below, in the thread that asked
            outcome.append(error)
        else:
            outcome.append(None)

    if address == "local":
        join()  # what it starts ends with the thread that started it
    else:
        # Something else that listens at the port may keep Ray waiting for ever.
        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(JOINED_IN)
    if not outcome:
        raise Unreachable(f"What answers at {address} did not take us in for {JOINED_IN:.0f} s: is it Ray?")
    if outcome[0] is not None:
        said = next((line.strip() for line in str(outcome[0]).splitlines() if line.strip()), "")
        raise Unreachable(f"The Ray cluster at {address} cannot be joined: {said[:300]}")


class Cluster:
    """A crew of machines."""

    tells = False

    def __init__(
        self,
        executor: Executor,
        reporter: Reporter,
        *,
        connection: Connection,
        jobs: int | None,
        device: str,
    ) -> None:
        self.ray, self.ours = connection.ray, connection.ours
        self.reporter = reporter
        self._resources, fitting = _resources(self.ray.nodes(), jobs, device)
        self.size = jobs or fitting
        self._executor = self.ray.put(executor)
        self._do = self.ray.remote(_do).options(
            max_retries=LOSSES, scheduling_strategy="SPREAD", **self._resources
        )
        self._sent: dict[int, tuple[Any, Any]] = {}  # by id, what is in the object store, and its original
        self._under_way: dict[Any, tuple[Task, Prepared]] = {}
        self._losses: Counter[str] = Counter()

    @property
    def busy(self) -> int:
        """How many runs are under way."""
        return len(self._under_way)

    @property
    def under_way(self) -> dict[str, dict[str, Any]]:
        """Their names; how far they are is not told across machines."""
        return {task.name: {} for task, _ in self._under_way.values()}

    def start(self, task: Task, prepared: Prepared) -> None:
        """Send it to the cluster, which finds a place for it."""
        light, parts = prepared, tuple[Any, ...]()
        if isinstance(prepared, Whole):
            parts = tuple(map(self._put, (prepared.task, prepared.pretrained, prepared.source)))
            light = replace(prepared, task=None, pretrained=None, source=None)  # type: ignore[arg-type]
        ref = self._do.remote(self._executor, task, light, *parts)
        self._under_way[ref] = (task, prepared)

    def next(self, patience: float) -> Ended | None:
        """Wait until one is over, and bring home what it left."""
        ready, _ = self.ray.wait(list(self._under_way), num_returns=1, timeout=patience)
        if not ready:
            return None
        task, prepared = self._under_way.pop(ready[0])
        try:
            reason, trace, files = self.ray.get(ready[0])
        except self.ray.exceptions.RayError as error:
            return self._lost(task, prepared, error)
        _unpack(files, task.folder)
        return Ended(task, reason, trace)

    def close(self) -> None:
        """Take back what is under way."""
        for ref in self._under_way:
            with contextlib.suppress(Exception):  # the cluster may be gone, and then so is the task
                self.ray.cancel(ref, force=True)
        self._under_way.clear()
        self._sent.clear()
        if self.ours:
            self.ray.shutdown()

    def _put(self, what: Any) -> Any:
        """Its place in the object store; what was sent before is not sent again."""
        if id(what) not in self._sent:
            sent = replace(what, pictures=what.pictures.in_memory()) if isinstance(what, Pieces) else what
            self._sent[id(what)] = self.ray.put(sent), what
        return self._sent[id(what)][0]

    def _lost(self, task: Task, prepared: Prepared, error: Exception) -> Ended | None:
        """Ray itself begins a run again whose machine is lost; this is when it has given up."""
        self._losses[task.name] += 1
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        if self._losses[task.name] >= LOSSES:
            return Ended(task, f"Its machine was lost {LOSSES} times: {type(error).__name__}: {said}")
        self.reporter.say(f"{task.name}: its machine was lost ({type(error).__name__}); it begins again.")
        self.start(again(task), prepared)
        return None


def _resources(nodes: list[dict[str, Any]], jobs: int | None, device: str) -> tuple[dict[str, float], int]:
    """What one run asks for, and how many fit into the cluster at once."""
    has = [node.get("Resources", {}) for node in nodes if node.get("Alive")]
    gpus = sum(int(node.get("GPU", 0)) for node in has) if device in ("auto", "cuda") else 0
    cores = [int(node.get("CPU", 0)) for node in has if node.get("CPU", 0) >= 1]
    if gpus:
        each = min((int(n["CPU"] // n["GPU"]) for n in has if n.get("GPU", 0) >= 1), default=1)
        return {"num_gpus": 1, "num_cpus": max(1, min(CORES, each))}, gpus
    if not cores:
        raise Unreachable("The Ray cluster has no machine with a core to spare. See `ray status`.")
    each = max(1, min([CORES if jobs is None else sum(cores) // jobs, *cores]))
    return {"num_cpus": each}, max(1, sum(count // each for count in cores))


def _do(executor: Executor, task: Task, light: Any, *parts: Any) -> tuple[str | None, str, dict[str, bytes]]:
    """What a machine of the cluster does: one run, in a folder of its own, which it sends home."""
    prepared = light
    if parts:
        prepared = replace(light, task=parts[0], pretrained=parts[1], source=parts[2])
    own = Path(tempfile.mkdtemp(prefix="headstart-"))
    try:
        ended = attempt(executor, replace(task, folder=own / task.name), prepared, Reporter())
        files = {
            str(path.relative_to(own / task.name)): path.read_bytes()
            for path in sorted((own / task.name).rglob("*"))
            if path.is_file() and path.name not in ("last.pt", LOCK)
        }
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return ended.reason, ended.trace, files


def _unpack(files: dict[str, bytes], folder: Path) -> None:
    """Write what came home; result.json last, for it says that all the others are there.

    Raises:
        OutputError: it could not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(files, key=lambda name: name == "result.json"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as fresh:
                fresh.write_bytes(files[name])
        (folder / "last.pt").unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to: {error.strerror or error}.") from error
