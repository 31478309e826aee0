"""The evaluation transform is timm's, to the bit; augmentation has the right shape and bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from headstart.data.preprocess import Preprocess
from headstart.data.transforms import augment
from headstart.errors import ConfigError


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("crop_pct", "interpolation"), [(0.875, "bicubic"), (0.95, "bilinear"), (1.0, "lanczos")]
)
def test_equals_timm(mode: str, crop_pct: float, interpolation: str) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    ours = Preprocess.from_dict(
        {"size": 48, "crop_pct": crop_pct, "interpolation": interpolation, "mean": mean, "std": std}
        | {"crop_mode": mode}
    )
    theirs = create_transform(
        (3, 48, 48), crop_pct=crop_pct, interpolation=interpolation, mean=mean, std=std, crop_mode=mode
    )
    for width, height in ((100, 61), (33, 200), (48, 48), (20, 10), (1, 1)):
        image = noise(width, height)
        pixels = torch.from_numpy(ours.plain(image)).permute(2, 0, 1)[None]
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(ours.normalise(pixels)[0], theirs(image), rtol=0, atol=1e-6)


def test_round_trip_and_refusal() -> None:
    made = Preprocess(size=224, mean=(0.5, 0.5, 0.5))
    assert Preprocess.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="Extra inputs"):
        Preprocess.from_dict({"size": 1, "colour": 2})


def test_reduced_keeps_aspect_and_never_enlarges() -> None:
    made = Preprocess(size=64)
    assert made.reduce(noise(400, 300)).size == (106, 80)
    assert made.reduce(noise(1000, 100)).size == (160, 80)
    assert made.reduce(noise(30, 40)).size == (30, 40)
    assert made.reduce(noise(10, 500)).size == (10, 20)


@pytest.mark.parametrize("kind", ["standard", "no-flip", "trivial"])
def test_augment_shapes(kind: str) -> None:
    change = augment(kind, 32, "bicubic")
    for size in ((40, 60), (10, 10), (1, 1)):
        image = change(noise(*size))
        assert image.size == (32, 32) and image.mode == "RGB"


def test_flip_or_not() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], (50, 1, 3)))

    def rising(kind: str) -> set[bool]:
        change = augment(kind, 32)
        views = [np.asarray(change(ramp)).astype(int) for _ in range(40)]
        return {bool(view[16, 31, 0] > view[16, 0, 0]) for view in views}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert rising("standard") == {True, False}
        assert rising("no-flip") == {True}


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'standard'"):
        augment("standart", 32)
