"""Claim: `lp-ft` as it comes is at least as accurate as the better of two loops that had their rate tuned.

300 clipart training pictures (30 of each of ten classes), 5 epochs, 128 px, batches of 32, efficientnet-lite0
with its ImageNet weights. Compared are

- headstart's `lp-ft` with every value at its default;
- a plain PyTorch loop (`plain.torch_loop`: SGD with Nesterov momentum, cosine schedule);
- Hugging Face's `Trainer` (`plain.hugging_face`: its AdamW, linear schedule and clipping).

The two loops get three learning rates each, tried on every seed; the one with the best validation accuracy of
that seed (the first of equals) is tested, the others never are. Nobody chooses an epoch: the last one counts.

headstart's defaults (the rate of the family, LP-FT's penalty and head rate) were chosen on other splits of
the same drawings; the loops tune on these splits, and headstart does not.

Three seeds; a seed changes the split, the head, the order and the augmentation. All read the same files,
which were shrunk once (short side 160 px), on the same split, and are tested on the same pictures. The
difference is paired picture by picture; its 95 % interval resamples seeds, and test pictures within seeds.
The bound is on the mean: lp-ft minus the baseline with the higher mean test accuracy is 0 or more. Three
seeds are few: read the interval before believing a small difference.

Times are for information: they include decoding the shrunk files, and for the loops all three rates are shown
together as what tuning cost.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import clipart
import headstart
import measurement
import plain
from headstart.nets import zoo
from measurement import Check

# Half decades around the best of a coarse search on the validation pictures of another seed (99).
RATES = {"plain PyTorch loop": (0.007, 0.02, 0.06), "Hugging Face Trainer": (3e-4, 1e-3, 3e-3)}
DRAWS = 10_000


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    here = measurement.begin("accuracy")
    per_class = {"train": 3, "val": 1, "test": 2} if options.quick else {"train": 30, "val": 10, "test": 90}
    size, batch, epochs, seeds = (64, 8, 1, 2) if options.quick else (128, 32, 5, options.seeds)
    pretrained = zoo.load(img_size=size)
    source = clipart.fetched(options.data)
    asked: dict[str, Any] = {"epochs": epochs, "batch_size": batch}

    right: dict[str, list[np.ndarray]] = {}  # per seed, bool per test picture
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        folder = clipart.divided(source, pretrained.preprocess, seed=seed, per_class=per_class, shrunk=True)
        truth = plain.pictures(folder / "test", pretrained.preprocess, train=False).targets
        for name, compete in (
            ("headstart lp-ft", _lp_ft),
            ("plain PyTorch loop", _tuned(plain.torch_loop, RATES["plain PyTorch loop"])),
            ("Hugging Face Trainer", _tuned(plain.hugging_face, RATES["Hugging Face Trainer"])),
        ):
            said, row = compete(pretrained, folder, seed, asked)
            correct = said == np.array(truth)
            right.setdefault(name, []).append(correct)
            rows.append({"name": name, "seed": seed, "test_accuracy": float(correct.mean())} | row)
            print(
                f"  seed {seed}  {name:<21} test {correct.mean():.4f} (n={len(correct)})  "
                f"val {row['val_accuracy']:.3f}  {row['seconds']:.0f} s{row['note']}",
                flush=True,
            )

    means = {name: float(np.mean([each.mean() for each in per_seed])) for name, per_seed in right.items()}
    differences = {
        name: {"mean": means["headstart lp-ft"] - means[name], "interval": _interval(right, name)}
        for name in RATES
    }
    for name, mean in means.items():
        against = differences.get(name)
        shown = (
            ""
            if against is None
            else (
                f"  lp-ft differs by {100 * against['mean']:+.2f} points, 95 % interval "
                f"[{100 * against['interval'][0]:+.2f}, {100 * against['interval'][1]:+.2f}]"
            )
        )
        print(f"  {name:<21} {100 * mean:.2f} %{shown}")
    best = max(RATES, key=lambda name: means[name])
    low, high = differences[best]["interval"]
    check = Check(
        f"test accuracy of lp-ft minus that of the {best}",
        100 * differences[best]["mean"],
        0,
        at_least=True,
        unit=" points",
        spread=(100 * low, 100 * high),
    )
    details = {
        "mean_test_accuracy": means,
        "differences": differences,
        "runs": rows,
        "rates_tried": RATES,
        "test_pictures": [len(each) for each in right["headstart lp-ft"]],
        "interval_excludes_zero": low > 0 or high < 0,
    }
    return measurement.finish(
        "accuracy",
        "lp-ft as it comes is at least as accurate as the better of a plain PyTorch loop and Hugging Face's "
        "Trainer with tuned rates.",
        here,
        [check],
        details,
        quick=options.quick,
    )


def _lp_ft(
    pretrained: zoo.Pretrained, folder: Path, seed: int, asked: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train with headstart; predicted labels in the order in which `ImageFolder` lists the test pictures."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        trained = headstart.train(
            folder, out=out, method="lp-ft", img_size=pretrained.preprocess.size, seed=seed, **asked
        )
        took = time.perf_counter() - start
        stored = np.load(Path(out) / "predictions.npz")
        by_content = dict(zip(stored["test_hashes"], stored["test_probabilities"].argmax(1), strict=True))
    files = plain.pictures(folder / "test", pretrained.preprocess, train=False).samples
    said = np.array([by_content[hashlib.sha256(Path(path).read_bytes()).hexdigest()] for path, _ in files])
    val = trained.result.val
    return said, {
        "val_accuracy": val.accuracy if val is not None else float("nan"),
        "seconds": round(took, 1),
        "note": "",
    }


def _tuned(train: Callable[..., plain.Trained], rates: tuple[float, ...]) -> Callable[..., Any]:
    """Train with every rate and keep the one that validates best."""

    def compete(
        pretrained: zoo.Pretrained, folder: Path, seed: int, asked: dict[str, Any]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        start = time.perf_counter()
        tried = {
            rate: train(pretrained.net, folder, pretrained.preprocess, lr=rate, seed=seed, **asked)
            for rate in rates
        }
        took = time.perf_counter() - start
        rate = max(rates, key=lambda each: tried[each].val_accuracy)
        return tried[rate].predict("test"), {
            "val_accuracy": tried[rate].val_accuracy,
            "seconds": round(took, 1),
            "lr": rate,
            "val_accuracy_by_lr": {str(each): tried[each].val_accuracy for each in rates},
            "note": f" for {len(rates)} rates, took {rate:g}",
        }

    return compete


def _interval(right: dict[str, list[np.ndarray]], other: str) -> tuple[float, float]:
    """95 % interval of lp-ft's accuracy minus another's: bootstrap of seeds, and of pictures within seeds."""
    paired = [
        ours.astype(float) - theirs
        for ours, theirs in zip(right["headstart lp-ft"], right[other], strict=True)
    ]
    draw = np.random.default_rng(0)
    # [DRAWS, seeds]: every cell another resample of the pictures of a resampled seed
    which = draw.integers(len(paired), size=(DRAWS, len(paired)))
    means = np.empty(which.shape)
    for seed, values in enumerate(paired):
        cells = which == seed
        means[cells] = [
            values[draw.integers(len(values), size=len(values))].mean() for _ in range(int(cells.sum()))
        ]
    low, high = np.quantile(means.mean(1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    raise SystemExit(main())
