"""Run the benchmarks, each in a process of its own, and tell which bounds are kept.

    python bench/run.py                  all of them
    python bench/run.py startup l2_sp_step
    python bench/run.py --quick          only show that all of them run

The exit code is 1 where a bound is missed or a benchmark breaks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import measurement
from measurement import HERE, RESULTS, Check

NAMES = (
    "startup",
    "l2_sp_step",
    "delta_step",
    "delta_scoring",
    "hybrid_step",
    "fitnets_step",
    "l2t_step",
    "spottune_step",
    "adafilter_step",
    "cache_feed",
    "plain_loop",
    "accuracy",
    "constrain",
    "route",
    "selection",
    "transtailor_cost",
    "reshape",
    "serve",
    "scheduling",
    "judge",
    "report",
    "export",
    "demo",
)


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; none: all")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark '{name}'; there are {', '.join(NAMES)}")
    passed = ["--quick"] if options.quick else []
    if options.data is not None:
        passed += ["--data", str(options.data.resolve())]
    lines, missed = [], False
    for name in options.names or NAMES:
        path = RESULTS / f"{name}.json"
        began = time.time()
        code = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *passed], check=False).returncode
        missed = missed or code != 0
        took = f"{time.time() - began:.0f} s"
        if options.quick:
            lines.append(f"{name:<14} {'runs' if code == 0 else 'BROKEN'}  ({took})")
        elif not path.exists() or path.stat().st_mtime < began:
            lines.append(f"{name:<14} BROKEN  ({took})")
        else:
            for check in json.loads(path.read_text(encoding="utf-8"))["checks"]:
                kept = check.pop("kept")
                assert Check(**check).kept == kept
                lines.append(f"{name:<14} {Check(**check).line()}  ({took})")
    print("\n" + "\n".join(lines))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
