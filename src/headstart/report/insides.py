"""For each method its own picture: what it did inside, from the plain data it left.

A picture is found by the shape of the data and not by a method's name, so that somebody else's method
that leaves the same data gets the same picture. Data that do not have that shape are no error; there is
then nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from headstart.report.evidence import Seen
from headstart.report.figure import Figure, axis, colour, marker, number, numbers, plain, short, thinned
from headstart.report.words import count, listed, percent, several

Draw = Callable[[Seen, str], Figure | None]
_ROWS = 48  # of a heat map: more layers than that are taken together
_WHOLE = "none was accepted, so the network is whole"


def pictures(run: Seen, id: str) -> list[Figure]:
    """The pictures of one run; ids begin with `id`."""
    found = []
    for draw in DRAWN:
        try:
            figure = draw(run, id)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # data of another shape, such as an older version's or somebody else's
        if figure is not None:
            found.append(figure)
    return found


def distances(run: Seen, id: str) -> Figure | None:
    """How far every layer has moved from the source, over time (l2-sp)."""
    seen = [each for each in run.over_time() if isinstance(each.get("distance"), Mapping)]
    if not seen:
        return None
    layers = list(seen[-1]["distance"]["layers"])
    table = np.array(
        [[each["distance"]["layers"].get(name, np.nan) for each in seen] for name in layers], float
    )
    names, table = _gathered(layers, table, distance=True)
    far = np.argsort(-table[:, -1])[:3]
    total = seen[-1]["distance"].get("total")
    return _heat(
        f"{id}-distance",
        "How far each layer has moved from where it started",
        f"After the last epoch the weights lie {number(total, 3)} from the source; "
        f"{listed([names[i] for i in far])} moved most.",
        names,
        [each["epoch"] for each in seen],
        table,
        "‖Δ‖",
        f"‖w − w⁰‖ by layer, from input (top) to output, after every epoch. Seed {run.result.seed}.",
        # Deep layers are wider and move by tenfold: on a linear scale the others would be one colour.
        logarithmic=True,
    )


def channel_weights(run: Seen, id: str) -> Figure | None:
    """Which channels of which layer are held (DELTA)."""
    taps = run.result.diagnostics["taps"]
    traces, rows = [], []
    for i, tap in enumerate(taps):
        if "weights" not in tap:
            return None
        weights = np.sort(np.asarray(tap["weights"], float))[::-1] * len(tap["weights"])
        places = thinned(range(len(weights)))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": numbers(100 * (p + 1) / len(weights) for p in places),
                "y": numbers(weights[p] for p in places),
                "name": plain(short(str(tap["name"]))),
                "line": {
                    "color": colour(i),
                    "width": 2.2,
                    "dash": ("solid", "dash", "dot", "dashdot")[i % 4],
                },
                "hovertemplate": f"{plain(tap['name'])}: %{{y:.3g}} × the mean<extra></extra>",
            }
        )
        rows.append(
            [
                tap["name"],
                tap["channels"],
                f"{weights[0]:.2f}",
                f"{weights[-1]:.2f}",
                percent(tap.get("effective")),
            ]
        )
    if not traces:
        return None
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 100],
            "y": [1, 1],
            "line": {"color": "var(--quiet)", "dash": "dash", "width": 1},
            "name": "all alike",
            "hoverinfo": "skip",
        }
    )
    return Figure(
        f"{id}-channels",
        "Which channels are held near the source's",
        f"Weights of the channels of {several(len(taps), 'layer')}, largest first, against the mean.",
        traces,
        {
            "xaxis": axis("channels, % of the layer"),
            "yaxis": axis("weight, × the mean", type="log", tickvals=[0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100]),
        },
        ["layer", "channels", "largest", "smallest", "effective share"],
        rows,
        "A flat line holds all channels alike; a steep one cares for few of them. The effective share is how "
        "many channels the weights amount to.",
    )


def three_losses(run: Seen, id: str) -> Figure | None:
    """The losses of the three paths (Hybrid Forward)."""
    seen = [each for each in run.over_time() if isinstance(each.get("losses"), Mapping)]
    if not seen:
        return None
    names = list(seen[0]["losses"])
    x = [each["epoch"] for each in seen]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": x,
            "y": numbers(each["losses"].get(name) for each in seen),
            "name": plain(name),
            "line": {"color": colour(i), "width": 2},
            "marker": {"symbol": marker(i), "size": 8},
        }
        for i, name in enumerate(names)
    ]
    return Figure(
        f"{id}-losses",
        "The loss of each way through the two networks",
        f"{several(len(names), 'loss')} by epoch, before they are weighed: {listed(names)}.",
        traces,
        {"xaxis": axis("epoch", dtick=max(1, len(x) // 10)), "yaxis": axis("loss", rangemode="tozero")},
        ["loss", "first epoch", "last epoch"],
        [[name, number(seen[0]["losses"][name]), number(seen[-1]["losses"].get(name))] for name in names],
        "task is the network by itself; the paths cross into the frozen source and back.",
    )


def pair_matrix(run: Seen, id: str) -> Figure | None:
    """λ of every pair of layers, over time (L2T-ww)."""
    seen = [each for each in run.over_time() if each.get("pairs")]
    if not seen:
        return None
    last = seen[-1]["pairs"]
    pairs = [f"{pair['source']} → {pair['net']}" for pair in last]
    table = np.array([[each["pairs"][i]["lambda"] for each in seen] for i in range(len(pairs))], float)
    strongest = int(np.argmax(table[:, -1]))
    return _heat(
        f"{id}-pairs",
        "Which layers are matched",
        f"In the last epoch, {pairs[strongest]} has the largest λ: {table[strongest, -1]:.3g}.",
        pairs,
        [each["epoch"] for each in seen],
        table,
        "λ",
        "λ by pair of layers (source → network) after every epoch: near zero, that pair is left alone.",
    )


def accuracy_against_flops(run: Seen, id: str) -> Figure | None:
    """Round by round, what is left and how good it is (TransTailor)."""
    rounds = run.result.diagnostics["rounds"]
    if not rounds:
        return None
    last = _last_accepted(rounds)
    left = (
        _WHOLE
        if last is None
        else f"after the last accepted one {percent(rounds[last]['flops'], 0)} of the FLOPs and "
        f"{percent(rounds[last]['params'], 0)} of the parameters are left"
    )
    traces = []
    for accepted, name, symbol, which in (
        (True, "accepted", "circle", "var(--m2)"),
        (False, "refused", "x", "var(--m5)"),
    ):
        here = [(i, each) for i, each in enumerate(rounds, 1) if bool(each["accepted"]) is accepted]
        if not here:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+lines" if accepted else "markers",
                "x": numbers(100 * each["flops"] for _, each in here),
                "y": [
                    None if each["accuracy"] is None else number(100 * each["accuracy"]) for _, each in here
                ],
                "text": [f"round {i}" for i, _ in here],
                "name": name,
                "marker": {"symbol": symbol, "size": 11, "color": which},
                "line": {"color": which, "width": 1.5},
                "hovertemplate": "%{text}: %{y:.1f} % at %{x:.0f} % of the FLOPs<extra></extra>",
            }
        )
    return Figure(
        f"{id}-flops",
        "Accuracy as the network is cut",
        f"{several(len(rounds), 'round')}; {left}.",
        traces,
        {
            "xaxis": axis("FLOPs left, %", autorange="reversed"),
            "yaxis": axis("accuracy, %"),
            "showlegend": True,
        },
        ["round", "FLOPs left", "parameters left", "accuracy", "accepted"],
        [
            [
                i,
                percent(each["flops"]),
                percent(each["params"]),
                percent(each["accuracy"]),
                "yes" if each["accepted"] else "no",
            ]
            for i, each in enumerate(rounds, 1)
        ],
    )


def channels_kept(run: Seen, id: str) -> Figure | None:
    """Channels kept by layer and round (TransTailor)."""
    rounds, sizes = run.result.diagnostics["rounds"], run.result.diagnostics["channels"]
    if not rounds:
        return None
    layers = list(sizes)
    table = np.array([[100 * each["kept"][name] / sizes[name] for each in rounds] for name in layers], float)
    last = _last_accepted(rounds)
    left = (
        _WHOLE
        if last is None
        else f"after the last accepted one the narrowest keeps {table[:, last].min():.0f} % of its channels"
    )
    names, table = _gathered(layers, table, distance=False)
    return _heat(
        f"{id}-kept",
        "Channels kept, layer by layer",
        f"{several(len(layers), 'layer')} over {several(len(rounds), 'round')}; {left}.",
        names,
        list(range(1, len(rounds) + 1)),
        table,
        "% kept",
        "From input (top) to output.",
        across="round",
        limits=(0, 100),
    )


def _last_accepted(rounds: list[dict[str, Any]]) -> int | None:
    """Which round left the network as it is: one that is refused is undone."""
    return max((i for i, each in enumerate(rounds) if each["accepted"]), default=None)


def routes(run: Seen, id: str) -> Figure | None:
    """Which class takes which copy of which block (SpotTune), or form of the filters (AdaFilter)."""
    left = run.result.diagnostics
    if "by_class" in left:
        table = np.array(left["by_class"], float)  # [K, blocks]
        names = [str(block) for block in left["blocks"]]
        what, says = "block", "the tuned copy of a block"
    else:
        table = np.array(left["classes"], float)  # [K, layers]
        names = [str(layer["layer"]) for layer in left["layers"]]
        what, says = "layer", "the tuned form of a layer's filters"
    if table.ndim != 2 or table.shape[1] != len(names) or not table.size:
        return None
    classes = list(run.result.classes)
    if len(classes) != len(table):
        classes = [f"class {i}" for i in range(len(table))]
    shown = np.argsort(-np.abs(table - table.mean(0)).sum(1), kind="stable")[:40]
    shown = np.sort(shown) if len(table) > 40 else np.arange(len(table))
    ticks = [plain(short(classes[i], 22)) for i in shown]
    ticks = [tick if ticks.count(tick) == 1 else f"{tick} ({i})" for i, tick in enumerate(ticks)]
    apart = float(np.abs(table - table.mean(0)).mean())
    overall = table.mean(0)
    static = left.get("static")
    agrees = static.get("agreement") if isinstance(static, Mapping) else None
    return Figure(
        f"{id}-routes",
        f"Which classes take {says}",
        f"On average {percent(float(table.mean()), 0)} of the pictures do; classes differ by "
        f"{100 * apart:.1f} points."
        + (
            f" One fixed route would give the same answer for {percent(agrees, 0)} of the pictures."
            if agrees is not None
            else ""
        ),
        [
            {
                "type": "heatmap",
                "z": [numbers(100 * row, 3) for row in table[shown]],
                "x": [plain(name) for name in names],
                "y": ticks,
                "colorscale": "diverging",
                "zmin": 0,
                "zmax": 100,
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"title": {"text": "% tuned"}, "thickness": 12, "outlinewidth": 0},
                "hovertemplate": "%{y}, %{x}: %{z:.0f} % tuned<extra></extra>",
            }
        ],
        {
            "xaxis": axis(
                f"{what}, from input to output",
                automargin=True,
                tickangle=-60,
                type="category",
                showgrid=False,
            ),
            "yaxis": {"automargin": True, "autorange": "reversed", "type": "category", "showgrid": False},
        },
        [what, "tuned, all classes"],
        [[name, percent(float(share), 0)] for name, share in zip(names, overall, strict=True)],
        "A column of one colour sends all classes the same way; rows that differ are routes by class.",
        height=max(360, 220 + 20 * len(shown)),
    )


DRAWN: tuple[Draw, ...] = (
    distances,
    channel_weights,
    three_losses,
    pair_matrix,
    accuracy_against_flops,
    channels_kept,
    routes,
)


def facts(run: Seen) -> list[tuple[str, str]]:
    """What a method left that is one number or a few words: the rest is for pictures."""
    found = []
    for name, value in run.result.diagnostics.items():
        shown = _fact(value)
        if shown:
            found.append((name.replace("_", " "), shown))
    return found[:12]


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return short(value, 120)
    if isinstance(value, Mapping) and 0 < len(value) <= 6:
        parts = [
            f"{key} {_fact(inner)}" for key, inner in value.items() if not isinstance(inner, Mapping | list)
        ]
        return ", ".join(parts)
    if isinstance(value, list) and 0 < len(value) <= 8 and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return ""


def _gathered(names: list[str], table: np.ndarray, *, distance: bool) -> tuple[list[str], np.ndarray]:
    """At most so many rows: neighbours are taken together, distances by Pythagoras, shares by their mean."""
    if len(names) <= _ROWS:
        return names, table
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name.rpartition(".")[0] or name, []).append(i)
    if len(groups) > _ROWS:
        each = -(-len(names) // _ROWS)
        groups = {names[i]: list(range(i, min(i + each, len(names)))) for i in range(0, len(names), each)}
    parts = [table[places] for places in groups.values()]
    rows = [np.sqrt((part**2).sum(0)) if distance else part.mean(0) for part in parts]
    return list(groups), np.array(rows)


def _heat(
    id: str,
    title: str,
    says: str,
    names: list[str],
    x: list[int],
    table: np.ndarray,
    unit: str,
    note: str,
    *,
    across: str = "epoch",
    logarithmic: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A heat map of layers (or pairs) over time."""
    shown = np.log10(np.maximum(table, 1e-12)) if logarithmic else table
    if logarithmic:
        positive = table[table > 0]
        floor = float(np.log10(positive.min())) if positive.size else 0.0
        shown = np.maximum(shown, floor)
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [numbers(row) for row in shown],
        "x": x,
        "y": [plain(name) for name in names],
        "customdata": [numbers(row) for row in table],
        "colorscale": "sequential",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": unit}, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"%{{y}}, {across} %{{x}}: %{{customdata:.3g}}<extra></extra>",
    }
    if limits is not None:
        trace |= {"zmin": limits[0], "zmax": limits[1]}
    if logarithmic:
        lo, hi = float(np.nanmin(shown)), float(np.nanmax(shown))
        ticks = np.linspace(lo, hi, 5) if hi > lo else np.array([lo])
        trace["colorbar"] |= {"tickvals": numbers(ticks), "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    return Figure(
        id,
        title,
        says,
        [trace],
        {
            "xaxis": axis(across, dtick=max(1, round(len(x) / 10)), showgrid=False),
            "yaxis": {"automargin": True, "autorange": "reversed", "type": "category", "showgrid": False},
        },
        ["", f"first {across}", f"last {across}"],
        [[name, number(row[0]), number(row[-1])] for name, row in zip(names, table, strict=True)],
        note,
        height=max(260, 130 + 15 * len(names)),
    )
