"""L2T-w and L2T-ww against the authors' algorithm, told in the plainest form: one thing after the other."""

from __future__ import annotations

import copy
import json
import re
import warnings
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from headstart.errors import MethodError, TrainingError
from headstart.method import Method, Phase, Preset
from headstart.methods.select.l2t import L2TW, L2TWW, Transfer
from headstart.parts.lookahead import apart as single
from headstart.testing import ON_RANKS, Case, check_method, networks, run_check

PAIRS = [(0, 0), (2, 2), (2, 0), (0, 1)]


class Small(nn.Module):
    """Three stages of strides 2, 4 and 8, and a head that sees the last."""

    def __init__(
        self, widths: tuple[int, int, int], classes: int = 5, drop: float = 0.0, deep: bool = False
    ) -> None:
        super().__init__()
        at = (3, *widths)
        self.stage0, self.stage1, self.stage2 = (
            nn.Sequential(nn.Conv2d(at[i], at[i + 1], 3, 2, 1), nn.BatchNorm2d(at[i + 1]), nn.Softplus())
            for i in range(3)
        )
        self.drop = nn.Sequential(nn.Dropout(drop), Deep()) if deep else nn.Dropout(drop)
        self.fc = nn.Linear(widths[-1], classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        maps = [self.stage0(x)]
        maps.append(self.stage1(maps[-1]))
        maps.append(self.stage2(self.drop(maps[-1])))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.drop(self.stage1(self.stage0(x))))
        return self.fc(x.mean((2, 3)))


def source(seed: int = 5) -> Small:
    torch.manual_seed(seed)
    return Small((4, 6, 5)).double()


def build(cls: type[Transfer] = L2TWW, *, drop: float = 0.0, deep: bool = False, **hyper: Any) -> Transfer:
    torch.manual_seed(0)
    net = Small((3, 4, 5), drop=drop, deep=deep).double()
    example = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    made = cls(net, 3, source=source(), example=example, **({"pairs": "0-0,2-2,2-0,0-1"} | hyper))
    torch.manual_seed(1)
    with torch.no_grad():  # away from the start, where all channels count the same
        for parameter in (*made.choosers.parameters(), *made.head_module.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def batches(n: int = 3, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(size, 3, 16, 16, dtype=torch.float64), torch.arange(size) % 3) for _ in range(n)]


def begin(method: Method, **options: Any) -> tuple[Phase, torch.optim.Optimizer]:
    phase = next(iter(method.phases(1, [])))
    return phase, phase.optimizer(
        torch.optim.SGD, **({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} | options)
    )


def phi(method: Transfer) -> list[nn.Parameter]:
    return list(method.choosers.parameters())


# ---------------------------------------------------------------- the authors' algorithm


