from __future__ import annotations

import re
from typing import Any

import pytest

from headstart import registry
from headstart.comparison.grid import plan
from headstart.errors import ConfigError


def test_every_method_with_every_seed_and_all_else_the_same() -> None:
    grid = plan("pictures", ["probe", "full", "l2-sp"], seeds=2, epochs=7, augment="trivial")
    assert [(cell.label, cell.run.seed) for cell in grid.cells] == [
        *(("probe", 0), ("full", 0), ("l2-sp", 0)),
        *(("probe", 1), ("full", 1), ("l2-sp", 1)),
    ]
    for cell in grid.cells:
        same = cell.run.model_dump(exclude={"method", "seed", "preset", "hyper"})
        assert same == grid.cells[0].run.model_dump(exclude={"method", "seed", "preset", "hyper"})
        assert cell.run.epochs == 7
    assert grid.baseline == "full"


def test_a_method_named_twice_is_run_once_and_a_string_works_too() -> None:
    grid = plan("pictures", "full, probe,full", seeds=[4, 2, 4])
    assert grid.labels == ("full", "probe")
    assert grid.seeds == (4, 2)
    assert len(grid.cells) == 4


def test_the_first_is_the_baseline_where_full_was_not_asked_for() -> None:
    grid = plan("pictures", ["lp-ft", "probe"])
    assert (grid.baseline, grid.labels) == ("lp-ft", ("lp-ft", "probe"))


def test_a_baseline_that_was_asked_for_is_added() -> None:
    grid = plan("pictures", ["lp-ft"], baseline="scratch", seeds=1)
    assert (grid.baseline, grid.labels) == ("scratch", ("lp-ft", "scratch"))


def test_presets_are_methods_of_their_own() -> None:
    grid = plan(
        "pictures",
        ["l2-sp", "l2-sp:paper"],
        seeds=1,
        hyper={"l2-sp": {"alpha": 0.5}, "l2-sp:paper": {"alpha": 0.25}},
    )
    own, paper = (cell.run for cell in grid.cells)
    assert (own.preset, own.hyper["alpha"]) == (None, 0.5)
    assert (paper.preset, paper.hyper["alpha"]) == ("paper", 0.25)


def test_rooms_and_all() -> None:
    assert {"scratch", "probe", "full", "lp-ft"} <= set(plan("pictures", "baseline").labels)
    assert "l2-sp" not in plan("pictures", "baseline").labels
    assert "l2-sp" in plan("pictures", ["all"]).labels


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ["ful"]}, "Unknown method 'ful'. Did you mean 'full'?"),
        ({"methods": ["l2-sp:papr"]}, "Unknown preset of 'l2-sp' 'papr'. Did you mean 'paper'?"),
        ({"methods": []}, "No method was given"),
        ({"methods": " , "}, "No method was given"),
        ({"methods": [3]}, "methods holds names"),
        ({"methods": 3}, "methods holds names"),
        ({"methods": ["full"], "baseline": 3}, "A method has a name"),
        ({"methods": ["full"], "baseline": "probes"}, "Did you mean 'probe'?"),
        ({"methods": ["full"], "seeds": 0}, "from 1"),
        ({"methods": ["full"], "seeds": []}, "whole numbers from 0"),
        ({"methods": ["full"], "seeds": [-1]}, "whole numbers from 0"),
        ({"methods": ["full"], "seeds": "3"}, "whole numbers from 0"),
        ({"methods": ["full"], "seeds": True}, "whole numbers from 0"),
        ({"methods": ["full"], "epoch": 3}, "Unknown key 'epoch'. Did you mean 'epochs'?"),
        ({"methods": ["full"], "epochs": 0}, "epochs: "),
        ({"methods": ["full"], "seed": 3}, "Use seeds"),
        ({"methods": ["full"], "method": "full"}, "Use methods"),
        ({"methods": ["l2-sp"], "hyper": {"alpha": 0.1}}, "by method: {'l2-sp': {'alpha': 0.1}}"),
        ({"methods": ["l2-sp"], "hyper": {"l2sp": {}}}, "Did you mean 'l2-sp'?"),
        ({"methods": ["l2-sp"], "hyper": {"l2-sp": {"alfa": 1}}}, "Did you mean 'alpha'?"),
    ],
)
def test_what_cannot_be_run_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("pictures", **given)
    assert said in str(caught.value)


