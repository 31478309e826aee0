"""Flags, --set and YAML become the same fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.cli.asked import asked, check_hyper, write
from headstart.errors import ConfigError
from headstart.records import Run


def sets(*texts: str, flags: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return asked(config=None, flags=flags or {}, sets=list(texts), **more)


def test_values_are_read_as_yaml() -> None:
    assert sets("lr=0.01", "epochs=3", "strict=true", "clip=null", "data=a=b") == {
        "lr": 0.01,
        "epochs": 3,
        "strict": True,
        "clip": None,
        "data": "a=b",
    }
    assert sets("split=[0.5, 0.25, 0.25]") == {"split": [0.5, 0.25, 0.25]}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2"])
def test_numbers_that_yaml_takes_for_text(text: str, tmp_path: Path) -> None:
    assert sets(f"lr={text}") == {"lr": 1e-3}
    assert sets(f"alpha={text}") == {"hyper": {"alpha": 1e-3}}
    (tmp_path / "c.yaml").write_text(f"lr: {text}\nhyper:\n  alpha: {text}\n")
    assert asked(config=tmp_path / "c.yaml", flags={}, sets=[]) == {"lr": 1e-3, "hyper": {"alpha": 1e-3}}


def test_kebab_names_and_hyper() -> None:
    assert sets("batch-size=8", "hyper.alpha=0.1", "beta=2") == {
        "batch_size": 8,
        "hyper": {"alpha": 0.1, "beta": 2},
    }


def test_hyper_by_method_only_where_there_are_several() -> None:
    assert sets("l2-sp.alpha=1", "hyper.l2-sp:paper.beta=2", "C=1", per_method=True) == {
        "hyper": {"l2-sp": {"alpha": 1}, "l2-sp:paper": {"beta": 2}, "C": 1}
    }
    with pytest.raises(ConfigError, match="only hyper has parts"):
        sets("l2-sp.alpha=1")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr"], "KEY=VALUE"),
        (["=3"], "KEY=VALUE"),
        (["lr=1", "lr=2"], "'lr' twice"),
        (["hyper.a=1", "a=2"], "'a' twice"),
        (["lr=[1"], "not YAML"),
        (["hyper=3"], "name a hyper-parameter"),
        (["hyper.=3"], "name a hyper-parameter"),
    ],
)
def test_mistakes_in_set(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sets(*texts)


def test_flag_and_set_of_one_field() -> None:
    with pytest.raises(ConfigError, match="'lr' is given twice"):
        sets("lr=1", flags={"lr": 2.0})


def test_what_comes_later_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("epochs: 5\nlr: 0.1\nseed: 7\nclip: null\nhyper: {alpha: 1, beta: 2}\n")
    assert asked(config=tmp_path / "c.yaml", flags={"lr": 0.2}, sets=["seed=8", "alpha=3"]) == {
        "epochs": 5,
        "lr": 0.2,
        "seed": 8,
        "hyper": {"alpha": 3, "beta": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "Unknown key 'epoch'. Did you mean 'epochs'"),
        ("- 3", "holds list"),
        ("a: [", "is not YAML"),
        ("hyper: 3", "hyper holds 3"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        asked(config=tmp_path / "c.yaml", flags={}, sets=[])
    assert str(tmp_path / "c.yaml") in str(caught.value)


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        asked(config=tmp_path / "nix.yaml", flags={}, sets=[])
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert asked(config=tmp_path / "c.yaml", flags={}, sets=[]) == {}


def test_keys_of_a_command(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("methods: [full, probe]\nseeds: 2\n")
    assert asked(config=tmp_path / "c.yaml", flags={}, sets=[], extra=("methods", "seeds")) == {
        "methods": ["full", "probe"],
        "seeds": 2,
    }
    with pytest.raises(ConfigError, match=r"Unknown key 'methods'\. Did you mean 'method'"):
        asked(config=tmp_path / "c.yaml", flags={}, sets=[])


def test_a_name_that_no_method_has() -> None:
    check_hyper({"hyper": {"alpha": 1}}, ["l2-sp", "full"])
    check_hyper({}, ["no such method: nothing is asked of it"])
    with pytest.raises(ConfigError, match=r"'alpa'\. Did you mean 'alpha'"):
        check_hyper({"hyper": {"alpa": 1}}, ["l2-sp"])
    with pytest.raises(ConfigError, match=r"'epoch'\. Did you mean 'epochs'"):
        check_hyper({"hyper": {"epoch": 1}}, ["l2-sp"])
    with pytest.raises(ConfigError, match=r"'xyzzy'\. Allowed: C\."):
        check_hyper({"hyper": {"xyzzy": 1}}, ["probe"])


def test_what_is_written_asks_for_the_same_again(tmp_path: Path) -> None:
    fields = {"data": "Fotos/Köln", "lr": 1e-5, "split": (0.5, 0.25, 0.25), "hyper": {"alpha": 0.1}}
    write(tmp_path / "c.yaml", fields, {"l2-sp": {"lr": 0.01, "hyper": {"beta": 2}}})
    again = asked(config=tmp_path / "c.yaml", flags={}, sets=[])
    assert Run.asked(**again) == Run.asked(**fields)
    assert Run.asked(**again).model_fields_set == Run.asked(**fields).model_fields_set
    comments = [
        line.removeprefix("# ")
        for line in (tmp_path / "c.yaml").read_text().splitlines()
        if line.startswith("#   ")
    ]
    assert yaml.safe_load("\n".join(comments)) == {"lr": 0.01, "hyper": {"beta": 2}}
