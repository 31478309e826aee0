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
            f" with {_spelt(r.optimizer)} ({_value(evidence, r.optimizer, 'lr')}, "
            f"{_value(evidence, r.optimizer, 'weight_decay')}, {r.schedule} schedule, "
            f"label smoothing {r.label_smoothing:g}"
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
    text += (
        ". Models were chosen on validation images only; test images were scored once per run, at its end."
    )
    if evidence.taken is not None and evidence.taken.result.refit is not None:
        text += (
            " The one that is shipped was then trained once more, on training and validation images, and "
            "scored a second time."
        )
    return text


def _spelt(optimizer: str) -> str:
    return {"sgd": "SGD", "adamw": "AdamW"}[optimizer]


def _cited(label: str) -> str:
    paper = PAPERS.get(label.split(":")[0].split("[")[0])
    return f"{label} ({paper.cite})" if paper else label


_SHARED = {"lr": "learning rate", "weight_decay": "weight decay"}  # searched alike for all methods


def _value(evidence: Evidence, optimizer: str, name: str) -> str:
    """A rate or decay of the runs with this optimiser: everyone's, or from where to where it was tuned."""
    alike = [
        e for e in evidence.runs if e.result.recipe is not None and e.result.recipe.optimizer == optimizer
    ]
    searched = [each for each in alike if name in _space(evidence).get(each.label, {})]
    values = [getattr(each.result.recipe, name) for each in searched or alike]
    least, most = min(values), max(values)
    # Otherwise it is a preset's that differs, and the sentence says that methods may prescribe their own.
    tuned = bool(searched) or any(getattr(each.result.run, name) is not None for each in alike)
    if tuned and least < most:
        return f"{_SHARED[name]} tuned, {least:.3g} to {most:.3g}"
    return f"{_SHARED[name]} {Counter(values).most_common(1)[0][0]:.3g}"


def _space(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """By method, what was searched of it; empty where that was not written down."""
    tuning = evidence.asked.get("tuning")
    space = tuning.get("space") if isinstance(tuning, dict) else None
    if not isinstance(space, dict):
        return {}
    return {str(label): axes for label, axes in space.items() if isinstance(axes, dict)}


def _tuning(evidence: Evidence) -> str:
    tuning: Any = evidence.asked.get("tuning")
    if not isinstance(tuning, dict) or not (tuning.get("trials") or tuning.get("budget_seconds")):
        return ""
    idle = [label for label, axes in _space(evidence).items() if not axes]
    baseline = "" if evidence.verdict.baseline in idle else ", the baseline included"
    nothing = f"; of {listed(idle)} there was nothing to tune" if idle else ""
    text = (
        "Hyper-parameters were tuned on validation accuracy, with an equal budget for every method"
        f"{baseline}: {_budget(evidence)}{nothing}."
    )
    return " ".join([text, *_ranges(evidence), *_first_trials(evidence)])


def _budget(evidence: Evidence) -> str:
    """What a method had: trials are counted for each of its searches, seconds for all of them together."""
    tuning, sizes = evidence.asked["tuning"], evidence.asked.get("train_sizes")
    each = ["split"] if len({run.split for run in evidence.verdict.runs}) > 1 else []
    each += ["number of labels"] if isinstance(sizes, list) and len(sizes) > 1 else []
    trials, seconds = tuning.get("trials"), tuning.get("budget_seconds")
    what = []
    if trials:
        what.append(several(int(trials), "trial") + (f" per {listed(each)}" if each else ""))
    if seconds:
        shared = f" in all, in equal shares for every {listed(each)}" if each else ""
        what.append(f"{float(seconds):,.0f} seconds{shared}")
    return " or ".join(what) + (", whichever ended first" if len(what) > 1 else "")


def _ranges(evidence: Evidence) -> list[str]:
    """Where the shared axes were searched, and for whom; nothing where they were given by hand."""
    alike: dict[tuple[Any, ...], list[str]] = {}  # axes with the same ends and methods are told together
    for name, what in _SHARED.items():
        found = {label: axes[name] for label, axes in _space(evidence).items() if name in axes}
        ends = {(each.get("low"), each.get("high")) for each in found.values() if isinstance(each, dict)}
        if len(ends) == 1:
            alike.setdefault((*ends.pop(), *found), []).append(what)
    told = []
    for (low, high, *labels), names in alike.items():
        others = [label for label, axes in _space(evidence).items() if axes and label not in labels]
        told.append(
            f"{listed(names).capitalize()} {'was' if len(names) == 1 else 'were'} searched from {low:g} to "
            f"{high:g} times the recipe's, alike for all methods{f' but {listed(others)}' if others else ''}."
        )
    return told


def _first_trials(evidence: Evidence) -> list[str]:
    """Whether methods were tried as they are and turned off: not all can be, and one trial is too few."""
    kinds: dict[str, set[str]] = {"default": set(), "off": set()}
    for study in evidence.search.get("studies") or []:
        for trial in study.get("trials") or []:
            kinds.setdefault(str(trial.get("kind")), set()).add(str(study.get("method")))
    if not kinds["default"]:
        return []
    off = [label for label in evidence.labels if label in kinds["off"]]
    return [
        "The first trial was each method as it is"
        + (f", the second of {listed(off)} the method turned off." if off else ".")
    ]


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
