"""Flags are the fields of `Run`, and stay unset unless they are given."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from headstart.cli.options import PANELS, run_options
from headstart.records import Run

seen: dict[str, Any] = {}


@run_options(*PANELS, without=("seed",))
def command(
    flags: dict[str, Any], data: str, sets: list[str] | None = None, config: Path | None = None
) -> int:
    """Do something."""
    seen.update(flags=flags, data=data, sets=sets, config=config)
    return 0


@pytest.fixture
def app() -> typer.Typer:
    seen.clear()
    made = typer.Typer(add_completion=False)
    made.command()(command)
    return made


def test_every_field_is_in_one_panel() -> None:
    named = [name for names in PANELS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == set(Run.model_fields) - {"data", "hyper", "trial"}


def test_nothing_given_nothing_set(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["x"]).exit_code == 0
    assert seen["flags"] == {}
    assert Run.asked(**seen["flags"], data="x").model_fields_set == {"data"}


def test_what_is_given_arrives_with_its_type(app: typer.Typer) -> None:
    words = (
        "x --epochs 3 --lr 1e-3 --split 0.5 0.25 0.25 --no-nesterov --strict --schedule step --image-col p"
    )
    result = CliRunner().invoke(app, [*words.split(), "--set", "a=1", "--set", "b=2", "--config", "c.yaml"])
    assert result.exit_code == 0, result.output
    assert seen["flags"] == {
        "epochs": 3,
        "lr": 1e-3,
        "split": (0.5, 0.25, 0.25),
        "nesterov": False,
        "strict": True,
        "schedule": "step",
        "image_col": "p",
    }
    assert seen["sets"] == ["a=1", "b=2"] and seen["config"] == Path("c.yaml")


def test_the_default_given_is_given(app: typer.Typer) -> None:
    CliRunner().invoke(app, ["x", "--batch-size", "32"])
    assert Run.asked(**seen["flags"], data="x").model_fields_set == {"data", "batch_size"}


def test_every_flag_is_described(app: typer.Typer) -> None:
    import typer.main as typer_main

    made = typer_main.get_command(app)
    for parameter in made.params:
        if parameter.name not in ("data", "help"):
            assert getattr(parameter, "help", None), parameter.name
            assert "None" not in parameter.help, parameter.name  # type: ignore[attr-defined]
    assert "seed" not in {parameter.name for parameter in made.params}


def test_targets_are_hyper_parameters_with_flags_of_their_own() -> None:
    seen: dict[str, Any] = {}

    @run_options("Method")
    def command(flags: dict[str, Any], sets: list[str] | None = None, config: Path | None = None) -> int:
        seen.update(flags=flags, sets=sets)
        return 0

    names = inspect.signature(command).parameters
    assert {"flops", "params", "latency_ms"} <= set(names)
    none = dict.fromkeys(name for name in names)
    command(**{**none, "flops": 0.5, "sets": ["rounds=2"]})
    assert seen == {"flags": {}, "sets": ["rounds=2", "flops=0.5"]}
    command(**none)
    assert seen["sets"] is None


def test_several_values_are_shown_as_they_are_given(app: typer.Typer) -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "--split <float> <float> <float>" in shown
    assert CliRunner().invoke(app, ["photos", "--split", "0.5", "0.2", "0.3"]).exit_code == 0
    assert seen["flags"] == {"split": (0.5, 0.2, 0.3)}
