"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os

# Before torch is imported anywhere: on small tensors more threads only cost, and workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of two workers none is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What importing made stays: to look through it after every run takes a third of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Python ends as it does without us; libraries say otherwise that they leak."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the cache of the person who runs it."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def paint(folder: Path, *, classes: int = 3, per_class: int = 12, size: int = 40, seed: int = 0) -> Path:
    """A folder of class folders with noisy pictures whose colour tells their class."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        here = folder / f"class_{'abcdefghij'[c]}"
        here.mkdir(parents=True, exist_ok=True)
        hue = np.array([(c == k) * 120 + 60 for k in range(3)]) if c < 3 else rng.integers(0, 200, 3)
        for i in range(per_class):
            pixels = hue + rng.integers(-50, 50, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(here / f"{i:03d}.png")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """36 small pictures in three classes."""
    return paint(tmp_path / "pictures")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model folder in timm's layout: a ResNet of 0.5 M weights for 32 pixels, random but fixed."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    net = timm.create_model("test_resnet", num_classes=7)
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    save_for_hf(net, folder, model_config={"pretrained_cfg": config}, safe_serialization=True)
    return folder
