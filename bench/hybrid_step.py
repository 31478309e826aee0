"""Claim: a training step of `hybrid-forward` costs at most 3.3 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures, with BatchNorm on the statistics of the batch. The teacher is the network itself, cut twice.

Counted in multiply-adds a teacher of the student's size makes it 2.67: the student's forward and backward
once more, and the teacher's forward and the gradient of its input. What `hybrid-forward` saves of that is
that the first segment of the student runs once for two paths.

Steps of the two alternate one by one; a round is six such pairs on networks built anew, and its ratio is
that of the medians of its steps. The number is the median over the rounds. Memory is what one step keeps for
its backward pass, counted exactly: every storage once, weights not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch

import measurement
import one_step
from headstart import registry
from headstart.method import Method
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 3.3
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet50": "resnet50"}
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300


def built(name: str, architecture: str, x: torch.Tensor) -> Method:
    """A method on a network with random weights."""
    torch.manual_seed(0)
    method = registry.get(name)(timm.create_model(architecture), CLASSES, example=x[:1])
    method.norm = "train"
    return method


def stepper(name: str, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One training step of a method, ready to be called."""
    method = built(name, architecture, x)
    what = f"{name} on {architecture}"
    return one_step.ready(method, what, machine, x, classes=CLASSES, pictures=PICTURES, batch=BATCH)


def kept_for_backward(name: str, architecture: str, x: torch.Tensor) -> float:
    """MiB that the graph of one step holds."""
    return one_step.kept_for_backward(built(name, architecture, x), x, classes=CLASSES)


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=6, help="alternating steps of each method in a round")
    options = parser.parse_args()
    here = measurement.begin("hybrid_step")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    batch, size = (4, 64) if options.quick else (BATCH, SIZE)
    checks, details = [], {}
    for shown, architecture in NETS.items():
        machine = Machine("cpu")
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        kept = {name: round(kept_for_backward(name, architecture, x)) for name in ("full", "hybrid-forward")}
        machine.choose_layout(timm.create_model(architecture), x, None)
        x = machine.lay(x)
        start = time.perf_counter()
        took = []
        for i in range(rounds):
            # Built anew, in turns: where a network's memory lies moves its time by several per cent.
            names = ("full", "hybrid-forward") if i % 2 else ("hybrid-forward", "full")
            both = {name: stepper(name, architecture, machine, x) for name in names}
            took.append(measurement.alternate(both["full"], both["hybrid-forward"], pairs, warmup=2))
        ratios = [median(slow) / median(fast) for fast, slow in took]
        checks.append(
            Check(
                f"hybrid-forward step / full step, {shown}",
                median(ratios),
                BOUND,
                at_least=False,
                spread=(min(ratios), max(ratios)),
            )
        )
        details[shown] = {
            "full_ms": round(1000 * median([each for fast, _ in took for each in fast]), 2),
            "hybrid_forward_ms": round(1000 * median([each for _, slow in took for each in slow]), 2),
            "kept_for_backward_mib": kept,
            "ratios": [round(ratio, 4) for ratio in ratios],
            "pairs_per_round": pairs,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(
            f"  {shown}: full {details[shown]['full_ms']} ms and {kept['full']} MiB, hybrid-forward "
            f"{details[shown]['hybrid_forward_ms']} ms and {kept['hybrid-forward']} MiB a step"
        )
    return measurement.finish(
        "hybrid_step",
        "A training step of hybrid-forward costs at most 3.3 times one of full.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