class Authors:
    """alinlab/L2T-ww, one iteration after the other: step, look ahead, update φ, roll back.

    Everything is plain tensors in dictionaries; what the virtual steps did to the outcome is found by
    autograd through all of them at once.
    """

    def __init__(
        self, method: Transfer, pairs: list[tuple[int, int]], T: int, nesterov: bool = False
    ) -> None:
        twin = copy.deepcopy(method)
        self.net, self.source, self.pairs, self.T, self.nesterov = (
            twin.net,
            source().eval(),
            pairs,
            T,
            nesterov,
        )
        self.regressors, self.choosers = twin.regressors, twin.choosers
        self.beta, self.lr, self.mu, self.wd = 0.5, 0.1, 0.9, 0.01
        self.theta = {f"net.{k}": v.detach() for k, v in self.net.named_parameters()}
        self.theta |= {f"r.{k}": v.detach() for k, v in self.regressors.named_parameters()}
        self.v = {k: torch.zeros_like(w) for k, w in self.theta.items()}
        self.wd_of = dict.fromkeys(self.theta, self.wd)
        self.adam = torch.optim.Adam(self.choosers.parameters(), lr=1e-4, weight_decay=1e-4)

    def _forward(self, theta: dict[str, Tensor], x: Tensor) -> tuple[list[Tensor], Tensor]:
        class Both(nn.Module):
            def __init__(self, net: Small) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
                maps = self.net.stages(x)
                return maps, self.net.fc(maps[-1].mean((2, 3)))

        given = {k: v for k, v in theta.items() if k.startswith("net.")}
        buffers = {f"net.{k}": v.clone() for k, v in self.net.named_buffers()}
        return functional_call(Both(self.net), given | buffers, (x,))

    def wfm(self, theta: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = self.source.stages(x)
        ours, _ = self._forward(theta, x)
        total = torch.zeros((), dtype=x.dtype)
        for p, (m, n) in enumerate(self.pairs):
            regressed = F.conv2d(ours[n], theta[f"r.{p}.weight"], theta[f"r.{p}.bias"])
            goal = F.interpolate(theirs[m], size=regressed.shape[2:], mode="bilinear", align_corners=False)
            gap = theirs[m].mean((2, 3))
            what, where = self.choosers[p].what, self.choosers[p].where
            for b in range(len(x)):
                w = torch.softmax(what.weight @ gap[b] + what.bias, 0)
                lam = F.relu6(where.weight[0] @ gap[b] + where.bias[0]) if where is not None else 1.0
                for c in range(len(w)):
                    d = ((goal[b, c] - regressed[b, c]) ** 2).mean()
                    total = total + lam * w[c] * d / len(x)
        return self.beta * total

    def org(self, theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self._forward(theta, x)[1], y)

    def sgd(
        self, theta: Any, v: Any, loss: Tensor, graph: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=graph, allow_unused=True)
        after, velocity = {}, {}
        for (k, w), g in zip(theta.items(), found, strict=True):
            g = (torch.zeros_like(w) if g is None else g) + self.wd_of[k] * w
            velocity[k] = self.mu * v[k] + g
            after[k] = w - self.lr * (g + self.mu * velocity[k] if self.nesterov else velocity[k])
        return after, velocity

    def outcome(self, x: Tensor, y: Tensor) -> Tensor:
        """L_org(θ_{T+1}) as a function of φ."""
        theta = {k: w.detach().requires_grad_() for k, w in self.theta.items()}
        v = self.v
        for _ in range(self.T):
            theta, v = self.sgd(theta, v, self.wfm(theta, x), graph=True)
        theta, v = self.sgd(theta, v, self.org(theta, x, y), graph=True)
        return self.org(theta, x, y)

    def iteration(self, x: Tensor, y: Tensor) -> list[Tensor]:
        theta = {k: w.detach().requires_grad_() for k, w in self.theta.items()}
        theta, v = self.sgd(theta, self.v, self.org(theta, x, y) + self.wfm(theta, x), graph=False)
        self.theta = {k: w.detach() for k, w in theta.items()}
        self.v = {k: w.detach() for k, w in v.items()}
        parameters = list(self.choosers.parameters())
        found = torch.autograd.grad(self.outcome(x, y), parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.adam.step()
        return gradients


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    a, b = (torch.cat([each.flatten() for each in side]) for side in (ours, theirs))
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("cls", "T", "hyper", "nesterov"),
    [
        (L2TWW, 0, {}, False),
        (L2TWW, 1, {}, False),
        (L2TWW, 2, {}, False),
        (L2TWW, 2, {"replay": True}, False),
        (L2TWW, 2, {}, True),
        (L2TWW, 5, {}, False),
        (L2TW, 2, {}, False),
    ],
)
def test_agrees_with_the_authors_algorithm(cls: Any, T: int, hyper: Any, nesterov: bool) -> None:
    method = build(cls, T=T, decay="all", **hyper)
    authors = Authors(method, PAIRS, T, nesterov)
    _, optimizer = begin(method, nesterov=nesterov)
    for x, y in batches():
        method(x, y).total.backward()
        ours = [p.grad.clone() for p in phi(method)]
        optimizer.step()
        optimizer.zero_grad()
        theirs = authors.iteration(x, y)
        if T:
            assert apart(ours, theirs) <= 1e-10
            assert max(float(g.abs().max()) for g in theirs) > 1e-8
        else:
            assert not any(g.any() for g in (*ours, *theirs))
        weights = [*method.net.parameters(), *method.regressors.parameters()]
        assert apart([w.detach() for w in weights], list(authors.theta.values())) <= 1e-12
        pairs = zip(phi(method), authors.choosers.parameters(), strict=True)
        assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in pairs)
    assert method.observe()["look_aheads"] == (3 if T else 0)


