"""The L2-SP family against its formulas in the plainest form, and what must hold whatever the network."""

from __future__ import annotations

import copy
import io
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart import registry, testing
from headstart.errors import MethodError
from headstart.method import Method, Phase
from headstart.methods.baseline.full import Full
from headstart.methods.constrain.l2_sp import L2SP, Variant
from headstart.parts.fisher import Fisher, estimate, save
from headstart.parts.frozen import fingerprint
from headstart.parts.optimizers import Several
from headstart.training.machine import Machine

ALPHA, BETA = 0.1, 0.01
VARIANTS = typing.get_args(Variant)


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 7),
    )


def batches(n: int = 4, size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8, dtype=dtype), torch.arange(size) % 3) for _ in range(n)]


def build(**hyper: Any) -> L2SP:
    """A method, with the Fisher information that its variant needs."""
    method = L2SP(small_net().double(), 3, **({"alpha": ALPHA, "beta": BETA} | hyper))
    if method.variant.endswith("fisher"):
        method._remember(made_up_fisher(method.source.net))
    return method


def made_up_fisher(net: nn.Module) -> Fisher:
    torch.manual_seed(5)
    return Fisher(
        {name: 3 * torch.rand_like(w) for name, w in net.named_parameters()}, fingerprint(net), 8, 1, 0
    )


