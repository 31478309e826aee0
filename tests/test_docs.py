"""What the pages say is true: their code runs, and what is read from the code is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from headstart import registry
from headstart.cli.entry import COMMANDS
from headstart.testing import check_method

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_loop_in_the_readme_trains() -> None:
    (loop,) = [block for block in blocks("README.md", "python") if "method.phases" in block]
    torch.manual_seed(0)
    loader = [(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)] * 2
    scope: dict[str, Any] = {"net": timm.create_model("test_resnet"), "loader": loader, "torch": torch}
    exec(loop.replace("epochs=20", "epochs=2"), scope)
    assert scope["net"](loader[0][0]).shape == (6, 10)


def test_the_python_in_the_readme_compares_trains_and_predicts(
    pictures: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (script,) = [block for block in blocks("README.md", "python") if "headstart.compare" in block]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new-photos").mkdir()
    (pictures / "class_a" / "000.png").rename(tmp_path / "new-photos" / "001.jpg")
    pictures.rename(tmp_path / "photos")
    script = script.replace("epochs=20", f"epochs=1, model={str(tiny_model)!r}").replace("seeds=3", "seeds=1")
    exec(script, {})
    assert "label=" in capsys.readouterr().out


def test_the_method_in_contributing_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks("CONTRIBUTING.md", "python")[0]
    (tmp_path / "l1_head.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    cls = importlib.import_module("l1_head").L1Head
    checks = ["describes_itself", "parts_add_up", "export_says_what_predict_says"]
    from headstart.testing import CHECKS

    assert set(checks) <= set(CHECKS), sorted(CHECKS)
    check_method(cls, only=checks)


def test_the_constraints_added_up_in_contributing_are_their_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = [block for block in blocks("CONTRIBUTING.md", "python") if "DELTAWithPull" in block]
    (tmp_path / "added_up.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    cls = importlib.import_module("added_up").DELTAWithPull
    x, y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    torch.manual_seed(0)
    method = cls(timm.create_model("test_resnet"), 3, pull=0.5, attention=False, example=x[:1])
    assert method(x, y).parts["pull"] == 0
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter += 0.1
    loss = method(x, y)
    start = dict(method.source.named_parameters())
    head = {id(parameter) for parameter in method.head_module.parameters()}
    moved = [(p - start[n]) for n, p in method.net.named_parameters() if id(p) not in head]
    expected = 0.25 * sum(each.square().sum() for each in moved)
    torch.testing.assert_close(loss.parts["pull"], expected.detach(), rtol=1e-4, atol=0)
    assert set(loss.parts) == {"task", "head", "maps", "pull"}
    torch.testing.assert_close(loss.total, sum(loss.parts.values()), rtol=1e-5, atol=1e-5)


def test_the_page_of_methods_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_lists_every_method_and_no_other_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ours = [cls.name for cls in registry.everything() if cls.__module__.startswith("headstart.")]
    assert all(f"| `{name}` |" in readme for name in ours)
    typed = " ".join(blocks("README.md", "bash")) + " ".join(re.findall(r"`[^`\n]+`", readme))
    said = set(re.findall(r"headstart ([a-z]+)", typed))
    assert len(said) > 4
    assert said <= set(COMMANDS)


def test_links_between_pages_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/design.md", "bench/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), (page, target)


def test_versions_are_bounded_below_only_and_pinned_beside() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [
        one for extra in project["optional-dependencies"].values() for one in extra
    ]
    assert not [one for one in wanted if "==" in one or "<" in one or "~=" in one]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in pins)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins}
    names = {re.sub(r"[-_.]+", "-", re.split(r"[>=\[ ]", one)[0]).lower() for one in wanted} - {"headstart"}
    assert names <= pinned, names - pinned
