"""One run, from what was asked to what came out."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headstart import registry
from headstart.data.audit import audit
from headstart.data.loader import Task, Train, load
from headstart.disk import cache_dir, read_json, write_json
from headstart.errors import ConfigError, HeadstartError, MethodError, OutputError, TrainingError
from headstart.method import Method
from headstart.nets import recipe as recipes
from headstart.nets import zoo
from headstart.parts.frozen import fingerprint
from headstart.parts.operations import flops
from headstart.parts.statistics import has_batchnorm
from headstart.parts.viewed import Viewed
from headstart.records import Fingerprints, Parameters, Recipe, Result, Run
from headstart.ship import bundle
from headstart.ship.predict import Prediction, Predictor
from headstart.ship.predict import load as load_model
from headstart.training import shipped
from headstart.training.events import Reporter
from headstart.training.folder import claimed, write_npz
from headstart.training.loop import fit
from headstart.training.machine import Machine, Placed
from headstart.training.score import predictions, score
from headstart.training.trackers import tracked

# Pictures per batch where nothing is learnt: what a CPU's caches hold; a GPU wants more at once.
SCORED_AT_ONCE = {"cpu": 16, "cuda": 128, "mps": 64}

# What decides which pictures are in which split, and which network it is: runs that agree share them.
_DATA = (
    *("data", "image_col", "label_col", "split_col", "group_col", "split", "train_size", "strict"),
    "img_size",
)
_NET = ("model", "weights", "img_size")
_SOURCE = (*_NET, "source", "source_weights")  # its size is the network's


@dataclass(frozen=True)
class Prepared:
    """A run with everything it needs, before anything is trained."""

    run: Run
    task: Task
    pretrained: zoo.Pretrained
    source: zoo.Pretrained | None  # another network to learn from
    cls: type[Method]
    hyper: dict[str, Any]  # defaults, preset and what was asked
    recipe: Recipe
    batch_size: int
    fingerprints: Fingerprints
    key: str
    told_weights: tuple[float, ...] | None = None  # of the classes, where a file says them

    @property
    def name(self) -> str:
        """The run's folder name in a comparison."""
        label = self.run.method if self.run.preset is None else f"{self.run.method}-{self.run.preset}"
        return f"{label}-{self.key}-s{self.run.seed}"

    @property
    def learnt_from(self) -> int:
        """How many training pictures there are."""
        return len(self.task.split.index("train"))

    @property
    def audited(self) -> dict[str, Any]:
        """What there is to know about the pictures; see `headstart.data.audit`."""
        return audit(self.task.table, self.task.pictures.facts).model_dump(mode="json")

    @property
    def class_weights(self) -> torch.Tensor | None:
        """Weights of the classes in the loss: float32 [K], or None.

        Those of a file were read when the run was prepared: the machine that trains it may not have the file.
        """
        if self.told_weights is not None:
            return torch.tensor(self.told_weights, dtype=torch.float32)
        return self.task.class_weights(self.run.class_weights)

    @cached_property
    def unfit(self) -> str | None:
        """The one-line reason why the method cannot run here; None where it can."""
        counts = {split: len(self.task.labels(split)) for split in ("train", "val", "test")}
        size = self.pretrained.preprocess.size
        return self.cls.fits(
            self.pretrained.net, {"classes": len(self.task.classes), "img_size": size, **counts}
        )


