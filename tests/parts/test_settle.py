"""Frozen means statistics too."""

from __future__ import annotations

from torch import nn

from headstart.parts.statistics import has_batchnorm, settle


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()),
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Dropout()),
    )


def training(module: nn.Module) -> set[str]:
    return {name for name, each in module.named_modules() if each.training and name}


def test_a_frozen_part_is_in_eval_mode_with_all_that_is_in_it() -> None:
    module = net().train()
    module[0].requires_grad_(False)
    settle(module)
    assert training(module) == {"1", "1.0", "1.1", "1.2"}


def test_one_learning_weight_keeps_its_part_in_training() -> None:
    module = net().train()
    module.requires_grad_(False)
    module[0][0].bias.requires_grad_(True)
    settle(module)
    assert training(module) == {"0", "0.0", "0.2"}  # the norm beside it is frozen


def test_held_statistics() -> None:
    module = net().train()
    settle(module, hold_statistics=True)
    assert training(module) == {"0", "0.0", "0.2", "1", "1.0", "1.2"}


def test_has_batchnorm() -> None:
    assert has_batchnorm(net())
    assert has_batchnorm(nn.SyncBatchNorm(3))
    assert not has_batchnorm(nn.Sequential(nn.LayerNorm(3), nn.InstanceNorm2d(3)))
