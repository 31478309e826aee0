"""What was measured travels with the method."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from headstart.parts.memory import Memory


def filled() -> Memory:
    memory = Memory()
    memory["scores"] = torch.rand(3, requires_grad=True) * 2
    memory["mask"] = torch.tensor([True, False])
    return memory


def test_like_a_dictionary() -> None:
    memory = filled()
    assert list(memory) == ["scores", "mask"]
    assert len(memory) == 2
    assert "mask" in memory
    assert "nothing" not in memory
    assert not memory["scores"].requires_grad
    memory["scores"] = torch.zeros(5, 5)
    assert memory["scores"].shape == (5, 5)


def test_it_keeps_a_copy() -> None:
    value = torch.ones(2)
    memory = Memory()
    memory["value"] = value
    value.zero_()
    assert memory["value"].all()


def test_what_was_not_measured_is_an_error_that_says_what_was() -> None:
    with pytest.raises(KeyError, match=r"Nothing called 'score' was measured yet\. Measured: scores, mask"):
        _ = filled()["score"]
    with pytest.raises(KeyError, match="Measured: nothing"):
        _ = Memory()["score"]


def test_loading_brings_all_and_only_what_was_saved() -> None:
    owner = nn.Module()
    owner.memory = filled()
    buffer = io.BytesIO()
    torch.save(owner.state_dict(), buffer)
    buffer.seek(0)
    other = nn.Module()
    other.memory = Memory()
    other.memory["scores"] = torch.zeros(9)
    other.memory["stale"] = torch.zeros(1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert list(other.memory) == ["scores", "mask"]
    assert torch.equal(other.memory["scores"], owner.memory["scores"])
    assert other.memory["mask"].dtype == torch.bool
    with torch.no_grad():
        other.memory["scores"].zero_()
    assert owner.memory["scores"].any()


def test_an_empty_state_empties() -> None:
    memory = filled()
    memory.load_state_dict({})
    assert len(memory) == 0


def test_copies_and_casts() -> None:
    memory = filled()
    twin = copy.deepcopy(memory).double()
    assert (twin["scores"].dtype, twin["mask"].dtype) == (torch.float64, torch.bool)
    assert memory["scores"].dtype == torch.float32


@pytest.mark.parametrize("name", ["training", "half", "a.b", ""])
def test_any_name_will_do_or_is_refused_clearly(name: str) -> None:
    with pytest.raises(KeyError):
        Memory()[name] = torch.zeros(1)


def test_what_was_not_measured_may_be_asked_for() -> None:
    memory = filled()
    assert memory.get("scores") is memory["scores"]
    assert memory.get("norms") is None
