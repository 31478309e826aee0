"""Units of a network: what is cut says what is switched off, on every kind of network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.coupling import Coupling, find_coupling, stem_of
from headstart.parts.cutting import cut
from headstart.parts.head import find_head
from headstart.parts.scaled import run_scaled

SIZE = 64
NETS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "mobilenetv2_100": {},
    "mobilenetv3_large_100": {},
    "tf_efficientnet_lite0": {},
    "vgg11_bn": {"mlp_ratio": 0.05},  # its head has 120 million weights, and they say nothing more
    "densenet121": {"block_config": (3, 4, 6, 4)},  # its blocks with fewer layers
    "regnety_004": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": SIZE},
}


def alive(name: str, **options: Any) -> nn.Module:
    """A network whose random statistics, scales and head let every channel say something."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        for part, parameter in net.named_parameters():
            if part.endswith("gamma"):  # ConvNeXt starts its blocks at a millionth
                parameter.fill_(1)
        net.get_submodule(find_head(net)).weight.normal_()
    return net


def some(found: Coupling) -> Tensor:
    """About half of all units, at least one of each group."""
    keep = torch.rand(found.units, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[torch.cumsum(torch.tensor([0, *found.sizes[:-1]]), 0)] = True
    return keep


def switched(net: nn.Module, found: Coupling, keep: Tensor, x: Tensor) -> Tensor:
    stays = torch.cat([keep, torch.ones(1, dtype=torch.bool)]).to(x)
    return run_scaled(net, {name: stays[unit] for name, unit in found.gates.items()}, x)


@pytest.mark.parametrize("name", NETS)
def test_pruned_is_masked(name: str) -> None:
    net = alive(name, **NETS[name])
    found = find_coupling(net, find_head(net), torch.zeros(1, 3, SIZE, SIZE))
    keep, x = some(found), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        masked = switched(net, found, keep, x)
        smaller = cut(copy.deepcopy(net), found.kept(keep))
        pruned, whole = smaller(x), net(x)
    size = masked.abs().max()
    assert (masked - pruned).abs().max() <= 1e-5 * size
    assert (masked - whole).abs().max() > 1e-3 * size  # it makes a difference
    assert _count(smaller) < 0.9 * _count(net)
    assert smaller.get_submodule(find_head(net)).weight.shape[0] == 5


def test_in_float64_they_are_the_same_to_the_last_digits() -> None:
    net = alive("test_resnet").double()
    found = find_coupling(net, "fc", torch.zeros(1, 3, 32, 32))
    keep, x = some(found), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        masked = switched(net, found, keep, x)
        pruned = cut(net, found.kept(keep))(x)
    assert (masked - pruned).abs().max() <= 1e-12 * masked.abs().max()


def test_what_is_added_goes_together() -> None:
    net = alive("resnet18")
    found = find_coupling(net, "fc", torch.zeros(1, 3, 32, 32))
    stream = found.out["conv1"]
    for name in ("layer1.0.conv2", "layer1.1.conv2", "layer1.0.bn2", "bn1"):
        assert torch.equal(found.out[name], stream)
    assert torch.equal(found.into["layer1.0.conv1"], stream)
    inner = set(found.out["layer1.0.conv1"].tolist())
    assert inner.isdisjoint(stream.tolist()) and len(inner) == 64
    assert "fc" not in found.out and torch.equal(found.into["fc"], found.out["layer4.1.bn2"])
    assert found.units == sum(found.sizes) == len(found.group)


def test_a_unit_of_a_grouped_convolution_has_a_channel_in_every_group() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    found = find_coupling(net, "4", torch.zeros(1, 3, 8, 8))
    assert found.sizes == [3, 3]
    assert found.out["0"].tolist() == [0, 1, 2] * 4 == found.into["2"].tolist()
    keep = torch.tensor([True, False, True, False, True, True])
    smaller = cut(copy.deepcopy(net), found.kept(keep))
    assert smaller[2].weight.shape == (8, 2, 3, 3) and smaller[2].groups == 4


def test_a_depthwise_convolution_has_no_units_of_its_own() -> None:
    found = find_coupling(alive("mobilenetv2_100"), "classifier", torch.zeros(1, 3, 32, 32))
    assert not [name for name in found.layers if name.endswith("conv_dw")]
    expand, depthwise = found.out["blocks.1.0.conv_pw"], found.out["blocks.1.0.conv_dw"]
    assert torch.equal(expand, depthwise) and torch.equal(expand, found.gates["blocks.1.0.bn2"])


def test_squeeze_and_excite_is_no_gate_of_the_channels_it_weighs() -> None:
    found = find_coupling(alive("test_efficientnet"), "classifier", torch.zeros(1, 3, 32, 32))
    excite = [name for name in found.out if name.endswith("se.conv_expand")]
    assert excite and not set(excite) & set(found.gates)
    assert [name for name in found.gates if name.endswith("se.conv_reduce")]


def test_heads_go_whole() -> None:
    net = alive("test_vit", img_size=32)
    found = find_coupling(net, "head", torch.zeros(1, 3, 32, 32))
    attention = net.blocks[0].attn
    units = found.heads["blocks.0.attn"]
    keep = torch.ones(found.units, dtype=torch.bool)
    keep[units[0]] = False
    smaller = cut(copy.deepcopy(net), found.kept(keep)).blocks[0].attn
    assert smaller.num_heads == attention.num_heads - 1
    assert smaller.qkv.out_features == 3 * smaller.num_heads * smaller.head_dim
    assert smaller.scale == attention.scale
    assert "blocks.0.attn.qkv" not in found.layers


def test_what_is_normalised_together_stays_and_says_why() -> None:
    found = find_coupling(alive("test_convnext"), "head.fc", torch.zeros(1, 3, 32, 32))
    assert {name.rsplit(".", 1)[-1] for name in found.layers} == {"fc1"}
    assert any("works on all its channels together" in why for why in found.left.values())


def test_a_frozen_network_is_followed_all_the_same() -> None:
    net = alive("test_resnet").requires_grad_(False)
    net.train()
    found = find_coupling(net, "fc", torch.zeros(1, 3, 32, 32))
    assert found.units > 100
    assert net.training and not any(p.requires_grad for p in net.parameters())


def test_one_layer_is_enough() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    found = find_coupling(net, "4", torch.zeros(1, 3, 8, 8))
    assert found.layers == ["0"] and found.sizes == [6] and list(found.gates) == ["0"]


def test_the_stem_can_be_spared() -> None:
    net = alive("test_resnet")
    example = torch.zeros(1, 3, 32, 32)
    stem = stem_of(net, example)
    found = find_coupling(net, "fc", example, spare=lambda name: name == stem)
    assert stem == "conv1.0" and stem not in found.out and found.left[stem] == "it was asked to stay"


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "the network puts its channels out"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(256, 2)),
            r"'0': '1' \(GroupNorm\) works on all its channels together",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 2)),
            "'0': switched off, its channels are not nought where they are read",
        ),
    ],
)
def test_nothing_to_cut_is_said_with_the_layer(net: nn.Module, reason: str) -> None:
    with pytest.raises(MethodError, match=reason):
        find_coupling(net, find_head(net), torch.zeros(1, 3, 8, 8))


