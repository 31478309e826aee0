"""Claim: routes that were learnt are worth more than random ones of equal usage, for SpotTune and AdaFilter.

Three tasks, three seeds each, with a split of its own for every seed:

- `clipart`: about 300 training pictures of ten classes, 128 px, efficientnet-lite0 with its ImageNet weights;
- `fashion`: 500 of fashion-mnist's ten classes, 96 px, the same network;
- `resnet`: 250 of five of fashion-mnist's classes, 96 px, and a resnet18 that this script has trained on the
  other five before: the kind of network, and the kind of task, that SpotTune was made for.

Trained are `full`, `spottune` per picture, `spottune` with routing="global", and `adafilter`, at their
defaults, on the same order and augmentation, for as many epochs. Beside what they predict stand

- "static": their static exports, scored as the ordinary networks that they are;
- "shuffled": the routes that were learnt, of each block or filter dealt out among the test pictures anew.
  Usage is the same to the picture, and what is lost is which picture takes which way;
- "random": trained once more with a random policy of the same usage from the first step to the last. Lost is
  whatever a policy that learns beside the network does for it;
- "random blocks" (global): as many tuned blocks as were kept, drawn at random, the middle one of ten draws.

Judged is the mean over the seeds of "learnt minus shuffled" and "learnt minus random" in points: 0 or more.
The 95 % intervals of all differences are paired (`headstart.comparison.statistics`) and stand in the record,
and so does how much the routes depend on the picture at all: shuffling a constant changes nothing.

A piece is one seed of one task. Pieces run `--jobs` at a time, in processes of their own, and are kept under
`--out`: what lies there is not run again, so parts may be run with `--set`, `--seeds` and `--only` first.
`--data` holds the folders `clipart` and `fashion`. A machine that has neither is given `bench/data` as
`--prepare` leaves it elsewhere, under 60 MB.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipart
import headstart
import measurement
import pieces
from headstart.comparison.statistics import Answers, Resampled
from headstart.data.catalogue import fetch
from headstart.method import Method
from headstart.methods.route.adafilter import AdaFilter
from headstart.methods.route.spottune import SpotTune
from headstart.nets import zoo
from headstart.records import Run
from headstart.training.job import Prepared, build, prepare
from headstart.training.loop import fit
from headstart.training.machine import Machine, Placed
from measurement import DATA, Check

SETS = {"clipart": 128, "fashion": 96, "resnet": 96}  # and the size of the pictures
SOURCE_CLASSES = ("bag", "coat", "sandal", "shirt", "trouser")  # what the resnet has learnt before
PICTURES = DATA / "route-pictures"
ARMS = ("full", "spottune", "spottune-global", "adafilter")
RANDOM_DRAWS = 10  # of random blocks
AGAINST = [
    *((arm, "full") for arm in ARMS[1:]),
    ("spottune, static", "spottune"),
    ("adafilter, static", "adafilter"),
    ("spottune", "spottune, shuffled"),
    ("adafilter", "adafilter, shuffled"),
    ("spottune", "spottune, random"),
    ("adafilter", "adafilter, random"),
    ("spottune-global", "spottune-global, random blocks"),
]
JUDGED = [pair for pair in AGAINST if pair[1].endswith((", shuffled", ", random"))]


def main() -> int:
    parser = measurement.arguments(__doc__)
    pieces.arguments(parser, DATA / "route")
    parser.add_argument("--set", nargs="*", default=list(SETS), choices=list(SETS), dest="sets")
    parser.add_argument("--only", nargs="*", default=list(ARMS), choices=list(ARMS), help="of the trained")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--prepare", action="store_true", help="only lay the pictures out under bench/data")
    options = parser.parse_args()
    if options.quick:
        options.out, options.epochs = options.out.with_name(f"{options.out.name}-quick"), 1
        options.sets, options.seeds = options.sets[-1:], options.seeds[:1]
    if options.piece is not None:
        _run_piece(options)
        return 0
    here = measurement.begin("route")
    start = time.perf_counter()
    several = [(name, seed) for name in options.sets for seed in options.seeds]
    for name, seed in [*several, *([("resnet-source", 99)] if "resnet" in options.sets else [])]:
        data_of(name, seed, options)  # here, one after the other: what is shared is made once
    if options.prepare:
        return 0
    if "resnet" in options.sets:
        resnet(options)
    pieces.run("route.py", several, options)
    checks, details = [], {}
    for name in options.sets:
        found = {seed: pieces.kept(options, name, seed) for seed in options.seeds}
        details[name] = _summary(name, {seed: each for seed, each in found.items() if each})
        checks += _judged(name, details[name])
    details |= {"epochs": options.epochs, "seconds": round(time.perf_counter() - start, 1)}
    if torch.cuda.is_available():
        details["gpu"] = torch.cuda.get_device_name()
    return measurement.finish(
        "route",
        "Routes that were learnt are worth more than random ones of equal usage.",
        here,
        checks,
        details,
        quick=options.quick,
    )


# ---------------------------------------------------------------------- pictures, and a network for them


def data_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """A folder train, val, test / class / picture, made on first use; its name does not tell where from."""
    out = PICTURES / f"{name}-{'quick-' if options.quick else ''}seed-{seed}"
    if out.exists():
        return out
    few = {"train": 3, "val": 1, "test": 2}
    if name == "clipart":
        source = _given(options, "clipart") or clipart.fetched(options.data)
        counts = few if options.quick else {"train": 30, "val": 10, "test": 90}
        preprocess = zoo.load(img_size=SETS[name]).preprocess
        out.parent.mkdir(parents=True, exist_ok=True)
        return clipart.divided(source, preprocess, seed=seed, per_class=counts, shrunk=True).rename(out)
    if name == "resnet-source":
        counts = (
            {"train": 20, "val": 4, "test": 4} if options.quick else {"train": 1500, "val": 50, "test": 50}
        )
        return _drawn(out, seed, counts, _before, options)
    if name == "resnet":
        counts = few if options.quick else {"train": 50, "val": 15, "test": 200}
        return _drawn(out, seed, counts, lambda label: not _before(label), options)
    counts = few if options.quick else {"train": 50, "val": 15, "test": 100}
    return _drawn(out, seed, counts, lambda label: True, options)


def resnet(options: argparse.Namespace) -> Path:
    """The folder of a run: a resnet18 that has learnt five of fashion-mnist's classes from random weights."""
    out: Path = options.out / "resnet18"
    trained = headstart.train(
        data_of("resnet-source", 99, options),
        out=out,
        method="full",
        model="resnet18",
        weights="random",
        img_size=SETS["resnet"],
        epochs=1 if options.quick else 5,
        batch_size=64,
    )
    if trained.result.test is not None:
        print(f"  resnet18 says {trained.result.test.accuracy:.1%} of its own five classes right", flush=True)
    return out


