"""FitNets against its formulas in the plainest form, and what must hold whatever the two networks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart import registry
from headstart.errors import MethodError
from headstart.method import Method, Phase, Preset
from headstart.methods.select.fitnets import FitNets
from headstart.parts.logistic import solve
from headstart.parts.viewed import Viewed
from headstart.testing import CHECKS, ON_RANKS, check_method, networks

F64 = torch.float64


def student(seed: int = 0, classes: int = 7) -> nn.Sequential:
    """Maps of 4 × 8 × 8 behind "2" and of 6 × 4 × 4 behind "5"."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    ).double()


def teacher(seed: int = 1, classes: int = 9) -> nn.Sequential:
    """Maps of 5 × 8 × 8 behind "2" and of 6 × 4 × 4 behind "4"."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.Conv2d(5, 6, 3, 2, 1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    ).double()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net


def batches(n: int = 3, size: int = 6, seed: int = 0, dtype: torch.dtype = F64) -> list[Any]:
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 16, 16, dtype=dtype), torch.arange(size) % 3) for _ in range(n)]


def build(net: nn.Module | None = None, source: nn.Module | None = None, **given: Any) -> FitNets:
    torch.manual_seed(5)
    net, source = net or student(), source or teacher()
    given = {"classes": 3, "norm_maps": False} | given  # maps as the paper has them
    return FitNets(net, source=source, example=torch.zeros(1, 3, 16, 16), **given)


def sgd(phase: Phase, lr: float = 0.05) -> torch.optim.Optimizer:
    return phase.optimizer(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-3)


def train(method: Method, epochs: int, data: list[Any], lr: float = 0.05) -> Iterator[Phase]:
    """Yields each phase when it is over."""
    for phase in method.phases(epochs, data):
        optimizer = sgd(phase, lr)
        for _ in range(phase.epochs):
            for x, y in data:
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
        yield phase


def grads(loss: Tensor, net: nn.Module) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def one_hot_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """H(y, p) picture by picture."""
    return torch.stack(
        [-torch.log(row.exp()[k] / row.exp().sum()) for row, k in zip(logits, y, strict=True)]
    ).mean()


def soft_entropy(theirs: Tensor, ours: Tensor, tau: float) -> Tensor:
    """H(p_T^τ, p^τ) with every softmax written out."""
    total = torch.zeros((), dtype=F64)
    for t, s in zip(theirs, ours, strict=True):
        p_t = (t / tau).exp() / (t / tau).exp().sum()
        p_s = (s / tau).exp() / (s / tau).exp().sum()
        total = total - sum(a * b.log() for a, b in zip(p_t, p_s, strict=True))
    return total / len(ours)


# ---------------------------------------------------------------------- the formulas again


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_hint_loss_is_its_formula(reduction: str) -> None:
    method = build(pair="2,2", beta=0.5, reduction=reduction)
    x, y = batches(1)[0]
    phase = next(method.phases(4, batches()))
    assert phase.name == "hint"
    plain, source = copy.deepcopy(method.net), teacher().eval()
    weight, bias = method.regressor.weight[:, :, 0, 0].detach(), method.regressor.bias.detach()
    loss = method(x, y)
    loss.total.backward()

    v, u = plain[:3](x), source[:3](x).detach()
    total = torch.zeros((), dtype=F64)
    for b in range(len(x)):  # ½ ‖u − r(v)‖², picture by picture
        r = torch.stack([sum(weight[o, c] * v[b, c] for c in range(4)) + bias[o] for o in range(5)])
        total = total + 0.5 * ((u[b] - r) ** 2).sum() / len(x)
    total = total / (5 * 8 * 8) if reduction == "mean" else total
    total.backward()
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    for ours, theirs in zip(method.net[:3].parameters(), plain[:3].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)
    assert all(parameter.grad is None for parameter in method.net[3:].parameters())


def test_the_whole_training_is_the_papers() -> None:
    """Hints with a regressor, then H(y, p) + λ(t) H(p_T^τ, p^τ): the weights after each stage, restated."""
    data = batches()
    method = build(pair="2,2", kd="probe", head_lr=1.0, hint_share=0.5, decay_from=0.25, decay_until=0.75)
    plain, source = copy.deepcopy(method.net).train(), teacher().eval()
    r = copy.deepcopy(method.regressor)
    walk = train(method, 4, data)

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def rule(*modules: nn.Module) -> torch.optim.Optimizer:
        learning = [p for module in modules for p in module.parameters()]
        kinds = ([p for p in learning if p.ndim > 1], 1e-3), ([p for p in learning if p.ndim == 1], 0.0)
        groups = [{"params": params, "weight_decay": decay} for params, decay in kinds]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)

    assert next(walk).name == "hint"
    optimizer = rule(plain[:3], r)
    for _ in range(2):
        for x, _ in data:
            step(optimizer, 0.5 * F.mse_loss(r(plain[:3](x)), source[:3](x).detach()))
    _agree(method.net, plain)

    features = torch.cat([source[:-1](x) for x, _ in data]).detach()
    head = solve(features, torch.cat([y for _, y in data]), 3)
    assert next(walk).name == "distil"
    optimizer = rule(plain)
    for i in range(2 * len(data)):
        x, y = data[i % len(data)]
        taught = source[:-1](x).detach() @ head.weight.double().T + head.bias.double()
        lam = 4 - 3 * min(max((i / 6 - 0.25) / 0.5, 0), 1)
        logits = plain(x)
        step(optimizer, one_hot_entropy(logits, y) + lam * soft_entropy(taught, logits, 3))
    # λ is kept in float32, and the features that the head is solved on are.
    _agree(method.net, plain, rtol=1e-5)


def _agree(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-9) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda text, at=name: f"{at}: {text}")


def test_the_joint_loss_is_its_formula() -> None:
    """RepDistiller's: cross-entropy + β × the mean square, on one pair."""
    method = build(mode="joint", pair="5,4", regressor="conv1x1", beta=100.0)
    with torch.no_grad():
        method.net[-1].weight.normal_()
    x, y = batches(1)[0]
    method.train()
    plain, source, r = copy.deepcopy(method.net), teacher().eval(), copy.deepcopy(method.regressor)
    loss = method(x, y)
    loss.total.backward()
    total = one_hot_entropy(plain(x), y)
    hint = 100 * ((source[:5](x).detach() - r(plain[:6](x))) ** 2).mean()
    torch.testing.assert_close(loss.parts["task"], total.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["hint"], hint.detach(), rtol=1e-12, atol=0)
    hint.backward()
    torch.testing.assert_close(method.regressor.weight.grad, r.weight.grad, rtol=1e-10, atol=1e-15)


