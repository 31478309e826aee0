"""Write docs/methods.md from the methods themselves; `--check` only says whether it is up to date."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from headstart import registry
from headstart.method import Method
from headstart.parts.space import NOTHING, Between, Space

PAGE = Path(__file__).parent / "methods.md"
ROOMS = {
    "baseline": "Plain ways that every other method has to beat.",
    "constrain": "Stay close to the source: a term is added to what is minimised.",
    "select": "Choose what to transfer, and where.",
    "reshape": "Change the structure while fine-tuning.",
    "route": "Choose per picture, per layer, per filter.",
}


def entry(cls: type[Method]) -> str:
    """A method's section: its module's docstring, its hyper-parameters, its presets."""
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    title, _, rest = module.partition("\n")
    lines = [f"### {cls.name}", "", title, "", "```text", rest.strip("\n"), "```", ""]
    hyper = cls.hyper()
    if hyper:
        lines += [
            "| hyper-parameter | default | tuned | meaning, and where the default comes from |",
            "|---|---|---|---|",
        ]
        for name, parameter in hyper.items():
            about = parameter.about.replace("|", "/")
            lines.append(f"| `{name}` | `{parameter.default}` | {tuned(parameter.space)} | {about} |")
        lines.append("")
    for name, preset in cls.presets.items():
        values = ", ".join(f"{key}={value}" for key, value in {**preset.hyper, **preset.recipe}.items())
        lines += [f"Preset `{name}`: {preset.about}. `{values}`", ""]
    return "\n".join(lines)


def tuned(space: Space | None) -> str:
    """Where a tuner looks, for a cell of the table."""
    if space is None:
        return ""
    off = "" if space.off is NOTHING else f"; off: {space.off}"
    if isinstance(space, Between):
        return f"{space.low:g} to {space.high:g}{off}"
    return f"{', '.join(map(str, space.values))}{off}"


def page() -> str:
    """The whole page."""
    methods = [cls for cls in registry.everything() if cls.__module__.startswith("headstart.")]
    parts = ["# Methods", "", "Read from the code by `make docs`. List them with `headstart methods`.", ""]
    for room, about in ROOMS.items():
        here = [cls for cls in methods if cls.room == room]
        if here:
            parts += [f"## {room}", "", about, "", *(entry(cls) for cls in here)]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    new = page()
    if "--check" in sys.argv:
        sys.exit(
            0
            if PAGE.exists() and PAGE.read_text(encoding="utf-8") == new
            else "docs/methods.md is old: make docs"
        )
    PAGE.write_text(new, encoding="utf-8")
    print(f"wrote {PAGE}")
