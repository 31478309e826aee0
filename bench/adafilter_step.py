"""Claim: a training step of `adafilter` costs at most 2.2 times one of `full`.

A step is what the loop does per batch, through the loop's own `Machine.step`: objective, backward, optimiser
step. Both methods train the same architecture with random weights on the same batch of 32 pictures of
128 px on the CPU, in the memory layout the loop chooses, under the recipe of the network's family for few
pictures, with BatchNorm on the statistics of the batch. Every layer but the head runs twice going forward,
and the pretrained filters pass gradients on: in multiply-adds 5/3.

Beside it stands what 64 such pictures cost when they are looked at, against the network alone: with all gates
(`predict`), as the exported graph, and as the static export, which is an ordinary network and has to cost
what one costs (at most 1.05 times, which is noise).

What is compared alternates one by one; a round is some such turns on networks built anew, and its ratio is
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
from headstart.methods.route.adafilter import AdaFilter
from headstart.training.machine import Machine
from measurement import Check, median

TRAINING, STATIC = 2.2, 1.05
NETS = {"efficientnet-lite0": "tf_efficientnet_lite0", "resnet18": "resnet18", "resnet50": "resnet50"}
CLASSES, BATCH, SIZE, PICTURES, AT_ONCE = 10, 32, 128, 300, 64


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


def predictors(architecture: str, machine: Machine, x: torch.Tensor) -> dict[str, Callable[[], None]]:
    """The ways to predict a batch, each ready to be called."""
    method = built("adafilter", architecture, x)
    assert isinstance(method, AdaFilter)
    machine.place(method)
    method.eval()
    half = [torch.arange(site.filters) % 2 == 0 for site in method.sites]
    static, graph = method.merged(half), method.export()
    machine.place(static)
    machine.place(graph)

    @torch.inference_mode()
    def call(what: Callable[[torch.Tensor], torch.Tensor]) -> None:
        what(x)

    return {
        "plain": lambda: call(method.net),
        "dynamic": lambda: call(method.predict),
        "graph": lambda: call(graph),
        "static": lambda: call(static),
    }


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=6, help="alternating steps of each method in a round")
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    options = parser.parse_args()
    here = measurement.begin("adafilter_step")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    batch, at_once, size = (4, 8, 64) if options.quick else (BATCH, AT_ONCE, SIZE)
    checks, details = [], {}
    for shown in options.nets:
        architecture = NETS[shown]
        machine = Machine("cpu")
        pictures = torch.randn(at_once, 3, size, size, generator=torch.Generator().manual_seed(0))
        kept = {
            name: round(kept_for_backward(name, architecture, pictures[:batch]))
            for name in ("full", "adafilter")
        }
        machine.choose_layout(timm.create_model(architecture), pictures[:batch], None)
        x, many = machine.lay(pictures[:batch]), machine.lay(pictures)
        start = time.perf_counter()
        took: dict[str, list[tuple[list[float], list[float]]]] = {}
        for i in range(rounds):
            # Built anew, in turns: where a network's memory lies moves its time by several per cent.
            names = ("full", "adafilter") if i % 2 else ("adafilter", "full")
            both = {name: stepper(name, architecture, machine, x) for name in names}
            steps = measurement.alternate(both["full"], both["adafilter"], pairs, warmup=2)
            took.setdefault("step", []).append(steps)
            ways = predictors(architecture, machine, many)
            for way in ("dynamic", "graph", "static"):
                predicted = measurement.alternate(ways["plain"], ways[way], pairs, warmup=2)
                took.setdefault(way, []).append(predicted)
        ratios = {way: [median(slow) / median(fast) for fast, slow in each] for way, each in took.items()}
        for way, what, bound in (
            ("step", "adafilter step / full step", TRAINING),
            ("static", "adafilter's static export / network alone", STATIC),
        ):
            spread = (min(ratios[way]), max(ratios[way]))
            name = f"{what}, {shown}"
            checks.append(Check(name, median(ratios[way]), bound, at_least=False, spread=spread))
        details[shown] = {
            "full_ms": round(1000 * median([each for fast, _ in took["step"] for each in fast]), 2),
            "adafilter_ms": round(1000 * median([each for _, slow in took["step"] for each in slow]), 2),
            "kept_for_backward_mib": kept,
            "ratios": {way: [round(each, 4) for each in found] for way, found in ratios.items()},
            "medians": {way: round(median(found), 3) for way, found in ratios.items()},
            "pairs_per_round": pairs,
            "channels_last": machine.channels_last,
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(f"  {shown}: {details[shown]['medians']}, kept {kept['full']} and {kept['adafilter']} MiB")
    return measurement.finish(
        "adafilter_step",
        "A training step of adafilter costs at most 2.2 times one of full; its static export what one costs.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
