"""The figures that every comparison has: differences, cost, learning, training, errors, calibration."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from headstart import calibration
from headstart.judgement import Row
from headstart.report.evidence import Evidence, Said, Seen
from headstart.report.figure import Figure, axis, colour, marker, number, numbers, plain, short, thinned
from headstart.report.words import (
    between,
    count,
    duration,
    listed,
    memory,
    percent,
    points,
    points_between,
    probability,
    several,
)

_SHOWN_CLASSES = 30  # more rows and columns than that cannot be read


def differences(evidence: Evidence) -> Figure | None:
    """Paired differences to the baseline with their intervals; what could not have been seen as a band."""
    verdict = evidence.verdict
    places = {label: i for i, label in enumerate(evidence.labels)}
    rows = [row for row in verdict.rows if row.difference is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: row.difference.mean if row.difference else 0.0)
    traces = []
    for row in rows:
        gap = row.difference
        assert gap is not None
        at = places[row.method]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [number(100 * gap.mean)],
                "y": [plain(short(row.method))],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [number(100 * (gap.hi - gap.mean))],
                    "arrayminus": [number(100 * (gap.mean - gap.lo))],
                    "color": colour(at),
                    "thickness": 2.5,
                    "width": 7,
                },
                "marker": {"color": colour(at), "symbol": marker(at), "size": 12},
                "name": plain(row.method),
                "showlegend": False,
                "hovertemplate": f"{plain(row.method)}: {points(gap.mean)} points, 95 % "
                f"{points_between(gap)}<extra></extra>",
            }
        )
    shapes: list[dict[str, Any]] = []
    if verdict.smallest_difference is not None:
        half = number(100 * verdict.smallest_difference) or 0.0
        shapes.append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": -half,
                "x1": half,
                "y0": 0,
                "y1": 1,
                "fillcolor": "var(--band)",
                "line": {"width": 0},
                "layer": "below",
            }
        )
    calls = Counter(str(row.call) for row in rows)
    parts = [
        f"{calls[call]} {word}"
        for call, word in (
            ("helps", "above zero"),
            ("no evidence", "around zero"),
            ("hurts", "below zero"),
        )
        if calls[call]
    ]
    return Figure(
        "differences",
        f"Difference to {verdict.baseline} on the same test pictures",
        f"{several(len(rows), 'interval')}: {listed(parts)}.",
        traces,
        {
            "xaxis": axis(f"percentage points of accuracy against {plain(verdict.baseline)}", zeroline=True),
            "yaxis": {"automargin": True, "type": "category"},
            "shapes": shapes,
        },
        ["method", "difference", "95 % interval", "P(better)", "verdict"],
        [
            [r.method, points(r.observed), points_between(r.difference), probability(r.better), r.call]
            for r in reversed(rows)
        ],
        "A line that touches zero is no evidence of a difference. Inside the grey band, this test set could "
        "not have shown one.",
        height=max(220, 110 + 44 * len(rows)),
    )


def runs(evidence: Evidence) -> Figure | None:
    """Every run with Wilson's interval."""
    scored = evidence.verdict.runs
    if not scored or len(scored) > 240:
        return None
    places = {label: i for i, label in enumerate(evidence.labels)}
    traces = []
    for label, at in places.items():
        mine = [each for each in scored if each.method == label]
        if not mine:
            continue
        offset = [at + (i - (len(mine) - 1) / 2) * min(0.16, 0.7 / len(mine)) for i in range(len(mine))]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": numbers(100 * each.accuracy.mean for each in mine),
                "y": numbers(offset),
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": numbers(100 * (each.accuracy.hi - each.accuracy.mean) for each in mine),
                    "arrayminus": numbers(100 * (each.accuracy.mean - each.accuracy.lo) for each in mine),
                    "color": colour(at),
                    "thickness": 1.2,
                    "width": 3,
                },
                "marker": {"color": colour(at), "symbol": marker(at), "size": 8},
                "text": [f"seed {each.seed}" for each in mine],
                "name": plain(label),
                "showlegend": False,
                "hovertemplate": f"{plain(label)}, %{{text}}: %{{x:.1f}} %<extra></extra>",
            }
        )
    return Figure(
        "runs",
        "Every run by itself",
        f"{several(len(scored), 'run')} with Wilson's 95 % interval, over test pictures only.",
        traces,
        {
            "xaxis": axis("test accuracy, %"),
            "yaxis": {
                "tickvals": list(places.values()),
                "ticktext": [plain(short(label)) for label in places],
                "automargin": True,
                "autorange": "reversed",
                "zeroline": False,
            },
        },
        ["method", "split", "seed", "test accuracy", "Wilson's 95 % interval"],
        [
            [each.method, each.split, each.seed, percent(each.accuracy.mean), between(each.accuracy)]
            for each in scored
        ],
        "How far the seeds of one method lie apart is how far luck alone moves a single run.",
        height=max(240, 110 + 40 * len(places)),
    )


