"""The source network: copied, fingerprinted, never touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.parts.frozen import Frozen, fingerprint


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))


def test_a_copy_that_shares_nothing() -> None:
    given = net().train()
    frozen = Frozen(given)
    theirs = {p.untyped_storage().data_ptr() for p in given.parameters()}
    assert all(p.untyped_storage().data_ptr() not in theirs for _, p in frozen.named_parameters())
    assert not any(p.requires_grad for _, p in frozen.named_parameters())
    assert all(p.requires_grad for p in given.parameters())
    assert given.training


def test_it_is_always_in_eval_mode_and_makes_no_graph() -> None:
    frozen = Frozen(net())
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    before = frozen.net[1].running_mean.clone()
    out = frozen(x)
    assert not out.requires_grad
    assert torch.equal(out, frozen(x))
    assert torch.equal(frozen.net[1].running_mean, before)


def test_it_moves() -> None:
    frozen = Frozen(net())
    before = frozen.fingerprint
    frozen.apply(lambda t: t.double() if t.is_floating_point() else t)
    assert frozen(torch.randn(2, 3, 5, 5, dtype=torch.float64)).dtype == torch.float64
    assert frozen.fingerprint == before  # of the weights as they were given


def test_fingerprint_tells_any_change() -> None:
    base = fingerprint(net())
    assert fingerprint(net()) == base
    seen = {base}
    for name in net().state_dict():
        changed = net()
        value = changed.state_dict()[name]
        value.view(-1)[0] += 1
        seen.add(fingerprint(changed))
    seen.add(fingerprint(net().double()))
    renamed = nn.Sequential()
    for name, child in net().named_children():
        renamed.add_module("x" + name, child)
    seen.add(fingerprint(renamed))
    assert len(seen) == len(net().state_dict()) + 3


def test_fingerprint_takes_any_kind_of_tensor() -> None:
    odd = nn.Module()
    odd.register_buffer("empty", torch.zeros(0, 3))
    odd.register_buffer("scalar", torch.tensor(3))
    odd.register_buffer("mask", torch.tensor([True, False]))
    odd.register_buffer("brain", torch.ones(3, dtype=torch.bfloat16))
    odd.register_buffer("wave", torch.ones(3, dtype=torch.complex64))
    odd.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    assert len(fingerprint(odd)) == 64
    straight = fingerprint(odd)
    odd.turned = odd.turned.contiguous()
    assert fingerprint(odd) == straight  # values, not how they lie in memory


class _WithExtra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_fingerprint_of_a_network_with_state_that_is_no_tensor() -> None:
    assert len(fingerprint(_WithExtra(2, 2))) == 64


def test_frozen_answers_like_the_network() -> None:
    given = net().eval()
    x: Tensor = torch.randn(2, 3, 5, 5)
    assert torch.equal(Frozen(given)(x), given(x))
