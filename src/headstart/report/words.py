"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from headstart.judgement import Range


def percent(share: float | None, digits: int = 1) -> str:
    """0.873 -> 87.3 %, which no line end takes apart."""
    return "" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def points(share: float | None) -> str:
    """0.012 -> +1.2; a true minus sign, as it stands beside plus."""
    return "" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def between(share: Range | None) -> str:
    """The interval of an accuracy."""
    return "" if share is None else f"{100 * share.lo:.1f} to {100 * share.hi:.1f}"


def points_between(share: Range | None) -> str:
    """The interval of a difference."""
    return "" if share is None else f"{points(share.lo)} to {points(share.hi)}"


def duration(seconds: float | None) -> str:
    """93 -> 93 s; 240 -> 4.0 min."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(number: float | None) -> str:
    """3374851 -> 3.37 M."""
    if number is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def memory(mib: float | None) -> str:
    """1659 -> 1.62 GiB."""
    if mib is None:
        return ""
    return f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def probability(p: float | None) -> str:
    """Never 0 % or 100 %: these are draws."""
    if p is None:
        return ""
    if p > 0.995:
        return "> 99 %"
    return "< 1 %" if p < 0.005 else f"{100 * p:.0f} %"


def p_value(p: float | None) -> str:
    """0.00002 -> < 0.001."""
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def several(number: int, what: str) -> str:
    """3, 'seed' -> '3 seeds'; 1, 'class' -> '1 class'."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what}{'es' if what.endswith(('s', 'h')) else 's'}"
