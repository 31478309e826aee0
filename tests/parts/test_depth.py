import pytest
import timm
import torch
from torch import nn

from headstart.parts.depth import depths
from headstart.parts.head import find_head

LEVELS = {
    "resnet18": 6,  # stem, four stages, head
    "tf_efficientnet_lite0": 9,  # stem, seven stages, head
    "regnety_002": 6,
    "densenet121": 6,
    "mobilenetv3_small_050": 8,
    "convnext_atto": 6,
    "convnext_tiny": 6,  # stages too, although it has no 1×1 and no 3×3 convolutions
    "nfnet_l0": 6,
    "maxvit_rmlp_pico_rw_256": 6,
    "vit_tiny_patch16_224": 14,  # embedding, twelve blocks, head
    "deit3_small_patch16_224": 14,
    "beit_base_patch16_224": 14,
    "swin_tiny_patch4_window7_224": 14,
    "mixer_s32_224": 10,
    "cait_xxs24_224": 26,
    "rdnet_tiny": 9,  # knows no stages
    "inception_v4": 21,
    "dla34": 8,
    "hrnet_w18_small": 6,
    "vgg11_bn": 17,
    "mobilevit_xxs": 7,
    "xcit_nano_12_p16_224": 16,
    "resnet50_clip": 6,
    "naflexvit_base_patch16_gap": 14,
    "edgenext_xx_small": 6,
}


@pytest.mark.parametrize(("name", "levels"), LEVELS.items())
def test_depths_of_timm_networks(name: str, levels: int) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    found = depths(net)
    names = [parameter for parameter, _ in net.named_parameters()]
    assert set(found) == set(names)
    assert sorted(set(found.values())) == list(range(levels))
    head = find_head(net)
    assert {found[each] for each in names if each.startswith(f"{head}.")} == {0}
    stem = net.pretrained_cfg["first_conv"]
    for each in [stem] if isinstance(stem, str) else stem:
        assert found[f"{each}.weight"] == levels - 1


def test_depths_of_ones_own_network() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2))
    assert depths(net) == {"0.weight": 2, "0.bias": 2, "1.weight": 1, "1.bias": 1, "3.weight": 0, "3.bias": 0}
