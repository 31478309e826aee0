"""Two processes that measured different things, or lay them out differently, end up the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import start_processes

from headstart.parts.memory import Memory
from headstart.parts.ranks import agree, agreed, alone, average


def odd(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    module = nn.Module()
    module.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if rank == 1:
        module.net.to(memory_format=torch.channels_last)
    module.memory = Memory()
    if rank == 0:
        module.memory["turned"] = torch.randn(3, 4).t()  # [4, 3], not contiguous
        module.memory["mask"] = torch.tensor([True, False, True])
        module.memory["short"] = torch.arange(3, dtype=torch.int16)
        module.memory["empty"] = torch.zeros(0, 2)
        module.memory["shape"] = torch.ones(2)
        module.memory["kind"] = torch.tensor(2, dtype=torch.int64)
    else:
        module.memory["shape"] = torch.ones(5, 5)
        module.memory["kind"] = torch.tensor(2.5)
        module.memory["extra"] = torch.ones(1)
    return module


def _run(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        module = odd(rank)
        agree(module)
        torch.save(module.state_dict(), folder / f"{rank}.pt")
        answers = [agreed(rank == 0), agreed(rank == 1), alone()]
        torch.save(answers, folder / f"answers-{rank}.pt")
        given = torch.tensor([1.0, 4.0]) * (rank + 1)
        torch.save([given, average(given.requires_grad_(True))], folder / f"average-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    start_processes(_run, (made,), nprocs=2, start_method="spawn")
    return made


def test_all_ranks_hold_what_rank_0_held(folder: Path) -> None:
    states = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for state in states:
        assert set(state) == set(odd(0).state_dict())
        for name, value in odd(0).state_dict().items():
            assert state[name].dtype == value.dtype, name
            assert torch.equal(state[name], value), name


def test_all_ranks_get_rank_0s_answer(folder: Path) -> None:
    for rank in (0, 1):
        assert torch.load(folder / f"answers-{rank}.pt", weights_only=True) == [True, False, False]


def test_all_ranks_get_the_mean(folder: Path) -> None:
    for rank in (0, 1):
        given, mean = torch.load(folder / f"average-{rank}.pt", weights_only=True)
        assert mean.tolist() == [1.5, 6.0]
        assert not mean.requires_grad
        assert given.tolist() == [1.0 + rank, 4.0 + 4 * rank]


def test_a_single_process_is_left_alone() -> None:
    module = odd(1)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    agree(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert alone()
    assert agreed(True) is True
    assert agreed(False) is False
    assert average(torch.tensor([3.0])).tolist() == [3.0]
