"""Looking ahead along SGD's steps, against a graph through all of them at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.parts.lookahead import Path, apart, averaged, derivative, look_ahead, norm, planted, said_with
from headstart.parts.optimizers import Several

Wide = torch.float64


def problem() -> tuple[list[nn.Parameter], Tensor, Any, Any]:
    """Weights of three shapes; a loss that choices shape and the third weight has no part in; one it has."""
    torch.manual_seed(0)
    shapes = [(3, 4), (4,), (4, 2)]
    weights = [nn.Parameter(torch.randn(shape, dtype=Wide)) for shape in shapes]
    choices = torch.randn(4, dtype=Wide)
    x, goal, y = torch.randn(6, 3, dtype=Wide), torch.randn(6, 4, dtype=Wide), torch.arange(6) % 2

    def match(w: list[Tensor], c: Tensor) -> Tensor:
        return (c.softmax(0) * (torch.tanh(x @ w[0] + w[1]) - goal).square()).sum(1).mean()

    def task(w: list[Tensor]) -> Tensor:
        return F.cross_entropy(torch.tanh(x @ w[0] + w[1]) @ w[2], y)

    return weights, choices, match, task


def optimizer(weights: list[nn.Parameter], nesterov: bool = False) -> torch.optim.SGD:
    """Two groups that differ in all, and velocities that are not zero."""
    groups: list[dict[str, Any]] = [
        {"params": weights[:1], "lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": nesterov},
        {"params": weights[1:], "lr": 0.3, "weight_decay": 0.0, "momentum": 0.5, "nesterov": nesterov},
    ]
    made = torch.optim.SGD(groups, lr=0.1)
    torch.manual_seed(1)
    for weight in weights:
        made.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    return made


def unrolled(made: torch.optim.SGD, weights: list[nn.Parameter], losses: list[Any], last: Any) -> Tensor:
    """J, with a graph through every step."""
    w = [each.detach().requires_grad_() for each in weights]
    v = [made.state[each]["momentum_buffer"] for each in weights]
    of = [group for group in made.param_groups for _ in group["params"]]
    for loss in losses:
        found = torch.autograd.grad(loss(w), w, create_graph=True, allow_unused=True)
        after = []
        for i, (each, g, group) in enumerate(zip(w, found, of, strict=True)):
            g = (0 if g is None else g) + group["weight_decay"] * each
            v = [*v[:i], group["momentum"] * v[i] + g, *v[i + 1 :]]
            after.append(each - group["lr"] * (g + group["momentum"] * v[i] if group["nesterov"] else v[i]))
        w = after
    return last(w)


@pytest.mark.parametrize(("T", "nesterov", "replay"), list(itertools.product((0, 1, 2, 5), (0, 1), (0, 1))))
def test_agrees_with_a_graph_through_all_steps(T: int, nesterov: int, replay: int) -> None:
    weights, choices, match, task = problem()
    made = optimizer(weights, bool(nesterov))
    c = choices.requires_grad_()
    losses = [lambda w: match(w, c)] * T + [task]
    ours = look_ahead(Path([made], weights), losses, task, [c], replay=bool(replay))
    whole = unrolled(made, weights, losses, task)
    torch.testing.assert_close(ours.value, whole.detach(), rtol=1e-13, atol=0)
    if T == 0:
        assert not ours.gradients[0].any()
        return
    (theirs,) = torch.autograd.grad(whole, c)
    torch.testing.assert_close(ours.gradients[0], theirs, rtol=1e-10, atol=1e-15)


def test_the_gradient_is_that_of_central_differences() -> None:
    weights, choices, match, task = problem()
    made = optimizer(weights)

    def outcome(c: Tensor) -> Any:
        c = c.detach().requires_grad_()
        return look_ahead(Path([made], weights), [lambda w: match(w, c)] * 2 + [task], task, [c])

    found = outcome(choices).gradients[0]
    for i in range(4):
        step = torch.zeros(4, dtype=Wide)
        step[i] = 1e-4
        slope = (outcome(choices + step).value - outcome(choices - step).value) / 2e-4
        assert float(slope) == pytest.approx(float(found[i]), rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_the_optimisers_own_to_the_bit(nesterov: bool) -> None:
    """From the very first, for which there is no velocity yet."""
    weights = [nn.Parameter(each.detach().float()) for each in problem()[0]]
    made = optimizer(weights, nesterov)
    made.state.clear()
    path = Path([made], weights)
    torch.manual_seed(2)
    for _ in range(4):
        for each in weights:
            each.grad = torch.randn_like(each)
        path.step([each.grad for each in weights])
        made.step()
        assert all(torch.equal(a, b) for a, b in zip(path.weights, weights, strict=True))


def test_what_a_loss_does_not_reach_goes_on_by_itself() -> None:
    """Zero gradient, not a skipped step: momentum moves the third weight, and the gradient feels it."""
    weights, choices, match, task = problem()
    made = optimizer(weights)
    before = weights[2].detach().clone()
    path, c = Path([made], weights), choices.requires_grad_()
    w = [each.detach().requires_grad_() for each in path.weights]
    path.step(derivative([match(w, c)], w))
    velocity = made.state[weights[2]]["momentum_buffer"]
    torch.testing.assert_close(path.weights[2], before - 0.3 * 0.5 * velocity, rtol=1e-14, atol=0)

    losses = [lambda w: match(w, c)] * 2 + [task]
    moving = look_ahead(Path([made], weights), losses, task, [c]).gradients[0]
    made.state[weights[2]]["momentum_buffer"] = torch.zeros_like(weights[2])
    still = look_ahead(Path([made], weights), losses, task, [c]).gradients[0]
    assert float((moving - still).norm() / moving.norm()) > 1e-2


def test_looking_ahead_changes_nothing() -> None:
    weights, choices, match, task = problem()
    made = optimizer(weights)
    before = [each.detach().clone() for each in weights]
    velocities = [made.state[each]["momentum_buffer"].clone() for each in weights]
    c = choices.requires_grad_()
    look_ahead(Path([made], weights), [lambda w: match(w, c), task], task, [c])
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for each, velocity in zip(weights, velocities, strict=True):
        assert torch.equal(made.state[each]["momentum_buffer"], velocity)
        assert each.grad is None


@pytest.mark.parametrize("replay", [False, True])
def test_random_numbers_are_drawn_once(replay: bool) -> None:
    weights, choices, match, task = problem()
    made = optimizer(weights)
    c = choices.requires_grad_()

    def noisy(w: list[Tensor]) -> Tensor:
        return match([F.dropout(w[0], 0.5), *w[1:]], c)

    torch.manual_seed(3)
    ours = look_ahead(Path([made], weights), [noisy, noisy, task], task, [c], replay=replay)
    after = torch.rand(2)
    torch.manual_seed(3)
    whole = unrolled(made, weights, [noisy, noisy, task], task)
    assert torch.equal(after, torch.rand(2))
    torch.testing.assert_close(ours.gradients[0], torch.autograd.grad(whole, c)[0], rtol=1e-10, atol=1e-15)


def test_attention_can_be_looked_through() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(8, 8))
    c, x = torch.randn(5, requires_grad=True), torch.randn(2, 5, 8)

    def match(v: list[Tensor]) -> Tensor:
        return (c[:, None] * F.scaled_dot_product_attention(x @ v[0], x, x)).square().mean()

    made = torch.optim.SGD([w], lr=1.0)
    found = look_ahead(Path([made], [w]), [match, match], lambda v: v[0].square().sum(), [c])
    assert found.gradients[0].any()


# ---------------------------------------------------------------- what stands around it


def test_a_planted_gradient_is_scaled_like_any_other() -> None:
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    value = (2 * v).sum()
    (3 * planted(value, [w], [torch.tensor([1.0, 2.0, 3.0])])).backward()
    assert w.grad is not None
    assert w.grad.tolist() == [3, 6, 9]
    assert v.grad is not None
    assert v.grad.tolist() == [6, 6]


def test_other_values_leave_a_module_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net[0].bias.requires_grad_(False)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    zeros = [torch.zeros_like(each) for each in net.parameters() if each.requires_grad]
    x = torch.randn(5, 3)
    assert not said_with(zeros, net, x).any()
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    said_with(zeros, net, x, leave_trace=True)
    assert int(net[1].num_batches_tracked) == 1


def test_alone_the_mean_is_oneself() -> None:
    each = [torch.ones(2), torch.zeros(3)]
    assert averaged(each) is each
    assert float(norm([torch.tensor([3.0]), torch.tensor([[4.0]])])) == 5


def test_among_several_the_right_one_is_followed() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    both = Several([torch.optim.SGD([w], lr=0.5), torch.optim.Adam([v])])
    path = Path(apart(both), [w])
    path.step([torch.ones(2)])
    assert path.weights[0].tolist() == [0.5, 0.5]
    with pytest.raises(MethodError, match="not of Adam"):
        Path(apart(both), [v])
    with pytest.raises(MethodError, match="not of no optimiser"):
        Path(apart(both), [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("option", [{"dampening": 0.1}, {"maximize": True}])
def test_options_that_are_not_followed_are_refused(option: dict[str, Any]) -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(MethodError, match="without dampening and maximize"):
        Path([torch.optim.SGD([w], lr=0.1, momentum=0.9, **option)], [w])