def _given(options: argparse.Namespace, name: str) -> Path | None:
    """The set's folder under `--data`, which for other benchmarks is the clipart folder itself."""
    folder = None if options.data is None else options.data / name
    return folder if folder is not None and folder.is_dir() else None


def _before(label: str) -> bool:
    return label in SOURCE_CLASSES


def _drawn(
    out: Path, seed: int, counts: dict[str, int], wanted: Callable[[str], bool], options: argparse.Namespace
) -> Path:
    """Fashion-mnist's pictures of some classes; those for testing from its own test side."""
    source = _given(options, "fashion")
    if source is None:
        source = fetch("fashion-mnist", DATA / "fashion-2000", per_class=2000)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    for official, sides in (("train", ("train", "val")), ("test", ("test",))):
        for folder in sorted(path for path in (source / official).iterdir() if wanted(path.name)):
            files = sorted(folder.iterdir())
            random.Random(f"{seed}/{folder.name}").shuffle(files)
            for side in sides:
                mine, files = files[: counts[side]], files[counts[side] :]
                (temporary / side / folder.name).mkdir(parents=True)
                for file in mine:
                    shutil.copyfile(file, temporary / side / folder.name / file.name)
    return temporary.rename(out)


# ---------------------------------------------------------------------- a piece: one seed of one task


