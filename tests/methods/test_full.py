"""Plain fine-tuning: everything learns, each in its group."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.nn import functional as F

from headstart.method import Batch
from headstart.methods.baseline.full import Full


def net() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    return made


def test_groups() -> None:
    method = Full(net(), 3, head_lr=5.0)
    (phase,) = method.plan(4)
    told = {group.name: (group.lr, group.decay) for group in phase.groups}
    assert told == {
        "body, kernels": (1.0, 1.0),
        "body, norms and biases": (1.0, 0.0),
        "head, kernels": (5.0, 1.0),
        "head, norms and biases": (5.0, 0.0),
    }
    learning = [id(p) for group in phase.groups for p in group.params]
    assert sorted(learning) == sorted(id(p) for p in method.parameters())


def test_the_head_learns_ten_times_faster_by_default() -> None:
    rates = {group.name.split(",")[0]: group.lr for group in Full(net(), 3).plan(1)[0].groups}
    assert rates == {"body": 1.0, "head": 10.0}


def test_layer_decay() -> None:
    rates = sorted({group.lr for group in Full(net(), 3, head_lr=1.0, layer_decay=0.5).plan(1)[0].groups})
    assert rates == [0.5**d for d in range(len(rates) - 1, -1, -1)]
    assert len(rates) >= 4


def test_it_is_what_everybody_writes() -> None:
    """Bit for bit the loop of any tutorial."""
    torch.manual_seed(3)
    data: list[Batch] = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3) for _ in range(3)]
    method = Full(net(), 3, head_lr=1.0)
    for phase in method.phases(2, data):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
        for _ in range(phase.epochs):
            for x, y in data:
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()

    plain = net()
    plain.reset_classifier(3)
    nn.init.zeros_(plain.fc.weight)
    nn.init.zeros_(plain.fc.bias)
    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y in data:
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in plain.state_dict().items():
        assert torch.equal(method.net.state_dict()[name], value), name


def test_a_head_on_random_weights_learns_no_faster_than_the_rest() -> None:
    """Ten times a rate that is made for random weights already ends at chance."""
    fresh = Full(timm.create_model("test_resnet"), 3, pretrained=False)
    assert {group.lr for group in fresh.plan(2)[0].groups} == {1.0}
    tuned = Full(timm.create_model("test_resnet"), 3)
    assert {group.lr for group in tuned.plan(2)[0].groups} == {1.0, 10.0}