class _Louder(nn.SiLU):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


@pytest.mark.parametrize("mode", ["staged", "joint"])
def test_a_hint_counts_in_its_own_spread(mode: str) -> None:
    """So that a source whose maps are larger teaches the same; as they are, it does not."""

    def learnt(factor: float, norm_maps: bool) -> tuple[FitNets, list[Tensor]]:
        loud = teacher()
        loud[4] = _Louder(factor)
        method = build(source=loud, mode=mode, pair="5,4", kd="none", norm_maps=norm_maps)
        for _ in train(method, 4, batches()):
            pass
        return method, [each.detach().clone() for each in method.net.parameters()]

    (method, once), (_, louder) = learnt(1.0, True), learnt(50.0, True)
    for p, q in zip(once, louder, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)
    seen = teacher().eval()[:5](torch.cat([x for x, _ in batches()])).detach()
    sigma = seen.var((0, 2, 3), unbiased=False).mean().sqrt()
    torch.testing.assert_close(method.memory["their_spread"][0], sigma, rtol=1e-12, atol=0)
    raw, raw_louder = learnt(1.0, False)[1], learnt(50.0, False)[1]
    assert not all(torch.allclose(p, q, rtol=1e-2) for p, q in zip(raw, raw_louder, strict=True))


class _Golden(nn.Module):
    """A map that is `w` times the picture, and a head that makes [0, 0] of it."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(1, 2)
        nn.init.constant_(self.stem.weight, w)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stem(x)).flatten(1))


@pytest.mark.parametrize(("norm_maps", "loss_is", "slope"), [(False, 2.5, -7.0), (True, 0.5, 3.0)])
def test_golden(norm_maps: bool, loss_is: float, slope: float) -> None:
    """w = 2, source 3, r = 1 · v + ½: on pictures of 1 and 2 in 2 × 2, gaps 3 − 2.5 = .5 and 6 − 4.5 = 1.5.

    By hand: ½ · Σ gap² = ½ · 4 · .25 = .5 and ½ · 4 · 2.25 = 4.5, on average 2.5; the mean over the four
    positions is .625. d/dw of ½ Σ (3x − wx − ½)² is −4 · gap · x: −2 and −12, on average −7. Counted in their
    spread of 1.5 the hints are 2 and 4, both gaps −.5, the losses .5 and the slopes 2 and 4.
    """
    method = FitNets(
        _Golden(2.0).double(),
        2,
        source=_Golden(3.0),
        example=torch.zeros(1, 1, 2, 2),
        regressor="conv1x1",
        reduction="sum",
        norm_maps=norm_maps,
    )
    with torch.no_grad():
        method.regressor.weight.fill_(1.0)
        method.regressor.bias.fill_(0.5)
    x = torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)]).double()
    y = torch.tensor([0, 1])
    method.source.apply(lambda each: each.double())
    next(method.phases(4, [(x, y)]))
    loss = method(x, y)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(loss_is, abs=1e-14)
    assert method.net.stem.weight.grad.item() == pytest.approx(slope, abs=1e-14)
    method.reduction = "mean"
    assert method(x, y).total.item() == pytest.approx(loss_is / 4, abs=1e-14)


def test_golden_kd() -> None:
    """Source [ln 8, 0], ours [0, 0], τ = 3: p_T = [2/3, 1/3], p = [½, ½], so H = ln 2, gradients ∓1/18.

    By hand: ln 8 / 3 = ln 2, and softmax [ln 2, 0] = [2, 1]/3. dH/dz = (p − p_T)/τ = [−1/6, 1/6]/3.
    """
    method = FitNets(_Golden(1.0), 2, source=_Golden(1.0), example=torch.zeros(1, 1, 2, 2), kd="logits")
    ours = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    loss = method._kd_loss(ours, torch.tensor([[8.0, 1.0]], dtype=F64).log())
    loss.backward()
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-15)
    torch.testing.assert_close(ours.grad, torch.tensor([[-1 / 18, 1 / 18]], dtype=F64), rtol=1e-14, atol=0)


# ---------------------------------------------------------------------- the hint


def test_alike_networks_have_no_hint_to_follow() -> None:
    net = teacher()
    method = build(net, copy.deepcopy(net), regressor="conv1x1", pair="2,2")
    method.norm = "eval"
    with torch.no_grad():
        nn.init.eye_(method.regressor.weight[:, :, 0, 0])
        method.regressor.bias.zero_()
    x, y = batches(1)[0]
    next(method.phases(4, batches()))
    loss = method(x, y)
    loss.total.backward()
    assert loss.total.item() == 0
    assert not any(parameter.grad.any() for parameter in method.regressor.parameters())


@pytest.mark.parametrize("mode", ["staged", "joint"])
def test_a_regressor_that_begins_as_the_identity_gives_the_raw_distance(mode: str) -> None:
    method = build(regressor="conv1x1", pair="5,4", mode=mode, beta=1.0)
    with torch.no_grad():
        nn.init.eye_(method.regressor.weight[:, :, 0, 0])
        method.regressor.bias.zero_()
    x, y = batches(1)[0]
    next(method.phases(4, batches()))
    raw = F.mse_loss(copy.deepcopy(method.net)[:6](x), teacher().eval()[:5](x))
    torch.testing.assert_close(method(x, y).parts["hint"], raw, rtol=1e-12, atol=0)


def test_the_hint_phase_leaves_the_upper_part_and_the_source_as_they_were() -> None:
    method = build(student(classes=3), pair="2,2", classes=None, kd="probe")
    net = {name: value.clone() for name, value in method.net.state_dict().items()}
    source = {name: value.clone() for name, value in method.source.net.state_dict().items()}
    walk = train(method, 4, batches())
    assert next(walk).name == "hint"
    moved = {name for name, value in method.net.state_dict().items() if not torch.equal(value, net[name])}
    assert {name.split(".")[0] for name in moved} == {"0", "1"}
    assert "1.running_mean" in moved
    assert next(walk).name == "distil"
    for name, value in method.source.net.state_dict().items():
        assert torch.equal(value, source[name]), name
    assert not any(module.training for module in method.source.net.modules())
    assert all(parameter.grad is None for parameter in method.source.net.parameters())


def test_the_hint_phase_runs_nothing_above_its_layers() -> None:
    method = build(pair="2,2")
    next(method.phases(4, batches()))
    called: list[str] = []
    for where, net in (("ours", method.net), ("source", method.source.net)):
        net[3].register_forward_hook(lambda *_, where=where: called.append(where))
    method(*batches(1)[0])
    assert called == []


@pytest.mark.parametrize("classes", [None, 3])
def test_the_logits_of_the_hint_phase_are_the_networks(classes: int | None) -> None:
    method = build(pair="2,2", classes=classes)
    method.norm = "eval"
    next(method.phases(4, batches()))
    x, y = batches(1)[0]
    logits = method(x, y).logits
    assert torch.equal(logits, method.predict(x).detach())
    assert logits.any() == (classes is None)


def test_hints_are_learnt() -> None:
    method = build(pair="2,2", hint_share=0.9)
    x, y = batches(1)[0]
    phase = next(method.phases(40, batches()))
    first, optimizer = method(x, y).total.item(), sgd(phase)
    for x, y in batches() * phase.epochs:
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method(x, y).total.item() < 0.5 * first


def test_a_larger_map_is_averaged_down_whichever_side_it_is_on() -> None:
    x, y = batches(1)[0]
    for pair, sizes in (("2,4", (8, 4)), ("5,2", (4, 8))):
        method = build(pair=pair, mode="joint", regressor="conv1x1")
        guided, hint = (int(name) + 1 for name in pair.split(","))
        net, source = copy.deepcopy(method.net).train(), teacher().eval()
        method.train()
        v, u = net[:guided](x), source[:hint](x)
        assert (v.shape[2], u.shape[2]) == sizes
        small = [F.avg_pool2d(each, each.shape[2] // 4) for each in (v, u)]
        by_hand = 0.5 * F.mse_loss(method.regressor(small[0]), small[1])
        torch.testing.assert_close(method(x, y).parts["hint"], by_hand.detach(), rtol=1e-12, atol=0)


def test_the_source_sees_pictures_normalised_for_itself() -> None:
    ours, its = ([0.5] * 3, [0.25] * 3), ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1])
    viewed = Viewed(teacher(), given=ours, own=its).double()
    x, y = batches(1)[0]
    method = build(source=viewed, pair="5,4", mode="joint", kd="probe", regressor="identity")
    next(method.phases(2, batches()))
    hint = 0.5 * F.mse_loss(copy.deepcopy(method.net)[:6](x), teacher().eval()[:5](viewed.view(x)))
    torch.testing.assert_close(method(x, y).parts["hint"], hint.detach(), rtol=1e-12, atol=0)
    features = teacher().eval()[:-1](viewed.view(x))
    answers = features @ method.memory["head_weight"].T + method.memory["head_bias"]
    torch.testing.assert_close(method._answers(method._to_hint(x)), answers.detach(), rtol=1e-10, atol=1e-12)


def test_staged_and_joint_are_two_methods() -> None:
    x, y = batches(1)[0]
    first = {}
    for mode in ("staged", "joint"):
        method = build(student(classes=3), pair="2,2", mode=mode, classes=None)
        next(method.phases(4, batches()))
        first[mode] = grads(method(x, y).total, method.net)["0.weight"]
    assert (first["staged"] - first["joint"]).norm() > 0.1 * first["staged"].norm()


# ---------------------------------------------------------------------- the answers


def distilling(**given: Any) -> FitNets:
    """In the second phase, with a head that is not zero."""
    method = build(student(classes=3), pair="2,2", **{"classes": None, "kd": "probe"} | given)
    walk = method.phases(4, batches())
    assert [next(walk).name, next(walk).name] == ["hint", "distil"]
    return method


def test_without_lambda_it_is_plain_training_to_the_bit() -> None:
    x, y = batches(1)[0]
    method = distilling(lam=0.0, lam_end=0.0)
    plain = copy.deepcopy(method.net)
    ours = grads(method(x, y).total, method.net)
    theirs = grads(F.cross_entropy(plain(x), y), plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_without_beta_joint_is_plain_training_to_the_bit() -> None:
    x, y = batches(1)[0]
    method = build(mode="joint", beta=0.0, classes=None)
    next(method.phases(2, batches()))
    plain = copy.deepcopy(method.net)
    ours = grads(method(x, y).total, method.net)
    theirs = grads(F.cross_entropy(plain(x), y), plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_factor_of_tau_squared() -> None:
    """d/dlogits of H(p_T^τ, p^τ) is (p^τ − p_T^τ)/τ: twice a large τ is a quarter of the gradient."""
    torch.manual_seed(0)
    method = distilling()
    ours, theirs = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randn(4, 3, dtype=F64)
    sizes = []
    for tau in (3.0, 1000.0, 2000.0):
        method.temperature = tau
        (grad,) = torch.autograd.grad(method._kd_loss(ours, theirs), ours)
        by_hand = ((ours / tau).softmax(1) - (theirs / tau).softmax(1)) / tau / 4
        torch.testing.assert_close(grad, by_hand, rtol=1e-9, atol=1e-16)
        sizes.append(grad.norm().item())
    assert sizes[1] / sizes[2] == pytest.approx(4, rel=1e-2)


def at(method: FitNets, epoch: float) -> float:
    method.memory["seen"] = torch.tensor(round(epoch * int(method.memory["pictures"])))
    return float(method._lambda())


def test_lambda_of_the_released_configuration() -> None:
    """4 up to epoch 5, 1 from epoch 400, a line between: the official code's YAML for CIFAR."""
    method = distilling(decay_from=5.0, decay_until=400.0, decay_in="epochs")
    values = [at(method, epoch) for epoch in range(501)]
    assert all(value == 4 for value in values[:6])
    assert all(value == 1 for value in values[400:])
    assert all(a > b for a, b in itertools.pairwise(values[5:401]))
    assert values[202] == pytest.approx(4 - 3 * 197 / 395, rel=1e-6)


