"""`headstart plan`: what a method would train, when, and how fast; no pictures are needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.asked import asked, check_hyper
from headstart.cli.options import Json, run_options
from headstart.errors import ConfigError, MethodError
from headstart.records import Run

if TYPE_CHECKING:
    from headstart.method import Group, Method
    from headstart.records import Recipe


@run_options("Network", "Method", "Training", without=("method", "source_weights"))
def run(
    flags: dict[str, Any],
    method: Annotated[str, typer.Argument(help="Name of the method.", show_default=False)],
    classes: Annotated[int, typer.Option(min=2, help="Classes of the task.")] = 10,
    pictures: Annotated[int, typer.Option(min=1, help="Training pictures of the task.")] = 300,
    json: Json = False,
    sets: list[str] | None = None,
    config: Path | None = None,
) -> int:
    """Print what a method would train, when, and how fast, without needing data or weights.

    Example: headstart plan lp-ft --epochs 20 --classes 10
    """
    fields = asked(config=config, flags=flags, sets=sets) | {"method": method}
    asked_for = Run.asked(**({"data": "-"} | fields))
    check_hyper(fields, [method])

    import torch

    from headstart import registry
    from headstart.nets import recipe as recipes
    from headstart.nets import zoo
    from headstart.parts.statistics import has_batchnorm

    cls = registry.get(method)
    hyper = registry.configure(cls, asked_for.preset, asked_for.hyper)
    registry.check_source(cls, asked_for.source)
    asked_for = asked_for.filled(registry.preset(cls, asked_for.preset).recipe)
    bare = zoo.load(asked_for.model, pretrained=False, img_size=asked_for.img_size)
    size = bare.preprocess.size
    reason = cls.fits(bare.net, {"classes": classes, "train": pictures, "val": pictures, "img_size": size})
    if reason is not None:
        raise MethodError(f"{method} cannot run here: {reason}")
    family = recipes.recipe(
        bare.net,
        train_size=pictures,
        batch_size=asked_for.batch_size,
        pretrained=asked_for.pretrained,
        optimizer=asked_for.optimizer,
        follows=cls.follows,
    )
    recipe = asked_for.recipe(family)
    other = None
    if asked_for.source is not None:
        other = zoo.load(asked_for.source, pretrained=False, img_size=size).net
    example, pretrained = torch.zeros(1, 3, size, size), asked_for.pretrained
    built = cls(bare.net, classes, source=other, example=example, pretrained=pretrained, **hyper)
    if sum(phase.epochs for phase in built.plan(asked_for.epochs)) != asked_for.epochs:
        raise ConfigError(f"The plan of {method} does not add up to {asked_for.epochs} epochs.")
    holds = has_batchnorm(built.net) and recipe.norm == "eval" and cls.keeps_statistics
    record = _record(built, asked_for, recipe, hyper, pictures=pictures, holds=holds)
    if json:
        outcome.show_json(record)
    else:
        _show(record)
    return outcome.GOOD


def _record(
    method: Method, run: Run, recipe: Recipe, hyper: dict[str, Any], *, pictures: int, holds: bool
) -> dict[str, Any]:
    every = sum(parameter.numel() for parameter in method.net.parameters())
    phases = []
    for phase in method.plan(run.epochs):
        groups = [_group(group, recipe) for group in phase.groups]
        learning = {id(parameter) for group in phase.groups for parameter in group.params}
        frozen = sum(p.numel() for p in method.parameters() if id(p) not in learning)
        phases.append({"name": phase.name, "epochs": phase.epochs, "groups": groups, "frozen": frozen})
    return {
        "method": run.method,
        "preset": run.preset,
        "hyper": hyper,
        "model": run.model,
        "parameters": every,
        "own_parameters": sum(parameter.numel() for parameter in method.parameters()) - every,
        "epochs": run.epochs,
        "batch_size": run.batch_size,
        "steps_per_epoch": -(-pictures // run.batch_size),
        "recipe": recipe.model_dump(mode="json"),
        "batchnorm_statistics_held": holds,
        "phases": phases,
    }


def _group(group: Group, recipe: Recipe) -> dict[str, Any]:
    own = group.rule is not None
    return {
        "name": group.name,
        "tensors": len(group.params),
        "numbers": sum(parameter.numel() for parameter in group.params),
        "lr": None if own else recipe.lr * group.lr,
        "weight_decay": None if own else recipe.weight_decay * group.decay,
        "own_optimizer": own,
    }


def _show(record: dict[str, Any]) -> None:
    recipe = record["recipe"]
    preset = "" if record["preset"] is None else f", preset {record['preset']}"
    own = f", and {record['own_parameters']:,} of the method's own" if record["own_parameters"] else ""
    print(f"{record['method']}{preset} on {record['model']} ({record['parameters']:,} parameters{own})")
    if record["hyper"]:
        print("  " + ", ".join(f"{name} = {value}" for name, value in record["hyper"].items()))
    momentum = f", momentum {recipe['momentum']:g}" if recipe["optimizer"] == "sgd" else ""
    print(
        f"  {recipe['optimizer']}{momentum}, {recipe['schedule']} schedule, {recipe['warmup']:.0%} warm-up, "
        f"batches of {record['batch_size']}, {record['steps_per_epoch']} steps an epoch"
    )
    if record["batchnorm_statistics_held"]:
        print("  BatchNorm keeps the source's statistics")
    for i, phase in enumerate(record["phases"], 1):
        epochs = phase["epochs"]
        print(f"\nPhase {i}: {phase['name']}, {epochs} epoch{'' if epochs == 1 else 's'}")
        width = max([len(group["name"]) for group in phase["groups"]] + [len("learns")])
        print(f"  {'learns':<{width}}  {'tensors':>7}  {'numbers':>12}  {'rate':>9}  {'decay':>9}")
        for group in phase["groups"]:
            rates = (
                f"{'own':>9}  {'own':>9}"
                if group["own_optimizer"]
                else f"{group['lr']:>9.3g}  {group['weight_decay']:>9.3g}"
            )
            print(f"  {group['name']:<{width}}  {group['tensors']:>7}  {group['numbers']:>12,}  {rates}")
        print(f"  {'frozen':<{width}}  {'':>7}  {phase['frozen']:>12,}")
