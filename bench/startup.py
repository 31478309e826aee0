"""Claim: `headstart --help` answers within 0.4 s, and loads no torch.

Wall clock of the installed command in fresh processes, from start to exit; the median of the repeats, after
one that fills the disk cache and writes byte code. A separate process runs the same command and tells which
modules it has loaded.
"""

from __future__ import annotations

import subprocess
import sys
import time

import measurement
from measurement import Check, median

BOUND = 0.4  # seconds
HEAVY = ("torch", "torchvision", "timm", "accelerate", "transformers", "sklearn", "scipy")
ASK = """
import sys
from headstart.cli import main
sys.argv = ["headstart", "--help"]
try:
    main()
except SystemExit:
    pass
print("\\nLOADED", *sorted(sys.modules))
"""


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    here = measurement.begin("startup")
    command = measurement.command()
    times = []
    for _ in range(1 + (3 if options.quick else options.repeats)):
        start = time.perf_counter()
        subprocess.run([command, "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    bare = []
    for _ in times:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - start)
    told = subprocess.run([sys.executable, "-c", ASK], check=True, capture_output=True, text=True).stdout
    loaded = set(told.rpartition("LOADED")[2].split())
    heavy = [name for name in HEAVY if name in loaded]
    checks = [
        Check(
            "headstart --help",
            median(times[1:]),
            BOUND,
            at_least=False,
            unit=" s",
            spread=(min(times[1:]), max(times[1:])),
        ),
        Check("torch loaded by it", float("torch" in loaded), 0, at_least=False),
    ]
    details = {
        "seconds": [round(each, 3) for each in times[1:]],
        "first_run_seconds": round(times[0], 3),
        "python_alone_seconds": round(median(bare[1:]), 3),
        "modules_loaded": len(loaded),
        "heavy_modules_loaded": heavy,
    }
    return measurement.finish(
        "startup",
        "headstart --help answers within 0.4 s and loads no torch.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
