"""Hybrid Forward against a step written out by hand, and what must hold whatever the networks."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart import registry
from headstart.errors import ConfigError, MethodError
from headstart.method import Method
from headstart.methods.baseline.full import Full
from headstart.methods.constrain.hybrid_forward import HybridForward, routes
from headstart.parts.balance import Balance
from headstart.parts.viewed import Viewed
from headstart.testing import Case, run_check

CLASSES = 3


class Small(nn.Module):
    """Stages of stride 4, 8 and 32, with BatchNorm, and one more layer in front of the head."""

    def __init__(self, widths: tuple[int, int, int], seed: int, classes: int = 7) -> None:
        torch.manual_seed(seed)
        super().__init__()
        a, b, c = widths
        self.one = nn.Sequential(nn.Conv2d(3, a, 4, 4), nn.BatchNorm2d(a), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(a, b, 2, 2), nn.BatchNorm2d(b), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(b, c, 4, 4), nn.BatchNorm2d(c), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU())
        self.head = nn.Linear(c, classes)
        self.feature_info = [
            {"module": name, "num_chs": width, "reduction": stride}
            for name, width, stride in zip(("one", "two", "three"), widths, (4, 8, 32), strict=True)
        ]
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics that are not those of a batch
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.one(x)))
        return self.head(self.last(x).mean((2, 3)))


STUDENT, TEACHER = (4, 5, 6), (5, 8, 7)


def batches(n: int = 3, size: int = 4, seed: int = 0, pixels: int = 32) -> list[Any]:
    torch.manual_seed(seed)
    return [
        (torch.randn(size, 3, pixels, pixels, dtype=torch.float64), torch.arange(size) % CLASSES)
        for _ in range(n)
    ]


def build(net: nn.Module | None = None, source: nn.Module | None = None, **hyper: Any) -> HybridForward:
    """A student in training, and a teacher of other widths."""
    given = {"example": torch.zeros(1, 3, 32, 32), "source": source or Small(TEACHER, seed=1)} | hyper
    method = HybridForward(net or Small(STUDENT, seed=0), CLASSES, **given).double()
    torch.manual_seed(3)
    with torch.no_grad():  # a head of zeros would let no gradient through
        for parameter in method.head_module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    method.train()
    return method


def alike(**hyper: Any) -> HybridForward:
    """A network that is its own teacher, with the head it has."""
    given = {"example": torch.zeros(1, 3, 32, 32)} | hyper
    return HybridForward(Small(STUDENT, seed=0), **given).double().train()


# ---------------------------------------------------------------- a step, written out by hand


class ByHand:
    """K = 2, shared head, dynamic balance: every line as the formula has it, nothing shared with ours.

    The crossing paths see the student's BatchNorm through F.batch_norm without running statistics; the
    teacher's through its own. Only path 3 calls the student as it is.
    """

    def __init__(self, method: HybridForward, rho: float, kappa: float) -> None:
        self.student = copy.deepcopy(method.net)
        self.teacher = Small(TEACHER, seed=1).double().eval().requires_grad_(False)
        self.adapters = {name: copy.deepcopy(each.adapter) for name, each in method.crossings.items()}
        self.rho, self.kappa, self.t, self.m = rho, kappa, 0, [0.0, 0.0, 0.0]

    @staticmethod
    def stage(stage: nn.Sequential, x: Tensor) -> Tensor:
        conv, norm, _ = stage
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride)
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps).relu()

    def head(self, x: Tensor) -> Tensor:
        return self.student.head(self.stage(self.student.last, x).mean((2, 3)))

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, t, across = self.student, self.teacher, self.adapters
        with torch.no_grad():
            t0 = t.two(t.one(x))
        s0 = self.stage(s.two, self.stage(s.one, x))
        path1 = self.head(across["net_2"](t.three(across["source_1"](s0))))
        path2 = self.head(self.stage(s.three, across["net_1"](t0)))
        costs = [F.cross_entropy(logits, y) for logits in (path1, path2, s(x))]
        self.t += 1
        w = []
        for i in range(3):
            self.m[i] = self.rho * self.m[i] + (1 - self.rho) * costs[i].item()
        mean = [m / (1 - self.rho**self.t) for m in self.m]
        for i in range(2):
            w.append(min(max(self.kappa / 2 * mean[2] / max(mean[i], 1e-8), 0), 1))
        return costs[2], w[0] * costs[0], w[1] * costs[1]

    def parameters(self) -> list[nn.Parameter]:
        return [
            *self.student.parameters(),
            *(p for each in self.adapters.values() for p in each.parameters()),
        ]


@pytest.mark.parametrize(("rho", "kappa"), [(0.9, 1.0), (0.0, 0.6)])
def test_agrees_with_steps_written_out_by_hand(rho: float, kappa: float) -> None:
    method = build(rho=rho, kappa=kappa)
    hand = ByHand(method, rho, kappa)
    ours = [*method.net.parameters(), *method.crossings.parameters()]
    optimizers = [torch.optim.SGD(each, lr=0.1, momentum=0.9) for each in (ours, hand.parameters())]
    for x, y in batches(4):
        loss, (task, one, two) = method(x, y), hand.loss(x, y)
        for name, theirs in (("task", task), ("path1", one), ("path2", two)):
            torch.testing.assert_close(loss.parts[name], theirs.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(loss.total, task + one + two, rtol=1e-10, atol=0)
        loss.total.backward()
        (task + one + two).backward()
        for p, q in zip(ours, hand.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(method.net.state_dict().items(), hand.student.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-12, msg=name)


# ---------------------------------------------------------------- the paths


def test_routes() -> None:
    """(S,0), (T,1), (S,2) ... and its complement; together they visit every segment once."""
    for cuts in range(1, 6):
        one, two = routes(cuts, shared=False)
        assert one[0] == "net"
        assert all(a != b for a, b in pairwise(one))
        assert {*enumerate(one), *enumerate(two)} == {
            (k, s) for k in range(cuts + 1) for s in ("net", "source")
        }
    assert routes(2) == (("net", "source", "net"), ("source", "net", "net"))
    assert routes(1) == (("net", "net"), ("source", "net"))
    assert routes(3) == (("net", "source", "net", "net"), ("source", "net", "source", "net"))


def visited(method: HybridForward, x: Tensor, y: Tensor) -> list[tuple[str, int]]:
    """The segments that a step runs besides the network itself, in order."""
    seen: list[tuple[str, int]] = []
    for side, cut in method.segments.items():

        def run(k: int, x: Tensor, side: str = side, plain: Any = cut.run) -> Tensor:
            seen.append((side, k))
            return plain(k, x)

        cut.run = run  # type: ignore[method-assign]
    method(x, y)
    for cut in method.segments.values():
        del cut.run
    return seen


def test_segments_are_visited_in_turns() -> None:
    """Path 1 begins with what path 3 said: the same pictures through the same segment, without chance."""
    x, y = batches(1)[0]
    begun = [("source", 0)]
    assert visited(build(), x, y) == [*begun, ("source", 1), ("net", 2), ("net", 1), ("net", 2)]
    assert visited(build(cuts="all"), x, y) == [
        *begun,
        *(("source", 1), ("net", 2), ("net", 3)),
        *(("net", 1), ("source", 2), ("net", 3)),
    ]
    teacher = build(ending="teacher", source=Small(TEACHER, seed=1, classes=CLASSES))
    assert visited(teacher, x, y) == [*begun, ("source", 1), ("net", 2), ("net", 1), ("source", 2)]
    assert visited(build(ending="new"), x, y) == [*begun, ("source", 1), ("net", 2), ("net", 1)]


def test_chance_is_drawn_for_each_path() -> None:
    net = Small(STUDENT, seed=0)
    net.two.append(nn.Dropout(0.5))
    method = build(net)
    x, y = batches(1)[0]
    assert visited(method, x, y)[:2] == [("source", 0), ("net", 0)]
    method.eval()
    assert visited(method, x, y)[:2] == [("source", 0), ("source", 1)]


def test_shared_or_run_again_is_the_same() -> None:
    x, y = batches(1)[0]
    ours, again = build(), build()
    ours(x, y).total.backward()
    again.loss(again.net(x), y, **again.terms(x, y, copy.deepcopy(again.net)(x))).total.backward()
    for p, q in zip(ours.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_what_is_overwritten_is_run_again() -> None:
    class Overwritten(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.two(self.one(x)), inplace=True)
            return self.head(self.last(self.three(x)).mean((2, 3)))

    net = Overwritten(STUDENT, seed=0)
    del net.two[2]
    x, y = batches(1)[0]
    method = build(net)
    assert visited(method, x, y)[:2] == [("source", 0), ("net", 0)]
    method(x, y).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_network_and_itself_say_the_same_on_all_paths(name: str) -> None:
    """Same weights, no adapter, nothing drawn: three times the same bits, and w = 1/2."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES, **({"img_size": 32} if "vit" in name else {}))
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % CLASSES
    method = HybridForward(net, rho=0.0, example=x)
    method.norm = "eval"
    method.train()
    said: list[Tensor] = []
    method.criterion.register_forward_pre_hook(lambda _, given: said.append(given[0]))
    loss = method(x, y)
    assert len(said) == 4  # the task's is needed twice
    assert all(torch.equal(logits, said[0]) for logits in said)
    assert method.memory["weights"].tolist() == [0.5, 0.5]
    assert loss.parts["path1"] == loss.parts["path2"] == loss.parts["task"] / 2
    assert sum(p.numel() for p in method.crossings.parameters()) == 0


