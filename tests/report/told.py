"""A comparison's folder, made up: tiny pictures, made-up answers, and what each method leaves to be seen."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headstart.comparison import ledger
from headstart.comparison.ledger import Entry
from headstart.comparison.verdict import judge
from headstart.disk import write_text
from headstart.records import Fingerprints, Parameters, PhaseTime, Recipe, Result, Run, Score

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
CLASSES = ("apple", HOSTILE, "pear & quince</script><script>document.title='owned'</script>", "plum")
# Those with a picture of their own, and those without.
EVERY = (
    *("probe", "full", "l2-sp", "delta", "hybrid-forward"),
    *("l2t-ww", "transtailor", "spottune", "adafilter"),
)
# All that is drawn of them, by id.
FIGURES = {
    *("differences", "runs", "cost", "learning-curve", "search", "training", "loss-task", "loss-2"),
    *("confusion", "calibration", "coverage", "classes"),
    *("inside-2-distance", "inside-3-channels", "inside-4-losses", "inside-5-pairs", "inside-6-flops"),
    *("inside-6-kept", "inside-7-routes", "inside-8-routes"),
}
SECONDS = {"probe": 4.0, "full": 60.0, "l2-sp": 66.0, "delta": 70.0, "hybrid-forward": 140.0, "l2t-ww": 200.0}
ADVICE = "200 more labels bring about +1.5 points; another method +0.2."
LAYERS = ("stem", "layer1.0", "layer1.1", "layer2.0")


def folder(
    where: Path,
    methods: Sequence[str] = ("probe", "full", "l2-sp"),
    *,
    seeds: int = 2,
    n: int = 80,
    right: dict[str, float] | None = None,
    classes: Sequence[str] = CLASSES,
    epochs: int = 3,
    pictures: bool = True,
) -> Path:
    """Write what `compare` would leave, in `where`/compared; the pictures lie in `where`/photos."""
    rng = np.random.default_rng(0)
    photos, out = where / "photos", where / "compared"
    (out / "runs").mkdir(parents=True)
    names = _pictures(photos, rng, classes, n if pictures else 0)
    entries = []
    for seed in range(seeds):
        labels = {side: rng.integers(0, len(classes), n) for side in ledger.SPLITS}
        hard = {side: rng.random(n) for side in ledger.SPLITS}
        for method in methods:
            share = (right or {}).get(method, 0.8)
            run = Run(
                data=str(photos), method=method.partition(":")[0], seed=seed, epochs=epochs, img_size=32
            )
            name = f"runs/{method.replace(':', '-')}-{seed:012d}-s{seed}"
            entry = Entry(method, run, status="finished", folder=name)
            _run(out / name, entry, share, labels, hard, names, classes, rng)
            entry.result, entry.answers = ledger.look(out / name) or (None, {})
            entries.append(entry)
    ledger.write_table(out / "results.csv", entries)
    verdict = judge(entries, labels=list(methods), baseline="full" if "full" in methods else methods[0])
    write_text(out / "verdict.json", verdict.model_dump_json(indent=2))
    asked = {
        "format": 1,
        "methods": list(methods),
        "command": f"headstart compare {photos} --methods {','.join(methods)}",
        "runs": [{"method": each.label, "run": each.run.model_dump(mode="json")} for each in entries],
        "test": [{"split": s, "hash": "ab" * 32, "n": n, "looks": len(methods)} for s in range(seeds)],
    }
    write_text(out / "compare.json", json.dumps(asked))
    return out


def everything(where: Path) -> Path:
    """A comparison of which every figure can be drawn."""
    out = folder(where, EVERY)
    more(out, EVERY)
    return out


def more(out: Path, methods: Sequence[str], *, seeds: int = 2) -> None:
    """What searches, a learning curve and an audit leave beside the rest, so that every figure is drawn."""
    shared = {"low": 0.1, "high": 10.0, "log": True}
    own = {"l2-sp": {"alpha": {"low": 0.0001, "high": 1.0, "log": True, "off": 0.0}}}
    space = {m: {"lr": shared, "weight_decay": shared} | own.get(m, {}) for m in methods}
    space |= {"probe": {"C": {"low": 1e-05, "high": 10.0, "log": True}}} if "probe" in methods else {}
    studies = [
        {
            "method": method,
            "split": split,
            "train_size": None,
            "seconds": 12.0,
            "chosen": 2,
            "axes": space[method],
            "trials": [_trial(method, number, split) for number in range(4)],
        }
        for split in range(seeds)
        for method in methods
    ]
    told = {"trials": 4, "budget": None, "objective": "accuracy on val", "studies": studies}
    write_text(out / "search.json", json.dumps(told))
    asked = json.loads((out / "compare.json").read_text())
    asked["tuning"] = {"trials": 4, "budget_seconds": None, "objective": "accuracy on val", "space": space}
    asked["spent"] = {method: {"trials": 4 * seeds, "seconds": 12.0 * seeds} for method in methods}
    write_text(out / "compare.json", json.dumps(asked))
    points = [
        {"labels": n, "share": n / 240, "mean": a, "lo": a - 0.1, "hi": a + 0.1}
        for n, a in ((60, 0.6), (240, 0.8))
    ]
    curve = {"curves": [{"method": methods[0], "points": points}], "advice": ADVICE}
    write_text(out / "curve.json", json.dumps(curve))
    audit = {
        "pictures": 90,
        "readable": 88,
        "classes": {"apple": 40},
        "unreadable": {"bad.png": "cut off"},
        "duplicates": [["a", "b"]],
        "imbalance": 2.0,
        "median_side": 300,
        "smallest_side": 32,
        "notes": ["One class is small."],
    }
    write_text(out / "audit.json", json.dumps(audit))


def _trial(method: str, number: int, split: int) -> dict[str, Any]:
    """Of four: the method as it is, l2-sp then turned off, the best, and one that failed."""
    kind = ("default", "off" if method == "l2-sp" else "sampled", "sampled", "sampled")[number]
    values = {"alpha": 0.0} if kind == "off" else {"lr": 0.003 * number} if number else {}
    failed = number == 3
    accuracy = None if failed else 0.70 + 0.02 * number + 0.01 * split
    return {
        "number": number,
        "kind": kind,
        "state": "failed" if failed else "finished",
        "values": values,
        "val_accuracy": accuracy,
        "val_log_loss": None if failed else 0.7,
        "value": accuracy,
        "seconds": 3.0,
        "epochs": 0 if failed else 3,
        "run": f"{method}-{number:012d}-s{split}",
        "reason": "out of memory" if failed else None,
    }


def _pictures(photos: Path, rng: np.random.Generator, classes: Sequence[str], n: int) -> list[str]:
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i:03d}.png")
    return [f"{i:03d}.png" for i in range(n)]


def _run(
    folder: Path,
    entry: Entry,
    share: float,
    labels: dict[str, np.ndarray],
    hard: dict[str, np.ndarray],
    names: list[str],
    classes: Sequence[str],
    rng: np.random.Generator,
) -> None:
    folder.mkdir(parents=True)
    run, k = entry.run, len(classes)
    arrays: dict[str, np.ndarray] = {}
    scores = {}
    for side, truth in labels.items():
        n = len(truth)
        is_right = 0.7 * hard[side] + 0.3 * rng.random(n) < np.quantile(hard[side], share)
        answer = np.where(is_right, truth, (truth + 1 + rng.integers(0, k - 1, n)) % k)
        sure = rng.uniform(0.5, 0.95, n)
        said = np.repeat(((1 - sure) / (k - 1))[:, None], k, 1)
        said[np.arange(n), answer] = sure
        arrays[f"{side}_probabilities"] = said.astype(np.float32)
        arrays[f"{side}_labels"] = truth
        arrays[f"{side}_hashes"] = np.array(
            [hashlib.sha256(f"{side}{run.seed}{i}".encode()).hexdigest() for i in range(n)]
        )
        accuracy = float((answer == truth).mean())
        scores[side] = Score(
            n=n,
            accuracy=accuracy,
            balanced_accuracy=accuracy,
            macro_f1=accuracy,
            log_loss=0.7,
            calibration_error=0.05,
        )
    np.savez_compressed(folder / "predictions.npz", **arrays)
    with (folder / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split", "sha256"))
        for side in ledger.SPLITS:
            for i, (label, sha) in enumerate(zip(labels[side], arrays[f"{side}_hashes"], strict=True)):
                writer.writerow((names[i] if i < len(names) else f"{i}.png", classes[label], side, sha))
    if run.method != "probe":
        lines = [json.dumps(_epoch(run.method, epoch, run.epochs)) for epoch in range(1, run.epochs + 1)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = Result(
        status="finished",
        run=run,
        method=run.method,
        model="tiny",
        recipe=Recipe(optimizer="sgd", lr=0.01, weight_decay=1e-4),
        classes=list(classes),
        fingerprints=Fingerprints(source="c" * 64, data="d" * 64),
        split_seed=run.seed,
        seed=run.seed,
        epochs=run.epochs,
        phases=[PhaseTime(name="fine-tune", epochs=run.epochs, seconds=1.0)],
        seconds=SECONDS.get(run.method, 80.0),
        peak_memory_mb=900.0,
        ms_per_image=2.5,
        flops=4_000_000,
        n_train=240,
        device="cpu, 2 threads",
        parameters=Parameters(trained=1000 if run.method == "probe" else 500_000, shipped=500_000),
        diagnostics=diagnostics(run.method, run.epochs, len(classes)),
        versions={"python": "3.11.7", "headstart": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        **scores,
    )
    (folder / "result.json").write_text(json.dumps(result.model_dump(mode="json")))


def _epoch(method: str, epoch: int, epochs: int) -> dict[str, Any]:
    parts = {"task": 2.0 / epoch}
    if method == "l2-sp":
        parts |= {"shared": 0.1 * epoch, "new": 0.01}
    loss = sum(parts.values())
    accuracy = 0.8 - 0.5 / epoch
    return {"phase": "fine-tune", "epoch": epoch, "epochs": epochs, "lr": 0.01, "loss": loss, **parts} | {
        "train_accuracy": accuracy,
        "val_accuracy": accuracy,
        "val_log_loss": loss,
        "seconds": 1.0,
    }


def diagnostics(method: str, epochs: int, k: int) -> dict[str, Any]:
    """What each method leaves, in the shape it has."""
    over = range(1, epochs + 1)
    if method == "l2-sp":
        far = {name: 0.01 * 10**i for i, name in enumerate(LAYERS)}
        seen = [
            {"epoch": e, "distance": {"total": 1.0 * e, "layers": {m: v * e for m, v in far.items()}}}
            for e in over
        ]
        return {"membership": {"shared": 400, "new": 20, "free": 3}, "over_time": seen}
    if method == "delta":
        weights = [0.5, 0.2, 0.1, 0.1, 0.1]
        tap = {"name": "layer1", "channels": 5, "stride": 4, "effective": 0.7, "weights": weights}
        return {"taps": [tap, tap | {"name": "layer2"}]}
    if method == "hybrid-forward":
        seen = [{"epoch": e, "losses": {"path1": 2.0 / e, "path2": 1.5 / e, "task": 1.0 / e}} for e in over]
        return {"paths": {"path1": ["net", "source"]}, "over_time": seen}
    if method == "l2t-ww":
        pairs = [
            {"source": f"s{i}", "net": f"n{j}", "lambda": 0.1 * i + j, "entropy": 1.0}
            for i in (0, 1)
            for j in (0, 1)
        ]
        return {"over_time": [{"epoch": e, "pairs": pairs} for e in over]}
    if method == "transtailor":
        sizes = {"conv1": 16, "conv2": 32}
        rounds = [
            {
                "flops": 0.8,
                "params": 0.9,
                "accuracy": 0.81,
                "accepted": True,
                "kept": {"conv1": 14, "conv2": 30},
            },
            {
                "flops": 0.6,
                "params": 0.7,
                "accuracy": None,
                "accepted": False,
                "kept": {"conv1": 9, "conv2": 22},
            },
        ]
        return {"channels": sizes, "rounds": rounds, "after": {"flops": 10}}
    if method == "spottune":
        by_class = [[0.1 * c, 0.5, 1.0] for c in range(k)]
        return {
            "blocks": ["b0", "b1", "b2"],
            "by_class": by_class,
            "static": {"kept": ["b2"], "agreement": 0.9},
        }
    if method == "adafilter":
        layers = [{"layer": f"conv{i}", "filters": 8, "histogram": [1] * 10} for i in range(3)]
        return {
            "layers": layers,
            "classes": [[0.4, 0.5, 0.6] for _ in range(k)],
            "static": {"agreement": 0.97, "pictures": 40},
        }
    return {}
