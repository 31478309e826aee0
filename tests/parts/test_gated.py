"""Which layers have filters to choose from, and the arithmetic of mixing them, against plain forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.parts import plain
from headstart.parts.filters import Site, find_sites
from headstart.parts.gated import FilterGate, Gated
from headstart.parts.mixing import folded, masked, mixed, pooled


class Squeeze(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Everything(nn.Module):
    """One of each that the rule speaks of, registered in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.late = nn.Conv2d(8, 6, 1)
        self.late_norm = nn.BatchNorm2d(6)
        self.never = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.se = Squeeze(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.deep_norm = nn.BatchNorm2d(8)
        self.bias = nn.Linear(1, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.stem_norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.stem_norm(x) + x, inplace=True)  # the norm is not alone
        x = x + self.bias(torch.ones(1, 1).to(x))[:, :, None, None]
        x = self.twice(self.twice(x))
        x = self.se(F.relu_(self.deep_norm(self.deep(x))))
        x = self.late_norm(self.late(x)).mean((2, 3))
        return self.head(self.fc(x))


def test_the_rule() -> None:
    net = Everything().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    sites = find_sites(net, "head", torch.zeros(1, 3, 8, 8))
    assert [(site.layer, site.norm, site.kind) for site in sites] == [
        ("stem", None, "conv"),
        ("deep", "deep_norm", "grouped"),
        ("late", "late_norm", "pointwise"),
    ]
    assert [(site.inputs, site.filters, site.dims, site.pieces) for site in sites] == [
        (3, 8, 4, 1),
        (8, 8, 4, 1),
        (8, 6, 4, 1),
    ]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_maps_of_one_position_are_not_pooled_ones() -> None:
    """At 4 px all maps of this network have one position; only what was pooled is left out."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Flatten()
    )
    assert [site.layer for site in find_sites(net, "3", torch.zeros(1, 3, 4, 4))] == ["0", "1"]
    assert [site.layer for site in find_sites(net, "none", torch.zeros(1, 3, 4, 4))] == ["0", "1"]


def test_a_norm_that_does_more_than_norm_stays_single() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Odd(nn.BatchNorm2d):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x) + 1)

    for norm, paired in ((Shifted(4), True), (Odd(4), False)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        (site,) = find_sites(net, "4", torch.randn(1, 3, 8, 8))
        assert (site.norm is not None) is paired


class Windows(nn.Module):
    """A linear layer on windows: their pieces lie along the first dimension, picture after picture."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2).reshape(-1, 4, 3)  # [B · 4, 4, C] of 16 positions
        return self.head(self.inside(tokens).reshape(x.shape[0], 16, 5).mean(1))


def test_windows_belong_to_their_picture() -> None:
    net = Windows().double()
    (site,) = find_sites(net, "head", torch.zeros(1, 3, 4, 4))
    assert (site.kind, site.dims, site.pieces) == ("linear", 3, 4)
    source = Windows().double()
    gate = FilterGate([site], 4, 0.0).double()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    chosen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.float64)
    gated = Gated([site], "dense")
    seen: list[Tensor] = []

    def see(i: int, given: Tensor, carried: Any) -> Any:
        seen.append(given)
        return gate(i, given, carried)

    logits, _ = gated.run(net, source, see, lambda site, u: chosen, x)
    torch.testing.assert_close(seen[0], x.mean((2, 3)), rtol=1e-12, atol=1e-12)
    tokens = x.flatten(2).transpose(1, 2)
    both = torch.where(chosen[:, None] > 0.5, net.inside(tokens), source.inside(tokens))
    torch.testing.assert_close(logits, net.head(both.mean(1)), rtol=1e-12, atol=1e-12)
    made = gated.export(net, source, gate, x[:1])
    expected, _ = gated.run(net, source, gate, lambda site, u: (u >= 0).to(u), x)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- mixing


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6)])
def test_mixing_is_the_weighted_sum_and_so_are_its_gradients(shape: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    spread = [3, *[1] * (len(shape) - 2)]
    spread.insert(len(spread) if last else 1, shape[-1] if last else shape[1])
    gates = torch.randint(0, 2, spread, dtype=torch.float64).requires_grad_()
    a, b, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, plain_form = mixed(gates, a, b, last=last), gates * a + (1 - gates) * b
    torch.testing.assert_close(ours, plain_form, rtol=0, atol=0)
    for grad, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), (gates, a, b)),
        torch.autograd.grad((plain_form * weight).sum(), (gates, a, b)),
        strict=True,
    ):
        torch.testing.assert_close(grad, theirs, rtol=1e-12, atol=1e-12)


