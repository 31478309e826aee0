"""What each method really leaves is drawn: tiny runs, and the pictures made of their result.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from told import diagnostics

import headstart
from headstart.records import Result
from headstart.report import insides
from headstart.report.evidence import Seen
from headstart.report.figure import Figure, number

EPOCHS = 2
# The pictures that each method has, by the end of their ids.
DRAWN: dict[str, tuple[str, ...]] = {
    "l2-sp": ("distance",),
    "l2-sp/gl-sp-fisher": ("distance",),
    "delta": ("channels",),
    "hybrid-forward": ("losses",),
    "l2t-ww": ("pairs",),
    "transtailor": ("flops", "kept"),
    "spottune": ("routes",),
    "adafilter": ("routes",),
}
# Two rounds in two epochs, neither of which is refused.
HYPER: dict[str, dict[str, Any]] = {
    "l2-sp/gl-sp-fisher": {"variant": "gl-sp-fisher"},
    "transtailor": {"flops": 0.7, "rounds": 2, "weigh_epochs": 0},
}
# Names of layers stand here as keys: other networks have others.
BY_LAYER = ("layers", "kept", "channels")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network in timm's layout whose blocks are open: in timm's own shut ones no filter counts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "open"
    net = timm.create_model("test_resnet", num_classes=7, zero_init_last=False)
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    save_for_hf(net, folder, model_config={"pretrained_cfg": config}, safe_serialization=True)
    return folder


def trained(name: str, pictures: Path, model: Path, out: Path) -> Seen:
    """A tiny run of a method, or of one of its variants, as the report finds it."""
    headstart.train(
        pictures,
        out=out,
        model=str(model),
        method=name.partition("/")[0],
        hyper=HYPER.get(name, {}),
        epochs=EPOCHS,
        batch_size=8,
        lr=1e-4,  # what learnt nothing yet bears no more once channels are taken away
        device="cpu",
        channels_last=False,  # not measured anew for every method
    )
    return Seen(name, out, Result.read(out / "result.json"))


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_method_leaves_is_drawn(name: str, pictures: Path, model: Path, tmp_path: Path) -> None:
    seen = trained(name, pictures, model, tmp_path / "run")
    figures = {figure.id: figure for figure in insides.pictures(seen, "x")}
    assert sorted(figures) == [f"x-{each}" for each in DRAWN[name]]
    for figure in figures.values():
        assert figure.rows
        assert all(map(math.isfinite, values(figure)))
    LOOKS[name.partition("/")[0]](seen, figures)
    # What the other tests of the report make up has no key that is not there.
    made_up = diagnostics(name.partition("/")[0], EPOCHS, 3)
    assert keys(made_up) <= keys(seen.result.diagnostics)


def values(figure: Figure) -> Iterator[float]:
    """All numbers that are drawn."""
    for trace in figure.traces:
        for row in trace["z"] if "z" in trace else [trace["y"]]:
            yield from (math.nan if value is None else value for value in row)


def keys(value: Any, at: str = "") -> set[str]:
    """The paths of all keys, such as `rounds.kept`; of a list, those of its first entry."""
    if isinstance(value, list):
        return keys(value[0], at) if value else set()
    if not isinstance(value, Mapping) or at.rpartition(".")[2] in BY_LAYER:
        return {at}
    return {at} | {key for name, inner in value.items() for key in keys(inner, f"{at}.{name}")}


def _over_time(seen: Seen, figures: Mapping[str, Figure]) -> None:
    (figure,) = figures.values()
    trace = figure.traces[0]
    assert list(trace["x"]) == [1, 2]
    assert all(len(row) == EPOCHS for row in trace["z"])
    assert len(trace["z"]) > 3  # layers, or pairs of them
    assert len(set(values(figure))) > len(trace["z"])  # they differ, and from epoch to epoch


def _taps(seen: Seen, figures: Mapping[str, Figure]) -> None:
    taps = seen.result.diagnostics["taps"]
    assert [row[0] for row in figures["x-channels"].rows] == [tap["name"] for tap in taps]
    for _, _, largest, smallest, effective in figures["x-channels"].rows:
        assert float(largest) > 1 > float(smallest)
        assert effective


def _paths(seen: Seen, figures: Mapping[str, Figure]) -> None:
    traces = figures["x-losses"].traces
    assert [trace["name"] for trace in traces] == ["path1", "path2", "task"]
    assert all(len(trace["y"]) == EPOCHS for trace in traces)


def _rounds(seen: Seen, figures: Mapping[str, Figure]) -> None:
    rounds = seen.result.diagnostics["rounds"]
    assert len(rounds) == 2
    assert list(figures["x-flops"].traces[0]["x"]) == [number(100 * each["flops"]) for each in rounds]
    kept = figures["x-kept"].traces[0]["z"]
    assert len(kept) == len(seen.result.diagnostics["channels"])
    assert min(row[1] for row in kept) < 100


def _by_class(seen: Seen, figures: Mapping[str, Figure]) -> None:
    trace = figures["x-routes"].traces[0]
    assert list(trace["y"]) == list(seen.result.classes)
    assert len(trace["x"]) == len(trace["z"][0]) > 1
    assert len(set(values(figures["x-routes"]))) > 1
    assert "One fixed route would give the same answer" in figures["x-routes"].says


LOOKS = {
    "l2-sp": _over_time,
    "l2t-ww": _over_time,
    "delta": _taps,
    "hybrid-forward": _paths,
    "transtailor": _rounds,
    "spottune": _by_class,
    "adafilter": _by_class,
}
