"""The last step of a run: train once more, on train and val together, for the length that was learnt.

Pictures that were held back to choose by are worth learning from once nothing is left to choose. How long to
train is known by then: as many epochs as were asked for, or up to the best one where that was kept. So is the
temperature of the probabilities. What is shipped then has no validation score of its own: that of the run
stays, for comparisons, and test is looked at once more, for the weights that are shipped.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from headstart.data.splits import joined
from headstart.disk import alone, write_json
from headstart.errors import MethodError, OutputError
from headstart.records import Refit, Result
from headstart.ship import bundle
from headstart.training import shipped
from headstart.training.events import Reporter
from headstart.training.folder import read_result, write_npz
from headstart.training.job import SCORED_AT_ONCE, Prepared, build, place, training_batches
from headstart.training.loop import fit
from headstart.training.machine import Machine, Placed
from headstart.training.score import predictions, score


def refit(prepared: Prepared, folder: Path, *, reporter: Reporter | None = None) -> Result:
    """Refit the finished run in a folder, and put what comes out in the place of its model.

    A refit that was interrupted is gone on with; one that is done is left as it is.

    Args:
        prepared: the run.
        folder: where it lies, finished.
        reporter: told what happens.

    Raises:
        OutputError: no finished run with a model lies there, or it cannot be written.
        MethodError: a method that cannot do without validation pictures.
        TrainingError: training could not go on; the run stays as it was.
    """
    reporter = reporter or Reporter()
    finished = read_result(folder)
    if finished is None or finished.status != "finished" or finished.run.trial:
        raise OutputError(f"{folder} holds no finished run, so there is nothing to refit.")
    if finished.refit is not None:
        reporter.say(f"{folder} is refitted already")
        return finished
    machine = Machine(prepared.run.device, prepared.run.precision)
    with ExitStack() as held:
        if machine.main:
            held.enter_context(alone(folder, "run"))
        return _refit(prepared, finished, folder, machine, reporter)


def _refit(
    prepared: Prepared, finished: Result, folder: Path, machine: Machine, reporter: Reporter
) -> Result:
    run, started = prepared.run, time.perf_counter()
    wider = replace(prepared, task=replace(prepared.task, split=joined(prepared.task.split)))
    epochs, pictures = length(finished), len(wider.task.labels("train"))
    reporter.say(f"refitting on train and val: {pictures} pictures, {epochs} epochs")
    try:
        method = build(wider)
    except MethodError as error:
        raise MethodError(f"There are no validation pictures left in a refit. {error}") from error
    batches = training_batches(wider, machine)
    place(method, batches, wider, folder, machine)
    at_once = SCORED_AT_ONCE[machine.device.type]
    own = folder / "refit"
    own.mkdir(exist_ok=True)
    fitted = fit(
        method,
        train=batches,
        val=(),
        plain=wider.task.plain("train", at_once, device=machine.device),
        recipe=prepared.recipe,
        epochs=epochs,
        machine=machine,
        seed=run.seed,
        grad_accum=run.grad_accum,
        folder=own,
        reporter=reporter,
    )
    said = predictions(method, Placed(wider.task.plain("test", at_once, device=machine.device), machine))
    exported = method.export().cpu().to(memory_format=torch.contiguous_format)
    seconds = round(time.perf_counter() - started + fitted.before, 2)
    done = Refit(
        epochs=epochs, pictures=pictures, test=None if said is None else score(*said), seconds=seconds
    )
    result = finished.model_copy(update={"refit": done})
    if machine.main:
        with np.load(folder / "predictions.npz", allow_pickle=False) as kept:
            arrays = dict(kept)
        if said is not None:
            arrays |= {"refit_test_probabilities": said[0], "refit_test_labels": said[1]}
        write_npz(folder / "predictions.npz", arrays)
        ours = {"test_probabilities": said[0], "test_labels": said[1]} if said is not None else {}
        bundle.save(
            folder / "model",
            exported,
            config=prepared.pretrained.config,
            preprocess=prepared.pretrained.preprocess,
            classes=prepared.task.classes,
            card=shipped.card(result, prepared),
            calibration=shipped.calibration(arrays | ours),
        )
        write_json(folder / "result.json", result.model_dump(mode="json"))
        shutil.rmtree(own, ignore_errors=True)
    return result


def length(finished: Result) -> int:
    """How many epochs a run has shown to be right: up to the best one where that was kept, else all.

    Where phases were cut short by patience, that is fewer than were asked for.
    """
    kept = finished.kept or "last"
    if kept.startswith("best, epoch "):
        return max(1, int(kept.removeprefix("best, epoch ")))
    return finished.run.epochs
