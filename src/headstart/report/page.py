"""The page: everything that was found, in one HTML file without a single request."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from headstart.errors import ConfigError, OutputError
from headstart.judgement import Row
from headstart.report import figures, gallery, insides, words
from headstart.report.evidence import Evidence, Seen, read
from headstart.report.figure import Figure, colour, marker, number
from headstart.report.methods_section import paragraphs
from headstart.report.papers import PAPERS

NAME = "report.html"
_CALLS = {"helps": "▲", "hurts": "▼", "no evidence": "○", "baseline": "●"}  # no meaning by colour alone


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a comparison, from its files alone: no torch, no GPU, no network.

    Args:
        folder: what `compare` left.
        path: of the page; None: `report.html` in the folder.

    Returns:
        Where it lies.

    Raises:
        OutputError: the folder holds no comparison, or the page cannot be written.
        ConfigError: Jinja2 or Plotly is not installed.
    """
    folder = Path(folder)
    target = folder / NAME if path is None else Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder. Name the file, such as {target / NAME}.")
    text = render(read(folder))
    _write(target, text)
    return target


def render(evidence: Evidence) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise ConfigError(
            "The report needs Jinja2 and Plotly. Install them with: pip install 'headstart[report]'"
        ) from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": words.percent,
        "points": words.points,
        "between": words.between,
        "points_between": words.points_between,
        "duration": words.duration,
        "count": words.count,
        "memory": words.memory,
        "probability": words.probability,
        "p_value": words.p_value,
        "listed": words.listed,
    }
    template = environment.from_string(_part("page.html"))
    return template.render(
        page=_page(evidence), style=_part("style.css"), script=_part("page.js"), plotly=_plotly()
    )


def _part(name: str) -> str:
    return resources.files("headstart.report").joinpath("template", name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Plotly's script, as its own package ships it."""
    try:
        found = (
            resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
        )
    except (ImportError, OSError):
        raise ConfigError(
            "The report needs Jinja2 and Plotly. Install them with: pip install 'headstart[report]'"
        ) from None
    return found.replace("</script", "<\\/script")


@dataclass
class Line:
    """One row of the table of methods, with what the page shows beside the numbers."""

    row: Row
    colour: str
    marker: str
    sign: str  # of the verdict
    bar: dict[str, float] | None  # where its difference lies on the scale of all, in % of the width
    does: str
    cite: str
    taken: bool


@dataclass
class Inside:
    """What one method shows of its inside."""

    label: str
    does: str
    cite: str
    facts: list[tuple[str, str]]
    figures: list[Figure]


@dataclass
class Page:
    """All that the template shows."""

    title: str
    data: str
    evidence: Evidence
    lines: list[Line]
    headline: str
    taken: Row | None
    facts: list[tuple[str, str, str]]
    cautions: list[str]
    notes: list[str]
    differences: list[Figure]
    cost: list[Figure]
    curve: list[Figure]
    training: list[Figure]
    losses: list[Figure]
    errors: list[Figure]
    per_class: list[dict[str, Any]]
    mistakes: list[gallery.Mistake]
    wrong: int
    tested: int
    insides: list[Inside]
    classes: Figure | None
    audit: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    command: str
    paragraphs: list[str]
    repetitions: int
    specs: dict[str, str] = field(default_factory=dict)


def _page(evidence: Evidence) -> Page:
    verdict, taken = evidence.verdict, evidence.taken
    row = figures.row_of(evidence, verdict.take.method) if verdict.take is not None else None
    first = taken or (evidence.runs[0] if evidence.runs else None)
    paths, sides = gallery.sides(first) if first is not None else ({}, {})
    mistakes, wrong = gallery.mistakes(evidence, taken, paths) if taken is not None else ([], 0)
    data = _data(evidence)
    page = Page(
        title=f"Which way to fine-tune on {data}?",
        data=data,
        evidence=evidence,
        lines=_lines(evidence),
        headline=f"Take {verdict.take.method}" if verdict.take is not None else "Nothing to take yet",
        taken=row,
        facts=_facts(evidence, row),
        cautions=_cautions(evidence),
        notes=verdict.notes,
        differences=_some(figures.differences(evidence), figures.runs(evidence)),
        cost=_some(figures.cost(evidence)),
        curve=_some(figures.learning_curve(evidence)),
        training=_some(figures.search(evidence), figures.training(evidence)),
        losses=figures.losses(evidence),
        errors=[]
        if taken is None
        else _some(figures.confusion(taken), figures.reliability(taken), figures.coverage(taken)),
        per_class=[] if taken is None else figures.per_class(taken),
        mistakes=mistakes,
        wrong=wrong,
        tested=0 if taken is None or taken.said is None else len(taken.said.labels),
        insides=_insides(evidence),
        classes=figures.split_counts(evidence.audit, sides),
        audit=_audit(evidence.audit),
        settings=_settings(evidence, first),
        command=_command(evidence),
        paragraphs=paragraphs(evidence),
        repetitions=len({(each.split, each.seed) for each in verdict.runs}),
    )
    page.specs = {figure.id: _embedded(figure.spec) for figure in _every(page)}
    return page


def _every(page: Page) -> list[Figure]:
    inside = [figure for each in page.insides for figure in each.figures]
    return [
        *page.differences,
        *page.cost,
        *page.curve,
        *page.training,
        *page.losses,
        *page.errors,
        *inside,
        *_some(page.classes),
    ]


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end that element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
    )


