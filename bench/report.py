"""Claim: the report of 500 runs takes at most 20 s and 1 GiB, and is at most 6 MB.

A made-up comparison (10 methods x 50 seeds, 1,000 test pictures of 20 classes, 30 epochs, what each method
leaves of its inside, pictures on disk) lies in a folder; the installed command `headstart report` turns it
into the page, in a fresh process. Time from start to exit, memory as the operating system counts it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measurement
from measurement import HERE, Check, median

METHODS = (
    *("probe", "full", "lp-ft", "l2-sp", "delta", "hybrid-forward", "l2t-ww", "transtailor", "spottune"),
    "adafilter",
)


def build(place: Path, seeds: int, n: int) -> None:
    """Make up the comparison; in a process of its own, because it needs far more memory than the report."""
    sys.path.insert(0, str(HERE.parent / "tests" / "report"))
    from told import folder

    folder(place, METHODS, seeds=seeds, n=n, classes=[f"class {i}" for i in range(20)], epochs=30)


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and MiB of a process, started by a small one: Linux counts what it was forked from."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{command} failed.")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        place, seeds, n = options.build
        build(Path(place), int(seeds), int(n))
        return 0
    here = measurement.begin("report")
    seeds, n = (2, 60) if options.quick else (50, 1000)
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, __file__, "--build", place, str(seeds), str(n)], check=True)
        out = Path(place) / "compared"
        repeats = 1 if options.quick else options.repeats
        found = [measured([measurement.command(), "report", str(out)]) for _ in range(repeats)]
        size = (out / "report.html").stat().st_size / 1e6
    times, peaks = zip(*found, strict=True)
    runs, spread = seeds * len(METHODS), (min(times), max(times))
    checks = [
        Check(f"report of {runs} runs", median(list(times)), 20, at_least=False, unit=" s", spread=spread),
        Check("peak memory", max(peaks), 1024, at_least=False, unit=" MiB"),
        Check("size of the page", size, 6, at_least=False, unit=" MB"),
    ]
    details = {"seconds": times, "peak_mib": peaks, "runs": runs, "test_pictures": n}
    return measurement.finish("report", __doc__.splitlines()[0], here, checks, details, quick=options.quick)


if __name__ == "__main__":
    raise SystemExit(main())
