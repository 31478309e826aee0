"""Names to methods, through the entry-point group "headstart.methods"; ours are listed there too."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from headstart.errors import ConfigError, MethodError, unknown
from headstart.method import Method, Preset

GROUP = "headstart.methods"
ROOMS = ("baseline", "constrain", "select", "reshape", "route")


@functools.cache
def _listed() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise MethodError(
                f"Two installed packages offer a method called '{point.name}': {other.value} and "
                f"{point.value}. Uninstall one of them."
            )
    return found


def names() -> list[str]:
    """The names of all installed methods, in no particular order; loads none of them."""
    return list(_listed())


def get(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ConfigError: no such method; says the nearest name.
        MethodError: a third party's method that cannot be imported, or does not say what it is.
    """
    points = _listed()
    if name not in points:
        raise ConfigError(unknown("method", name, points, hint="List them with: headstart methods"))
    where = f"Method '{name}' ({points[name].value})"
    try:
        cls = points[name].load()
    except Exception as error:  # somebody else's module can fail in any way
        kind = type(error).__name__
        raise MethodError(f"{where} cannot be imported: {kind}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"{where} is not a subclass of headstart.Method.")
    if getattr(cls, "name", None) != name:
        raise MethodError(f"{where} is listed as '{name}' and calls itself {getattr(cls, 'name', None)!r}.")
    if getattr(cls, "room", None) not in ROOMS:
        raise MethodError(f"{where} has room {getattr(cls, 'room', None)!r}. Allowed: {', '.join(ROOMS)}.")
    return cls


def everything() -> list[type[Method]]:
    """All installed methods, by room and then by name."""
    return sorted((get(name) for name in names()), key=lambda cls: (ROOMS.index(cls.room), cls.name))


def preset(cls: type[Method], name: str | None) -> Preset:
    """The preset of that name, or an empty one for None."""
    if name is None:
        return Preset("the method's own defaults")
    if name not in cls.presets:
        if not cls.presets:
            raise ConfigError(f"Method '{cls.name}' has no presets.")
        raise ConfigError(unknown(f"preset of '{cls.name}'", name, cls.presets))
    return cls.presets[name]


def check_source(cls: type[Method], source: str | None, weights: str | None = None) -> None:
    """Refuse another network as source where the method takes none, and weights of no network.

    Raises:
        ConfigError: says which methods take one.
    """
    if source is None:
        if weights is not None:
            raise ConfigError("source_weights belong to a source. Name its architecture with --source.")
    elif not cls.takes_source:
        takers = ", ".join(each.name for each in everything() if each.takes_source)
        raise ConfigError(
            f"Method '{cls.name}' learns from no other network, so it takes no source. Those that do: "
            f"{takers or 'none is installed'}."
        )


def configure(cls: type[Method], preset_name: str | None, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """Every hyper-parameter of a method: defaults, then the preset's, then those given; checked.

    Raises:
        ConfigError: a hyper-parameter that the method does not have, or a value that does not fit.
    """
    declared = cls.hyper()
    values = {name: parameter.default for name, parameter in declared.items()}
    values |= preset(cls, preset_name).hyper
    for name, value in hyper.items():
        if name not in declared:
            if not declared:
                raise ConfigError(f"Method '{cls.name}' has no hyper-parameters; '{name}' was given.")
            raise ConfigError(unknown(f"hyper-parameter of '{cls.name}'", name, declared))
        try:
            adapter = TypeAdapter(declared[name].schema, config=ConfigDict(arbitrary_types_allowed=True))
            values[name] = adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]["msg"]
            raise ConfigError(
                f"{cls.name}: {name} = {value!r} does not fit: {first[0].lower()}{first[1:]}."
            ) from None
    return values
