"""The weights of two losses beside the task's."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.parts.balance import Balance
from headstart.parts.memory import Memory


def fed(balance: Balance, *batches: list[float]) -> Memory:
    memory = Memory().double()
    balance.begin(memory)
    memory.double()
    for losses in batches:
        balance.update(memory, torch.tensor(losses, dtype=torch.float64))
    return memory


def test_instantaneous_weights_make_the_terms_equal() -> None:
    """rho = 0: w_i · L_i = L₃ / 2, by hand; together they are as large as the task."""
    losses = [2.5, 4.0, 1.5]
    w = fed(Balance("dynamic", rho=0.0), losses)["weights"]
    assert (w * torch.tensor(losses[:2]).double()).tolist() == [0.75, 0.75]
    w = fed(Balance("dynamic", rho=0.0, kappa=0.4), losses)["weights"]
    torch.testing.assert_close(
        w * torch.tensor(losses[:2]).double(),
        torch.tensor([0.3, 0.3], dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


def test_a_loss_times_c_has_a_weight_by_c() -> None:
    one = fed(Balance("dynamic", rho=0.0), [2.5, 4.0, 1.5])["weights"]
    other = fed(Balance("dynamic", rho=0.0), [5.0, 12.0, 1.5])["weights"]
    torch.testing.assert_close(other, one / torch.tensor([2.0, 3.0]).double(), rtol=1e-12, atol=0)


def test_running_means() -> None:
    """After losses a, b, c they are (rho² a + rho b + c) / (rho² + rho + 1): corrected for beginning at 0."""
    balance = Balance("dynamic", rho=0.9)
    memory = fed(balance, [1.0, 2.0, 3.0], [2.0, 1.0, 0.5], [4.0, 4.0, 1.0])
    shares = 0.9**2 + 0.9 + 1
    expected = [
        (0.81 * a + 0.9 * b + c) / shares for a, b, c in ((1.0, 2.0, 4.0), (2.0, 1.0, 4.0), (3.0, 0.5, 1.0))
    ]
    assert balance.means(memory).tolist() == pytest.approx(expected, rel=1e-12)
    assert memory["weights"].tolist() == pytest.approx(
        [0.5 * expected[2] / expected[0], 0.5 * expected[2] / expected[1]], rel=1e-12
    )


def test_joint() -> None:
    """One weight for both: κ · 1.5 / (2.5 + 4)."""
    w = fed(Balance("joint", rho=0.0, kappa=0.8), [2.5, 4.0, 1.5])["weights"]
    assert w.tolist() == pytest.approx([0.8 * 1.5 / 6.5] * 2, rel=1e-12)


def test_static_stays_and_still_watches() -> None:
    balance = Balance("static", 0.2)
    memory = fed(balance, [2.5, 4.0, 1.5])
    assert memory["weights"].tolist() == pytest.approx([0.1, 0.1])
    assert balance.means(memory).tolist() == pytest.approx([2.5, 4.0, 1.5])


def test_ramp() -> None:
    losses = [2.0, 2.0, 2.0]
    for steps, w in ((1, 0.125), (2, 0.25), (4, 0.5), (6, 0.5)):
        found = fed(Balance("dynamic", ramp=4), *[losses] * steps)["weights"]
        assert found.tolist() == pytest.approx([w, w], rel=1e-12)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_batch_without_numbers_changes_nothing(wrong: float, which: int) -> None:
    losses = [2.0, 3.0, 1.0]
    broken = [wrong if i == which else 9.0 for i in range(3)]
    for rule in ("dynamic", "joint", "rates"):
        before, after = fed(Balance(rule), losses), fed(Balance(rule), losses, broken)
        assert all(torch.equal(before[name], after[name]) for name in before)
        first = fed(Balance(rule), broken)
        assert first["weights"].tolist() == [0.5, 0.5]


def test_rates() -> None:
    """A loss that falls by more than the task's counts for less: κ/2 · exp((r_i - r_3) / 2), by hand."""
    balance = Balance("rates", rho=0.5)
    memory = fed(balance, [4.0, 3.0, 2.0], [2.0, 3.0, 1.5])
    fast = [(0.5 * a + b) / 1.5 for a, b in ((4.0, 2.0), (3.0, 3.0), (2.0, 1.5))]
    slow = [(0.95 * a + b) / 1.95 for a, b in ((4.0, 2.0), (3.0, 3.0), (2.0, 1.5))]
    r = [a / b for a, b in zip(fast, slow, strict=True)]
    expected = [0.5 * math.exp((each - r[2]) / 2) for each in r[:2]]
    assert memory["weights"].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] < 0.5 < expected[1]
    assert fed(balance, [4.0, 3.0, 2.0])["weights"].tolist() == [0.5, 0.5]  # nothing has fallen yet


