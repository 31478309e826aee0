"""`headstart methods`: what there is to choose from."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.options import Json
from headstart.errors import MethodError

if TYPE_CHECKING:
    from headstart.method import Method, Parameter
    from headstart.parts.space import Space


def run(
    name: Annotated[str | None, typer.Argument(help="Only this one.", show_default=False)] = None,
    json: Json = False,
) -> int:
    """List the methods: room, paper, presets, hyper-parameters with their defaults and where these come from.

    Example: headstart methods l2-sp
    """
    from headstart import registry

    found: list[type[Method]] = []
    broken: list[str] = []
    for each in [name] if name is not None else registry.names():
        try:
            found.append(registry.get(each))
        except MethodError as error:  # one that cannot be imported does not hide the others
            broken.append(str(error))
    found.sort(key=lambda cls: (registry.ROOMS.index(cls.room), cls.name))
    if json:
        outcome.show_json([_record(cls) for cls in found])
    else:
        for room in registry.ROOMS:
            here = [cls for cls in found if cls.room == room]
            if here:
                print(f"{room.upper()}  {ABOUT[room]}")
                for cls in here:
                    _show(cls)
                print()
        if name is None:
            print("Look closer:  headstart plan METHOD --epochs 20")
            print("Use one:      headstart train DATA --method METHOD --out DIR")
    for reason in broken:
        outcome.say(reason)
    return outcome.GOOD if found else outcome.MISTAKE


ABOUT = {
    "baseline": "plain fine-tuning and what it is measured against",
    "constrain": "stay close to the source network",
    "select": "choose what to transfer, and where",
    "reshape": "change the structure of the network",
    "route": "choose per picture, layer or filter",
}


def _record(cls: type[Method]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "room": cls.room,
        "about": _about(cls),
        "paper": cls.paper,
        "presets": {
            name: {"about": preset.about, "hyper": dict(preset.hyper), "recipe": dict(preset.recipe)}
            for name, preset in cls.presets.items()
        },
        "hyper": {
            name: {
                "default": parameter.default,
                "type": _type(parameter),
                "choices": parameter.choices,
                "about": parameter.about,
                "space": None if parameter.space is None else parameter.space.plain(),
            }
            for name, parameter in cls.hyper().items()
        },
    }


def _show(cls: type[Method]) -> None:
    print(f"\n  {cls.name}  {_about(cls)}")
    _wrapped(f"paper: {cls.paper}")
    for name, preset in cls.presets.items():
        _wrapped(f"--preset {name}: {preset.about}")
    for name, parameter in cls.hyper().items():
        tuned = "" if parameter.space is None else f" Tuned {_space(parameter.space)}."
        _wrapped(f"--set {name}={_value(parameter.default)}  ({_type(parameter)})  {parameter.about}{tuned}")


def _wrapped(text: str) -> None:
    width = min(shutil.get_terminal_size((110, 24)).columns, 110)
    print(
        textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 10, break_long_words=False)
    )


def _about(cls: type[Method]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _type(parameter: Parameter) -> str:
    if parameter.choices is not None:
        return " | ".join(map(str, parameter.choices))
    kind = parameter.annotation
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _space(space: Space) -> str:
    plain = space.plain()
    off = f", off at {_value(plain['off'])}" if "off" in plain else ""
    if "values" in plain:
        return f"among {', '.join(map(_value, plain['values']))}{off}"
    return f"between {plain['low']:g} and {plain['high']:g}{', by factors' if plain['log'] else ''}{off}"


def _value(value: Any) -> str:
    """As YAML writes it: what --set takes."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