def perturb(method: Method, by: float = 0.1) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def authors_formula(
    net: nn.Module,
    source: nn.Module,
    head: str,
    alpha: float,
    beta: float,
    kernels_only: bool,
    variant: str = "l2-sp",
    fisher: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The penalties as in holyseven/TransferLearningClassification, modes 0, 1 (101: all), 4, 5, 6, 7.

    tf.nn.l2_loss(t) = sum(t²)/2; each trainable tensor by its name: the variant's penalty on w − w⁰ where the
    checkpoint has it and it is no logits layer, β · l2_loss(w) for the logits. The code's 1e-16 under the
    roots of modes 5 and 7 is left out.
    """
    shared = torch.zeros((), dtype=torch.float64)
    new = torch.zeros((), dtype=torch.float64)
    start = dict(source.named_parameters())
    for name, w in net.named_parameters():
        if kernels_only and w.ndim < 2:
            continue
        if name.startswith(head + "."):
            new = new + beta * (w**2).sum() / 2
            continue
        delta = w if variant == "l2" else w - start[name]
        if fisher is not None:
            delta = delta * fisher[name].sqrt()
        if variant.startswith("l2"):
            shared = shared + alpha * (delta**2).sum() / 2
        elif variant == "l1-sp":
            shared = shared + alpha * delta.abs().sum()
        else:
            for channel in delta:  # all that goes into one output channel
                shared = shared + alpha * channel.numel() ** 0.5 * (channel**2).sum().sqrt()
    return shared, new


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("params", ["kernels", "all"])
def test_agrees_with_the_authors_formula(params: str, variant: str) -> None:
    method = build(params=params, variant=variant, normalise=False, fisher_max=None)
    source = small_net().double()
    perturb(method)
    x, y = batches(1)[0]
    method.train()
    plain = copy.deepcopy(method.net)
    loss = method(x, y)
    loss.total.backward()

    information = made_up_fisher(source).diagonal if variant.endswith("fisher") else None
    shared, new = authors_formula(plain, source, "7", ALPHA, BETA, params == "kernels", variant, information)
    total = F.cross_entropy(plain(x), y) + shared + new
    total.backward()
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["shared"], shared.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["new"], new.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(method.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


class _Golden(nn.Module):
    """One shared weight and a head; the task loss is zero."""

    def __init__(self, start: list[list[float]]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.head = nn.Linear(1, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :1]) * 0 + self.w.sum() * 0


@pytest.mark.parametrize(
    ("variant", "alpha", "start", "now", "information", "shared", "gradient"),
    [
        # .1/2 · (.5² + 2²)
        ("l2-sp", 0.1, [1.0, 2.0], [1.5, 0.0], None, 0.2125, [0.05, -0.2]),
        # .1 · (.5 + 2)
        ("l1-sp", 0.1, [1.0, 2.0], [1.5, 0.0], None, 0.25, [0.1, -0.1]),
        # .1/2 · (.5 · .5² + 2 · 2²)
        ("l2-sp-fisher", 0.1, [1.0, 2.0], [1.5, 0.0], [0.5, 2.0], 0.40625, [0.025, -0.4]),
        # .1 · √4 · 5
        ("gl-sp", 0.1, [0.0] * 4, [3.0, 4.0, 0.0, 0.0], None, 1.0, [0.12, 0.16, 0.0, 0.0]),
        # √2 · √(.5 · 2² + 2 · 1²), and √2 · F Δ / 2
        ("gl-sp-fisher", 1.0, [0.0, 0.0], [2.0, 1.0], [0.5, 2.0], 8**0.5, [0.5**0.5, 2**0.5]),
        # .1/2 · 1.5²
        ("l2", 0.1, [1.0, 2.0], [1.5, 0.0], None, 0.1125, [0.15, 0.0]),
    ],
)
def test_golden(
    variant: str, alpha: float, start: Any, now: Any, information: Any, shared: float, gradient: Any
) -> None:
    """head=[3], β=.01: .01/2 · 3² = .045, gradient .03; L2-SP in all .2575."""
    method = L2SP(
        _Golden([start]), 1, head="head", alpha=alpha, variant=variant, normalise=False, fisher_max=None
    )
    if information is not None:
        method._remember(Fisher({"w": torch.tensor([information], dtype=torch.float64)}, "", 1, 1, 0))
    with torch.no_grad():
        method.net.w.copy_(torch.tensor([now]))
        method.net.head.weight.fill_(3.0)
    loss = method(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    loss.total.backward()
    assert loss.parts["task"].item() == 0  # one class
    assert loss.parts["shared"].item() == pytest.approx(shared, abs=1e-15)
    assert loss.parts["new"].item() == pytest.approx(0.045, abs=1e-15)
    assert loss.total.item() == pytest.approx(shared + 0.045, abs=1e-15)
    wanted = torch.tensor([gradient], dtype=torch.float64)
    torch.testing.assert_close(method.net.w.grad, wanted, rtol=1e-15, atol=0)
    wanted = torch.tensor([[0.03]], dtype=torch.float64)
    torch.testing.assert_close(method.net.head.weight.grad, wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "l2"])
def test_the_pull_is_exactly_zero_at_the_start(variant: str) -> None:
    method = build(params="all", variant=variant)
    with torch.no_grad():
        method.head_module.weight.fill_(0.5)
    loss = method(*batches(1)[0])
    assert loss.parts["shared"].item() == 0
    assert loss.parts["new"].item() == pytest.approx(BETA / 2 * 15 * 0.25)
    pulls = torch.autograd.grad(_shared_term(method), method._shared.weights)
    assert all(not pull.any() for pull in pulls)


def _shared_term(method: L2SP) -> Tensor:
    return method._shared.term(method._roots())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pull_is_above_zero_after_any_change(variant: str) -> None:
    """Guards against an anchor that is the weight itself."""
    for name in dict(small_net().named_parameters()):
        method = build(params="all", variant=variant)
        with torch.no_grad():
            method.net.get_parameter(name).view(-1)[0] += 1e-3
        loss = method(*batches(1)[0])
        part = "new" if name.startswith("7.") else "shared"
        assert loss.parts[part].item() > 0, name


@pytest.mark.parametrize("variant", [each for each in VARIANTS if each != "l2"])
def test_the_gradient_is_exact(variant: str) -> None:
    """α Δ, α F Δ, α sign Δ, α s_g Δ_g/‖Δ_g‖, α s_g F Δ_g/‖F^½ Δ_g‖."""
    method = build(params="all", variant=variant, normalise=False, fisher_max=None)
    perturb(method)
    information = made_up_fisher(method.source.net).diagonal
    term = _shared_term(method)
    for name, w, start, pull in zip(
        method._names,
        method._shared.weights,
        method._start,
        torch.autograd.grad(term, method._shared.weights),
        strict=True,
    ):
        delta = (w - start).detach()
        if variant == "l2-sp":
            assert torch.equal(pull, ALPHA * delta)
        elif variant == "l1-sp":
            assert torch.equal(pull, ALPHA * delta.sign())
        elif variant == "l2-sp-fisher":
            torch.testing.assert_close(pull, ALPHA * information[name] * delta, rtol=1e-14, atol=0)
        else:
            f = information[name] if variant.endswith("fisher") else torch.ones_like(delta)
            rows, f = delta.reshape(len(delta), -1), f.reshape(len(delta), -1)
            norms = (f * rows**2).sum(1, keepdim=True).sqrt()
            wanted = ALPHA * rows.shape[1] ** 0.5 * f * rows / norms
            torch.testing.assert_close(pull, wanted.reshape(pull.shape), rtol=1e-13, atol=0)


def run(
    method: Method, rule: Any, steps: int = 100, after_backward: Any = None, **options: Any
) -> list[Tensor]:
    """Plain momentum steps on the same pictures; the weights at the end."""
    optimizer = rule(list(method.net.parameters()), **options)
    data = batches(4)
    method.norm = "eval"
    method.train()
    for step in range(steps):
        x, y = data[step % 4]
        method(x, y).total.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in method.net.parameters()]


def test_three_forms_make_the_same_hundred_steps() -> None:
    """As one operation, written out in the loss, and added to .grad by hand: the same to rounding."""
    options = {"lr": 0.05, "momentum": 0.9}
    ours = run(build(), torch.optim.SGD, **options)

    class Written(Full):
        def objective(self, x: Tensor, y: Tensor) -> Any:
            shared, new = authors_formula(self.net, small_net().double(), "7", ALPHA, BETA, True)
            return self.loss(self.net(x), y, shared=shared, new=new)

    written = run(Written(small_net().double(), 3), torch.optim.SGD, **options)

    plain = Full(small_net().double(), 3)
    start = dict(small_net().double().named_parameters())

    def pull() -> None:
        for name, w in plain.net.named_parameters():
            if w.ndim >= 2:
                assert w.grad is not None
                w.grad += BETA * w.detach() if name.startswith("7.") else ALPHA * (w - start[name]).detach()

    by_hand = run(plain, torch.optim.SGD, after_backward=pull, **options)
    for a, b, c in zip(ours, written, by_hand, strict=True):
        assert (a - b).abs().max() < 2e-15
        assert (a - c).abs().max() < 2e-15


def test_towards_zero_it_is_weight_decay() -> None:
    """w⁰ = 0 and α = β: L2-SP is L2, which is SGD's own weight decay, momentum included."""
    options = {"lr": 0.05, "momentum": 0.9}
    zero = small_net().double()
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    ours = run(build(source=zero, params="all", beta=ALPHA), torch.optim.SGD, **options)
    plain = Full(small_net().double(), 3)
    theirs = run(plain, torch.optim.SGD, weight_decay=ALPHA, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-15


def test_l2_in_the_loss_is_the_optimisers_weight_decay() -> None:
    options = {"lr": 0.05, "momentum": 0.9}
    ours = run(build(variant="l2", params="all", beta=ALPHA), torch.optim.SGD, **options)
    theirs = run(Full(small_net().double(), 3), torch.optim.SGD, weight_decay=ALPHA, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-15


@pytest.mark.parametrize("variant", ["l2-sp", "gl-sp"])
def test_with_equal_importance_fisher_is_plain(variant: str) -> None:
    plain, weighted = build(variant=variant), build(variant=f"{variant}-fisher")
    ones = {name: torch.full_like(w, 4.0) for name, w in weighted.source.named_parameters()}
    weighted._remember(Fisher(ones, "", 1, 1, 0))  # its mean is scaled to 1
    perturb(plain)
    perturb(weighted)
    assert torch.equal(_shared_term(plain), _shared_term(weighted))
    pulls = [torch.autograd.grad(_shared_term(each), each._shared.weights) for each in (plain, weighted)]
    assert all(map(torch.equal, *pulls))


def test_groups_of_one_weight_are_l1() -> None:
    """p_g = 1: depthwise and pointwise kernels of one channel, and with params="all" every bias."""

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Flatten(), nn.Linear(3, 2)).double()

    terms = []
    for variant in ("gl-sp", "l1-sp"):
        method = L2SP(net(), 2, alpha=ALPHA, variant=variant, params="all")
        perturb(method)
        terms.append(_shared_term(method))
    torch.testing.assert_close(*terms, rtol=1e-14, atol=0)


def test_groups_are_output_channels() -> None:
    """Convolution: in/groups · kh · kw; depthwise: kh · kw; linear: its row. By hand, all Δ = 1."""
    for layer, groups, size in (
        (nn.Conv2d(4, 6, 3), 6, 36),
        (nn.Conv2d(4, 6, 3, groups=2), 6, 18),
        (nn.Conv2d(4, 4, 3, groups=4), 4, 9),
        (nn.Linear(5, 3), 3, 5),
    ):
        net = nn.Sequential(layer, nn.Linear(2, 2)).double()
        method = L2SP(net, 2, alpha=1.0, variant="gl-sp")
        with torch.no_grad():
            method.net[0].weight.add_(1)
        assert _shared_term(method).item() == pytest.approx(groups * size**0.5 * size**0.5, rel=1e-12)


def through_phases(method: Method, steps_of: int = 3, **options: Any) -> dict[str, Tensor]:
    """Train the way everybody does, with the method's own groups."""
    data = batches(2)
    for phase in method.phases(steps_of, data):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.02, momentum=0.9, **options)
        for _ in range(phase.epochs):
            for x, y in data:
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
    return {name: value.clone() for name, value in method.net.state_dict().items()}


STEPS = [
    *[(variant, "coupled") for variant in VARIANTS],
    *[(variant, "decoupled") for variant in ("l2", "l2-sp", "l2-sp-fisher")],
    *[(variant, "proximal") for variant in ("l1-sp", "gl-sp")],
]


@pytest.mark.parametrize(("variant", "step"), STEPS)
def test_without_strength_it_is_plain_fine_tuning_bit_for_bit(variant: str, step: str) -> None:
    ours = through_phases(build(alpha=0.0, beta=0.0, variant=variant, step=step), weight_decay=0.1)
    plain = through_phases(Full(small_net().double(), 3), weight_decay=0.0)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_the_optimiser_decays_nothing() -> None:
    """The penalties take the place of weight decay, whatever the run's decay is."""
    for phase in build().phases(1, batches(1)):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, weight_decay=0.3)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    decayed, plain = through_phases(build(), weight_decay=0.5), through_phases(build(), weight_decay=0.0)
    assert all(torch.equal(decayed[name], plain[name]) for name in plain)


