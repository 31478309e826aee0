"""Several processes: the same table, whoever is killed, whenever."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from quick import Quick, lines

from headstart.comparison import ledger, worker
from headstart.comparison.crew import Task, attempt
from headstart.comparison.processes import places
from headstart.comparison.runner import compare
from headstart.comparison.search import Watch
from headstart.errors import ConfigError, OutputError
from headstart.records import Result, Run
from headstart.training.events import Reporter

HERE = Path(__file__).parent
ASKED: dict[str, Any] = {"methods": "full,l2-sp,probe", "splits": 2, "seeds": 2, "epochs": 6, "trials": 8}
RUNS = 12 + 3 * 2 * 8  # 60

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worker processes need POSIX")


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def table(out: Path) -> str:
    return (out / "results.csv").read_text()


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def searched(out: Path) -> list[Any]:
    studies: list[Any] = json.loads((out / "search.json").read_text())["studies"]
    return studies


def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    one = compare("pictures", out=tmp_path / "one", executor=Quick(), jobs=1, **ASKED)
    two = compare("pictures", out=tmp_path / "two", executor=Quick(), jobs=2, **ASKED)
    assert table(tmp_path / "two") == table(tmp_path / "one")
    assert searched(tmp_path / "two") == searched(tmp_path / "one")
    assert two.judgement == one.judgement
    assert len(rows(tmp_path / "one")) == RUNS


def test_an_epoch_too_many_after_a_kill_does_not_count(tmp_path: Path) -> None:
    """Killed between an epoch's checkpoint and the look at it, a trial is trained for one epoch more."""
    watch = Watch(((0.9,) * 6,) * 8, 6)
    stop = watch.stops_at([0.1] * 6)
    assert stop is not None
    record = {"val_accuracy": 0.1, "val_log_loss": 1.0, "seconds": 0.25}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(record) + "\n") * (stop + 1))
    run = Run(data="pictures", method="full", epochs=6, trial=True)
    ready = Quick().prepare(run, share=None, say=print)
    attempt(Quick(), Task(run, ready.name, tmp_path, resume=True, watch=watch), ready, Reporter())
    found = Result.read(tmp_path / "result.json")
    assert (found.status, found.epochs, found.seconds) == ("pruned", stop, 0.25 * stop)


KILLS = {"driver": 5, "worker": 15}
STRIDE = 10  # epochs that may be trained between two kills


