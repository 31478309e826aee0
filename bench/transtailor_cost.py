"""Claim: half the FLOPs are at most 0.65 (resnet50) and 0.75 (efficientnet-lite0) of the time on a CPU.

Latency: the network that `transtailor` exports at 50 % of the FLOPs against the whole one, both as modules of
torch in inference mode, batches of 1 and of 32 pictures of 224 px, in turns; random weights, as no time
depends on them. Layers keep multiples of 8 channels. Filters go by random scores, the same share of the
network's FLOPs wherever they lie.

Weighing: a step that trains nothing but the gates against a plain forward and backward of the same network,
32 pictures of 128 px: at most 1.1 times.

A whole run: seconds of `transtailor` with five rounds over those of `full`, for as many epochs of the same
batches. It is stated, without a bound.

What is compared alternates, a round is a few such turns on networks built anew, and its ratio is that of the
medians; the number is the median over the rounds. `--device cuda` measures weighing and the run there; the
latency is the CPU's in any case.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

import measurement
from headstart import registry
from headstart.method import Method
from headstart.methods.reshape.transtailor import TransTailor
from headstart.nets.recipe import recipe
from headstart.parts.cutting import cut
from headstart.parts.ranking import cheapest_loss, in_order
from headstart.training.machine import Machine
from measurement import Check, median

NETS = {"efficientnet-lite0": ("tf_efficientnet_lite0", 0.75), "resnet50": ("resnet50", 0.65)}
CLASSES, WEIGHING = 10, 1.1


def built(name: str, architecture: str, size: int, **hyper: Any) -> Method:
    torch.manual_seed(0)
    net = timm.create_model(architecture)
    return registry.get(name)(net, CLASSES, example=torch.zeros(1, 3, size, size), **hyper)


def halved(architecture: str, size: int) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    """The network, the same at half of its FLOPs, and what share it really is."""
    method = built("transtailor", architecture, size, flops=0.5, round_to=8)
    assert isinstance(method, TransTailor)
    budget = method.budget
    scores = torch.rand(method.coupling.units)
    keep = cheapest_loss(
        in_order(scores, scores),
        method.group,
        budget.whole,
        method.least,
        budget.counts.flops,
        0.5 * budget.counts.full,
        multiple=8,
    )
    smaller = cut(copy.deepcopy(method.net), method.coupling.kept(keep))
    return method.net.eval(), smaller.eval(), budget.counts.flops(keep) / budget.counts.full


def caller(net: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        net(x)

    return call


def stepper(weighing: bool, architecture: str, machine: Machine, x: torch.Tensor) -> Callable[[], None]:
    """One step of the gates, or one plain forward and backward, ready to be called."""
    method = built("transtailor" if weighing else "full", architecture, x.shape[-1])
    machine.place(method)
    y = (torch.arange(len(x)) % CLASSES).to(machine.device)
    phases = {phase.name: phase for phase in method.plan(4)}
    phase = phases["weigh 1"] if weighing else phases["fine-tune"]
    method.requires_grad_(False)
    for group in phase.groups:
        for parameter in group.params:
            parameter.requires_grad_(True)
    method.train()
    optimizer = phase.optimizer(torch.optim.SGD, lr=1e-6)

    def step() -> None:
        phase.objective(x, y).total.backward()
        if weighing:
            optimizer.step()
        optimizer.zero_grad()
        machine.wait()

    return step


def run(name: str, architecture: str, machine: Machine, x: torch.Tensor, epochs: int, batches: int) -> float:
    """Seconds of a training, phases and all."""
    hyper = {"flops": 0.5, "rounds": 5} if name == "transtailor" else {}
    method = built(name, architecture, x.shape[-1], **hyper)
    machine.place(method)
    chosen = recipe(method.net, train_size=len(x) * batches, batch_size=len(x))
    method.norm = chosen.norm
    y = (torch.arange(len(x)) % CLASSES).to(machine.device)
    data = [(x, y)] * batches
    start = time.perf_counter()
    for phase in method.phases(epochs, data, data[:1]):
        optimizer = machine.optimizer(phase, chosen)
        for group in optimizer.param_groups:
            group["lr"] *= 1e-3  # random weights on random pictures: keep every number finite
        for _ in range(phase.epochs * batches):
            machine.step(method, optimizer, x, y)
    machine.wait()
    return time.perf_counter() - start


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=5, help="alternating calls of each in a round")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--only", nargs="*", default=["latency", "weigh", "run"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    here = measurement.begin("transtailor_cost")
    rounds, pairs = (1, 1) if options.quick else (options.rounds, options.pairs)
    size, small, batch = (64, 32, CLASSES) if options.quick else (224, 128, 32)
    checks, details = [], {}
    machine = Machine(options.device)
    for shown in options.nets[:1] if options.quick else options.nets:
        architecture, bound = NETS[shown]
        about: dict[str, Any] = {}
        for at_once in (1, batch) if "latency" in options.only else ():
            ratios, times = [], ([], [])
            for _ in range(rounds):
                whole, smaller, share = halved(architecture, size)
                pictures = torch.randn(at_once, 3, size, size)
                repeats = pairs * (4 if at_once == 1 else 1)
                took = measurement.alternate(
                    caller(whole, pictures), caller(smaller, pictures), repeats, warmup=2
                )
                ratios.append(median(took[1]) / median(took[0]))
                for mine, theirs in zip(times, took, strict=True):
                    mine.extend(theirs)
            name = f"{shown}, batch of {at_once}: latency at half the FLOPs / whole"
            spread = (min(ratios), max(ratios))
            checks.append(Check(name, median(ratios), bound, at_least=False, spread=spread))
            about[f"latency_ms_batch_{at_once}"] = [round(1000 * median(each), 2) for each in times]
            about["flops_left"] = round(share, 4)
        x = machine.lay(torch.randn(batch, 3, small, small, generator=torch.Generator().manual_seed(0)))
        if "weigh" in options.only:
            ratios = []
            for i in range(rounds):
                order = (False, True) if i % 2 else (True, False)
                steps = {weighing: stepper(weighing, architecture, machine, x) for weighing in order}
                plain, weigh = measurement.alternate(steps[False], steps[True], pairs, warmup=2)
                ratios.append(median(weigh) / median(plain))
            spread = (min(ratios), max(ratios))
            name = f"{shown}: step of weighing / plain forward and backward"
            checks.append(Check(name, median(ratios), WEIGHING, at_least=False, spread=spread))
        if "run" in options.only:
            epochs, batches = (4, 1) if options.quick else (20, 4)
            took = {
                name: run(name, architecture, machine, x, epochs, batches) for name in ("full", "transtailor")
            }
            about["run_seconds"] = {name: round(each, 2) for name, each in took.items()}
            about["run_ratio"] = round(took["transtailor"] / took["full"], 3)
            print(f"  {shown}: a whole run takes {about['run_ratio']:.2f} times that of full")
        details[shown] = about
    details["device"] = str(machine.device)
    return measurement.finish(
        "transtailor_cost",
        "Half the FLOPs are at most 0.65 and 0.75 of the latency; weighing costs at most 1.1 plain steps.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