class _Quadratic(nn.Module):
    """J(w) = ½ Σ H (w − 1)²; the head is there only to be a head."""

    H = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 4, dtype=torch.float64))
        self.head = nn.Linear(1, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.H * (self.w - 1) ** 2).sum() + 0 * self.head(x)


class _AsItIs(nn.Module):
    def forward(self, logits: Tensor, _: Tensor) -> Tensor:
        return logits.mean()


def _minimise(alpha: float, variant: str = "l2-sp", information: Tensor | None = None) -> Tensor:
    method = L2SP(_Quadratic(), 1, head="head", alpha=alpha, beta=0.0, variant=variant, normalise=False)
    if information is not None:
        method._remember(Fisher({"w": information[None]}, "", 1, 1, 0))

    method.criterion = _AsItIs()
    optimizer = torch.optim.LBFGS(
        [method.net.w],
        max_iter=200,
        tolerance_grad=1e-14,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)

    def closure() -> Any:
        optimizer.zero_grad()
        total = method(x, y).total
        total.backward()
        return total

    optimizer.step(closure)
    return method.net.w.detach()[0]


def test_minimiser_of_a_quadratic() -> None:
    """(H + αI)⁻¹ (H w* + α w⁰) with H = diag(.01, .1, 1, 10), α = .1, w* = 1, w⁰ = 0."""
    found = _minimise(0.1)
    closed = _Quadratic.H / (_Quadratic.H + 0.1)
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        found, torch.tensor([0.0909, 0.5, 0.9091, 0.9901], dtype=torch.float64), rtol=0, atol=5e-5
    )