@pytest.mark.slow
def test_sixty_runs_survive_twenty_kills(tmp_path: Path) -> None:
    """SIGKILL of the driver or of a worker, at random moments: nothing is lost, nothing repeated.

    A gate holds the training back, so that twenty are killed however fast or slow the machine is: without a
    kill it takes more epochs than the gate ever lets through.
    """
    whole, out, log, gate = (tmp_path / name for name in ("whole", "out", "log", "gate"))
    compare("pictures", out=whole, executor=Quick(log=str(tmp_path / "all")), **ASKED)
    kills = sum(KILLS.values())
    assert lines(tmp_path / "all") > kills * (STRIDE + 1), "or some kills would come too late"
    script = textwrap.dedent(
        f"""
        from quick import Quick
        from headstart.comparison.runner import compare
        executor = Quick(pause=0.02, log={str(log)!r}, gate={str(gate)!r})
        compare("pictures", out={str(out)!r}, executor=executor, jobs=2, **{ASKED!r})
        """
    )
    rng = random.Random(0)
    order = [who for who, count in KILLS.items() for _ in range(count)]
    rng.shuffle(order)
    gate.touch()
    killed = Counter[str]()
    driver = None
    with contextlib.ExitStack() as drivers:
        for who in order:
            with gate.open("ab") as file:
                file.write(b"." * STRIDE)
            if driver is None:
                driver = drivers.enter_context(started(script))
            gets_on(driver, log, rng.randint(1, STRIDE // 2))
            time.sleep(rng.random() * 0.1)
            if who == "driver":
                driver.kill()
                assert driver.wait() == -signal.SIGKILL
                driver = None
            else:
                # Mostly the one that has lived longer: a run whose process dies three times in a row without
                # an epoch in between is given up, as it should be.
                alive = at_work(driver)
                (alive[0] if rng.random() < 0.75 else alive[-1]).kill()
            killed[who] += 1
        gate.unlink()
        if driver is not None:
            assert driver.wait(120) == 0
    compare("pictures", out=out, executor=Quick(log=str(log)), jobs=1, **ASKED)
    assert killed == KILLS
    assert table(out) == table(whole)
    assert searched(out) == searched(whole)
    verdict = json.loads((whole / "verdict.json").read_text())
    assert json.loads((out / "verdict.json").read_text()) == verdict
    # An epoch is trained again only where a kill came before its checkpoint: one in each process that died.
    repeated = sum(n - 1 for n in Counter(log.read_text().splitlines()).values())
    assert repeated <= 2 * killed["driver"] + killed["worker"]


def epochs(out: Path) -> int:
    """How many epochs its runs have trained so far."""
    return sum(map(lines, out.glob("runs/*/metrics.jsonl")))


def gets_on(driver: subprocess.Popen[bytes], log: Path, epochs: int) -> None:
    """Wait until so many more epochs were trained."""
    enough, until = lines(log) + epochs, time.monotonic() + 120
    while lines(log) < enough:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.005)


@contextlib.contextmanager
def started(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, which does not outlive a test that fails."""
    driver = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def at_work(driver: subprocess.Popen[bytes]) -> list[Any]:
    """Its worker processes, the oldest first, and at least one of them.

    None of them is one that was killed and not yet missed, or what the driver asks about the machine.
    """
    import psutil

    until = time.monotonic() + 60
    while True:
        found = []
        for child in psutil.Process(driver.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE and worker.__name__ in child.cmdline():
                    found.append((child.create_time(), child.pid, child))
        if found:
            return [child for _, _, child in sorted(found, key=lambda each: each[:2])]
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.005)


class Deadly(Quick):
    """Kills its process in every run of l2-sp."""

    def execute(self, prepared: Any, folder: Path, **more: Any) -> Any:
        if prepared.run.method == "l2-sp":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(prepared, folder, **more)


def test_a_run_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    from test_comparison_processes import Deadly as Found  # by the name that workers know it under

    found = compare("x", "full,l2-sp", out=tmp_path, executor=Found(), jobs=2, seeds=1, epochs=2)
    (failure,) = found.failed
    assert failure.method == "l2-sp"
    assert "was killed by signal 9, 3 times" in failure.reason
    assert [result.method for result in found.results] == ["full"]


def test_a_comparison_waits_for_the_workers_of_a_killed_one(tmp_path: Path) -> None:
    lock = tmp_path / ".lock.workers"
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_SH); "
            "print('held', flush=True); time.sleep(60)",
            str(lock),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(OutputError, match="still at work"):
        ledger.gone(lock, patience=0.2)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    ledger.gone(lock, patience=5)


def test_cores_and_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.comparison.processes.visible", lambda: ["2", "5"])
    assert [p.environment["CUDA_VISIBLE_DEVICES"] for p in places(3, "auto")] == ["2", "5", "2"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert [place.cores for place in places(2, "cpu")] == [(0, 1), (2, 3)]
    assert [place.environment["OMP_NUM_THREADS"] for place in places(2, "cpu")] == ["2", "2"]
    assert [place.cores for place in places(5, "cpu")] == [None] * 5


@pytest.mark.parametrize("jobs", [0, True, "two"])
def test_jobs_are_a_number(tmp_path: Path, jobs: Any) -> None:
    with pytest.raises(ConfigError, match="jobs is how many"):
        compare("x", "full", out=tmp_path / "out", jobs=jobs)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_real_runs_survive_kills(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The same bits, whoever was killed: what is scored, tried and chosen, but for the times it took."""
    asked: dict[str, Any] = {"methods": "full,l2-sp", "seeds": 1, "splits": 1, "epochs": 4, "trials": 2}
    asked |= {"model": str(tiny_model), "img_size": 32, "batch_size": 8, "device": "cpu", "jobs": 2}
    asked |= {"channels_last": False}
    compare(str(pictures), out=tmp_path / "whole", **{**asked, "jobs": 1})
    out = tmp_path / "out"
    script = (
        "from headstart.comparison.runner import compare\n"
        f"compare({str(pictures)!r}, out={str(out)!r}, **{asked!r})\n"
    )
    for victim in ("driver", "worker"):
        before, until = epochs(out), time.monotonic() + 120
        with started(script) as driver:
            while epochs(out) == before:
                assert driver.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            if victim == "driver":
                driver.kill()
                assert driver.wait() == -signal.SIGKILL
            else:
                at_work(driver)[0].kill()
                assert driver.wait(240) == 0
    timed = {"seconds", "peak_memory_mb", "ms_per_image"}

    def told(folder: Path) -> list[dict[str, str]]:
        return [{key: value for key, value in row.items() if key not in timed} for row in rows(folder)]

    assert told(out) == told(tmp_path / "whole")


def test_a_workers_warning_reaches_the_person_as_a_line() -> None:
    """Its standard error would run into the table of the one that leads."""
    ours, its = Pipe()
    told = worker.Told(its)
    told.warned(UserWarning("tau means little"), UserWarning, __file__, 1)
    assert ours.recv() == ("say", "note: tau means little")