def _some(*found: Figure | None) -> list[Figure]:
    return [figure for figure in found if figure is not None]


def _data(evidence: Evidence) -> str:
    runs = evidence.asked.get("runs")
    with contextlib.suppress(TypeError, KeyError, IndexError):
        return Path(str(runs[0]["run"]["data"])).name or "these pictures"  # type: ignore[index]
    return Path(evidence.runs[0].result.run.data).name if evidence.runs else "these pictures"


def _lines(evidence: Evidence) -> list[Line]:
    verdict = evidence.verdict
    gaps = [row.difference for row in verdict.rows if row.difference is not None]
    reach = max((max(abs(gap.lo), abs(gap.hi)) for gap in gaps), default=0.0) or 1.0
    lines = []
    for i, row in enumerate(verdict.rows):
        paper = PAPERS.get(row.method.split(":")[0].split("[")[0])
        bar = None
        if row.difference is not None:
            lo, mid, hi = (
                round(50 + 50 * value / reach, 2)
                for value in (row.difference.lo, row.difference.mean, row.difference.hi)
            )
            bar = {"lo": lo, "mid": mid, "hi": hi}
        lines.append(
            Line(
                row=row,
                colour=colour(i),
                marker=marker(i),
                sign=_CALLS.get(row.call or "", ""),
                bar=bar,
                does=paper.does if paper else "",
                cite=paper.cite if paper else "",
                taken=verdict.take is not None and verdict.take.method == row.method,
            )
        )
    return lines


def _facts(evidence: Evidence, row: Row | None) -> list[tuple[str, str, str]]:
    """Name, value and what to know about it, for the head of the page."""
    if row is None or row.accuracy is None:
        return []
    verdict = evidence.verdict
    found = [
        (
            "accuracy on test pictures",
            words.percent(row.accuracy.mean),
            f"95 %: {words.between(row.accuracy)}",
        )
    ]
    if row.difference is not None:
        found.append(
            (
                f"against {verdict.baseline}",
                f"{words.points(row.difference.mean)} points",
                f"95 %: {words.points_between(row.difference)}",
            )
        )
    found.append(("to train it once", words.duration(row.seconds), words.memory(row.peak_memory_mb)))
    if row.ms_per_image is not None:
        found.append(("per picture", f"{row.ms_per_image:.1f} ms", f"{words.count(row.shipped)} parameters"))
    if verdict.smallest_difference is not None:
        found.append(
            (
                "smallest difference that could be seen",
                f"{100 * verdict.smallest_difference:.1f} points",
                f"{verdict.distinct_test:,} different test pictures",
            )
        )
    return found


def _cautions(evidence: Evidence) -> list[str]:
    found = [evidence.verdict.caution] if evidence.verdict.caution else []
    if evidence.verdict.pending:
        found.append(
            f"{words.several(evidence.verdict.pending, 'run')} still to come: the verdict may change."
        )
    if evidence.unreadable:
        files = words.listed(evidence.unreadable[:4]) + (" and more" if len(evidence.unreadable) > 4 else "")
        found.append(
            f"{words.several(len(evidence.unreadable), 'file')} cut off or gone ({files}): what it held is "
            "missing in the figures. The same compare command makes it anew."
        )
    return found


def _insides(evidence: Evidence) -> list[Inside]:
    found = []
    for i, label in enumerate(evidence.labels):
        runs = evidence.of(label)
        if not runs:
            continue
        drawn = insides.pictures(runs[0], f"inside-{i}")
        facts = insides.facts(runs[0])
        if drawn:
            paper = PAPERS.get(label.split(":")[0].split("[")[0])
            found.append(
                Inside(label, paper.does if paper else "", paper.cite if paper else "", facts, drawn)
            )
    return found


