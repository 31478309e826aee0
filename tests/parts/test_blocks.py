"""Residual blocks are found in networks of all kinds, and other things can run in their place."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.blocks import Blocks, find_blocks, replaced

SIZE = 32
SMALL: dict[str, dict[str, Any]] = {  # of their kind, so that nothing takes long
    "swin_tiny_patch4_window7_224": {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 4)},
    "densenet121": {"block_config": (2, 3, 2, 2), "growth_rate": 8},
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options = {"num_classes": 7, **SMALL.get(name, {})}
    if name in ("test_vit", "swin_tiny_patch4_window7_224"):
        options["img_size"] = SIZE
    return timm.create_model(name, **options).eval(), torch.randn(1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("name", "count", "first", "stem", "between"),
    [
        ("resnet18", 8, "layer1.0", ["conv1", "bn1"], []),
        ("tf_efficientnet_lite0", 16, "blocks.0.0", ["conv_stem", "bn1"], []),
        ("mobilenetv3_small_050", 12, "blocks.0.0", ["conv_stem", "bn1"], []),
        (
            "test_convnext",
            9,
            "stages.0.blocks.0",
            ["stem"],
            [f"stages.{i}.downsample" for i in (1, 2, 3)],
        ),
        ("test_vit", 6, "blocks.0", ["patch_embed"], []),
        (
            "swin_tiny_patch4_window7_224",
            5,
            "layers.0.blocks.0",
            ["patch_embed"],
            [f"layers.{i}.downsample" for i in (1, 2, 3)],
        ),
        ("regnety_002", 13, "s1.b1", ["stem"], []),
        (
            "densenet121",
            4,
            "features.denseblock1",
            ["features.conv0", "features.norm0"],
            [f"features.transition{i}" for i in (1, 2, 3)],
        ),
    ],
)
def test_finds_the_blocks(name: str, count: int, first: str, stem: list[str], between: list[str]) -> None:
    net, x = made(name)
    found = find_blocks(net, x)
    assert len(found.blocks) == count
    assert found.blocks[0] == first
    assert found.stem == stem
    assert list(found.between) == between
    everything = {*found.stem, *found.blocks, *found.between, *found.tail}
    inside = tuple(f"{each}." for each in everything)
    bare = [key for key, _ in net.named_parameters() if not key.startswith(inside)]
    assert all(each in ("cls_token", "reg_token", "pos_embed") for each in bare)


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    net, x = made("test_convnext")
    ran: list[str] = []
    found = find_blocks(net, x)
    for name in [*found.blocks, *found.between]:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    net(x)
    assert [name for name in ran if name in found.blocks] == found.blocks
    for name, following in found.between.items():
        assert ran[ran.index(name) + 1] == following


def test_looking_changes_nothing() -> None:
    net, x = made("test_resnet")
    net.train()
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_blocks(net, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def chain(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))


def test_a_network_of_ones_own() -> None:
    assert find_blocks(chain(_Block(), _Block()), torch.zeros(1, 3, 8, 8)) == Blocks(
        stem=["0"], blocks=["1", "2"], between={}, tail=["5"]
    )


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (chain(), "Sequential has no residual blocks; two or more are needed"),
        (chain(_Block()), "Sequential has only one block, '1'; two or more are needed"),
    ],
)
def test_too_few_blocks(net: nn.Module, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        find_blocks(net, torch.zeros(1, 3, 8, 8))


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain(_Block(), _Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.from_numpy(x.detach().numpy()))


def test_a_forward_that_cannot_be_followed() -> None:
    with pytest.raises(MethodError, match=r"_Untraceable cannot be followed by torch\.fx"):
        find_blocks(_Untraceable(), torch.zeros(1, 3, 8, 8))


def test_pictures_that_the_network_cannot_see() -> None:
    with pytest.raises(MethodError, match="Sequential cannot see pictures of 4 channels and 8 × 8 pixels"):
        find_blocks(chain(_Block(), _Block()), torch.zeros(1, 4, 8, 8))


def test_others_run_in_their_place_and_leave_no_trace() -> None:
    net, x = chain(_Block(), _Block()), torch.randn(2, 3, 8, 8)
    twice: list[Any] = []

    def nothing(x: Tensor) -> Tensor:
        twice.append(x)
        return x

    expected = net[0](x)
    for module in list(net)[3:]:
        expected = module(expected)
    before = net(x)
    keys = list(net.state_dict())
    with replaced(net, {"1": nothing, "2": nn.Identity()}):
        assert torch.equal(net(x), expected)
        assert list(net.state_dict()) == keys  # a module in the place of a forward is not registered
    assert len(twice) == 1
    assert torch.equal(net(x), before)
    assert all("forward" not in vars(module) for module in net.modules())


def test_an_error_inside_puts_everything_back() -> None:
    net = chain(_Block(), _Block())
    with pytest.raises(ZeroDivisionError), replaced(net, {"1": nn.Identity()}):
        raise ZeroDivisionError
    assert "forward" not in vars(net[1])