def cost(evidence: Evidence) -> Figure | None:
    """Accuracy against what it costs; the reader chooses which cost."""
    rows = [row for row in evidence.verdict.rows if row.accuracy is not None]
    if not rows:
        return None
    places = {label: i for i, label in enumerate(evidence.labels)}
    axes: dict[str, tuple[str, list[float | None]]] = {
        "seconds of a run": ("seconds", [row.seconds for row in rows]),
        "peak memory, MiB": ("peak_memory_mb", [row.peak_memory_mb for row in rows]),
        "trained parameters, millions": ("trained", [_millions(row.trained) for row in rows]),
        "shipped parameters, millions": ("shipped", [_millions(row.shipped) for row in rows]),
        "FLOPs of a picture, billions": ("flops", [row.flops and row.flops / 1e9 for row in rows]),
        "ms per picture": ("ms_per_image", [row.ms_per_image for row in rows]),
    }
    known = {
        name: numbers(values) for name, (_, values) in axes.items() if all(v is not None for v in values)
    }
    if not known:
        return None
    first = next(iter(known))
    traces = []
    beside = np.argsort(np.argsort([float(value or 0) for value in known[first]], kind="stable"))
    for i, row in enumerate(rows):
        assert row.accuracy is not None
        at = places[row.method]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "cliponaxis": False,
                "x": [known[first][i]],
                "y": [number(100 * row.accuracy.mean)],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [number(100 * (row.accuracy.hi - row.accuracy.mean))],
                    "arrayminus": [number(100 * (row.accuracy.mean - row.accuracy.lo))],
                    "color": colour(at),
                    "thickness": 0.7,
                    "width": 4,
                },
                "text": [plain(short(row.method, 20))],
                "textposition": ("middle right", "top right", "bottom right")[beside[i] % 3],
                "marker": {"color": colour(at), "symbol": marker(at), "size": 13},
                "name": plain(row.method),
                "showlegend": False,
                "hovertemplate": f"{plain(row.method)}: %{{y:.1f}} % for %{{x}}<extra></extra>",
            }
        )
    # The line is drawn by the page, which knows what the reader has chosen.
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [],
            "y": [],
            "line": {"shape": "hv", "color": "var(--quiet)", "dash": "dot", "width": 2},
            "name": "front",
            "hoverinfo": "skip",
            "showlegend": False,
        }
    )
    front = [row.method for row in rows if row.front]
    return Figure(
        "cost",
        "What accuracy costs",
        f"In seconds, no other method beats {listed(front)} in both accuracy and cost.",
        traces,
        {
            "xaxis": axis(first, rangemode="tozero"),
            "yaxis": axis("test accuracy, %"),
            "margin": {"l": 52, "r": 96, "t": 16, "b": 44},
            "front": True,
        },
        ["method", "accuracy", "seconds", "peak memory", "trained", "shipped", "FLOPs", "ms per picture"],
        [
            [
                row.method,
                percent(row.accuracy.mean if row.accuracy else None),
                duration(row.seconds),
                memory(row.peak_memory_mb),
                count(row.trained),
                count(row.shipped),
                count(row.flops),
                "" if row.ms_per_image is None else f"{row.ms_per_image:.2f}",
            ]
            for row in rows
        ],
        "Up and to the left is better. The dotted line is the Pareto front: whoever lies below it is beaten "
        "in both.",
        height=430,
        choices=dict(known),
    )


