"""`headstart data`: named data sets as plain folders of pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from headstart.cli import outcome
from headstart.cli.options import Json, Out
from headstart.errors import ConfigError


def run(
    name: Annotated[
        str | None, typer.Argument(help="Name of the set; none lists them.", show_default=False)
    ] = None,
    out: Out = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="At most so many pictures per class.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of these.")] = 0,
    json: Json = False,
) -> int:
    """Fetch a named data set as a plain folder of pictures, DIR/CLASS/* or DIR/{train,val,test}/CLASS/*.

    Example: headstart data clipart --out clipart --per-class 75
    """
    from headstart.cli.progress import say_on_stderr
    from headstart.data.catalogue import NAMES, fetch

    if name is None:
        if json:
            outcome.show_json(
                {each: {"about": set_.about, "licence": set_.licence} for each, set_ in NAMES.items()}
            )
            return outcome.GOOD
        width = max(map(len, NAMES))
        for each, set_ in NAMES.items():
            print(f"{each:<{width}}  {set_.about}. Licence: {set_.licence}")
        print("\nFetch one:  headstart data NAME --out DIR")
        return outcome.GOOD
    if out is None:
        from headstart.errors import unknown

        if name not in NAMES:
            raise ConfigError(unknown("data set", name, NAMES))
        raise ConfigError(f"Where should {name} go? Give a new folder with --out.")
    folder = fetch(name, out, per_class=per_class, seed=seed, say=say_on_stderr)
    if json:
        outcome.show_json({"name": name, "folder": str(folder)})
    else:
        print(f"Next:  headstart check {folder}     headstart compare {folder} --out {folder}-compared")
    return outcome.GOOD
