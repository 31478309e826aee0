"""The source network: a real copy that never learns."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from headstart.parts.viewed import Viewed


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of all parameters and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # a module's own extra state is no weight
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Frozen:
    """A network as it was given: evaluated, looked at, never trained and never saved.

    It is not a module of its owner, so it gets no gradient, no traffic between ranks and no place in a
    checkpoint; the owner moves it (`apply`) and keeps only its fingerprint. The copy shares no storage
    with the network that learns: an anchor that aliases the weights makes every distance zero.

    Args:
        net: the network; where it is `Viewed`, `self.net` is the network inside of it.
    """

    def __init__(self, net: nn.Module) -> None:
        self._given = copy.deepcopy(net).requires_grad_(False).eval()
        self.net = self._given.net if isinstance(self._given, Viewed) else self._given
        self.fingerprint = fingerprint(self.net)

    def __call__(self, x: Tensor) -> Tensor:
        """The source's own output, without a graph, for pictures as the network that learns takes them."""
        with torch.no_grad():
            out: Tensor = self._given(x)
        return out

    def view(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] as `self.net` expects them: for whoever runs a part of it."""
        return self._given.view(x) if isinstance(self._given, Viewed) else x

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the source weights; they never require a gradient."""
        return self.net.named_parameters()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast, as `nn.Module.to` of the owner does."""
        self._given._apply(fn)  # type: ignore[no-untyped-call]