def _millions(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def learning_curve(evidence: Evidence) -> Figure | None:
    """Accuracy by number of labels."""
    curves = evidence.curve.get("curves") or ([evidence.curve] if evidence.curve.get("points") else [])
    places = {label: i for i, label in enumerate(evidence.labels)}
    traces: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    for curve in curves:
        label = str(curve.get("method", ""))
        points_ = sorted(
            (each for each in curve.get("points", []) if each.get("labels")), key=lambda each: each["labels"]
        )
        if not points_:
            continue
        at = places.get(label, len(traces))
        mean = [100 * each["mean"] for each in points_]
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [each["labels"] for each in points_],
            "y": numbers(mean),
            "marker": {"color": colour(at), "symbol": marker(at), "size": 10},
            "line": {"color": colour(at)},
            "name": plain(label),
        }
        ends = [_ends(each) for each in points_]
        if any(ends):  # a single repetition has no interval
            both = [end or (m, m) for end, m in zip(ends, mean, strict=True)]
            trace["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": numbers(hi - m for (_, hi), m in zip(both, mean, strict=True)),
                "arrayminus": numbers(m - lo for (lo, _), m in zip(both, mean, strict=True)),
                "color": colour(at),
                "thickness": 1.4,
            }
        traces.append(trace)
        rows += [
            [
                label,
                each["labels"],
                percent(each["mean"]),
                f"{percent(each['lo'])} to {percent(each['hi'])}" if end else "not measured",
            ]
            for each, end in zip(points_, ends, strict=True)
        ]
    if not traces:
        return None
    return Figure(
        "learning-curve",
        "More labels, or another method?",
        str(
            evidence.curve.get("advice")
            or evidence.curve.get("why")
            or "Accuracy by the number of pictures that were learnt from."
        ),
        traces,
        {"xaxis": axis("training pictures", rangemode="tozero"), "yaxis": axis("test accuracy, %")},
        ["method", "training pictures", "accuracy", "95 % interval"],
        rows,
    )


def _ends(point: dict[str, Any]) -> tuple[float, float] | None:
    """Of the interval of a point, in per cent; None where it has none."""
    lo, hi = point.get("lo"), point.get("hi")
    return None if lo is None or hi is None else (100 * lo, 100 * hi)


def search(evidence: Evidence) -> Figure | None:
    """What tuning brought: the best validation accuracy so far, trial by trial."""
    studies = [each for each in evidence.search.get("studies") or [] if each.get("trials")]
    places = {label: i for i, label in enumerate(evidence.labels)}
    traces, rows = [], []
    for label, at in places.items():
        mine = [study for study in studies if study.get("method") == label]
        best = [_best_so_far(study["trials"]) for study in mine]
        length = min(map(len, best), default=0)
        if not length:
            continue
        mean = [100 * float(np.mean([each[i] for each in best])) for i in range(length)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(1, length + 1)),
                "y": numbers(mean),
                "name": plain(short(label)),
                "line": {"color": colour(at), "width": 2, "shape": "hv"},
                "marker": {"color": colour(at), "symbol": marker(at), "size": 7},
                "hovertemplate": f"{plain(label)}, %{{x}} trials: %{{y:.1f}} %<extra></extra>",
            }
        )
        rows += [_searched(label, study) for study in mine]
    if not traces:
        return None
    return Figure(
        "search",
        "What tuning brought",
        "Best validation accuracy so far by trial, mean over the splits: every method had the same budget.",
        traces,
        {"xaxis": axis("trials", dtick=_step(traces)), "yaxis": axis("best validation accuracy so far, %")},
        ["method", "split", "trials", "seconds", "chosen", "its validation accuracy"],
        rows,
        "The best of several trials looks better than it is, so a rise is not all gain; the test pictures "
        "say what is left of it.",
    )


def _best_so_far(trials: list[dict[str, Any]]) -> list[float]:
    """A trial that came to nothing leaves the best where it was."""
    best, found = 0.0, []
    for trial in sorted(trials, key=lambda each: each["number"]):
        best = max(best, float(trial.get("val_accuracy") or 0.0))
        found.append(best)
    return found


