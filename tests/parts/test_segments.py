"""Segments, one after the other, are the network: to the bit, in both modes, with the same gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.errors import MethodError
from headstart.parts.segments import Boundary, Segments, pairs, segments

SWIN = {"img_size": 64, "window_size": 2, "depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
XCIT = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2}

# timm's name and options, picture size: strides, kinds and channels per boundary
NETS: dict[str, tuple[dict[str, Any], int, list[tuple[int, str, int]]]] = {
    "resnet18": (
        {},
        32,
        [(2, "map", 64), (4, "map", 64), (8, "map", 128), (16, "map", 256), (32, "map", 512)],
    ),
    "tf_efficientnet_lite0": (
        {"drop_rate": 0.2, "drop_path_rate": 0.2},
        32,
        [(2, "map", 16), (4, "map", 24), (8, "map", 40), (16, "map", 112), (32, "map", 320)],
    ),
    "mobilenetv3_small_100": (
        {},
        32,
        [(2, "map", 16), (4, "map", 16), (8, "map", 24), (16, "map", 48), (32, "map", 576)],
    ),
    "test_convnext": ({}, 32, [(4, "map", 24), (8, "map", 32), (16, "map", 48), (32, "map", 64)]),
    "test_vit": ({"img_size": 32, "drop_rate": 0.1}, 32, [(16, "tokens", 64)] * 6),
    "swin_tiny_patch4_window7_224": (
        SWIN,
        64,
        [(4 * 2**i, "map, channels last", 16 * 2**i) for i in range(4)],
    ),
    "regnety_002": (
        {},
        32,
        [(2, "map", 32), (4, "map", 24), (8, "map", 56), (16, "map", 152), (32, "map", 368)],
    ),
    "densenet121": (
        {"block_config": (1, 2, 2, 1)},
        32,
        [(2, "map", 64), (4, "map", 96), (8, "map", 112), (16, "map", 120), (32, "map", 92)],
    ),
    "xcit_nano_12_p8_224": (XCIT, 32, [(8, "tokens", 32)] * 3),  # threads the map's size through its blocks
    "vit_small_patch16_dinov3": (
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3},  # rotary positions, register tokens
        32,
        [(16, "tokens", 48)] * 2,
    ),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    options, size, _ = NETS[name]
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=5, **options)
    return net, torch.randn(4, 3, size, size)


def chain(cut: Segments, x: Tensor) -> Tensor:
    for k in range(len(cut.boundaries) + 1):
        x = cut.run(k, x)
    return x


def assert_same_step(plain: nn.Module, cut: Segments, x: Tensor) -> None:
    """One forward and backward pass of each, with the same random numbers, leaves the same bits."""
    torch.manual_seed(1)
    whole = plain(x)
    torch.manual_seed(1)
    chained = chain(cut, x)
    assert torch.equal(whole, chained)
    if whole.requires_grad:
        whole.square().sum().backward()
        chained.square().sum().backward()
        for (name, p), q in zip(plain.named_parameters(), cut.net.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        assert any(p.grad is not None and p.grad.any() for p in plain.parameters())
    for (name, p), q in zip(plain.named_buffers(), cut.net.buffers(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", NETS)
def test_segments_are_the_network(name: str) -> None:
    net, x = made(name)
    plain = copy.deepcopy(net)
    cut = segments(net, x)
    expected = NETS[name][2]
    assert [(b.stride, b.kind) for b in cut.boundaries] == [(stride, kind) for stride, kind, _ in expected]
    assert [b.channels for b in cut.boundaries] == [channels for _, _, channels in expected]
    plain.train(), net.train()
    assert_same_step(plain, cut, x)
    plain.eval(), net.eval()
    with torch.no_grad():
        assert_same_step(plain, cut, x)
    plain.train(), net.train()
    fewer = cut.cut([cut.boundaries[0].name, cut.boundaries[-1].name])
    assert len(fewer.boundaries) == 2
    assert_same_step(plain, fewer, x)


def test_a_boundary_says_what_goes_across() -> None:
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "test_vit"):
        net, x = made(name)
        net.eval()
        cut = segments(net, x)
        for k, boundary in enumerate(cut.boundaries):
            with torch.no_grad():
                x = cut.run(k, x)
            as_map = boundary.to_map(x)
            assert as_map.shape == (4, boundary.channels, *boundary.size)
            front = x[:, : boundary.prefix] if boundary.prefix else None
            assert torch.equal(boundary.from_map(as_map, front), x)


def test_tokens_become_the_map_they_came_from() -> None:
    """Token (i, j) of a picture that is bright in one patch only is where that patch is."""
    boundary = Boundary("blocks.0", 2, 16, "tokens", (2, 3), prefix=1)
    tokens = torch.zeros(1, 7, 2)
    tokens[0, 1 + 1 * 3 + 2] = torch.tensor([5.0, 7.0])  # row 1, column 2, after the class token
    found = boundary.to_map(tokens)
    assert found[0, :, 1, 2].tolist() == [5, 7]
    assert found.sum() == 12


# ---------------------------------------------------------------- nothing happened to the network


def test_to_look_changes_nothing() -> None:
    for name in ("tf_efficientnet_lite0", "test_vit"):
        net, x = made(name)
        net.train()
        next(net.children()).eval()
        modes = [module.training for module in net.modules()]
        attributes, state = set(vars(net)), copy.deepcopy(net.state_dict())
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        segments(net, x)
        assert torch.equal(torch.rand(3), expected)
        assert [module.training for module in net.modules()] == modes
        assert set(vars(net)) == attributes
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert not any(p.grad is not None for p in net.parameters())


def test_copies_act_on_the_copy() -> None:
    net, x = made("resnet18")

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.segments = segments(net, x)

    owner = Owner()
    twin = copy.deepcopy(owner)
    assert twin.segments.net is twin.net
    with torch.no_grad():
        for parameter in twin.net.parameters():
            parameter.zero_()
    owner.eval(), twin.eval()
    assert not chain(twin.segments, x).any()
    assert torch.equal(chain(owner.segments, x), net(x))
    assert list(owner.state_dict()) == [f"net.{key}" for key in net.state_dict()]
    twin.double()
    assert chain(twin.segments, x.double()).dtype == torch.float64


def test_the_head_may_be_replaced_afterwards() -> None:
    net, x = made("resnet18")
    cut = segments(net, x)
    net.reset_classifier(2)
    net.eval()
    assert torch.equal(chain(cut, x), net(x))


class _Overwrites(nn.Module):
    """What goes across is overwritten by what follows, outside of any module and inside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.feature_info = [{"module": "one", "reduction": 2}, {"module": "two", "reduction": 4}]

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.act(self.one(x)))
        return self.head(F.relu(x, inplace=True).mean((2, 3)))