def prepare(run: Run, *, share: Prepared | None = None, say: Callable[[str], None] = print) -> Prepared:
    """Find the method, load the network and the pictures, and settle every open value.

    Args:
        run: what was asked.
        share: an earlier run; its pictures and network are used again where they are the same.
        say: told what was done with the data and the weights.

    Raises:
        HeadstartError: anything that a person got wrong, before anything is trained.
    """
    cls = registry.get(run.method)
    hyper = registry.configure(cls, run.preset, run.hyper)
    registry.check_source(cls, run.source, run.source_weights)
    preset = registry.preset(cls, run.preset).recipe
    effective = run.filled(preset)
    same_net = share is not None and all(getattr(run, name) == getattr(share.run, name) for name in _NET)
    if share is not None and same_net and (run.pretrained or run.seed == share.run.seed):
        pretrained, source = share.pretrained, share.fingerprints.source
    else:
        torch.manual_seed(run.seed)  # random weights are drawn from it
        weights_file = run.weights if run.pretrained else None
        pretrained = zoo.load(
            run.model, weights=weights_file, pretrained=run.pretrained, img_size=run.img_size, say=say
        )
        source = fingerprint(pretrained.net)
    other, learnt_from = None, None
    if run.source is not None:
        if (
            share is not None
            and share.source is not None
            and all(getattr(run, name) == getattr(share.run, name) for name in _SOURCE)
        ):
            other, learnt_from = share.source, share.fingerprints.other
        else:
            size = pretrained.preprocess.size
            other = zoo.load(run.source, weights=run.source_weights, img_size=size, say=say)
            learnt_from = fingerprint(other.net)
    seed = run.seed if run.split_seed is None else run.split_seed
    same_data = share is not None and all(getattr(run, name) == getattr(share.run, name) for name in _DATA)
    if share is not None and same_data and share.task.split_seed == seed:
        task = share.task
    else:
        task = load(run, pretrained.preprocess, say=say)
    # Read now, so that a mistake in a file of weights is found before a folder is claimed.
    weights = task.class_weights(run.class_weights)
    family = recipes.recipe(
        pretrained.net,
        train_size=len(task.labels("train")),
        batch_size=effective.batch_size,
        pretrained=run.pretrained,
        optimizer=effective.optimizer,
        follows=cls.follows,
    )
    recipe = effective.recipe(family)
    if effective.optimizer is None and cls.follows is not None:
        say(f"{run.method} foresees the steps of {cls.follows} alone, and learns by it")
    micro = effective.batch_size // effective.grad_accum
    if micro < 1:
        raise ConfigError(
            f"grad_accum {effective.grad_accum} cuts a batch of {effective.batch_size} into nothing. "
            f"Use at most {effective.batch_size}."
        )
    statistics = recipe.norm == "train" or not cls.keeps_statistics
    if micro == 1 and statistics and has_batchnorm(pretrained.net):
        raise ConfigError(
            f"{run.model} has BatchNorm, which has no statistics of a single picture. Use a batch size of "
            "2 or more per micro-batch"
            + (", or --norm eval." if cls.keeps_statistics else f"; {run.method} cannot hold them.")
        )
    settled = {"hyper": hyper, "recipe": recipe.model_dump(), "batch_size": effective.batch_size}
    told_weights = None
    if run.class_weights not in ("none", "auto") and weights is not None:
        told_weights = tuple(weights.tolist())
        settled["class_weights"] = list(told_weights)  # a file that was changed asks for another run
    return Prepared(
        run=run,
        task=task,
        pretrained=pretrained,
        source=other,
        cls=cls,
        hyper=hyper,
        recipe=recipe,
        batch_size=effective.batch_size,
        fingerprints=Fingerprints(source=source, other=learnt_from, data=task.fingerprint),
        key=run.key(
            data=task.fingerprint,
            source=source if learnt_from is None else f"{source} {learnt_from}",
            settled=settled,
        ),
        told_weights=told_weights,
    )


def build(prepared: Prepared) -> Method:
    """The method on a copy of the network, with a fresh head for the task."""
    task, size = prepared.task, prepared.pretrained.preprocess.size
    if prepared.unfit is not None:
        raise MethodError(f"{prepared.run.method} cannot run here: {prepared.unfit}")
    torch.manual_seed(prepared.run.seed)  # what a method draws when it is built
    method = prepared.cls(
        copy.deepcopy(prepared.pretrained.net),
        len(task.classes),
        source=_source(prepared),
        example=torch.zeros(1, 3, size, size),
        pretrained=prepared.run.pretrained,
        **prepared.hyper,
    )
    method.norm = prepared.recipe.norm
    method.criterion = nn.CrossEntropyLoss(
        prepared.class_weights, label_smoothing=prepared.recipe.label_smoothing
    )
    return method


def _source(prepared: Prepared) -> nn.Module | None:
    """The other network, for pictures that are normalised for the one that learns."""
    if prepared.source is None:
        return None
    ours, its = prepared.pretrained.preprocess, prepared.source.preprocess
    if (ours.mean, ours.std) == (its.mean, its.std):
        return prepared.source.net
    return Viewed(prepared.source.net, given=(ours.mean, ours.std), own=(its.mean, its.std))


