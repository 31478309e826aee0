"""The house is open: a package of somebody else's brings a method, and everything works with it.

A small distribution with one method is written, installed by pip into a folder of its own, and used through
the command line, without a line of headstart's being changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from conftest import paint

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "somebody-elses"
version = "1.2.3"
dependencies = ["headstart"]

[project.entry-points."headstart.methods"]
theirs = "somebody_elses:Theirs"
"""

METHOD = '''
"""Theirs: first the head, then everything, held by the source's own features.

    J(w) + strength * mean (z - z0)^2

Paper: nobody's, made up for a test.

Differs from the paper: nothing known.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headstart import Loss, Method, Phase


class Theirs(Method):
    """Two phases, one term.

    Args:
        strength: of the term. 0.1, made up.
    """

    name = "theirs"
    room = "constrain"
    paper = "Nobody, 2026"
    keeps_source = True

    def __init__(
        self, net: nn.Module, classes: int | None = None, *, strength: float = 0.1, **given: Any
    ) -> None:
        super().__init__(net, classes, **given)
        self.strength = strength

    def plan(self, epochs: int) -> list[Phase]:
        head = [group for group in self.groups() if group.name.startswith("head")]
        return [
            Phase("head", epochs // 2, head, self.objective),
            Phase("all", epochs - epochs // 2, self.groups(), self.objective),
        ]

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        z = self.net.forward_features(x)
        z0 = self.source.net.forward_features(x)
        held = self.strength * (z - z0).square().mean()
        return self.loss(self.net.forward_head(z), y, held=held)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the distribution was installed."""
    base = tmp_path_factory.mktemp("theirs")
    source, target = base / "source", base / "site"
    (source / "somebody_elses").mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "somebody_elses" / "__init__.py").write_text(METHOD)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm network in a local folder, as `timm.models.save_for_hf` leaves it."""
    folder = tmp_path_factory.mktemp("network") / "tiny"
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    timm.models.save_for_hf(net, str(folder), safe_serialization=True)
    return folder


def run(installed: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python with their package in reach."""
    seen = {**os.environ, "PYTHONPATH": str(installed), "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=seen)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_it_is_listed_with_ours(installed: Path) -> None:
    listed = json.loads(run(installed, "-m", "headstart", "methods", "--json").stdout)
    found = {each["name"]: each for each in listed}
    assert {"full", "theirs"} <= set(found)
    assert found["theirs"]["room"] == "constrain"
    assert found["theirs"]["paper"] == "Nobody, 2026"
    assert "strength" in json.dumps(found["theirs"])


def test_it_is_planned(installed: Path) -> None:
    said = run(installed, "-m", "headstart", "plan", "theirs", "--epochs", "5").stdout
    assert "head" in said
    assert "all" in said


@pytest.mark.slow
def test_it_trains_through_the_command_line(installed: Path, network: Path, tmp_path: Path) -> None:
    data, out = paint(tmp_path / "pictures", per_class=10), tmp_path / "out"
    run(
        installed,
        *("-m", "headstart", "train", str(data), "--method", "theirs", "--set", "strength=0.25"),
        *("--model", str(network), "--epochs", "2", "--img-size", "32", "--device", "cpu", "--out", str(out)),
    )
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["method"] == "theirs"
    assert result["hyper"] == {"strength": 0.25}
    assert [(phase["name"], phase["epochs"]) for phase in result["phases"]] == [("head", 1), ("all", 1)]

    # What is left predicts without their package.
    picture = next(data.rglob("*.png"))
    seen = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "predict", str(out), str(picture), "--format", "jsonl"],
        capture_output=True,
        text=True,
        env=seen,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[0])["label"] in {"class_a", "class_b", "class_c"}


def test_it_can_be_checked_without_pytest(installed: Path) -> None:
    code = """
import sys
from somebody_elses import Theirs
from headstart.testing import CHECKS, ON_RANKS, check_method, networks
make_net = networks()["BatchNorm (test_resnet)"]
report = check_method(Theirs, make_net=make_net, only=[name for name in CHECKS if name not in ON_RANKS])
assert set(report.values()) == {"holds"}, report
assert "pytest" not in sys.modules
"""
    run(installed, "-c", code)
