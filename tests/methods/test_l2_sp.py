"""L2-SP against its formula in the plainest form, and what must hold whatever the network."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart import registry
from headstart.errors import MethodError
from headstart.method import Method
from headstart.methods.baseline.full import Full
from headstart.methods.constrain.l2_sp import L2SP

ALPHA, BETA = 0.1, 0.01


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
    return L2SP(small_net().double(), 3, **({"alpha": ALPHA, "beta": BETA} | hyper))


def perturb(method: Method, by: float = 0.1) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def authors_formula(
    net: nn.Module, source: nn.Module, head: str, alpha: float, beta: float, kernels_only: bool
) -> tuple[Tensor, Tensor]:
    """The penalty as in holyseven/TransferLearningClassification, mode 1 (kernels) and mode 101 (all).

    tf.nn.l2_loss(t) = sum(t²)/2; each trainable tensor by its name: α · l2_loss(w − w⁰) where the checkpoint
    has it and it is no logits layer, β · l2_loss(w) for the logits.
    """
    shared = torch.zeros((), dtype=torch.float64)
    new = torch.zeros((), dtype=torch.float64)
    start = dict(source.named_parameters())
    for name, w in net.named_parameters():
        if kernels_only and w.ndim < 2:
            continue
        if name.startswith(head + "."):
            new = new + beta * (w**2).sum() / 2
        else:
            shared = shared + alpha * ((w - start[name]) ** 2).sum() / 2
    return shared, new


@pytest.mark.parametrize("params", ["kernels", "all"])
def test_agrees_with_the_authors_formula(params: str) -> None:
    method = build(params=params)
    source = small_net().double()
    perturb(method)
    x, y = batches(1)[0]
    method.train()
    plain = copy.deepcopy(method.net)
    loss = method(x, y)
    loss.total.backward()

    shared, new = authors_formula(plain, source, "7", ALPHA, BETA, params == "kernels")
    total = F.cross_entropy(plain(x), y) + shared + new
    total.backward()
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["shared"], shared.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["new"], new.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(method.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


class _Golden(nn.Module):
    """One shared weight vector and a head; the task loss is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.head = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :1]) * 0 + self.w.sum() * 0


def test_golden() -> None:
    """w⁰=[1,2], w=[1.5,0], head=[3], α=.1, β=.01: .2125 + .045 = .2575, gradients [.05,−.2] and [.03].

    By hand: .1/2 · (.5² + 2²) = .2125; .01/2 · 3² = .045.
    """
    method = L2SP(_Golden().double(), 1, head="head", alpha=0.1, beta=0.01, params="all")
    with torch.no_grad():
        method.net.w.copy_(torch.tensor([1.5, 0.0]))
        method.net.head.weight.fill_(3.0)
    loss = method(torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    loss.total.backward()
    assert loss.parts["task"].item() == 0  # one class
    assert loss.parts["shared"].item() == pytest.approx(0.2125, abs=1e-15)
    assert loss.parts["new"].item() == pytest.approx(0.045, abs=1e-15)
    assert loss.total.item() == pytest.approx(0.2575, abs=1e-15)
    torch.testing.assert_close(
        method.net.w.grad, torch.tensor([0.05, -0.2], dtype=torch.float64), rtol=1e-15, atol=0
    )
    torch.testing.assert_close(
        method.net.head.weight.grad, torch.tensor([[0.03]], dtype=torch.float64), rtol=1e-15, atol=0
    )


def test_the_pull_is_exactly_zero_at_the_start() -> None:
    method = build(params="all")
    x, y = batches(1)[0]
    loss = method(x, y)
    assert loss.parts["shared"].item() == 0
    pulls = torch.autograd.grad(_shared_term(method), method._shared)
    assert all(not pull.any() for pull in pulls)


def _shared_term(method: L2SP) -> Tensor:
    from headstart.parts.anchor import Anchor

    return Anchor.apply(method.alpha, len(method._shared), *method._shared, *method._start)


def test_the_pull_is_above_zero_after_any_change() -> None:
    """Guards against an anchor that is the weight itself."""
    for name in dict(small_net().named_parameters()):
        method = build(params="all")
        with torch.no_grad():
            method.net.get_parameter(name).view(-1)[0] += 1e-3
        loss = method(*batches(1)[0])
        part = "new" if name.startswith("7.") else "shared"
        assert loss.parts[part].item() > 0, name


def test_the_gradient_is_exact() -> None:
    method = build(params="all")
    perturb(method)
    for weight, start, pull in zip(
        method._shared, method._start, torch.autograd.grad(_shared_term(method), method._shared), strict=True
    ):
        assert torch.equal(pull, ALPHA * (weight - start).detach())


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
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-13)


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
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


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


def test_without_strength_it_is_plain_fine_tuning_bit_for_bit() -> None:
    ours = through_phases(build(alpha=0.0, beta=0.0), weight_decay=0.1)
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


def _minimise(alpha: float) -> Tensor:
    method = L2SP(_Quadratic(), 1, head="head", alpha=alpha, beta=0.0)

    class AsItIs(nn.Module):
        def forward(self, logits: Tensor, _: Tensor) -> Tensor:
            return logits.mean()

    method.criterion = AsItIs()
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


def test_a_stronger_pull_stays_closer() -> None:
    distances = [_minimise(alpha).norm().item() for alpha in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 3 * distances[-1]


def test_the_penalty_knows_nothing_of_pictures_or_mode() -> None:
    method = build()
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
    assert all(weight.data_ptr() not in mine for weight in (*twin._shared, *twin._new))
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


def test_micro_batches_make_one_step() -> None:
    """n micro-batches, each with loss / n: the penalty counts once, as for one batch."""
    x, y = batches(1, size=12)[0]
    whole, split = build(), build()
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
    scaled = torch.autograd.grad(term * 1024, method._shared)
    plain = torch.autograd.grad(_shared_term(method), method._shared)
    assert all(torch.equal(a, b * 1024) for a, b in zip(scaled, plain, strict=True))


@pytest.mark.parametrize(
    ("preset", "hyper", "recipe"),
    [
        (
            "paper",
            {"alpha": 0.01, "beta": 0.01, "params": "kernels", "body_lr": 1.0, "head_lr": 1.0},
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
    assert registry.configure(L2SP, preset, {}) == hyper
    assert recipe.items() <= dict(L2SP.presets[preset].recipe).items()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = L2SP(small_net(), 3, **hyper)
    rates = {group.name.split(",")[0]: group.lr for group in method.plan(1)[0].groups}
    assert rates == {"body": hyper["body_lr"], "head": hyper["head_lr"]}