def _searched(label: str, study: dict[str, Any]) -> list[Any]:
    chosen: dict[str, Any] = next(
        (each for each in study["trials"] if each.get("number") == study.get("chosen")), {}
    )
    values = chosen.get("values") or {}
    shown = ", ".join(
        f"{k} {number(v, 3):g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )
    accuracy = percent(chosen.get("val_accuracy"))
    seconds = number(study.get("seconds"), 3)
    return [label, study.get("split"), len(study["trials"]), seconds, shown or "as it comes", accuracy]


def training(evidence: Evidence) -> Figure | None:
    """Validation accuracy by epoch, mean over the seeds."""
    traces, rows = [], []
    for at, label in enumerate(evidence.labels):
        mean = _mean(evidence.of(label), "val_accuracy")
        if not mean:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(1, len(mean) + 1)),
                "y": numbers(None if value is None else 100 * value for value in mean),
                "name": plain(short(label)),
                "line": {"color": colour(at), "width": 2},
                "marker": {"color": colour(at), "symbol": marker(at), "size": 7},
                "hovertemplate": f"{plain(label)}, epoch %{{x}}: %{{y:.1f}} %<extra></extra>",
            }
        )
        rows.append([label, len(mean), percent(mean[-1])])
    if not traces:
        return None
    return Figure(
        "training",
        "Validation accuracy while training",
        f"{several(len(traces), 'method')} by epoch, mean over the seeds.",
        traces,
        {"xaxis": axis("epoch", dtick=_step(traces)), "yaxis": axis("validation accuracy, %")},
        ["method", "epochs", "validation accuracy at the end"],
        rows,
        "A method without a line learns in no epochs: its head is solved in one go.",
    )


def losses(evidence: Evidence) -> list[Figure]:
    """For each method its training loss, taken apart; those of one part share a figure."""
    found, single = [], []
    for at, label in enumerate(evidence.labels):
        runs_ = evidence.of(label)
        names = _parts(runs_)
        if len(names) == 1:
            single.append((at, label, _mean(runs_, names[0])))
        elif names:
            found.append(_stacked(at, label, names, [_mean(runs_, name) for name in names]))
    return [*([_together(single)] if single else []), *found]


def _together(single: list[tuple[int, str, list[float | None]]]) -> Figure:
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(range(1, len(mean) + 1)),
            "y": numbers(mean),
            "name": plain(short(label)),
            "line": {"color": colour(at), "width": 2},
            "marker": {"color": colour(at), "symbol": marker(at), "size": 7},
            "hovertemplate": f"{plain(label)}, epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        }
        for at, label, mean in single
    ]
    return Figure(
        "loss-task",
        "The task alone",
        f"Training loss of {listed([label for _, label, _ in single])}, which has no other part.",
        traces,
        {
            "xaxis": axis("epoch", dtick=_step(traces)),
            "yaxis": axis("loss", rangemode="tozero"),
            "showlegend": True,
        },
        ["method", "first epoch", "last epoch"],
        [[label, number(mean[0]), number(mean[-1])] for _, label, mean in single],
        height=300,
    )


def _stacked(at: int, label: str, names: list[str], means: list[list[float | None]]) -> Figure:
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "parts",
            "x": list(range(1, len(mean) + 1)),
            "y": numbers(mean),
            "name": plain(name),
            "line": {"color": colour(i), "width": 1},
            "hovertemplate": f"{plain(name)}: %{{y:.4g}}<extra></extra>",
        }
        for i, (name, mean) in enumerate(zip(names, means, strict=True))
    ]
    if any((value or 0) < 0 for trace in traces for value in trace["y"]):
        for trace in traces:  # what falls below zero cannot be stacked
            del trace["stackgroup"]
    return Figure(
        f"loss-{at}",
        label,
        f"Training loss of {label}: {listed(names)}.",
        traces,
        {
            "xaxis": axis("epoch", dtick=_step(traces)),
            "yaxis": axis("loss", rangemode="tozero"),
            "showlegend": True,
        },
        ["part", "first epoch", "last epoch"],
        [[name, number(mean[0]), number(mean[-1])] for name, mean in zip(names, means, strict=True)],
        height=300,
    )


_NO_PART = {
    "phase",
    "epoch",
    "epochs",
    "lr",
    "loss",
    "train_accuracy",
    "val_accuracy",
    "val_log_loss",
    "seconds",
}


def _parts(runs_: list[Seen]) -> list[str]:
    """The names of the parts that the loss of a method is made of."""
    records = [record for run in runs_ for record in run.metrics]
    names: dict[str, None] = {}
    for record in records:
        for name, value in record.items():
            if name not in _NO_PART and isinstance(value, int | float) and not isinstance(value, bool):
                names[name] = None
    return list(names)


def _mean(runs_: list[Seen], name: str) -> list[float | None]:
    """Mean over the seeds, epoch by epoch, as far as the longest run goes."""
    columns: list[list[Any]] = [[record.get(name) for record in run.metrics] for run in runs_]
    found: list[float | None] = []
    for epoch in range(max(map(len, columns), default=0)):
        here = [c[epoch] for c in columns if epoch < len(c) and isinstance(c[epoch], int | float)]
        found.append(float(np.mean(here)) if here else None)
    return found if any(value is not None for value in found) else []