def test_minimiser_of_a_quadratic_under_fisher() -> None:
    """H w* / (H + α F) for w⁰ = 0: where F is 0 the pull is not there."""
    information = torch.tensor([0.0, 1.0, 2.0, 50.0], dtype=torch.float64)
    found = _minimise(0.1, "l2-sp-fisher", information)
    torch.testing.assert_close(found, _Quadratic.H / (_Quadratic.H + 0.1 * information), rtol=0, atol=1e-7)


def _descend(alpha: float, variant: str, step: str, steps: int) -> Tensor:
    """Plain gradient descent on the quadratic, through the phase's own optimiser."""
    method = L2SP(_Quadratic(), 1, head="head", alpha=alpha, beta=0.0, variant=variant, step=step)
    if variant.endswith("fisher"):
        spread = torch.tensor([[0.5, 1.5, 0.8, 1.2]], dtype=torch.float64)
        method._remember(Fisher({"w": spread}, "", 1, 1, 0))
    method.criterion = _AsItIs()
    *_, phase = method.plan(1)
    optimizer = phase.optimizer(torch.optim.SGD, lr=0.1)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for _ in range(steps):
        method(x, y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return method.net.w.detach()[0]


@pytest.mark.parametrize(("variant", "step"), STEPS)
def test_a_stronger_pull_stays_closer(variant: str, step: str) -> None:
    """On the quadratic, which starts at w⁰ = 0."""
    distances = [_descend(alpha, variant, step, 200).norm().item() for alpha in (0.0, 0.01, 0.1, 0.5)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.1 * distances[-1]


def test_proximal_descent_finds_the_sparse_minimiser() -> None:
    """argmin ½ H (w − 1)² + α |w| = max(0, 1 − α/H): what is worth less than α stays exactly where it was."""
    found = _descend(0.1, "l1-sp", "proximal", 1500)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.9, 0.99], dtype=torch.float64))
    assert (found[:2] == 0).all()
    chattering = _descend(0.1, "l1-sp", "coupled", 1500)
    torch.testing.assert_close(chattering, found, rtol=0, atol=0.1 * 0.1)  # by rate × α
    assert not torch.equal(chattering[:2], found[:2])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_penalty_knows_nothing_of_pictures_or_mode(variant: str) -> None:
    method = build(variant=variant)
    perturb(method)
    (a, y), (b, _) = batches(2)
    method.train()
    in_training = method(a, y).parts
    method.eval()
    in_eval = method(b, y.flip(0)).parts
    assert in_training["shared"] == in_eval["shared"]
    assert in_training["new"] == in_eval["new"]
    assert in_training["task"] != in_eval["task"]


@pytest.mark.parametrize(
    ("params", "shared", "new"),
    [
        ("kernels", 4 * 3 * 9 + 4 * 5, 5 * 3),  # two kernels, and the head's
        ("all", 4 * 3 * 9 + 4 + 4 + 4 + 4 * 5 + 5, 5 * 3 + 3),  # biases, BatchNorm scales and shifts too
    ],
)
def test_membership(params: str, shared: int, new: int) -> None:
    method = build(params=params)
    total = sum(parameter.numel() for parameter in method.net.parameters())
    assert method.membership() == {"shared": shared, "new": new, "free": total - shared - new}


def test_learned_tokens_are_no_kernels() -> None:
    import timm

    net = timm.create_model("test_vit", pretrained=False, num_classes=7, img_size=32)
    tokens = net.pos_embed.numel() + net.cls_token.numel()
    before = {name: p.numel() for name, p in net.named_parameters() if p.ndim >= 2 and "head" not in name}
    assert L2SP(net, 3).membership()["shared"] == sum(before.values()) - tokens


def test_a_head_that_is_kept_is_shared() -> None:
    kept = L2SP(small_net(), None)
    assert kept.membership()["new"] == 0
    replaced = L2SP(small_net(), 7)  # as many classes as the source had, and still a new head
    assert replaced.membership()["new"] == 5 * 7


