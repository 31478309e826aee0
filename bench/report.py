"""Claim: the report of 500 runs takes at most 20 s and 1 GiB, and is at most 6 MB.

A made-up comparison (10 methods x 50 seeds, 1,000 test pictures of 20 classes, 30 epochs, what each method
leaves of its inside, pictures on disk) lies in a folder; the installed command `headstart report` turns it
into the page, in a fresh process. Time from start to exit, memory as the operating system counts it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measurement
from measurement import HERE, Check, median

sys.path.insert(0, str(HERE.parent / "tests" / "report"))
from told import folder

METHODS = (
    *("probe", "full", "l2-sp", "delta", "hybrid-forward", "l2t-ww", "transtailor", "spottune", "adafilter"),
    "lp-ft",
)


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    here = measurement.begin("report")
    command = measurement.command()
    seeds, n = (2, 60) if options.quick else (50, 1000)
    with tempfile.TemporaryDirectory() as place:
        classes = [f"class {i}" for i in range(20)]
        out = folder(Path(place), METHODS, seeds=seeds, n=n, classes=classes, epochs=30)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        times = []
        for _ in range(1 if options.quick else options.repeats):
            start = time.perf_counter()
            subprocess.run([command, "report", str(out)], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024  # kB on Linux
        size = (out / "report.html").stat().st_size / 1e6
    spread = (min(times), max(times))
    checks = [
        Check(
            f"report of {seeds * len(METHODS)} runs",
            median(times),
            20,
            at_least=False,
            unit=" s",
            spread=spread,
        ),
        Check("peak memory", peak, 1024, at_least=False, unit=" MiB"),
        Check("size of the page", size, 6, at_least=False, unit=" MB"),
    ]
    details = {"seconds": times, "runs": seeds * len(METHODS), "test_pictures": n}
    return measurement.finish("report", __doc__.splitlines()[0], here, checks, details, quick=options.quick)


if __name__ == "__main__":
    raise SystemExit(main())