def test_the_gradient_is_that_of_central_differences() -> None:
    """J(φ), with the virtual steps made anew for every φ, against the gradient that `backward` hands out."""
    method = build(decay="all")
    authors = Authors(method, PAIRS, 2)
    _, optimizer = begin(method)
    data = batches(2)
    method(*data[0]).total.backward()  # so that the second batch meets a velocity
    optimizer.step()
    optimizer.zero_grad()
    authors.iteration(*data[0])
    x, y = data[1]
    with torch.no_grad():
        for p, q in zip(phi(method), authors.choosers.parameters(), strict=True):
            q.copy_(p)
    method(x, y).total.backward()
    theta = {k: w.detach().requires_grad_() for k, w in authors.theta.items()}
    with torch.enable_grad():
        after, authors.v = authors.sgd(
            theta, authors.v, authors.org(theta, x, y) + authors.wfm(theta, x), graph=False
        )
    authors.theta = {k: w.detach() for k, w in after.items()}
    theirs = list(authors.choosers.parameters())
    torch.manual_seed(3)
    along = [torch.randn_like(p) for p in theirs]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(theirs, along, strict=True):
                p.add_(sign * 1e-4 * d)
        values.append(authors.outcome(x, y).item())
        with torch.no_grad():
            for p, d in zip(theirs, along, strict=True):
                p.sub_(sign * 1e-4 * d)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(phi(method), along, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)


# ---------------------------------------------------------------- what must hold


def match_loss(method: Transfer, x: Tensor, y: Tensor) -> Tensor:
    return method(x, y).parts["match"]


def test_choices_lie_where_they_should() -> None:
    method = build()
    x, _ = batches(1)[0]
    _, chosen = method._source_says(10 * x)
    for shares, strength in zip(chosen[::2], chosen[1::2], strict=True):
        assert (shares >= 0).all()
        torch.testing.assert_close(shares.sum(1), torch.ones(len(x), dtype=x.dtype), rtol=1e-12, atol=0)
        assert ((strength >= 0) & (strength <= 6)).all()


def test_at_the_start_all_channels_count_the_same() -> None:
    """So that L2T-w is feature matching, exactly."""
    x, y = batches(1)[0]
    values = []
    for hyper in ({}, {"what": False}):
        torch.manual_seed(0)
        net = Small((3, 4, 5)).double()
        example = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        method = L2TW(net, 3, source=source(), example=example, pairs="all", **hyper)
        values.append(float(match_loss(method, x, y)))
    assert values[0] == pytest.approx(values[1], rel=1e-15)
    plain = torch.zeros((), dtype=torch.float64)
    theirs, ours = method.source.net.stages(x), method.net.stages(x)
    for (m, n), regressor in zip([(1, 1), (1, 2), (2, 1), (2, 2)], method.regressors, strict=True):
        made = regressor(ours[n])
        goal = F.interpolate(theirs[m], size=made.shape[2:], mode="bilinear", align_corners=False)
        plain = plain + 0.5 * F.mse_loss(made, goal)
    assert values[1] == pytest.approx(plain.item(), rel=1e-12)


def test_nothing_is_missing_where_both_are_the_same() -> None:
    net = source()
    example = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    method = L2TWW(copy.deepcopy(net), source=net, example=example, pairs="0-0,1-1,2-2")
    method.eval()
    with torch.no_grad():
        for regressor in method.regressors:
            regressor.weight.copy_(torch.eye(regressor.in_channels)[:, :, None, None])
            regressor.bias.zero_()
    loss = method(*batches(1)[0])
    assert loss.parts["match"] == 0
    found = torch.autograd.grad(loss.total - loss.parts["task"], list(method.regressors.parameters()))
    assert not any(each.any() for each in found)


