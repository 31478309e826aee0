"""What the select methods do for a network that starts from random weights: at equal epochs, at equal time.

A resnet18 that has learnt nothing, 96 px (unless told otherwise), about 500 training pictures of ten classes,
three seeds, each with a split of its own, on clipart and on fashion-mnist. The source is efficientnet-lite0
with its ImageNet weights. `scratch` has no source; `l2t-w[what=false]` is feature matching, where all
channels and all pairs of layers count the same: stage to stage of equal stride, or all the pairs that l2t-ww
has.

Equal epochs: all as many, and some of them once more with the matching weighed otherwise. Equal time: as many
epochs as fit in the time that so many of l2t-ww take; what an epoch takes is measured first, each method
alone on the machine.

Nothing is judged by who wins. What is: that the times at equal time were equal. Told besides: whether l2t-ww
beats matching everything equally, with the interval of the difference; and what fine-tuning the source itself
gives for the same epochs, because that is the first thing to try wherever pretrained weights will do.

A run that lies under `--out` is not trained again, so parts may be run first with `--set` and `--protocol`.
`--data` holds the folders `clipart` and `fashion`, each with class folders or train|test of them. A machine
that has neither is given `bench/data` as `--prepare` leaves it elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import measurement
from clipart import drawn
from headstart.comparison import ledger
from headstart.comparison.grid import Cell, plan
from headstart.comparison.ledger import Entry
from headstart.comparison.verdict import Row, Verdict, judge
from headstart.training import job
from measurement import DATA, Check, median

LEARNS, SOURCE = "resnet18", "efficientnet-lite0"
EQUALLY = "l2t-w[what=false,pairs=all]"
METHODS = (
    "scratch",
    "fitnets",
    "fitnets[mode=joint]",
    "l2t-w[what=false]",
    EQUALLY,
    "l2t-w",
    "l2t-ww",
)
WEIGHED_OTHERWISE = (  # maps as they come, as in the papers, or ten times β; of what costs little
    "fitnets[mode=joint,norm_maps=false]",
    "l2t-w[what=false,pairs=all,norm_maps=false]",
    "fitnets[mode=joint,beta=5.0]",
    "l2t-w[what=false,pairs=all,beta=5.0]",
)
REFERENCE = "full"  # of the source itself
PER_CLASS = {"clipart": 120, "fashion": 150}  # drawn once; three splits of them
SHARES = {"clipart": (0.49, 0.13, 0.38), "fashion": (1 / 3, 1 / 10, 17 / 30)}  # about 500 to learn from
PROTOCOLS = ("epochs", "time")
CLOCKED = 3  # epochs, the first of which is not counted
BOUND = 1.5


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, and where it goes."""

    cell: Cell
    folder: Path
    weight: float = 1.0  # about how long it takes, among the others


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--set", nargs="+", choices=list(PER_CLASS), default=list(PER_CLASS), dest="sets")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), dest="protocols")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--as-long-as", type=int, help="epochs of l2t-ww, for equal time (as --epochs)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs that are trained at once")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prepare", action="store_true", help="only lay the pictures out under bench/data")
    parser.add_argument("--out", type=Path, default=DATA / "compared-selection", help="goes on where it was")
    options = parser.parse_args()
    here = measurement.begin("selection")
    began = time.perf_counter()
    methods, others, out = METHODS, WEIGHED_OTHERWISE, options.out
    size, batch, epochs, seeds = options.img_size, 32, options.epochs, options.seeds
    if options.quick:
        methods, others = ("scratch", EQUALLY, "l2t-ww"), WEIGHED_OTHERWISE[:1]
        out = out.with_name(out.name + "-quick")
        size, batch, epochs, seeds = 32, 8, 1, 2
    pictures = {
        name: drawn(name, options.data, per_class=6 if options.quick else PER_CLASS[name])
        for name in options.sets
    }
    if options.prepare:
        return 0
    shared: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch,
        "img_size": size,
        "device": options.device,
        "precision": options.precision,
        "channels_last": False,  # not measured while others are at work
    }
    grids = {}
    for name in options.sets:
        fields = {**shared, "split": SHARES[name]}
        learner = {"model": LEARNS, "weights": "random", "source": SOURCE}
        grids[name] = {
            "epochs": plan(
                str(pictures[name]), [*methods, *others], seeds=seeds, baseline="scratch", **fields, **learner
            ),
            "reference": plan(str(pictures[name]), [REFERENCE], seeds=seeds, **fields),
        }
        job.prepare(grids[name]["reference"].cells[0].run, say=print)  # decoded once, for all workers

    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))  # the clock's too
    each = {}  # seconds of an epoch
    if "time" in options.protocols:
        each = _clocked(
            [cell for cell in grids[options.sets[0]]["epochs"].cells if cell.label in methods],
            2 if options.quick else CLOCKED,
            out / "clock",
        )
        print("  an epoch alone: " + ", ".join(f"{label} {took:.2f} s" for label, took in each.items()))
    long = options.as_long_as or epochs
    fits = {label: max(1, round(long * each["l2t-ww"] / took)) for label, took in each.items()}
    if options.quick:
        fits = {label: 1 if label == "l2t-ww" else 2 for label in fits}

    jobs: dict[tuple[str, str], list[Job]] = {}
    for name, grid in grids.items():
        base = out / name
        jobs[name, "reference"] = [_job(base / "reference", cell) for cell in grid["reference"].cells]
        # What takes the longest goes first, so that nobody waits for it at the end.
        jobs[name, "epochs"] = [
            _job(base / "epochs", cell, each.get(cell.label, 1.0)) for cell in grid["epochs"].cells
        ]
        jobs[name, "time"] = [
            _job(base / "epochs", cell, each[cell.label])  # the very run
            if fits[cell.label] == epochs
            else _job(base / "time", _of_length(cell, fits[cell.label]), each[cell.label])
            for cell in grid["epochs"].cells
            if cell.label in each
        ]
    chosen = [(name, kind) for name in grids for kind in ("reference", *options.protocols)]
    todo = {each.folder: each for key in chosen for each in jobs[key]}
    broken = _train(sorted(todo.values(), key=lambda each: -each.weight), options.jobs)

    details: dict[str, Any] = {"epochs": epochs, "seeds": seeds, "jobs": options.jobs, "failed": broken}
    details |= {"img_size": size, "precision": options.precision, "as_long_as": long}
    details["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    details["seconds_of_an_epoch"] = {label: round(took, 3) for label, took in each.items()}
    checks = []
    for name, kind in chosen:
        told = {"reference": (REFERENCE,), "epochs": (*methods, *others), "time": methods}[kind]
        found, rows = _told(name, kind, jobs[name, kind], told)
        details.setdefault(name, {})[kind] = {"sentence": found.sentence, "rows": rows}
        if kind == "time":
            times = [row["training_seconds"] for row in rows if row["training_seconds"]]
            what = f"{name}, training at equal time, longest / shortest"
            checks.append(Check(what, max(times) / min(times), BOUND, at_least=False))
        if kind != "reference" and EQUALLY in methods:
            against = _judged(jobs[name, kind], told, EQUALLY).rows[methods.index("l2t-ww")]
            details[name][kind]["l2t-ww over matching equally"] = _say_whether(name, kind, against)
    details["seconds"] = round(time.perf_counter() - began, 1)
    code = measurement.finish(
        "selection",
        "What the select methods do for a network that starts from scratch; at equal time, times are equal.",
        here,
        checks,
        details,
        quick=options.quick,
    )
    return 1 if broken else code


def _job(base: Path, cell: Cell, weight: float = 1.0) -> Job:
    return Job(cell, base / f"{cell.label}-s{cell.run.seed}", weight * cell.run.epochs)


def _of_length(cell: Cell, epochs: int) -> Cell:
    return dataclasses.replace(cell, run=cell.run.model_copy(update={"epochs": epochs}))


def _clocked(cells: Sequence[Cell], epochs: int, folder: Path) -> dict[str, float]:
    """Seconds of an epoch by method, each alone on the machine: validation and bookkeeping included."""
    notes = folder / "seconds.json"
    if notes.exists():  # other times would ask for other lengths, and all runs would be trained again
        return dict(json.loads(notes.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    found = {}
    for cell in cells:
        if cell.label in found:
            continue
        short = _of_length(cell, epochs)
        job.execute(job.prepare(short.run, say=_quiet), folder / cell.label)
        text = (folder / cell.label / "metrics.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        counts = Counter(record["phase"] for record in records)
        # Phases differ in what an epoch takes, and count by their share. The very first sets things up.
        seconds: dict[str, list[float]] = {}
        for record in records[1:]:
            seconds.setdefault(record["phase"], []).append(record["seconds"])
        known = {phase: n for phase, n in counts.items() if phase in seconds}
        found[cell.label] = sum(median(seconds[p]) * n for p, n in known.items()) / sum(known.values())
    notes.write_text(json.dumps(found), encoding="utf-8")
    return found


def _quiet(_: str) -> None:
    """What the data and the weights are was said before."""


_share: job.Prepared | None = None  # of this worker: its pictures and networks are used again


def _work(each: Job) -> float:
    """Train one run, in a worker; seconds."""
    global _share
    start = time.perf_counter()
    _share = job.prepare(each.cell.run, share=_share, say=_quiet)
    job.execute(_share, each.folder)
    return time.perf_counter() - start


def _train(jobs: Sequence[Job], at_once: int) -> dict[str, str]:
    """All runs, so many at once; those that failed, and why."""
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(
        at_once,
        mp_context=multiprocessing.get_context("spawn"),  # CUDA does not survive a fork
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    ) as pool:
        running = {pool.submit(_work, each): each for each in jobs}
        for done, future in enumerate(as_completed(running), 1):
            each = running[future]
            shown = "/".join(each.folder.parts[-3:])
            try:
                said = f"{future.result():.0f} s"
            except Exception as error:  # noqa: BLE001 - whatever it was, the other runs go on
                failed[shown] = said = str(error) or type(error).__name__
            print(f"  {done}/{len(jobs)}  {shown}  {said}", flush=True)
    return failed


def _entries(jobs: Sequence[Job]) -> list[Entry]:
    found = []
    for each in jobs:
        entry = Entry(each.cell.label, each.cell.run, folder=str(each.folder))
        finished = ledger.look(each.folder)
        if finished is None:
            entry.status, entry.reason = "failed", "see its folder"
        else:
            entry.status, (entry.result, entry.answers) = "finished", finished
        found.append(entry)
    return found


def _judged(jobs: Sequence[Job], methods: Sequence[str], baseline: str) -> Verdict:
    return judge(_entries(jobs), labels=methods, baseline=baseline)


def _told(
    name: str, kind: str, jobs: Sequence[Job], methods: Sequence[str]
) -> tuple[Verdict, list[dict[str, Any]]]:
    """The verdict, and its rows with epochs and seconds of training; shown."""
    found = _judged(jobs, methods, methods[0])
    print(f"  {name}, {'at equal ' + kind if kind != 'reference' else 'the source itself, fine-tuned'}")
    rows = []
    for row in found.rows:
        results = [e.result for e in _entries(jobs) if e.label == row.method and e.result is not None]
        seconds = [sum(phase.seconds for phase in result.phases) for result in results]
        more = {
            "epochs": results[0].epochs if results else None,
            "training_seconds": round(median(seconds), 2) if seconds else None,
        }
        rows.append(row.model_dump(mode="json") | more)
        if row.accuracy is None:
            print(f"    {row.method:<30} failed")
            continue
        gap = "" if row.difference is None else f"  {_points(row.difference)} to {methods[0]}"
        print(
            f"    {row.method:<30} {row.accuracy.mean:6.1%} [{row.accuracy.lo:.1%}, {row.accuracy.hi:.1%}]"
            f"{gap}  {more['epochs']} epochs, {more['training_seconds']} s"
        )
    return found, rows


def _points(gap: Any) -> str:
    return f"{100 * gap.mean:+.1f} points ({100 * gap.lo:+.1f} to {100 * gap.hi:+.1f})"


def _say_whether(name: str, kind: str, row: Row) -> str:
    """One sentence, whatever came out; one seed says nothing."""
    if row.difference is None:
        said = "not known: no two seeds of both"
    else:
        gap = row.difference
        verb = "beats" if gap.lo > 0 else "is worse than" if gap.hi < 0 else "cannot be told apart from"
        said = f"l2t-ww {verb} matching everything equally, {_points(row.difference)}"
    print(f"    {name}, equal {kind}: {said}")
    return said


if __name__ == "__main__":
    raise SystemExit(main())
