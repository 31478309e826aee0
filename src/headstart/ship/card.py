"""The model card: what anybody should know before they rely on the model, as the hub's README.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from headstart.ship.calibration import Calibration, Trust, wilson
from headstart.ship.folder import DESCRIBED

# Identifiers of the Hugging Face Hub; what is none of them is "other" there, with the name beside it.
_LICENCES = frozenset(
    (
        *("unknown", "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"),
        *("cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
        *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "openrail"),
        *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    )
)
_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log-loss",
    "calibration_error": "calibration error, uncalibrated",
}
_FEW = 20  # training pictures of a class


def write(
    document: Mapping[str, Any],
    *,
    calibration: Calibration | None = None,
    verification: Mapping[str, Any] | None = None,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    files: Sequence[str] = (),
) -> str:
    """The text of README.md.

    Args:
        document: config.json as plain data; its card says how the network was made.
        calibration: of its probabilities.
        verification: what `ship.verify` found, by format.
        intervals: 95 % intervals by split and score, beyond that of the accuracy.
        files: names of further files that lie beside the card.
    """
    own = document["headstart"]
    card, classes = own["card"], document["label_names"]
    parts = [
        *_header(document, card),
        *_facts(card, classes),
        *_scores(card, intervals or {}),
        *_trust(calibration),
        *_checked(verification or {}),
        *_limits(card, classes),
        *_use(document, own, files),
        *_command(card),
    ]
    return "\n".join(parts)


def _header(document: Mapping[str, Any], card: Mapping[str, Any]) -> Iterator[str]:
    licence = str(card.get("licence") or "unknown")
    header: dict[str, Any] = {
        "library_name": "timm" if document.get("architecture") else "pytorch",
        "pipeline_tag": "image-classification",
        "license": licence if licence.lower() in _LICENCES else "other",
        "license_name": None if licence.lower() in _LICENCES else licence,
        "base_model": card.get("hub_id"),
        "tags": ["image-classification", "headstart", *([str(card["method"])] if card.get("method") else [])],
        "model-index": _index(card),
    }
    header = {key: value for key, value in header.items() if value is not None}
    classes = document["label_names"]
    yield from ("---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "")
    made = card.get("model") or document["headstart"]["class"]
    yield from (f"# {made}, fine-tuned for {len(classes)} classes", "")
    yield from (f"Classes: {', '.join(classes)}.", "")


def _index(card: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The test scores as the hub's leaderboards read them."""
    score = card.get("test")
    if not isinstance(score, Mapping):
        return None
    metrics = [
        {"type": key, "name": f"{name} (n={score.get('n')})", "value": round(float(score[key]), 4)}
        for key, name in _NAMES.items()
        if score.get(key) is not None
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": str(card.get("data") or "own pictures"), "type": "imagefolder", "split": "test"},
        "metrics": metrics,
    }
    return [{"name": str(card.get("model") or "network"), "results": [result]}]


def _facts(card: Mapping[str, Any], classes: Sequence[str]) -> Iterator[str]:
    counts = card.get("counts")
    facts = {
        "Method": " - ".join(str(card[key]) for key in ("method", "paper") if card.get(key)),
        "Source network": card.get("model"),
        "Source weights": card.get("origin"),
        "Licence": f"{card.get('licence') or 'unknown'} (inherited from the source weights)",
        "Data": card.get("data"),
        "Pictures": ", ".join(f"{number} {split}" for split, number in counts.items())
        if isinstance(counts, Mapping)
        else None,
        "Split": card.get("split"),
        "Epochs": card.get("epochs"),
        "Weights kept": card.get("kept"),
        "Seeds": ", ".join(
            f"{name.replace('_', ' ')} {card[name]}" for name in ("seed", "split_seed") if name in card
        ),
    }
    yield from (f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))


