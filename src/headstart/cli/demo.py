"""`headstart demo`: the main job on real pictures, from fetching them to predicting new ones."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.compare import compared, show

if TYPE_CHECKING:
    from headstart.comparison.runner import Comparison

# Some minutes on two quiet cores: 3 trained methods x 2 seeds x EPOCHS epochs of ten steps.
PER_CLASS = 75
SPLIT = (0.4, 0.2, 0.4)  # of 750 pictures: 300 to learn from, 150 to choose by, 300 to be judged by
EPOCHS = 4
SETTINGS: dict[str, Any] = {
    "methods": "probe,full,lp-ft,l2-sp",
    "seeds": 2,
    "model": "efficientnet-lite0",
    "img_size": 128,
    "split": SPLIT,
    "epochs": EPOCHS,
}
SHOWN = 3  # test pictures that the winner labels at the end
FALLBACK: dict[str, Any] = {"augment": "no-flip"}  # a mirrored digit is another sign


def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where pictures and results go.")] = Path(
        "headstart-demo"
    ),
) -> int:
    """Fetch real pictures, compare four ways of fine-tuning on them, say which to take, and predict.

    Takes a few minutes on two cores. The second time, what is finished is taken as it is.

    Example: headstart demo
    """
    from headstart.cli.progress import say_on_stderr as say

    pictures, own = _pictures(out / "data")
    fields = {"data": str(pictures)} | SETTINGS | own
    say(
        f"Comparing {fields['methods']} with {fields['model']} at {fields['img_size']} px, "
        f"{fields['seeds']} seeds, {fields['epochs']} epochs."
    )
    started = time.monotonic()
    done = compared(fields, out / f"compared-{pictures.name}")
    say(f"Compared in {time.monotonic() - started:.0f} s.")
    print()
    show(done)
    if done.judgement.take is not None:
        _predict(done, pictures)
    _next(done, pictures)
    return outcome.SOME_FAILED if done.failed else outcome.GOOD


def _pictures(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Real drawings where they can be had, else the digits that come with scikit-learn."""
    from headstart.cli.progress import say_on_stderr as say
    from headstart.data.catalogue import fetch
    from headstart.errors import Unreachable

    clipart, digits = folder / "clipart", folder / "digits"
    if digits.exists() and not clipart.exists():
        say(f"Using the digits in {digits}, as before; remove that folder to try clipart again.")
        return fetch("digits", digits, per_class=PER_CLASS, say=say), FALLBACK
    try:
        return fetch("clipart", clipart, per_class=PER_CLASS, say=say), {}
    except Unreachable as error:
        say(f"clipart cannot be had: {error}\nUsing handwritten digits instead.")
        return fetch("digits", digits, per_class=PER_CLASS, say=say), FALLBACK


def _predict(done: Comparison, pictures: Path) -> None:
    """Three test pictures of different classes, what the chosen model says, and what they are."""
    take = done.judgement.take
    assert take is not None
    truth: dict[str, str] = {}
    for path, label in _tested(done, take.seed):
        if label not in truth.values() and len(truth) < SHOWN:
            truth[str(pictures / path)] = label
    print(f"\nThree test pictures that {take.method} (seed {take.seed}) has not learned from:")
    width = max(map(len, truth))
    for row in done.best.predict(list(truth)):
        said = row.error if row.label is None else f"{row.label} {row.probability:.2f}"
        print(f"  {row.path:<{width}}  says {said}, is {truth[row.path]}")


def _tested(done: Comparison, seed: int) -> list[tuple[str, str]]:
    """Path and label of the test pictures of a seed, from the split.csv of any run of it."""
    for folder in sorted((done.folder / "runs").glob(f"*-s{seed}")):
        if (folder / "split.csv").is_file():
            with (folder / "split.csv").open(encoding="utf-8", newline="") as file:
                return [(row["path"], row["label"]) for row in csv.DictReader(file) if row["split"] == "test"]
    return []


def _next(done: Comparison, pictures: Path) -> None:
    example = next(iter(sorted(pictures.rglob("*.png"))), "PICTURE")
    print(
        f"""
With your own pictures, one folder per class:
  headstart check   PHOTOS
  headstart compare PHOTOS --epochs 20 --out compared
  headstart predict compared NEW-PHOTOS --format csv
With these:
  headstart predict {done.folder} {example}"""
    )