def test_what_comes_in_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = _Overwrites()
    x = torch.randn(2, 3, 8, 8)
    cut = segments(net, x)
    assert [boundary.name for boundary in cut.boundaries] == ["one", "two"]
    assert_same_step(copy.deepcopy(net), cut, x)
    between = cut.run(0, x)
    before = between.clone()
    cut.run(1, between).sum().backward()
    assert torch.equal(between, before)
    assert (before < 0).any()


class _Sized(nn.Module):
    """Stages that answer with a map and its size, as MViT's; `batch` threads the batch's size through."""

    class Stage(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(wide, 4, 3, 2, 1)

        def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[int]]:
            x = self.conv(x) / size[0]
            return x, list(x.shape[2:])

    def __init__(self, *, batch: bool) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two, self.head = self.Stage(3), self.Stage(4), nn.Linear(4, 2)
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        count, size = x.shape[0], x.shape[2:]
        x, size = self.one(x, size)
        x, size = self.two(x, size)
        x = x.sum((2, 3)) / (size[0] * size[1])
        return self.head(x.reshape(count, 4) if self.batch else x)


def test_sizes_do_not_count_and_batches_do() -> None:
    net, x = _Sized(batch=False), torch.randn(3, 3, 8, 8)
    cut = segments(net, x)
    assert [boundary.name for boundary in cut.boundaries] == ["one", "two"]
    assert_same_step(copy.deepcopy(net), cut, x)
    with pytest.raises(MethodError, match="no stage behind which a single tensor is live"):
        segments(_Sized(batch=True), x)


# ---------------------------------------------------------------- class tokens


def test_class_tokens_enter_as_in_the_network() -> None:
    """What timm's VisionTransformer puts in front: the class token and its position."""
    net, x = made("test_vit")
    cut = segments(net, x)
    assert {boundary.prefix for boundary in cut.boundaries} == {1}
    front = cut.prefix(x)
    assert torch.equal(front, (net.cls_token + net.pos_embed[:, :1]).expand(4, -1, -1))
    front.sum().backward()
    assert torch.equal(net.cls_token.grad, torch.full_like(net.cls_token, 4))


def test_a_map_has_no_tokens_in_front() -> None:
    net, x = made("resnet18")
    assert segments(net, x).prefix(x) is None
    net = timm.create_model("test_vit", img_size=32, class_token=False, global_pool="avg", num_classes=5)
    cut = segments(net, x)
    assert cut.boundaries[0].prefix == 0
    assert cut.boundaries[0].size == (2, 2)
    assert cut.prefix(x) is None


def test_class_tokens_that_come_late_are_not_there_before() -> None:
    net, x = made("xcit_nano_12_p8_224")
    assert [boundary.prefix for boundary in segments(net, x).boundaries] == [0, 0, 0]


# ---------------------------------------------------------------- networks that name no stages


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def test_stages_end_where_the_map_changes() -> None:
    """After the activation, not before it, and not behind pooling alone."""
    net, x = plain_net(), torch.randn(2, 3, 32, 32)
    cut = segments(net, x)
    found = [(boundary.name, boundary.stride, boundary.channels) for boundary in cut.boundaries]
    assert found == [("1.1", 2, 4), ("3", 8, 8)]
    assert_same_step(copy.deepcopy(net), cut, x)