def test_lambda_falls_in_a_short_run_too() -> None:
    """With the loop of the README, which tells the method nothing; 3 of 4 epochs are the second phase."""
    method = build(pair="2,2", kd="probe")
    seen = []
    for phase in method.phases(4, batches()):
        optimizer = sgd(phase)
        for _ in range(phase.epochs):
            for x, y in batches():
                seen.append((phase.name, float(method._lambda())))
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert ("lambda" in method.observe()) == (phase.name == "distil")
    values = [value for name, value in seen if name == "distil"]
    assert len(values) == 9
    expected = [4 - 3 * min(max((i / 9 - 0.01) / 0.79, 0), 1) for i in range(9)]
    assert values == pytest.approx(expected, rel=1e-6)
    assert method.observe() == {"lambda": 1.0}


@pytest.mark.parametrize(
    ("given", "kd"),
    [
        ({}, "probe"),
        ({"classes": None, "source": teacher(classes=3)}, "logits"),
        ({"classes": None, "source": teacher(classes=9)}, "probe"),
        ({"source": teacher(classes=3)}, "probe"),  # as many classes say nothing about which
        ({"source": teacher(classes=3), "kd": "logits"}, "logits"),
        ({"mode": "joint"}, "none"),
        ({"mode": "joint", "kd": "probe"}, "probe"),
        ({"kd": "none"}, "none"),
    ],
)
def test_whose_answers_are_distilled(given: dict[str, Any], kd: str) -> None:
    method = build(student(classes=3), **given)
    assert method.kd == method.diagnostics()["kd"] == kd
    for _ in train(method, 4, batches()):
        pass
    assert ("head_weight" in method.memory) == (kd == "probe")
    assert ("kd" in method(*batches(1)[0]).parts) == (kd != "none")


