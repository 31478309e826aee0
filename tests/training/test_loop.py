"""The loop on tiny networks and made-up pictures: what it promises, one promise a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headstart.errors import TrainingError
from headstart.method import Data, Method, Phase
from headstart.methods.baseline.full import Full
from headstart.methods.baseline.lp_ft import LPFT
from headstart.methods.baseline.probe import Probe
from headstart.methods.constrain.l2_sp import L2SP
from headstart.records import Recipe
from headstart.training.events import Reporter
from headstart.training.loop import Fitted, fit
from headstart.training.machine import Machine

RECIPE = Recipe(optimizer="sgd", lr=0.05, weight_decay=1e-3, label_smoothing=0.0)


class Pictures:
    """Batches whose order and noise are a function of the epoch alone."""

    def __init__(self, n: int = 24, batch: int = 8, soft: bool = False) -> None:
        self.epoch, self.n, self.batch, self.soft = 0, n, batch, soft

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(1000 + self.epoch)
        y = torch.arange(self.n) % 3
        x = torch.randn(self.n, 3, 8, 8, generator=random) + y.view(-1, 1, 1, 1)
        order = torch.randperm(self.n, generator=random)
        for i in range(0, self.n, self.batch):
            labels = y[order[i : i + self.batch]]
            yield (
                x[order[i : i + self.batch]],
                nn.functional.one_hot(labels, 3).float() if self.soft else labels,
            )

    def __len__(self) -> int:
        return -(-self.n // self.batch)


def make_net() -> nn.Module:
    torch.manual_seed(7)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


def train(method: Method, folder: Path | None = None, epochs: int = 4, **given: Any) -> Fitted:
    options: dict[str, Any] = {"recipe": RECIPE, "machine": Machine("cpu"), "train": Pictures()} | given
    return fit(method, val=list(Pictures()), plain=list(Pictures()), epochs=epochs, folder=folder, **options)


class Killed(BaseException):
    pass


class KillAfter(Reporter):
    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def epoch(self, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


class TwoPhases(Method):
    """First the head, then everything; measures something on entering."""

    name = "two-phases"
    room = "baseline"
    paper = "none"

    def plan(self, epochs: int) -> list[Phase]:
        head = [group for group in self.groups() if group.name.startswith("head")]
        return [
            Phase("head", epochs // 2, head, self.objective),
            Phase("all", epochs - epochs // 2, self.groups(), self.objective, enter=self.measure),
        ]

    def measure(self, data: Data) -> None:
        self.memory["drawn"] = torch.randn(3)
        self.memory["seen"] = next(iter(data.train))[0].mean()  # augmented, so it depends on the epoch


@pytest.mark.parametrize("cls", [Full, L2SP, LPFT, TwoPhases])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_killed_after_any_epoch_and_resumed_is_bit_equal(
    cls: type[Method], ema: float | None, tmp_path: Path
) -> None:
    recipe = RECIPE.model_copy(update={"ema": ema})
    straight = cls(make_net(), 3)
    (tmp_path / "s").mkdir()
    train(straight, tmp_path / "s", recipe=recipe)
    for stop in (1, 2, 3, 4):
        folder = tmp_path / str(stop)
        folder.mkdir()
        with pytest.raises(Killed):
            train(cls(make_net(), 3), folder, recipe=recipe, reporter=KillAfter(stop))
        resumed = cls(make_net(), 3)
        fitted = train(resumed, folder, recipe=recipe)
        for name, value in straight.net.state_dict().items():
            assert torch.equal(value, resumed.net.state_dict()[name]), (stop, name)
        for name in straight.memory.state_dict():
            assert torch.equal(straight.memory[name], resumed.memory[name]), (stop, name)
        assert len(fitted.history) == 4
        assert 0 < fitted.before <= sum(phase.seconds for phase in fitted.phases)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 4
        assert [json.loads(line)["loss"] for line in lines] == [
            json.loads(line)["loss"] for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()
        ]


def test_the_loop_is_indifferent_to_the_random_state_around_it() -> None:
    one, two = Full(make_net(), 3), Full(make_net(), 3)
    train(one)
    torch.randn(17)
    train(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_it_learns() -> None:
    fitted = train(Full(make_net(), 3), epochs=8)
    assert fitted.history[-1]["loss"] < 0.5 * fitted.history[0]["loss"]
    assert fitted.history[-1]["val_accuracy"] > 0.9


def test_gradient_accumulation_takes_the_same_steps() -> None:
    nets = []
    for micro in (1, 4):
        method = Full(make_net(), 3).double()
        method.norm = "eval"
        method.net[3].p = 0.0

        class Double(Pictures):
            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return ((x.double(), y) for x, y in super().__iter__())

        fit(
            method,
            train=Double(),
            val=[],
            plain=[],
            recipe=RECIPE,
            epochs=2,
            machine=Machine("cpu"),
            grad_accum=micro,
        )
        nets.append(method)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_a_loss_that_is_not_a_number_stops_at_its_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Bad(Pictures):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for i, (x, y) in enumerate(super().__iter__()):
                yield (x * float("nan") if self.epoch == 2 and i == 1 else x), y

    method = Full(make_net(), 3)
    with pytest.raises(TrainingError, match=r"nan in phase 'fine-tune', epoch 3, step 2\."):
        train(method, tmp_path, train=Bad())
    with pytest.raises(TrainingError, match=r"--clip 1\.$"):  # there is no checkpoint yet to speak of
        train(Full(make_net(), 3), recipe=RECIPE.model_copy(update={"lr": 1e30}))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(saved["history"]) == 2
    assert all(value.isfinite().all() for value in saved["method"].values() if isinstance(value, Tensor))


def test_patience_ends_training_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"lr": 1e-12, "schedule": "constant", "warmup": 0.0, "norm": "eval"})
    method = Full(make_net(), 3, head_lr=0.0)
    method.norm = "eval"
    fitted = train(method, epochs=20, recipe=recipe, patience=3, keep="best")
    assert len(fitted.history) < 20
    assert fitted.kept.startswith("best, epoch ")


def test_best_means_the_weights_of_the_epoch_with_the_lowest_validation_loss() -> None:
    recipe = RECIPE.model_copy(update={"lr": 2.0, "schedule": "constant", "warmup": 0.0})
    method = Full(make_net(), 3)
    fitted = train(method, epochs=6, recipe=recipe, keep="best")
    losses = [record["val_log_loss"] for record in fitted.history]
    assert fitted.kept == f"best, epoch {losses.index(min(losses)) + 1}"
    method.eval()
    x, y = (torch.cat(each) for each in zip(*Pictures(), strict=True))
    with torch.no_grad():
        again = nn.functional.cross_entropy(method.predict(x), y).item()
    assert again == pytest.approx(min(losses), rel=1e-4)


def test_soft_labels_train_too() -> None:
    fitted = train(Full(make_net(), 3), train=Pictures(soft=True))
    assert fitted.history[-1]["train_accuracy"] > 0.5


def test_a_method_that_is_done_on_entering_has_a_time_and_no_epochs() -> None:
    fitted = train(Probe(make_net(), 3))
    assert [(phase.name, phase.epochs) for phase in fitted.phases] == [("solve head", 0)]
    assert fitted.phases[0].seconds > 0
    assert fitted.history == []


def test_the_phases_are_timed_and_their_epochs_counted() -> None:
    fitted = train(TwoPhases(make_net(), 3), epochs=5)
    assert [(phase.name, phase.epochs) for phase in fitted.phases] == [("head", 2), ("all", 3)]


def test_rates_follow_the_schedule_and_the_groups() -> None:
    seen: list[list[float]] = []

    class Watching(Full):
        def objective(self, x: Tensor, y: Tensor) -> Any:
            return super().objective(x, y)

    class Machine2(Machine):
        def step(self, method: Any, optimizer: Any, x: Tensor, y: Tensor, **more: Any) -> Any:
            seen.append([group["lr"] for group in optimizer.param_groups])
            return super().step(method, optimizer, x, y, **more)

    train(Watching(make_net(), 3, head_lr=10.0), epochs=2, machine=Machine2("cpu"))
    for rates in seen:
        assert max(rates) == pytest.approx(10 * min(rates))
    assert min(seen[-1]) < 0.1 * min(seen[0])


def test_clipping_bounds_the_step() -> None:
    recipe = RECIPE.model_copy(update={"clip": 1e-9, "weight_decay": 0.0, "norm": "eval"})
    method = Full(make_net(), 3)
    before = [p.detach().clone() for p in method.parameters()]
    train(method, epochs=1, recipe=recipe)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(before, method.parameters(), strict=True))


def test_bf16_trains_and_stays_float32() -> None:
    method = Full(make_net(), 3)
    fitted = train(method, epochs=3, machine=Machine("cpu", "bf16"))
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert {p.dtype for p in method.parameters()} == {torch.float32}