def _scores(card: Mapping[str, Any], intervals: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    scores = {split: card[split] for split in ("val", "test") if isinstance(card.get(split), Mapping)}
    if not scores:
        return
    columns = list(dict.fromkeys(key for score in scores.values() for key in score))
    yield from ("", "## Scores", "", f"| split | {' | '.join(_NAMES.get(key, key) for key in columns)} |")
    yield f"|{'---|' * (len(columns) + 1)}"
    for split, score in scores.items():
        known = dict(intervals.get(split, {}))
        n, accuracy = score.get("n"), score.get("accuracy")
        if isinstance(n, int) and n > 0 and isinstance(accuracy, float):
            known["accuracy"] = wilson(round(accuracy * n), n)
        yield f"| {split} | {' | '.join(_number(score.get(key), known.get(key)) for key in columns)} |"
    yield from ("", "In brackets 95 % intervals: what another draw of as many pictures could have shown.")
    settled = card.get("settled")
    if isinstance(settled, Mapping) and isinstance(settled.get("agreement"), float):
        yield (
            "This is one ordinary network in the place of one in which each picture takes its own way; on "
            f"{settled.get('pictures')} {settled.get('of')} pictures the two agreed in "
            f"{settled['agreement']:.1%}. The scores are of this one."
        )
    if card.get("refit"):
        yield (
            "The scores on val are of the same training on train alone; those on test are of the weights in "
            "this folder, which have learnt from val too."
        )
    if "val" in scores:
        yield "The method and its settings may have been chosen on val; nothing was chosen on test."


def _trust(calibration: Calibration | None) -> Iterator[str]:
    if calibration is None or calibration.val is None:
        return
    yield from ("", "## Probabilities", "")
    yield f"Divided by a temperature of {calibration.temperature:.3f}, fitted on the validation pictures."
    yield from ("", "| split | n | calibration error before | after | log-loss before | after |")
    yield "|---|---|---|---|---|---|"
    for split, trust in (("val", calibration.val), ("test", calibration.test)):
        if trust is not None:
            yield (
                f"| {split} | {trust.n} | {trust.calibration_error_before:.4f} | "
                f"{trust.calibration_error:.4f} | {trust.log_loss_before:.4f} | {trust.log_loss:.4f} |"
            )
    yield ""
    if calibration.threshold is None:
        yield (
            f"No threshold reaches an accuracy of {calibration.wanted:.0%} on the validation pictures, so "
            "every answer is marked `unsure`."
        )
        return
    yield (
        f"Answers below a probability of {calibration.threshold:.3f} are marked `unsure`: the others should "
        f"be right in {calibration.wanted:.0%} of the cases."
    )
    for split, trust in (("validation", calibration.val), ("test", calibration.test)):
        if trust is not None:
            yield _answered(split, trust)


def _answered(split: str, trust: Trust) -> str:
    if trust.accuracy is None or trust.interval is None:
        return f"Of the {trust.n} {split} pictures none reaches it."
    low, high = trust.interval
    return (
        f"Of the {trust.n} {split} pictures {trust.answered:.0%} are at or above it, and of these "
        f"{trust.accuracy:.1%} are right [{low:.1%}, {high:.1%}]."
    )


def _checked(verification: Mapping[str, Any]) -> Iterator[str]:
    formats = verification.get("formats", {})
    failed = verification.get("not_written", {})
    if not formats and not failed:
        return
    yield from ("", "## Verified", "")
    for name, said in formats.items():
        yield (
            f"- {name}: {said['agreed']} of {said['pictures']} pictures get the same label as from the "
            f"trained network; the largest difference of a probability is {said['largest_difference']:.1e}."
        )
    yield from (f"- {name}: not written. {why}" for name, why in failed.items())


def _limits(card: Mapping[str, Any], classes: Sequence[str]) -> Iterator[str]:
    yield from ("", "## Limits", "")
    yield (
        f"- It knows these {len(classes)} classes only and has no 'none of these': a picture of anything "
        "else gets one of them too, sometimes with high probability."
    )
    yield (
        "- Scores hold for pictures like those that it was tested on: other cameras, light or places may do "
        "worse."
    )
    each = card.get("per_class")
    if isinstance(each, Mapping):
        few = [f"{name} ({number})" for name, number in each.items() if number < _FEW]
        if few:
            shown = ", ".join(few[:20]) + (f" and {len(few) - 20} more" if len(few) > 20 else "")
            yield f"- Few training pictures: {shown}."
    score = card.get("test")
    if isinstance(score, Mapping) and isinstance(score.get("n"), int) and score["n"] < 100:
        yield f"- {score['n']} test pictures are few: read the intervals, not the scores."


def _use(document: Mapping[str, Any], own: Mapping[str, Any], files: Sequence[str]) -> Iterator[str]:
    yield from ("", "## Use", "", "```", "headstart predict THIS_FOLDER photo.jpg", "```", "")
    if document.get("architecture"):
        call = 'net = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)'
        yield from ("```python", "import timm", call, "```", "")
        yield from ("Class names are in labels.json, the preprocessing in preprocess.json.", "")
    elif DESCRIBED & own.keys():
        routed = "routed" in own
        shape = (
            "Each picture takes its own way through this network"
            if routed
            else "Parts of this network were cut away"
        )
        yield from (f"{shape}, so timm cannot build it by name; `headstart.load(folder)` does.", "")
    else:
        yield from (
            f"timm cannot build this network ({own['class']}) by name. Build it in Python, then "
            "`headstart.load(folder, net=...)`.",
            "",
        )
    yield from (f"- {name}: {what}" for name, what in _FILES.items() if name in files)


_FILES = {
    "model.onnx": "for onnxruntime and others; takes `pixels` float32 [B, 3, size, size], normalised as "
    "preprocess.json says, and gives `logits`",
    "model-from-pixels.onnx": "the same with the preprocessing inside; takes `picture` uint8 [B, H, W, 3] of "
    "any size, and gives `logits` and calibrated `probabilities`",
    "model.pt2": "for torch.export.load; takes and gives the same as model.onnx",
}


def _command(card: Mapping[str, Any]) -> Iterator[str]:
    if card.get("command"):
        yield from ("", "## Made with", "", "```", str(card["command"]), "```", "")
        versions = card.get("versions")
        if isinstance(versions, Mapping):
            yield from (", ".join(f"{name} {number}" for name, number in versions.items()) + ".", "")


def _number(value: Any, interval: Sequence[float] | None) -> str:
    shown = f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
    return shown if interval is None else f"{shown} [{interval[0]:.3f}, {interval[1]:.3f}]"
