"""The abstraction itself: phases, groups, freezing, resuming, and methods nobody has thought of."""

from __future__ import annotations

import copy
import io
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.method import Batch, Data, Group, Loss, Method, Phase, Room, nothing
from headstart.parts.optimizers import Several


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 7),
    )


def pictures(n: int = 2) -> list[Batch]:
    torch.manual_seed(1)
    y = torch.arange(6) % 3
    return [(torch.randn(6, 3, 8, 8) + torch.eye(3)[y][:, :, None, None], y) for _ in range(n)]


class Plain(Method):
    name = "plain"
    room: ClassVar[Room] = "baseline"
    paper = "none"


class WithSource(Plain):
    keeps_source = True


def walk(method: Method, epochs: int, log: list[str], stop: int | None = None) -> None:
    """Train and note what happened; stops after so many epochs of the whole plan."""
    done = 0
    for phase in method.phases(epochs, pictures()):
        log.append(f"begin {phase.name} at {phase.done}")
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.01)
        for _ in range(phase.done, phase.epochs):
            for x, y in pictures():
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            method.finished_epoch()
            log.append(f"epoch of {phase.name}")
            done += 1
            if done == stop:
                return


# ---------------------------------------------------------------- the eight lines


def test_the_eight_lines_of_the_docstring() -> None:
    loader = pictures(3)
    method = Plain(small_net(), classes=3)
    for phase in method.phases(epochs=4, train=loader):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        for _ in range(phase.epochs):
            for x, y in loader:
                method(x, y).total.backward()
                optimizer.step()
                optimizer.zero_grad()
    net = method.export()
    assert type(net) is nn.Sequential
    assert not net.training
    assert all(p.requires_grad for p in net.parameters())
    x, y = loader[0]
    assert nn.functional.cross_entropy(net(x), y) < 1.0  # from log 3 = 1.0986


def test_the_default_plan_is_plain_fine_tuning() -> None:
    method = Plain(small_net(), 3)
    (phase,) = method.plan(5)
    assert (phase.name, phase.epochs, phase.enter, phase.bind) == ("fine-tune", 5, nothing, nothing)
    assert sorted(id(p) for g in phase.groups for p in g.params) == sorted(id(p) for p in method.parameters())


# ---------------------------------------------------------------- groups and optimisers


def test_groups_by_place_and_kind() -> None:
    method = Plain(small_net(), 3)
    told = {g.name: (len(g.params), g.lr, g.decay) for g in method.groups(0.5, 0.7, head_lr=3.0)}
    assert told == {
        "body, kernels": (2, 0.5, 0.7),
        "body, norms and biases": (4, 0.5, 0.0),
        "head, kernels": (1, 3.0, 0.7),
        "head, norms and biases": (1, 3.0, 0.0),
    }


def test_groups_with_rates_by_depth() -> None:
    rates = {g.name: g.lr for g in Plain(small_net(), 3).groups(head_lr=2.0, layer_decay=0.5)}
    assert rates["head, kernels"] == 2.0
    assert rates["body -1, kernels"] == 0.5
    assert rates["body -2, kernels"] == 0.25


