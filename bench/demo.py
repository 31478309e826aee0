"""Claim: the demo takes at most 6 minutes and at most 3 GiB.

`headstart demo` in a process of its own, with its pictures fetched beforehand and an empty cache: wall clock
from start to exit (imports included), and the largest resident memory of the process and all its children
together, sampled ten times a second. Pages that processes share are counted once for each of them, so the
true peak is not above the one shown, but for what comes and goes between two samples.

One run is one repeat: it is minutes long, and both bounds are limits, not ratios.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

import measurement
from headstart.cli.demo import PER_CLASS
from headstart.data.catalogue import fetch
from measurement import Check

MINUTES, GIB = 6.0, 3.0
EVERY = 0.1  # seconds between two looks at the memory


def main() -> int:
    options = measurement.arguments(__doc__).parse_args()
    here = measurement.begin("demo")
    command = measurement.command()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "demo"
        log = Path(scratch) / "log"
        if options.quick:
            arguments = ["demo", "--help"]
        else:
            fetch("clipart", out / "data" / "clipart", per_class=PER_CLASS)
            arguments = ["demo", "--out", str(out)]
        own = os.environ | {"HEADSTART_CACHE": str(Path(scratch) / "cache")}
        with log.open("w", encoding="utf-8") as written:
            start = time.perf_counter()
            process = subprocess.Popen(
                [command, *arguments], env=own, stdout=written, stderr=subprocess.STDOUT
            )
            peak, most = watch(process)
            took = time.perf_counter() - start
        said = log.read_text(encoding="utf-8")
    if process.returncode != 0:
        sys.stdout.write(said[-3000:])
        print(f"  the demo ended with exit code {process.returncode}")
        return 1
    checks = [
        Check("wall clock of the demo", took / 60, MINUTES, at_least=False, unit=" min"),
        Check("peak memory of the demo", peak / 2**30, GIB, at_least=False, unit=" GiB"),
    ]
    details = {
        "seconds": round(took, 1),
        "peak_mib": round(peak / 2**20),
        "most_processes": most,
        "printed": said.splitlines(),
    }
    return measurement.finish(
        "demo",
        "The demo takes at most 6 minutes and at most 3 GiB once its pictures are there.",
        here,
        checks,
        details,
        quick=options.quick,
    )


def watch(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Peak resident bytes of a process and its descendants until it ends, and the most of them at once."""
    peak = most = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:  # it ended while we looked
            break
        for each in family:
            try:
                sizes.append(each.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(EVERY)
    process.wait()
    return peak, most


if __name__ == "__main__":
    raise SystemExit(main())
