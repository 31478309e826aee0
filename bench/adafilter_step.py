"""Claim: a training step of `adafilter` costs at most 2.2 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures. Every layer but the head runs twice going forward, and the pretrained filters pass gradients on.

Steps of the two alternate one by one; a round is six such pairs on networks built anew, and its ratio is
that of the medians of its steps. The number is the median over the rounds. The details add what a picture
costs when it is looked at, with all gates, and in the static export; and how much memory forward and backward
take beyond what lies there before, for each of the two methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import timm
import torch

import measurement
from headstart import registry
from headstart.nets.recipe import recipe
from headstart.training.machine import Machine
from measurement import Check, median

BOUND = 2.2
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet50": "resnet50"}
VARIANTS = ("adafilter", "adafilter-fisher", "l1-sp", "gl-sp")
CLASSES, BATCH, SIZE, PICTURES = 10, 32, 128, 300


def stepper(name: str, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One training step of `full`, or of a variant of `adafilter`, ready to be called."""
    torch.manual_seed(0)
    hyper = {} if name == "full" else {"variant": name}
    cls = registry.get("full" if name == "full" else "adafilter")
    method = cls(timm.create_model(architecture), CLASSES, **hyper)
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


def take_turns(steps: Mapping[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of each step, run in turns; who goes first changes every time."""
    names = list(steps)
    took: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, turns):  # two to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if turn >= 0:
                took[name].append(time.perf_counter() - start)
    return took


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6, help="steps of each in a round")
    options = parser.parse_args()
    here = measurement.begin("adafilter_step")
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
            took.append(take_turns({name: stepper(name, architecture, machine, x) for name in order}, turns))
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
        "adafilter_step",
        "A training step of any member of the L2-SP family costs at most 2.2 times one of full.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
