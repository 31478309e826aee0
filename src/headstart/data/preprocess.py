"""What a network takes of a picture, in Pillow and NumPy alone: prediction needs no more than these."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from headstart.records import Record

if TYPE_CHECKING:
    from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


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

    @property
    def side(self) -> int:
        """Pixels to which a picture is resized before it is cropped."""
        return math.floor(self.size / self.crop_pct)

    def picture(self, img: Image.Image) -> Image.Image:
        """Resize and crop: a Pillow RGB image of any size -> one of size x size."""
        side = self.side
        if self.crop_mode == "squash":
            img = self._resized(img, side, side)
        elif self.crop_mode == "border":
            longest = max(img.width, img.height) / side
            img = self._resized(img, max(1, round(img.width / longest)), max(1, round(img.height / longest)))
            img = _padded(img, self.size, self.size, tuple(round(255 * value) for value in self.mean))
        else:
            img = self._short_side(img, side)
        return _cropped(img, self.size, self.size)

    def plain(self, img: Image.Image) -> np.ndarray:
        """A Pillow RGB image of any size -> uint8 [size, size, 3]."""
        return np.array(self.picture(img))

    def normalise(self, batch: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 of the same shape, minus the mean, by the standard deviation."""
        import torch

        mean = torch.tensor(self.mean, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
        return batch.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """The same without torch, bit for bit: uint8 [B, S, S, 3] -> float32 [B, 3, S, S]."""
        out = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        out /= np.float32(255.0)
        out -= np.asarray(self.mean, dtype=np.float32).reshape(1, 3, 1, 1)
        out /= np.asarray(self.std, dtype=np.float32).reshape(1, 3, 1, 1)
        return out

    def reduce(self, img: Image.Image) -> Image.Image:
        """The picture as augmentation wants it: short side 1.25 × size, never enlarged, aspect kept.

        The long side keeps at most twice the short one, by a centre crop.
        """
        short, long = sorted(img.size)
        if long > 2 * short:
            img = _cropped(img, min(img.width, 2 * short), min(img.height, 2 * short))
        side = round(1.25 * self.size)
        return self._short_side(img, side) if short > side else img

    def _short_side(self, img: Image.Image, side: int) -> Image.Image:
        """Short side as given, the other in proportion, cut off to whole pixels."""
        if img.width <= img.height:
            return self._resized(img, side, int(side * img.height / img.width))
        return self._resized(img, int(side * img.width / img.height), side)

    def _resized(self, img: Image.Image, width: int, height: int) -> Image.Image:
        if img.size == (width, height):
            return img
        return img.resize((width, height), resample=Image.Resampling[self.interpolation.upper()])


def _cropped(img: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of a picture; black where it is smaller. Half pixels go to the even side."""
    img = _padded(img, width, height, (0, 0, 0))
    left, top = round((img.width - width) / 2), round((img.height - height) / 2)
    return img.crop((left, top, left + width, top + height))


def _padded(img: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    """Add borders where a side is shorter than asked; the odd pixel goes right and below."""
    wide, high = max(0, width - img.width), max(0, height - img.height)
    if not wide and not high:
        return img
    return ImageOps.expand(img, (wide // 2, high // 2, (wide + 1) // 2, (high + 1) // 2), fill=fill)