def test_another_network_as_source_goes_to_the_methods_that_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.get("l2-sp"), "takes_source", True)
    grid = plan("pictures", ["full", "l2-sp"], seeds=1, source="resnet34", source_weights="w.safetensors")
    given = {cell.label: (cell.run.source, cell.run.source_weights) for cell in grid.cells}
    assert given == {"full": (None, None), "l2-sp": ("resnet34", "w.safetensors")}


def test_a_source_that_no_method_takes_is_refused_and_the_takers_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry.get("l2-sp"), "takes_source", True)
    with pytest.raises(ConfigError, match=r"'full' learns from no other network.*l2-sp"):
        plan("pictures", ["full", "probe"], source="resnet34")
    with pytest.raises(ConfigError, match="source_weights belong to a source"):
        plan("pictures", ["full"], source_weights="w.safetensors")


def test_one_method_under_several_values() -> None:
    grid = plan("pictures", "full, l2-sp[alpha=0.1,params=all] ,l2-sp:tllib[ alpha = 1e-3 ]", seeds=1)
    assert grid.labels == ("full", "l2-sp[alpha=0.1,params=all]", "l2-sp:tllib[alpha=1e-3]")
    first, second = (cell.run for cell in grid.cells[1:])
    assert (first.method, first.preset, first.hyper) == ("l2-sp", None, {"alpha": 0.1, "params": "all"})
    assert (second.method, second.preset) == ("l2-sp", "tllib")
    assert registry.configure(registry.get("l2-sp"), None, second.hyper)["alpha"] == 1e-3


def test_what_is_in_brackets_comes_before_what_holds_for_the_method() -> None:
    grid = plan(
        "pictures", ["l2-sp[alpha=0.1]", "l2-sp"], seeds=1, hyper={"l2-sp": {"alpha": 0.5, "beta": 0.2}}
    )
    assert [cell.run.hyper for cell in grid.cells] == [
        {"alpha": 0.1, "beta": 0.2},
        {"alpha": 0.5, "beta": 0.2},
    ]


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("l2-sp[alpha]", "name=value"),
        ("l2-sp[alpha=1,alpha=2]", "each name once"),
        ("l2-sp[alpha=1", "is named like"),
        ("l2-sp[alpha=1]x", "is named like"),
        ("l2-sp[alfa=1]", "Did you mean 'alpha'"),
        ("l2-sp[alpha=-1]", "does not fit"),
        ("l2-sp[alpha=: :]", "does not fit"),
        ("l2sp[alpha=1]", "Did you mean 'l2-sp'"),
    ],
)
def test_brackets_that_say_nothing_are_refused(label: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        plan("pictures", [label])


def test_every_seed_on_every_split_and_every_size() -> None:
    grid = plan("pictures", "full,probe", splits=2, seeds=2, train_sizes=["all", 300, 100])
    assert grid.splits == (0, 1)
    assert grid.train_sizes == (100, 300, None)
    stands = [(cell.run.train_size, cell.run.split_seed, cell.run.seed) for cell in grid.cells[::2]]
    sizes, pairs = (100, 300, None), ((0, 0), (0, 1), (1, 0), (1, 1))
    assert stands == [(size, *pair) for size in sizes for pair in pairs]
    assert len(grid.cells) == 24


def test_without_splits_each_seed_has_its_own_or_all_the_one_asked_for() -> None:
    assert {cell.run.split_seed for cell in plan("pictures", "full", seeds=2).cells} == {None}
    assert {cell.run.split_seed for cell in plan("pictures", "full", seeds=2, split_seed=7).cells} == {7}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"splits": 0}, "splits is how many, from 1"),
        ({"splits": 2, "split_seed": 1}, "not both"),
        ({"train_sizes": [0]}, "train_sizes are numbers"),
        ({"train_sizes": ["some"]}, "train_sizes are numbers"),
        ({"train_sizes": []}, "train_sizes are numbers"),
        ({"train_size": 3}, "Use train_sizes"),
        ({"trial": True}, "Use trials"),
    ],
)
def test_splits_and_sizes_that_cannot_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("pictures", "full", **asked)
