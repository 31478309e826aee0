"""What can go wrong, as a tree.

    HeadstartError          shown to people as one or two lines, never as a traceback
    ├── ConfigError         an option, key or value that does not exist or does not fit
    ├── DataError           pictures, labels, splits
    ├── ModelError          a network or its weights
    ├── MethodError         a method that cannot do what was asked of it
    ├── TrainingError       training cannot go on (a loss that is not a number, no memory)
    ├── OutputError         a folder that holds something else, a full disk
    └── Unreachable         something that had to be fetched and could not be

Every message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadstartError(Exception):
    """The base of all errors that headstart raises on purpose."""


class ConfigError(HeadstartError):
    """An option, key or value that does not exist or does not fit."""


class DataError(HeadstartError):
    """Pictures, labels or splits that cannot be used."""


class ModelError(HeadstartError):
    """A network that cannot be built, or weights that do not belong to it."""


class MethodError(HeadstartError):
    """A method that cannot do what was asked of it."""


class TrainingError(HeadstartError):
    """Training cannot go on."""


class OutputError(HeadstartError):
    """A place that cannot be written to."""


class Unreachable(HeadstartError):
    """Something that had to be fetched and could not be."""


def nearest(given: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that `given` was probably meant to be, or None."""
    by_folded = {name.casefold().replace("_", "-"): name for name in allowed}
    close = difflib.get_close_matches(given.casefold().replace("_", "-"), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def unknown(kind: str, given: str, allowed: Iterable[str], *, hint: str = "") -> str:
    """The sentence for a name that does not exist: the nearest one, else all of them."""
    names = list(allowed)
    guess = nearest(given, names)
    if guess is not None:
        help_ = f"Did you mean '{guess}'?"
    elif len(names) <= 30:
        help_ = f"Allowed: {', '.join(names)}."
    else:
        help_ = f"{len(names)} names are allowed."
    return f"Unknown {kind} '{given}'. {help_}{' ' + hint if hint else ''}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".") if lines else type(error).__name__) + "."
