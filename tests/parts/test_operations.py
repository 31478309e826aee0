from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.parts.operations import flops


def test_a_convolution_and_a_linear_layer_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert flops(net.eval(), 16) == 2 * (16 * 16 * 8 * 3 * 9) + 2 * (8 * 5)


def test_attention_counts_on_the_cpu_too() -> None:
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)  # [1, 1, 64, 3]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert flops(Attends(), 8) == 2 * 2 * (64 * 64 * 3)


def test_a_network_that_decides_by_its_numbers_is_counted_on_a_picture() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if bool((x == 0).all()) else x

    net = Decides()
    assert flops(net, 4) == 2 * 4 * 4 * 3 * 4
    assert net.conv.weight.device.type == "cpu"


def test_a_network_that_cannot_be_counted_has_no_number() -> None:
    assert flops(nn.Linear(7, 2), 4) is None


def test_nothing_of_the_network_changes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    flops(net, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