def test_own_logits_are_the_sources() -> None:
    method = distilling(source=teacher(classes=3), kd="logits")
    x, _ = batches(1)[0]
    torch.testing.assert_close(
        method._answers(method._to_hint(x)), teacher(classes=3).eval()(x).detach(), rtol=1e-12, atol=1e-14
    )


# ---------------------------------------------------------------------- unlike networks

PAIRS = [
    ("test_resnet", "test_vit", "layer3 (192 × 2 × 2)", "blocks.3 (64 × 2 × 2)"),
    ("test_convnext", "test_resnet", "stages.1 (32 × 4 × 4)", "layer2 (48 × 4 × 4)"),
    ("test_vit", "test_convnext", "blocks.3 (64 × 2 × 2)", "stages.2 (48 × 2 × 2)"),
    ("test_vit", "test_vit", "blocks.2 (64 × 2 × 2)", "blocks.2 (64 × 2 × 2)"),
    ("test_resnet", "test_resnet", "layer2 (48 × 4 × 4)", "layer2 (48 × 4 × 4)"),
]


def small(name: str) -> nn.Module:
    return next(make for shown, make in networks().items() if name in shown)()


@pytest.mark.parametrize(("ours", "theirs", "guided", "hint"), PAIRS)
@pytest.mark.parametrize("mode", ["staged", "joint"])
def test_any_network_learns_from_any(ours: str, theirs: str, guided: str, hint: str, mode: str) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)]
    method = FitNets(small(ours), 3, source=small(theirs), example=data[0][0][:1], mode=mode)
    shown = method.diagnostics()
    assert (shown["guided"], shown["hint"]) == (guided, hint)
    assert shown["regressor"] == ("Identity" if guided.split()[1] == hint.split()[1] else "Conv2d")
    names = [phase.name for phase in train(method, 3, data, lr=0.005)]
    assert names == (["hint", "distil"] if mode == "staged" else ["joint"])
    assert all(parameter.isfinite().all() for parameter in method.parameters())
    plain = small(ours)
    plain.reset_classifier(3)
    assert method.export().state_dict().keys() == plain.state_dict().keys()