def _step(traces: list[dict[str, Any]]) -> int:
    """Whole epochs on the axis, not too many."""
    return max(1, round(max(len(trace["x"]) for trace in traces) / 10))


def confusion(taken: Seen) -> Figure | None:
    """Which classes are taken for which, by the model that is shipped."""
    said = taken.said
    if said is None:
        return None
    classes = _classes(taken, said)
    k = len(classes)
    table = np.zeros((k, k), np.int64)
    np.add.at(table, (said.labels, said.answers), 1)
    off = table - np.diag(np.diag(table))
    shown = np.arange(k)
    note = "Rows are the truth, columns the answer; the diagonal is right."
    if k > _SHOWN_CLASSES:
        trouble = off.sum(0) + off.sum(1)
        shown = np.sort(np.argsort(-trouble, kind="stable")[:_SHOWN_CLASSES])
        note += f" Of {k} classes, the {_SHOWN_CLASSES} that are confused most are shown."
    part = table[np.ix_(shown, shown)]
    share = part / np.maximum(table.sum(1)[shown], 1)[:, None]
    names = [plain(short(classes[i], 22)) for i in shown]
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    order = np.dstack(np.unravel_index(np.argsort(-off, axis=None, kind="stable")[:12], off.shape))[0]
    worst = [[classes[t], classes[a], int(off[t, a])] for t, a in order if off[t, a] > 0]
    says = (
        f"Most often, {worst[0][0]} is taken for {worst[0][1]}: {several(worst[0][2], 'time')}."
        if worst
        else "No test picture is taken for another class."
    )
    text = (
        [[str(value) if value else "" for value in row] for row in part.tolist()]
        if len(shown) <= 16
        else None
    )
    return Figure(
        "confusion",
        "Which classes are taken for which",
        says,
        [
            {
                "type": "heatmap",
                "z": [numbers(100 * row, 3) for row in share],
                "x": names,
                "y": names,
                "customdata": part.tolist(),
                "colorscale": "sequential",
                "zmin": 0,
                "zmax": 100,
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"title": {"text": "% of the class"}, "thickness": 12, "outlinewidth": 0},
                "hovertemplate": "%{y} taken for %{x}: %{customdata} pictures, %{z:.0f} %<extra></extra>",
                **({"text": text, "texttemplate": "%{text}"} if text else {}),
            }
        ],
        {
            "xaxis": axis("answer", automargin=True, tickangle=-40, type="category", showgrid=False),
            "yaxis": axis("truth", automargin=True, autorange="reversed", type="category", showgrid=False),
        },
        ["truth", "answer", "pictures"],
        worst,
        note,
        height=max(420, 190 + 26 * len(shown)),
    )


def reliability(taken: Seen) -> Figure | None:
    """Whether the shipped model is as sure as it is right."""
    said = taken.said
    if said is None:
        return None
    held = calibration.bins(said.probabilities.astype(np.float64), said.labels)
    sure, right = held.confidence, held.accuracy
    gap = float(((sure - right) * held.pictures).sum() / held.pictures.sum())
    leaning = (
        "too sure" if gap > 0.02 else "not sure enough" if gap < -0.02 else "about as sure as it is right"
    )
    return Figure(
        "calibration",
        "Is it as sure as it is right?",
        f"The model is {leaning}: its expected calibration error is {percent(held.error)}.",
        [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [0, 100],
                "y": [0, 100],
                "line": {"color": "var(--quiet)", "dash": "dash", "width": 1.5},
                "name": "perfectly calibrated",
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": numbers(100 * sure),
                "y": numbers(100 * right),
                "customdata": held.pictures.tolist(),
                "marker": {
                    "color": "var(--m0)",
                    "size": numbers(7 + 17 * np.sqrt(held.pictures / held.pictures.max())),
                    "line": {"width": 1, "color": "var(--paper)"},
                },
                "line": {"color": "var(--m0)", "width": 2},
                "name": "this model",
                "hovertemplate": "%{x:.0f} % sure, %{y:.0f} % right, %{customdata} pictures<extra></extra>",
            },
        ],
        {
            "xaxis": axis("how sure it was, %", range=[0, 102]),
            "yaxis": axis("how often it was right, %", range=[0, 106]),
        },
        ["sure", "right", "pictures"],
        [
            [percent(float(s)), percent(float(r)), int(n)]
            for s, r, n in zip(sure, right, held.pictures, strict=True)
        ],
        "Below the dashed line it is surer than it should be. The larger the point, the more pictures.",
    )


