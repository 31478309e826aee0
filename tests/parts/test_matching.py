"""Which stages of two networks are compared, and what weighs them."""

from __future__ import annotations

import pytest
import torch

from headstart.errors import MethodError
from headstart.parts.matching import Chooser, candidates, evenness, mismatch, to_map, to_size
from headstart.parts.segments import Boundary


def stages(*strides: int, kind: str = "map") -> list[Boundary]:
    size = 32
    return [
        Boundary(f"stage{i}", 4, stride, kind, (size // stride, size // stride), 1 if kind == "tokens" else 0)  # type: ignore[arg-type]
        for i, stride in enumerate(strides)
    ]


RESNET = stages(2, 4, 8, 16, 32)
VIT = stages(*[16] * 12, kind="tokens")


def test_all_is_all_without_the_stem() -> None:
    inner = [(m, n) for m in range(1, 5) for n in range(1, 5)]
    assert candidates(RESNET, RESNET, "all", reach=8) == inner
    near = [(m, n) for m, n in inner if abs(m - n) <= 2]
    assert candidates(RESNET, RESNET, "all", reach=4) == near


def test_without_two_deep_stages_the_stem_counts() -> None:
    assert candidates(stages(1, 2, 4), stages(1, 2), "one2one", reach=4) == [(0, 0), (1, 1)]


def test_of_a_transformer_four_blocks_are_taken() -> None:
    assert candidates(VIT, stages(8, 16), "all", reach=4) == [(m, n) for m in (2, 5, 8, 11) for n in (0, 1)]


def test_one2one_and_single_have_equal_strides() -> None:
    lite = stages(2, 4, 8, 8, 16, 32)  # the last of a stride counts
    assert candidates(lite, RESNET, "one2one", reach=4) == [(1, 1), (3, 2), (4, 3), (5, 4)]
    assert candidates(lite, RESNET, "single", reach=4) == [(5, 4)]
    assert candidates(VIT, VIT, "one2one", reach=4) == [(m, m) for m in (2, 5, 8, 11)]
    assert candidates(VIT, RESNET, "one2one", reach=4) == [(11, 3)]
    assert candidates(VIT, RESNET, "single", reach=4) == [(11, 3)]


def test_pairs_by_number_may_be_any() -> None:
    assert candidates(RESNET, RESNET, "0-4, 2-2,0-4", reach=1) == [(0, 4), (2, 2)]


@pytest.mark.parametrize(
    ("asked", "ours", "message"),
    [
        ("1-5", RESNET, "pairs names 1-5, which is not there. The source has 0: stage0"),
        ("1:5", RESNET, "'1:5' cannot be read"),
        ("", RESNET, "'' cannot be read"),
        ("one2one", stages(64), "No two stages have the same stride: try pairs = all"),
        ("all", stages(512), "No two stages have strides within a factor of 4"),
    ],
)
def test_what_cannot_be_paired(asked: str, ours: list[Boundary], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        candidates(RESNET, ours, asked, reach=4)


def test_a_chooser_starts_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    chooser = Chooser(5, what=True, where=True)
    shares, strength = chooser(torch.randn(3, 5))
    torch.testing.assert_close(shares, torch.full((3, 5), 0.2))
    assert chooser.where is not None
    assert chooser.where.bias.item() == 1
    assert chooser.where.weight.abs().max() <= 5**-0.5
    assert evenness(shares).item() == pytest.approx(1)
    assert strength.shape == (3,)
    assert not list(Chooser(5, what=False, where=False).parameters())


def test_golden() -> None:
    """Two pictures, two channels, one position: d = [[1, 4], [9, 0]], w = [[½, ½], [1, 0]], λ = [2, 1].

    By hand: (2 · (½ + 2) + 1 · 9) / 2 = 7.
    """
    theirs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])[:, :, None, None]
    shares, strength = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([2.0, 1.0])
    assert float(mismatch(theirs, torch.zeros(2, 2, 1, 1), shares, strength)) == 7


def test_sizes_that_a_factor_would_miss() -> None:
    assert to_size(torch.randn(1, 2, 11, 7), (15, 61)).shape == (1, 2, 15, 61)
    x = torch.randn(1, 2, 4, 4)
    assert to_size(x, (4, 4)) is x


def test_tokens_are_normalised_and_maps_are_not() -> None:
    torch.manual_seed(0)
    tokens = 100 * torch.randn(2, 5, 4)
    made = to_map(VIT[0], tokens, norm_tokens=True)
    assert made.shape == (2, 4, 2, 2)
    torch.testing.assert_close(made.mean(1), torch.zeros(2, 2, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(made.var(1, unbiased=False), torch.ones(2, 2, 2), rtol=1e-3, atol=0)
    assert float(to_map(VIT[0], tokens, norm_tokens=False).abs().max()) > 10
    x = torch.randn(2, 4, 2, 2, dtype=torch.bfloat16)
    assert torch.equal(to_map(RESNET[3], x, norm_tokens=True), x.float())


def test_evenness_of_one_channel_and_of_certainty() -> None:
    assert float(evenness(torch.ones(3, 1))) == 1
    assert float(evenness(torch.tensor([[1.0, 0.0]]))) == 0