class FromAnother(FitNets):
    """Learns from a network of another kind, where the contract gives it none.

    Args:
        hint_share: as in FitNets.
    """

    presets: ClassVar[dict[str, Preset]] = {}

    def __init__(
        self, net: nn.Module, classes: int | None = None, *, hint_share: float = 0.3, **given: Any
    ) -> None:
        other = small("test_vit" if "ResNet" in type(net).__name__ else "test_resnet")
        super().__init__(net, classes, hint_share=hint_share, **{**given, "source": other})


# The class below has no docstring of a module, and takes no source but its own.
OF_A_PAIR = [name for name in CHECKS if name not in (*ON_RANKS, "describes_itself", "refuses_another_source")]


def test_contract_with_another_network() -> None:
    """The hint phase too, which there is none of where a network learns from itself."""
    check_method(FromAnother, make_net=make_resnet, hyper={"hint_share": 0.6}, only=OF_A_PAIR)


def test_contract_of_joint() -> None:
    hyper = {"mode": "joint", "regressor": "conv+bn", "kd": "probe"}
    check_method(FitNets, make_net=make_resnet, hyper=hyper, only=OF_A_PAIR)


@pytest.mark.slow
def test_contract_with_another_network_on_ranks() -> None:
    check_method(FromAnother, make_net=make_vit, hyper={"hint_share": 0.6}, only=ON_RANKS)


