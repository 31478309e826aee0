"""Penalties as one operation: the value and gradient of the plain sums, and their own steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts import pull
from headstart.parts.pull import Form, Pull

FORMS: list[Form] = ["squares", "absolute", "groups"]
SHAPES = [(4, 3, 2, 2), (5,), (), (2, 0), (3, 4), (6, 1, 3, 3)]


def tensors(dtype: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    anchors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return weights, anchors, [torch.rand(shape).to(dtype) + 0.1 for shape in SHAPES]


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plain(form: Form, strength: float, weights: Any, anchors: Any = None, roots: Any = None) -> Tensor:
    """The sums as they are written, number by number and group by group."""
    total = torch.zeros((), dtype=torch.float64)
    for i, w in enumerate(weights):
        delta = w.double() - (anchors[i].double() if anchors else 0)
        if roots:
            delta = delta * roots[i].double()
        if form == "squares":
            total = total + strength / 2 * (delta**2).sum()
        elif form == "absolute":
            total = total + strength * delta.abs().sum()
        else:
            for group in delta if delta.ndim > 1 else delta.reshape(-1, 1):
                if group.numel():
                    total = total + strength * group.numel() ** 0.5 * (group**2).sum().sqrt()
    return total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient(form: Form, anchored: bool, weighted: bool) -> None:
    weights, anchors, roots = tensors()
    anchors, roots = anchors if anchored else [], roots if weighted else []
    expected = plain(form, 0.3, weights, anchors, roots)
    ours = Pull(form, 0.3, weights, anchors).term(roots)
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    wanted = torch.autograd.grad(expected, weights, materialize_grads=True)
    for got, want in zip(torch.autograd.grad(ours, weights), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_check(form: Form) -> None:
    weights, anchors, roots = tensors()
    assert torch.autograd.gradcheck(lambda *w: Pull(form, 0.3, list(w), anchors).term(roots), weights)


@pytest.mark.parametrize("form", FORMS)
def test_a_few_tensors_at_a_time_is_all_of_them(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, anchors, roots = tensors()
    whole = Pull(form, 0.3, weights, anchors).term(roots)
    pulls = torch.autograd.grad(whole, weights)
    monkeypatch.setattr(pull, "_AT_ONCE", 7)
    parts = Pull(form, 0.3, weights, anchors).term(roots)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)
    assert all(map(torch.equal, torch.autograd.grad(parts, weights), pulls))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exactly_zero_on_the_anchor(form: Form, weighted: bool, dtype: torch.dtype) -> None:
    weights, _, roots = tensors(dtype)
    total = Pull(form, 0.3, weights, [w.detach().clone() for w in weights]).term(roots if weighted else [])
    assert total.item() == 0
    assert all(not each.any() for each in torch.autograd.grad(total, weights))  # a NaN would be any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e18])
def test_finite_at_any_distance(form: Form, size: float) -> None:
    weights = [nn.Parameter(torch.full(shape, size)) for shape in SHAPES if 0 not in shape]
    anchors = [torch.zeros_like(w) for w in weights]
    total = Pull(form, 5.0, weights, anchors).term([torch.ones_like(w) for w in weights])
    assert all(each.isfinite().all() for each in torch.autograd.grad(total, weights))


def test_golden() -> None:
    """By hand: Δ=[.5,−2]: ½·.1·4.25, .1·2.5; F=[.5,2]: ½·.1·(.125+8); [3,4,0,0]: .1·√4·5; F-group: √2·√4."""
    w, a = nn.Parameter(doubles([[1.5, 0.0]])), doubles([[1.0, 2.0]])
    root = doubles([[0.5, 2.0]]).sqrt()
    for form, roots, value, gradient in (
        ("squares", [], 0.2125, [0.05, -0.2]),
        ("absolute", [], 0.25, [0.1, -0.1]),
        ("squares", [root], 0.40625, [0.025, -0.4]),
    ):
        total = Pull(form, 0.1, [w], [a]).term(roots)  # type: ignore[arg-type]
        assert total.item() == pytest.approx(value, rel=1e-15)
        (got,) = torch.autograd.grad(total, [w])
        torch.testing.assert_close(got, doubles([gradient]), rtol=1e-14, atol=0)
    group = nn.Parameter(doubles([[3.0, 4.0, 0.0, 0.0]]))
    total = Pull("groups", 0.1, [group], [torch.zeros(1, 4).double()]).term()
    assert total.item() == pytest.approx(1.0, rel=1e-15)
    (got,) = torch.autograd.grad(total, [group])
    torch.testing.assert_close(got, doubles([[0.12, 0.16, 0.0, 0.0]]), rtol=1e-14, atol=0)
    group = nn.Parameter(doubles([[2.0, 1.0]]))
    total = Pull("groups", 1.0, [group], [torch.zeros(1, 2).double()]).term([root])
    assert total.item() == pytest.approx(2.828427, abs=5e-7)


def test_groups_of_one_number_are_absolute() -> None:
    weights, anchors, _ = tensors()
    one = [nn.Parameter(w.detach().reshape(-1, 1, 1, 1)) for w in weights]
    groups = Pull("groups", 0.3, one, [a.reshape(-1, 1, 1, 1) for a in anchors]).term()
    torch.testing.assert_close(groups, Pull("absolute", 0.3, weights, anchors).term(), rtol=1e-14, atol=0)


def test_no_weights_or_no_strength_is_zero_and_leaves_no_graph() -> None:
    assert Pull("squares", 0.3, []).term().item() == 0
    weights, anchors, _ = tensors()
    total = Pull("squares", 0.0, weights, anchors).term()
    assert total.item() == 0 and not total.requires_grad
    (total + weights[0].sum()).backward()
    assert torch.equal(weights[0].grad, torch.ones_like(weights[0]))
    assert weights[1].grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_single(form: Form, dtype: torch.dtype) -> None:
    weights, anchors, roots = tensors(dtype)
    total = Pull(form, 0.3, weights, anchors).term(roots)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), plain(form, 0.3, weights, anchors, roots), rtol=1e-6, atol=0)
    total.backward()
    assert all(w.grad is not None and w.grad.dtype == dtype for w in weights)
    if form == "squares":
        pulled = 0.3 * roots[0].float().square() * (weights[0].float() - anchors[0].float())
        torch.testing.assert_close(weights[0].grad, pulled.to(dtype))


def test_mixed_precision_of_weights() -> None:
    weights = [nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    assert Pull("squares", 1.0, weights).term().item() == pytest.approx(3.0)


def test_frozen_weights_count_and_get_no_gradient() -> None:
    weights, anchors, _ = tensors()
    weights[0].requires_grad_(False)
    total = Pull("squares", 0.3, weights, anchors).term()
    torch.testing.assert_close(total, plain("squares", 0.3, weights, anchors), rtol=1e-14, atol=0)
    total.backward()
    assert weights[0].grad is None
    assert weights[1].grad is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("both", [True, False])
def test_channels_last_weights(form: Form, both: bool) -> None:
    weights, anchors, roots = tensors()
    total = Pull(form, 0.3, weights, anchors).term(roots)
    pulls = torch.autograd.grad(total, weights)
    layout = torch.channels_last
    with torch.no_grad():
        for i in (0, 5):
            weights[i].data = weights[i].data.contiguous(memory_format=layout)
            if both:
                anchors[i] = anchors[i].contiguous(memory_format=layout)
    again = Pull(form, 0.3, weights, anchors).term(roots)
    torch.testing.assert_close(again, total, rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(again, weights), pulls, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------- what autograd may do with it


@pytest.mark.parametrize("form", FORMS)
def test_scaled_losses_scale_the_gradient(form: Form) -> None:
    weights, anchors, roots = tensors()
    once = torch.autograd.grad(Pull(form, 0.3, weights, anchors).term(roots), weights)
    scaled = torch.autograd.grad(Pull(form, 0.3, weights, anchors).term(roots) * 1024, weights)
    assert all(torch.equal(a * 1024, b) for a, b in zip(once, scaled, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_that_is_kept_gives_the_same_again(form: Form, scale: float) -> None:
    """Also when the first gradients were changed in place, as accumulating and clipping do."""
    weights, anchors, roots = tensors()
    expected = torch.autograd.grad(Pull(form, 0.3, weights, anchors).term(roots) * scale, weights)
    total = Pull(form, 0.3, weights, anchors).term(roots) * scale
    total.backward(retain_graph=True)
    for each in weights:
        assert each.grad is not None
        each.grad.mul_(100)
    for times in (1, 2):
        for each in weights:
            if times == 1:
                each.grad = None
        total.backward(retain_graph=times == 1)
        for each, want in zip(weights, expected, strict=True):
            torch.testing.assert_close(each.grad, times * want, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_a_kept_graph_sees_that_weights_were_changed() -> None:
    weights, anchors, _ = tensors()
    total = Pull("squares", 0.3, weights, anchors).term()
    total.backward(retain_graph=True)
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_its_gradient_has_no_gradient() -> None:
    weights, anchors, _ = tensors()
    total = Pull("squares", 0.3, weights, anchors).term()
    with pytest.raises(MethodError, match="no second derivative"):
        torch.autograd.grad(total, weights, create_graph=True)


@pytest.mark.parametrize("first", [True, False])
def test_gradients_add_up_over_micro_batches(first: bool) -> None:
    """The penalty's gradient may become .grad itself: the next ones must be added to it, and not to Δ."""
    weights, anchors, _ = tensors()
    other = [torch.randn_like(w) for w in weights]
    (once,) = torch.autograd.grad(Pull("squares", 0.3, weights[:1], anchors[:1]).term(), weights[:1])
    for _ in range(3):
        data = sum((w * o).sum() for w, o in zip(weights, other, strict=True))
        term = Pull("squares", 0.3, weights, anchors).term()
        (term + data if first else data + term).backward()
    torch.testing.assert_close(weights[0].grad, 3 * (once + other[0]), rtol=1e-14, atol=0)


