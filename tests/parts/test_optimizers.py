"""Several optimisers that step as one."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from headstart.parts.optimizers import Several


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3)) for _ in range(2)]


def several(a: nn.Parameter, b: nn.Parameter) -> Several:
    return Several([SGD([a], lr=0.1, momentum=0.9), Adam([b], lr=0.01)])


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], n: int) -> None:
    for _ in range(n):
        sum(p.square().sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()


def test_it_does_what_each_does_alone() -> None:
    together, apart = parameters(), parameters()
    steps(several(*together), together, 5)
    for rule, p in ((SGD([apart[0]], lr=0.1, momentum=0.9), apart[0]), (Adam([apart[1]], lr=0.01), apart[1])):
        steps(rule, [p], 5)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_zero_grad_reaches_all() -> None:
    params = parameters()
    optimizer = several(*params)
    sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_schedule_reaches_each() -> None:
    params = parameters()
    optimizer = several(*params)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    steps(optimizer, params, 1)
    schedule.step()
    assert [each.param_groups[0]["lr"] for each in optimizer.optimizers] == [0.05, 0.005]


def test_a_closure_is_called_once() -> None:
    params = parameters()
    calls = []

    def closure() -> float:
        calls.append(1)
        return 3.0

    assert several(*params).step(closure) == 3.0
    assert len(calls) == 1


def test_resume_is_bit_equal_and_a_schedule_still_reaches_each() -> None:
    straight = parameters()
    optimizer = several(*straight)
    steps(optimizer, straight, 3)
    buffer = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "p": copy.deepcopy(straight)}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = [nn.Parameter(p.detach().clone()) for p in saved["p"]]
    again = several(*resumed)
    again.load_state_dict(saved["o"])
    steps(optimizer, straight, 3)
    steps(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    again.param_groups[0]["lr"] = 7.0
    assert again.optimizers[0].param_groups[0]["lr"] == 7.0


def test_gradient_scaling_and_clipping_see_all_parameters() -> None:
    params = parameters()
    listed = [p for group in several(*params).param_groups for p in group["params"]]
    assert [id(p) for p in listed] == [id(p) for p in params]