def coverage(taken: Seen) -> Figure | None:
    """How accuracy grows when the least certain pictures are left to a person."""
    said = taken.said
    if said is None:
        return None
    sure = said.probabilities.max(1)
    order = np.argsort(-sure, kind="stable")
    right = np.cumsum(~said.wrong[order]) / np.arange(1, len(order) + 1)
    share = np.arange(1, len(order) + 1) / len(order)
    start = min(len(order) - 1, max(19, len(order) // 10))  # of fewer pictures a share says nothing
    places = [start + i for i in thinned(range(start, len(order)))]
    half = len(order) // 2
    return Figure(
        "coverage",
        "What if a person looks at the unsure ones?",
        f"On the half it is surest of, it is right in {percent(float(right[max(half - 1, 0)]))}; "
        f"on all in {percent(float(right[-1]))}.",
        [
            {
                "type": "scatter",
                "mode": "lines",
                "x": numbers(100 * share[i] for i in places),
                "y": numbers(100 * right[i] for i in places),
                "customdata": numbers(sure[order][i] for i in places),
                "line": {"color": "var(--m2)", "width": 2.5},
                "showlegend": False,
                "hovertemplate": "%{x:.0f} % of the pictures answered (at least %{customdata:.2f} sure): "
                "%{y:.1f} % right<extra></extra>",
            }
        ],
        {"xaxis": axis("share answered by the model, %", range=[0, 102]), "yaxis": axis("right, %")},
        ["answered by the model", "surer than", "right"],
        [
            [percent(q), f"{sure[order][i]:.2f}", percent(float(right[i]))]
            for q in (0.25, 0.5, 0.75, 0.9, 1.0)
            for i in [max(0, round(q * len(order)) - 1)]
        ],
    )


def per_class(taken: Seen) -> list[dict[str, Any]]:
    """Recall and precision of every class."""
    said = taken.said
    if said is None:
        return []
    classes = _classes(taken, said)
    rows = []
    for c, name in enumerate(classes):
        is_, says = said.labels == c, said.answers == c
        hit = int((is_ & says).sum())
        rows.append(
            {
                "name": name,
                "n": int(is_.sum()),
                "recall": hit / is_.sum() if is_.any() else None,
                "precision": hit / says.sum() if says.any() else None,
            }
        )
    return rows


def classes_of(taken: Seen, said: Said) -> list[str]:
    """Names of the classes, as many as there are probabilities."""
    return _classes(taken, said)


def _classes(taken: Seen, said: Said) -> list[str]:
    names = taken.result.classes
    k = said.probabilities.shape[1]
    return list(names) if len(names) == k else [f"class {c}" for c in range(k)]


def split_counts(audit: dict[str, Any], sides: dict[str, dict[str, int]]) -> Figure | None:
    """Pictures per class and side."""
    counts = sides or {"pictures": dict(audit.get("classes") or {})}
    names = sorted({name for side in counts.values() for name in side})
    if not names:
        return None
    totals = {name: sum(side.get(name, 0) for side in counts.values()) for name in names}
    names.sort(key=lambda name: -totals[name])
    shown = names[:60]
    labels = [plain(short(name, 22)) for name in shown]
    labels = [label if labels.count(label) == 1 else f"{label} ({i})" for i, label in enumerate(labels)]
    least, most = min(totals.values()), max(totals.values())
    return Figure(
        "classes",
        "Pictures per class",
        f"{several(len(names), 'class')} of {least:,} to {most:,} pictures."
        + (f" The {len(shown)} largest are shown." if len(shown) < len(names) else ""),
        [
            {
                "type": "bar",
                "x": labels,
                "y": [side.get(name, 0) for name in shown],
                "name": which,
                "marker": {"color": colour((0, 1, 4)[i % 3])},
            }
            for i, (which, side) in enumerate(counts.items())
        ],
        {
            "barmode": "stack",
            "xaxis": {"automargin": True, "tickangle": -40, "type": "category"},
            "yaxis": axis("pictures"),
            "showlegend": len(counts) > 1,
        },
        ["class", *counts],
        [[name, *(side.get(name, 0) for side in counts.values())] for name in names],
        height=340,
    )


def row_of(evidence: Evidence, label: str) -> Row | None:
    """The row of one method."""
    return next((row for row in evidence.verdict.rows if row.method == label), None)
