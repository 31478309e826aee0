import pytest
import timm
import torch
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.head import find_head, replace_head

HEADS = {
    "resnet18": "fc",
    "resnetv2_50": "head.fc",  # a 1×1 convolution
    "densenet121": "classifier",
    "vgg11_bn": "head.fc",
    "mobilenetv3_small_050": "classifier",
    "tf_efficientnet_lite0": "classifier",
    "regnety_002": "head.fc",
    "convnext_atto": "head.fc",
    "vit_tiny_patch16_224": "head",
    "deit3_small_patch16_224": "head",
    "swin_tiny_patch4_window7_224": "head.fc",
    "maxvit_rmlp_pico_rw_256": "head.fc",
    "mobilevit_xxs": "head.fc",
    "xcit_nano_12_p16_224": "head",
    "mixer_s32_224": "head",
    "beit_base_patch16_224": "head",
    "nfnet_l0": "head.fc",
    "inception_v4": "last_linear",
    "dla34": "fc",
    "hrnet_w18_small": "classifier",
    "resnet50_clip": "head.proj",  # the projection of attention pooling
    "caformer_s18": "head.fc.fc2",  # the last layer of an MLP
    "efficientvit_b0": "head.classifier.4",
    "shvit_s1": "head.l",
    "edgenext_xx_small": "head.fc",
    "hiera_tiny_224": "head.fc",
    "rdnet_tiny": "head.fc",
}


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_heads_of_timm_networks(name: str, head: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name).eval()
        assert find_head(net) == head
        replace_head(net, head, 7)
        assert find_head(net) == head
        size = net.pretrained_cfg["input_size"][1:]
        assert net(torch.zeros(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_a_fresh_head_says_nothing_and_keeps_type_and_mode(name: str) -> None:
    net = timm.create_model(name).double().eval()
    head = find_head(net)
    before = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith(f"{head}.")}
    replace_head(net, head, 4)
    logits = net(torch.randn(2, 3, 160, 160, dtype=torch.float64))
    assert torch.equal(logits, torch.zeros(2, 4, dtype=torch.float64))
    assert net.get_submodule(head).weight.dtype == torch.float64
    after = net.state_dict()
    assert all(torch.equal(value, after[k]) for k, value in before.items())


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "levit_128s", "efficientformer_l1", "crossvit_tiny_240", "repvit_m1"],
)
def test_several_heads_are_refused(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    with pytest.raises(MethodError, match="2 heads at once"):
        find_head(net)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "vit_base_patch16_siglip_224"])
def test_no_head_is_not_a_layer_of_the_body(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
        with pytest.raises(MethodError, match="has no head"):
            find_head(net)
        net.reset_classifier(3)
        assert net.get_submodule(find_head(net)).weight.shape[0] == 3


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classify = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classify(self.body(x))
        return out


def test_networks_that_are_not_timms() -> None:
    net = Plain()
    assert find_head(net) == "classify.2"
    replace_head(net, "classify.2", 3)
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert net.classify[2].bias is None
    convolutional = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 9, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert find_head(convolutional) == "1"
    replace_head(convolutional, "1", 2)
    assert convolutional(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


def test_what_is_no_head() -> None:
    with pytest.raises(MethodError, match="no Linear layer"):
        find_head(nn.Sequential(nn.Conv2d(3, 4, 3)))
    net = Plain()
    with pytest.raises(MethodError, match="no parameters"):
        replace_head(net, "body.1", 3)
    with pytest.raises(MethodError, match="is a Sequential"):
        replace_head(net, "classify", 3)