def test_torchvision() -> None:
    from torchvision import models

    x = torch.randn(2, 3, 64, 64)
    for make, strides in (
        (models.resnet18, [2, 4, 8, 16, 32]),
        (models.mobilenet_v3_small, [2, 4, 8, 16, 32]),
    ):
        torch.manual_seed(0)
        net = make(weights=None, num_classes=3)
        cut = segments(net, x)
        assert sorted({boundary.stride for boundary in cut.boundaries}) == strides
        assert_same_step(copy.deepcopy(net).train(), cut, x)


def test_a_trunk_inside_of_a_network() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = timm.create_model("test_resnet", num_classes=0)
            self.head = nn.Linear(self.trunk.num_features, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x))

    cut = segments(Wrapped(), torch.randn(2, 3, 32, 32))
    assert [boundary.name for boundary in cut.boundaries][-1] == "trunk.layer4"


# ---------------------------------------------------------------- what cannot be cut


class _Crossed(nn.Module):
    """A skip connection leads around the only stage there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.head = nn.Conv2d(3, 3, 3, 1, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stage(x) + x).mean((2, 3)))


class _Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage, self.head = nn.Conv2d(3, 3, 3, 2, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x)
        if x.mean() > 0:
            x = x * 2
        return self.head(x.mean((2, 3)))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stage(x)
        return x, x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (_Crossed(), "no stage behind which a single tensor is live"),
        (_Decides(), "cannot be followed by torch.fx"),
        (_Two(), "answers with a tuple; logits are needed"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), "no stage behind which a single tensor is live"),
        (nn.Conv2d(1, 2, 3), "Conv2d cannot see pictures of 3 channels and 8 × 8 pixels"),
    ],
)
def test_what_cannot_be_cut_says_so(net: nn.Module, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        segments(net, torch.randn(1, 3, 8, 8))
    assert net.training


def test_a_forward_that_leaves_no_trace_is_not_trusted() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage, self.head = nn.Conv2d(3, 3, 3, 2, 1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stage(x)
            x.mul_(3)
            return self.head(x.mean((2, 3)))

    with pytest.raises(MethodError, match="cannot be cut"):
        segments(Hidden(), torch.randn(1, 3, 8, 8))


def test_an_unknown_stage() -> None:
    net, x = made("resnet18")
    with pytest.raises(MethodError, match=r"Unknown stage of ResNet 'layer5'\. Did you mean 'layer"):
        segments(net, x).cut(["layer5"])


# ---------------------------------------------------------------- which boundaries belong together


def stages(*strides: int, kind: str = "map") -> list[Boundary]:
    return [
        Boundary(f"{i}", 8, stride, "tokens" if kind == "tokens" else "map", (4, 4))
        for i, stride in enumerate(strides)
    ]


CNN, PLAIN = stages(2, 4, 8, 16, 32), stages(*[16] * 12, kind="tokens")


@pytest.mark.parametrize(
    ("ours", "theirs", "strides", "expected"),
    [
        (CNN, CNN, [8, 32], [("2", "2"), ("4", "4")]),
        (CNN, stages(4, 8, 8, 16, 16, 32), [8, 32], [("2", "2"), ("4", "5")]),  # the last of a stride
        (CNN, CNN, None, [("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "4")]),
        (CNN, stages(4, 16, 32), [8, 32], [("3", "1"), ("4", "2")]),  # as far from both: the deeper
        (CNN, stages(4, 16), [8, 32], [("1", "0"), ("4", "1")]),  # the end, whatever its stride
        (CNN, stages(4, 8), None, [("1", "0"), ("4", "1")]),
        (CNN[:3], stages(4, 8), [16, 32], [("1", "0"), ("2", "1")]),  # 8 stands for 32, so 4 for 16
        (PLAIN, PLAIN, [8, 32], [("5", "5"), ("11", "11")]),  # half way, and the end
        (PLAIN, stages(*[14] * 24), [4, 16], [("2", "5"), ("8", "17")]),
        (PLAIN, stages(*[16] * 6), None, [(f"{2 * i + 1}", f"{i}") for i in range(6)]),
        (CNN, PLAIN, [8, 32], [("3", "8"), ("4", "11")]),  # one stride in common: block 9 of 12; and the end
        (PLAIN, CNN, None, [("8", "3"), ("11", "4")]),
        (CNN, PLAIN, [32], [("4", "11")]),
        (CNN, stages(*[14] * 12), [8, 32], [("3", "8"), ("4", "11")]),
        (CNN, stages(*[32] * 12), [8, 32], [("4", "11")]),
        (stages(8), stages(8), [8, 32], [("0", "0")]),
    ],
)
def test_pairs(ours: Any, theirs: Any, strides: Any, expected: Any) -> None:
    assert [(a.name, b.name) for a, b in pairs(ours, theirs, strides)] == expected


@pytest.mark.parametrize("strides", [[8, 32], None])
def test_no_stride_in_common(strides: Any) -> None:
    for ours, theirs in ((stages(4, 8), stages(16, 32)), (PLAIN, stages(*[8] * 12))):
        with pytest.raises(MethodError, match="no stage of the same stride: one has "):
            pairs(ours, theirs, strides)