def test_an_optimiser_scales_rates_and_decays() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    phase = Phase("p", 1, [Group("a", [a], 0.5, 2.0), Group("b", [b]), Group("none", [])], objective)
    optimizer = phase.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.01, betas=(0.8, 0.9))
    assert isinstance(optimizer, torch.optim.AdamW)
    told = [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
    assert told == [("a", 0.05, 0.02, (0.8, 0.9)), ("b", 0.1, 0.01, (0.8, 0.9))]


def objective(x: Tensor, y: Tensor) -> Loss:
    raise AssertionError("never called")


def test_groups_with_a_rule_of_their_own() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [
        Group("a", [a]),
        Group("b", [b], rule=lambda ps: torch.optim.Adam(ps, lr=0.5)),
        Group("c", [c], rule=lambda ps: torch.optim.SGD(ps, lr=2.0)),
        Group("nobody", [], rule=lambda ps: torch.optim.SGD(ps, lr=2.0)),
    ]
    bound: list[Any] = []
    optimizer = Phase("p", 1, groups, objective, bind=bound.append).optimizer(torch.optim.SGD, lr=0.1)
    assert isinstance(optimizer, Several)
    assert bound == [optimizer]
    assert [type(each) for each in optimizer.optimizers] == [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.SGD,
    ]
    (a.sum() + b.sum() + c.sum()).backward()
    optimizer.step()
    assert (a[0].item(), b[0].item(), c[0].item()) == pytest.approx((0.9, 0.5, -1.0), abs=1e-6)


def test_only_groups_with_a_rule_of_their_own() -> None:
    a = nn.Parameter(torch.ones(2))
    group = Group("a", [a], rule=lambda ps: torch.optim.Adam(ps, lr=0.5))
    assert isinstance(Phase("p", 1, [group], objective).optimizer(torch.optim.SGD, lr=1), torch.optim.Adam)


@pytest.mark.parametrize("groups", [[], [Group("nobody", [])]])
def test_nothing_that_learns_is_an_error(groups: list[Group]) -> None:
    with pytest.raises(MethodError, match="'p' has nothing that learns"):
        Phase("p", 1, groups, objective).optimizer(torch.optim.SGD, lr=0.1)


# ---------------------------------------------------------------- the loss


def test_loss_adds_named_terms() -> None:
    method = Plain(small_net(), 3)
    logits = torch.zeros(2, 3, requires_grad=True)
    extra = torch.tensor(0.5, requires_grad=True)
    loss = method.loss(logits, torch.tensor([0, 1]), pull=extra * 2)
    assert loss.total.item() == pytest.approx(torch.tensor(3.0).log().item() + 1.0)
    assert {name: round(part.item(), 4) for name, part in loss.parts.items()} == {"task": 1.0986, "pull": 1.0}
    assert not loss.logits.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())
    loss.total.backward()
    assert extra.grad is not None
    assert extra.grad.item() == 2.0


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_loss_is_computed_in_at_least_single_precision(given: torch.dtype, computed: torch.dtype) -> None:
    loss = Plain(small_net(), 3).loss(torch.randn(2, 3, dtype=given), torch.tensor([0, 1]))
    assert loss.total.dtype == computed


# ---------------------------------------------------------------- phases


class TwoSteps(Plain):
    """Head, then everything, each with an objective and an entrance of its own."""

    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        self.log: list[str] = []

    def plan(self, epochs: int) -> list[Phase]:
        head = [g for g in self.groups() if g.name.startswith("head")]
        body = [g for g in self.groups() if g.name.startswith("body")]
        return [
            Phase("look", 0, [], self.objective, enter=lambda data: self._note("look", data)),
            Phase("head", 2, head, self._head, enter=lambda data: self._note("head", data)),
            Phase("body", epochs - 2, body, self.objective, enter=lambda data: self._note("body", data)),
        ]

    def _note(self, name: str, data: Data) -> None:
        self.log.append(f"enter {name}")
        self.memory[name] = torch.rand(3)

    def _head(self, x: Tensor, y: Tensor) -> Loss:
        return self.loss(self.net(x), y, doubled=nn.functional.cross_entropy(self.net(x), y))


def test_phases_come_in_order_each_entered_once() -> None:
    method = TwoSteps(small_net(), 3)
    walk(method, 4, method.log)
    assert method.log == [
        "enter look",
        "enter head",
        "begin head at 0",
        "epoch of head",
        "epoch of head",
        "enter body",
        "begin body at 0",
        "epoch of body",
        "epoch of body",
    ]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resume_goes_on_where_it_stood(stop: int) -> None:
    straight = TwoSteps(small_net(), 3)
    walk(straight, 4, straight.log)

    first = TwoSteps(small_net(), 3)
    walk(first, 4, first.log, stop=stop)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = TwoSteps(small_net(), 3)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    walk(second, 4, second.log)

    entered = [line for line in first.log + second.log if line.startswith("enter")]
    assert entered == ["enter look", "enter head", "enter body"]
    trained = [line for line in first.log + second.log if line.startswith("epoch")]
    assert trained == [line for line in straight.log if line.startswith("epoch")]
    assert set(second.memory) == {"look", "head", "body"}


def test_the_phase_under_way_keeps_its_objective_and_its_learners_on_resume() -> None:
    first = TwoSteps(small_net(), 3)
    walk(first, 4, [], stop=1)
    second = TwoSteps(small_net(), 3)
    second.load_state_dict(first.state_dict())
    phase = next(second.phases(4, pictures()))
    assert (phase.name, phase.done) == ("head", 1)
    assert "doubled" in second(*pictures()[0]).parts
    assert {name for name, p in second.named_parameters() if p.requires_grad} == {
        "net.4.weight",
        "net.4.bias",
    }


def test_a_finished_method_has_no_phases_left() -> None:
    method = TwoSteps(small_net(), 3)
    walk(method, 3, [])
    assert list(method.phases(3, pictures())) == []
    assert not method.training
    again = TwoSteps(small_net(), 3)
    again.load_state_dict(method.state_dict())
    assert list(again.phases(3, pictures())) == []
    assert again.log == []


