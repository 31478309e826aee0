"""The training loop: the only one. It drives any method, phase by phase, and can be killed at any moment."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headstart.disk import write_text
from headstart.errors import TrainingError
from headstart.method import Loss, Method
from headstart.records import Keep, PhaseTime, Recipe
from headstart.training.average import Average
from headstart.training.checkpoint import Checkpoint
from headstart.training.events import Reporter
from headstart.training.machine import Machine, Placed
from headstart.training.schedule import factor
from headstart.training.score import predictions, score


class Epochs(Protocol):
    """Batches of training pictures; which order and augmentation is a function of `epoch` alone."""

    epoch: int

    def __iter__(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass
class Fitted:
    """What the loop has to tell when it is done."""

    phases: list[PhaseTime] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per epoch
    kept: str = "last"  # or "best, epoch 7"
    before: float = 0.0  # seconds that were spent on it before it was interrupted

    def over_time(self) -> dict[str, list[dict[str, Any]]]:
        """What the method let be seen after each epoch, as one entry `over_time`; empty for nothing."""
        seen = [
            {"epoch": epoch} | record["observed"]
            for epoch, record in enumerate(self.history, 1)
            if "observed" in record
        ]
        return {"over_time": seen} if seen else {}


def fit(
    method: Method,
    *,
    train: Epochs,
    val: Iterable[tuple[Tensor, Tensor]],
    plain: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    epochs: int,
    machine: Machine,
    seed: int = 0,
    grad_accum: int = 1,
    patience: int | None = None,
    keep: Keep = "last",
    folder: Path | None = None,
    reporter: Reporter | None = None,
) -> Fitted:
    """Train a method through all its phases.

    On the CPU a run that was killed and resumed ends with the same bits as one that was not: every epoch
    starts from a seed of its own, and the checkpoint after it holds all that the next one needs.

    Args:
        method: trained in place; afterwards it holds the weights that are kept.
        train: augmented training batches (x [B, C, H, W], y [B] or [B, K]).
        val: validation batches, scored after every epoch; empty for none.
        plain: training pictures in order without augmentation, for phases that measure.
        recipe: optimiser, rates and schedule.
        epochs: over all phases.
        machine: where to compute.
        seed: of dropout and everything else that is random in an epoch.
        grad_accum: micro-batches per step.
        patience: end a phase after so many epochs without a lower validation loss.
        keep: the last weights, or those of the epoch with the lowest validation log-loss.
        folder: for `last.pt` and `metrics.jsonl`; None saves nothing. An unfinished run there is resumed.
        reporter: told what happens.

    Raises:
        TrainingError: the loss is not a number any more; says at which step.
        OutputError: a checkpoint or the metrics could not be written.
    """
    reporter = reporter or Reporter()
    checkpoint = Checkpoint(folder) if folder is not None else None
    saved = checkpoint.load() if checkpoint else None
    machine.place(method)
    batches, val, plain = (Placed(each, machine) for each in (train, val, plain))
    fitted, best = Fitted(), dict(_NONE_YET)
    if saved is not None:
        method.load_state_dict(saved["method"])
        fitted = Fitted([PhaseTime(**each) for each in saved["phases"]], saved["history"])
        fitted.before = sum(phase.seconds for phase in fitted.phases)
        best = saved["best"]
        reporter.say(f"resumed after epoch {len(fitted.history)}")
        if checkpoint is not None and machine.main:  # it may have been killed between the two files
            _write_metrics(checkpoint.path.with_name("metrics.jsonl"), fitted.history)
    _seed_entering(seed, train, fitted)
    trained_phases = sum(phase.epochs > 0 for phase in method.plan(epochs))
    clock = time.perf_counter()

    for phase in method.phases(epochs, batches, val, plain):
        steps = phase.epochs * len(train)
        reporter.phase(phase, len(train))
        optimizer = machine.optimizer(phase, recipe)
        peaks = [group["lr"] for group in optimizer.param_groups]
        average = None if recipe.ema is None else Average(method, recipe.ema, steps)
        if phase.done and saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
            if average is not None:
                average.load(saved["average"])
            clock -= fitted.phases.pop().seconds
        else:
            best = dict(_NONE_YET)  # phases minimise different things
        trained = machine.wrap(method)
        took = PhaseTime(name=phase.name, epochs=phase.done, seconds=time.perf_counter() - clock)

        for epoch in range(phase.done, phase.epochs):
            if patience is not None and best["since"] >= patience:
                reporter.say(f"stopped after {epoch} epochs: no lower validation loss in {patience}")
                break
            started = time.perf_counter()
            train.epoch = len(fitted.history)
            _seed(seed, 1 + train.epoch)
            method.train()
            sums = _Sums()
            for i, (x, y) in enumerate(batches):
                share = factor(recipe.schedule, epoch * len(train) + i, steps, recipe.warmup)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * share
                loss = machine.step(trained, optimizer, x, y, clip=recipe.clip, grad_accum=grad_accum)
                if average is not None:
                    average.update()
                sums.add(loss, y)
                # Looking at a loss waits for the GPU, so there it is looked at now and then.
                if machine.device.type == "cpu" or i % 32 == 31 or i == len(train) - 1:
                    sums.check(phase.name, epoch, i)
                reporter.step()
            method.finished_epoch()

            with average.applied() if average is not None else nullcontext():
                record: dict[str, Any] = {
                    "phase": phase.name,
                    "epoch": epoch + 1,
                    "epochs": phase.epochs,
                    "lr": recipe.lr * share,
                    **sums.means(),
                    **_validate(method, val, f"phase '{phase.name}', epoch {epoch + 1}, step {len(train)}"),
                    "seconds": time.perf_counter() - started,
                }
                if observed := method.observe():
                    record["observed"] = observed
                fitted.history.append(record)
                if record["val_log_loss"] is None or record["val_log_loss"] >= best["log_loss"]:
                    best = best | {"since": best["since"] + 1}
                else:
                    weights = copy.deepcopy(method.state_dict()) if keep == "best" else None
                    best = {
                        "log_loss": record["val_log_loss"],
                        "epoch": len(fitted.history),
                        "since": 0,
                        "weights": weights,
                    }
            took = PhaseTime(name=phase.name, epochs=epoch + 1, seconds=time.perf_counter() - clock)
            if checkpoint is not None and machine.main:
                checkpoint.save(
                    {
                        "method": method.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": None if average is None else average.state(),
                        "history": fitted.history,
                        "phases": [each.model_dump() for each in [*fitted.phases, took]],
                        "best": best,
                    }
                )
                _write_metrics(checkpoint.path.with_name("metrics.jsonl"), fitted.history)
            reporter.epoch(record)

        fitted.phases.append(took)
        clock = time.perf_counter()
        if average is not None:
            average.swap()  # what is kept is the average
        # Before anything is measured on it; and not after a method itself went back to an earlier network.
        if keep == "best" and best["weights"] is not None and len(fitted.phases) == trained_phases:
            method.load_state_dict(best["weights"])
            fitted.kept = f"best, epoch {best['epoch']}"
        machine.forget()
        _seed_entering(seed, train, fitted)

    if not fitted.phases:  # all was done on entering
        seconds = time.perf_counter() - clock
        fitted.phases.append(PhaseTime(name=method.plan(epochs)[0].name, epochs=0, seconds=seconds))
    return fitted


# The best epoch of a phase so far: its validation log-loss, and how many epochs ago that was.
_NONE_YET: dict[str, Any] = {"log_loss": math.inf, "epoch": 0, "since": 0, "weights": None}


class _Sums:
    """What an epoch adds up to, without waiting for the device at every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        self.right = torch.zeros(())
        self.seen = 0

    def add(self, loss: Loss, y: Tensor) -> None:
        self.losses.append(loss.total)
        for name, value in {"loss": loss.total, **loss.parts}.items():
            self.sums[name] = self.sums.get(name, 0) + value * len(y)
        truth = y if y.ndim == 1 else y.argmax(1)
        self.right = self.right.to(y.device) + (loss.logits.argmax(1) == truth).sum()
        self.seen += len(y)

    def check(self, phase: str, epoch: int, last: int) -> None:
        """Stop at a loss that is not a number: nothing after it means anything."""
        bad = (~torch.stack(self.losses).isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            step = last - len(self.losses) + 2 + first
            stays = "; the checkpoint of the epoch before it stays" if epoch else ""
            raise TrainingError(
                f"The loss became {float(self.losses[first])} in phase '{phase}', epoch {epoch + 1}, "
                f"step {step}. Try a lower --lr, or --clip 1{stays}."
            )
        self.losses.clear()

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.seen for name, total in self.sums.items()} | {
            "train_accuracy": float(self.right) / self.seen
        }


def _seed(seed: int, epoch: int) -> None:
    """Start the random numbers of an epoch; those of different seeds and epochs have nothing in common."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]))


def _seed_entering(seed: int, train: Epochs, fitted: Fitted) -> None:
    """What a phase draws or looks at on entering is the same whether the run was resumed or not."""
    _seed(seed, 0)
    train.epoch = len(fitted.history)


def _validate(method: Method, val: Iterable[tuple[Tensor, Tensor]], after: str) -> dict[str, float | None]:
    said = predictions(method, val, after=after)
    if said is None:
        return {"val_accuracy": None, "val_log_loss": None}
    result = score(*said)
    return {"val_accuracy": result.accuracy, "val_log_loss": result.log_loss}


def _write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """One line per epoch, written whole: after a resume no epoch stands there twice."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in history))
