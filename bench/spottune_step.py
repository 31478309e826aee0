"""Claim: a training step of `spottune` costs at most 2.0 times one of `full`, and predicting 1.4 times.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures, with BatchNorm on the statistics of the batch. Counted in multiply-adds it is 5/3 for the blocks
(two forwards, of the frozen copy only the gradient of its input), and three times the policy network.

Predicting is `predict` of 64 such pictures against the network alone. Each picture runs through one copy of
each block, drawn anew for each block with an even chance, which divides every batch: the worst case. Beside
it stand both copies on all pictures (naive), and the static export.

What is compared alternates one by one; a round is six such turns on networks built anew, and its ratio is
that of the medians. The number is the median over the rounds. Memory is what one step keeps for its backward
pass, counted exactly: every storage once, weights not.
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
from headstart.methods.route.spottune import SpotTune
from headstart.parts.routed import blend
from headstart.training.machine import Machine
from measurement import Check, median

TRAINING, PREDICTING = 2.0, 1.4
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet18": "resnet18", "resnet50": "resnet50"}
CLASSES, BATCH, SIZE, PICTURES, AT_ONCE = 10, 32, 128, 300, 64


def built(name: str, architecture: str, x: torch.Tensor) -> Method:
    """A method on a network with random weights."""
    torch.manual_seed(0)
    cls = SpotTune if name == "spottune" else registry.get(name)
    method = cls(timm.create_model(architecture), CLASSES, example=x[:1])
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


def predictors(architecture: str, machine: Machine, x: torch.Tensor) -> dict[str, Callable[[], None]]:
    """The ways to predict a batch, each ready to be called."""
    method = built("spottune", architecture, x)
    machine.place(method)
    method.eval()
    static = method.export(static=True).to(memory_format=machine_format(machine))
    assert isinstance(method, SpotTune)
    even = torch.rand(len(x), len(method.units), generator=torch.Generator().manual_seed(1)) < 0.5

    def even_choices(x: torch.Tensor) -> torch.Tensor:
        method.policy(x)  # which costs what it costs
        return even

    method.routes = even_choices

    @torch.inference_mode()
    def call(what: Callable[[torch.Tensor], torch.Tensor]) -> None:
        what(x)

    return {
        "plain": lambda: call(method.net),
        "divided": lambda: call(method.predict),
        "naive": lambda: call(lambda x: method._along(x, even_choices(x), blend)),
        "static": lambda: call(static),
    }


def machine_format(machine: Machine) -> torch.memory_format:
    return torch.channels_last if machine.channels_last else torch.contiguous_format


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=6, help="alternating steps of each method in a round")
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    options = parser.parse_args()
    here = measurement.begin("spottune_step")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    batch, at_once, size = (4, 8, 64) if options.quick else (BATCH, AT_ONCE, SIZE)
    checks, details = [], {}
    for shown in options.nets:
        architecture = NETS[shown]
        machine = Machine("cpu")
        pictures = torch.randn(at_once, 3, size, size, generator=torch.Generator().manual_seed(0))
        kept = {
            name: round(kept_for_backward(name, architecture, pictures[:batch]))
            for name in ("full", "spottune")
        }
        machine.choose_layout(timm.create_model(architecture), pictures[:batch], None)
        x, many = machine.lay(pictures[:batch]), machine.lay(pictures)
        start = time.perf_counter()
        steps, predicted = [], {"divided": [], "naive": [], "static": []}
        for i in range(rounds):
            # Built anew, in turns: where a network's memory lies moves its time by several per cent.
            names = ("full", "spottune") if i % 2 else ("spottune", "full")
            both = {name: stepper(name, architecture, machine, x) for name in names}
            steps.append(measurement.alternate(both["full"], both["spottune"], pairs, warmup=2))
            ways = predictors(architecture, machine, many)
            for way in predicted:
                predicted[way].append(measurement.alternate(ways["plain"], ways[way], pairs, warmup=2))
        ratios = {
            way: [median(slow) / median(fast) for fast, slow in took]
            for way, took in {"step": steps, **predicted}.items()
        }
        for way, what, bound in (
            ("step", "step / full step", TRAINING),
            ("divided", "predict / network alone", PREDICTING),
        ):
            worst = (min(ratios[way]), max(ratios[way]))
            name = f"spottune {what}, {shown}"
            checks.append(Check(name, median(ratios[way]), bound, at_least=False, spread=worst))
        details[shown] = {
            "full_ms": round(1000 * median([each for fast, _ in steps for each in fast]), 2),
            "spottune_ms": round(1000 * median([each for _, slow in steps for each in slow]), 2),
            "kept_for_backward_mib": kept,
            "ratios": {way: [round(each, 4) for each in found] for way, found in ratios.items()},
            "medians": {way: round(median(found), 3) for way, found in ratios.items()},
            "pairs_per_round": pairs,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"  {shown}: {details[shown]['medians']}, kept {kept['full']} and {kept['spottune']} MiB")
    return measurement.finish(
        "spottune_step",
        "A training step of spottune costs at most 2.0 times one of full, predicting at most 1.4 times.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
