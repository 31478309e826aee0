"""Where a tuner may look for a hyper-parameter's value: it stands beside the default, in the annotation.

    alpha: Annotated[NonNegativeFloat, Between(0.001, 1.0, log=True, off=0.0)] = 0.01
    layer_decay: Annotated[PositiveFloat, Among(1.0, 0.9, 0.75, off=1.0)] = 1.0

`off` is the value at which this part of the method does nothing. A tuner tries the default first and all
`off` values together second, so that a method can lose to plain fine-tuning only by noise.

What is not worth a trial on little data has no space: a hyper-parameter without one stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


class _Nothing:
    """No `off` value; not None, which may be one."""

    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"  # one and the same in every process


NOTHING: Final = _Nothing()


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`, both included.

    Args:
        low: smallest value; above 0 where `log`.
        high: largest.
        log: equal factors are equally likely, instead of equal steps.
        off: the value that turns this part of the method off; it may lie outside.
    """

    low: float
    high: float
    log: bool = False
    off: Any = NOTHING

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low < high is needed, and low > 0 where log. Got {self!r}.")

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at the ends: what fits there, fits between."""
        return self.low, self.high

    def plain(self) -> dict[str, Any]:
        """This space as data that JSON holds."""
        return {"low": self.low, "high": self.high, "log": self.log, **_off(self.off)}


@dataclass(frozen=True, init=False)
class Among:
    """A few values, in no order.

    Args:
        values: plain values: numbers, texts, booleans, None.
        off: the value that turns this part of the method off; it need not be among them.
    """

    values: tuple[Any, ...]
    off: Any = NOTHING

    def __init__(self, *values: Any, off: Any = NOTHING) -> None:
        if len(values) < 1 or len(set(values)) < len(values):
            raise ValueError(f"values, each once, are needed. Got {values!r}.")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "off", off)

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    def plain(self) -> dict[str, Any]:
        """This space as data that JSON holds."""
        return {"values": list(self.values), **_off(self.off)}


Space = Between | Among


def _off(off: Any) -> dict[str, Any]:
    return {} if off is NOTHING else {"off": off}