def _audit(audit: dict[str, Any]) -> list[tuple[str, str]]:
    """The audit as name and finding; empty where none was made."""
    if not audit:
        return []

    def n(name: str) -> int:
        value = audit.get(name)
        return len(value) if isinstance(value, list | dict) else 0

    found = [
        ("pictures", f"{audit.get('readable', 0):,} readable of {audit.get('pictures', 0):,}"),
        ("unreadable files", _named(audit.get("unreadable"))),
        ("exact copies", f"{n('duplicates'):,} groups" if n("duplicates") else "none"),
        ("near copies", f"{n('near_duplicates'):,} groups" if n("near_duplicates") else "none"),
        (
            "copies across the sides of a given split",
            f"{n('crossing'):,} groups" if n("crossing") else "none",
        ),
        ("copies with different labels", f"{n('contradicting'):,} groups" if n("contradicting") else "none"),
        ("classes too small to split", _named(audit.get("too_small"))),
        ("classes of fewer than 20 pictures", _named(audit.get("small"))),
    ]
    imbalance = audit.get("imbalance")
    if isinstance(imbalance, int | float):
        found.append(("largest class against smallest", f"{imbalance:.1f} : 1"))
    if audit.get("median_side"):
        found.append(
            (
                "shorter side",
                f"{audit['median_side']:,} pixels (median), {audit.get('smallest_side') or 0:,} at least",
            )
        )
    found += [("note", str(note)) for note in audit.get("notes") or []]
    return found


def _named(value: Any) -> str:
    if not value:
        return "none"
    names = [str(name) for name in value]
    return f"{len(names):,}: {', '.join(names[:5])}" + (" and more" if len(names) > 5 else "")


def _settings(evidence: Evidence, seen: Seen | None) -> list[tuple[str, str]]:
    """Environment, seeds and everything else that is needed to do it again."""
    verdict, asked = evidence.verdict, evidence.asked
    at = sorted({(each.split, each.seed) for each in verdict.runs})
    found = [("repetitions", ", ".join(f"seed {b}" if a == b else f"split {a}, seed {b}" for a, b in at))]
    if seen is not None:
        result = seen.result
        found += [
            ("network", result.model),
            (
                "pictures' side",
                f"{result.run.img_size} px" if result.run.img_size else "the checkpoint's own",
            ),
            ("epochs, batch", f"{result.run.epochs}, {result.run.batch_size}"),
        ]
        if result.recipe is not None:
            recipe = result.recipe.model_dump(mode="json", exclude_none=True)
            alike = all(each.result.recipe == result.recipe for each in evidence.runs)
            whose = "" if alike else f" of {seen.label}, split {result.split_seed}, seed {result.seed}"
            shown = ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in recipe.items())
            found.append((f"recipe{whose}", shown))
        found += [
            ("trained on", listed_once(each.result.device for each in evidence.runs)),
            ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ]
        if result.fingerprints is not None:
            found += [
                ("source weights, SHA-256", result.fingerprints.source),
                ("pictures and split, SHA-256", result.fingerprints.data),
            ]
    tests = asked.get("test")
    if isinstance(tests, list):
        found += [
            (
                "test pictures",
                f"split {each.get('split')}: {each.get('n')} pictures, SHA-256 {each.get('hash')}, looked at "
                f"{words.several(int(each.get('looks') or 0), 'time')}",
            )
            for each in tests[:12]
            if isinstance(each, dict)
        ]
    if evidence.trials:
        found.append(
            ("tuning", f"{words.several(evidence.trials, 'trial')} in all; none of them saw a test picture")
        )
    spent = asked.get("spent")
    if isinstance(spent, dict):
        found += [
            (f"tuning of {label}", f"{each.get('trials')} trials, {words.duration(each.get('seconds'))}")
            for label, each in spent.items()
            if isinstance(each, dict)
        ]
    return [(name, value) for name, value in found if value]


def listed_once(values: Any) -> str:
    """Each of them once."""
    return words.listed(list(dict.fromkeys(str(value) for value in values if value)))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{number(value, 3):g}" if isinstance(value, float) else str(value)


def _command(evidence: Evidence) -> str:
    """The line to paste; what compare wrote down, or what can be told from the runs."""
    if isinstance(evidence.asked.get("command"), str):
        return str(evidence.asked["command"])
    if not evidence.runs:
        return ""
    run = evidence.runs[0].result.run
    import shlex

    asked = run.model_dump(mode="json", exclude_defaults=True)
    skip = {"data", "method", "preset", "hyper", "seed", "split", "split_seed", "class_weights"}
    flags = [
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        if value is not True
        else f"--{name.replace('_', '-')}"
        for name, value in asked.items()
        if name not in skip
    ]
    seeds = sorted({each.seed for each in evidence.verdict.runs})
    methods = shlex.quote(",".join(evidence.labels))
    chosen = str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds)) + ","
    return " ".join(
        [
            "headstart compare",
            shlex.quote(run.data),
            f"--methods {methods}",
            f"--seeds {chosen}",
            *flags,
            "--out compared",
        ]
    )


def _write(target: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
            Path(fresh).chmod(0o644)
            Path(fresh).replace(target)
        finally:
            Path(fresh).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{target} could not be written: {error.strerror or error}.") from error