def test_what_trying_shows_to_be_wrong_is_left_alone() -> None:
    """Layers that standardise their weights have a gain of each channel, which no graph knows of."""
    net = alive("test_nfnet")
    found = find_coupling(net, find_head(net), torch.zeros(1, 3, 32, 32))
    assert found.left["stages.0.0.conv1"] == "without some of its channels the network does not run"
    assert found.layers == [f"stages.{i}.0.attn_last.fc1" for i in range(4)]  # squeeze-and-excite is plain
    keep, x = some(found), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        masked, pruned = switched(net, found, keep, x), cut(copy.deepcopy(net), found.kept(keep))(x)
    assert torch.allclose(masked, pruned, rtol=1e-4, atol=1e-5)


class Shuffled(nn.Module):
    """Shuffles channels, which torch-pruning 1.6 can't follow for odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.fc(self.second(x.relu()).relu().mean((2, 3)))


def test_a_shuffle_is_refused_or_right() -> None:
    torch.manual_seed(0)
    net = Shuffled()
    x = torch.randn(2, 3, 8, 8)
    try:
        found = find_coupling(net, "fc", torch.zeros(1, 3, 8, 8))
    except MethodError as error:
        assert "first" in str(error) or "second" in str(error)
        return
    keep = some(found)
    with torch.no_grad():
        masked, pruned = switched(net, found, keep, x), cut(copy.deepcopy(net), found.kept(keep))(x)
    assert torch.allclose(masked, pruned, atol=1e-6)


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
