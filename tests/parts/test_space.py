from __future__ import annotations

import pickle
from typing import Annotated, Any

import pytest
from torch import nn

from headstart.method import Method
from headstart.parts.space import NOTHING, Among, Between


class Tuned(Method):
    """A method.

    Args:
        alpha: strength.
        kind: which.
        fixed: as it is.
    """

    name, room, paper = "tuned", "constrain", "none"

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        alpha: Annotated[float, Between(0.001, 1.0, log=True, off=0.0)] = 0.01,
        kind: Annotated[str | None, Among("a", None)] = None,
        fixed: float = 1.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)


def test_a_space_is_read_from_the_signature() -> None:
    told = Tuned.hyper()
    assert told["alpha"].space == Between(0.001, 1.0, log=True, off=0.0)
    assert told["alpha"].annotation is float
    assert told["kind"].space == Among("a", None)
    assert told["fixed"].space is None


def test_plain_data() -> None:
    assert Between(1, 2).plain() == {"low": 1, "high": 2, "log": False}
    assert Between(1, 2, off=0.0).plain()["off"] == 0.0
    assert Among("a", None, off=None).plain() == {"values": ["a", None], "off": None}
    assert Among(1.0, 2.0).ends == (1.0, 2.0)


@pytest.mark.parametrize("wrong", [(2, 1, False), (1, 1, False), (0.0, 1.0, True), (-1.0, 1.0, True)])
def test_what_is_no_range_is_refused(wrong: tuple[float, float, bool]) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Between(*wrong)


@pytest.mark.parametrize("wrong", [(), (1, 1)])
def test_what_is_no_choice_is_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="each once"):
        Among(*wrong)


def test_nothing_is_one_and_the_same_everywhere() -> None:
    space = pickle.loads(pickle.dumps(Between(1, 2)))
    assert space.off is NOTHING
    assert pickle.loads(pickle.dumps(Among(1, off=0))) == Among(1, off=0)
