"""The fields of `headstart.records.Run` as flags, for every command that asks for a run.

A flag that was not given stays unset: a preset and the network family's recipe fill in only what nobody
asked for.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic.fields import FieldInfo

from headstart.records import Recipe, Run

PANELS: dict[str, tuple[str, ...]] = {
    "Data": (
        "image_col",
        "label_col",
        "split_col",
        "group_col",
        "split",
        "split_seed",
        "train_size",
        "strict",
        "class_weights",
        "augment",
    ),
    "Network": ("model", "weights", "img_size", "source", "source_weights"),
    "Method": ("method", "preset"),
    "Training": (
        "epochs",
        "batch_size",
        "seed",
        "optimizer",
        "lr",
        "momentum",
        "nesterov",
        "weight_decay",
        "schedule",
        "warmup",
        "label_smoothing",
        "clip",
        "ema",
        "norm",
        "mixup",
        "cutmix",
        "grad_accum",
        "patience",
        "keep",
    ),
    "Machine": ("device", "precision", "workers", "channels_last", "compile"),
}

# How small a network is to become: hyper-parameters of methods that reshape, under flags of their own.
TARGETS = {
    "flops": "Target: the share of the network's FLOPs that is left, such as 0.5; for transtailor",
    "params": "Target: the share of its parameters; for transtailor",
    "latency_ms": "Target: milliseconds for one picture on this machine's CPU; for transtailor",
}

_TITLES = {"Training": "Training (not given: the recipe of the network's family)"}

Data = typing.Annotated[
    Path | None, typer.Argument(help="A folder of class folders, or a CSV file.", show_default=False)
]
Out = typing.Annotated[
    Path | None, typer.Option("--out", "-o", help="Where the results go; a new or empty folder.")
]
Json = typing.Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]

Track = typing.Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Tell trackers too: tensorboard, mlflow, wandb, trackio; each is an extra.",
        rich_help_panel="Machine",
    ),
]

_SET = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    help="Any field by its name, or a hyper-parameter of the method: lr=0.01, alpha=0.1, hyper.alpha=0.1. "
    "May be given several times; values are read as YAML.",
    rich_help_panel="Method",
)
_CONFIG = typer.Option(
    "--config",
    metavar="FILE.yaml",
    help="The same fields in a file; flags and --set come before it.",
    rich_help_panel="Method",
)


def run_options(
    *panels: str, without: Collection[str] = ()
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the fields of `Run` as flags, and --set and --config.

    The command takes `flags: dict[str, Any]` (the fields that were given), `sets: list[str]` and
    `config: Path | None` besides its own parameters.

    Args:
        panels: names in `PANELS`, in the order of the help.
        without: fields that this command has another way to ask for.
    """
    fields = [(panel, name) for panel in panels for name in PANELS[panel] if name not in without]
    targets = TARGETS if "Method" in panels else {}

    def give(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**values: Any) -> int:
            flags = {name: values.pop(name) for _, name in fields}
            given = {name: value for name, value in flags.items() if value is not None}
            asked = {name: values.pop(name) for name in targets}
            told = [f"{name}={value}" for name, value in asked.items() if value is not None]
            if told:
                values["sets"] = [*(values.get("sets") or []), *told]
            return command(flags=given, **values)

        own = inspect.signature(command, eval_str=True)
        parameters = [
            parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=_SHARED.get(name, parameter.annotation))
            for name, parameter in own.parameters.items()
            if name != "flags"
        ]
        parameters += [_flag(name, panel) for panel, name in fields]
        parameters += [_target(name, about) for name, about in targets.items()]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return give


_SHARED: dict[str, Any] = {
    "sets": typing.Annotated[list[str] | None, _SET],
    "config": typing.Annotated[Path | None, _CONFIG],
}


def _flag(name: str, panel: str) -> inspect.Parameter:
    """One field as a flag that is None unless it is given."""
    field = Run.model_fields[name]
    kind, metavar = _kind(field)
    choices = metavar.split("|") if kind is str and metavar else []
    option = typer.Option(
        metavar=metavar,
        help=_help(name, field),
        show_default=False,
        rich_help_panel=_TITLES.get(panel, panel),
        autocompletion=(lambda: choices) if choices else None,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=typing.Annotated[kind | None, option],
    )


def _target(name: str, about: str) -> inspect.Parameter:
    """A target as a flag that is None unless it is given."""
    option = typer.Option(help=about, show_default=False, rich_help_panel="Method")
    kind = typing.Annotated[float | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _kind(field: FieldInfo) -> tuple[Any, str | None]:
    """The type of a flag and how its value is written; few values by their names. The record checks them."""
    kind: Any = field.annotation
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is Literal:
        return str, "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:  # typer joins them with commas, and then takes none
        return kind, " ".join(f"<{each.__name__}>" for each in typing.get_args(kind))
    return kind, None


def _help(name: str, field: FieldInfo) -> str:
    inherited = Recipe.model_fields[name].description if name in Recipe.model_fields else None
    about = (_ABOUT.get(name) or field.description or inherited or "").replace("None:", "not given:")
    about = about if about.partition(" ")[0].endswith(",") else about[:1].upper() + about[1:]
    shown = "" if field.default in (None, False) else _plain(field.default)
    return f"{about}{f' (default: {shown})' if shown else ''}".replace("[", r"\[")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# Fields whose names say it all among records, but not in a help page.
_ABOUT = {
    "method": "name of the method; headstart methods lists them",
    "epochs": "passes over the training pictures",
    "seed": "of order, augmentation and the new head",
    "augment": "how training pictures are varied",
    "optimizer": "rule of the steps",
    "nesterov": "Nesterov's form of momentum",
    "schedule": "how the rate falls",
    "label_smoothing": "share of each label that is spread over all classes",
    "precision": "of the computation; weights stay float32",
    "compile": "compile the network first (torch.compile)",
}
