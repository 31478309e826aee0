"""`headstart models`: which networks there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from headstart.cli import outcome
from headstart.cli.options import Json
from headstart.errors import ModelError


def run(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Part of a name, or a pattern with * and ? for all of it.", show_default=False),
    ] = None,
    json: Json = False,
) -> int:
    """List the networks with pretrained weights: name, parameters, licence, whether they are here already.

    A local model folder in timm's layout can be given to --model as well.

    Example: headstart models "convnext*"
    """
    from headstart.nets.listing import models

    rows = models(pattern)
    if not rows:
        raise ModelError(f"No network's name fits '{pattern}'. headstart models lists all of them.")
    if json:
        outcome.show_json([asdict(row) for row in rows])
        return outcome.GOOD
    width = max(len(row.name) for row in rows)
    print(f"{'name':<{width}}  {'parameters':>10}  {'pixels':>6}  {'here':<4}  licence of the weights")
    for row in rows:
        count = "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M"
        here = "yes" if row.offline else ""
        print(
            f"{row.name:<{width}}  {count:>10}  {row.input_size:>6}  {here:<4}  {row.licence or 'not stated'}"
        )
    if all(row.parameters is None for row in rows):
        print("\nParameters are counted for shorter lists: headstart models PATTERN")
    return outcome.GOOD
