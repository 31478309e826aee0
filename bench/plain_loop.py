"""Claim: headstart's default loop is at least 1.7 times as fast as a plain PyTorch loop.

The whole job as a normal user does it: 300 clipart pictures of their real sizes (30 of each of ten classes),
5 epochs, 128 px, batches of 32, efficientnet-lite0, all weights learn; 100 pictures are validated after every
epoch and 100 others are tested at the end. Both start from folders of picture files and from weights in
memory; the time runs until the trained network and its scores lie on the disk.

- headstart: its defaults, with an empty cache in every repeat, so that decoding, hashing, looking for
  duplicates and writing the cache are in its time; so are measuring the layout, a checkpoint after every
  epoch, and the exported model.
- plain: `plain.torch_loop`: NCHW, float32, Pillow decodes every picture in every epoch in one worker process
  (`num_workers=1`), transparency thrown away (the cheapest decoding there is), BatchNorm in training mode as
  in any plain loop; the state dict is saved once.

headstart's default method is `lp-ft`, which does the same learning and solves the head before; with
`--methods full` the same learning is measured alone. The two sides alternate; each number is the ratio of
medians of five. Imports and loading the pretrained weights are in neither time; the files lie in the
system's cache for both.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch

import clipart
import measurement
import plain
from headstart.data.cache import quiet
from headstart.data.loader import load
from headstart.nets import zoo
from headstart.records import Run
from headstart.training.job import execute, prepare
from measurement import Check, median

BOUND = 1.7
LR = 0.01  # speed does not depend on it


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", default="lp-ft", help="of headstart's, separated by commas")
    options = parser.parse_args()
    methods = options.methods.split(",")
    here = measurement.begin("plain_loop")
    per_class = {"train": 3, "val": 1, "test": 1} if options.quick else {"train": 30, "val": 10, "test": 10}
    size, batch, epochs = (64, 8, 2) if options.quick else (128, 32, 5)
    pretrained = zoo.load(img_size=size)
    source = clipart.fetched(options.data)
    folder = clipart.divided(source, pretrained.preprocess, seed=0, per_class=per_class)
    with tempfile.TemporaryDirectory() as scratch:
        asked = Run(data=str(folder), img_size=size, batch_size=batch, epochs=epochs)
        runs = {method: asked.model_copy(update={"method": method}) for method in methods}
        # Loads the weights and settles the recipe; the pictures are loaded again while the clock runs.
        prepared = {method: prepare(run, say=quiet) for method, run in runs.items()}
        count = 0

        def headstart(method: str) -> float:
            nonlocal count
            count += 1
            ready = prepared[method]
            # Empty: neither decoded pictures nor the layout that an earlier repeat measured.
            os.environ["HEADSTART_CACHE"] = str(Path(scratch) / f"cache-{count}")
            start = time.perf_counter()
            task = load(ready.run, ready.pretrained.preprocess)
            result = execute(dataclasses.replace(ready, task=task), Path(scratch) / f"run-{count}")
            took = time.perf_counter() - start
            assert result.status == "finished"
            return took

        def torch_loop() -> float:
            start = time.perf_counter()
            trained = plain.torch_loop(
                pretrained.net,
                folder,
                pretrained.preprocess,
                epochs=epochs,
                batch_size=batch,
                lr=LR,
                seed=0,
                save=Path(scratch) / "plain.pt",
            )
            trained.predict("test")
            return time.perf_counter() - start

        times: dict[str, list[float]] = {"plain": [], **{method: [] for method in methods}}
        for repeat in range(1 if options.quick else options.repeats):
            for name in ("plain", *methods) if repeat % 2 else (*methods, "plain"):
                took = torch_loop() if name == "plain" else headstart(name)
                times[name].append(took)
                print(f"  {name:<6} {took:6.1f} s", flush=True)

    checks = []
    for method in methods:
        ratios = [slow / fast for slow, fast in zip(times["plain"], times[method], strict=True)]
        checks.append(
            Check(
                f"plain PyTorch loop's time / headstart's, {method}",
                median(times["plain"]) / median(times[method]),
                BOUND,
                at_least=True,
                spread=(min(ratios), max(ratios)),
            )
        )
    details = {
        "seconds": {name: round(median(values), 2) for name, values in times.items()},
        "all_seconds": {name: [round(each, 2) for each in values] for name, values in times.items()},
        "pictures": {side: len(list((folder / side).glob("*/*"))) for side in per_class},
        "epochs": epochs,
        "torch_threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    return measurement.finish(
        "plain_loop",
        "headstart's default loop is at least 1.7 times as fast as a plain PyTorch loop.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