# ---------------------------------------------------------------------- steps of their own


def sgd(weights: list[nn.Parameter], **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": weights[:3]}, {"params": weights[3:], "lr": 0.05}], lr=0.1, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
def test_decay_step(anchored: bool, weighted: bool) -> None:
    """w ← w − ηα F (w − a), with the rate of each weight's group."""
    weights, anchors, roots = tensors()
    before = copy.deepcopy(weights)
    own = Pull("squares", 0.5, weights, anchors if anchored else [])
    own.follow(sgd(weights), roots if weighted else [])
    for i, (w, old, a, r) in enumerate(zip(weights, before, anchors, roots, strict=True)):
        rate = 0.1 if i < 3 else 0.05
        pulled = rate * 0.5 * (r**2 if weighted else 1) * (old - (a if anchored else 0))
        torch.testing.assert_close(w, old - pulled, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("form", ["absolute", "groups"])
def test_proximal_step_minimises(form: Form) -> None:
    """argmin over v of ½‖v − w‖² + t·Ω(v): no other point near it is better, and Ω's kink is reached."""
    weights, anchors, _ = tensors()
    with torch.no_grad():
        weights[4][0] = anchors[4][0] + 1e-3  # near enough to land
    before = [w.detach().clone() for w in weights]
    Pull(form, 0.5, weights, anchors).follow(sgd(weights))
    assert torch.equal(weights[4][0], anchors[4][0])

    def cost(candidates: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, (v, old) in enumerate(zip(candidates, before, strict=True)):
            t = (0.1 if i < 3 else 0.05) * 0.5
            total = total + 0.5 * (v - old).square().sum() + plain(form, t, [v], [anchors[i]])
        return total

    found = [w.detach() for w in weights]
    best = cost(found)
    for seed in range(20):
        torch.manual_seed(seed)
        assert cost([w + 1e-3 * torch.randn_like(w) for w in found]) > best
    assert best < cost(before)


def test_proximal_step_by_hand() -> None:
    w = nn.Parameter(doubles([[3.0, 4.0], [0.03, 0.04], [1.0, 1.0]]))
    a = doubles([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    Pull("groups", 1.0, [w], [a]).follow(torch.optim.SGD([w], lr=0.1))
    kept = 1 - 0.1 * 2**0.5 / 5
    want = doubles([[3 * kept, 4 * kept], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(w.detach(), want, rtol=1e-14, atol=0)
    w = nn.Parameter(doubles([1.5, 0.05, -2.0]))
    Pull("absolute", 1.0, [w], [torch.zeros(3).double()]).follow(torch.optim.SGD([w], lr=0.1))
    torch.testing.assert_close(w.detach(), doubles([1.4, 0.0, -1.9]), rtol=1e-14, atol=0)


def test_steps_of_half_precision_are_computed_in_single() -> None:
    w = nn.Parameter(torch.tensor([[1.0, 300.0]], dtype=torch.bfloat16))
    a = torch.tensor([[0.5, 100.0]], dtype=torch.bfloat16)
    Pull("squares", 1.0, [w], [a]).follow(torch.optim.SGD([w], lr=0.5))
    assert w.dtype == torch.bfloat16
    assert w.detach().float().tolist() == [[0.75, 200.0]]


def test_no_strength_moves_nothing() -> None:
    weights, anchors, _ = tensors()
    before = copy.deepcopy(weights)
    for form in FORMS:
        Pull(form, 0.0, weights, anchors).follow(sgd(weights))
    assert all(map(torch.equal, weights, before))


def test_weights_that_no_group_holds_stay() -> None:
    weights, anchors, _ = tensors()
    before = copy.deepcopy(weights)
    Pull("squares", 0.5, weights, anchors).follow(torch.optim.SGD(weights[:1], lr=0.1))
    assert not torch.equal(weights[0], before[0])
    assert all(map(torch.equal, weights[1:], before[1:]))


def test_rates_that_overshoot_are_refused() -> None:
    weights, anchors, roots = tensors()
    own = Pull("squares", 10.0, weights, anchors)
    with pytest.raises(MethodError, match=r"is 1; from 1 on"):
        own.check(sgd(weights), in_loss=False)
    with pytest.raises(MethodError, match="go past"):
        own.follow(sgd(weights))
    own.check(sgd(weights), in_loss=True)  # 1 < 2
    largest = max(float(root.max()) ** 2 for root in roots if root.numel())
    with pytest.raises(MethodError, match="go past"):
        Pull("squares", 10.0 / largest, weights, anchors).check(sgd(weights), in_loss=False, roots=roots)
    Pull("absolute", 1e6, weights, anchors).check(sgd(weights), in_loss=False)
    own.check(torch.optim.AdamW(weights, lr=10.0), in_loss=True)


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True), (0.99, False)]
)
def test_the_limit_is_where_momentum_diverges(momentum: float, nesterov: bool) -> None:
    """A weight that only the pull moves comes to rest just below the limit, and runs away just above."""
    limit = 2 * (1 + momentum) / (1 + 2 * momentum * nesterov)
    for share, stable in ((0.98, True), (1.02, False)):
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        own = Pull("squares", share * limit, [w])
        optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum, nesterov=nesterov)
        for _ in range(4000):
            own.term().backward()
            optimizer.step()
            optimizer.zero_grad()
            if w.abs() > 1e6:
                break
        assert (w.abs().item() < 1) == stable, (share, w.item())
        if stable:
            own.check(optimizer, in_loss=True)
        else:
            with pytest.raises(MethodError, match="go past"):
                own.check(optimizer, in_loss=True)
