"""Scratch: nothing of the source is left."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.methods.baseline.scratch import Scratch


def pretrained(name: str) -> nn.Module:
    """A network in which every number tells that it was trained, statistics included."""
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=7, **options)
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(3)
    return net


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_every_number_is_new(name: str) -> None:
    source = pretrained(name).state_dict()
    method = Scratch(pretrained(name), 3)
    for key, value in method.net.state_dict().items():
        same = value.shape == source[key].shape and (value == source[key]).any()
        assert not same, key


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_the_signal_neither_dies_nor_explodes(name: str) -> None:
    method = Scratch(pretrained(name), None)  # keeps the head, and draws it too
    torch.manual_seed(1)
    logits = method.train()(
        torch.randn(8, 3, 64, 64) if "vit" not in name else torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    ).logits
    assert 1e-3 < logits.std() < 10


def test_batchnorm_starts_from_nothing_and_counts_batches() -> None:
    method = Scratch(pretrained("test_resnet"), 3)
    norms = [module for module in method.net.modules() if isinstance(module, _BatchNorm)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
        assert norm.num_batches_tracked == 0


def test_statistics_are_of_the_batch_whatever_the_run_says() -> None:
    """`norm="eval"` holds the source's statistics, and there is no source."""
    method = Scratch(pretrained("test_resnet"), 3)
    method.norm = "eval"
    method.train()
    assert all(module.training for module in method.net.modules() if isinstance(module, _BatchNorm))


def test_a_fresh_head_starts_at_zero_linear_or_convolution() -> None:
    heads = {
        "linear": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)),
        "conv": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 7, 1), nn.Flatten()),
    }
    for net in heads.values():
        method = Scratch(net, 3)
        assert not method.head_module.get_parameter("weight").any()
        assert net[0].weight.any()


def test_drawn_from_torchs_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        net = pretrained("test_resnet")
        torch.manual_seed(seed)
        drawn.append(Scratch(net, 3).net.state_dict()["layer1.0.conv1.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rates() -> None:
    plan = Scratch(pretrained("test_resnet"), 3, lr_scale=4.0).plan(2)
    assert {group.lr for phase in plan for group in phase.groups} == {4.0}


def test_the_rate_of_a_network_that_came_with_random_weights_is_not_raised_twice() -> None:
    method = Scratch(timm.create_model("test_resnet"), 3)
    assert {group.lr for group in method.plan(1)[0].groups} == {10.0}
    method = Scratch(timm.create_model("test_resnet"), 3, pretrained=False)
    assert {group.lr for group in method.plan(1)[0].groups} == {1.0}


def test_a_network_that_came_with_random_weights_keeps_them() -> None:
    net = timm.create_model("test_resnet")
    before = {key: value.clone() for key, value in net.state_dict().items() if not key.startswith("fc")}
    after = Scratch(net, 3, pretrained=False).net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