def test_walking_away_does_not_skip_the_phase() -> None:
    method = TwoSteps(small_net(), 3)
    for phase in method.phases(4, pictures()):
        assert phase.name == "head"
        break
    assert next(method.phases(4, pictures())).name == "head"
    assert method.log == ["enter look", "enter head"]


class EndsEarly(TwoSteps):
    def _note(self, name: str, data: Data) -> bool | None:  # type: ignore[override]
        super()._note(name, data)
        return name != "body"


def test_enter_that_says_false_ends_the_plan() -> None:
    method = EndsEarly(small_net(), 3)
    walk(method, 4, method.log)
    assert method.log[-2:] == ["epoch of head", "enter body"]
    assert not method.training
    again = EndsEarly(small_net(), 3)
    again.load_state_dict(method.state_dict())
    walk(again, 4, again.log)
    assert again.log == []


class Miscounts(Plain):
    def plan(self, epochs: int) -> list[Phase]:
        return [Phase("one", 1, self.groups(), self.objective)]


def test_a_plan_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(MethodError, match=r"plan of plain has 1 epochs; 3 were given\."):
        next(Miscounts(small_net(), 3).phases(3, pictures()))


class Looks(Plain):
    def plan(self, epochs: int) -> list[Phase]:
        return [Phase("all", epochs, self.groups(), self.objective, enter=self._keep)]

    def _keep(self, data: Data) -> None:
        self.data = data


def test_enter_sees_the_data() -> None:
    method = Looks(small_net(), 3)
    train, val, plain = pictures(3), pictures(1), pictures(2)
    next(method.phases(1, train, val, plain))
    assert (method.data.train, method.data.val, method.data.plain) == (train, val, plain)
    method = Looks(small_net(), 3)
    next(method.phases(1, train))
    assert (method.data.train, method.data.val, method.data.plain) == (train, (), train)


# ---------------------------------------------------------------- frozen means frozen


def modes(method: Method) -> dict[str, bool]:
    return {name: module.training for name, module in method.net.named_modules()}


def test_what_does_not_learn_stays_in_eval_mode() -> None:
    method = TwoSteps(small_net(), 3)
    next(method.phases(4, pictures()))
    training = modes(method)
    assert training["4"]
    assert not any(training[name] for name in ("0", "0.1", "0.3", "1", "1.1"))
    method.eval()
    assert not any(modes(method).values())
    method.train()
    assert modes(method) == training
    method.requires_grad_(True)
    method.train()
    assert all(modes(method).values())


def test_a_norm_that_is_left_out_keeps_its_statistics() -> None:
    """Only the norms frozen, in the middle of layers that learn."""

    class NormsFrozen(Plain):
        def plan(self, epochs: int) -> list[Phase]:
            kernels = [g for g in self.groups() if "kernels" in g.name]
            return [Phase("kernels", epochs, kernels, self.objective)]

    method = NormsFrozen(small_net(), 3)
    before = {n: b.clone() for n, b in method.net.named_buffers()}
    walk(method, 2, [])
    after = dict(method.net.named_buffers())
    assert torch.equal(before["0.1.running_mean"], after["0.1.running_mean"])
    assert not torch.equal(before["1.1.running_mean"], after["1.1.running_mean"])  # has nothing to freeze


def test_held_statistics() -> None:
    method = Plain(small_net(), 3)
    method.norm = "eval"
    before = {n: b.clone() for n, b in method.net.named_buffers()}
    walk(method, 1, [])
    assert all(torch.equal(before[n], b) for n, b in method.net.named_buffers())
    method.train()
    assert modes(method)["0.3"]  # dropout is no statistic


# ---------------------------------------------------------------- state


def test_memory_is_saved_moved_and_copied() -> None:
    method = Plain(small_net(), 3)
    method.memory["mask"] = torch.tensor([True, False])
    method.memory["scores"] = torch.rand(3)
    again = Plain(small_net(), 3)
    again.memory["old"] = torch.zeros(9)
    again.load_state_dict(method.state_dict())
    assert list(again.memory) == ["mask", "scores"]
    assert torch.equal(again.memory["mask"], method.memory["mask"])
    assert method.double().memory["scores"].dtype == torch.float64
    assert method.memory["mask"].dtype == torch.bool
    twin = copy.deepcopy(method)
    twin.memory["scores"].zero_()
    assert method.memory["scores"].any()


