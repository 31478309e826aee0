import pytest
import timm
import torch
from torch import nn

from headstart.nets.recipe import family, recipe
from headstart.records import OptimizerName

FAMILIES = {
    "test_resnet": "batchnorm-cnn",
    "efficientnet_b0": "depthwise-cnn",
    "mobilenetv3_small_050": "depthwise-cnn",
    "tf_efficientnet_lite0": "depthwise-cnn",
    "densenet121": "batchnorm-cnn",
    "regnety_002": "batchnorm-cnn",
    "skresnet18": "batchnorm-cnn",
    "resnet50_clip": "batchnorm-cnn",  # one attention layer, which pools
    "test_convnext": "layernorm-cnn",
    "convnext_atto": "layernorm-cnn",
    "poolformer_s12": "layernorm-cnn",
    "resnetv2_50x1_bit": "plain-cnn",
    "nfnet_l0": "plain-cnn",
    "vgg11": "plain-cnn",
    "test_vit": "transformer",
    "swin_tiny_patch4_window7_224": "transformer",
    "mobilevit_xxs": "transformer",
    "hiera_tiny_224": "transformer",
}


@pytest.mark.parametrize(("name", "kind"), FAMILIES.items())
def test_family(name: str, kind: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    assert family(net) == kind


def test_family_of_ones_own_network() -> None:
    assert (
        family(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)))
        == "batchnorm-cnn"
    )
    layer = nn.TransformerEncoderLayer(8, 2)
    assert family(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)) == "transformer"


def test_recipes_differ_where_the_families_do() -> None:
    cnn = recipe(timm.create_model("test_resnet"), train_size=2000, batch_size=32)
    assert (cnn.optimizer, cnn.lr, cnn.momentum, cnn.nesterov) == ("sgd", 0.003, 0.9, True)
    assert (cnn.weight_decay, cnn.warmup, cnn.clip, cnn.norm) == (1e-4, 0.05, None, "train")
    for name, lr in (("test_convnext", 1e-4), ("test_vit", 5e-5)):
        modern = recipe(timm.create_model(name), train_size=2000, batch_size=32)
        assert (modern.optimizer, modern.lr, modern.weight_decay) == ("adamw", lr, 0.05)
        assert (modern.warmup, modern.clip) == (0.1, 1.0)
    for every in (cnn, modern):
        assert (every.label_smoothing, every.schedule, every.ema) == (0.1, "cosine", None)


@pytest.mark.parametrize(
    ("train_size", "batch_size", "norm"),
    [(499, 32, "eval"), (500, 32, "train"), (5000, 15, "eval"), (5000, 16, "train"), (5000, 1, "eval")],
)
def test_statistics_are_kept_on_little_data(train_size: int, batch_size: int, norm: str) -> None:
    net = timm.create_model("test_resnet")
    assert recipe(net, train_size=train_size, batch_size=batch_size).norm == norm


def test_random_weights_get_a_training_rate_and_statistics_that_move() -> None:
    net = timm.create_model("test_resnet")
    tuned = recipe(net, train_size=300, batch_size=32)
    trained = recipe(net, train_size=300, batch_size=32, pretrained=False)
    assert (tuned.norm, trained.norm) == ("eval", "train")
    assert trained == tuned.model_copy(update={"lr": 0.03, "norm": "train"})


@pytest.mark.parametrize(("name", "other"), [("tf_efficientnet_lite0", "sgd"), ("test_resnet", "adamw")])
def test_another_optimiser_gets_a_rate_of_its_own(name: str, other: OptimizerName) -> None:
    """One family's rate under the other's rule hardly moves, or destroys."""
    net = timm.create_model(name)
    own = recipe(net, train_size=300, batch_size=32)
    turned = recipe(net, train_size=300, batch_size=32, optimizer=other)
    assert own.optimizer != other
    rate, decay = {"sgd": (0.003, 1e-4), "adamw": (3e-4, 0.05)}[other]
    assert turned == own.model_copy(update={"optimizer": other, "lr": rate, "weight_decay": decay})
    assert recipe(net, train_size=300, batch_size=32, optimizer=own.optimizer) == own


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_steps_that_are_foreseen_are_not_clipped(name: str) -> None:
    """A clipped step is another than the one that a method looked ahead from."""
    net = timm.create_model(name)
    followed = recipe(net, train_size=300, batch_size=32, follows="sgd")
    assert (followed.optimizer, followed.lr, followed.clip) == ("sgd", 0.003, None)
    own = recipe(net, train_size=300, batch_size=32)
    assert own.clip == (None if name == "test_resnet" else 1.0)