def _run_piece(options: argparse.Namespace) -> None:
    """Train and score what was asked for and is not there yet; each arm is kept as soon as it is done."""
    name, seed = pieces.asked(options)
    found = pieces.kept(options, name, seed)
    machine, prepared = Machine("auto"), None
    for arm in options.only:
        if arm in found:
            continue
        method, _, form = arm.partition("-")
        prepared = prepare(
            Run.asked(
                data=str(data_of(name, seed, options)),
                model=str(options.out / "resnet18") if name == "resnet" else zoo.DEFAULT,
                img_size=SETS[name],
                method=method,
                hyper={"routing": form} if form else {},
                epochs=options.epochs,
                batch_size=8 if options.quick else 32,
                seed=seed,
            ),
            share=prepared,
            say=lambda _: None,
        )
        start = time.perf_counter()
        found[arm] = _arm(prepared, machine)
        shown = {what: f"{np.mean(right):.3f}" for what, right in found[arm]["right"].items()}
        print(f"  {name} seed {seed} {arm}: {shown}  {time.perf_counter() - start:.0f} s", flush=True)
        pieces.keep(options, name, seed, found)


def _arm(prepared: Prepared, machine: Machine) -> dict[str, Any]:
    """Whether each test picture was said right, by way of saying it; and what the routes are like."""
    torch.manual_seed(1000 + prepared.run.seed)  # of whatever is random below; training seeds itself
    task = prepared.task
    test = Placed(task.plain("test", 100, device=machine.device), machine)
    method = _trained(prepared, machine)
    right = {"": _right(method.predict, test)}
    about: dict[str, Any] = {}
    if isinstance(method, SpotTune) and method.routing == "global":
        right["random blocks"] = _with_other_blocks(method, test)
        about = {"kept": method.diagnostics()["kept"], "likely": method.diagnostics()["likely"]}
    elif isinstance(method, SpotTune):
        right["static"] = _right(_static(method, machine), test)
        learnt = torch.cat([method.choices(x).detach() for x, _ in test])
        usage = learnt.mean(0)
        right["shuffled"] = _dealt(learnt, lambda mine: _along(method, mine), test)
        shown = method.diagnostics()
        about = {
            "tuned": shown["tuned"],
            "bits_per_block": float(np.mean(list(shown["bits"].values()))),
            "agrees": shown["static"]["agreement"],
        }
        other = _trained(prepared, machine, lambda method: _randomly_routed(method, usage))
        right["random"] = _right(other.predict, test)
    elif isinstance(method, AdaFilter):
        right["static"] = _right(_static(method, machine), test)
        learnt = torch.cat([torch.cat(method.run(x)[1], 1).bool() for x, _ in test])
        usage = learnt.double().mean(0)
        right["shuffled"] = _dealt(learnt, lambda mine: _behind(method, mine), test)
        shown = method.diagnostics()
        about = {"tuned": shown["tuned"], "bits_per_filter": shown["entropy"]}
        about |= {"agrees": shown["static"]["agreement"]}
        other = _trained(prepared, machine, lambda method: _randomly_gated(method, usage))
        right["random"] = _right(other.predict, test)
    hashes = [task.pictures.facts.hashes[i] for i in task.split.index("test")]
    return {
        "right": {what: [int(each) for each in said] for what, said in right.items()},
        "hashes": hashes,
        "train": len(task.labels("train")),
        "about": about,
    }


def _trained(prepared: Prepared, machine: Machine, change: Callable[[Method], None] | None = None) -> Method:
    """What the loop leaves behind, as in `headstart.train` but for the files; changed before it learns."""
    run, task = prepared.run, prepared.task
    method = build(prepared)
    if change is not None:
        change(method)
    sides = {side: task.plain(side, 100, device=machine.device) for side in ("train", "val")}
    fit(
        method,
        train=task.train(prepared.batch_size, seed=run.seed, device=machine.device),
        val=sides["val"],
        plain=sides["train"],
        recipe=prepared.recipe,
        epochs=run.epochs,
        machine=machine,
        seed=run.seed,
    )
    return method.eval()


@torch.inference_mode()
def _right(
    say: Callable[[Tensor], Tensor] | Iterator[Callable[[Tensor], Tensor]], test: Iterable[Any]
) -> np.ndarray:
    """bool [N]; what says it may be another for each batch."""
    said = []
    for x, y in test:
        now = next(say) if isinstance(say, Iterator) else say
        said.append((now(x).argmax(1) == y).cpu())
    every: np.ndarray = torch.cat(said).numpy()
    return every


def _static(method: SpotTune | AdaFilter, machine: Machine) -> Callable[[Tensor], Tensor]:
    net = method.export(static=True)
    machine.place(net)
    return net