def make_resnet() -> nn.Module:
    return small("test_resnet")


def make_vit() -> nn.Module:
    return small("test_vit")


def test_copies_learn_alone() -> None:
    method = build(pair="2,2")
    twin = copy.deepcopy(method)
    for _ in train(twin, 2, batches()):
        pass
    assert twin._ours.net is twin.net
    assert all(any(each is mine for mine in twin.net.parameters()) for each in twin._below)
    assert not any(parameter.grad is not None for parameter in method.parameters())
    assert torch.equal(method.net[0].weight, student()[0].weight)


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("epochs", "given", "plan"),
    [
        (10, {}, {"hint": 3, "distil": 7}),
        (1, {}, {"hint": 0, "distil": 1}),
        (2, {"hint_share": 1.0}, {"hint": 1, "distil": 1}),
        (5, {"hint_share": 0.0}, {"hint": 0, "distil": 5}),
        (4, {"mode": "joint"}, {"joint": 4}),
    ],
)
def test_plan(epochs: int, given: dict[str, Any], plan: dict[str, int]) -> None:
    method = build(**given)
    assert {phase.name: phase.epochs for phase in method.plan(epochs)} == plan


def test_who_learns() -> None:
    method = build(pair="2,2", regressor="conv+bn", head_lr=4.0)
    hint, distil = method.plan(10)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    learning = {names[id(each)] for group in hint.groups for each in group.params}
    assert learning == {f"net.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")} | {
        "regressor.0.weight",
        "regressor.1.weight",
        "regressor.1.bias",
    }
    assert {id(each) for group in distil.groups for each in group.params} == set(
        map(id, method.net.parameters())
    )
    rates = {group.name: (group.lr, group.decay) for group in hint.groups}
    assert rates["regressor, kernels"] == (4, 1)
    assert rates["regressor, norms and biases"] == (4, 0)


