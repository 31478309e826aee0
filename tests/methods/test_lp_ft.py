"""LP-FT: first the probe, then everything."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import nn

from headstart.method import Batch
from headstart.methods.baseline.lp_ft import LPFT
from headstart.methods.baseline.probe import Probe


def net(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=7, **options)
    return made


def pictures(n: int, seed: int) -> list[Batch]:
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 32, 32, generator=made), torch.arange(n) % 3)]


def test_the_head_after_the_first_phase_is_the_probes() -> None:
    train, val, plain = pictures(12, 1), pictures(9, 2), pictures(12, 3)
    probe = Probe(net(), 3)
    assert list(probe.phases(2, train, val, plain)) == []
    method = LPFT(net(), 3, C=None)
    phase = next(method.phases(2, train, val, plain))
    assert phase.name == "fine-tune"
    for name, value in probe.net.state_dict().items():
        assert torch.equal(method.net.state_dict()[name], value), name
    assert method.diagnostics() == probe.diagnostics() != {}


def test_the_head_is_solved_on_pictures_that_are_not_augmented() -> None:
    train, val = pictures(12, 1), pictures(9, 2)
    heads = []
    for augmented in (pictures(12, 5), pictures(12, 6)):
        method = LPFT(net(), 3)
        next(method.phases(2, augmented, val, plain=train))
        heads.append(method.head_module.get_parameter("weight").clone())
    assert torch.equal(*heads)


def test_order_and_budget() -> None:
    plan = LPFT(net(), 3).plan(7)
    assert [(phase.name, phase.epochs) for phase in plan] == [("solve head", 0), ("fine-tune", 7)]
    method = LPFT(net(), 3)
    head = {id(parameter) for parameter in method.head_module.parameters()}
    first, second = method.plan(7)
    assert {id(p) for group in first.groups for p in group.params} == head
    assert {id(p) for group in second.groups for p in group.params} == {id(p) for p in method.parameters()}


@pytest.mark.parametrize(
    ("name", "gamma"), [("test_resnet", 0.9), ("test_convnext", 0.75), ("test_vit", 0.75)]
)
def test_rates_fall_with_depth(name: str, gamma: float) -> None:
    """γ^d, d layers below the head, by default γ of the network's kind."""
    method = LPFT(net(name), 3)
    assert method.layer_decay == gamma
    names = {id(parameter): n for n, parameter in method.net.named_parameters()}
    rate = {names[id(p)]: g.lr for g in method.plan(1)[1].groups for p in g.params}
    deep = "blocks.{}.norm1.weight" if name == "test_vit" else "stages.{}.blocks.0.norm.weight"
    deep = "layer{}.0.conv1.weight" if name == "test_resnet" else deep
    first = 1 if name == "test_resnet" else 0
    count = len(
        {n.split(".")[1 if first == 0 else 0] for n in names.values() if n.startswith(deep.split("{")[0])}
    )
    rates = [rate[deep.format(i)] for i in range(first, first + count)]
    assert len(rates) >= 3
    for lower, upper in itertools.pairwise(rates):
        assert lower == pytest.approx(gamma * upper)
    head = next(n for n in rate if n.startswith(method.head) and n.endswith("weight"))
    assert rate[head] == 5.0
    stem = {
        "test_resnet": "conv1.0.weight",
        "test_convnext": "stem.0.weight",
        "test_vit": "patch_embed.proj.weight",
    }
    assert rate[stem[name]] == min(rate.values())


def test_preset_paper_has_one_rate() -> None:
    method = LPFT(net(), 3, **LPFT.presets["paper"].hyper)
    assert {group.lr for group in method.plan(1)[1].groups} == {1.0}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_norms_biases_and_tokens_never_decay(name: str) -> None:
    method = LPFT(net(name), 3)
    names = {id(parameter): n for n, parameter in method.net.named_parameters()}
    for group in method.plan(1)[1].groups:
        for parameter in group.params:
            full_name = names[id(parameter)]
            plain = parameter.ndim >= 2 and full_name not in ("pos_embed", "cls_token", "reg_token")
            assert group.decay == (1.0 if plain else 0.0), full_name


def test_resuming_does_not_solve_again() -> None:
    train, val = pictures(12, 1), pictures(9, 2)
    method = LPFT(net(), 3)
    next(method.phases(2, train, val))
    with torch.no_grad():
        method.head_module.get_parameter("weight").mul_(2)
    method.finished_epoch()
    again = LPFT(net(), 3)
    again.load_state_dict(method.state_dict())
    phase = next(again.phases(2, train, val))
    assert phase.done == 1
    assert torch.equal(again.head_module.get_parameter("weight"), method.head_module.get_parameter("weight"))
