"""Every installed method keeps the contract of `headstart.testing`, and the contract sees who does not."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from headstart import registry, testing
from headstart.method import Data, Group, Loss, Method, Phase, Room
from headstart.records import Recipe, Run
from headstart.testing import CHECKS, ON_RANKS, Case, ContractError, Ranks, cases_of, check_method, run_check

METHODS = registry.everything()

# A few pairs, across strides too: along all of them, on every network, looking ahead takes minutes. As they
# come, `test_all_pairs_of_layers` looks at them on one.
HYPER: dict[str, dict[str, Any]] = {"l2t-w": {"pairs": "1-1,2-2"}, "l2t-ww": {"pairs": "1-1,1-2,2-1"}}

# On six validation pictures transtailor says, rightly, that tau means little.
pytestmark = pytest.mark.filterwarnings("ignore:tau = ")


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Case]]:
    return {cls.name: cases_of(cls, hyper=HYPER.get(cls.name)) for cls in METHODS}


@pytest.fixture(scope="module")
def ranks(cases: dict[str, dict[str, Case]]) -> dict[str, Ranks]:
    """All methods in one pair of processes: starting these takes longer than all checks.

    The odd ones below go with them; the one that breaks costs a second pair for those after it.
    """
    together = {name: testing.for_ranks(each) for name, each in cases.items()}
    odd = (SumsOverTheBatch, MeasuresOnOneRank, FailsOnOneRank, DriftsApart)
    together |= {cls.__name__: Case(cls, tiny_net()) for cls in odd}
    looks = together["hybrid-forward"]  # at gradients, within its objective
    together["norms"] = dataclasses.replace(looks, hyper={**looks.hyper, "balance": "norms"})
    return dict(zip(together, testing.two_ranks(list(together.values())), strict=True))


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in ON_RANKS])
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_contract(cls: type[Method], name: str, cases: dict[str, dict[str, Case]]) -> None:
    run_check(name, cases[cls.name])


@pytest.mark.parametrize("name", list(HYPER))
def test_all_pairs_of_layers(name: str) -> None:
    checks = ["what_learns_changes", "resumes_bit_equal", "keeps_its_type", "stays_finite_in_bf16"]
    cls = next(each for each in METHODS if each.name == name)
    make = testing.networks()["BatchNorm (test_resnet)"]
    assert set(check_method(cls, make_net=make, only=checks).values()) == {"holds"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RANKS)
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_contract_on_ranks(
    cls: type[Method], name: str, cases: dict[str, dict[str, Case]], ranks: dict[str, Ranks]
) -> None:
    run_check(name, cases[cls.name], ranks=ranks[cls.name])


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
def test_presets_name_fields_of_a_recipe(cls: type[Method]) -> None:
    for preset in cls.presets.values():
        registry.configure(cls, None, preset.hyper)  # the values fit
        for key in preset.recipe:
            assert key in Run.model_fields
        Recipe(**{"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0} | _recipe_fields(preset.recipe))


def _recipe_fields(recipe: Any) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key in Recipe.model_fields}


# ---------------------------------------------------------------- the contract sees who breaks it


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 7),
    )


class Good(Method):
    """Plain, and keeps everything.

    Args:
        strength: of nothing. 1.
    """

    name = "good"
    room: ClassVar[Room] = "baseline"
    paper = "none"
    keeps_source = True

    def __init__(
        self, net: nn.Module, classes: int | None = None, *, strength: float = 1.0, **given: Any
    ) -> None:
        super().__init__(net, classes, **given)
        self.strength = strength


class PartsMissing(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        loss = super().objective(x, y)
        return loss._replace(total=loss.total + 1)


class LogitsAttached(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        return super().objective(x, y)._replace(logits=self.net(x))


class LosesEpochs(Good):
    def plan(self, epochs: int) -> list[Phase]:
        return [Phase("all", epochs // 2 * 2, self.groups(), self.objective)]


class GroupsTwice(Good):
    def plan(self, epochs: int) -> list[Phase]:
        return [Phase("all", epochs, [*self.groups(), *self.groups()], self.objective)]


class LeakyFreeze(Good):
    """Freezes weights the usual wrong way: running statistics go on."""

    def plan(self, epochs: int) -> list[Phase]:
        head = [Group("head", list(self.head_module.parameters()))]
        return [Phase("head", epochs, head, self._leaky)]

    def _leaky(self, x: Tensor, y: Tensor) -> Loss:
        self.net.train()
        return super().objective(x, y)


class IdleGroup(Good):
    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        self.chooser = nn.Parameter(torch.zeros(3))

    def plan(self, epochs: int) -> list[Phase]:
        return [Phase("all", epochs, [*self.groups(), Group("chooser", [self.chooser])], self.objective)]


class LearningSource(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        with torch.no_grad():
            next(self.source.net.parameters()).mul_(0.9)
        return super().objective(x, y)


class AliasedSource(Good):
    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        next(self.source.net.parameters()).data = next(self.net.parameters()).data


class ForgetsOnResume(Good):
    """Keeps state where no checkpoint looks."""

    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        self.steps = 0

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        self.steps += 1
        return self.loss(self.net(x) * (1 + 0.1 * self.steps), y)


class ForeignDice(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        import random

        return self.loss(self.net(x) * random.random(), y)


class TakesAnySource(Good):
    def set_extra_state(self, state: Any) -> None:
        self._at, self._epochs_done, self._entered = state["at"], state["epochs_done"], state["entered"]


class CopyHoldsOriginal(Good):
    """Its list of weights is hidden from deepcopy."""

    def __init__(self, net: nn.Module, classes: int | None = None, **given: Any) -> None:
        super().__init__(net, classes, **given)
        weights = list(self.net.parameters())
        self.pull = lambda: sum(weight.square().sum() for weight in weights)

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        return self.loss(self.net(x), y, pull=self.pull())


class SinglePrecision(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        return self.loss(self.net(x).float(), y)


class Overflows(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        logits = self.net(x)
        far = 1e39 if logits.dtype == torch.bfloat16 else 0.0
        return self.loss(logits, y, far=logits.sum() * far)


class ExportsSomethingElse(Good):
    def export(self) -> nn.Module:
        net = super().export()
        with torch.no_grad():
            next(net.parameters()).add_(0.1)
        return net


class ExportsItself(Good):
    def export(self) -> nn.Module:
        return self.net.requires_grad_(True).eval()


class ExportsHeadstart(Good):
    def export(self) -> nn.Module:
        return nn.Sequential(super().export(), _Ours())


class _Ours(nn.Module):
    __module__ = "headstart.parts.somewhere"

    def forward(self, x: Tensor) -> Tensor:
        return x


class PeeksAtTheBatch(Good):
    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x) - super().predict(x).mean(0)


class Undescribed(Good):
    """No Args."""


class Positional(Good):
    def __init__(self, net: nn.Module, classes: int | None = None, strength: float = 1.0, **given: Any):
        super().__init__(net, classes, **given)


class Talks(Good):
    @classmethod
    def fits(cls, net: nn.Module, data: Any) -> str | None:
        return "two\nlines"


class HardLabelsOnly(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        return super().objective(x, y.argmax(-1) * 0 if y.ndim == 2 else y)


class SumsOverTheBatch(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        logits = self.net(x)
        return self.loss(logits, y, more=logits.square().sum())


class DriftsApart(Good):
    """What each rank does to itself after the phase began is its own."""

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        self.memory["seen"] = y.float().sum() + x.sum()
        return super().objective(x, y)


class MeasuresOnOneRank(Good):
    """Adds memory on some ranks only, and only one of them wants to stop: `agree` has to settle it."""

    def plan(self, epochs: int) -> list[Phase]:
        return [
            Phase("measure", 0, [], self.objective, enter=self._measure),
            Phase("train", epochs, self.groups(), self.objective),
        ]

    def _measure(self, data: Data) -> bool | None:
        import torch.distributed as dist

        if not dist.is_initialized():
            return None
        if dist.get_rank() == 0:
            self.memory["mask"] = torch.randn(4, 3).t() > 0  # [3, 4], not contiguous, bool
            return None
        self.memory["only here"] = torch.ones(2)
        self.memory["mask"] = torch.ones(7)
        return False


class FailsOnOneRank(Good):
    def objective(self, x: Tensor, y: Tensor) -> Loss:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("rank 1 broke on purpose")
        return super().objective(x, y)


BROKEN = [
    (PartsMissing, "parts_add_up"),
    (LogitsAttached, "logits_are_detached"),
    (LosesEpochs, "plans_add_up"),
    (GroupsTwice, "plans_add_up"),
    (LeakyFreeze, "frozen_means_frozen"),
    (IdleGroup, "what_learns_changes"),
    (LearningSource, "source_stays_as_it_was"),
    (AliasedSource, "source_stays_as_it_was"),
    (ForgetsOnResume, "resumes_bit_equal"),
    (ForeignDice, "resumes_bit_equal"),
    (TakesAnySource, "refuses_another_source"),
    (CopyHoldsOriginal, "copies_are_independent"),
    (SinglePrecision, "keeps_its_type"),
    (Overflows, "stays_finite_in_bf16"),
    (ExportsSomethingElse, "export_says_what_predict_says"),
    (ExportsItself, "export_says_what_predict_says"),
    (ExportsHeadstart, "export_is_plain"),
    (PeeksAtTheBatch, "predicts_each_picture_alone"),
    (Undescribed, "declares_its_hyper_parameters"),
    (Positional, "declares_its_hyper_parameters"),
    (HardLabelsOnly, "takes_class_shares"),
]


@pytest.mark.parametrize(("cls", "check"), BROKEN, ids=[cls.__name__ for cls, _ in BROKEN])
def test_sees_what_is_broken(cls: type[Method], check: str) -> None:
    case = {"tiny": Case(cls, tiny_net())}
    with pytest.raises(ContractError, match=check):
        run_check(check, case)


def test_good_is_good() -> None:
    """So that each of the broken ones fails for its own reason."""
    case = {"tiny": Case(Good, tiny_net())}
    for check in {check for _, check in BROKEN}:
        assert run_check(check, case) == "holds"


def test_describes_itself_wants_the_paper() -> None:
    with pytest.raises(ContractError, match="must have a passage 'Paper:'"):
        run_check("describes_itself", {"tiny": Case(Good, tiny_net())})


def test_fits_must_be_one_line() -> None:
    with pytest.raises(ContractError, match="one line"):
        run_check("says_whether_it_fits", {"tiny": Case(Talks, tiny_net())})


def test_fits_nothing() -> None:
    with pytest.raises(ContractError, match="fits none of the networks"):
        cases_of(Talks)


def test_ranks_that_sum_do_not_average(ranks: dict[str, Ranks]) -> None:
    assert ranks["SumsOverTheBatch"].apart is None
    assert "averaged and joined gradients differ" in str(ranks["SumsOverTheBatch"].gradients)


def test_a_rank_that_breaks_is_named_and_the_next_method_goes_on(ranks: dict[str, Ranks]) -> None:
    assert "rank 1 broke on purpose" in str(ranks["FailsOnOneRank"].apart)


def test_ranks_that_drift_apart_are_seen(ranks: dict[str, Ranks]) -> None:
    assert "two ranks differ in: memory.seen" in str(ranks["DriftsApart"].apart)


def test_what_one_rank_measured_is_settled(ranks: dict[str, Ranks]) -> None:
    assert ranks["MeasuresOnOneRank"] == Ranks(None, None)


def test_gradients_that_an_objective_looks_at_are_those_of_the_joined_batch(ranks: dict[str, Ranks]) -> None:
    assert ranks["norms"] == Ranks(None, None)


def test_a_local_class_is_told_why_it_cannot_be_checked_on_ranks() -> None:
    class Local(Good):
        pass

    assert "cannot import" in str(testing.two_ranks([Case(Local, tiny_net())])[0].apart)


# ---------------------------------------------------------------- known failures


class Excused(PartsMissing):
    known_failures: ClassVar[dict[str, str]] = {"parts_add_up": "the constant is the paper's"}


class WronglyExcused(Good):
    known_failures: ClassVar[dict[str, str]] = {"parts_add_up": "was once so"}


class Misspelt(Good):
    known_failures: ClassVar[dict[str, str]] = {"parts_ad_up": "?"}


def test_known_failure_is_reported_with_its_reason() -> None:
    report = check_method(Excused, make_net=tiny_net, only=["parts_add_up", "plans_add_up"])
    assert report == {"parts_add_up": "known failure: the constant is the paper's", "plans_add_up": "holds"}


def test_known_failure_that_holds_is_refused() -> None:
    with pytest.raises(ContractError, match="take the note away"):
        check_method(WronglyExcused, make_net=tiny_net, only=["parts_add_up"])


def test_known_failure_of_no_check_is_refused() -> None:
    with pytest.raises(ContractError, match="Did you mean 'parts_add_up'"):
        check_method(Misspelt, make_net=tiny_net)


def test_unknown_check_is_refused() -> None:
    with pytest.raises(ContractError, match="Did you mean 'plans_add_up'"):
        check_method(Good, make_net=tiny_net, only=["plan_adds_up"])


def test_all_failures_come_at_once() -> None:
    with pytest.raises(ContractError) as raised:
        check_method(PartsMissing, make_net=tiny_net, only=["parts_add_up", "describes_itself"])
    assert "parts_add_up" in str(raised.value)
    assert "describes_itself" in str(raised.value)
