"""AdaFilter against its formula written out picture by picture, and what must hold whatever the network."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.data.preprocess import Preprocess
from headstart.errors import MethodError
from headstart.method import Method
from headstart.methods.baseline.full import Full
from headstart.methods.route.adafilter import AdaFilter
from headstart.nets.architecture import Architecture
from headstart.parts.frozen import fingerprint
from headstart.parts.gated import rebuilt
from headstart.ship import bundle
from headstart.testing import Case, networks, run_check, train
from headstart.training.average import Average


def small_net(seed: int = 0, classes: int = 7) -> nn.Sequential:
    """Two convolutions with BatchNorm, one without, and a head; statistics as if it had seen something."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def batches(n: int = 2, size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Any]:
    made = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=made, dtype=dtype), torch.arange(size) % 3) for _ in range(n)
    ]


def build(net: nn.Module | None = None, *, dtype: torch.dtype = torch.float64, **hyper: Any) -> AdaFilter:
    net = small_net() if net is None else net
    torch.manual_seed(1)
    size = 8 if isinstance(net, nn.Sequential) else 32
    return AdaFilter(net.to(dtype), 3, example=torch.zeros(1, 3, size, size), **({"width": 6} | hyper))


def away(method: Method, by: float = 0.2, seed: int = 3) -> Method:
    """The network as if it had learnt something: away from its source, the head away from zero."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=made, dtype=parameter.dtype))
        if isinstance(method, AdaFilter):
            for parameter in method.gate.parameters():
                noise = torch.randn(parameter.shape, generator=made, dtype=parameter.dtype)
                parameter.copy_(
                    noise * (0.1 if parameter.ndim == 1 else 3)
                )  # so that it tells pictures apart
    return method


def learn(
    method: Method, steps: int = 4, norm: Any = "train", lr: float = 0.05, data: Any = None
) -> list[float]:
    method.norm = norm
    data = batches() if data is None else data
    losses = []
    phase = next(iter(method.phases(1, data)))
    optimizer = phase.optimizer(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        x, y = data[step % len(data)]
        loss = method(x, y).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- the formula, in the plainest form


def lstm(gate: Any, e: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, after torch's documentation: gates i, f, g, o."""
    z = gate.cell.weight_ih @ e + gate.cell.bias_ih + gate.cell.weight_hh @ h + gate.cell.bias_hh
    i, f, g, o = z.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def written_out(method: AdaFilter, x: Tensor, training: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits and gates of `small_net`, layer after layer; the gate picture by picture; no shared code."""
    ours, theirs, gate = method.net, method.source.net, method.gate
    width = gate.cell.hidden_size
    states = [(torch.zeros(width).to(x), torch.zeros(width).to(x)) for _ in x]
    every = []
    for number, (conv, norm) in enumerate(((0, 1), (3, 4), (6, None))):
        rows = []
        for b, picture in enumerate(x):
            e = gate.embed[number].weight @ picture.mean((1, 2)) + gate.embed[number].bias
            states[b] = lstm(gate, e, *states[b])
            p = torch.sigmoid(gate.answer[number].weight @ states[b][0] + gate.answer[number].bias)
            rows.append((p >= 0.5).to(p) - p.detach() + p)
        gates = torch.stack(rows)
        groups = ours[conv].groups
        z_f = F.conv2d(x, ours[conv].weight, ours[conv].bias, groups=groups)
        z_s = F.conv2d(x, theirs[conv].weight, theirs[conv].bias, groups=groups)
        if norm is not None:
            n, s = ours[norm], theirs[norm]
            mean, var = n.running_mean, n.running_var
            if training:
                mean, var = z_f.mean((0, 2, 3)), z_f.var((0, 2, 3), correction=0)
            z_f = (z_f - mean[:, None, None]) / (var[:, None, None] + n.eps).sqrt()
            z_f = z_f * n.weight[:, None, None] + n.bias[:, None, None]
            z_s = (z_s - s.running_mean[:, None, None]) / (s.running_var[:, None, None] + s.eps).sqrt()
            z_s = z_s * s.weight[:, None, None] + s.bias[:, None, None]
        g = gates[:, :, None, None]
        x = (g * z_f + (1 - g) * z_s).clamp(min=0)
        every.append(gates)
    return F.linear(x.mean((2, 3)), ours[10].weight, ours[10].bias), every


@pytest.mark.parametrize("norm", ["train", "eval"])
def test_agrees_with_the_formula_written_out(norm: Any) -> None:
    method = away(build())
    method.norm = norm
    method.train()
    x, y = batches(1)[0]
    plain = copy.deepcopy(method)
    loss = method(x, y)
    loss.total.backward()
    logits, gates = written_out(plain, x, training=norm == "train")
    total = F.cross_entropy(logits, y)
    total.backward()
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    shares = torch.cat([each.detach() for each in gates], 1).mean(0)
    assert 0.1 < shares.mean() < 0.9, "both sides must be taken, or the test sees half"
    by_picture = [bool((each != each[0]).any()) for each in gates]
    assert sum(by_picture) >= 2, "pictures must be told apart"
    learning = dict(plain.named_parameters())
    for name, parameter in method.named_parameters():
        theirs = learning[name].grad
        assert parameter.grad is not None and theirs is not None, name
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-9, atol=1e-12, msg=name)
    assert method.gate.cell.weight_ih.grad.abs().max() > 0


def test_predict_agrees_with_the_formula_written_out() -> None:
    method = away(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        logits, gates = written_out(method, x)
        ours, mine = method.run(x)
    torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, gates, strict=True):
        assert torch.equal(a, b.round())


def test_golden() -> None:
    """One 1×1 filter of weight 2 (source 3), gate by its sign: x = 1 takes F, x = -1 takes S.

    By hand: e = x, the LSTM's weights are 0 but for g = tanh(e) and biases of 0, so that c = tanh(x)/2 and
    h = tanh(c)/2, of the sign of x; the answer is h. Logits: 2 · 1 = 2 and 3 · (-1) = -3.
    """
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    method = AdaFilter(net, example=torch.zeros(1, 1, 1, 1), width=1)
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[2].weight.fill_(1.0)
        for parameter in method.gate.parameters():
            parameter.zero_()
        method.gate.embed[0].weight.fill_(1.0)
        method.gate.cell.weight_ih[2] = 1.0
        method.gate.answer[0].weight.fill_(1.0)
    method.eval()
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    logits, gates = method.run(x)
    assert logits.flatten().tolist() == [2.0, -3.0]
    assert gates[0].flatten().tolist() == [1.0, 0.0]


# ---------------------------------------------------------------- invariants


def before_head(net: nn.Module, head: str, run: Callable[[], Any]) -> Tensor:
    """What the head is given."""
    seen: list[Tensor] = []
    hook = net.get_submodule(head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "rest"), [("test_resnet", "train"), ("test_vit", "frozen"), ("test_convnext", "frozen")]
)
def test_all_pretrained_is_the_source_bit_for_bit(name: str, rest: Any) -> None:
    """Before and after training. What has no gate must not learn: in the residual network all have one."""
    net = next(make for label, make in networks().items() if name in label)()
    source = copy.deepcopy(net).eval()
    method = build(net, dtype=torch.float32, rest=rest)
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4) % 3)]
    for _ in range(2):
        method.policy = lambda site, u: torch.zeros_like(u)
        method.eval()
        with torch.no_grad():
            ours = before_head(method.net, method.head, lambda: method.predict(data[0][0]))
            theirs = before_head(source, method.head, lambda: source(data[0][0]))
        assert torch.equal(ours, theirs)
        method.policy = None
        learn(method, data=data, lr=0.01)
    site = method.sites[0].layer + ".weight"
    assert not torch.equal(method.net.get_parameter(site), source.get_parameter(site))


@pytest.mark.parametrize("norm", ["train", "eval"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_all_tuned_is_plain_fine_tuning_bit_for_bit(name: str, norm: Any) -> None:
    make = next(make for label, make in networks().items() if name in label)
    data = [
        (torch.randn(4, 3, 32, 32), torch.arange(4) % 3),
        (torch.randn(4, 3, 32, 32), torch.arange(4) % 3),
    ]
    ours = build(make(), dtype=torch.float32)
    ours.policy = lambda site, u: torch.ones_like(u)
    plain = Full(make(), 3)
    first = learn(ours, norm=norm, data=data)
    assert first == learn(plain, norm=norm, data=data)
    for (key, a), b in zip(ours.net.state_dict().items(), plain.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_at_the_start_any_policy_is_the_source() -> None:
    """With BatchNorm held: both sides are the same filters then."""
    method = build()
    method.norm = "eval"
    method.train()
    x, _ = batches(1)[0]
    features = []
    for p in (0.0, 0.5, 1.0):
        method.policy = lambda site, u, p=p: torch.bernoulli(torch.full_like(u, p))
        with torch.no_grad():
            features.append(before_head(method.net, method.head, lambda: method.run(x)))
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


def test_a_filter_that_no_picture_chose_gets_no_gradient() -> None:
    method = away(build())
    method.train()
    never = {0: 1, 1: 2, 2: 4}

    def policy(site: int, u: Tensor) -> Tensor:
        gates = torch.ones_like(u)
        gates[:, never[site]] = 0
        return gates

    method.policy = policy
    x, y = batches(1)[0]
    method(x, y).total.backward()
    for site, conv in enumerate((0, 3, 6)):
        grad = method.net[conv].weight.grad
        assert not grad[never[site]].any()
        assert sum(bool(filter.any()) for filter in grad) >= 2


def test_gradients_of_the_gates_are_those_of_the_soft_ones() -> None:
    """d G / d u is d p / d u, whatever G is; and G is 0 or 1 exactly."""
    for kind, derivative in (
        ("sigmoid", lambda u: torch.sigmoid(u) * (1 - torch.sigmoid(u))),
        ("hard-sigmoid", lambda u: ((u > -1) & (u < 1)) / 2),
    ):
        method = build(gate=kind)
        u = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
        gates = method._choose(0, u)
        assert set(gates.tolist()) == {0.0, 1.0}
        assert torch.equal(gates.detach(), (u >= 0).to(u))
        (grad,) = torch.autograd.grad(gates.sum(), u)
        torch.testing.assert_close(grad, derivative(u.detach()).to(u), rtol=1e-12, atol=1e-15)


def test_gumbel_draws_while_training_only() -> None:
    method = build(gate="gumbel", tau=2.0)
    u = torch.full((20000,), 0.7, dtype=torch.float64, requires_grad=True)
    method.train()
    torch.manual_seed(0)
    drawn = method._choose(0, u)
    assert float(drawn.detach().mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(0.7))), abs=0.015)
    method.eval()
    assert bool((method._choose(0, u) == 1).all())


def test_a_gate_depends_on_the_layers_up_to_its_own_only() -> None:
    method = away(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        seen: dict[int, Tensor] = {}
        method.policy = lambda site, u: (seen.__setitem__(site, u), (u >= 0).to(u))[1]
        method.run(x)
        before = dict(seen)
        for number, conv in enumerate((0, 3, 6)):
            changed = copy.deepcopy(method)
            changed.policy = method.policy
            changed.net[conv].weight.add_(1.0)
            changed.source.net[conv].weight.add_(1.0)
            changed.run(x)
            for site in range(3):
                assert torch.equal(seen[site], before[site]) == (site <= number), (number, site)


def test_one_cell_for_all_layers_and_nothing_carried_over() -> None:
    method = away(build()).eval()
    sites, width = method.sites, 6
    counted = sum(parameter.numel() for parameter in method.gate.parameters())
    assert [(site.inputs, site.filters) for site in sites] == [(3, 4), (4, 4), (4, 5)]
    own = sum(site.inputs * width + width + width * site.filters + site.filters for site in sites)
    assert counted == own + 4 * (width * width + width * width + 2 * width)
    (a, _), (b, _) = batches(2)
    with torch.no_grad():
        alone = method.predict(b)
        method.predict(a)
        assert torch.equal(method.predict(b), alone)


def test_pictures_do_not_see_each_other() -> None:
    method = away(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        logits, gates = method.run(x)
        for i in range(len(x)):
            alone, own = method.run(x[i : i + 1])
            torch.testing.assert_close(alone[0], logits[i], rtol=1e-12, atol=1e-12)
            assert all(torch.equal(a[0], b[i]) for a, b in zip(own, gates, strict=True))


def test_what_is_not_taken_may_be_no_number() -> None:
    method = away(build())
    method.policy = lambda site, u: torch.zeros_like(u)
    x, _ = batches(1)[0]
    for mode in (False, True):
        method.train(mode)
        with torch.no_grad():
            before = method.predict(x)
            kept = method.net[3].weight.detach().clone()
            method.net[3].weight.fill_(float("nan"))
            assert torch.equal(method.predict(x), before)
            method.net[3].weight.copy_(kept)


def test_merged_filters_are_mixed_ones_picture_by_picture() -> None:
    """G BN(F ∗ x) + (1 - G) BN(S ∗ x) is an ordinary network for each picture, of the filters it took."""
    method = away(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        logits, gates = method.run(x)
        assert any(bool((each != each[0]).any()) for each in gates), "pictures must be told apart"
        for i in range(len(x)):
            own = method.merged([each[i].bool() for each in gates])
            torch.testing.assert_close(own(x[i : i + 1])[0], logits[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
@pytest.mark.parametrize("source_bn", ["eval", "adapt"])
def test_static_is_dynamic_under_a_constant_policy(name: str, source_bn: Any) -> None:
    make = next(make for label, make in networks().items() if name in label)
    method = away(build(make(), source_bn=source_bn), by=0.02).eval()
    torch.manual_seed(5)
    constant = [torch.rand(site.filters) > 0.5 for site in method.sites]
    method.policy = lambda site, u: constant[site].to(u).expand_as(u)
    net = method.merged(constant)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), method.predict(x), rtol=1e-9, atol=1e-9)
    assert type(net) is type(method.net)
    assert [(k, v.shape) for k, v in net.state_dict().items()] == [
        (k, v.shape) for k, v in method.net.state_dict().items()
    ]
    ours = {p.untyped_storage().data_ptr() for p in (*method.parameters(), *method.source.net.parameters())}
    assert ours.isdisjoint(p.untyped_storage().data_ptr() for p in net.parameters())


def test_what_is_frozen_stays_and_is_nowhere_else() -> None:
    method = build()
    before = fingerprint(method.source.net)
    learn(method)
    assert fingerprint(method.source.net) == before
    frozen = {p.untyped_storage().data_ptr() for p in method.source.net.state_dict().values()}
    groups = [p for phase in method.plan(2) for group in phase.groups for p in group.params]
    method.requires_grad_(True)
    averaged = Average(method, 0.9, 10).live
    for tensors in (groups, averaged, method.state_dict().values()):
        there = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
        assert frozen.isdisjoint(there)
    assert all(not p.requires_grad and p.grad is None for p in method.source.net.parameters())


def test_a_policy_of_ones_own_takes_the_gates_place() -> None:
    """What an ablation needs: random choices of equal usage."""
    method = away(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        learnt, gates = method.run(x)
        method.policy = lambda site, u: gates[site][torch.randperm(len(u))]
        shuffled, others = method.run(x)
    assert [g.sum().item() for g in others] == [g.sum().item() for g in gates]
    assert not torch.equal(shuffled, learnt)


# ---------------------------------------------------------------- options


def test_the_price_of_fine_tuned_filters_is_their_share() -> None:
    method = away(build(lam=0.5))
    x, y = batches(1)[0]
    loss = method(x, y)
    gates = torch.cat(method.run(x)[1], 1)
    torch.testing.assert_close(loss.parts["filters"], 0.5 * gates.detach().mean(), rtol=1e-12, atol=0)


def test_layers_by_kind() -> None:
    assert [site.layer for site in build(layers="grouped pointwise").sites] == ["3", "6"]
    method = build(layers="conv")
    assert [site.layer for site in method.sites] == ["0"]
    frozen = build(layers="conv", rest="frozen")
    names = {id(p): name for name, p in frozen.named_parameters()}
    learns = {names[id(p)] for group in frozen.plan(1)[0].groups for p in group.params}
    assert {name for name in learns if name.startswith("net.")} == {
        "net.0.weight",
        "net.1.weight",
        "net.1.bias",
        "net.10.weight",
        "net.10.bias",
    }


def test_one_norm_for_both_sees_the_mixture() -> None:
    method = away(build(bn="single")).eval()
    method.policy = lambda site, u: torch.zeros_like(u)
    x, _ = batches(1)[0]
    seen: list[Tensor] = []
    hook = method.net[1].register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        method.predict(x)
        expected = method.net[1](F.conv2d(x, method.source.net[0].weight))
    hook.remove()
    assert torch.equal(seen[0], expected)


def test_the_sources_norms_may_adapt() -> None:
    method = build(source_bn="adapt")
    given = fingerprint(method.source.net)
    learn(method)
    assert fingerprint(method.source.net) == given
    for name, norm in method._norms().items():
        theirs = method.source.net.get_submodule(name)
        assert not torch.equal(norm.running_mean, theirs.running_mean)
        assert not torch.equal(norm.weight, theirs.weight)


@pytest.mark.parametrize(
    "hyper",
    [
        {"gate": "gumbel", "bn": "masked"},
        {"gate": "hard-sigmoid", "bn": "single", "lam": 0.1},
        {"source_bn": "adapt", "rest": "frozen"},
    ],
    ids=lambda hyper: " ".join(map(str, hyper.values())),
)
def test_options_keep_the_contract(hyper: dict[str, Any]) -> None:
    case = {"small": Case(AdaFilter, small_net(), {"width": 6} | hyper)}
    for check in (
        "what_learns_changes",
        "frozen_means_frozen",
        "resumes_bit_equal",
        "copies_are_independent",
        "export_says_what_predict_says",
        "export_is_plain",
        "shows_plain_data",
        "stays_finite_in_bf16",
    ):
        assert run_check(check, case) == "holds", check


# ---------------------------------------------------------------- what is left, and what there is to see


def trained(**hyper: Any) -> tuple[AdaFilter, Case]:
    case = Case(AdaFilter, small_net(), {"width": 6} | hyper)
    method = case.method()
    train(method, case)
    return method.eval(), case


def test_export_is_made_again_from_plain_data() -> None:
    method, case = trained()
    net = method.export()
    x = case.val[0][0]
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    again = rebuilt(small_net(seed=9, classes=3), net.meta["routed"])
    again.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(x), method.predict(x))
        assert torch.equal(net(x[:1]), method.predict(x[:1]))


def test_a_bundle_holds_it(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=7)
    torch.manual_seed(0)
    method = away(AdaFilter(net, 3, example=torch.zeros(1, 3, 32, 32)), by=0.02).eval()
    preprocess = Preprocess(size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0)
    config = Architecture(name="test_resnet", num_classes=7, kwargs={}, pretrained_cfg={})
    bundle.save(
        tmp_path / "model",
        method.export(),
        config=config,
        preprocess=preprocess,
        classes=["a", "b", "c"],
        card={},
    )
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bundle.read(tmp_path / "model").net(x), method.predict(x))


@pytest.mark.parametrize("hyper", [{}, {"source_bn": "adapt"}, {"bn": "single"}, {"bn": "masked"}])
def test_a_bundle_is_settled_without_the_method(hyper: dict[str, Any], tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=7)
    torch.manual_seed(0)
    method = away(AdaFilter(net, 3, example=torch.zeros(1, 3, 32, 32), **hyper), by=0.02)
    list(method.phases(1, [(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)]))
    assert method.diagnostics()["entropy"] > 0.05, "pictures must be told apart"
    preprocess = Preprocess(size=32, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", crop_pct=1.0)
    config = Architecture(name="test_resnet", num_classes=7, kwargs={}, pretrained_cfg={})
    bundle.save(
        tmp_path / "model",
        method.export(),
        config=config,
        preprocess=preprocess,
        classes=["a", "b", "c"],
        card={},
    )
    settled = bundle.settled(bundle.read(tmp_path / "model"))
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(settled.net(x), method.export(static=True)(x))
    assert settled.card["settled"] == method.diagnostics()["static"]
    assert type(settled.net) is type(net)


@pytest.mark.parametrize("source_bn", ["eval", "adapt"])
def test_a_static_network_may_be_asked_for_from_the_start(source_bn: Any) -> None:
    """Then it is what is scored and shipped."""
    routed, static = (
        away(build(source_bn=source_bn, inference=inference)) for inference in ("routed", "static")
    )
    for method in (routed, static):
        list(method.phases(1, batches(3)))
    x, _ = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(static.predict(x), routed.export(static=True)(x))
        assert torch.equal(static.predict(x), static.export()(x))
        assert not torch.equal(static.predict(x), routed.predict(x))
    assert type(static.export()) is nn.Sequential
    assert static.diagnostics() == routed.diagnostics()


def test_gates_that_never_look_at_the_picture_are_told() -> None:
    method = build()
    method.policy = lambda site, u: (torch.arange(u.shape[1]) % 2).to(u).expand_as(u)
    data = batches(9)
    with pytest.warns(UserWarning, match="takes the same filters for nearly all pictures"):
        list(method.phases(1, data))
    assert method.diagnostics()["collapsed"] is True


def test_what_diagnostics_say_is_what_the_gates_say() -> None:
    method, case = trained()
    shown = method.diagnostics()
    x, y = (torch.cat(each) for each in zip(*case.train, strict=True))
    with torch.no_grad():
        gates = method.run(x)[1]
    usage = torch.cat(gates, 1).mean(0)
    torch.testing.assert_close(method.memory["usage"], usage, rtol=1e-6, atol=1e-6)
    assert shown["filters"] == 13
    assert shown["tuned"] == pytest.approx(float(usage.mean()), abs=1e-4)
    p = usage.double().clamp(1e-12, 1 - 1e-12)
    bits = -(p * p.log2() + (1 - p) * (1 - p).log2()).mean()
    assert shown["entropy"] == pytest.approx(float(bits), abs=1e-4)
    for layer, own, site in zip(shown["layers"], gates, method.sites, strict=True):
        shares = own.mean(0)
        assert (layer["layer"], layer["kind"], layer["filters"]) == (site.layer, site.kind, own.shape[1])
        assert layer["tuned"] == pytest.approx(float(own.mean()), abs=1e-4)
        assert layer["always"] == int((shares == 1).sum())
        assert layer["never"] == int((shares == 0).sum())
        assert sum(layer["histogram"]) == site.filters
    for label, shares in enumerate(shown["classes"]):
        assert shares == pytest.approx([float(own[y == label].mean()) for own in gates], abs=1e-4)
    counts = torch.cat(gates, 1).sum(1)
    assert shown["pictures"]["most"][0]["tuned"] == int(counts.max())
    assert shown["pictures"]["fewest"][0] == {"picture": int(counts.argmin()), "tuned": int(counts.min())}
    x = case.val[0][0]
    with torch.no_grad():
        same = method.export(static=True)(x).argmax(1) == method.predict(x).argmax(1)
    assert shown["static"] == {
        "agreement": round(float(same.float().mean()), 4),
        "pictures": 6,
        "of": "validation",
    }


def test_what_is_observed_is_what_was_used_lately() -> None:
    method = build()
    assert method.observe() == {}
    method.policy = lambda site, u: torch.full_like(u, float(site == 1))
    learn(method, steps=3)
    assert method.observe() == {"tuned": round(4 / 13, 4), "entropy": 0.0, "layers": [0.0, 1.0, 0.0]}


@pytest.mark.parametrize(("always", "side"), [(0.0, "pretrained"), (1.0, "fine-tuned")])
def test_a_collapse_is_told_once(always: float, side: str) -> None:
    method = build()
    method.policy = lambda site, u: torch.full_like(u, always)
    learn(method, steps=3)
    with pytest.warns(UserWarning, match=f"collapsed: 100.0% of all choices are the {side} filter"):
        method.observe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.observe()


# ---------------------------------------------------------------- bad input


class Branches(nn.Module):
    """Goes a way that depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3))
        return self.head(x)