# ---------------------------------------------------------------- who learns


def reached(method: HybridForward, which: str) -> set[str]:
    x, y = batches(1)[0]
    with method.watching():
        logits = method.net(x)
    method.terms(x, y, logits.detach())[which].backward()
    names = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    method.zero_grad()
    return {name.split(".")[1] for name in names}


def test_each_path_teaches_every_other_segment() -> None:
    """K = 2: s_0 and the head, s_1 and the head; K = 3 likewise. Nothing reaches the teacher."""
    method = build()
    assert reached(method, "path1") == {"one", "two", "last", "head", "source_1", "net_2"}
    assert reached(method, "path2") == {"three", "last", "head", "net_1"}
    method = build(cuts="all")
    assert reached(method, "path1") == {"one", "three", "last", "head", "source_1", "net_2"}
    assert reached(method, "path2") == {"two", "last", "head", "net_1", "source_2", "net_3"}
    assert not any(p.grad is not None for _, p in method.source.named_parameters())


@pytest.mark.parametrize("teacher_bn", ["eval", "batch"])
@pytest.mark.parametrize("ending", ["shared", "teacher", "new"])
def test_the_teacher_does_not_change_and_the_student_counts_once(teacher_bn: str, ending: str) -> None:
    source = Small(TEACHER, seed=1, classes=CLASSES)
    method = build(source=source, teacher_bn=teacher_bn, ending=ending)
    before = copy.deepcopy(method.source.net.state_dict())
    for x, y in batches(3):
        plain = copy.deepcopy(method.net)
        plain(x)
        method(x, y).total.backward()
        for name, buffer in method.net.named_buffers():
            assert torch.equal(buffer, plain.get_buffer(name)), name
        with torch.no_grad():
            for parameter in method.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(torch.equal(value, before[key]) for key, value in method.source.net.state_dict().items())
    for norm in [
        m for m in (*method.net.modules(), *method.source.net.modules()) if isinstance(m, nn.BatchNorm2d)
    ]:
        assert norm.track_running_stats
        assert norm.momentum == 0.1
    assert not any(module.training for module in method.source.net.modules())
    assert all(module.training for module in method.net.modules())


