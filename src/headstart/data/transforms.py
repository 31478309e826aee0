"""How a picture changes while a network learns from it; at evaluation it is prepared by `Preprocess`."""

from __future__ import annotations

from torchvision.transforms import InterpolationMode, v2

from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, unknown

__all__ = ["KINDS", "Preprocess", "augment"]

KINDS = ("standard", "no-flip", "trivial", "none")


def augment(kind: str, size: int, interpolation: str = "bilinear") -> v2.Transform:
    """The transform of a training picture: a Pillow image -> a Pillow image of size x size.

    Args:
        kind: 'standard' (random crop of 35 to 100 % of the area and flip), 'no-flip', 'trivial' (standard,
            then TrivialAugmentWide, arXiv 2103.10158); 'none' has no transform, use `Preprocess.picture`.
        size: pixels of each side.
        interpolation: as in `Preprocess`.

    Raises:
        ConfigError: a kind that does not exist.
    """
    if kind not in KINDS or kind == "none":
        raise ConfigError(unknown("augmentation", kind, KINDS))
    mode = InterpolationMode(interpolation)
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=mode, antialias=True)
    ]
    if kind != "no-flip":
        steps.append(v2.RandomHorizontalFlip())
    if kind == "trivial":
        steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.NEAREST, fill=[128, 128, 128]))
    return v2.Compose(steps)
