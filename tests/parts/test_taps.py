"""Taps are found where the papers' authors put them, and looking leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headstart.errors import MethodError
from headstart.parts.taps import NoStages, Tap, find_taps, watching

# Without weights, and with tensors without values: only names and shapes are looked at.
META = torch.device("meta")


def found(net: nn.Module, size: int, **options: Any) -> list[Tap]:
    return find_taps(net, torch.zeros(1, 3, size, size, device=META), **options)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        # DELTA's official code: these layers of resnet50 and resnet101.
        ("resnet50", 224, "layer1.2.conv3 layer2.3.conv3 layer3.5.conv3 layer4.2.conv3"),
        ("resnet101", 224, "layer1.2.conv3 layer2.3.conv3 layer3.22.conv3 layer4.2.conv3"),
        ("resnet18", 64, "layer1.1.conv2 layer2.1.conv2 layer3.1.conv2 layer4.1.conv2"),
        # The shortcut's convolution runs last in these.
        ("resnet10t", 64, "layer1.0.conv2 layer2.0.conv2 layer3.0.conv2 layer4.0.conv2"),
        ("regnetx_002", 64, "s1.b1.conv3.conv s2.b1.conv3.conv s3.b4.conv3.conv s4.b7.conv3.conv"),
        # Maps of one position are like the gates of squeeze-and-excitation.
        ("seresnet50", 32, "layer1.2.conv3 layer2.3.conv3 layer3.5.conv3 layer4.2.conv3"),
        (
            "tf_efficientnet_lite0",
            128,
            "blocks.1.1.conv_pwl blocks.2.1.conv_pwl blocks.4.2.conv_pwl blocks.6.0.conv_pwl",
        ),
        (
            "mobilenetv3_small_100",
            64,
            "blocks.0.0.conv_pw blocks.1.1.conv_pwl blocks.3.1.conv_pwl blocks.5.0.conv",
        ),
        (
            "convnext_tiny",
            64,
            "stages.0.blocks.2.mlp.fc2 stages.1.blocks.2.mlp.fc2 stages.2.blocks.8.mlp.fc2 "
            "stages.3.blocks.2.mlp.fc2",
        ),
        (
            "swin_tiny_patch4_window7_224",
            224,
            "layers.0.blocks.1.mlp.fc2 layers.1.blocks.1.mlp.fc2 layers.2.blocks.5.mlp.fc2 "
            "layers.3.blocks.1.mlp.fc2",
        ),
        (
            "vit_tiny_patch16_224",
            224,
            "blocks.2.mlp.fc2 blocks.5.mlp.fc2 blocks.8.mlp.fc2 blocks.11.mlp.fc2",
        ),
        ("vgg11", 64, "features.8 features.13 features.18"),
        # What is put together of many maps has no layer of its shape.
        (
            "densenet121",
            64,
            "features.denseblock1 features.denseblock2 features.denseblock3 features.norm5",
        ),
    ],
)
def test_taps_of_known_networks(name: str, size: int, expected: str) -> None:
    with META:
        net = timm.create_model(name)
    assert [tap.name for tap in found(net, size)] == expected.split()


def test_what_a_tap_says() -> None:
    with META:
        nets = {name: timm.create_model(name) for name in ("resnet50", "test_convnext", "vgg11")}
        nets["test_vit"] = timm.create_model("test_vit", img_size=32)
    taps = {name: found(net, 32)[-1] for name, net in nets.items()}
    assert taps["resnet50"] == Tap("layer4.2.conv3", 1, 2048, 1, 32)
    assert taps["test_convnext"] == Tap("stages.3.blocks.1.mlp.fc2", -1, 64, 1, 32)
    assert taps["test_vit"] == Tap("blocks.5.mlp.fc2", -1, 64, 5, 16)  # four patches and a class token
    assert taps["vgg11"] == Tap("features.18", 1, 512, 4, 16, overwritten=True)


def test_networks_that_name_no_stages() -> None:
    with META:
        resnet, vit = torchvision.models.resnet50(), torchvision.models.vit_b_32()
    stages = "layer1.2.conv3 layer2.3.conv3 layer3.5.conv3 layer4.2.conv3"
    assert [tap.name for tap in found(resnet, 64, head="fc")] == stages.split()
    assert [tap.stride for tap in found(resnet, 64, head="fc")] == [4, 8, 16, 32]
    layers = [f"encoder.layers.encoder_layer_{i}.mlp.3" for i in (2, 5, 8, 11)]
    assert [tap.name for tap in found(vit, 224)] == layers


def test_a_network_inside_of_another() -> None:
    with META:
        inner = timm.create_model("test_resnet")
        outer = nn.Sequential(nn.BatchNorm2d(3), inner)
    assert [tap.name for tap in found(outer, 32)] == [f"1.{tap.name}" for tap in found(inner, 32)]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_plain_sequence() -> None:
    assert [tap.name for tap in find_taps(small(), X, head="7")] == ["0", "2"]


def test_nothing_from_the_head_on_is_tapped() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1))
    assert [tap.name for tap in find_taps(net, X, head="2")] == ["0"]
    assert [tap.name for tap in find_taps(net, X)] == ["2"]


def test_finding_leaves_the_network_as_it_was() -> None:
    net = small().train()
    net[3].eval()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    drawn = torch.get_rng_state()
    find_taps(net, X)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in net] == [i != 3 for i in range(8)]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [p.requires_grad for p in net[0].parameters()] == [False, False]
    assert not any(module._forward_hooks for module in net.modules())


def test_names_in_the_order_in_which_they_run() -> None:
    taps = find_taps(small(), X, names=["4", "0", "4"])
    assert [tap.name for tap in taps] == ["0", "4"]
    assert [(tap.axis, tap.channels, tap.positions) for tap in taps] == [(1, 4, 64), (1, 6, 16)]


def test_an_unknown_name_brings_the_nearest() -> None:
    with META:
        net = timm.create_model("test_resnet")
    with pytest.raises(MethodError, match=r"Unknown layer of ResNet 'layer2\.0\.con2'\. Did you mean"):
        found(net, 32, names=["layer2.0.con2"])


class Odd(nn.Module):
    """A layer that runs twice, one that does not run, and one that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3)
        self.idle = nn.Conv2d(3, 3, 3)
        self.two = nn.LSTM(3, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x)).flatten(2).transpose(1, 2)
        return self.head(self.two(x)[0].mean(1))