def test_the_order_of_pairs_and_of_pictures_does_not_matter() -> None:
    one, other = build(), build(pairs="0-1,2-0,2-2,0-0")
    with torch.no_grad():
        for i in range(4):
            other.regressors[3 - i].load_state_dict(one.regressors[i].state_dict())
            other.choosers[3 - i].load_state_dict(one.choosers[i].state_dict())
    x, y = batches(1)[0]
    assert float(match_loss(one, x, y)) == pytest.approx(float(match_loss(other, x, y)), rel=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    _, straight = one._source_says(x)
    _, mixed = one._source_says(x[order])
    assert all(torch.allclose(a[order], b) for a, b in zip(straight, mixed, strict=True))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def learnt_from_louder(factor: float, **hyper: Any) -> tuple[Transfer, list[Tensor]]:
    """What three batches teach where the source's last maps are `factor` times as large."""
    torch.manual_seed(0)
    net, louder = Small((3, 4, 5)).double(), source()
    louder.stage2 = nn.Sequential(*louder.stage2, Times(factor))
    example = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    method = L2TWW(net, 3, source=louder, example=example, pairs="2-2,2-1", meta_lr=0.1, **hyper)
    data = batches()
    phase = next(iter(method.phases(1, data)))
    optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    for x, y in data:
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method, [each.detach().clone() for each in (*method.parameters(),)]


def test_a_source_whose_maps_are_larger_teaches_the_same() -> None:
    _, once = learnt_from_louder(1.0, norm_maps=True)
    _, louder = learnt_from_louder(40.0, norm_maps=True)
    assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-12) for p, q in zip(once, louder, strict=True))
    _, raw = learnt_from_louder(1.0, norm_maps=False)
    _, raw_louder = learnt_from_louder(40.0, norm_maps=False)
    assert not all(torch.allclose(p, q, rtol=1e-2) for p, q in zip(raw, raw_louder, strict=True))


def test_maps_are_divided_by_their_spread_over_the_training_pictures() -> None:
    method, _ = learnt_from_louder(40.0, beta=0.7, norm_maps=True)
    method.eval()
    x, y = batches(1)[0]
    torch.manual_seed(0)
    start = Small((3, 4, 5)).double()  # our own spread is that of before the first step, while learning

    def spread(net: Any, n: int) -> Tensor:
        seen = torch.cat([net.stages(x)[n] for x, _ in batches()])
        return seen.var((0, 2, 3), unbiased=False).mean().sqrt()

    with torch.no_grad():
        theirs = method.source.net.stages(x)[2] / spread(method.source.net, 2)
        ours = [seen / spread(start, n) for n, seen in enumerate(method.net.stages(x))]
        total = torch.zeros((), dtype=x.dtype)
        for n, regressor, choose in zip((2, 1), method.regressors, method.choosers, strict=True):
            made = regressor(ours[n])
            goal = F.interpolate(theirs, size=made.shape[2:], mode="bilinear", align_corners=False)
            shares, strength = choose(theirs.mean((2, 3)))
            total += 0.7 * (strength * (shares * (goal - made).square().mean((2, 3))).sum(1)).mean()
        found = match_loss(method, x, y)
    torch.testing.assert_close(found, total, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("bias", "dead"), [(-100.0, ("what", "where")), (100.0, ("where",))])
def test_a_saturated_strength_has_no_gradient(bias: float, dead: tuple[str, ...]) -> None:
    method = build(meta_decay=0.0)
    with torch.no_grad():
        for chooser in method.choosers:
            chooser.where.bias.fill_(bias)
    begin(method)
    method(*batches(1)[0]).total.backward()
    for kind in ("what", "where"):
        moved = any(p.grad.any() for c in method.choosers for p in getattr(c, kind).parameters())
        assert moved == (kind not in dead)
    shown = method.observe()["pairs"][0]
    assert (shown["at_0"], shown["at_6"]) == ((1, 0) if bias < 0 else (0, 1))


