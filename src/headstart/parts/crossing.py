"""From a boundary of one network into another network, at its boundary of the same stride."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from headstart.parts.segments import Boundary


class Crossing(nn.Module):
    """What goes across boundary `a` of one network, made into what goes across boundary `b` of another.

    Maps: a 1×1 convolution where the channels differ, nothing where they do not. Tokens of one grid and as
    many class tokens: the same, for each token. Between a map and tokens (or unlike tokens): tokens lose
    their class tokens and become a map; 3×3 convolution, norm, ReLU, 3×3 convolution; and a map becomes
    tokens behind the class tokens of the network it goes into. Maps of another size are resized.
    """

    def __init__(self, a: Boundary, b: Boundary) -> None:
        super().__init__()
        self.a, self.b = a, b
        tokens = [each.kind == "tokens" for each in (a, b)]
        self.straight = all(tokens) and (a.size, a.prefix) == (b.size, b.prefix)
        self.adapter: nn.Module = nn.Identity()
        if any(tokens) and not self.straight:
            self.adapter = nn.Sequential(
                nn.Conv2d(a.channels, b.channels, 3, padding=1),
                nn.GroupNorm(1, b.channels),
                nn.ReLU(),
                nn.Conv2d(b.channels, b.channels, 3, padding=1),
            )
        elif a.channels != b.channels:
            make = nn.Linear if self.straight else nn.Conv2d
            self.adapter = make(a.channels, b.channels, *(() if self.straight else (1,)))

    @property
    def needs_prefix(self) -> bool:
        """Whether class tokens are needed for what comes out."""
        return self.b.prefix > 0 and not self.straight

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Into the other network.

        Args:
            x: what goes across `a`.
            prefix: class tokens [B, P, D] of the network it goes into, where it needs them.
        """
        if self.straight:
            out: Tensor = self.adapter(x)
            return out
        there = self.adapter(self.a.to_map(x))  # [B, C, h, w]
        if self.a.size != self.b.size:
            there = F.interpolate(there, self.b.size, mode="bilinear", align_corners=False)
        return self.b.from_map(there, prefix)
