"""Claim: a training step of `l2-sp` costs at most 1.03 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures (SGD with Nesterov momentum; weight decay for `full`, which `l2-sp` replaces by its penalty).

Steps of the two alternate one by one; a round is six such pairs on networks built anew, and its ratio is
that of the medians of its steps. The number is the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch

import measurement
from headstart import registry
from headstart.nets.recipe import recipe
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 1.03
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet50": "resnet50"}
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300


def stepper(name: str, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One training step of a method, ready to be called."""
    torch.manual_seed(0)
    method = registry.get(name)(timm.create_model(architecture), CLASSES)
    chosen = recipe(method.net, train_size=PICTURES, batch_size=BATCH)
    method.norm = chosen.norm
    method.criterion = torch.nn.CrossEntropyLoss(label_smoothing=chosen.label_smoothing)
    machine.place(method)
    y = torch.arange(len(x)) % CLASSES
    phase = next(iter(method.phases(1, [(x, y)])))
    optimizer = machine.optimizer(phase, chosen)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # random weights on random pictures: keep every number finite
    trained = machine.wrap(method)

    def step() -> None:
        loss = machine.step(trained, optimizer, x, y, clip=chosen.clip)
        if not loss.total.isfinite():
            raise RuntimeError(f"The loss of {name} on {architecture} is {float(loss.total)}.")

    return step


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=6, help="alternating steps of each method in a round")
    options = parser.parse_args()
    here = measurement.begin("l2_sp_step")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    batch, size = (4, 64) if options.quick else (BATCH, SIZE)
    checks, details = [], {}
    for shown, architecture in NETS.items():
        machine = Machine("cpu")
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        machine.choose_layout(timm.create_model(architecture), x, None)
        x = machine.lay(x)
        start = time.perf_counter()
        took = []
        for i in range(rounds):
            # Built anew, in turns: where a network's memory happens to lie moves its time by several per
            # cent (two copies of `full` differ as much), and that must not always hit the same side.
            names = ("full", "l2-sp") if i % 2 else ("l2-sp", "full")
            both = {name: stepper(name, architecture, machine, x) for name in names}
            took.append(measurement.alternate(both["full"], both["l2-sp"], pairs, warmup=2))
        ratios = [median(slow) / median(fast) for fast, slow in took]
        checks.append(
            Check(
                f"l2-sp step / full step, {shown}",
                median(ratios),
                BOUND,
                at_least=False,
                spread=(min(ratios), max(ratios)),
            )
        )
        details[shown] = {
            "full_ms": round(1000 * median([each for fast, _ in took for each in fast]), 2),
            "l2_sp_ms": round(1000 * median([each for _, slow in took for each in slow]), 2),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "pairs_per_round": pairs,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"  {shown}: full {details[shown]['full_ms']} ms, l2-sp {details[shown]['l2_sp_ms']} ms a step")
    return measurement.finish(
        "l2_sp_step",
        "A training step of l2-sp costs at most 1.03 times one of full.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