def test_virtual_steps_of_no_length_teach_nothing() -> None:
    """φ gets no gradient from the real step: all there is comes from the steps ahead."""
    method = build()
    begin(method, lr=0.0)
    method(*batches(1)[0]).total.backward()
    assert not any(p.grad.any() for p in phi(method))


@pytest.mark.parametrize("parity", [False, True])
def test_running_statistics_see_what_they_should(parity: bool) -> None:
    """One update per batch; with parity a second one, at the weights after the step."""
    method = build(parity=parity)
    plain = copy.deepcopy(method.net)
    _, optimizer = begin(method)
    (x, y) = batches(1)[0]
    method(x, y).total.backward()
    optimizer.step()
    plain(x)
    if parity:
        plain.load_state_dict(dict(method.net.named_parameters()), strict=False)
        plain(x)
    for (name, ours), theirs in zip(method.net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("hyper", [{"meta_lr": 0.0}, {"beta": 0.0}, {"what": False, "where": False}])
def test_where_nothing_can_be_learnt_nothing_looks_ahead(hyper: dict[str, Any]) -> None:
    where = hyper.pop("where", True)
    method = build(L2TWW if where else L2TW, **hyper)
    before = [p.detach().clone() for p in phi(method)]
    phase, optimizer = begin(method)
    assert [group.name for group in phase.groups if group.rule] == []
    twin = copy.deepcopy(method)
    for x, y in batches():
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert method.observe() == {}
    assert all(torch.equal(p, q) for p, q in zip(phi(method), before, strict=True))

    with torch.no_grad():  # joint training with fixed weights, by hand
        theirs = [twin.source.net.stages(x) for x, _ in batches()]
    weights = [*twin.net.parameters(), *twin.regressors.parameters()]
    kernels, rest = ([p for p in weights if (p.ndim > 1) == kernel] for kernel in (True, False))
    groups = [{"params": kernels, "weight_decay": 0.01}, {"params": rest}]
    own = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for (x, y), maps in zip(batches(), theirs, strict=True):
        ours = twin.net.stages(x)
        loss = F.cross_entropy(twin.net.fc(ours[-1].mean((2, 3))), y)
        for (m, n), regressor, chooser in zip(PAIRS, twin.regressors, twin.choosers, strict=True):
            made = regressor(ours[n])
            goal = F.interpolate(maps[m], size=made.shape[2:], mode="bilinear", align_corners=False)
            w, lam = (each.detach() for each in chooser(maps[m].mean((2, 3))))
            distance = ((goal - made) ** 2).mean((2, 3))
            loss = loss + method.beta * (lam[:, None] * w * distance).sum(1).mean()
        loss.backward()
        own.step()
        own.zero_grad()
    for p, q in zip(method.net.parameters(), twin.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_without_matching_it_is_plain_training() -> None:
    method = build(beta=0.0)
    plain = copy.deepcopy(method.net)
    _, optimizer = begin(method, weight_decay=0.0)
    own = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        own.step()
        own.zero_grad()
    for p, q in zip(method.net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(velocity(optimizer, p), own.state[q]["momentum_buffer"])


def velocity(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor:
    found = next(each.state[weight] for each in single(optimizer) if weight in each.state)
    return found["momentum_buffer"]


def test_steps_ahead_leave_no_trace() -> None:
    """Weights, velocity and statistics after a batch are those of a step without a look ahead, to the bit."""
    looks, blind = build(), build(T=0)
    first, second = (begin(each)[1] for each in (looks, blind))
    (x, y) = batches(1)[0]  # later ones meet another φ
    for method, optimizer in ((looks, first), (blind, second)):
        method(x, y).total.backward()
        optimizer.step()
    assert looks.observe()["look_aheads"] == 1
    for p, q in zip(looks._theta(), blind._theta(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(velocity(first, p), velocity(second, q))
    for a, b in zip(looks.net.buffers(), blind.net.buffers(), strict=True):
        assert torch.equal(a, b)


class Deep(nn.Module):
    """Drops a whole block for some pictures, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) < 0.5
        return x + keep * torch.tanh(x) / 0.5


@pytest.mark.parametrize("deep", [False, True])
def test_replay_sees_the_same_dropout(deep: bool) -> None:
    """And the same blocks, where stochastic depth leaves some out."""
    found = []
    for replay in (False, True):
        method = build(drop=0.5, deep=deep, replay=replay)
        begin(method)
        torch.manual_seed(4)
        method(*batches(1)[0]).total.backward()
        found.append(([p.grad for p in phi(method)], torch.rand(3)))
    assert apart(found[0][0], found[1][0]) <= 1e-12
    assert torch.equal(found[0][1], found[1][1])  # and what is drawn next is the same


def test_only_every_second_batch_teaches() -> None:
    method = build(every=2)
    _, optimizer = begin(method)
    moved = []
    for x, y in batches(4):
        before = [p.detach().clone() for p in phi(method)]
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(p, q) for p, q in zip(phi(method), before, strict=True)))
    assert moved == [True, False, True, False]
    assert method.observe()["look_aheads"] == 2


def test_a_look_ahead_that_overflows_leaves_phi_alone_and_is_counted() -> None:
    method = build()
    _, optimizer = begin(method, lr=1e200)
    before = [p.detach().clone() for p in phi(method)]
    loss = method(*batches(1)[0])
    loss.total.backward()
    assert all(p.grad.isfinite().all() for p in method.net.parameters())
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(phi(method), before, strict=True))
    assert method.observe()["lost"] == 1


def test_a_schedule_does_not_reach_phi() -> None:
    method = build(meta_lr=0.5)
    _, optimizer = begin(method)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3
    before = phi(method)[1].detach().clone()
    method(*batches(1)[0]).total.backward()
    optimizer.step()
    assert (phi(method)[1] - before).abs().max().item() == pytest.approx(0.5, rel=1e-2)  # Adam's first step


def test_a_step_that_was_not_foreseen_is_told_once() -> None:
    method = build()
    _, optimizer = begin(method)
    data = batches()
    method(*data[0]).total.backward()
    optimizer.step()  # as foreseen: no warning
    optimizer.zero_grad()
    method(*data[1]).total.backward()
    nn.utils.clip_grad_norm_(method.net.parameters(), 0.1)
    with pytest.warns(UserWarning, match="looked ahead from another step"):
        optimizer.step()
    method(*data[2]).total.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_outside_a_phase_there_is_no_look_ahead() -> None:
    method = build()
    method(*batches(1)[0]).total.backward()
    assert all(p.grad is None for p in phi(method))
    assert all(p.grad is not None for p in method.regressors.parameters())


def test_what_is_observed_is_plain_and_small() -> None:
    method = build()
    assert method.observe() == {}
    begin(method)
    method(*batches(1)[0]).total.backward()
    shown = method.observe()
    assert json.loads(json.dumps(shown)) == shown
    assert [(each["source"], each["net"]) for each in shown["pairs"]][2] == ("stage2.2", "stage0.2")
    assert all(0 <= each["lambda"] <= 6 and 0 <= each["entropy"] <= 1 for each in shown["pairs"])


# ---------------------------------------------------------------- it learns what it should


class Told(nn.Module):
    """A source with two channels that tell the class and two that are noise, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 4, 8, 8, bias=False)
        self.fc = nn.Linear(4, 2)
        torch.manual_seed(0)
        with torch.no_grad():
            self.stage.weight.zero_()
            self.stage.weight[0, 0], self.stage.weight[1, 1] = 1 / 16, 1 / 16  # the mean of a colour
            self.stage.weight[2:] = torch.randn(2, 3, 8, 8) / 3
            self.stage.weight[2:] -= self.stage.weight[2:].mean((2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(x).mean((2, 3)))


class Narrow(nn.Module):
    """Two channels: too few for all that the source says."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.Tanh())
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage(x).mean((2, 3)))


class Noisy(nn.Module):
    """The same, and a second stage that only passes the noise on."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Told().stage
        self.noise = nn.Conv2d(4, 3, 1, bias=False)
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.noise.weight.copy_(
                torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, -0.7, 0]])[:, :, None, None]
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.noise(self.stage(x)).mean((2, 3)))


def learnt(method: Transfer, batches: int, seed: int) -> list[Tensor]:
    """What it chooses for the last of so many batches, in whose pictures two colours tell the class."""
    phase = next(iter(method.phases(1, [])))
    optimizer = phase.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)
    made = torch.Generator().manual_seed(seed)
    x, y = torch.empty(0), torch.arange(16) % 2
    for _ in range(batches):
        x = torch.randn(16, 3, 16, 16, generator=made)
        x[:, 0] += (2.0 * y - 1)[:, None, None] * 0.3
        x[:, 1] -= (2.0 * y - 1)[:, None, None] * 0.3
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method._source_says(x)[1]


def test_it_finds_the_channels_that_tell_the_class() -> None:
    torch.manual_seed(0)
    method = L2TW(Narrow(), 2, source=Told(), example=torch.zeros(1, 3, 16, 16), pairs="0-0", meta_lr=0.02)
    shares = learnt(method, 60, seed=1)[0].mean(0)
    assert shares[:2].sum().item() > 0.6  # of 0.5 at the start


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_useless_pair_counts_less_and_less(seed: int) -> None:
    torch.manual_seed(seed)
    example = torch.zeros(1, 3, 16, 16)
    method = L2TWW(Narrow(), 2, source=Noisy(), example=example, pairs="0-0,1-0", what=False, meta_lr=0.02)
    _, useful, _, useless = (each.mean().item() for each in learnt(method, 100, seed=1 + seed))
    assert useless < 0.5  # of 1 at the start
    assert useless < useful


# ---------------------------------------------------------------- any two networks


@pytest.mark.parametrize(
    ("learns", "teaches"),
    [("test_resnet", "test_efficientnet"), ("test_resnet", "test_vit"), ("test_vit", "test_resnet")],
)
def test_networks_of_any_kind(learns: str, teaches: str) -> None:
    import timm

    from headstart.parts.viewed import Viewed

    torch.manual_seed(0)
    size = {"img_size": 32}
    net, other = (
        timm.create_model(each, num_classes=7, drop_path_rate=0.3, **(size if "vit" in each else {}))
        for each in (learns, teaches)
    )
    other = Viewed(other, given=([0.5] * 3, [0.5] * 3), own=([0.4] * 3, [0.3] * 3))
    method = L2TWW(net, 3, source=other, example=torch.zeros(1, 3, 32, 32))
    before = copy.deepcopy(method.source.net.state_dict())
    _, optimizer = begin(method, lr=0.01)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    for _ in range(2):
        loss = method(x, y)
        loss.total.backward()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)
        assert any(p.grad.any() for p in phi(method))
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), method.source.net.state_dict().values(), strict=True)
    )
    assert method.observe()["lost"] == 0


