"""Regressors between maps, and the distance of maps of unlike sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headstart.errors import MethodError
from headstart.parts.regressor import common_size, regressor_between, resized, squared_distance


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "layers"),
    [
        ("auto", 4, 4, [nn.Identity]),
        ("auto", 4, 6, [nn.Conv2d]),
        ("identity", 4, 4, [nn.Identity]),
        ("conv1x1", 4, 4, [nn.Conv2d]),
        ("conv+bn", 4, 6, [nn.Conv2d, nn.BatchNorm2d]),
        ("conv+bn+relu", 4, 6, [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]),
    ],
)
def test_kinds(kind: str, ours: int, theirs: int, layers: list[type[nn.Module]]) -> None:
    made = regressor_between(kind, ours, theirs)  # type: ignore[arg-type]
    assert [type(each) for each in (made if isinstance(made, nn.Sequential) else [made])] == layers
    assert made(torch.randn(2, ours, 3, 5)).shape == (2, theirs, 3, 5)


def test_a_bias_where_no_norm_takes_it_away() -> None:
    assert regressor_between("conv1x1", 4, 6).bias is not None
    assert next(iter(regressor_between("conv+bn", 4, 6).children())).bias is None


def test_the_identity_needs_as_many_channels() -> None:
    with pytest.raises(MethodError, match=r"here 4 would have to be 6\. Use conv1x1, or auto"):
        regressor_between("identity", 4, 6)


def test_a_1x1_convolution_is_a_linear_layer_at_each_position() -> None:
    torch.manual_seed(0)
    made = regressor_between("conv1x1", 3, 2).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    by_hand = torch.einsum("oc,bchw->bohw", made.weight[:, :, 0, 0], x) + made.bias[:, None, None]
    torch.testing.assert_close(made(x), by_hand, rtol=1e-12, atol=1e-14)


def test_height_and_width_are_compared_apart() -> None:
    one, other = torch.zeros(1, 2, 3, 10), torch.zeros(1, 5, 4, 7)
    assert common_size(one, other) == common_size(other, one) == (3, 7)


def test_resizing_averages() -> None:
    """By hand: the means of the four quarters of 0 … 15."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resized(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resized(x, (4, 4)) is x
    assert resized(torch.randn(1, 1, 14, 14), (11, 5)).shape[2:] == (11, 5)


def test_every_position_counts() -> None:
    x = torch.randn(1, 1, 56, 56, requires_grad=True)
    resized(x, (7, 7)).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 64))


def test_the_distance_is_at_least_float32() -> None:
    """By hand: 300² is 90000; in bfloat16, 8 bits of precision, it would be 90112."""
    low, high = torch.full((1, 1, 1, 1), 300.0), torch.zeros(1, 1, 1, 1)
    assert squared_distance(low.bfloat16(), high.bfloat16()).item() == 90000
    assert squared_distance(low.double(), high).dtype == torch.float64
