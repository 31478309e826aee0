"""Claim: a training step of `fitnets` (joint) costs at most 1.05 times a plain one and the source's forward.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. A resnet18 learns from an efficientnet-lite0, both with random weights, on a batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family.

Two numbers: multiply-adds as torch counts them, and time. For the time, a joint step and a plain step with
one forward of the source behind it alternate one by one; a round is six such pairs on networks built anew,
and its ratio is that of the medians. The number is the median over the rounds. The details add what a step of
the staged form costs in its two phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import measurement
from headstart import registry
from headstart.method import Method
from headstart.nets.recipe import recipe
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 1.05
NET, SOURCE = "resnet18", "tf_efficientnet_lite0"
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300

Step = Callable[[], None]


def stepper(machine: Machine, x: torch.Tensor, name: str, at: int = 0, **hyper: Any) -> tuple[Step, Method]:
    """One training step of a method in phase number `at` of its plan, ready to be called."""
    torch.manual_seed(0)
    source = timm.create_model(SOURCE) if registry.get(name).takes_source else None
    method = registry.get(name)(timm.create_model(NET), CLASSES, source=source, example=x[:1].cpu(), **hyper)
    chosen = recipe(method.net, train_size=PICTURES, batch_size=BATCH)
    method.norm = chosen.norm
    method.criterion = torch.nn.CrossEntropyLoss(label_smoothing=chosen.label_smoothing)
    machine.place(method)
    y = torch.arange(len(x)) % CLASSES
    walk = method.phases(4, [(x, y)])
    phase = [next(walk) for _ in range(at + 1)][at]
    optimizer = machine.optimizer(phase, chosen)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # random weights on random pictures: keep every number finite
    trained = machine.wrap(method)

    def step() -> None:
        loss = machine.step(trained, optimizer, x, y, clip=chosen.clip)
        if not loss.total.isfinite():
            raise RuntimeError(f"The loss of {name} is {float(loss.total)}.")

    return step, method


def plain(machine: Machine, x: torch.Tensor) -> tuple[Step, Step]:
    """A plain training step, and one with a forward of the whole source behind it."""
    step, _ = stepper(machine, x, "full")
    torch.manual_seed(0)
    source = timm.create_model(SOURCE).eval().requires_grad_(False)
    machine.place(source)

    def both() -> None:
        step()
        with torch.no_grad():
            source(x)

    return step, both


def multiply_adds(step: Step) -> float:
    """10⁹ per call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2e9


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=6, help="alternating steps of each in a round")
    options = parser.parse_args()
    here = measurement.begin("fitnets_step")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    batch, size = (CLASSES, 64) if options.quick else (BATCH, SIZE)
    machine = Machine("cpu")
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    machine.choose_layout(timm.create_model(NET), x, None)
    x = machine.lay(x)
    start = time.perf_counter()

    def fitnets(at: int = 0, **hyper: Any) -> Step:
        return stepper(machine, x, "fitnets", at, **hyper)[0]

    alone, with_source = plain(machine, x)
    counted = {
        "plain": multiply_adds(alone),
        "plain and the source's forward": multiply_adds(with_source),
        "joint": multiply_adds(fitnets(mode="joint")),
        "staged, hint": multiply_adds(fitnets(0)),
        "staged, distil": multiply_adds(fitnets(1)),
    }
    took = []
    for i in range(rounds):
        # Built anew, in turns, as in l2_sp_step.py: where a network's memory lies moves its time.
        if i % 2:
            both, joint = plain(machine, x)[1], fitnets(mode="joint")
        else:
            joint, both = fitnets(mode="joint"), plain(machine, x)[1]
        took.append(measurement.alternate(both, joint, pairs, warmup=2))
    ratios = [median(slow) / median(fast) for fast, slow in took]
    timed = {}
    for name, step in {
        "staged, hint": fitnets(0),
        "staged, distil": fitnets(1),
        "joint": fitnets(mode="joint"),
        "plain": alone,
    }.items():
        fast, slow = measurement.alternate(alone, step, pairs, warmup=2)
        timed[name] = round(median(slow) / median(fast), 3)
    checks = [
        Check(
            "joint / (plain and the source's forward), multiply-adds",
            counted["joint"] / counted["plain and the source's forward"],
            BOUND,
            at_least=False,
        ),
        Check(
            "joint / (plain and the source's forward), time",
            median(ratios),
            BOUND,
            at_least=False,
            spread=(min(ratios), max(ratios)),
        ),
    ]
    details = {
        "gmacs_per_step": {name: round(each, 3) for name, each in counted.items()},
        "times_a_plain_step": timed,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "joint_ms": round(1000 * median([each for _, slow in took for each in slow]), 2),
        "plain_and_source_ms": round(1000 * median([each for fast, _ in took for each in fast]), 2),
        "pairs_per_round": pairs,
        "channels_last": machine.channels_last,
        "seconds": round(time.perf_counter() - start, 1),
    }
    for name, each in counted.items():
        more = f", {timed[name]} × a plain step" if name in timed else ""
        print(f"  {name}: {each:.2f} G multiply-adds{more}")
    return measurement.finish(
        "fitnets_step",
        "A step of fitnets (joint) costs at most 1.05 times a plain one and the source's forward.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