def seen(balance: Balance, lengths: list[float], cosines: list[float], steps: int = 1) -> Memory:
    memory = fed(balance)
    for _ in range(steps):
        known = tuple(torch.tensor(each, dtype=torch.float64) for each in (lengths, cosines))
        looked = known if balance.looks(memory) else None
        balance.update(memory, torch.ones(3, dtype=torch.float64), gradients=looked)
    return memory


def test_gradients_are_looked_at_now_and_then() -> None:
    memory = seen(Balance("norms", kappa=0.5), [0.8, 2.0], [0.3, -0.3])
    assert memory["weights"].tolist() == pytest.approx([0.2, 0.5])
    assert seen(Balance("cosine"), [0.8, 2.0], [0.3, -0.3])["weights"].tolist() == [0.5, 0]
    looks = []
    for steps in (0, 1, 49, 50, 51, 100):
        memory["steps"].fill_(steps)
        looks.append(Balance("norms").looks(memory))
    assert looks == [True, False, False, True, False, True]
    assert not Balance("dynamic").looks(memory)
    kept = seen(Balance("norms", kappa=0.5), [0.8, 2.0], [0.3, -0.3], steps=7)  # in between they stay
    assert kept["weights"].tolist() == pytest.approx([0.2, 0.5])
    lost = seen(Balance("norms"), [math.inf, 0.4], [math.nan, 0.1])  # a gradient of 0 says nothing
    assert lost["weights"].tolist() == pytest.approx([0.5, 0.2])


def test_the_first_authors_schedule() -> None:
    balance = Balance("schedule")
    memory = fed(balance)
    found = []
    for share in (0.0, 0.3, 1 / 3, 0.49, 0.5, 0.66, 2 / 3, 0.99):
        balance.update(memory, torch.ones(3, dtype=torch.float64), share=share)
        found.append(memory["weights"][0].item())
    assert found == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.1, 0.1, 0, 0], abs=1e-12)


def test_small_losses() -> None:
    balance = Balance("dynamic", rho=0.0)
    assert fed(balance, [1e-6, 0.0, 1.0])["weights"].tolist() == [1, 1]  # clipped
    before = [2.0, 4.0, 1.0]
    noise = fed(balance, before, [1e-6, 1e-6, 1e-5])["weights"]  # a ratio of noise: as it was
    assert noise.tolist() == fed(balance, before)["weights"].tolist()
    late = fed(balance, before, [1e-6, 2.0, 1e-5])["weights"].tolist()  # the other one still counts
    assert late == pytest.approx([0.25, 0.5 * 1e-5 / 2.0], rel=1e-12)


def test_w_max() -> None:
    assert fed(Balance("dynamic", rho=0.0, w_max=0.3), [1.0, 9.0, 1.0])["weights"].tolist() == pytest.approx(
        [0.3, 1 / 18], rel=1e-12
    )
    assert fed(Balance("dynamic", kappa=9.0, w_max=0.3))["weights"].tolist() == pytest.approx([0.3, 0.3])