@pytest.mark.filterwarnings("ignore:.*meta.*no-op")
def test_loaded_memory_lies_where_the_network_lies() -> None:
    method = Plain(small_net(), 3)
    method.memory["scores"] = torch.rand(3)
    state = method.state_dict()
    elsewhere = Plain(small_net().to("meta"), 3)
    elsewhere.load_state_dict(state, assign=False)
    assert elsewhere.memory["scores"].device.type == "meta"


def test_another_source_is_refused() -> None:
    state = WithSource(small_net(), 3).state_dict()
    WithSource(small_net(), 3).load_state_dict(state)
    with pytest.raises(MethodError, match="saved with other source weights"):
        WithSource(small_net(1), 3).load_state_dict(state)


def test_the_source_is_in_no_checkpoint_and_no_parameter() -> None:
    method = WithSource(small_net(), 3)
    assert set(method.state_dict()) == set(Plain(small_net(), 3).state_dict())
    assert len(list(method.parameters())) == len(list(small_net().parameters()))
    assert method.source.net[4].out_features == 7  # as it was given, before the head was replaced


def test_the_source_moves_with_the_method() -> None:
    method = WithSource(small_net(), 3).double()
    assert {p.dtype for _, p in method.source.named_parameters()} == {torch.float64}


def test_a_source_of_its_own() -> None:
    other = small_net(5)
    method = WithSource(small_net(), 3, source=other)
    assert torch.equal(method.source.net[0][0].weight, other[0][0].weight)
    assert method.source.net is not other


def test_no_source_is_an_error() -> None:
    with pytest.raises(MethodError, match="plain keeps no source: set keeps_source = True on Plain"):
        _ = Plain(small_net(), 3).source


# ---------------------------------------------------------------- what it says about itself


class Described(Plain):
    """Has everything.

    Args:
        alpha: α, a strength. 0.1: the paper's default,
            over two lines.
        kind: which.
        watch: names.

    Raises:
        nothing: ever.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        alpha: float = 0.1,
        kind: Literal["a", "b"] = "a",
        watch: list[str] | None = None,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)


def test_hyper_parameters_are_read_from_the_signature() -> None:
    told = Described.hyper()
    assert list(told) == ["alpha", "kind", "watch"]
    about = "α, a strength. 0.1: the paper's default, over two lines."
    assert told["alpha"][:4] == ("alpha", 0.1, float, about)
    assert told["kind"].choices == ["a", "b"]
    assert told["alpha"].choices is None
    assert told["watch"].annotation == list[str] | None
    assert Plain.hyper() == {}


# ---------------------------------------------------------------- odd methods and networks


class Chooser(Plain):
    """Two learners in turn, one of them no part of the network, with rules of their own."""

    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        self.choice = nn.Parameter(torch.zeros(3))

    def plan(self, epochs: int) -> list[Phase]:
        choice = Group("choice", [self.choice], rule=lambda ps: torch.optim.Adam(ps, lr=0.1))
        turns = []
        for i in range(epochs):
            groups = [choice] if i % 2 else self.groups()
            turns.append(Phase(f"turn {i}", 1, groups, self.objective))
        return turns

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        return self.loss(self.net(x) + self.choice, y)


def test_learners_take_turns() -> None:
    method = Chooser(small_net(), 3)
    seen = []
    for phase in method.phases(4, pictures()):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.1)
        before = method.choice.detach().clone(), method.net[4].bias.detach().clone()
        for x, y in pictures():
            method(x, y).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(
            (not torch.equal(before[0], method.choice), not torch.equal(before[1], method.net[4].bias))
        )
    assert seen == [(False, True), (True, False), (False, True), (True, False)]


def test_a_network_without_a_head_is_told_so() -> None:
    with pytest.raises(MethodError, match="No head found in Sequential"):
        Plain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 3)


def test_a_head_that_does_not_exist_is_told_so() -> None:
    with pytest.raises(MethodError, match=r"Unknown head of Sequential '4\.fc'. Allowed: 0\.0, .*4\."):
        Plain(small_net(), 3, head="4.fc")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x.mean((2, 3))))))


def test_tied_weights_are_in_one_group_once() -> None:
    method = Plain(_Tied(), 3)
    learning = [id(p) for g in method.groups() for p in g.params]
    assert len(learning) == len(set(learning)) == len(list(method.parameters()))
    walk(method, 2, [])
    assert method.net.a.weight is method.net.b.weight
    exported = method.export()
    assert exported.get_submodule("a").weight is exported.get_submodule("b").weight


def test_a_batch_of_one_with_batchnorm_works_where_statistics_are_held() -> None:
    method = Plain(small_net(), 3)
    method.norm = "eval"
    next(method.phases(1, pictures()))
    x, y = pictures()[0]
    assert method(x[:1], y[:1]).total.isfinite()
