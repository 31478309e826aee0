"""Which parameters are kernels: the ones that weight decay, and the pull to a source, are meant for."""

from __future__ import annotations

from torch import Tensor

# Learned tokens and embeddings have two or more dimensions but are no kernels.
_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed", "relative_position_bias_table", "mask_token")


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a kernel: two or more dimensions, and no learned token or embedding.

    Args:
        name: its dotted name, such as `blocks.0.attn.qkv.weight`.
        parameter: of any shape.
    """
    return parameter.ndim >= 2 and not name.endswith(_TOKENS)
