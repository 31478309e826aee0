"""How much more labels would bring: the one to take, learnt from fewer of them."""

from __future__ import annotations

SHARES = (0.25, 0.5, 0.75)  # of the labels there are; all of them were learnt from already
