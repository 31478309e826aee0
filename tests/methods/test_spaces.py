"""What a tuner may try of each method, and that `off` is plain training."""

from __future__ import annotations

import pytest
import torch

from headstart import registry
from headstart.method import Method
from headstart.parts.space import NOTHING
from headstart.testing import Case, networks

METHODS = [cls for cls in registry.everything() if cls.__module__.startswith("headstart.")]
# Nothing in them can be turned off: what they are is how they are built, or where they start.
STRUCTURAL = {"probe", "scratch", "spottune"}
ADDS_TERMS = {"delta", "l2-sp", "hybrid-forward", "fitnets", "l2t-w", "l2t-ww"}


def off(cls: type[Method]) -> dict[str, object]:
    spaces = {name: parameter.space for name, parameter in cls.hyper().items()}
    return {name: s.off for name, s in spaces.items() if s is not None and s.off is not NOTHING}


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_few_axes_and_a_way_to_turn_it_off(cls: type[Method]) -> None:
    spaces = [parameter.space for parameter in cls.hyper().values() if parameter.space is not None]
    assert len(spaces) <= 3  # more could not be tuned with a handful of trials
    assert bool(off(cls)) is (cls.name not in STRUCTURAL)


@pytest.mark.parametrize("cls", [c for c in METHODS if c.name in ADDS_TERMS], ids=lambda cls: cls.name)
def test_turned_off_only_the_task_is_left(cls: type[Method]) -> None:
    source = networks()["BatchNorm (test_resnet)"]()
    case = Case(cls, source, off(cls))
    method = case.method()
    for phase in method.phases(2, case.train, case.val):
        for x, y in case.train:
            loss = method(x, y)
            rest = {name: value for name, value in loss.parts.items() if name != "task"}
            head = {"decay", "head", "l2"}  # DELTA and L2-SP decay the head in place of the run's decay
            assert {name for name, value in rest.items() if float(value) != 0.0} <= head, (phase.name, rest)


def test_adafilter_turned_off_takes_the_fine_tuned_filters() -> None:
    cls = registry.get("adafilter")
    case = Case(cls, networks()["BatchNorm (test_resnet)"](), off(cls))
    method = case.method().eval()
    with torch.no_grad():
        _, gates = method.run(case.train[0][0])  # type: ignore[operator]
    assert min(float(gate.min()) for gate in gates) == 1.0
