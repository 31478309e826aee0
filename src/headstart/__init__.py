"""headstart: fine-tune a pretrained network on your own pictures, with the method that earns it.

    import headstart
    result = headstart.compare("photos/", methods=["probe", "full", "lp-ft", "l2-sp"])
    print(result.verdict)
    result.best.predict("photo.jpg")

Importing this package loads neither torch nor anything else that is slow; each name below is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Data": "headstart.method",
    "Group": "headstart.method",
    "Loss": "headstart.method",
    "Method": "headstart.method",
    "Phase": "headstart.method",
    "HeadstartError": "headstart.errors",
    "Result": "headstart.records",
    "Run": "headstart.records",
    "compare": "headstart.comparison.runner",
    "export": "headstart.ship.export",
    "load": "headstart.ship.predict",
    "train": "headstart.training.job",
}

__all__ = [
    "Data",
    "Group",
    "HeadstartError",
    "Loss",
    "Method",
    "Phase",
    "Result",
    "Run",
    "__version__",
    "compare",
    "export",
    "load",
    "train",
]

if TYPE_CHECKING:
    from headstart.comparison.runner import compare
    from headstart.errors import HeadstartError
    from headstart.method import Data, Group, Loss, Method, Phase
    from headstart.records import Result, Run
    from headstart.ship.export import export
    from headstart.ship.predict import load
    from headstart.training.job import train


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'headstart' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
