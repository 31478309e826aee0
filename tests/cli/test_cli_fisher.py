"""The command that estimates Fisher information."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typed import Typed, typing

from headstart.data.picture import open_picture
from headstart.nets import zoo
from headstart.parts.fisher import estimate, load
from headstart.parts.frozen import fingerprint


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


def test_a_file_that_a_run_takes(typed: Typed, pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "f.safetensors"
    ended = typed("fisher", pictures, "--model", tiny_model, "--out", out, "--pictures", 8)
    assert ended.code == 0, ended.err
    assert "8 pictures, labels drawn per picture: 1" in ended.out
    net = zoo.load(str(tiny_model)).net
    found = load(out, source=fingerprint(net))
    assert found.pictures == 8 and found.inputs == "pictures (32 px)"
    assert found.diagonal.keys() == dict(net.named_parameters()).keys()
    words = shlex.split(ended.out.partition("Next:  headstart ")[2])
    words = [
        str(pictures) if word == "PHOTOS" else word.replace("DIR", str(tmp_path / "run")) for word in words
    ]
    ended = typed(*words, "--epochs", 1, "--batch-size", 8)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["diagnostics"]["fisher"] == json.loads(json.dumps(found.provenance))
    assert result["diagnostics"]["over_time"][-1]["distance"]["total"] > 0


def test_it_estimates_as_its_part_does(
    typed: Typed, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """All pictures, drawn into another order, in evaluation's form."""
    out = tmp_path / "f.safetensors"
    asked = ("fisher", pictures, "--model", tiny_model, "--out", out, "--samples", 0, "--json")
    record = json.loads(typed(*asked).out)
    assert record["file"] == str(out) and record["pictures"] == 36 and record["samples"] is None
    loaded = zoo.load(str(tiny_model))
    pixels = [torch.from_numpy(loaded.preprocess.plain(open_picture(p))) for p in pictures.rglob("*.png")]
    x = loaded.preprocess.normalise(torch.stack(pixels).permute(0, 3, 1, 2))
    expected = estimate(loaded.net, [(x, None)], samples=None).diagonal
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-12)


def test_a_flat_folder_with_a_broken_file(
    typed: Typed, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    flat = pictures / "class_a"
    (flat / "broken.jpg").write_text("text")
    (flat / ".hidden.png").write_text("text")
    asked = ("fisher", flat, "--model", tiny_model, "--out", tmp_path / "f", "--json")
    ended = typed(*asked)
    assert json.loads(ended.out)["pictures"] == 12
    assert "1 pictures cannot be read, such as" in ended.err and "broken.jpg" in ended.err
    again = load_file(tmp_path / "f")
    assert typed(*asked, "--overwrite").code == 0
    assert all(torch.equal(value, again[name]) for name, value in load_file(tmp_path / "f").items())
    assert typed(*asked, "--overwrite", "--seed", 1).code == 0
    assert any(not torch.equal(value, again[name]) for name, value in load_file(tmp_path / "f").items())


def test_refuses(typed: Typed, pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    assert "--out" in typed("fisher", pictures, "--model", tiny_model).refusal
    assert "is no folder" in typed("fisher", tmp_path / "no", "--out", out).refusal
    assert "Did you mean 'resnet50'" in typed("fisher", pictures, "--model", "resnet5o", "--out", out).refusal
    (tmp_path / "empty").mkdir()
    assert "no pictures in" in typed("fisher", tmp_path / "empty", "--out", out).refusal
    (tmp_path / "empty" / "a.png").write_text("text")
    asked = ("fisher", tmp_path / "empty", "--model", tiny_model, "--out", out)
    assert "None of the 1 pictures can be read" in typed(*asked).refusal
    out.write_text("mine")
    assert "exists already" in typed("fisher", pictures, "--model", tiny_model, "--out", out).refusal
    assert out.read_text() == "mine"


def test_weights_without_a_head_are_refused(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    net = zoo.load("test_resnet", pretrained=False).net
    body = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    asked = ("--model", "test_resnet", "--weights", tmp_path / "body.safetensors", "--img-size", 32)
    said = typed("fisher", pictures, *asked, "--out", tmp_path / "f").refusal
    assert "is fresh: none in the file. Fisher information needs" in said


def test_a_file_of_another_checkpoint_is_refused_before_training(
    typed: Typed, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    net = zoo.load(str(tiny_model)).net
    with torch.no_grad():
        net.get_parameter("fc.bias").add_(1)
    save_file(net.state_dict(), tmp_path / "other.safetensors")
    out = tmp_path / "f.safetensors"
    asked = ("--model", tiny_model, "--weights", tmp_path / "other.safetensors")
    assert typed("fisher", pictures, *asked, "--out", out, "--pictures", 2).code == 0
    asked = ("train", pictures, "--model", tiny_model, "--method", "l2-sp", "--out", tmp_path / "run")
    said = typed(*asked, "--set", "variant=l2-sp-fisher", "--set", f"fisher={out}").refusal
    assert "was made from another checkpoint" in said
