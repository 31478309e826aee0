import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError, OutputError
from headstart.nets.zoo import Pretrained, load
from headstart.parts.head import find_head, replace_head
from headstart.ship import bundle

CLASSES = ["ant", "bee", "Käfer"]
CARD: dict[str, Any] = {
    "method": "l2-sp",
    "paper": "A paper (2018)",
    "model": "test_resnet",
    "origin": "a file",
    "licence": "mit",
    "counts": {"train": 30, "val": 10, "test": 10},
    "seed": 3,
    "val": {"n": 10, "accuracy": 0.9, "log_loss": 0.31},
    "test": {"n": 10, "accuracy": 0.8, "log_loss": 0.42},
}


def tuned(name: str, img_size: int | None = None) -> Pretrained:
    """A network with a head for three classes, as after training."""
    torch.manual_seed(0)
    found = load(name, pretrained=name == "efficientnet-lite0", img_size=img_size)
    head = find_head(found.net)
    replace_head(found.net, head, 3)
    nn.init.normal_(found.net.get_submodule(head).weight, std=0.1)  # type: ignore[arg-type]
    found.net.eval()
    return found


def write(folder: Path, found: Pretrained, **changed: Any) -> Path:
    given = {"config": found.config, "preprocess": found.preprocess, "classes": CLASSES, "card": CARD}
    bundle.save(folder, found.net, **{**given, **changed})
    return folder


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.conv(x).mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("efficientnet-lite0", 96),
        ("test_resnet", None),
        ("test_convnext", 64),
        ("test_vit", 64),
        ("vit_small_patch14_dinov2.lvd142m", 28),  # published without a head
    ],
)
def test_timm_and_headstart_give_the_network_back(name: str, img_size: int | None, tmp_path: Path) -> None:
    found = tuned(name, img_size)
    folder = write(tmp_path / "model", found)
    x = torch.randn(2, 3, found.preprocess.size, found.preprocess.size)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = bundle.read(folder)
    with torch.inference_mode():
        expected = found.net(x)
        assert torch.equal(by_timm(x), expected)
        assert torch.equal(ours.net(x), expected)
    assert ours.classes == CLASSES and ours.preprocess == found.preprocess
    assert ours.card["test"]["accuracy"] == 0.8
    assert list(by_timm.pretrained_cfg["label_names"]) == CLASSES
    theirs = timm.data.resolve_model_data_config(by_timm)
    assert tuple(theirs["input_size"]) == (3, found.preprocess.size, found.preprocess.size)
    for key in ("crop_pct", "interpolation", "crop_mode"):
        assert theirs[key] == getattr(found.preprocess, key)
    assert tuple(theirs["mean"]) == found.preprocess.mean and tuple(theirs["std"]) == found.preprocess.std


def test_a_bundle_is_a_starting_point_again(tmp_path: Path) -> None:
    found = tuned("test_vit", 64)
    again = load(str(write(tmp_path / "model", found)))
    assert again.preprocess == found.preprocess and again.licence == "mit"
    assert again.matched is not None and again.matched.matched == again.matched.total
    assert torch.equal(again.net.state_dict()["head.weight"], found.net.state_dict()["head.weight"])


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "deep" / "er" / "model", tuned("test_resnet"))
    names = {path.name for path in folder.iterdir()}
    plain = {"config.json", "labels.json", "preprocess.json", "README.md", "SHA256SUMS"}
    assert names == plain | {"model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing temporary is left"
    assert json.loads((folder / "labels.json").read_text()) == CLASSES
    assert Preprocess.from_dict(json.loads((folder / "preprocess.json").read_text())).size == 160
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "mit"
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit" and header["library_name"] == "timm"
    assert (
        "| test | 10 | 0.8000 [0.490, 0.943] | 0.4200 |" in card
        and "A paper (2018)" in card
        and "Käfer" in card
    )
    assert "30 train, 10 val, 10 test" in card


def test_a_model_is_replaced_and_other_things_are_not(tmp_path: Path) -> None:
    found = tuned("test_resnet")
    folder = write(tmp_path / "model", found)
    write(folder, found, classes=["x", "y", "z"])
    assert bundle.read(folder).classes == ["x", "y", "z"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        write(other, found)
    with pytest.raises(OutputError, match="is a file"):
        write(other / "thesis.txt", found)
    assert (other / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_written_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned("test_resnet")
    folder = write(tmp_path / "model", found)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(folder, found, classes=["x", "y", "z"])
    assert bundle.read(folder).classes == CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        write(tmp_path / "file" / "model", tuned("test_resnet"))


def test_networks_of_ones_own_say_that_they_have_to_be_brought(tmp_path: Path) -> None:
    own = Own().eval()
    preprocess = Preprocess(size=32)
    folder = tmp_path / "model"
    bundle.save(folder, own, config=None, preprocess=preprocess, classes=CLASSES, card={})
    with pytest.raises(ModelError, match=r"Own, which timm cannot build by name.*net="):
        bundle.read(folder)
    with pytest.raises(ModelError, match="names no timm architecture"):
        load(str(folder))
    again = bundle.read(folder, Own())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.net(x), own(x)) and again.preprocess == preprocess and again.config is None
    assert "cannot build this network" in (folder / "README.md").read_text()
    with pytest.raises(ModelError, match="do not fit"):
        bundle.read(folder, nn.Linear(2, 2))


def test_a_network_whose_shapes_changed_is_not_passed_off_as_its_architecture(tmp_path: Path) -> None:
    found = tuned("test_resnet")
    found.net.fc = nn.Sequential(nn.Linear(found.net.num_features, 3))  # type: ignore[arg-type]
    folder = write(tmp_path / "model", found)
    with pytest.raises(ModelError, match="cannot build by name"):
        bundle.read(folder)


def test_tied_weights_and_other_layouts_are_stored(tmp_path: Path) -> None:
    own = Own()
    own.again = own.fc
    own.to(memory_format=torch.channels_last)
    bundle.save(tmp_path / "m", own, config=None, preprocess=Preprocess(size=8), classes=CLASSES, card={})
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(stored["again.weight"], stored["fc.weight"])
    assert torch.equal(stored["conv.weight"], own.conv.weight)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "an object is expected"),
        ("labels.json", '["a", 2]', "list of class names"),
        ("labels.json", '["a", "b"]', "names 2 classes, and its network has 3"),
        ("preprocess.json", '{"size": "big"}', "is damaged"),
        ("model.safetensors", "", "cut off"),
    ],
)
def test_damaged_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tuned("test_resnet"))
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name}' was altered: its SHA-256 is"):
        bundle.read(folder)
    (folder / "SHA256SUMS").unlink()  # as in folders that others wrote
    with pytest.raises(ModelError, match=message):
        bundle.read(folder)


def test_truncated_and_missing_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tuned("test_resnet"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cut off"):
        bundle.read(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing, which SHA256SUMS lists"):
        bundle.read(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        bundle.read(folder)


def test_a_folder_that_timm_wrote(tmp_path: Path) -> None:
    found = tuned("test_resnet")
    timm.models.save_for_hf(
        found.net, tmp_path / "hub", model_config={"label_names": CLASSES}, safe_serialization=True
    )
    again = bundle.read(tmp_path / "hub")
    assert again.classes == CLASSES and again.preprocess == found.preprocess
