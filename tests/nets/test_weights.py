import argparse
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.errors import ModelError
from headstart.nets.architecture import Architecture
from headstart.nets.weights import fit, read

State = dict[str, Tensor]
ARCHITECTURES = {name: Architecture(name, 1000) for name in ("test_resnet", "test_convnext", "test_vit")}


def state_of(name: str, classes: int = 1000) -> State:
    torch.manual_seed(1)
    state: State = timm.create_model(name, num_classes=classes).state_dict()
    return state


def body_equal(net: nn.Module, state: State, head: str) -> bool:
    own = net.state_dict()
    return all(torch.equal(own[name], value) for name, value in state.items() if not name.startswith(head))


# -- reading


@pytest.mark.parametrize(
    ("wrap", "wrapper"),
    [
        (lambda s: s, ""),
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=1)}, "model"),
        (lambda s: {"state_dict": {k: v + 1 for k, v in s.items()}, "model_ema": s}, "model_ema"),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict"),
    ],
)
def test_wrapped_state_dicts(wrap: Callable[[State], object], wrapper: str, tmp_path: Path) -> None:
    state = state_of("test_resnet")
    torch.save(wrap(state), tmp_path / "w.pth")
    found, under = read(tmp_path / "w.pth")
    assert under == wrapper
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_safetensors_is_known_by_its_content(tmp_path: Path) -> None:
    state = state_of("test_vit")
    save_file(state, tmp_path / "weights.bin")
    found, _ = read(tmp_path / "weights.bin")
    assert found.keys() == state.keys()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": state_of("test_vit"), "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match=r"holds more than weights.*print.*state_dict\(\)"):
        read(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet"), tmp_path / "module.pth")
    with pytest.raises(ModelError, match=r"torch\.save\(net\.state_dict\(\)"):
        read(tmp_path / "module.pth")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_truncated_files(share: float, kind: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    if kind == "pth":
        torch.save(state_of("test_vit"), whole)
    else:
        save_file(state_of("test_vit"), whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\."):
        read(cut)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is not a network", "neither safetensors nor torch.save"),
        (pickle.dumps([1, 2]), "holds no weights|neither|cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "neither safetensors nor torch.save"),
        (bytes(200), "neither safetensors nor torch.save"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read(path)


def test_places_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no weights file"):
        read(tmp_path / "nowhere.pth")
    with pytest.raises(ModelError, match="is a folder"):
        read(tmp_path)
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "log.pth")
    with pytest.raises(ModelError, match=r"holds no weights.*epoch, loss"):
        read(tmp_path / "log.pth")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    state = state_of("test_resnet")
    state["conv1.0.weight"] = torch.full_like(state["conv1.0.weight"], float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match=r"conv1\.0\.weight hold NaN"):
        read(tmp_path / "nan.safetensors")


# -- fitting


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "encoder."]
)
def test_prefixes(name: str, prefix: str) -> None:
    state = state_of(name)
    net, report = fit(ARCHITECTURES[name], {prefix + k: v for k, v in state.items()}, where="w")
    assert (report.prefix, report.matched, report.missing) == (prefix, report.total, ())
    assert body_equal(net, state, "-")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_of_another_width_is_taken_over(name: str) -> None:
    state = state_of(name, classes=7)
    net, report = fit(ARCHITECTURES[name], state, where="w")
    assert body_equal(net, state, "-"), "the head too"
    assert report.head == "from the file (7 classes)" and not report.mismatched


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_body_alone_is_enough(name: str) -> None:
    head = {"test_resnet": "fc", "test_convnext": "head.fc", "test_vit": "head"}[name]
    state = {k: v for k, v in state_of(name).items() if not k.startswith(f"{head}.")}
    net, report = fit(ARCHITECTURES[name], {f"encoder.{k}": v for k, v in state.items()}, where="w")
    assert body_equal(net, state, "-")
    assert report.head == "is fresh: none in the file" and len(report.missing) == 2
    assert "2 missing" in report.sentence()


def test_a_head_of_another_kind_is_dropped() -> None:
    state = {k: v for k, v in state_of("test_resnet").items() if not k.startswith("fc.")}
    width = timm.create_model("test_resnet").num_features
    state |= {"fc.0.weight": torch.zeros(8, width), "fc.2.weight": torch.zeros(4, 8)}
    net, report = fit(ARCHITECTURES["test_resnet"], state, where="w")
    assert body_equal(net, {k: v for k, v in state.items() if not k.startswith("fc.")}, "-")
    assert report.unexpected == ("fc.0.weight", "fc.2.weight") and "fresh" in report.head


def test_other_networks_in_the_file_do_not_matter() -> None:
    """A momentum encoder and a projector, as self-supervised training leaves them."""
    state = state_of("test_resnet")
    file = {f"encoder_q.{k}": v for k, v in state.items()}
    file |= {f"encoder_k.{k}": v + 1 for k, v in state.items()} | {"projector.weight": torch.zeros(3, 3)}
    net, report = fit(ARCHITECTURES["test_resnet"], file, where="w")
    assert report.prefix == "encoder_q." and body_equal(net, state, "-")


def test_missing_counters_do_not_matter() -> None:
    state = {k: v for k, v in state_of("test_resnet").items() if not k.endswith("num_batches_tracked")}
    _, report = fit(ARCHITECTURES["test_resnet"], state, where="w")
    assert report.missing == () and report.matched == report.total


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("test_convnext", "test_resnet"),
        ("test_vit", "test_convnext"),
        ("test_vit2", "test_vit"),
        ("resnet34", "resnet18"),  # has all that resnet18 needs, and more
        ("resnet18", "resnet34"),
        ("resnet50", "seresnet50"),
        ("resnet50", "resnet50d"),
    ],
)
def test_weights_of_another_architecture(theirs: str, ours: str) -> None:
    with torch.device("meta"):  # shapes are enough to be refused
        state = timm.create_model(theirs).state_dict()
    with pytest.raises(
        ModelError, match=rf"'w' do not belong to '{ours}': \d+ of \d+ tensors matched;.*--model"
    ):
        fit(Architecture(ours, 1000), state, where="w")


