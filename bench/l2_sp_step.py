"""Claim: a training step of any member of the L2-SP family costs at most 1.03 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. All train the same architecture with random weights on the same batch of 32 pictures of 128 px on the
CPU, in the memory layout the loop chooses, under the recipe of the network's family for few pictures (SGD
with Nesterov momentum; weight decay for `full`, which the penalties replace). The Fisher information is
estimated before the first step and is not part of it.

Steps take turns one by one; a round is six such turns on networks built anew, and its ratio is that of the
medians of its steps. The number is the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch

import measurement
import one_step
from headstart import registry
from headstart.nets.recipe import recipe
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 1.03
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet50": "resnet50"}
VARIANTS = ("l2-sp", "l2-sp-fisher", "l1-sp", "gl-sp")
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300


def stepper(name: str, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One training step of `full`, or of a variant of `l2-sp`, ready to be called."""
    torch.manual_seed(0)
    hyper = {} if name == "full" else {"variant": name}
    cls = registry.get("full" if name == "full" else "l2-sp")
    method = cls(timm.create_model(architecture), CLASSES, **hyper)
    method.norm = recipe(method.net, train_size=PICTURES, batch_size=BATCH).norm
    what = f"{name} on {architecture}"
    return one_step.ready(method, what, machine, x, classes=CLASSES, pictures=PICTURES, batch=BATCH)


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6, help="steps of each in a round")
    options = parser.parse_args()
    here = measurement.begin("l2_sp_step")
    rounds, turns = (1, 1) if options.quick else (options.rounds, options.turns)
    batch, size = (4, 64) if options.quick else (BATCH, SIZE)
    checks, details = [], {}
    for shown, architecture in NETS.items():
        machine = Machine("cpu")
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        machine.choose_layout(timm.create_model(architecture), x, None)
        x = machine.lay(x)
        start = time.perf_counter()
        took = []
        names = ["full", *VARIANTS]
        for i in range(rounds):
            # Built anew, in turns: where a network's memory happens to lie moves its time by several per
            # cent (two copies of `full` differ as much), and that must not always hit the same one.
            first = i % len(names)
            order = names[first:] + names[:first]
            took.append(
                measurement.take_turns(
                    {name: stepper(name, architecture, machine, x) for name in order}, turns
                )
            )
        details[shown] = {
            "turns_per_round": turns,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        for name in names:
            middle = 1000 * median([each for one in took for each in one[name]])
            ratios = [median(one[name]) / median(one["full"]) for one in took]
            details[shown][name] = {
                "step_ms": round(middle, 2),
                "ratios": [round(ratio, 4) for ratio in ratios],
            }
            print(f"  {shown}: {name} {middle:.1f} ms a step")
            if name != "full":
                checks.append(
                    Check(
                        f"{name} step / full step, {shown}",
                        median(ratios),
                        BOUND,
                        at_least=False,
                        spread=(min(ratios), max(ratios)),
                    )
                )
    return measurement.finish(
        "l2_sp_step",
        "A training step of any member of the L2-SP family costs at most 1.03 times one of full.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
