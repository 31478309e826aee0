from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from headstart.errors import ConfigError
from headstart.methods.baseline.full import Full
from headstart.records import Recipe
from headstart.training.machine import Machine, Placed


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Machine("auto").device.type == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu"])
def test_a_device_that_is_not_here_is_said_so(device: str) -> None:
    with pytest.raises(ConfigError, match=r"device|Device"):
        Machine(device)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Machine("cpu", "fp16")


def test_machines_of_different_precision_follow_one_another() -> None:
    assert Machine("cpu", "bf16").accelerator.mixed_precision == "bf16"
    assert Machine("cpu", "fp32").accelerator.mixed_precision == "no"


def test_measuring_the_layout_changes_nothing() -> None:
    net = timm.create_model("test_efficientnet")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    machine = Machine("cpu")
    machine.choose_layout(net, torch.randn(2, 3, 32, 32, generator=torch.Generator()), None)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(machine.channels_last, bool)


@pytest.mark.parametrize("asked", [True, False])
def test_the_layout_that_was_asked_for_is_used(asked: bool) -> None:
    machine = Machine("cpu")
    net = nn.Conv2d(3, 4, 3)
    machine.choose_layout(net, torch.zeros(1, 3, 8, 8), asked)
    machine.place(net)
    layout = torch.channels_last if asked else torch.contiguous_format
    assert net.weight.is_contiguous(memory_format=layout)
    (x, y) = next(iter(Placed([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], machine)))
    assert x.is_contiguous(memory_format=layout)
    assert len(y) == 2


def test_channels_last_computes_the_same_up_to_rounding() -> None:
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 2
    losses = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        method = Full(timm.create_model("test_resnet").double(), 2)
        machine = Machine("cpu")
        machine.channels_last = channels_last
        machine.place(method)
        (phase,) = method.phases(1, [], [])
        optimizer = machine.optimizer(phase, Recipe(optimizer="sgd", lr=0.1, weight_decay=0))
        for _ in range(3):
            loss = machine.step(method, optimizer, machine.lay(x.double()), y)
        losses.append(float(loss.total))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_recipe_reaches_the_optimiser(name: str) -> None:
    machine = Machine("cpu")
    method = Full(timm.create_model("test_resnet"), 2, head_lr=10.0)
    (phase,) = method.phases(1, [], [])
    recipe = Recipe(optimizer=name, lr=0.3, momentum=0.8, weight_decay=0.2)  # type: ignore[arg-type]
    optimizer = machine.optimizer(phase, recipe)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(3.0 if group["name"].startswith("head") else 0.3)
        assert group["weight_decay"] == (0.2 if group["name"].endswith("kernels") else 0.0)
        assert group.get("momentum", group.get("betas", (0,))[0]) == 0.8


def test_the_peak_grows_with_what_is_held() -> None:
    machine = Machine("cpu")
    machine.start_memory()
    before = machine.peak_memory_mb()
    held = torch.ones(64, 1024, 1024)
    assert machine.peak_memory_mb() > before + 200
    del held


def test_a_measured_layout_is_remembered_and_a_broken_note_does_no_harm(tmp_path: Path) -> None:
    notes = tmp_path / "cache" / "layouts.json"
    net, x = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)
    Machine("cpu").choose_layout(net, x, None, notes)
    (key,) = json.loads(notes.read_text())
    for remembered in (True, False):
        notes.write_text(json.dumps({key: remembered}))
        machine = Machine("cpu")
        machine.choose_layout(net, x, None, notes)
        assert machine.channels_last is remembered
    notes.write_text("{broken")
    Machine("cpu").choose_layout(net, x, None, notes)
    assert list(json.loads(notes.read_text())) == [key]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="other allocators give it back")
def test_what_an_earlier_run_freed_is_no_memory_of_this_one() -> None:
    machine = Machine("cpu")
    machine.start_memory()
    before = machine.peak_memory_mb()
    held = [torch.ones(2**14) for _ in range(4000)]  # 250 MiB in pieces that glibc keeps
    pin = torch.ones(2**14)  # and that cannot be cut off at the end
    del held
    assert machine.peak_memory_mb() > before + 200
    machine.start_memory()
    assert machine.peak_memory_mb() < before + 100
    del pin