def execute(
    prepared: Prepared,
    folder: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """Train, score and save one run.

    The folder then holds `result.json`, `metrics.jsonl`, `predictions.npz`, `split.csv` and `model/`; that of
    a trial no model, and nothing about the test pictures, which it never looks at. A folder with this very
    run finished in it is left as it is; one with this run begun is gone on with.

    Args:
        prepared: from `prepare`.
        folder: of this run alone.
        resume: go on with an unfinished run that lies there; False refuses.
        overwrite: replace another run that lies there.
        reporter: told what happens.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        TrainingError: training could not go on; `result.json` then says why.
    """
    reporter = reporter or Reporter()
    machine = Machine(prepared.run.device, prepared.run.precision)
    with ExitStack() as held:
        finished = None
        if machine.main:
            asked = prepared.run.model_dump(mode="json")
            finished = held.enter_context(
                claimed(folder, prepared.key, asked, resume=resume, overwrite=overwrite)
            )
        finished = machine.from_main(finished)  # the others look at the folder once it is this run's
        if finished is not None:
            reporter.say(f"{folder} is finished already")
            return finished
        try:
            return _execute(prepared, folder, machine, reporter)
        except torch.OutOfMemoryError as error:
            reason = TrainingError(
                f"Out of memory on {machine.device}. Use a smaller --batch-size, or the same in more "
                f"micro-batches with --grad-accum {max(2, prepared.run.grad_accum * 2)}."
            )
            _leave_failed(folder, prepared, reason, machine)
            raise reason from error
        except HeadstartError as error:
            _leave_failed(folder, prepared, error, machine)
            raise


def _execute(prepared: Prepared, folder: Path, machine: Machine, reporter: Reporter) -> Result:
    run, task = prepared.run, prepared.task
    machine.start_memory()  # what the run before this one held is given back, at nobody's cost
    started = time.perf_counter()
    method = build(prepared)
    headline = method.headline()
    if headline is not None and machine.main and not run.trial:
        reporter.say(headline)
    batches = training_batches(prepared, machine)
    place(method, batches, prepared, folder, machine)
    scored = ("val",) if run.trial else ("val", "test")
    plain = {
        split: task.plain(split, SCORED_AT_ONCE[machine.device.type], device=machine.device)
        for split in ("train", *scored)
    }
    fitted = fit(
        method,
        train=batches,
        val=plain["val"],
        plain=plain["train"],
        recipe=prepared.recipe,
        epochs=run.epochs,
        machine=machine,
        seed=run.seed,
        grad_accum=run.grad_accum,
        patience=run.patience,
        keep="best" if run.patience is not None else run.keep,
        folder=folder,
        reporter=reporter,
    )
    arrays: dict[str, np.ndarray] = {}
    scores = {}
    for split in scored:
        clock = time.perf_counter()
        said = predictions(method, Placed(plain[split], machine))
        machine.wait()
        if said is None:
            continue
        ms_per_image = (time.perf_counter() - clock) * 1000 / len(said[1])
        arrays |= {f"{split}_probabilities": said[0], f"{split}_labels": said[1]}
        arrays[f"{split}_hashes"] = np.array([task.pictures.facts.hashes[i] for i in task.split.index(split)])
        scores[split] = score(*said)
    exported = method.export().cpu().to(memory_format=torch.contiguous_format)
    result = _result(prepared, "finished").model_copy(
        update={
            "phases": fitted.phases,
            "epochs": len(fitted.history),
            "val": scores.get("val"),
            "test": scores.get("test"),
            "kept": fitted.kept,
            "parameters": Parameters(
                trained=_learning(method, run.epochs),
                shipped=sum(parameter.numel() for parameter in exported.parameters()),
            ),
            "peak_memory_mb": round(machine.peak_memory_mb(), 1),
            "ms_per_image": round(ms_per_image, 3),
            "flops": flops(exported, prepared.pretrained.preprocess.size),
            "n_train": len(task.labels("train")),
            "device": machine.described(),
            "diagnostics": method.diagnostics() | fitted.over_time(),
        }
    )
    if machine.main:
        write_npz(folder / "predictions.npz", arrays)
        task.split.write(folder / "split.csv")
        if not run.trial:
            bundle.save(
                folder / "model",
                exported,
                config=prepared.pretrained.config,
                preprocess=prepared.pretrained.preprocess,
                classes=task.classes,
                card=shipped.card(result, prepared),
                calibration=shipped.calibration(arrays),
            )
        # A resumed run is no cheaper than one that was left in peace: a verdict weighs these.
        seconds = time.perf_counter() - started + fitted.before
        result = result.model_copy(update={"seconds": round(seconds, 2)})
        _leave(folder, result, machine)
        (folder / "last.pt").unlink(missing_ok=True)
    reporter.row(result)
    return result


@dataclass(frozen=True)
class Trained:
    """A finished run: where it lies, what came out, and a model that predicts."""

    folder: Path
    result: Result

    @cached_property
    def model(self) -> nn.Module:
        """The trained network, a plain module in eval mode."""
        return self._predictor.net

    def predict(self, paths: str | Path | list[str | Path]) -> list[Prediction]:
        """Labels and probabilities of pictures: a file, a folder or a list of them."""
        return self._predictor.predict(paths)

    @cached_property
    def _predictor(self) -> Predictor:
        return load_model(self.folder)


def train(
    data: str | Path,
    *,
    out: str | Path,
    resume: bool = True,
    overwrite: bool = False,
    refit: bool = False,
    reporter: Reporter | None = None,
    track: str | list[str] | None = None,
    **fields: Any,
) -> Trained:
    """Fine-tune a network on a folder of pictures with one method.

    Args:
        data: a folder of class folders, or a CSV file.
        out: folder for the run.
        resume: go on with the same run where it was interrupted.
        overwrite: replace another run that lies in `out`.
        refit: then train once more, on train and val, for the length learnt, and ship that.
        reporter: told what happens; None is quiet.
        track: trackers that are told: "tensorboard", "mlflow", "wandb", "trackio"; None: none of them.
        fields: fields of `headstart.Run`, such as `method="l2-sp"`, `epochs=20`, `hyper={"alpha": 0.1}`.

    Raises:
        HeadstartError: what was given cannot be used, or training could not go on.
    """
    reporter = reporter or Reporter()
    run = Run.asked(data=str(data), **fields)
    if track is not None and os.environ.get("RANK", "0") == "0":  # of several processes, the first tells
        reporter = tracked(reporter, track, Path(out).absolute().parent)
    prepared = prepare(run, say=reporter.say)
    reporter.begin(1)
    reporter.run(prepared.name, 1, 1)
    try:
        result = execute(prepared, Path(out), resume=resume, overwrite=overwrite, reporter=reporter)
        if refit:
            from headstart.training.refit import refit as once_more

            result = once_more(prepared, Path(out), reporter=reporter)
    finally:
        reporter.end()
    return Trained(Path(out), result)


def failed(prepared: Prepared, reason: str) -> Result:
    """The record of a run that could not be finished."""
    return _result(prepared, "failed").model_copy(update={"reason": reason})


def _result(prepared: Prepared, status: Any) -> Result:
    packages = ("headstart", "torch", "torchvision", "timm", "accelerate", "numpy")
    return Result(
        status=status,
        run=prepared.run,
        method=prepared.run.method,
        preset=prepared.run.preset,
        hyper=prepared.hyper,
        model=prepared.pretrained.name,
        recipe=prepared.recipe,
        classes=prepared.task.classes,
        fingerprints=prepared.fingerprints,
        split_seed=prepared.task.split_seed,
        seed=prepared.run.seed,
        epochs=0,
        versions={"python": platform.python_version()} | {name: version(name) for name in packages},
    )


def _leave(folder: Path, result: Result, machine: Machine) -> None:
    if machine.main:
        write_json(folder / "result.json", result.model_dump(mode="json"))


def _leave_failed(folder: Path, prepared: Prepared, error: HeadstartError, machine: Machine) -> None:
    with suppress(OutputError):  # on a full disk the reason itself is what a person has to read
        _leave(folder, failed(prepared, str(error)), machine)


def training_batches(prepared: Prepared, machine: Machine) -> Train:
    """The augmented batches of a run, as this process sees them."""
    run = prepared.run
    return prepared.task.train(
        prepared.batch_size,
        seed=run.seed,
        augment=run.augment,
        mixup=run.mixup,
        cutmix=run.cutmix,
        rank=machine.rank,
        world=machine.world,
        workers=run.workers,
        device=machine.device,
    )


def place(method: Method, batches: Train, prepared: Prepared, folder: Path, machine: Machine) -> None:
    """Lay the network out in memory as is faster here, and compile it where that was asked for.

    The layout is measured once per run: a resumed run must compute as it did before.
    """
    note = folder / "run.json"
    known = read_json(note)
    asked = prepared.run.channels_last
    if asked is None:
        asked = known.get("channels_last")
    if machine.main:
        x, _ = next(iter(batches))
        machine.choose_layout(method.net, x, asked, cache_dir() / "layouts.json")
    machine.channels_last = machine.from_main(machine.channels_last)
    if machine.main:
        write_json(note, known | {"channels_last": machine.channels_last})
    if prepared.run.compile:
        method.net.compile()


def _learning(method: Method, epochs: int) -> int:
    """How many numbers learn in some phase of the plan."""
    every = {id(p): p.numel() for phase in method.plan(epochs) for g in phase.groups for p in g.params}
    return sum(every.values())