def test_bad_input_gets_one_clear_sentence() -> None:
    with pytest.raises(MethodError, match="has to see the network run once"):
        AdaFilter(small_net(), 3)
    with pytest.raises(MethodError, match="Did you mean 'pointwise'"):
        build(layers="pointwize")
    with pytest.raises(MethodError, match="found no layer of Sequential to gate"):
        build(layers="linear")
    with pytest.raises(MethodError, match="'0' is not the same in the source"):
        build(source=nn.Sequential(nn.Conv2d(3, 5, 3)))
    with pytest.raises(MethodError, match="cannot be followed by torch"):
        AdaFilter(Branches(), 3, example=torch.zeros(1, 3, 8, 8))
    with pytest.raises(MethodError, match="cannot see pictures of 3 channels and 1 × 1 pixels"):
        AdaFilter(small_net(), 3, example=torch.zeros(1, 3, 1, 1))
    with pytest.raises(MethodError, match="has looked at no pictures yet"):
        build().export(static=True)
    x, _ = batches(1)[0]
    with pytest.raises(MethodError, match="mixup shows it two at once"):
        build()(x, torch.full((6, 3), 1 / 3, dtype=torch.float64))


def test_fits_says_why_not() -> None:
    data = {"classes": 3, "train": 18, "val": 6, "img_size": 8}
    assert AdaFilter.fits(small_net(), data) is None
    assert "cannot be followed by torch.fx" in str(AdaFilter.fits(Branches(), data))
    only_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    assert AdaFilter.fits(only_head, data) == "Sequential has no layer to gate."