def test_half_a_file_is_refused() -> None:
    state = state_of("test_vit")
    half = dict(list(state.items())[: len(state) // 2])
    with pytest.raises(ModelError, match="missing there"):
        fit(ARCHITECTURES["test_vit"], half, where="w")


def test_half_precision_weights_become_the_networks_type() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in state_of("test_resnet").items()}
    net, _ = fit(ARCHITECTURES["test_resnet"], state, where="w")
    assert net.state_dict()["fc.weight"].dtype == torch.float32
    assert torch.equal(net.state_dict()["fc.weight"], state["fc.weight"].float())


def test_older_names_go_through_timms_translation() -> None:
    """ConvNeXt as its authors published it: `downsample_layers.0.0` for timm's `stem.0` and so on."""
    state = state_of("test_convnext")
    old: State = {}
    for name, value in state.items():
        name = (
            name.replace("stem.", "downsample_layers.0.")
            .replace("head.norm.", "norm.")
            .replace("head.fc.", "head.")
        )
        if name.startswith("stages."):
            _, stage, rest = name.split(".", 2)
            if rest.startswith("downsample."):
                name = f"downsample_layers.{stage}.{rest.removeprefix('downsample.')}"
            else:
                rest = rest.removeprefix("blocks.").replace("conv_dw", "dwconv")
                rest = rest.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
                name = f"stages.{stage}.{rest}"
        old[name] = value
    assert old.keys() != state.keys()
    net, report = fit(ARCHITECTURES["test_convnext"], {"module." + k: v for k, v in old.items()}, where="w")
    assert report.matched == report.total and body_equal(net, state, "-")
