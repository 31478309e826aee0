"""The paragraph to paste into a paper: what was done, from what was recorded."""

from __future__ import annotations

from collections import Counter
from typing import Any

from headstart.records import Result
from headstart.report.evidence import Evidence
from headstart.report.papers import PAPERS
from headstart.report.words import listed, several


def paragraphs(evidence: Evidence) -> list[str]:
    """Two or three paragraphs of plain text; empty where no run finished."""
    if not evidence.runs:
        return []
    result = _usual(evidence)
    return [each for each in (_setup(evidence, result), _tuning(evidence), _statistics(evidence)) if each]


def _usual(evidence: Evidence) -> Result:
    """A run with the optimiser that most have: a method that follows one alone speaks for itself."""
    rules = Counter(each.result.recipe.optimizer for each in evidence.runs if each.result.recipe is not None)
    most = next(iter(rules.most_common(1)), (None, 0))[0]
    return next(
        (
            e.result
            for e in evidence.runs
            if e.result.recipe is not None and e.result.recipe.optimizer == most
        ),
        evidence.runs[0].result,
    )


def _setup(evidence: Evidence, result: Result) -> str:
    run, verdict = result.run, evidence.verdict
    methods = list(dict.fromkeys(_cited(row.method) for row in verdict.rows if row.seeds))
    repetitions = len({(each.split, each.seed) for each in verdict.runs})
    size = f" at {run.img_size} pixels" if run.img_size else ""
    n = result.n_train
    learnt = f"{n:,} training images" if n else "the training images"
    text = (
        f"We fine-tuned {result.model}{size} on {learnt} of {several(len(result.classes), 'class')} with "
        f"{listed(methods)}. "
    )
    splits = {each.split for each in verdict.runs}
    drawn = (
        f"{len(splits)} random stratified splits (training {run.split[0]:.0%}, validation "
        f"{run.split[1]:.0%}, test {run.split[2]:.0%}; duplicates and near-duplicates on one side)"
        if len(splits) > 1
        else "one split into training, validation and test images"
    )
    text += (
        f"Each method was run {several(repetitions, 'time')}, on {drawn}; within a repetition all methods "
        "shared the split, the order of the images and their augmentation. "
    )
    text += f"Training took {several(run.epochs, 'epoch')} in batches of {run.batch_size}"
    if result.recipe is not None:
        r = result.recipe
        text += (
            f" with {_spelt(r.optimizer)} (learning rate {r.lr:.3g}, "
            f"weight decay {r.weight_decay:.3g}, {r.schedule} schedule, label smoothing {r.label_smoothing:g}"
            + (", moving average of the weights" if r.ema is not None else "")
            + "), unless the method prescribes otherwise"
        )
        others = list(
            dict.fromkeys(
                (each.label, _spelt(each.result.recipe.optimizer))
                for each in evidence.runs
                if each.result.recipe is not None and each.result.recipe.optimizer != r.optimizer
            )
        )
        for rule in dict.fromkeys(rule for _, rule in others):
            text += f"; {listed([label for label, other in others if other == rule])} with {rule}"
    return (
        f"{text}. Models were chosen on validation images only; test images were scored once per run, at its "
        "end."
    )


def _spelt(optimizer: str) -> str:
    return {"sgd": "SGD", "adamw": "AdamW"}[optimizer]


def _cited(label: str) -> str:
    paper = PAPERS.get(label.split(":")[0].split("[")[0])
    return f"{label} ({paper.cite})" if paper else label


def _tuning(evidence: Evidence) -> str:
    tuning: Any = evidence.asked.get("tuning")
    if not isinstance(tuning, dict) or not (tuning.get("trials") or tuning.get("budget_seconds")):
        return ""
    what = []
    if tuning.get("trials"):
        what.append(several(int(tuning["trials"]), "trial"))
    if tuning.get("budget_seconds"):
        what.append(f"{float(tuning['budget_seconds']):,.0f} seconds")
    return (
        f"Hyper-parameters were tuned with an equal budget of {listed(what)} per method, the baseline "
        "included, on validation accuracy; learning rate and weight decay had the same ranges for all, and "
        "the value that turns a method off was among those tried."
    )


def _statistics(evidence: Evidence) -> str:
    verdict = evidence.verdict
    versions = evidence.runs[0].result.versions
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("headstart", "torch", "timm") if name in versions
    )
    made = f" Software: {named}." if named else ""
    if len({(each.split, each.seed) for each in verdict.runs}) == 1:
        return (
            "Intervals are Wilson's 95 % intervals of single models; with one repetition, no difference "
            f"between methods is claimed.{made}"
        )
    smallest = (
        ""
        if verdict.smallest_difference is None
        else f" The smallest difference that this test set could have shown is about "
        f"{100 * verdict.smallest_difference:.1f} percentage points."
    )
    return (
        "Accuracies are means over the repetitions with 95 % intervals over test images (Bayesian bootstrap, "
        "the same weights for all methods, so that differences are paired image by image) and repetitions. A "
        f"method is said to help (hurt) only where the interval of its difference to {verdict.baseline} lies "
        f"above (below) zero.{smallest}{made}"
    )
