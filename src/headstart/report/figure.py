"""A figure as plain data: what Plotly draws, what a screen reader says, and the numbers as a table."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The page gives each method one colour and one marker, so that no figure needs colour alone.
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "hexagon", "triangle-down")


@dataclass
class Figure:
    """One figure of the page.

    Args:
        id: of the element; letters, digits and dashes.
        title: what it shows.
        says: what there is to see, in a sentence: for those who cannot see it, and those in a hurry.
        traces: Plotly's; colours are names of the page's own, such as "var(--m0)".
        layout: Plotly's, beyond what all figures share.
        head: of the table of numbers.
        rows: of the table of numbers.
        note: how to read it.
        height: in pixels.
    """

    id: str
    title: str
    says: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""
    height: int = 380
    choices: dict[str, list[Any]] = field(default_factory=dict)  # other things for the x axis: name -> values

    @property
    def spec(self) -> dict[str, Any]:
        """What the page's script draws."""
        layout = {"height": self.height, **self.layout}
        found: dict[str, Any] = {"data": self.traces, "layout": layout}
        return found | ({"choices": self.choices} if self.choices else {})


def colour(index: int) -> str:
    """Of the method in this place of the table."""
    return f"var(--m{index % 12})"


def marker(index: int) -> str:
    """Of the method in this place of the table."""
    return MARKERS[index % len(MARKERS)]


def plain(text: object) -> str:
    """Text that Plotly shows as it is: it would read <b> and &amp; as its own small HTML."""
    return html.escape(str(text), quote=False)


def short(text: str, most: int = 28) -> str:
    """A name that leaves room for the picture."""
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: Any, digits: int = 4) -> float | None:
    """Four digits are what a screen can show; numbers that are none become gaps."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    if not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def numbers(values: Iterable[Any], digits: int = 4) -> list[float | None]:
    """Each of them so."""
    return [number(value, digits) for value in values]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, **more}


def thinned(values: Sequence[Any], most: int = 160) -> list[int]:
    """Places to show of a long list, the first and the last among them."""
    if len(values) <= most:
        return list(range(len(values)))
    return sorted({round(i * (len(values) - 1) / (most - 1)) for i in range(most)})