class _Tied(nn.Module):
    """The head is the body's own weight: replacing it leaves one of its names."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        body, head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        for name in ("head", "body") if head_first else ("body", "head"):
            self.add_module(name, {"head": head, "body": body}[name])
        head.weight = body.weight
        self.also = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.also.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.also(self.body(x.flatten(1)[:, :4]))))


@pytest.mark.parametrize("head_first", [True, False])
def test_tied_weights_count_once(head_first: bool) -> None:
    method = L2SP(_Tied(head_first), 3, head="head")
    assert method.membership() == {"shared": 16 + 16, "new": 12, "free": 0}


def test_weights_without_a_counterpart_decay_and_say_so() -> None:
    source = nn.Sequential(nn.Conv2d(1, 4, 3), *list(small_net())[1:])
    with pytest.warns(UserWarning, match=r"the source has no weight of this name and shape.*: 0\.weight"):
        method = L2SP(small_net(), 3, source=source)
    assert method.membership()["new"] == 4 * 3 * 9 + 5 * 3


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(MethodError, match="no weight that the network shares"):
        L2SP(nn.Sequential(nn.Flatten(), nn.Linear(4, 7)), 3)


def test_anchors_are_not_taken_again_on_resume() -> None:
    method = build()
    through_phases(method)
    before = method(*batches(1)[0]).parts["shared"]
    assert before > 0
    again = build()
    again.load_state_dict(method.state_dict())
    assert again(*batches(1)[0]).parts["shared"] == before
    twice = build()
    twice.load_state_dict(again.state_dict())
    assert twice(*batches(1)[0]).parts["shared"] == before


def test_a_trained_network_is_no_source() -> None:
    """Resuming from the trained weights would anchor there, so it is refused."""
    method = build()
    trained = copy.deepcopy(method.net)
    perturb(method)
    with pytest.raises(MethodError, match="other source weights"):
        L2SP(trained, 3, alpha=ALPHA, beta=BETA).load_state_dict(method.state_dict())


def test_the_network_alone_looks_as_without_the_method() -> None:
    method = build()
    assert list(method.net.state_dict()) == list(small_net().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_keeps_the_anchor(dtype: torch.dtype) -> None:
    method = build().to(dtype)
    assert _shared_term(method).item() == 0
    with torch.no_grad():
        method.net[0].weight.add_(0.5)
    moved = (method.net[0].weight.float() - method.source.net[0].weight.float()).square().sum()
    assert _shared_term(method).item() == pytest.approx(0.5 * ALPHA * moved.item(), rel=1e-5)
    assert _shared_term(method).dtype == torch.float32


def test_half_precision_is_subtracted_in_single() -> None:
    """400 squares of 100 are more than float16 can hold."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 100), nn.Linear(100, 7)).to(torch.float16)
    method = L2SP(net, 3, alpha=1.0, beta=0.0)
    with torch.no_grad():
        method.net[1].weight.add_(100.0)
    expected = (method.net[1].weight.double() - method.source.net[1].weight.double()).square().sum() / 2
    assert expected > 65504  # float16 ends here
    assert _shared_term(method).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_deep_copy_is_anchored_where_the_original_was() -> None:
    method = build()
    perturb(method)
    twin = copy.deepcopy(method)
    assert torch.equal(_shared_term(twin), _shared_term(method))
    mine = {parameter.data_ptr() for parameter in method.parameters()}
    assert all(w.data_ptr() not in mine for w in (*twin._shared.weights, *twin._new.weights))
    theirs = {parameter.data_ptr() for parameter in twin.source.net.parameters()}
    assert all(start.data_ptr() in theirs for start in (*twin._start, *twin._shared.anchors))
    with torch.no_grad():
        twin.net[0].weight.copy_(twin.source.net[0].weight)
    assert _shared_term(twin) < _shared_term(method)