def test_the_teacher_may_normalise_by_the_batch() -> None:
    x, y = batches(1)[0]
    teacher = Small(TEACHER, seed=1).double().requires_grad_(False).train()
    for teacher_bn, by_batch in (("eval", False), ("batch", True)):
        method = build(teacher_bn=teacher_bn, rho=0.0, w_max=9.0)
        teacher.train(by_batch)
        stages = teacher.two(teacher.one(x))
        plain = copy.deepcopy(method.net)
        across = plain.head(plain.last(plain.three(method.crossings["net_1"](stages))).mean((2, 3)))
        loss = method(x, y)
        found = loss.parts["path2"] / method.memory["weights"][1]
        torch.testing.assert_close(found, F.cross_entropy(across, y).detach(), rtol=1e-10, atol=0)


def test_held_statistics_are_held_on_all_paths() -> None:
    method = build(teacher_bn="batch")
    method.norm = "eval"
    method.train()
    before = copy.deepcopy(dict(method.net.named_buffers()))
    x, y = batches(1, size=1)[0]
    assert method(x, y).total.isfinite()  # one picture is enough then
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.net.named_buffers())


@pytest.mark.parametrize(
    "hyper", [{"balance": "static", "alpha": 1.0}, {"kappa": 0.0}, {"balance": "joint", "w_max": 0.0}]
)
def test_without_weight_it_is_plain_fine_tuning(hyper: dict[str, Any]) -> None:
    """To the bit, and nothing of the teacher is run."""
    example, source = torch.zeros(1, 3, 32, 32), Small(TEACHER, seed=1)
    off = HybridForward(Small(STUDENT, seed=0), CLASSES, example=example, source=source, **hyper)
    plain = Full(Small(STUDENT, seed=0), CLASSES)
    assert len(list(off.parameters())) == len(list(plain.parameters()))
    off.segments = {}
    for method in (off, plain):
        for phase in method.phases(1, [(x.float(), y) for x, y in batches(3)]):
            optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
            for x, y in batches(3):
                loss = method(x.float(), y)
                assert list(loss.parts) == ["task"]
                loss.total.backward()
                optimizer.step()
                optimizer.zero_grad()
    for key, value in plain.net.state_dict().items():
        assert torch.equal(value, off.net.state_dict()[key]), key
    assert off.observe() == {}


