"""A routed block against the weighted sum of its copies, and a whole network of them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.routed import blend, divided, partition, policy_network, preferences, rebuilt, routed


def block(seed: int, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()
    )
    for buffer in made.buffers():
        if buffer.is_floating_point():
            buffer.copy_(1 + torch.rand_like(buffer))
    return made.double().eval()


def case(size: int = 9) -> tuple[Tensor, Tensor, nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    x = torch.randn(size, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    chosen = (torch.rand(size, dtype=torch.float64) < 0.5).double().requires_grad_()
    assert 0 < chosen.sum() < size
    return x, chosen, block(1), block(2)


def written_out(chosen: Tensor, tuned: nn.Module, frozen: nn.Module, x: Tensor) -> Tensor:
    m = chosen[:, None, None, None]
    return m * tuned(x) + (1 - m) * frozen(x)


def test_is_the_weighted_sum_with_its_gradients() -> None:
    x, chosen, tuned, frozen = case()
    weight = torch.randn_like(x)
    inputs = [x, chosen, *tuned.parameters()]
    ours, theirs = (how(chosen, tuned, frozen, x) for how in (blend, written_out))
    assert torch.equal(ours, theirs)
    for a, b in zip(
        *(torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_dividing_the_batch_says_the_same_to_the_bit() -> None:
    x, chosen, tuned, frozen = case()
    with torch.no_grad():
        mask = chosen.bool()[:, None, None, None]
        expected = torch.where(mask, tuned(x), frozen(x))
        assert torch.equal(blend(chosen, tuned, frozen, x), expected)
        assert torch.equal(partition(chosen, tuned, frozen, x), expected)
        assert torch.equal(divided(chosen.bool(), tuned, frozen, x), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_one_way(value: float) -> None:
    """Then the other copy need not even work."""
    x, chosen, tuned, frozen = case()
    chosen = torch.full_like(chosen, value)

    def broken(x: Tensor) -> Tensor:
        raise AssertionError("this copy was not asked for")

    sides = (tuned, broken) if value else (broken, frozen)
    expected = (tuned if value else frozen)(x)
    assert torch.equal(partition(chosen, *sides, x), expected)
    with torch.no_grad():
        assert torch.equal(divided(chosen.bool(), tuned, frozen, x), expected)


def test_each_copy_sees_its_own_pictures_only() -> None:
    x, chosen, tuned, frozen = case()
    seen = {"tuned": 0, "frozen": 0}
    tuned.register_forward_hook(lambda _, given, __: seen.update(tuned=len(given[0])))
    frozen.register_forward_hook(lambda _, given, __: seen.update(frozen=len(given[0])))
    partition(chosen, tuned, frozen, x)
    assert seen == {"tuned": int(chosen.sum()), "frozen": len(x) - int(chosen.sum())}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["tuned", "frozen"])
def test_what_overflows_on_the_other_side_stays_there(bad: float, side: str) -> None:
    x, chosen, tuned, frozen = case()
    chosen = torch.full_like(chosen, float(side == "frozen")).requires_grad_()
    poisoned = {"tuned": tuned, "frozen": frozen}[side]

    def overflows(x: Tensor) -> Tensor:
        return poisoned(x) * bad

    sides = (overflows, frozen) if side == "tuned" else (tuned, overflows)
    good = (frozen if side == "tuned" else tuned)(x)
    out = blend(chosen, *sides, x)
    assert torch.equal(out, good)
    (gradient,) = torch.autograd.grad(out.sum(), chosen)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert written_out(chosen, *sides, x).isnan().any()  # which a weighted sum does not keep apart


def test_a_copy_that_nobody_took_gets_no_gradient() -> None:
    x, chosen, tuned, frozen = case()
    blend(torch.zeros_like(chosen).requires_grad_(), tuned, frozen, x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in tuned.parameters())


def test_only_the_pictures_that_took_it_teach_a_copy() -> None:
    x, chosen, tuned, frozen = case()
    ours = torch.autograd.grad(blend(chosen, tuned, frozen, x).sum(), list(tuned.parameters()))
    theirs = torch.autograd.grad(tuned(x[chosen.bool()]).sum(), list(tuned.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_half_precision() -> None:
    x, chosen, tuned, frozen = case()
    with torch.autocast("cpu", torch.bfloat16):
        single = [each.float() for each in (tuned, frozen)]
        start = x.detach().float()
        out = blend(chosen.float(), *single, start)
        assert torch.equal(out, partition(chosen.float(), *single, start))
    gain, _ = torch.autograd.grad(out.float().sum(), [chosen, single[0][0].weight])
    assert gain.dtype == torch.float64


@pytest.mark.parametrize("how", [blend, partition])
def test_copies_of_unequal_shape(how: object) -> None:
    x, chosen, tuned, _ = case()
    other = nn.Conv2d(4, 5, 3, padding=1).double()
    with pytest.raises(MethodError, match=r"unequal shapes, \[.*4, 5, 5\] and \[.*5, 5, 5\]"):
        how(chosen, tuned, other, x)  # type: ignore[operator]


def test_a_block_that_overwrites_its_input() -> None:
    x, chosen, tuned, _ = case()
    overwrites = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1).double())
    with pytest.raises(MethodError, match="overwrites what comes in"):
        blend(chosen, tuned, overwrites, x.detach())


def test_the_layout_stays() -> None:
    x, chosen, tuned, frozen = case()
    x = x.detach().to(memory_format=torch.channels_last)
    for side in (tuned, frozen):
        side.to(memory_format=torch.channels_last)
    for how in (blend, partition):
        assert how(chosen, tuned, frozen, x).is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- the policy


def test_the_policy_looks_at_one_picture_at_a_time() -> None:
    torch.manual_seed(0)
    policy = policy_network(3, 5, width=16, size=16).double().train()
    x = torch.randn(4, 3, 40, 40, dtype=torch.float64)
    together = policy(x)
    assert together.shape == (4, 10)
    alone = torch.cat([policy(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_preferences_are_differences_of_pairs() -> None:
    logits = torch.tensor([[1.0, 3.0, 5.0, 4.0]])
    assert preferences(logits).tolist() == [[2.0, -1.0]]


# ---------------------------------------------------------------- a whole network


def test_a_network_of_routed_blocks_and_its_description() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=7).double().eval()
    source = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    units = [["layer1.0"], ["layer2.0"], ["layer3.0", "layer4.0"]]
    shape = {"width": 8, "size": 16}
    policy = policy_network(3, 3, **shape).double()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    made = routed(net, source, policy, units, x, shape)
    taken = preferences(policy(x)) >= 0
    assert 0 < taken.sum() < taken.numel()

    def mixed(name: str, i: int, h: Tensor) -> Tensor:
        mask = taken[:, i, None, None, None]
        return torch.where(mask, net.get_submodule(name)(h), source.get_submodule(name)(h))

    with torch.no_grad():
        h = net.maxpool(net.act1(net.bn1(net.conv1(x))))
        for name, i in (("layer1.0", 0), ("layer2.0", 1), ("layer3.0", 2), ("layer4.0", 2)):
            h = mixed(name, i, h)
        expected = net.fc(net.global_pool(h))
        torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made(x[:1]), expected[:1], rtol=1e-12, atol=1e-12)

        again = rebuilt(timm.create_model("test_resnet", num_classes=7).double(), made.meta["routed"])
        again.double().load_state_dict(made.state_dict())
        assert torch.equal(again(x), made(x))


class _Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def test_torch_can_write_it_down() -> None:
    """As a program that torch alone can load, for batches of any size; BatchNorm refuses empty ones there."""
    torch.manual_seed(0)
    blocks = (_Shortcut(), _Shortcut())
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    ).eval()
    shape = {"width": 4, "size": 8}
    made = routed(net, net, policy_network(3, 2, **shape), [["1"], ["2"]], torch.zeros(1, 3, 8, 8), shape)
    pictures = torch.export.Dim("pictures")
    program = torch.export.export(made, (torch.randn(3, 3, 8, 8),), dynamic_shapes=({0: pictures},))
    with torch.no_grad():
        for size in (1, 5):
            x = torch.randn(size, 3, 8, 8)
            torch.testing.assert_close(program.module()(x), made(x))