def test_prefixes_of_wrappers_change_nothing() -> None:
    """DDP and compile put a prefix before names; anchors hold tensors, not names."""
    method = build()
    perturb(method)
    before = _shared_term(method)
    wrapped = nn.Sequential()
    wrapped.add_module("module", method)
    wrapped.load_state_dict({f"module.{name}": value for name, value in method.state_dict().items()})
    assert torch.equal(_shared_term(method), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_make_one_step(variant: str) -> None:
    """n micro-batches, each with loss / n: the penalty counts once, as for one batch."""
    x, y = batches(1, size=12)[0]
    whole, split = build(variant=variant), build(variant=variant)
    for method in (whole, split):
        perturb(method)
        method.norm = "eval"
        method.train()
    whole(x, y).total.backward()
    for part, labels in zip(x.chunk(3), y.chunk(3), strict=True):
        (split(part, labels).total / 3).backward()
    for a, b in zip(whole.net.parameters(), split.net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


def test_loss_scaling_goes_through() -> None:
    method = build()
    perturb(method)
    term = _shared_term(method)
    scaled = torch.autograd.grad(term * 1024, method._shared.weights)
    plain = torch.autograd.grad(_shared_term(method), method._shared.weights)
    assert all(torch.equal(a, b * 1024) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize(
    ("preset", "hyper", "recipe"),
    [
        (
            "paper",
            {
                "alpha": 0.01,
                "beta": 0.01,
                "params": "kernels",
                "normalise": False,
                "fisher_max": None,
                "body_lr": 1.0,
                "head_lr": 1.0,
            },
            {
                "optimizer": "sgd",
                "lr": 0.01,
                "momentum": 0.9,
                "nesterov": False,
                "schedule": "step",
                "batch_size": 64,
            },
        ),
        (
            "tllib",
            {"alpha": 0.01, "beta": 0.01, "params": "all", "body_lr": 0.1, "head_lr": 1.0},
            {
                "optimizer": "sgd",
                "lr": 0.01,
                "momentum": 0.9,
                "nesterov": True,
                "schedule": "step",
                "batch_size": 48,
            },
        ),
    ],
)
def test_presets(preset: str, hyper: dict[str, Any], recipe: dict[str, Any]) -> None:
    configured = registry.configure(L2SP, preset, {})
    defaults = {name: parameter.default for name, parameter in L2SP.hyper().items()}
    assert configured == defaults | hyper
    assert configured["variant"] == "l2-sp" and configured["step"] == "coupled"
    assert recipe.items() <= dict(L2SP.presets[preset].recipe).items()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = L2SP(small_net(), 3, **hyper)
    rates = {group.name.split(",")[0]: group.lr for group in method.plan(1)[0].groups}
    assert rates == {"body": hyper["body_lr"], "head": hyper["head_lr"]}


# ---------------------------------------------------------------------- steps of their own


def plain_step(variant: str, rate: float, w: Tensor, start: Tensor, f: Tensor | None) -> Tensor:
    """The step of a penalty alone, written out."""
    delta = w - start
    if variant == "l2":
        return w - rate * ALPHA * w
    if variant.startswith("l2"):
        return w - rate * ALPHA * (1 if f is None else f) * delta
    if variant == "l1-sp":
        return start + delta.sign() * (delta.abs() - rate * ALPHA).clamp(min=0)
    rows = delta.reshape(len(delta), -1)
    shrunk = (1 - rate * ALPHA * rows.shape[1] ** 0.5 / rows.norm(dim=1, keepdim=True)).clamp(min=0)
    return start + (rows * shrunk.nan_to_num()).reshape(delta.shape)


OWN_STEPS = [each for each in STEPS if each[1] != "coupled"]


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("variant", "step"), OWN_STEPS)
def test_own_steps_follow_the_optimisers(variant: str, step: str, rule: Any) -> None:
    """The same training written out: the task's step, then that of the penalties at each group's rate."""
    method = build(variant=variant, step=step, normalise=False, fisher_max=None, body_lr=0.5, head_lr=4.0)
    method.norm = "eval"
    plain = Full(small_net().double(), 3)
    plain.norm = "eval"
    start = dict(small_net().double().named_parameters())
    information = made_up_fisher(method.source.net).diagonal if variant.endswith("fisher") else {}
    named = dict(plain.net.named_parameters())
    head = [w for name, w in named.items() if name.startswith("7.")]
    body = [w for name, w in named.items() if not name.startswith("7.")]
    theirs = rule([{"params": body, "lr": 0.02}, {"params": head, "lr": 0.16}], weight_decay=0.0)
    plain.train()
    data = batches(4)
    *_, phase = method.plan(3)
    method.train()
    ours = phase.optimizer(rule, lr=0.04, weight_decay=0.3)
    for turn, (x, y) in enumerate(data):
        rate = 0.5**turn  # each step is taken with the rate it has then
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] *= rate
        for each, optimizer in ((method, ours), (plain, theirs)):
            loss = each(x, y)
            assert list(loss.parts) == ["task"]
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, w in named.items():
                if name.startswith("7.") and w.ndim >= 2:
                    w -= theirs.param_groups[1]["lr"] * BETA * w
                elif w.ndim >= 2:
                    w.copy_(
                        plain_step(
                            variant, theirs.param_groups[0]["lr"], w, start[name], information.get(name)
                        )
                    )
        for w, mine in zip(plain.net.parameters(), method.net.parameters(), strict=True):
            torch.testing.assert_close(mine, w, rtol=1e-11, atol=1e-13)


def test_decoupled_and_coupled_are_the_same_without_momentum() -> None:
    """For plain SGD the order of the two steps is all that differs: by rate² · α."""
    options = {"beta": 0.0, "head_lr": 1.0}
    results = []
    for step in ("coupled", "decoupled"):
        method = build(step=step, **options)
        method.norm = "eval"
        method.train()
        *_, phase = method.plan(1)
        optimizer = phase.optimizer(torch.optim.SGD, lr=1e-4)
        for x, y in batches(4):
            method(x, y).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(method.net[5].weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-8)
    assert not torch.equal(*results)


def test_proximal_steps_leave_weights_exactly_where_they_started() -> None:
    for variant in ("l1-sp", "gl-sp"):
        method = build(variant=variant, step="proximal", alpha=1.0)
        through_phases(method, 5)
        at_start = [(w == a).all().item() for w, a in zip(method._shared.weights, method._start, strict=True)]
        assert any(at_start)


def test_own_steps_reach_through_accelerate_and_several_optimisers() -> None:
    method = build(step="decoupled")
    *_, phase = method.plan(1)
    body, head = phase.groups[:2], phase.groups[2:]
    with_own = [each._replace(rule=lambda groups: torch.optim.SGD(groups, lr=0.5)) for each in head]
    mixed = Phase("mixed", 1, [*body, *with_own], method.objective, bind=phase.bind)
    optimizer = mixed.optimizer(torch.optim.AdamW, lr=0.1)
    assert isinstance(optimizer, Several)
    wrapped = Machine("cpu").accelerator.prepare_optimizer(optimizer, device_placement=False)
    with torch.no_grad():
        method.net[0].weight.copy_(method.source.net[0].weight + 1)
        method.head_module.weight.fill_(2.0)
    wrapped.step()  # without a gradient only the penalties move anything
    moved = method.net[0].weight - method.source.net[0].weight
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.1 * ALPHA), rtol=1e-12, atol=0)
    wanted = torch.full((3, 5), 2.0 * (1 - 0.5 * BETA), dtype=torch.float64)
    torch.testing.assert_close(method.head_module.weight.detach(), wanted, rtol=1e-12, atol=0)