def test_no_gradient_goes_through_the_weights() -> None:
    method = build(rho=0.0)
    x, y = batches(1)[0]
    terms = method.terms(x, y, method.net(x).detach())
    assert not method.memory["weights"].requires_grad
    torch.testing.assert_close(terms["path1"], terms["path2"], rtol=1e-12, atol=0)
    grads = torch.autograd.grad(terms["path1"], list(method.net.one.parameters()), retain_graph=True)
    again = build(balance="static", alpha=1 - method.memory["weights"][0].item())
    fixed = again.terms(x, y, again.net(x).detach())["path1"]
    for g, h in zip(grads, torch.autograd.grad(fixed, list(again.net.one.parameters())), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-12)  # 1 - alpha is kept in float32


def test_the_static_weights_are_one_minus_alpha() -> None:
    x, y = batches(1)[0]
    loss, plain = build(balance="static", alpha=0.7)(x, y), build(balance="static", alpha=0.0)(x, y)
    for name in ("path1", "path2"):
        torch.testing.assert_close(loss.parts[name], 0.3 * plain.parts[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("balance", ["norms", "cosine"])
def test_weights_from_gradients(balance: str) -> None:
    """Of each path on its own segments and the head, with autograd once more; then they stay for a while."""
    method = build(balance=balance)
    x, y = batches(1)[0]
    loss = copy.deepcopy(method)(x, y)
    assert loss.total.isfinite()
    hand = copy.deepcopy(method)
    hand.balance = Balance("static", 2.0)  # w = 1
    hand.balance.begin(hand.memory)
    hand.double()
    with hand.watching():
        logits = hand.net(x)
    costs = list(hand.terms(x, y, logits).values())
    task = F.cross_entropy(logits, y)
    weights = list(hand.net.parameters())
    found = [torch.autograd.grad(c, weights, retain_graph=True, allow_unused=True) for c in (*costs, task)]
    expected = []
    for own in found[:2]:
        pairs = [(a, b) for a, b in zip(own, found[2], strict=True) if a is not None]
        one, other = (torch.cat([each[i].flatten() for each in pairs]) for i in range(2))
        norms, cosine = float(other.norm() / one.norm()), float(one @ other)
        expected.append(min(0.5 * norms, 1) if balance == "norms" else 0.5 * (cosine > 0))
    method(x, y).total.backward()
    assert method.memory["weights"].tolist() == pytest.approx(expected, rel=1e-9)
    method(*batches(2)[1])  # the next step does not look
    assert method.memory["weights"].tolist() == pytest.approx(expected, rel=1e-9)


def test_weights_that_fall_by_the_epoch() -> None:
    method = build(balance="schedule", kappa=0.5)
    data = batches(1)
    found = []
    for phase in method.phases(3, data):
        for _ in range(phase.epochs):
            method(*data[0])
            found.append(method.memory["weights"].tolist())
            method.finished_epoch()
    assert found == [pytest.approx([each] * 2, abs=1e-7) for each in (0.4, 0.2, 0.0)]


@pytest.mark.parametrize("check", ["resumes_bit_equal", "what_learns_changes", "stays_finite_in_bf16"])
@pytest.mark.parametrize("balance", ["schedule", "rates", "norms", "cosine"])
def test_contract_of_other_balances(balance: str, check: str) -> None:
    nets = {"small": Case(HybridForward, Small(STUDENT, seed=0), {"balance": balance})}
    run_check(check, nets)


def test_weights_move_in_training_only() -> None:
    method = build()
    (x, y), (other, labels), _ = batches(3)
    method(x, y)
    method.eval()
    before = copy.deepcopy(method.memory.state_dict())
    method(other, labels)
    assert all(torch.equal(value, before[key]) for key, value in method.memory.state_dict().items())


def test_two_batches_may_share_a_backward_pass() -> None:
    """The weights of the first batch stay in its graph when the second moves them."""
    one, other = build(), build()
    totals = [one(x, y).total for x, y in batches(2)]
    sum(totals, torch.zeros(())).backward()
    for x, y in batches(2):
        other(x, y).total.backward()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_a_batch_without_numbers_leaves_the_weights() -> None:
    method = build()
    x, y = batches(1)[0]
    method(x, y)
    before = method.memory["weights"].clone()
    assert method(torch.full_like(x, math.nan), y).total.isnan()
    assert torch.equal(method.memory["weights"], before)


# ---------------------------------------------------------------- adapters and other teachers


def numbers(method: HybridForward) -> dict[str, int]:
    return {name: n for name, n in method.diagnostics()["adapters"].items() if n}


def test_adapters_are_where_channels_differ() -> None:
    assert numbers(alike()) == {}
    assert numbers(build()) == {"source_1": 5 * 8 + 8, "net_1": 8 * 5 + 5, "net_2": 7 * 6 + 6}
    assert numbers(build(source=Small((9, 5, 7), seed=1))) == {"net_2": 7 * 6 + 6}
    with_teacher = build(source=Small(TEACHER, seed=1, classes=CLASSES), ending="teacher")
    assert numbers(with_teacher)["source_2"] == 6 * 7 + 7
    assert numbers(build(ending="new")) == numbers(with_teacher)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("resnet18", "resnet34", {}),
        (
            "mobilenetv1_100",
            "resnet50",
            {
                "source_1": 256 * 512 + 512,
                "net_1": 512 * 256 + 256,
                "net_2": 2048 * 1024 + 1024,
            },
        ),
    ],
)
def test_adapters_of_the_first_authors_pairs(student: str, teacher: str, expected: dict[str, int]) -> None:
    """Channels (128, 512) on both sides; (512, 2048) over (256, 1024)."""
    nets = [timm.create_model(name, num_classes=5) for name in (student, teacher)]
    method = HybridForward(nets[0], CLASSES, source=nets[1], example=torch.zeros(1, 3, 32, 32))
    assert numbers(method) == expected
    assert [a.stride for a, _ in method.cuts] == [8, 32]