def _dealt(
    learnt: Tensor, along: Callable[[Tensor], Callable[[Tensor], Tensor]], test: Iterable[Any]
) -> np.ndarray:
    """Right answers where the choices [N, L] that were learnt are dealt out among the pictures anew."""
    order = torch.rand(learnt.shape, device=learnt.device).argsort(0)
    dealt = learnt.gather(0, order)
    sizes = [len(y) for _, y in test]
    return _right((along(mine) for mine in dealt.split(sizes)), test)


def _along(method: SpotTune, mine: Tensor) -> Callable[[Tensor], Tensor]:
    """Predicts with these routes [B, L]."""

    def say(x: Tensor) -> Tensor:
        method.routes = lambda _: mine
        try:
            return method.predict(x)
        finally:
            method.routes = None

    return say


def _behind(method: AdaFilter, mine: Tensor) -> Callable[[Tensor], Tensor]:
    """Predicts with these gates [B, filters]."""
    gates = mine.split([site.filters for site in method.sites], 1)

    def say(x: Tensor) -> Tensor:
        method.policy = lambda site, preference: gates[site].to(preference)
        try:
            return method.predict(x)
        finally:
            method.policy = None

    return say


def _randomly_routed(method: Method, usage: Tensor) -> None:
    assert isinstance(method, SpotTune)
    method.routes = lambda x: torch.bernoulli(usage.float().expand(len(x), -1))


def _randomly_gated(method: Method, usage: Tensor) -> None:
    assert isinstance(method, AdaFilter)
    shares: Sequence[Tensor] = usage.float().split([site.filters for site in method.sites])
    method.policy = lambda site, preference: torch.bernoulli(
        shares[site].to(preference).expand_as(preference)
    )


def _with_other_blocks(method: SpotTune, test: Iterable[Any]) -> np.ndarray:
    """Right answers with other blocks than those that were kept; of several draws the middle one."""
    kept, drawn = method.memory["kept"].clone(), []
    for _ in range(RANDOM_DRAWS):
        method.memory["kept"] = kept[torch.randperm(len(kept))]
        drawn.append(_right(method.predict, test))
    method.memory["kept"] = kept
    return sorted(drawn, key=lambda right: float(right.mean()))[RANDOM_DRAWS // 2]


# ---------------------------------------------------------------------- what it comes to


def _summary(name: str, found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Accuracies and paired differences in points, with 95 % intervals; and the routes, by arm and seed."""
    runs: dict[str, dict[int, Answers]] = {}
    about: dict[str, dict[int, Any]] = {}
    for seed, arms in found.items():
        for arm, held in arms.items():
            about.setdefault(arm, {})[seed] = held["about"]
            for what, right in held["right"].items():
                label = f"{arm}, {what}" if what else arm
                answers = Answers(np.array(right, dtype=bool), np.array(held["hashes"]))
                runs.setdefault(label, {})[seed] = answers
    resampled = Resampled(runs)
    shown: dict[str, Any] = {"accuracy": {}, "differences": {}, "routes": about}
    for label in runs:
        shown["accuracy"][label] = [round(100 * each, 2) for each in resampled.accuracy(label)]
    for one, other in AGAINST:
        if one in runs and other in runs and (off := resampled.difference(one, other)) is not None:
            shown["differences"][f"{one} - {other}"] = [round(100 * each, 2) for each in off]
    first = next(iter(found.values()), {})
    shown["pictures"] = {
        "train": [held["train"] for arms in found.values() for held in list(arms.values())[:1]],
        "test": [len(held["hashes"]) for arms in found.values() for held in list(arms.values())[:1]],
    }
    print(f"  {name}: {shown['pictures']}, arms {', '.join(first)}")
    for label, (mean, low, high) in shown["accuracy"].items():
        print(f"    {label:<34} {mean:6.2f} %  [{low:.2f}, {high:.2f}]")
    for label, (mean, low, high) in shown["differences"].items():
        print(f"    {label:<48} {mean:+6.2f} points  [{low:+.2f}, {high:+.2f}]")
    return shown


def _judged(name: str, shown: dict[str, Any]) -> list[Check]:
    checks = []
    for one, other in JUDGED:
        if (off := shown["differences"].get(f"{one} - {other}")) is not None:
            mean, low, high = off
            what = f"{name}: {one} - {other}"
            checks.append(Check(what, mean, 0, at_least=True, unit=" points", spread=(low, high)))
    return checks


if __name__ == "__main__":
    raise SystemExit(main())
