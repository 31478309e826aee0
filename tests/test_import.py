"""`import headstart` is light: no torch, no socket."""

from __future__ import annotations

import subprocess
import sys

import pytest

WATCH = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
{code}
heavy = {{"torch", "torchvision", "timm", "numpy", "sklearn", "scipy", "PIL", "accelerate", "pydantic"}}
loaded = sorted(heavy & set(sys.modules))
assert not loaded, f"loaded: {{loaded}}"
"""


@pytest.mark.parametrize(
    "code",
    [
        "import headstart; assert headstart.__version__",
        "import headstart; assert 'Method' in dir(headstart) and 'train' in headstart.__all__",
        "import headstart.errors; from headstart import HeadstartError",
    ],
)
def test_importing_loads_nothing_heavy_and_opens_no_socket(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", WATCH.format(code=code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names_are_there() -> None:
    import headstart

    for name in headstart.__all__:
        assert getattr(headstart, name) is not None, name


def test_unknown_names_are_refused_like_any_modules() -> None:
    import headstart

    with pytest.raises(AttributeError, match="module 'headstart' has no attribute 'trane'"):
        _ = headstart.trane