VIT = {"img_size": 32, "num_classes": 7}
PAIRS = {
    "wider": ("test_resnet", {}, "test_efficientnet", {}),
    "LayerNorm to BatchNorm": ("test_resnet", {}, "test_convnext", {}),
    "transformer to convolutions": ("test_resnet", {}, "test_vit", VIT),
    "convolutions to transformer": ("test_vit", VIT, "test_resnet", {}),
    "transformers": ("test_vit", VIT, "test_vit2", VIT | {"embed_dim": 32}),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    def make(name: str, seed: int, options: dict[str, Any]) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model(name, **{"num_classes": 7, **options})

    return {
        label: Case(HybridForward, make(ours, 0, options), {"source": make(theirs, 1, its)})
        for label, (ours, options, theirs, its) in PAIRS.items()
    }


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "check",
    [
        "shows_plain_data",
        "parts_add_up",
        "takes_class_shares",
        "frozen_means_frozen",
        "what_learns_changes",
        "resumes_bit_equal",
        "copies_are_independent",
        "keeps_its_type",
        "stays_finite_in_bf16",
        "export_says_what_predict_says",
        "export_is_plain",
    ],
)
def test_contract_with_another_teacher(pair: str, check: str, cases: dict[str, Case]) -> None:
    run_check(check, {pair: cases[pair]})


