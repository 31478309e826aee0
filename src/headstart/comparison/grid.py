"""From what was asked to the list of runs: every method with every seed, all else the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headstart import registry
from headstart.errors import ConfigError, unknown
from headstart.records import Run

BASELINE = "full"

# What a comparison decides for each of its runs, and the argument that says so.
_ELSEWHERE = {"method": "methods", "preset": "methods (as 'name:preset')", "seed": "seeds"}

_OF_THE_SOURCE = ("source", "source_weights")  # only given to the methods that take another network


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    label: str  # "l2-sp", or "l2-sp:paper" with a preset: what the table calls the method
    run: Run


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison: seed by seed, and within a seed in the order the methods were named."""

    cells: tuple[Cell, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str  # a label


def plan(
    data: str,
    methods: str | Iterable[str],
    *,
    seeds: int | Iterable[int] = 3,
    baseline: str | None = None,
    hyper: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Grid:
    """Lay out a comparison, and refuse what cannot be run before anything is trained.

    Runs of one seed share the split, the order of the pictures and their augmentation, because all of
    these are drawn from the run's seed and nothing but the method differs between them.

    Args:
        data: a folder of class folders, or a CSV file.
        methods: names, 'name:preset', rooms ('baseline', 'constrain', ...) or 'all'; a list, or one
            string with commas. What is named twice is run once.
        seeds: how many (3 means 0, 1 and 2), or which.
        baseline: the method that all others are compared with; it is added where it is not among
            `methods`. None: 'full' where it is among them, else the first, because training a method
            that nobody asked for may cost more than all the others.
        hyper: hyper-parameters by method, such as {"l2-sp": {"alpha": 0.1}}; the key is 'name', which
            holds for every preset of it, or 'name:preset'.
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
    numbers = _seeds(seeds)
    per_method = _hyper(hyper or {}, labels)
    takers = [label for label in labels if registry.get(_parts(label)[0]).takes_source]
    if not takers:
        first = registry.get(_parts(labels[0])[0])
        registry.check_source(first, fields.get("source"), fields.get("source_weights"))
    without = {name: value for name, value in fields.items() if name not in _OF_THE_SOURCE}
    cells = []
    for seed in numbers:
        for label in labels:
            name, preset = _parts(label)
            own = fields if registry.get(name).takes_source else without
            run = Run.asked(**own, data=data, method=name, preset=preset, hyper=per_method[label], seed=seed)
            cells.append(Cell(label, run))
    return Grid(tuple(cells), tuple(labels), tuple(numbers), chosen)


def _labels(methods: str | Iterable[str]) -> list[str]:
    if not isinstance(methods, Iterable):
        raise ConfigError(f"methods holds names such as 'full' or 'l2-sp:paper'. Got {methods!r}.")
    given = methods.split(",") if isinstance(methods, str) else list(methods)
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
    name, preset = _parts(given)
    registry.preset(registry.get(name), preset)
    return name if preset is None else f"{name}:{preset}"


def _parts(label: str) -> tuple[str, str | None]:
    name, _, preset = label.partition(":")
    return name.strip(), preset.strip() or None


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        if seeds < 1:
            raise ConfigError(f"seeds is how many, from 1, or a list of them. Got {seeds}.")
        return list(range(seeds))
    wrong = f"seeds is how many, or a list of whole numbers from 0. Got {seeds!r}."
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
    names = {label: _parts(label)[0] for label in labels}
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
        found[label] = {**hyper.get(name, {}), **hyper.get(label, {})}
        registry.configure(registry.get(name), _parts(label)[1], found[label])
    return found
