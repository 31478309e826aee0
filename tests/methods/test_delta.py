"""DELTA: its formula and the way to its channel weights, stated again in the plainest form."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.methods.constrain.delta import DELTA, channel_weights
from headstart.methods.constrain.l2_sp import L2SP
from headstart.parts.gap import gap
from headstart.parts.head_only import learn_head
from headstart.testing import Case, networks, run_check

CLASSES = 3


class Tiny(nn.Module):
    """Two stages of one convolution, with or without BatchNorm behind each."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm else (lambda _: nn.Identity())
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), make(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1, stride=2), make(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def tiny(norm: bool = False) -> Tiny:
    torch.manual_seed(0)
    return Tiny(norm).double()


def batch(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=made, dtype=torch.float64), torch.arange(n) % CLASSES


def delta(net: nn.Module | None = None, **hyper: Any) -> DELTA:
    hyper = {"taps": "conv1,conv2"} | hyper
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    return DELTA(tiny() if net is None else net, CLASSES, example=example, **hyper)


def shaken(method: DELTA, by: float = 0.1) -> DELTA:
    made = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in method.net.parameters():
            weight += by * torch.randn(weight.shape, generator=made, dtype=weight.dtype)
    return method


def maps(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    first = net.conv1(x)
    return first, net.conv2(F.relu(net.norm1(first)))


def enter(method: DELTA, batches: list[tuple[Tensor, Tensor]]) -> None:
    for _ in method.phases(1, batches):
        break


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_is_the_formula_and_so_is_its_gradient(attention: bool, reduction: str) -> None:
    method = shaken(delta(attention=attention, reduction=reduction, alpha=0.3, beta=0.2))
    if attention:
        torch.manual_seed(0)
        method.memory["W"] = torch.cat([torch.rand(c, dtype=torch.float64).softmax(0) for c in (4, 6)])
        method.memory["deltas"] = torch.zeros(10, dtype=torch.float64)
    x, y = batch()
    omega = torch.zeros((), dtype=torch.float64)
    weights = method.memory["W"].split([4, 6]) if attention else [None, None]
    for ours, theirs, W in zip(maps(method.net, x), maps(method.source.net, x), weights, strict=True):
        d = (ours - theirs.detach()).square().sum((2, 3))  # [B, C]
        c, positions = ours.shape[1], ours.shape[2] * ours.shape[3]
        omega = omega + (0.5 * d.sum() if W is None else 0.5 * (c / positions) * (W * d).sum())
    omega = omega / (len(x) if reduction == "mean" else 1)
    head = sum(0.5 * p.square().sum() for p in method.head_module.parameters())
    plain = F.cross_entropy(method.net(x), y) + 0.3 * omega + 0.2 * head
    expected = torch.autograd.grad(plain, list(method.net.parameters()))
    loss = method(x, y)
    loss.total.backward()
    torch.testing.assert_close(loss.total, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(method.net.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-12)


def test_golden_values_of_the_spec() -> None:
    def omega(diff: Tensor, W: Tensor | None = None) -> float:
        c, positions = diff.shape[1], diff.shape[2] * diff.shape[3]
        rates = torch.ones(c) if W is None else W * (c / positions)
        return float(gap(diff, torch.zeros_like(diff), rates.view(1, -1, 1, 1)))

    diff = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    assert omega(diff) == pytest.approx(2.5)
    assert omega(diff, torch.tensor([0.25, 0.75])) == pytest.approx(3.25)
    even = torch.cat(
        [torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), math.sqrt(2.0))], 1
    )  # d = (4, 8)
    assert omega(even, torch.tensor([0.5, 0.5])) == pytest.approx(1.5)


def test_uniform_weights_make_attention_the_plain_form_by_the_number_of_positions() -> None:
    x, y = batch()
    one = shaken(delta(attention=True, taps="conv2"))
    other = shaken(delta(attention=False, taps="conv2"))
    uniform, plain = (method(x, y).parts["maps"] for method in (one, other))
    torch.testing.assert_close(uniform, plain / 16, rtol=1e-12, atol=0)


def test_doubling_the_batch_by_repetition_doubles_the_sum_and_leaves_the_mean() -> None:
    x, y = batch()
    for reduction, factor in (("sum", 2.0), ("mean", 1.0)):
        method = shaken(delta(reduction=reduction))
        once, twice = (method(x.repeat(n, 1, 1, 1), y.repeat(n)).parts["maps"] for n in (1, 2))
        torch.testing.assert_close(twice, factor * once, rtol=1e-12, atol=0)


def test_the_default_is_the_official_strength_at_a_batch_of_64() -> None:
    x, y = batch(64)
    ours = shaken(delta())(x, y).parts["maps"]
    official = shaken(delta(alpha=0.01, reduction="sum"))(x, y).parts["maps"]
    torch.testing.assert_close(ours, official, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- the start, and the source


def test_nothing_is_pulled_at_the_start_where_the_norms_agree_and_something_where_not() -> None:
    x, y = batch()
    assert delta()(x, y).parts["maps"] == 0  # no BatchNorm at all
    matched = delta(tiny(norm=True), source_bn="match", taps="conv2").train()
    own = delta(tiny(norm=True), taps="conv2").train()
    assert matched(x, y).parts["maps"] == 0
    assert own(x, y).parts["maps"] > 0
    assert shaken(matched)(x, y).parts["maps"] > 0


def test_no_gradient_and_no_statistic_reaches_the_source() -> None:
    method = delta(tiny(norm=True), source_bn="match")
    before = copy.deepcopy(method.source.net.state_dict())
    x, y = batch()
    for phase in method.phases(2, [(x, y)]):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(phase.epochs):
            method(x, y).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.grad is None for p in method.source.net.parameters())
    for name, value in method.source.net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_without_alpha_it_is_the_task_and_the_decay_of_the_head_bit_by_bit() -> None:
    x, y = batch()
    ends = []
    for method in (delta(alpha=0.0, beta=0.1), L2SP(tiny(), CLASSES, alpha=0.0, beta=0.1, params="all")):
        for phase in method.phases(3, [(x, y)]):
            optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
            for _ in range(phase.epochs):
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(method.net.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_validation_costs_no_source_and_leaves_no_hook() -> None:
    method = delta()
    method.predict(batch()[0])
    method(*batch())
    assert not any(module._forward_hooks for module in method.modules())


# ---------------------------------------------------------------------- the channel weights


def test_golden_channel_weights() -> None:
    W = channel_weights(torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64), 5.0)
    expected = torch.tensor([0.2180048, 0.2180048, 0.2180048, 0.3459856], dtype=torch.float64)
    torch.testing.assert_close(W, expected, rtol=0, atol=1e-7)


def test_channel_weights_are_shares_that_scale_shift_and_order_do_not_change() -> None:
    torch.manual_seed(0)
    raw = torch.randn(16, dtype=torch.float64)
    W = channel_weights(raw, 5.0)
    assert W.sum() == pytest.approx(1.0) and (W > 0).all()
    torch.testing.assert_close(channel_weights(3 * raw - 7, 5.0), W)
    order = torch.randperm(16)
    torch.testing.assert_close(channel_weights(raw[order], 5.0), W[order])
    torch.testing.assert_close(channel_weights(raw, 1e9), torch.full_like(W, 1 / 16))
    assert torch.equal(channel_weights(torch.full((4,), 2.0), 5.0), torch.full((4,), 0.25))


def test_the_way_to_the_weights_is_the_official_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head-only training, then one filter at a time set to nothing; by hand."""
    drawn: dict[str, Tensor] = {}

    def noting(net: nn.Module, head: str, *args: Any, **options: Any) -> None:
        drawn.update(copy.deepcopy(net.get_submodule(head).state_dict()))
        learn_head(net, head, *args, **options)

    monkeypatch.setattr("headstart.methods.constrain.delta.learn_head", noting)
    batches = [batch(6, seed) for seed in (1, 2, 3)]
    method = delta(head_epochs=2, n_images=12)
    enter(method, batches)

    net = copy.deepcopy(method.source.net)
    net.head = nn.Linear(6, CLASSES).double()
    net.head.load_state_dict(drawn)
    assert net.head.weight.any()  # drawn, not zero
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for epoch in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.1 ** (epoch / 6)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    x, y = (torch.cat([one, other]) for one, other in zip(batches[0], batches[1], strict=True))
    expected = []
    for conv in (net.conv1, net.conv2):
        scores = []
        for j in range(conv.out_channels):
            kept = copy.deepcopy(conv.state_dict())
            with torch.no_grad():
                whole = F.cross_entropy(net(x), y)
                conv.weight[j] = 0
                conv.bias[j] = 0
                scores.append(F.cross_entropy(net(x), y) - whole)
            conv.load_state_dict(kept)
        expected.append(torch.stack(scores))
    torch.testing.assert_close(method.memory["deltas"], torch.cat(expected), rtol=1e-9, atol=1e-12)
    shares = [torch.softmax((each - each.mean()) / each.std(unbiased=False) / 5, 0) for each in expected]
    torch.testing.assert_close(method.memory["W"], torch.cat(shares), rtol=1e-9, atol=1e-12)


def test_weighing_leaves_net_source_and_their_statistics_alone() -> None:
    method = delta(tiny(norm=True), head_epochs=1, n_images=6)
    before = copy.deepcopy(method.net.state_dict()), copy.deepcopy(method.source.net.state_dict())
    enter(method, [batch()])
    for old, new in zip(before, (method.net.state_dict(), method.source.net.state_dict()), strict=True):
        for name, value in new.items():
            assert torch.equal(value, old[name]), name


def test_harmful_channels_may_count_as_of_no_use() -> None:
    batches = [batch()]
    methods = [delta(head_epochs=1, n_images=6, clamp_negative=clamp) for clamp in (False, True)]
    for method in methods:
        torch.manual_seed(0)
        enter(method, batches)
    plain, clamped = (method.memory["W"] for method in methods)
    assert (methods[0].memory["deltas"] < 0).any() and not torch.allclose(plain, clamped)


def test_diagnostics_show_the_weights_of_every_tap() -> None:
    method = delta(head_epochs=1, n_images=6)
    assert [tap["name"] for tap in method.diagnostics()["taps"]] == ["conv1", "conv2"]
    enter(method, [batch()])
    shown = method.diagnostics()["taps"]
    assert [len(tap["weights"]) for tap in shown] == [4, 6] == [len(tap["deltas"]) for tap in shown]
    assert all(0 < tap["effective"] <= len(tap["weights"]) + 1e-9 for tap in shown)


# ---------------------------------------------------------------------- what is refused


def test_an_unknown_tap_is_named_with_the_nearest() -> None:
    with pytest.raises(MethodError, match="Did you mean 'conv1'"):
        delta(taps="conv11")


def test_a_source_with_other_maps_is_refused() -> None:
    other = tiny()
    other.conv2 = nn.Conv2d(4, 8, 3, padding=1, stride=2).double()
    other.head = nn.Linear(8, 5).double()
    with pytest.raises(MethodError, match="compares maps of one size"):
        delta(source=other)


def test_maps_of_unequal_size_are_refused_and_not_broadcast() -> None:
    with pytest.raises(MethodError, match="cannot be compared"):
        gap(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1), torch.ones(1, 3, 1, 1))


def test_an_example_is_needed() -> None:
    with pytest.raises(MethodError, match="example"):
        DELTA(tiny(), CLASSES)


def test_weights_of_other_taps_are_refused() -> None:
    method = delta(head_epochs=1, n_images=6)
    enter(method, [batch()])
    other = delta(taps="conv2")
    other.load_state_dict(method.state_dict())
    with pytest.raises(MethodError, match="of other layers"):
        other(*batch())


@pytest.mark.parametrize("check", ["resumes_bit_equal", "copies_are_independent", "stays_finite_in_bf16"])
@pytest.mark.parametrize("hyper", [{"attention": False}, {"source_bn": "match", "freeze_bn": True}])
def test_contract_of_the_other_forms(check: str, hyper: dict[str, Any]) -> None:
    nets = {name: make() for name, make in networks().items() if "BatchNorm" in name}
    run_check(check, {name: Case(DELTA, net, hyper) for name, net in nets.items()})


def test_taps_of_a_real_network_are_the_papers() -> None:
    net = timm.create_model("resnet50", num_classes=7)
    method = DELTA(net, CLASSES, example=torch.zeros(1, 3, 32, 32))
    assert [tap.name for tap in method.taps] == [
        "layer1.2.conv3",
        "layer2.3.conv3",
        "layer3.5.conv3",
        "layer4.2.conv3",
    ]