def test_other_teachers_are_cut_where_strides_meet(cases: dict[str, Case]) -> None:
    found = {
        pair: [(a.name, b.name) for a, b in case.method().cuts]  # type: ignore[attr-defined]
        for pair, case in cases.items()
    }
    assert found == {
        "wider": [("layer2", "blocks.2"), ("layer4", "blocks.4")],
        "LayerNorm to BatchNorm": [("layer2", "stages.1"), ("layer4", "stages.3")],
        "transformer to convolutions": [("layer3", "blocks.3"), ("layer4", "blocks.5")],
        "convolutions to transformer": [("blocks.3", "layer3"), ("blocks.5", "layer4")],
        "transformers": [("blocks.2", "blocks.3"), ("blocks.5", "blocks.7")],
    }


def test_all_of_a_transformer_learns_from_a_convolutional_teacher(cases: dict[str, Case]) -> None:
    """The class token of path 2 is the student's own: its gradient comes over that path too."""
    method = cases["convolutions to transformer"].method()
    assert isinstance(method, HybridForward)
    with torch.no_grad():
        method.head_module.weight.normal_()
    x, y = cases["convolutions to transformer"].train[0]
    method.train()
    terms = method.terms(x, y, method.net(x).detach())
    terms["path2"].backward()
    assert method.net.cls_token.grad.any()
    assert (
        method.net.patch_embed.proj.weight.grad is None or not method.net.patch_embed.proj.weight.grad.any()
    )


def test_a_teacher_sees_pictures_its_own_way() -> None:
    """Wrapped as `Viewed`, the first segment of the teacher sees what the whole of it would see."""
    own = ([0.5, 0.5, 0.5], [0.2, 0.2, 0.2]), ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])
    source = Small(TEACHER, seed=1)
    viewed = build(source=Viewed(source, given=own[0], own=own[1]))
    x, y = batches(1)[0]
    found: list[Tensor] = []
    plain = viewed.segments["source"].run
    viewed.segments["source"].run = lambda k, x: (found.append(x), plain(k, x))[1]  # type: ignore[method-assign]
    viewed(x, y)
    mean, std = (torch.tensor(each).double().view(1, 3, 1, 1) for each in own[1])
    expected = (x * 0.2 + 0.5 - mean) / std
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)


def test_one_cut_is_enough_where_the_teacher_ends_a_path() -> None:
    x, y = batches(1)[0]
    method = build(ending="teacher", cuts=8, source=Small(TEACHER, seed=1, classes=CLASSES))
    assert visited(method, x, y) == [("source", 0), ("source", 1), ("net", 1)]


def test_endings_bring_their_own_head() -> None:
    x, y = batches(1)[0]
    method = build(ending="new", rho=0.0)
    assert isinstance(method.fresh, nn.Linear)
    assert method.fresh.weight.shape == (CLASSES, TEACHER[2])
    loss = method(x, y)
    loss.total.backward()
    assert method.fresh.weight.grad.any()
    assert loss.parts["path2"] == pytest.approx(math.log(CLASSES) * method.memory["weights"][1].item())
    names = [group.name for group in method.plan(1)[0].groups]
    assert names[-4:] == [
        "adapters, kernels",
        "adapters, norms and biases",
        "teacher's head, kernels",
        "teacher's head, norms and biases",
    ]


# ---------------------------------------------------------------- what is left and what is shown


def test_the_export_is_the_student_alone() -> None:
    plain = Full(Small(STUDENT, seed=0), CLASSES)
    assert list(build().export().state_dict()) == list(plain.export().state_dict())