@pytest.mark.parametrize(
    ("name", "what"),
    [("twice", "runs more than once"), ("idle", "does not run"), ("two", "its output is no tensor")],
)
def test_names_that_give_no_map(name: str, what: str) -> None:
    with pytest.raises(MethodError, match=what):
        find_taps(Odd(), X, names=[name])


def test_no_stages() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(NoStages, match=r"No stages were found in Sequential; name layers .* taps='a,b'"):
        find_taps(net, X)
    assert find_taps(net, X, names=["1"])[0].channels == 8


def test_pictures_that_do_not_fit() -> None:
    with pytest.raises(MethodError, match="Sequential cannot see pictures of 1 channels and 8 × 8 pixels"):
        find_taps(small(), X[:, :1])


# ---------------------------------------------------------------------- looking


def test_looking_gives_what_the_layers_give() -> None:
    net = small().eval()
    taps = find_taps(net, X)
    with watching(net, taps) as maps:
        logits = net(X)
    assert list(maps) == ["0", "2"]
    assert torch.equal(maps["0"], net[0](X))
    assert torch.equal(maps["2"], net[2](net[1](net[0](X))))
    assert torch.equal(logits, net(X))
    assert maps["2"].requires_grad


def test_no_hook_stays_behind_and_every_look_is_new() -> None:
    net = small()
    taps = find_taps(net, X)
    with watching(net, taps) as first:
        net(X)
    with pytest.raises(ValueError, match="stop"), watching(net, taps):
        raise ValueError("stop")
    assert not any(module._forward_hooks for module in net.modules())
    with watching(net, taps) as second:
        net(-X)
    assert not torch.equal(first["0"], second["0"])


def test_a_copy_is_looked_at_through_the_same_taps() -> None:
    net = small()
    taps = find_taps(net, X)
    twin, names = copy.deepcopy((net, taps))
    with torch.no_grad():
        twin[0].weight.zero_()
        twin[0].bias.fill_(2.0)
    with watching(twin, names) as maps:
        twin(X)
    assert (maps["0"] == 2).all()


def test_stopping_after_the_last_tap() -> None:
    net, ran = small(), []
    taps = find_taps(net, X)
    for i, module in enumerate(net):
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    with watching(net, taps, stop=True) as maps:
        net(X)
        raise AssertionError("never reached")
    assert ran == [0, 1, 2]
    assert list(maps) == ["0", "2"]


def test_a_tap_that_was_not_run() -> None:
    net = small()
    with pytest.raises(MethodError, match="'2' was not run"), watching(net, find_taps(net, X)):
        net[0](X)


def test_a_map_that_is_overwritten() -> None:
    """Known from the start, the map is copied as the layer gave it; else it is refused."""
    net = small().eval()
    known = find_taps(net, X, names=["0"])
    net[1].inplace = True
    raw = net[0](X)
    with pytest.raises(MethodError, match="What '0' gave was overwritten in place"), watching(net, known):
        net(X)
    (tap,) = find_taps(net, X, names=["0"])
    assert tap.overwritten
    with watching(net, [tap]) as maps:
        net(X)
    assert torch.equal(maps["0"], raw)
    assert (raw < 0).any()


class Again(nn.Module):
    """Runs a layer a second time, on pictures of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(3, 4, 3), 8

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) + self.conv(2 * x[..., : self.size]).mean((2, 3))


def test_a_layer_that_runs_twice() -> None:
    net, tap = Again(), Tap("conv", 1, 4, 36, 1)
    with watching(net, [tap]) as maps:
        net(X)
    assert torch.equal(maps["conv"], net.conv(2 * X))  # the last
    net.size = 6
    with pytest.raises(MethodError, match="ran twice in one forward"), watching(net, [tap]):
        net(X)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = small(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        inner = checkpoint(self.net[:5], x.clone().requires_grad_(), use_reentrant=self.reentrant)
        return self.net[5:](inner)


def test_checkpointing() -> None:
    """The gradient of a map inside of a checkpoint is that without one; the older kind has none."""
    grads = []
    for reentrant in (None, False):
        net = Checkpointed(reentrant)
        taps = find_taps(net, X, names=["net.0", "net.2"])
        with watching(net, taps) as maps:
            out = net(X)
        (out.sum() + sum(each.square().sum() for each in maps.values())).backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    net = Checkpointed(True)
    with pytest.raises(MethodError, match="use_reentrant=False"), watching(net, taps):
        net(X)
