"""From a finished run to a bundle, and what the bundle says without the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import headstart
from conftest import paint
from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, DataError, ModelError
from headstart.ship import bundle, folder, verify
from headstart.ship import run as runs
from headstart.ship.export import Exported, export
from headstart.ship.predict import load


class Shipped(NamedTuple):
    pictures: Path
    run: Path
    out: Path
    done: Exported


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Shipped]:
    """A tiny run, exported once in every format."""
    here = tmp_path_factory.mktemp("shipped")
    pictures = paint(here / "pictures", per_class=60, size=48)
    (pictures / "class_a" / "broken.png").write_bytes(b"no picture")
    headstart.train(pictures, model=str(tiny_model), out=here / "run", method="full", epochs=3, batch_size=8)
    told: list[str] = []
    done = export(
        here / "run",
        here / "out",
        formats=("safetensors", "onnx", "pt2"),
        with_preprocessing=True,
        say=told.append,
    )
    assert told == []
    yield Shipped(pictures, here / "run", here / "out", done)


def some(pictures: Path, n: int = 12) -> list[Path]:
    return sorted(pictures.rglob("0*.png"))[:: max(1, 180 // n)][:n]


@pytest.mark.slow
def test_every_form_is_there_and_verified(shipped: Shipped) -> None:
    names = {path.name for path in shipped.out.iterdir()}
    assert names == {
        *("config.json", "labels.json", "preprocess.json", "calibration.json", "model.safetensors"),
        *("model.onnx", "model-from-pixels.onnx", "model.pt2"),
        *("README.md", "verification.json", "SHA256SUMS"),
    }
    said = json.loads((shipped.out / "verification.json").read_text())
    forms = said["formats"]
    assert set(forms) == {"timm", "model.safetensors", "model.onnx", "model-from-pixels.onnx", "model.pt2"}
    for name, each in forms.items():
        assert each["pictures"] == each["agreed"] >= 50
        limit = 0.02 if name == "model-from-pixels.onnx" else 1e-5
        assert each["largest_difference"] < limit and each["on"].endswith(".png")
    assert said["held_out"] and said["not_written"] == {} and "onnxruntime" in said["versions"]
    assert shipped.done.verified == forms


def test_the_round_trip_in_a_folder_elsewhere(shipped: Shipped, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shipped.out, tmp_path / "elsewhere" / "model"))
    by_torch, by_onnx = load(moved, engine="torch"), load(moved, engine="onnx")
    trained = load(shipped.run)
    assert by_onnx.engine == load(moved).engine == "onnx" and by_torch.engine == trained.engine == "torch"
    paths = some(shipped.pictures)
    pixels = np.stack([trained.prepare(Image.open(path)) for path in paths])
    expected = trained.logits(pixels)
    x = trained.preprocess.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{moved}", pretrained=True).eval()(x).numpy()
        by_pt2 = torch.export.load(moved / "model.pt2").module()(x).numpy()
    for said in (by_torch.logits(pixels), by_onnx.logits(pixels), by_timm, by_pt2):
        np.testing.assert_allclose(said, expected, atol=1e-5)
    rows = [each.predict(paths) for each in (by_torch, by_onnx)]
    assert [row.label for row in rows[0]] == [row.label for row in rows[1]]
    assert [row.unsure for row in rows[0]] == [row.unsure for row in rows[1]]


def test_the_batch_is_free_and_the_file_says_what_it_is(shipped: Shipped) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(shipped.out / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        (said,) = session.run(["logits"], {"pixels": np.zeros((batch, 3, 32, 32), np.float32)})
        assert said.shape == (batch, 3)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["headstart.classes"]) == ["class_a", "class_b", "class_c"]
    assert Preprocess.from_dict(json.loads(about["headstart.preprocess"])).size == 32


def test_pictures_of_any_size_go_into_the_file_with_preprocessing(shipped: Shipped) -> None:
    import onnxruntime

    file = shipped.out / "model-from-pixels.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ours = load(shipped.out, engine="onnx")
    rng = np.random.default_rng(0)
    for width, height in ((48, 48), (37, 91), (120, 33), (20, 25)):
        rough = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        image = rough.resize((width, height), Image.Resampling.BICUBIC)
        given = {"picture": np.asarray(image)[None]}
        logits, probabilities = session.run(["logits", "probabilities"], given)
        said = ours.look([image])[0]
        at = [said.probabilities[name] for name in ours.classes]
        np.testing.assert_allclose(probabilities[0], at, atol=0.02)
        np.testing.assert_allclose(probabilities, ours.calibration.probabilities(logits), atol=1e-6)


def test_nothing_is_pickled(shipped: Shipped) -> None:
    archive = zipfile.ZipFile(shipped.out / "model.pt2")
    for name in archive.namelist():
        content = archive.read(name)
        assert not name.endswith(".pkl") and not content.startswith((b"\x80", b"PK")), name
    for path in shipped.out.iterdir():
        if path.suffix != ".pt2":
            assert b"ctorch._utils" not in path.read_bytes() and path.suffix not in (".pkl", ".bin", ".pt")


ALONE = """
import sys
for gone in {gone!r}:
    sys.modules[gone] = None
