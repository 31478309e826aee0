"""Claim: filters that the task is asked about are worth more than filters that are large, at equal FLOPs.

Two tasks, three seeds each, with a split of its own for every seed: `clipart` (about 300 training pictures of
ten classes, 128 px) and `fashion` (500 of fashion-mnist's, 96 px), with efficientnet-lite0 and its ImageNet
weights. Trained are `full` on the whole network, and `transtailor` to 80, 60 and 40 % of its FLOPs with each
importance there is: "taylor" (the method), "magnitude", "random" and "uniform", with the same plan of rounds,
for as many epochs, on the same order and augmentation. What is scored is the cut network on test pictures
that nobody has chosen anything on.

Judged is the mean over the seeds of "taylor minus magnitude" at each share, in points: 0 or more. The 95 %
intervals of this and of all other differences are paired (`headstart.comparison.statistics`) and stand in the
record, with one table and one curve (`results/reshape.svg`) of accuracy against FLOPs.

A piece is one seed of one task. Pieces run `--jobs` at a time, in processes of their own, and are kept under
`--out`: what lies there is not run again, so parts may be run with `--set`, `--seeds` and `--only` first.
`--data` holds the folders `clipart` and `fashion`, as for bench/route.py, whose `--prepare` lays out the very
pictures that are used here.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import measurement
import pieces
import route
from headstart.comparison.statistics import Answers, Resampled
from headstart.methods.reshape.transtailor import TransTailor
from headstart.records import Run
from headstart.training.job import Prepared, build, prepare
from headstart.training.loop import fit
from headstart.training.machine import Machine, Placed
from measurement import DATA, RESULTS, Check

SETS = ("clipart", "fashion")
SHARES = (0.8, 0.6, 0.4)
WAYS = ("taylor", "magnitude", "random", "uniform")
COLOURS = {"taylor": "#1b6ca8", "magnitude": "#d1495b", "random": "#8d8d8d", "uniform": "#e09f3e"}


def main() -> int:
    parser = measurement.arguments(__doc__)
    pieces.arguments(parser, DATA / "reshape")
    parser.add_argument("--set", nargs="*", default=list(SETS), choices=SETS, dest="sets")
    parser.add_argument("--only", nargs="*", default=["full", *WAYS], choices=["full", *WAYS])
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    if options.quick:
        options.out, options.epochs = options.out.with_name(f"{options.out.name}-quick"), 2
        options.sets, options.seeds, options.shares = options.sets[:1], options.seeds[:1], [0.8]
        options.only = options.only[:3]
    if options.piece is not None:
        _run_piece(options)
        return 0
    here = measurement.begin("reshape")
    start = time.perf_counter()
    several = [(name, seed) for name in options.sets for seed in options.seeds]
    for name, seed in several:
        route.data_of(name, seed, options)  # here, one after the other: what is shared is made once
    pieces.run("reshape.py", several, options, "--shares", *map(str, options.shares))
    checks, details = [], {}
    for name in options.sets:
        found = {seed: pieces.kept(options, name, seed) for seed in options.seeds}
        details[name] = _summary(name, {seed: each for seed, each in found.items() if each})
        checks += _judged(name, details[name])
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "reshape.svg").write_text(_curves(details), encoding="utf-8")
    details |= {"epochs": options.epochs, "seconds": round(time.perf_counter() - start, 1)}
    if torch.cuda.is_available():
        details["gpu"] = torch.cuda.get_device_name()
    return measurement.finish(
        "reshape",
        "Target-aware importance keeps at least the accuracy that magnitude keeps, at equal FLOPs.",
        here,
        checks,
        details,
        quick=options.quick,
    )


# ---------------------------------------------------------------------- a piece: one seed of one task


def _run_piece(options: argparse.Namespace) -> None:
    """Train and score what was asked for and is not there yet; each run is kept as soon as it is done."""
    name, seed = pieces.asked(options)
    found = pieces.kept(options, name, seed)
    machine, prepared = Machine("auto"), None
    arms: list[tuple[str, float]] = [("full", 1.0)] if "full" in options.only else []
    arms += [(way, share) for share in options.shares for way in options.only if way != "full"]
    for way, share in arms:
        label = _label(way, share)
        if label in found:
            continue
        prepared = prepare(
            Run.asked(
                data=str(route.data_of(name, seed, options)),
                img_size=64 if options.quick else route.SETS[name],
                method="full" if way == "full" else "transtailor",
                hyper={} if way == "full" else {"flops": share, "importance": way},
                epochs=options.epochs,
                batch_size=8 if options.quick else 32,
                seed=seed,
            ),
            share=prepared,
            say=lambda _: None,
        )
        start = time.perf_counter()
        found[label] = _arm(prepared, machine)
        accuracy = np.mean(found[label]["right"])
        print(
            f"  {name} seed {seed} {label}: {accuracy:.3f}  {time.perf_counter() - start:.0f} s", flush=True
        )
        pieces.keep(options, name, seed, found)


def _arm(prepared: Prepared, machine: Machine) -> dict[str, Any]:
    """Whether the exported network says each test picture right, what is left of it, and what it took."""
    run, task = prepared.run, prepared.task
    start = time.perf_counter()
    method = build(prepared)
    sides = {side: task.plain(side, 100, device=machine.device) for side in ("train", "val")}
    fit(
        method,
        train=task.train(prepared.batch_size, seed=run.seed, device=machine.device),
        val=sides["val"],
        plain=sides["train"],
        recipe=prepared.recipe,
        epochs=run.epochs,
        machine=machine,
        seed=run.seed,
    )
    seconds = time.perf_counter() - start
    net = method.export()
    machine.place(net)
    right: list[int] = []
    with torch.inference_mode():
        for x, y in Placed(task.plain("test", 100, device=machine.device), machine):
            right += (net(x).argmax(1) == y).int().tolist()
    about: dict[str, Any] = {"params": sum(p.numel() for p in net.parameters())}
    if isinstance(method, TransTailor):
        shown = method.diagnostics()
        about |= {"flops": shown["after"]["flops"] / shown["before"]["flops"], "rounds": shown["rounds"]}
    hashes = [task.pictures.facts.hashes[i] for i in task.split.index("test")]
    return {"right": right, "hashes": hashes, "train": len(task.labels("train")), "seconds": seconds} | about


def _label(way: str, share: float) -> str:
    return "full" if way == "full" else f"{way} {share:.0%}"


# ---------------------------------------------------------------------- all pieces together


def _summary(name: str, found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by way and share, and paired differences against magnitude's and the whole network's."""
    labels = list(dict.fromkeys(label for each in found.values() for label in each))
    runs = {
        label: {
            seed: Answers(np.array(each[label]["right"], dtype=bool), np.array(each[label]["hashes"]))
            for seed, each in found.items()
            if label in each
        }
        for label in labels
    }
    resampled = Resampled(runs)
    rows, differences = {}, {}
    print(f"  {name}: test accuracy, share of FLOPs and parameters left, seconds of training")
    for label in labels:
        mine = [each[label] for each in found.values() if label in each]
        interval = resampled.accuracy(label)
        rows[label] = {
            "accuracy": interval._asdict(),
            "by_seed": {seed: float(np.mean(each.right)) for seed, each in runs[label].items()},
            "flops": float(np.mean([each.get("flops", 1.0) for each in mine])),
            "params": int(np.mean([each["params"] for each in mine])),
            "seconds": float(np.median([each["seconds"] for each in mine])),
        }
        row = rows[label]
        print(
            f"    {label:<14} {interval.mean:6.1%}  {interval.lo:6.1%} to {interval.hi:6.1%}   "
            f"{row['flops']:4.0%} {row['params'] / 1e6:5.2f} M {row['seconds']:6.1f} s"
        )
        way, _, share = label.partition(" ")
        for other in ("full", *(f"{each} {share}" for each in WAYS[1:] if way == "taylor")):
            if other in runs and other != label:
                found_difference = resampled.difference(label, other)
                if found_difference is not None:
                    differences[f"{label} minus {other}"] = found_difference._asdict()
    test = sum(len(each.right) for each in next(iter(runs.values())).values()) if runs else 0
    return {"rows": rows, "differences": differences, "test_pictures": test}


