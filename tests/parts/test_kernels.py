"""What weight decay and the pull to a source are meant for."""

from __future__ import annotations

import pytest
import timm
import torch

from headstart.parts.kernels import is_kernel


@pytest.mark.parametrize(
    ("name", "shape", "answer"),
    [
        ("conv.weight", (4, 3, 3, 3), True),
        ("blocks.0.attn.qkv.weight", (12, 4), True),
        ("fc.bias", (3,), False),
        ("norm.weight", (3,), False),
        ("scale", (), False),
        ("pos_embed", (1, 5, 4), False),
        ("stages.0.blocks.1.attn.relative_position_bias_table", (9, 2), False),
    ],
)
def test_is_kernel(name: str, shape: tuple[int, ...], answer: bool) -> None:
    assert is_kernel(name, torch.zeros(shape)) is answer


def test_timms_own_list_for_a_transformer_agrees() -> None:
    net = timm.create_model("test_vit", pretrained=False, img_size=32)
    assert all(
        not is_kernel(name, net.get_parameter(name))
        for name in net.no_weight_decay()
        if hasattr(net, name) and getattr(net, name) is not None
    )