def test_no_hint_without_another_network() -> None:
    method = FitNets(student(), 3, example=torch.zeros(1, 3, 16, 16))
    assert [(phase.name, phase.epochs) for phase in method.plan(10)] == [("hint", 0), ("distil", 10)]
    assert method.kd == "probe"
    assert method.head_lr == 10  # as for full
    assert build().head_lr == 1


def test_finding_who_learns_changes_nothing() -> None:
    net, before = student(), student().state_dict()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    build(net)
    assert not net[0].weight.requires_grad
    assert not net[1].training
    assert net[4].training
    assert all(torch.equal(value, before[name]) for name, value in net[:-1].state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pair": "2,22"}, "Unknown stage of Sequential '22'"),
        ({"pair": "25,2"}, "Unknown stage of Sequential '25'"),
        ({"pair": "2"}, "must name two stages"),
        ({"kd": "logits"}, "it has 9 classes, the task 3"),
        ({"pair": "2,4", "regressor": "identity"}, "Use conv1x1, or auto"),
        ({"example": None}, "give it an example"),
        ({"example": torch.zeros(1, 5, 16, 16)}, "cannot see pictures of 5 channels"),
    ],
)
def test_refuses(given: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError, match=says):
        FitNets(student(), 3, **{"source": teacher(), "example": torch.zeros(1, 3, 16, 16)} | given)


def test_a_source_of_another_size_is_told() -> None:
    import timm

    other = timm.models.VisionTransformer(64, 16, embed_dim=24, depth=2, num_heads=2)
    with pytest.raises(MethodError, match=r"VisionTransformer cannot see pictures .*32"):
        FitNets(small("test_resnet"), 3, source=other, example=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("hyper", "says"),
    [
        ({}, "fitnets, staged: the source's 2 is the hint for 2, answers of the source's probe"),
        ({"mode": "joint"}, "fitnets, joint: the source's 2 is the hint for 2"),
        ({"kd": "none"}, "fitnets, staged: the source's 2 is the hint for 2"),
    ],
)
def test_says_which_mode_runs(hyper: dict[str, Any], says: str) -> None:
    assert build(**hyper).headline() == says
    alone = FitNets(student(), 3, example=torch.zeros(1, 3, 16, 16), **hyper)
    assert ("no other network as source, so no hint" in alone.headline()) == (alone.mode == "staged")


def test_a_misspelt_stage_gets_its_neighbour() -> None:
    with pytest.raises(MethodError, match="Did you mean 'layer2'"):
        FitNets(small("test_resnet"), 3, example=torch.zeros(1, 3, 32, 32), pair="layr2,layer2")


def test_no_equal_strides_asks_for_a_pair() -> None:
    steep = nn.Sequential(nn.Conv2d(3, 4, 7, 7), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    given = {"source": steep, "example": torch.zeros(1, 3, 28, 28)}
    with pytest.raises(MethodError, match=r"no stage of the same stride.*pair = 'guided,hint'"):
        FitNets(student(), 3, **given)
    assert FitNets(student(), 3, **given, pair="2,0").diagnostics()["hint"] == "0 (4 × 4 × 4)"


def test_says_which_networks_cannot_be_cut() -> None:
    assert FitNets.fits(student().float(), {"img_size": 16}) is None
    reason = FitNets.fits(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), {"img_size": 16})
    assert reason is not None
    assert "cannot be cut" in reason


@pytest.mark.parametrize("preset", list(FitNets.presets))
def test_presets(preset: str) -> None:
    method = build(**registry.configure(FitNets, preset, {}))
    phases = [phase.name for phase in method.plan(10)]
    assert phases == (["joint"] if preset == "repdistiller" else ["hint", "distil"])
    assert {group.lr for phase in method.plan(10) for group in phase.groups} == {1.0}
