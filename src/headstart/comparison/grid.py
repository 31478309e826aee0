"""From what was asked to the list of runs: every method with every seed, all else the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from headstart import registry
from headstart.errors import ConfigError, unknown
from headstart.records import Run

BASELINE = "full"

# What a comparison decides for each of its runs, and the argument that says so.
_ELSEWHERE = {
    "method": "methods",
    "preset": "methods (as 'name:preset')",
    "seed": "seeds",
    "train_size": "train_sizes",
    "trial": "trials",
}

_OF_THE_SOURCE = ("source", "source_weights")  # only given to the methods that take another network


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str  # "l2-sp", "l2-sp:paper", "l2-sp[alpha=0.1]": what the table calls the method
    run: Run


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison: by train size, split and seed, then in the order the methods were named."""

    cells: tuple[Cell, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str  # a label
    splits: tuple[int, ...] | None = None  # None: each seed has its own, or all have the one asked for
    train_sizes: tuple[int | None, ...] = (None,)  # ascending; None is all, and last


def plan(
    data: str,
    methods: str | Iterable[str],
    *,
    seeds: int | Iterable[int] = 3,
    splits: int | Iterable[int] | None = None,
    train_sizes: int | str | Iterable[int | str | None] | None = None,
    baseline: str | None = None,
    hyper: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Grid:
    """Lay out a comparison, and refuse what cannot be run before anything is trained.

    Runs of one split and seed share the pictures on each side, their order and their augmentation, because
    all of these are drawn from the two seeds and nothing but the method differs between them.

    Args:
        data: a folder of class folders, or a CSV file.
        methods: names, 'name:preset', 'name[alpha=0.1]' for the same method under several values, rooms
            ('baseline', 'constrain', ...) or 'all'; a list, or one string with commas. What is named
            twice is run once.
        seeds: how many (3 means 0, 1 and 2), or which.
        splits: how many, or which, and every seed is run on each of them. None: every seed draws a split of
            its own.
        train_sizes: numbers of training pictures, or "all": every method learns from each; the pictures of
            a smaller size are among those of a larger, val and test are the same. None: from all.
        baseline: the method that all others are compared with; it is added where it is not among
            `methods`. None: 'full' where it is among them, else the first, because training a method
            that nobody asked for may cost more than all the others.
        hyper: hyper-parameters by method, such as {"l2-sp": {"alpha": 0.1}}; the key is 'name', which
            holds wherever it is named, or the whole 'name:preset'. Those in brackets come before them.
        fields: fields of `Run` that all runs share.

    Raises:
        ConfigError: an unknown method, preset, hyper-parameter or key, or no method or seed at all.
    """
    for name, where in _ELSEWHERE.items():
        if name in fields:
            raise ConfigError(f"'{name}' is not given to a comparison. Use {where}.")
    labels = _labels(methods)
    if baseline is None:
        chosen = BASELINE if BASELINE in labels else labels[0]
    else:
        chosen = _label(baseline)
        if chosen not in labels:
            labels.append(chosen)
    numbers = _seeds("seeds", seeds)
    divided = None if splits is None else _seeds("splits", splits)
    if divided is not None and fields.get("split_seed") is not None:
        raise ConfigError("Give splits (how many, or which) or split_seed (this one), not both.")
    sizes = _sizes(train_sizes)
    per_method = _hyper(hyper or {}, labels)
    methods_ = {label: registry.get(named(label).method) for label in labels}
    if not any(cls.takes_source for cls in methods_.values()):
        first = methods_[labels[0]]
        registry.check_source(first, fields.get("source"), fields.get("source_weights"))
    without = {name: value for name, value in fields.items() if name not in _OF_THE_SOURCE}
    cells = []
    for size, split, seed in itertools.product(sizes, divided or (None,), numbers):
        for label in labels:
            cls = methods_[label]
            own = {
                "data": data,
                "method": cls.name,
                "preset": named(label).preset,
                "hyper": per_method[label],
                "seed": seed,
            }
            own |= {} if split is None else {"split_seed": split}
            own |= {} if size is None else {"train_size": size}
            run = Run.asked(**(fields if cls.takes_source else without), **own)
            cells.append(Cell(label, run))
    return Grid(
        tuple(cells),
        tuple(labels),
        tuple(numbers),
        chosen,
        splits=None if divided is None else tuple(divided),
        train_sizes=tuple(sizes),
    )


def _labels(methods: str | Iterable[str]) -> list[str]:
    if not isinstance(methods, Iterable):
        raise ConfigError(f"methods holds names such as 'full' or 'l2-sp:paper'. Got {methods!r}.")
    given = _COMMA.split(methods) if isinstance(methods, str) else list(methods)
    labels: list[str] = []
    for item in given:
        if not isinstance(item, str):
            raise ConfigError(f"methods holds names such as 'full' or 'l2-sp:paper'. Got {item!r}.")
        name = item.strip()
        if name == "all" or name in registry.ROOMS:
            found = [cls.name for cls in registry.everything() if name in ("all", cls.room)]
            if not found:
                raise ConfigError(f"No installed method is of the room '{name}'.")
            labels += found
        elif name:
            labels.append(_label(name))
    if not labels:
        raise ConfigError("No method was given. List them with: headstart methods")
    return list(dict.fromkeys(labels))


def _label(given: str) -> str:
    """The label as the table shows it, after looking up that method and preset exist."""
    if not isinstance(given, str):
        raise ConfigError(f"A method has a name such as 'full' or 'l2-sp:paper'. Got {given!r}.")
    asked = named(given)
    registry.preset(registry.get(asked.method), asked.preset)
    preset = "" if asked.preset is None else f":{asked.preset}"
    values = ",".join(f"{key}={value}" for key, value in asked.hyper.items())
    return f"{asked.method}{preset}{f'[{values}]' if values else ''}"


class Named(NamedTuple):
    """What a label asks for."""

    method: str
    preset: str | None
    hyper: dict[str, str]  # as they were written


_LABEL = re.compile(r"(?P<method>[^:\[\]]+)(?::(?P<preset>[^\[\]]*))?(?:\[(?P<hyper>[^\[\]]*)\])?")
_COMMA = re.compile(r",(?![^\[]*\])")  # not those between brackets


def named(label: str) -> Named:
    """Read 'method', 'method:preset', 'method[name=value,...]' or 'method:preset[name=value]'.

    Raises:
        ConfigError: it is none of these.
    """
    found = _LABEL.fullmatch(label.strip())
    if found is None:
        raise ConfigError(f"A method is named like l2-sp, l2-sp:paper or l2-sp[alpha=0.1]. Got {label!r}.")
    hyper: dict[str, str] = {}
    for item in filter(None, map(str.strip, (found["hyper"] or "").split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value) or key in hyper:
            raise ConfigError(f"{label}: between brackets stands name=value, each name once. Got {item!r}.")
        hyper[key] = value
    return Named(found["method"].strip(), (found["preset"] or "").strip() or None, hyper)


def _sizes(sizes: int | str | Iterable[int | str | None] | None) -> list[int | None]:
    """Ascending, all (None) last."""
    given: list[Any] = [sizes] if sizes is None or isinstance(sizes, int | str) else list(sizes)
    wrong = f"train_sizes are numbers of pictures from 1, or 'all'. Got {sizes!r}."
    found: set[int | None] = set()
    for each in given:
        if each is None or each == "all":
            found.add(None)
        elif isinstance(each, int) and not isinstance(each, bool) and each >= 1:
            found.add(each)
        else:
            raise ConfigError(wrong)
    if not found:
        raise ConfigError(wrong)
    return sorted(found, key=lambda size: (size is None, size or 0))


def _seeds(what: str, seeds: int | Iterable[int]) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ConfigError(f"{what} is how many, from 1, or a list of them. Got {seeds}.")
        return list(range(seeds))
    wrong = f"{what} is how many, or a list of whole numbers from 0. Got {seeds!r}."
    if isinstance(seeds, bool | str) or not isinstance(seeds, Iterable):
        raise ConfigError(wrong)
    numbers = list(dict.fromkeys(seeds))
    if not numbers or any(
        isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in numbers
    ):
        raise ConfigError(wrong)
    return numbers


def _hyper(hyper: Mapping[str, Mapping[str, Any]], labels: list[str]) -> dict[str, dict[str, Any]]:
    """The hyper-parameters of each label, checked against the methods' own signatures."""
    names = {label: named(label).method for label in labels}
    for key, values in hyper.items():
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"In a comparison, hyper-parameters are given by method: {{'{labels[0]}': {{'{key}': "
                f"{values!r}}}}}."
            )
        if key not in names and key not in names.values():
            raise ConfigError(unknown("method in hyper", key, [*names, *names.values()]))
    found = {}
    for label, name in names.items():
        inside = {key: _value(value) for key, value in named(label).hyper.items()}
        found[label] = {**hyper.get(name, {}), **hyper.get(label, {}), **inside}
        registry.configure(registry.get(name), named(label).preset, found[label])
    return found


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the method's own signature says what it takes
