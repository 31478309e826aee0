"""Where a picture's label comes from: Grad-CAM, by the library grad-cam, laid over the picture.

    M = ReLU( Σ_c  mean_{positions} ∂z_label/∂A_c  ·  A_c )

A are the maps of the last stage of the network (Selvaraju et al., ICCV 2017, arXiv 1610.02391). Warm places
speak for the label. It shows where the network looks, not whether it is right to look there.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headstart.data.picture import open_picture
from headstart.errors import ConfigError, MethodError, ModelError, OutputError, first_line
from headstart.parts.taps import Tap, find_taps
from headstart.ship.predict import Prediction, Predictor


class Explainer:
    """Writes explanations of predictions.

    Args:
        predictor: loaded with engine="torch".
        folder: where the pictures go; it is made.

    Raises:
        ConfigError: grad-cam is not installed.
        ModelError: the network has no stage whose maps could be looked at.
        OutputError: the folder cannot be made.
    """

    def __init__(self, predictor: Predictor, folder: str | Path) -> None:
        try:
            from pytorch_grad_cam import GradCAM
        except ImportError as error:
            raise ConfigError(
                "Explanations take the package grad-cam: pip install 'headstart[explain]'"
            ) from error
        self._predictor, self.folder = predictor, Path(folder)
        net, size = predictor.net, predictor.preprocess.size
        try:
            self._tap = find_taps(net, torch.zeros(1, 3, size, size))[-1]
        except MethodError as error:
            raise ModelError(f"This network cannot be explained: {first_line(error)}") from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror or error}.") from error
        self._cam = GradCAM(
            model=net,
            target_layers=[net.get_submodule(self._tap.name)],
            reshape_transform=lambda out: as_maps(out, self._tap),
        )

    def heat(self, image: Image.Image, label: str) -> np.ndarray:
        """How much each pixel speaks for a label: float32 [S, S], 0 to 1.

        Args:
            image: of any size, mode RGB.
            label: one of the classes.
        """
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        pixels = torch.from_numpy(self._predictor.prepare(image)).permute(2, 0, 1)[None]
        x = self._predictor.preprocess.normalise(pixels)
        target = ClassifierOutputTarget(self._predictor.classes.index(label))
        with torch.enable_grad():
            heat: np.ndarray = np.nan_to_num(self._cam(input_tensor=x, targets=[target])[0])
        return heat

    def picture(self, image: Image.Image, label: str) -> Image.Image:
        """The picture as the network takes it, with the heat laid over it."""
        from pytorch_grad_cam.utils.image import show_cam_on_image

        seen = self._predictor.prepare(image).astype(np.float32) / 255
        return Image.fromarray(show_cam_on_image(seen, self.heat(image, label), use_rgb=True))

    def write(self, said: Prediction) -> Path:
        """Write the explanation of a prediction; gives the file.

        Raises:
            OutputError: it cannot be written.
        """
        assert said.label is not None
        # Pictures of one name may come from several folders.
        mark = hashlib.sha256(said.path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        path = self.folder / f"{Path(said.path).stem}-{mark}.png"
        try:
            self.picture(open_picture(said.path), said.label).save(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
        return path


def as_maps(out: Tensor, tap: Tap) -> Tensor:
    """What a tap gives, as maps [B, C, H, W]: channels may come last, and positions in a row of tokens."""
    out = out.movedim(tap.axis, 1)  # [B, C, ...]
    if out.ndim == 3:  # tokens; those in front of a square of them are no positions
        side = math.isqrt(out.shape[2])
        out = out[:, :, out.shape[2] - side * side :].reshape(*out.shape[:2], side, side)
    return out