import headstart
rows = headstart.load({folder!r}, engine={engine!r}).predict({paths!r})
assert all(row.label for row in rows), rows
ours = sorted(name for name in sys.modules if name.startswith("headstart.") and sys.modules[name])
print("\\n".join(ours))
"""


@pytest.mark.parametrize(
    ("engine", "gone"),
    [
        ("onnx", ["torch", "torchvision", "timm", "safetensors", "sklearn", "accelerate", "scipy"]),
        ("torch", ["onnxruntime", "onnx", "onnxscript", "sklearn", "accelerate"]),
    ],
)
def test_a_moved_bundle_needs_no_training_code(
    engine: str, gone: list[str], shipped: Shipped, tmp_path: Path
) -> None:
    """In a fresh process that has one engine alone, the loaded modules are listed."""
    moved = shutil.copytree(shipped.out, tmp_path / "moved")
    code = ALONE.format(gone=gone, folder=str(moved), engine=engine, paths=[str(some(shipped.pictures)[0])])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rooms = {name.split(".")[1] for name in done.stdout.split()}
    assert not rooms & {"training", "methods", "method", "registry", "comparison", "testing", "cli"}
    if engine == "onnx":
        assert not rooms & {"nets", "parts"}


def test_the_card_says_what_people_should_know(shipped: Shipped) -> None:
    text = (shipped.out / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "timm" and header["license"] == "apache-2.0"
    metrics = header["model-index"][0]["results"][0]["metrics"]
    result = json.loads((shipped.run / "result.json").read_text())
    assert metrics[0]["value"] == pytest.approx(result["test"]["accuracy"], abs=1e-4)
    assert "(n=36)" in metrics[0]["name"]
    for piece in (
        "108 train, 36 val, 36 test",
        "60% train, 20% val, 20% test",
        "headstart train pictures --model tiny --method full --epochs 3 --batch-size 8",
        "inherited from the source weights",
        "Weights kept: last",
        "no 'none of these'",
        "36 test pictures are few",
        "get the same label",
        "are marked `unsure`",
        "model-from-pixels.onnx",
    ):
        assert piece in text, piece
    assert str(shipped.pictures.parent) not in text, "no path of this machine"
    assert str(shipped.pictures.parent) not in (shipped.out / "config.json").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| test | 36 |"))
    assert row.count("[") == 4, "an interval for every score"


def test_sums_are_those_of_coreutils(shipped: Shipped) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shipped.out, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 10


@pytest.mark.parametrize("name", ["model.onnx", "labels.json", "preprocess.json", "calibration.json"])
def test_missing_and_altered_files_are_named(name: str, shipped: Shipped, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shipped.out, tmp_path / "moved"))
    content = (moved / name).read_bytes()
    (moved / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(ModelError, match=rf"{name}' was altered: its SHA-256 is [0-9a-f]{{12}}"):
        load(moved, engine="onnx")
    (moved / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(moved, engine="onnx")


def test_a_wrong_number_of_labels(shipped: Shipped, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(shipped.out, tmp_path / "moved"))
    (moved / "labels.json").write_text('["a", "b"]')
    folder.write_sums(moved)
    for engine in ("onnx", "torch"):
        with pytest.raises(ModelError, match="names 2 classes, and its network has 3"):
            load(moved, engine=engine)


class Wrong(nn.Module):
    """Another network of the same shape."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = -self.net(x)
        return said


