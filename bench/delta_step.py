"""Claim: a training step of `delta` costs at most 1.36 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures, with BatchNorm on the statistics of the batch. The channel weights are drawn, not measured: what
measuring them costs is in `delta_scoring`.

Counted in multiply-adds a source of the network's size makes it 1.33: one more forward beside a forward and a
backward of twice its work. Also measured, without a bound: the source in bfloat16, and with statistics of the
batch.

Steps take turns one by one; a round is six such turns on networks built anew, and its ratio is that of the
medians of its steps. The number is the median over the rounds. Memory is what one step keeps for its backward
pass, counted exactly: every storage once, weights not; and the source's weights.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch

import measurement
import one_step
from headstart import registry
from headstart.method import Method
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 1.36
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet50": "resnet50"}
FORMS: Mapping[str, Mapping[str, Any]] = {
    "delta": {},
    "delta, bf16 source": {"source_precision": "bf16"},
    "delta, matched source": {"source_bn": "match"},
}
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300


def built(name: str, architecture: str, x: torch.Tensor) -> Method:
    """A method on a network with random weights, its channels weighed at random."""
    torch.manual_seed(0)
    cls = registry.get(name.partition(",")[0])
    method = cls(timm.create_model(architecture), CLASSES, example=x[:1], **FORMS.get(name, {}))
    if name != "full":
        method._weigh = lambda _: weigh_at_random(method)
    return method


def weigh_at_random(method: Any) -> None:
    channels = [tap.channels for tap in method.taps]
    method.memory["deltas"] = torch.randn(sum(channels))
    method.memory["W"] = torch.cat([(torch.randn(each) / 5).softmax(0) for each in channels])


def stepper(name: str, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One training step of a method, ready to be called."""
    method = built(name, architecture, x)
    method.norm = "train"
    what = f"{name} on {architecture}"
    return one_step.ready(method, what, machine, x, classes=CLASSES, pictures=PICTURES, batch=BATCH)


def kept_for_backward(name: str, architecture: str, x: torch.Tensor) -> float:
    """MiB that the graph of one step holds."""
    return one_step.kept_for_backward(built(name, architecture, x), x, classes=CLASSES)


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=6, help="steps of each in a round")
    options = parser.parse_args()
    here = measurement.begin("delta_step")
    rounds, turns = (1, 1) if options.quick else (options.rounds, options.turns)
    batch, size = (4, 64) if options.quick else (BATCH, SIZE)
    checks, details = [], {}
    for shown, architecture in NETS.items():
        machine = Machine("cpu")
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        kept = {name: round(kept_for_backward(name, architecture, x)) for name in ("full", "delta")}
        weights = sum(p.numel() * p.element_size() for p in timm.create_model(architecture).parameters())
        machine.choose_layout(timm.create_model(architecture), x, None)
        x = machine.lay(x)
        start = time.perf_counter()
        took: dict[str, list[list[float]]] = {}
        for i in range(rounds):
            # Built anew, in turns: where the memory of a network happens to lie moves its time by per cents.
            names = ["full", *FORMS] if i % 2 else [*FORMS, "full"]
            steps = {name: stepper(name, architecture, machine, x) for name in names}
            for name, times in measurement.take_turns(steps, turns).items():
                took.setdefault(name, []).append(times)
        ratios = {
            name: [median(slow) / median(fast) for slow, fast in zip(took[name], took["full"], strict=True)]
            for name in FORMS
        }
        checks.append(
            Check(
                f"delta step / full step, {shown}",
                median(ratios["delta"]),
                BOUND,
                at_least=False,
                spread=(min(ratios["delta"]), max(ratios["delta"])),
            )
        )
        details[shown] = {
            "ms": {
                name: round(1000 * median(list(itertools.chain.from_iterable(times))), 2)
                for name, times in took.items()
            },
            "ratio": {name: round(median(each), 4) for name, each in ratios.items()},
            "ratios": {name: [round(ratio, 4) for ratio in each] for name, each in ratios.items()},
            "kept_for_backward_mib": kept,
            "source_weights_mib": round(weights / 2**20, 1),
            "turns_per_round": turns,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        for name in ("ms", "ratio", "kept_for_backward_mib"):
            print(f"  {shown}, {name}: {details[shown][name]}")
    return measurement.finish(
        "delta_step",
        "A training step of delta costs at most 1.36 times one of full.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
