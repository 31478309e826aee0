"""Grad-CAM of a prediction, against the formula written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from headstart.data.picture import open_picture
from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError
from headstart.nets.architecture import Architecture
from headstart.parts.taps import Tap, find_taps, watching
from headstart.ship.engines import Torch
from headstart.ship.explain import Explainer, as_maps
from headstart.ship.predict import Predictor

pytest.importorskip("pytorch_grad_cam")

CLASSES = ["left", "right", "else"]


def predictor(net: nn.Module, size: int) -> Predictor:
    return Predictor(Torch(net.eval(), Preprocess(size=size), "cpu"), CLASSES, Preprocess(size=size))


def noise(size: tuple[int, int] = (90, 70)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [("test_resnet", 64, {}), ("test_vit", 64, {"img_size": 64}), ("test_convnext", 64, {})],
)
def test_the_heat_is_that_of_the_formula(
    name: str, size: int, arguments: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Architecture(name, 3, arguments).build()
    ours = predictor(net, size)
    image = noise()
    heat = Explainer(ours, tmp_path / "why").heat(image, "right")
    assert heat.shape == (size, size) and heat.min() >= 0 and heat.max() <= 1 + 1e-6

    x = ours.preprocess.normalise(torch.from_numpy(ours.prepare(image)).permute(2, 0, 1)[None])
    tap = find_taps(net, torch.zeros(1, 3, size, size))[-1]
    with watching(net, [tap]) as seen:
        logits = net(x)
    (gradient,) = torch.autograd.grad(logits[0, 1], seen[tap.name])
    maps, slopes = as_maps(seen[tap.name], tap)[0], as_maps(gradient, tap)[0]
    weights = slopes.mean((1, 2))
    expected = (weights[:, None, None] * maps).sum(0).clamp(min=0).detach().numpy()
    if expected.max() == 0:
        assert heat.max() == 0
        return
    # The heat is that map, stretched to 0..1 and to the picture's size.
    where = np.unravel_index(expected.argmax(), expected.shape)
    cell = size // expected.shape[0]
    there = tuple(slice(i * cell, (i + 1) * cell) for i in where)
    assert heat[there].max() == pytest.approx(heat.max(), abs=0.15)


def test_tokens_and_channels_in_the_back_become_maps() -> None:
    tokens = torch.arange(2 * 17 * 5.0).view(2, 17, 5)  # one class token, 4 x 4 positions
    maps = as_maps(tokens, Tap("x", -1, 5, 17, 16))
    assert maps.shape == (2, 5, 4, 4)
    assert torch.equal(maps[1, :, 0, 0], tokens[1, 1]) and torch.equal(maps[1, :, 3, 3], tokens[1, 16])
    back = torch.rand(2, 4, 3, 5)
    assert torch.equal(as_maps(back, Tap("x", -1, 5, 12, 16)), back.permute(0, 3, 1, 2))


def test_pictures_are_written_beside_each_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = predictor(Architecture("test_resnet", 3).build(), 64)
    paths = [tmp_path / "a" / "cat.png", tmp_path / "b" / "cat.png"]
    for path in paths:
        path.parent.mkdir()
        noise().save(path)
    explainer = Explainer(ours, tmp_path / "deep" / "why")
    written = [explainer.write(row) for row in ours.predict(paths)]
    assert len(set(written)) == 2
    for path in written:
        assert open_picture(path).size == (64, 64) and path.name.startswith("cat-")


def test_networks_without_maps_are_refused(tmp_path: Path) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(ModelError, match="cannot be explained"):
        Explainer(predictor(flat, 16), tmp_path / "why")
