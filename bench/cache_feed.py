"""Claim: training from the cache is at least 0.9 times as fast as the same steps on one repeated tensor.

What feeding costs on top of computing: cutting the augmented pictures out of the decoded ones, normalising
them and laying them out, with the loop's defaults (no worker processes, standard augmentation). Pictures are
clipart of its real sizes, decoded once before anything is timed. Fed steps take the next batch of the loader
and train on it; bare steps train on one batch that lies ready. Both train the same network (`full` on
efficientnet-lite0, 128 px, batches of 32, CPU, the layout the loop chooses).

Steps of the two alternate one by one; a repeat is one epoch of the loader. Throughput is pictures per second
over the epoch, so a loader that stumbles now and then is seen; the number is the median over the epochs.
"""

from __future__ import annotations

import time

import torch

import clipart
import measurement
from headstart import registry
from headstart.data.loader import load
from headstart.nets import zoo
from headstart.nets.recipe import recipe
from headstart.records import Run
from headstart.training.machine import Machine, Placed
from measurement import Check, median

BOUND = 0.9
BATCH, SIZE = 32, 128


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="epochs that are timed")
    options = parser.parse_args()
    here = measurement.begin("cache_feed")
    per_class = {"train": 3, "val": 1, "test": 1} if options.quick else {"train": 30, "val": 10, "test": 10}
    size, batch = (64, 8) if options.quick else (SIZE, BATCH)
    pretrained = zoo.load(img_size=size)
    source = clipart.fetched(options.data)
    folder = clipart.divided(source, pretrained.preprocess, seed=0, per_class=per_class)
    task = load(Run(data=str(folder), img_size=size), pretrained.preprocess)
    machine = Machine("cpu")
    torch.manual_seed(0)
    method = registry.get("full")(pretrained.net, len(task.classes))
    chosen = recipe(method.net, train_size=len(task.labels("train")), batch_size=batch)
    method.norm = chosen.norm
    method.criterion = torch.nn.CrossEntropyLoss(label_smoothing=chosen.label_smoothing)
    train = task.train(batch, seed=0)
    machine.choose_layout(method.net, next(iter(train))[0], None)
    machine.place(method)
    phase = next(iter(method.phases(1, train)))
    optimizer = machine.optimizer(phase, chosen)
    trained = machine.wrap(method)
    batches = Placed(train, machine)
    ready = [(x.clone(), y.clone()) for x, y in batches]  # for bare steps of the sizes that fed steps have
    repeats, warmup = (2, 1) if options.quick else (options.repeats, 1)

    fed_speeds, bare_speeds = [], []
    for epoch in range(warmup + repeats):
        train.epoch = epoch
        waiting, seconds, seen = iter(batches), {"fed": 0.0, "bare": 0.0}, 0
        for number in range(len(train)):
            for kind in ("fed", "bare") if (epoch + number) % 2 else ("bare", "fed"):
                same = ready[0] if len(ready[number][1]) == batch else ready[number]
                start = time.perf_counter()
                x, y = next(waiting) if kind == "fed" else same
                machine.step(trained, optimizer, x, y, clip=chosen.clip)
                seconds[kind] += time.perf_counter() - start
            seen += len(ready[number][1])
        if epoch >= warmup:
            fed_speeds.append(seen / seconds["fed"])
            bare_speeds.append(seen / seconds["bare"])
    ratios = [fed / bare for fed, bare in zip(fed_speeds, bare_speeds, strict=True)]
    check = Check(
        "throughput from the cache / of one repeated batch",
        median(ratios),
        BOUND,
        at_least=True,
        spread=(min(ratios), max(ratios)),
    )
    details = {
        "fed_pictures_per_second": round(median(fed_speeds), 1),
        "bare_pictures_per_second": round(median(bare_speeds), 1),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "pictures": len(task.labels("train")),
        "channels_last": machine.channels_last,
    }
    print(f"  pictures per second: {median(fed_speeds):.1f} fed, {median(bare_speeds):.1f} bare")
    return measurement.finish(
        "cache_feed",
        "Training from the cache is at least 0.9 times as fast as the same steps on one repeated tensor.",
        here,
        [check],
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
