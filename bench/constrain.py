"""What the constrain methods do on real pictures, and what a stronger constraint does to the weights.

About 300 clipart training pictures of ten classes, 128 px, efficientnet-lite0 with its ImageNet weights,
4 epochs, three seeds, each with a split of its own. One comparison of headstart's own: every member of the
L2-SP family and both forms of DELTA at their defaults, Hybrid Forward, alpha swept over decades for L2-SP and
DELTA, and `full` as the baseline. Same splits, order, augmentation and epochs for all.

Judged is what theory says and not who wins: a larger alpha leaves the weights nearer to the source (L2-SP)
or the maps (DELTA). The distance is ||w - w0|| over all kernels of the body, read from the saved models.

Accuracies are shown with their 95 % intervals and stand in the written record; no alpha is chosen by them.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import headstart
import measurement
from clipart import drawn
from headstart.cli.compare import show
from headstart.cli.progress import reporter
from headstart.data.catalogue import fetch
from headstart.nets import zoo
from measurement import DATA, Check

SWEEPS = {
    "l2-sp": [f"l2-sp[alpha={alpha}]" for alpha in ("0.001", "0.01", "0.1", "1")],
    "delta": [f"delta[alpha={alpha}]" for alpha in ("0.064", "0.64", "6.4")],
}
METHODS = [
    "full",
    "l2-sp[variant=l2]",
    *SWEEPS["l2-sp"],
    "l2-sp[variant=l2-sp-fisher]",
    "l2-sp[variant=l1-sp]",
    "l2-sp[variant=gl-sp]",
    "l2-sp[variant=gl-sp-fisher]",
    *SWEEPS["delta"],
    "delta[attention=false]",
    "hybrid-forward",
]


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DATA / "compared-constrain", help="goes on where it was")
    options = parser.parse_args()
    here = measurement.begin("constrain")
    size, batch, epochs, seeds = (64, 8, 1, 1) if options.quick else (128, 32, 4, options.seeds)
    pretrained = zoo.load(img_size=size)
    if options.data is None:
        folder = fetch("clipart", DATA / "clipart-75", per_class=75)
    else:
        folder = drawn("clipart", options.data, per_class=75)
    start = time.perf_counter()
    done = headstart.compare(
        folder,
        ["full", *SWEEPS["l2-sp"][:2]] if options.quick else METHODS,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch,
        img_size=size,
        split=(0.42, 0.18, 0.4),  # about 300 pictures to learn from
        out=options.out.with_name(options.out.name + "-quick") if options.quick else options.out,
        reporter=reporter(),
    )
    show(done)
    kernels = {name: each for name, each in pretrained.net.state_dict().items() if each.ndim >= 2}
    moved: dict[str, list[float]] = {}
    for run, label in zip(done.folders, done.labels, strict=True):
        state = load_file(run / "model" / "model.safetensors")
        moved.setdefault(label, []).append(_distance(state, kernels))
    mean = {label: sum(values) / len(values) for label, values in moved.items()}
    for label in done.judgement.rows:
        print(f"  {label.method:<32} ||w - w0|| {mean.get(label.method, math.nan):8.3f}")
    checks = [
        Check(
            f"{name}: ||w - w0|| of one alpha / of the next smaller one, largest",
            max(mean[after] / mean[before] for before, after in itertools.pairwise(labels)),
            1.0,
            at_least=False,
        )
        for name, labels in SWEEPS.items()
        if all(label in mean for label in labels)
    ]
    details: dict[str, Any] = {
        "sentence": done.verdict,
        "rows": [row.model_dump(mode="json") for row in done.judgement.rows],
        "distance_to_source": mean,
        "test_pictures": done.results[0].test.n if done.results and done.results[0].test else None,
        "epochs": epochs,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return measurement.finish(
        "constrain",
        "A larger alpha leaves the weights nearer to the source, for L2-SP and for DELTA.",
        here,
        checks,
        details,
        quick=options.quick,
    )


def _distance(state: dict[str, torch.Tensor], kernels: dict[str, torch.Tensor]) -> float:
    shared = [
        (state[name] - start).double().square().sum()
        for name, start in kernels.items()
        if name in state and state[name].shape == start.shape
    ]
    return math.sqrt(float(torch.stack(shared).sum()))


if __name__ == "__main__":
    raise SystemExit(main())