def _judged(name: str, summary: dict[str, Any]) -> list[Check]:
    checks = []
    for label, each in summary["differences"].items():
        if label.startswith("taylor") and "minus magnitude" in label:
            spread = (100 * each["lo"], 100 * each["hi"])
            checks.append(
                Check(f"{name}: {label}, points", 100 * each["mean"], 0.0, at_least=True, spread=spread)
            )
    return checks


def _curves(details: dict[str, Any]) -> str:
    """Accuracy against FLOPs, a panel for every task."""
    panels = []
    for i, (name, summary) in enumerate(details.items()):
        rows = summary["rows"]
        means = [row["accuracy"]["mean"] for row in rows.values()]
        low, high = min(means) - 0.02, max(means) + 0.02
        left, top, wide, tall = 60 + 400 * i, 40, 320, 220

        def at(
            flops: float, accuracy: float, box: tuple[int, int, int, int, float, float]
        ) -> tuple[float, float]:
            left, top, wide, tall, low, high = box
            return left + wide * (1.05 - flops) / 0.7, top + tall * (high - accuracy) / (high - low)

        box = (left, top, wide, tall, low, high)
        parts = [f'<rect x="{left}" y="{top}" width="{wide}" height="{tall}" fill="none" stroke="#ccc"/>']
        parts.append(f'<text x="{left}" y="{top - 12}" font-weight="bold">{name}</text>')
        for tick in (1.0, *SHARES):
            x, _ = at(tick, low, box)
            parts.append(f'<text x="{x:.0f}" y="{top + tall + 18}" text-anchor="middle">{tick:.0%}</text>')
        for tick in np.arange(np.ceil(low * 20) / 20, high, 0.05):
            _, y = at(1.0, float(tick), box)
            parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:.0%}</text>')
            parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        for way, colour in COLOURS.items():
            mine = [(1.0, "full"), *((share, _label(way, share)) for share in SHARES)]
            points = [at(share, rows[each]["accuracy"]["mean"], box) for share, each in mine if each in rows]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        panels += parts
    legend = [
        f'<text x="{60 + 110 * i}" y="312" fill="{colour}">{way}</text>'
        for i, (way, colour) in enumerate(COLOURS.items())
    ]
    title = '<text x="60" y="334">test accuracy against the share of FLOPs that is left</text>'
    body = "\n".join([*panels, *legend, title])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{80 + 400 * len(details)}" height="350" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n{body}'
        "\n</svg>\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
