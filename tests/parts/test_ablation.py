"""Scores of channels by resuming behind a layer: the same as one forward of the whole network per channel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from headstart.errors import MethodError
from headstart.parts.ablation import Rest, ablation_scores
from headstart.parts.taps import Tap, find_taps

NETS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "tf_efficientnet_lite0": (32, {}),
    "test_convnext": (32, {}),
    "test_vit": (32, {"img_size": 32}),
}


def made(name: str, size: int, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **options).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and scales as of a trained network
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(3, 3, size, size, dtype=torch.float64)
    return net, x, torch.tensor([0, 1, 2])


def brute_force(net: nn.Module, layer: str, channels: list[int], x: Tensor, y: Tensor) -> Tensor:
    """Weights and bias of one filter after the other set to 0, in place, and put back."""
    module = net.get_submodule(layer)
    scores = []
    with torch.no_grad():
        whole = F.cross_entropy(net(x), y)
        for j in channels:
            kept = copy.deepcopy(module.state_dict())
            module.weight[j] = 0
            if module.bias is not None:
                module.bias[j] = 0
            scores.append(F.cross_entropy(net(x), y) - whole)
            module.load_state_dict(kept)
    return torch.stack(scores)


@pytest.mark.parametrize("name", NETS)
def test_resuming_gives_what_brute_force_gives(name: str) -> None:
    size, options = NETS[name]
    net, x, y = made(name, size, **options)
    before = copy.deepcopy(net.state_dict())
    taps = find_taps(net, x[:1])
    found = ablation_scores(net, taps, x, y, F.cross_entropy, batch=2)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    for tap in taps:
        assert Rest(net, tap.name, x).resumes, tap.name
        some = sorted({0, tap.channels // 3, tap.channels // 2, tap.channels - 1})
        expected = brute_force(net, tap.name, some, x, y)
        torch.testing.assert_close(found[tap.name][some], expected, rtol=1e-8, atol=1e-12)
        assert found[tap.name].abs().max() > 0


def test_the_last_convolution_of_a_resnet_has_a_closed_form() -> None:
    """Without channel j only pooled feature j is another, so the logits move along one column of the head."""
    net, x, y = made("resnet18", 64)
    block = net.layer4[-1]
    kept: dict[str, Tensor] = {}
    hooks = [
        block.conv2.register_forward_hook(lambda *given: kept.update(raw=given[2])),
        block.register_forward_hook(lambda *given: kept.update(out=given[2], into=given[1][0])),
    ]
    with torch.no_grad():
        logits = net(x)
        for hook in hooks:
            hook.remove()
        without = F.relu(block.bn2(torch.zeros_like(kept["raw"])) + kept["into"]).mean((2, 3))  # [B, C]
        pooled = kept["out"].mean((2, 3))
        whole = F.cross_entropy(logits, y)
        expected = torch.stack(
            [
                F.cross_entropy(logits + (without - pooled)[:, j : j + 1] * net.fc.weight[:, j], y) - whole
                for j in range(512)
            ]
        )
    tap = Tap("layer4.1.conv2", 1, 512, 4, 32)
    found = ablation_scores(net, [tap], x, y, F.cross_entropy)["layer4.1.conv2"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_what_lies_before_the_layer_runs_once() -> None:
    net, x, _ = made("resnet18", 64)
    rest = Rest(net, "layer4.1.conv2", x)
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        net(x)
    out = rest.begin(x)
    with torch.no_grad(), FlopCounterMode(display=False) as behind:
        rest(torch.cat([out, out]))
    assert behind.get_total_flops() < 0.01 * whole.get_total_flops()


def test_a_layer_that_does_not_run_once_is_refused() -> None:
    net, x, _ = made("resnet18", 64)
    net.layer1[1] = net.layer1[0]
    with pytest.raises(MethodError, match="run"):
        Rest(net, "layer1.0.conv1", x)


def test_pictures_in_several_batches_count_alike() -> None:
    net, x, y = made("test_convnext", 32)
    taps = find_taps(net, x[:1])[-1:]
    one, two = (ablation_scores(net, taps, x, y, F.cross_entropy, batch=n) for n in (3, 1))
    torch.testing.assert_close(one[taps[0].name], two[taps[0].name], rtol=1e-8, atol=1e-12)
