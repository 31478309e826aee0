"""What every benchmark does alike: alternate two things, judge a number against its bound, write it down."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DATA = HERE / "data"  # pictures that were fetched, and pictures made from them; not under version control

_PACKAGES = ("headstart", "torch", "torchvision", "timm", "accelerate", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Check:
    """One number and the bound it has to keep."""

    what: str
    value: float
    bound: float
    at_least: bool  # else at most
    unit: str = ""
    spread: tuple[float, float] | None = None  # smallest and largest repeat, or an interval

    @property
    def kept(self) -> bool:
        """Whether the number keeps its bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """The check as one line of a table."""
        sign = ">=" if self.at_least else "<="
        spread = "" if self.spread is None else f"  [{self.spread[0]:.4g}, {self.spread[1]:.4g}]"
        bound = f"{sign} {self.bound:g}{self.unit}"
        verdict = "kept" if self.kept else "MISSED"
        return f"{self.what}: {self.value:.4g}{self.unit} ({bound}){spread}  {verdict}"


def arguments(about: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: `--quick` and `--data`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="only show that it runs: tiny, judges and writes nothing"
    )
    parser.add_argument(
        "--data", type=Path, help="the clipart folders, where they lie already (else they are fetched)"
    )
    return parser


def alternate(
    a: Callable[[], Any], b: Callable[[], Any], repeats: int, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of `a` and of `b`, run in turns so that what else the machine does hits both alike.

    Who goes first changes every time (a b, b a, a b, ...), because the second one meets warmer caches.
    """
    for _ in range(warmup):
        a()
        b()
    took: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        pair = [(a, took[0]), (b, took[1])]
        for run, times in pair if repeat % 2 == 0 else reversed(pair):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return took


def take_turns(steps: Mapping[str, Callable[[], Any]], turns: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each of several, run in turns; who goes first changes every time."""
    names = list(steps)
    took: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                took[name].append(time.perf_counter() - start)
    return took


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def command() -> str:
    """The installed command `headstart` of this Python."""
    beside = Path(sys.executable).with_name("headstart")
    found = str(beside) if beside.exists() else shutil.which("headstart")
    if found is None:
        raise SystemExit("The command headstart is not installed beside this Python.")
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was when it began."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def begin(name: str) -> dict[str, Any]:
    """Describe the machine, and say so when something else is running on it."""
    here = machine()
    busy = here["load_before"]
    print(f"{name}: {here['cpu']}, {here['cores']} cores")
    if busy is not None and busy > 0.5:
        print(f"  the machine was not idle (load {busy}); do not quote numbers from this run")
    return here


def finish(
    name: str,
    claim: str,
    here: dict[str, Any],
    checks: list[Check],
    details: dict[str, Any],
    *,
    quick: bool,
) -> int:
    """Print the checks, write `results/<name>.json`, and return the exit code: 1 where a bound is missed."""
    for check in checks:
        print("  " + check.line())
    if quick:
        print("  quick: nothing was judged or written")
        return 0
    kept = all(check.kept for check in checks)
    record = {
        "name": name,
        "claim": claim,
        "kept": kept,
        "checks": [asdict(check) | {"kept": check.kept} for check in checks],
        "details": details,
        "machine": here,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"  written to {path.relative_to(HERE.parent)}")
    sys.stdout.flush()
    return 0 if kept else 1