class FromAnother(L2TWW):
    """Learns from a network of another kind, where the contract gives it none.

    Args:
        T: as in L2TWW.
    """

    presets: ClassVar[dict[str, Preset]] = {}

    def __init__(self, net: nn.Module, classes: int | None = None, *, T: int = 1, **given: Any) -> None:
        other = "test_vit" if "ResNet" in type(net).__name__ else "test_resnet"
        source = next(make for shown, make in networks().items() if other in shown)()
        super().__init__(net, classes, T=T, **{**given, "source": source})


@pytest.mark.parametrize(
    "check",
    ["resumes_bit_equal", "stays_finite_in_bf16", "copies_are_independent", "source_stays_as_it_was"],
)
def test_contract_with_another_network(check: str) -> None:
    make = next(make for shown, make in networks().items() if "test_resnet" in shown)
    run_check(check, {"resnet": Case(FromAnother, make())})


@pytest.mark.slow
def test_contract_with_another_network_on_ranks() -> None:
    make = next(make for shown, make in networks().items() if "test_vit" in shown)
    check_method(FromAnother, make_net=make, only=ON_RANKS)


def test_the_source_is_seen_once() -> None:
    method = build()
    begin(method)
    calls = []
    method.source.net.stage0[0].register_forward_hook(lambda *_: calls.append(1))
    method(*batches(1)[0]).total.backward()
    assert len(calls) == 1