def test_an_optimisers_state_that_was_loaded_keeps_the_rates() -> None:
    """Loading replaces the groups of an optimiser by new ones."""
    method = build(step="decoupled")
    *_, phase = method.plan(1)
    optimizer = phase.optimizer(torch.optim.SGD, lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["lr"] *= 3
    optimizer.load_state_dict(state)
    with torch.no_grad():
        method.net[0].weight.add_(1)
    optimizer.step()
    moved = method.net[0].weight - method.source.net[0].weight
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.3 * ALPHA), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("hyper", "rule"),
    [
        ({"step": "decoupled", "alpha": 1.0, "body_lr": 10.0}, torch.optim.AdamW),
        ({"step": "decoupled", "beta": 1.0}, torch.optim.AdamW),
        ({"alpha": 20.0}, torch.optim.SGD),
        ({"variant": "l2-sp-fisher", "fisher_max": None, "normalise": False, "spread": 1e4}, torch.optim.SGD),
    ],
)
def test_rates_that_overshoot_are_refused_before_training(hyper: dict[str, Any], rule: Any) -> None:
    hyper = dict(hyper)
    spread = hyper.pop("spread", None)
    method = build(**hyper)
    if spread is not None:
        wide = {name: torch.ones_like(w) for name, w in method.source.named_parameters()}
        wide["0.weight"].view(-1)[0] = spread
        method._remember(Fisher(wide, "", 1, 1, 0))
    *_, phase = method.plan(1)
    with pytest.raises(MethodError, match=r"The pull of one step, rate × strength, is \d.*Lower") as raised:
        phase.optimizer(rule, lr=0.1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("hyper", "said"),
    [
        ({"variant": "l1-sp", "step": "decoupled"}, "'l1-sp' has no decoupled step. These have: l2, l2-sp"),
        ({"variant": "l2-sp", "step": "proximal"}, "'l2-sp' has no proximal step. These have: l1-sp, gl-sp"),
        ({"variant": "gl-sp-fisher", "step": "proximal"}, "has no proximal step"),
        ({"variant": "l2-sp", "fisher": "x"}, "'l2-sp' uses no Fisher information; leave out fisher"),
        ({"variant": "l2-sp-fisher", "fisher": "/no/such"}, "There is no Fisher file '/no/such'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(hyper: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said) as raised:
        L2SP(small_net(), 3, **hyper)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------- Fisher information


def test_fisher_is_estimated_before_training() -> None:
    """From the pictures without augmentation, through the source's own head, once."""
    method = L2SP(small_net().double(), 3, variant="l2-sp-fisher", normalise=False, fisher_max=None)
    augmented, plain = batches(2, seed=1), batches(2, seed=2)
    torch.manual_seed(17)
    for phase in method.phases(1, augmented, plain=plain):
        assert phase.name == "fine-tune"
    expected = estimate(small_net().double(), plain, seed=17).diagonal
    for name, root in zip(method._names, method._roots(), strict=True):
        torch.testing.assert_close(root.square(), expected[name], rtol=1e-12, atol=0)
    shown = method.diagnostics()["fisher"]
    assert shown["pictures"] == 12 and shown["samples"] == 1 and shown["seed"] == 17
    assert shown["source"] == method.source.fingerprint


def test_estimating_disturbs_nobodys_random_numbers() -> None:
    method = L2SP(small_net().double(), 3, variant="gl-sp-fisher")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(method.phases(1, batches(1)))
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interrupted_run_does_not_estimate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    method = L2SP(small_net().double(), 3, variant="l2-sp-fisher")
    data = batches(2)
    for _ in method.phases(2, data):
        method.finished_epoch()
        break
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    buffer.seek(0)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("estimated again")

    monkeypatch.setattr("headstart.methods.constrain.l2_sp.estimate", never)
    again = L2SP(small_net().double(), 3, variant="l2-sp-fisher")
    again.load_state_dict(torch.load(buffer, weights_only=True))
    (phase,) = again.phases(2, data)
    assert (phase.name, phase.done) == ("fine-tune", 1)
    assert all(map(torch.equal, again._roots(), method._roots()))
    assert again.diagnostics() == method.diagnostics()


def test_without_phases_fisher_is_missed_as_soon_as_it_matters() -> None:
    method = L2SP(small_net().double(), 3, variant="l2-sp-fisher")
    assert method(*batches(1)[0]).parts["shared"] == 0
    perturb(method)
    with pytest.raises(MethodError, match=r"not estimated yet. Train through phases\(\)"):
        method(*batches(1)[0])


def test_fisher_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save(made_up_fisher(small_net()), path)
    hyper = {"variant": "gl-sp-fisher", "fisher": str(path), "normalise": False, "fisher_max": None}
    method = L2SP(small_net(), 3, **hyper)
    assert [phase.name for phase in method.plan(3)] == ["fine-tune"]  # nothing to estimate
    expected = made_up_fisher(small_net()).diagonal
    for name, root in zip(method._names, method._roots(), strict=True):
        torch.testing.assert_close(root.square(), expected[name])
    assert method.diagnostics()["fisher"]["pictures"] == 8
    again = L2SP(small_net(), 3, **hyper)
    again.load_state_dict(method.state_dict())
    assert all(map(torch.equal, again._roots(), method._roots()))
    other = small_net(seed=1)
    with pytest.raises(MethodError, match="was made from another checkpoint"):
        L2SP(other, 3, variant="l2-sp-fisher", fisher=str(path))


def test_fisher_is_scaled_cut_and_raised() -> None:
    """Over its mean; then from above; then plus ε: what is left of the largest and of a zero."""
    method = build(variant="l2-sp-fisher", fisher_max=2.0, fisher_eps=0.5)
    values = {name: torch.ones_like(w) for name, w in method.source.named_parameters()}
    values["0.weight"].view(-1)[0], values["0.weight"].view(-1)[1] = 1000.0, 0.0
    method._remember(Fisher(values, "", 1, 1, 0))
    mean = (1000 + 0 + 126) / 128
    found = method._roots()[0].square().view(-1)
    expected = torch.tensor([2.5, 0.5, 1 / mean + 0.5], dtype=torch.float64)
    torch.testing.assert_close(found[:3], expected, rtol=1e-12, atol=0)


def test_a_head_that_is_kept_has_its_own_fisher_information() -> None:
    method = L2SP(small_net(), None, variant="l2-sp-fisher")
    list(method.phases(1, batches(1, dtype=torch.float32)))
    assert method._names[-1] == "7.weight" and method._roots()[-1].any()


def test_fisher_of_tied_weights() -> None:
    method = L2SP(_Tied(False), 3, head="head", variant="l2-sp-fisher")
    list(method.phases(1, batches(1, dtype=torch.float32)))
    assert len(method._roots()) == 2


def test_fisher_of_a_network_of_its_own_size_of_pictures_lies_as_the_weights_do() -> None:
    method = L2SP(small_net(), 3, variant="l2-sp-fisher").to(memory_format=torch.channels_last)
    list(method.phases(1, batches(1, dtype=torch.float32)))
    assert method._roots()[0].stride() == method._start[0].stride() == method.net[0].weight.stride()


# ---------------------------------------------------------------------- what it shows


def test_observe_tells_the_distance_by_layer() -> None:
    method = build()
    assert method.observe()["distance"]["total"] == 0
    with torch.no_grad():
        method.net[0].weight.view(-1)[0] += 3
        method.net[1].bias[0] += 4  # not pulled, and shown all the same
        method.head_module.weight.add_(100)  # the source has no such weight
    shown = method.observe()["distance"]
    assert shown["total"] == pytest.approx(5)
    assert shown["layers"] == {"0": pytest.approx(3), "1": pytest.approx(4), "5": 0}
    start = [w for name, w in method.source.named_parameters() if not name.startswith("7")]
    size = sum(w.double().square().sum() for w in start).sqrt().item()
    assert shown["relative"] == pytest.approx(5 / size, rel=1e-5)


def test_diagnostics() -> None:
    assert build().diagnostics() == {"membership": build().membership()}


# ---------------------------------------------------------------------- the contract, for every member

HYPERS = [
    *[{"variant": each} for each in VARIANTS if each != "l2-sp"],
    {"variant": "gl-sp", "params": "all"},
    # Weak, or the proximal steps let nothing go.
    *[{"variant": variant, "step": step, "alpha": 1e-4} for variant, step in OWN_STEPS],
]
MECHANICS = [
    {"variant": "gl-sp-fisher"},
    {"variant": "l2-sp-fisher", "step": "decoupled", "alpha": 1e-4},
    {"variant": "l1-sp", "step": "proximal", "alpha": 1e-4},
]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, testing.Case]]:
    return [testing.cases_of(L2SP, make_net=small_net, hyper=hyper) for hyper in HYPERS]


CHECKED = (
    "shows_plain_data",
    "plans_add_up",
    "parts_add_up",
    "frozen_means_frozen",
    "what_learns_changes",
    "source_stays_as_it_was",
    "resumes_bit_equal",
    "refuses_another_source",
    "copies_are_independent",
    "keeps_its_type",
    "stays_finite_in_bf16",
    "export_is_plain",
)


@pytest.mark.parametrize("check", CHECKED)
@pytest.mark.parametrize("i", range(len(HYPERS)), ids=lambda i: "-".join(map(str, HYPERS[i].values())))
def test_every_member_keeps_the_contract(i: int, check: str, cases: list[dict[str, testing.Case]]) -> None:
    testing.run_check(check, cases[i])


@pytest.mark.slow
def test_members_agree_on_two_ranks(cases: list[dict[str, testing.Case]]) -> None:
    """One of each kind of mechanics: measured on entering, in the loss, after the optimiser's step."""
    chosen = [cases[HYPERS.index(hyper)]["it"] for hyper in MECHANICS]
    assert testing.two_ranks(chosen) == [testing.Ranks(None, None)] * len(MECHANICS)