def test_observe_shows_losses_and_weights() -> None:
    method = build(rho=0.0)
    assert method.observe() == {}
    x, y = batches(1)[0]
    loss = method(x, y)
    shown = method.observe()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["losses"]["task"] == pytest.approx(loss.parts["task"].item())
    for path in ("path1", "path2"):
        assert shown["weights"][path] * shown["losses"][path] == pytest.approx(loss.parts[path].item())


def test_diagnostics_show_the_cuts() -> None:
    shown = build().diagnostics()
    assert json.loads(json.dumps(shown)) == shown
    assert shown["cuts"][0] == {
        "net": {"behind": "two", "channels": 5, "stride": 8, "kind": "map", "size": [4, 4]},
        "source": {"behind": "two", "channels": 8, "stride": 8, "kind": "map", "size": [4, 4]},
    }
    assert shown["paths"]["path1"] == ["net", "source", "net"]


def test_the_authors_preset() -> None:
    values = registry.configure(HybridForward, "author", {})
    source = Small(TEACHER, seed=1, classes=CLASSES)
    method = build(source=source, **values)
    x, y = batches(1)[0]
    assert method(x, y).total.isfinite()
    assert method.observe()["weights"] == pytest.approx({"path1": 0.1, "path2": 0.1})


# ---------------------------------------------------------------- bad input


class _Gray(Small):
    def __init__(self) -> None:
        super().__init__(TEACHER, seed=0)
        self.one[0] = nn.Conv2d(1, TEACHER[0], 4, 4)


class _Coarse(Small):
    def __init__(self) -> None:
        super().__init__(TEACHER, seed=0)
        self.feature_info = [{"module": "three", "num_chs": TEACHER[2], "reduction": 64}]


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"source": _Gray()}, "_Gray cannot see pictures of 3 channels and 32 × 32 pixels"),
        ({"source": _Coarse()}, "no stage of the same stride: one has 4 8 32, the other 64"),
        (
            {"source": nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))},
            "Sequential cannot be cut into segments",
        ),
        ({"ending": "teacher"}, "which knows 7 classes; here are 3. Use 'shared' or 'new'"),
        ({"cuts": "32"}, "path 1 never reaches the source, unless ending='teacher'"),
        ({"cuts": 32, "ending": "new"}, "Cut once .behind three., path 1 never"),
        ({"cuts": ""}, "cuts = '': give one or more strides"),
        ({"cuts": 0}, "cuts = 0: give one or more strides"),
        ({"cuts": "8 layer4"}, "give one or more strides, such as '8 32', or 'all'"),
        ({"example": None}, "give example=..., a batch"),
    ],
)
def test_what_cannot_be_says_so(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as raised:
        build(**hyper)
    assert "\n" not in str(raised.value)


def test_a_batch_of_one_is_refused() -> None:
    method = build()
    x, y = batches(1, size=1)[0]
    before = copy.deepcopy(dict(method.net.named_buffers()))
    with pytest.raises(MethodError, match="a batch of one picture; BatchNorm needs two or more"):
        method(x, y)
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.net.named_buffers())
    assert not method.net._forward_pre_hooks
    method.eval()
    assert method(x, y).total.isfinite()


def test_fits() -> None:
    task = {"classes": CLASSES, "train": 18, "val": 6, "img_size": 32}
    assert HybridForward.fits(Small(STUDENT, seed=0), task) is None
    assert HybridForward.fits(_Gray(), task) is None  # a student for gray pictures
    reason = HybridForward.fits(nn.Sequential(nn.Flatten(), nn.Linear(3072, 7)), task)
    assert reason is not None
    assert "cannot be cut into segments" in reason
    once = Small(STUDENT, seed=0)
    once.feature_info = once.feature_info[-1:]
    assert "has one stage" in str(HybridForward.fits(once, task))


def test_values_out_of_bounds() -> None:
    for name, value in (("rho", 1.0), ("alpha", 1.2), ("kappa", -1), ("ending", "both")):
        with pytest.raises(ConfigError, match=f"{name} = "):
            registry.configure(HybridForward, None, {name: value})


def test_it_is_listed_and_takes_a_source() -> None:
    found: type[Method] = registry.get("hybrid-forward")
    assert found is HybridForward
    assert found.takes_source
