"""From a picture to what a network takes: at evaluation (`Preprocess`) and while it learns (`augment`)."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from headstart.errors import ConfigError, unknown
from headstart.records import Record

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
KINDS = ("standard", "no-flip", "trivial", "none")


class Preprocess(Record):
    """What a checkpoint expects of a picture; the same in training, scoring and prediction.

    Resizing, cropping and padding are timm's evaluation transform, step for step, on Pillow images.
    """

    size: int = Field(ge=1, description="pixels of each side of the input")
    crop_pct: float = Field(0.875, gt=0, description="share of the resized side that the crop keeps")
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: Literal["center", "squash", "border"] = "center"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocess:
        """Read back what `to_dict` gave."""
        return cls.model_validate(data)

    def picture(self, img: Image.Image) -> Image.Image:
        """Resize and crop: a Pillow RGB image of any size -> one of size x size."""
        side = math.floor(self.size / self.crop_pct)
        mode = InterpolationMode(self.interpolation)
        if self.crop_mode == "squash":
            img = F.resize(img, [side, side], interpolation=mode)
        elif self.crop_mode == "border":
            longest = max(img.width, img.height) / side
            shape = [max(1, round(img.height / longest)), max(1, round(img.width / longest))]
            img = F.resize(img, shape, interpolation=mode)
            img = _pad(img, self.size, tuple(round(255 * value) for value in self.mean))
        else:
            img = F.resize(img, [side], interpolation=mode)
        cropped: Image.Image = F.center_crop(img, [self.size, self.size])
        return cropped

    def plain(self, img: Image.Image) -> np.ndarray:
        """A Pillow RGB image of any size -> uint8 [size, size, 3]."""
        return np.array(self.picture(img))

    def normalise(self, batch: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 of the same shape, minus the mean, by the standard deviation."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
        return batch.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    def reduce(self, img: Image.Image) -> Image.Image:
        """The picture as augmentation wants it: short side 1.25 × size, never enlarged, aspect kept.

        The long side keeps at most twice the short one, by a centre crop.
        """
        short, long = sorted(img.size)
        if long > 2 * short:
            img = F.center_crop(img, [min(img.height, 2 * short), min(img.width, 2 * short)])
        side = round(1.25 * self.size)
        if short > side:
            img = F.resize(img, [side], interpolation=InterpolationMode(self.interpolation))
        return img


def _pad(img: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    """Add borders where a side is shorter than `size`; the odd pixel goes right and below."""
    wide, high = max(0, size - img.width), max(0, size - img.height)
    padding = [wide // 2, high // 2, (wide + 1) // 2, (high + 1) // 2]
    padded: Image.Image = F.pad(img, padding, fill=list(fill))
    return padded


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