# ---------------------------------------------------------------- what it refuses


def test_another_optimiser_is_refused_by_name() -> None:
    phase = next(iter(build().phases(1, [])))
    with pytest.raises(MethodError, match=r"not of AdamW. Use --optimizer sgd"):
        phase.optimizer(torch.optim.AdamW, lr=0.1)
    phase = next(iter(build(meta_lr=0.0).phases(1, [])))
    phase.optimizer(torch.optim.AdamW, lr=0.1)  # nothing looks ahead


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"pairs": "3-0"}, "pairs names 3-0, which is not there. The source has 0: stage0"),
        ({"pairs": "some"}, "'some' cannot be read. Allowed: all, one2one, single"),
        ({"pairs": "all", "reach": 0.5}, "No two stages have strides within a factor of 0.5"),
    ],
)
def test_pairs_that_are_not_there(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build(**hyper)


def test_without_an_example_it_cannot_be_built() -> None:
    with pytest.raises(MethodError, match="Give example="):
        L2TWW(Small((3, 4, 5)), 3)


def test_half_precision_with_scaled_losses_is_refused() -> None:
    method = build()
    begin(method)
    with torch.autocast("cpu", torch.float16), pytest.raises(MethodError, match="bf16 or fp32"):
        method(*batches(1)[0])


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["look_ahead", "maps_of", "to_size", "mismatch"])
def test_out_of_memory_names_what_takes_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it happens: in the source, in making maps as large, in the steps ahead."""
    method = build()
    begin(method)

    monkeypatch.setattr(f"headstart.methods.select.l2t.{where}", full)
    with pytest.raises(TrainingError, match=r"4 pairs, looking 2 steps ahead.*replay=true") as caught:
        method(*batches(1)[0])
    assert "torch" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ({"meta_lr": 0.0}, "4 pairs. Set fewer pairs, or use a smaller --batch-size."),
        ({"replay": True}, "4 pairs, looking 2 steps ahead. Set fewer pairs, a smaller T, or use a smaller"),
    ],
)
def test_out_of_memory_advises_what_can_help(
    asked: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(**asked)
    begin(method)

    monkeypatch.setattr("headstart.methods.select.l2t.to_size", full)
    with pytest.raises(TrainingError, match=re.escape(advice)):
        method(*batches(1)[0])


def test_says_which_networks_cannot_be_cut() -> None:
    assert L2TWW.fits(Small((3, 4, 5)), {"img_size": 16}) is None
    gray = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert L2TW.fits(gray, {"img_size": 16}) is None
    reason = L2TW.fits(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), {"img_size": 16})
    assert reason is not None and "cannot be cut" in reason


def test_a_source_of_another_size_is_told() -> None:
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7)
    other = timm.models.VisionTransformer(64, 16, embed_dim=24, depth=2, num_heads=2)
    with pytest.raises(MethodError, match=r"VisionTransformer cannot see pictures .*32"):
        L2TWW(net, 3, source=other, example=torch.zeros(1, 3, 32, 32))


def test_says_what_runs() -> None:
    assert build().headline() == "l2t-ww matches 4 pairs of layers and looks 2 steps ahead"
    assert build(pairs="1-1", meta_lr=0.0).headline() == "l2t-ww matches 1 pair of layers"