def test_mixing_leaves_behind_what_is_not_taken() -> None:
    gates = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).requires_grad_()
    a = torch.tensor([1.0, float("nan")]).view(2, 1, 1, 1).requires_grad_()
    b = torch.tensor([float("inf"), 2.0]).view(2, 1, 1, 1).requires_grad_()
    out = mixed(gates, a, b)
    out.sum().backward()
    assert out.flatten().tolist() == [1.0, 2.0]
    assert a.grad.flatten().tolist() == [1.0, 0.0]
    assert b.grad.flatten().tolist() == [0.0, 1.0]
    assert gates.grad.flatten().tolist() == [0.0, 0.0]


def test_the_gradient_of_a_pooled_map_is_that_of_its_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    one, two = (nn.Conv2d(3, 6, 3).double() for _ in range(2))
    weight = torch.randn(2, 3, dtype=torch.float64)
    y, seen = pooled(x, (2, 3))
    (ours,) = torch.autograd.grad((one(y) * two(y)).sum() + (seen * weight).sum(), x)
    (theirs,) = torch.autograd.grad((one(x) * two(x)).sum() + (x.mean((2, 3)) * weight).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_norm_is_the_norm(bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine)
    both = nn.Sequential(conv, norm).double()
    both(torch.randn(8, 3, 5, 5, dtype=torch.float64))
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    both.eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(folded(conv, norm, x), both(x), rtol=1e-12, atol=1e-12)


def test_masked_statistics_are_of_the_pictures_that_chose() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double().train()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    before = norm.running_mean.clone(), norm.running_var.clone()
    z = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    gates = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=torch.float64)
    out = masked(norm, z, gates[:, :, None, None])
    for c in range(2):  # three pictures each
        chosen = z[gates[:, c] == 1, c]
        mean, var = chosen.mean(), chosen.var(correction=0)
        expected = (z[:, c] - mean) / (var + norm.eps).sqrt() * norm.weight[c] + norm.bias[c]
        torch.testing.assert_close(out[:, c], expected, rtol=1e-12, atol=1e-12)
        moved = 0.9 * before[0][c] + 0.1 * mean, 0.9 * before[1][c] + 0.1 * chosen.var()
        torch.testing.assert_close((norm.running_mean[c], norm.running_var[c]), moved, rtol=1e-12, atol=1e-12)
    # One picture is none: running statistics, which stay.
    assert norm.running_mean[2] == before[0][2]
    expected = (z[:, 2] - before[0][2]) / (before[1][2] + norm.eps).sqrt() * norm.weight[2] + norm.bias[2]
    torch.testing.assert_close(out[:, 2], expected, rtol=1e-12, atol=1e-12)


def test_masked_by_all_is_batchnorm() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    z = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    out = masked(ours, z, torch.ones(4, 3, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(out, theirs(z), rtol=1e-12, atol=1e-12)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- the gate, and what is exported


def test_the_gate_starts_where_it_is_told_and_computes_in_single_precision() -> None:
    sites = [Site("a", None, "conv", 3, 4, 4, 1), Site("b", None, "conv", 4, 5, 4, 1)]
    gate = FilterGate(sites, 8, 1.0)
    assert all(bool((layer.bias == 1).all()) for layer in gate.answer)
    with torch.autocast("cpu", torch.bfloat16):
        said, carried = gate(0, torch.randn(2, 3, dtype=torch.bfloat16), None)
        assert said.dtype == torch.float32
        assert carried[0].dtype == carried[1].dtype == torch.float32
        said, _ = gate(1, torch.randn(2, 4), carried)
        assert said.shape == (2, 5)


def test_a_graph_calls_what_is_named_once() -> None:
    net = Everything()
    made = plain.follow(net, ["stem", "twice"], torch.zeros(1, 3, 8, 8))
    assert plain.called(made, "stem").target == "stem"
    with pytest.raises(MethodError, match="calls 'twice' 2 times"):
        plain.called(made, "twice")
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(made(x), net.eval()(x))
