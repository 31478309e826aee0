"""`headstart train`: one network, one method, one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.asked import asked, check_hyper, write
from headstart.cli.options import Data, Json, Out, Track, run_options
from headstart.errors import ConfigError
from headstart.records import Run

if TYPE_CHECKING:
    from headstart.records import Result
    from headstart.training.job import Prepared


@run_options("Data", "Network", "Method", "Training", "Machine")
def run(
    flags: dict[str, Any],
    data: Data = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option(help="Go on with the same run, interrupted in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in --out.")] = False,
    track: Track = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Then train on train and val, for the length learnt, and ship that."),
    ] = False,
    json: Json = False,
    sets: list[str] | None = None,
    config: Path | None = None,
) -> int:
    """Fine-tune one network with one method.

    Leaves in --out: result.json, metrics.jsonl, predictions.npz, split.csv, config.resolved.yaml and model/.

    Example: headstart train photos/ --method lp-ft --epochs 20 --out runs/first
    """
    fields = asked(config=config, flags=flags, sets=sets)
    if data is not None:
        fields["data"] = str(data)
    if "data" not in fields:
        raise ConfigError(
            "Which pictures? Give a folder of class folders or a CSV file: headstart train DATA"
        )
    if out is None:
        raise ConfigError("Where should the run go? Give a new folder with --out.")
    # Before torch is loaded: what does not fit is said at once.
    run = Run.asked(**fields)
    check_hyper(fields, [run.method])

    from headstart.cli.progress import reporter
    from headstart.training.job import execute, prepare
    from headstart.training.refit import refit as once_more
    from headstart.training.trackers import tracked

    telling = reporter()
    if track is not None and outcome.is_main():
        telling = tracked(telling, track, out.absolute().parent)
    prepared = prepare(run, say=telling.say)
    telling.begin(1)
    telling.run(prepared.name, 1, 1)
    try:
        result = execute(prepared, out, resume=resume, overwrite=overwrite, reporter=telling)
        if refit:
            result = once_more(prepared, out, reporter=telling)
    finally:
        telling.end()
    if outcome.is_main():
        write(out / "config.resolved.yaml", fields, {prepared.name: settled(prepared)})
        if json:
            outcome.show_json(result.model_dump(mode="json") | {"folder": str(out)})
        else:
            _show(result, out)
    return outcome.GOOD


def settled(prepared: Prepared) -> dict[str, Any]:
    """What was open in what was asked, and what it became."""
    return {
        "hyper": prepared.hyper,
        **prepared.recipe.model_dump(mode="json"),
        "batch_size": prepared.batch_size,
        "split_seed": prepared.task.split_seed,
        "img_size": prepared.pretrained.preprocess.size,
    }


def _show(result: Result, out: Path) -> None:
    method = result.method if result.preset is None else f"{result.method} ({result.preset})"
    plural = "epoch" if result.epochs == 1 else "epochs"
    print(f"{method} on {result.model}, {len(result.classes)} classes, {result.epochs} {plural}")
    for name, score in (("val ", result.val), ("test", result.test)):
        if score is not None:
            print(
                f"  {name}  accuracy {score.accuracy:.3f}  balanced {score.balanced_accuracy:.3f}  "
                f"macro F1 {score.macro_f1:.3f}  log-loss {score.log_loss:.3f}  (n={score.n})"
            )
    if result.refit is not None and result.refit.test is not None:
        score = result.refit.test
        print(f"  {result.refit.said()}: test accuracy {score.accuracy:.3f}, log-loss {score.log_loss:.3f}")
    facts = [f"{result.seconds:.0f} s"]
    if result.peak_memory_mb is not None:
        facts.append(f"peak memory {result.peak_memory_mb:.0f} MB")
    if result.parameters is not None:
        facts.append(
            f"{result.parameters.trained:,} parameters trained, {result.parameters.shipped:,} shipped"
        )
    if result.kept is not None:
        facts.append(f"weights of: {result.kept}")
    print(f"  {', '.join(facts)}")
    print(f"Model:  {out / 'model'}")
    print(f"Next:   headstart predict {out} PICTURES")