def test_a_form_that_says_something_else_fails_with_the_picture(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart.ship import export as room

    real = room.to_pt2
    monkeypatch.setattr(room, "to_pt2", lambda net, *rest, **named: real(Wrong(net), *rest, **named))
    with pytest.raises(
        verify.Disagreement, match=r"model\.pt2 form .* of '.*/class_.*\.png' it says 'class_"
    ):
        export(shipped.run, tmp_path / "out", formats=("pt2",))
    assert list(tmp_path.iterdir()) == [], "nothing is left"


class Odd(nn.Module):
    """A layer whose operation ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x.mean((2, 3))[:, :, None] + x.flatten(2))[1]


class Turning(nn.Module):
    """A layer whose way depends on what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.amax((2, 3))


def own(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(nn.ReLU(), layer)).eval()


@pytest.mark.parametrize(
    ("layer", "left_out", "why"),
    [
        (Odd(), {"model.onnx"}, r"linalg_svd has no ONNX form; it is in the layer '1\.1' \(Odd\)"),
        (Turning(), {"model.onnx", "model.pt2"}, r"cannot follow the layer '1\.1' \(Turning\)"),
    ],
)
def test_what_onnx_cannot_say_is_named_and_the_rest_is_written(
    layer: nn.Module, left_out: set[str], why: str, tmp_path: Path
) -> None:
    from headstart.ship import export as room

    net = own(layer)
    kept = bundle.Bundle(net, ["a", "b", "c"], Preprocess(size=16), None, {})
    refused = room._write(tmp_path, ("onnx", "pt2"), kept, kept.calibration, with_preprocessing=True)
    assert set(refused) == left_out
    assert all(re.search(why, each) for each in refused.values()), refused
    assert (tmp_path / "model.pt2").exists() == ("model.pt2" not in left_out)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"formats": ("onyx",)}, "Unknown format 'onyx'. Did you mean 'onnx'?"),
        ({"formats": ()}, "one format or more"),
        ({"formats": ("pt2",), "with_preprocessing": True}, "ask for the format onnx too"),
        ({"accuracy": 95.0}, "between 0 and 1"),
        ({"pictures": 3}, "50 pictures or more"),
    ],
)
def test_impossible_wishes(wish: dict[str, Any], message: str, shipped: Shipped, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        export(shipped.run, tmp_path / "out", **wish)


def test_pictures_that_are_gone_or_few(shipped: Shipped, tmp_path: Path) -> None:
    run = Path(shutil.copytree(shipped.run, tmp_path / "run"))
    with pytest.raises(DataError, match="Say where they lie now with --data"):
        export(run, tmp_path / "out", formats=("safetensors",), data=tmp_path / "nowhere")
    alone = Path(shutil.copytree(run / "model", tmp_path / "alone"))
    with pytest.raises(ConfigError, match="give a folder with --data"):
        export(alone, tmp_path / "out", formats=("safetensors",))
    told: list[str] = []
    few = shipped.pictures / "class_b"
    done = export(alone, tmp_path / "out", formats=("safetensors",), data=few, say=told.append)
    assert done.verified["model.safetensors"]["pictures"] == 60 and told == []
    unchecked = export(alone, tmp_path / "out", formats=("safetensors",), check=False)
    assert unchecked.verified == {}
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["formats"] == {}


def test_the_static_form_of_a_routed_network_is_scored_anew(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    headstart.train(
        pictures, model=str(tiny_model), out=tmp_path / "run", method="spottune", epochs=1, batch_size=8
    )
    with pytest.raises(ModelError, match="nothing to settle"):
        headstart.train(
            pictures, model=str(tiny_model), out=tmp_path / "plain", method="probe", epochs=1, batch_size=8
        )
        export(tmp_path / "plain", tmp_path / "no", formats=("safetensors",), static=True)
    both = {}
    for name, static in (("dynamic", False), ("static", True)):
        done = export(tmp_path / "run", tmp_path / name, formats=("safetensors",), static=static)
        both[name] = load(tmp_path / name, engine="torch")
        assert done.verified["model.safetensors"]["agreed"] == 15
        assert done.calibration.val is not None and done.calibration.val.n == 6
    assert "timm" in done.verified, "an ordinary network again"
    assert type(both["static"].net).__name__ == "ResNet"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert both["dynamic"].card["test"]["accuracy"] == result["test"]["accuracy"]
    paths = runs.held_out(runs.of_model(tmp_path / "run" / "model"))[:9]  # type: ignore[arg-type]
    right = np.mean([row.label == Path(row.path).parent.name for row in both["static"].predict(paths)])
    assert both["static"].card["test"]["accuracy"] == pytest.approx(right)
    assert "one ordinary network in the place" in (tmp_path / "static" / "README.md").read_text()
