"""What happens when something is typed at the command line, without starting a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from headstart.cli import main


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The message of a mistake: exit code 1 and one or two lines on stderr, nothing on stdout."""
        assert self.code == 1, (self.code, self.err)
        assert self.out == ""
        # Notes on the data may stand before it.
        said = self.err[self.err.rindex("headstart: ") :]
        assert 1 <= len(said.strip().splitlines()) <= 2, said
        assert "Traceback" not in self.err and "bug" not in said, self.err
        return said.strip()


Typed = Callable[..., Ended]


def typing(capsys: pytest.CaptureFixture[str]) -> Typed:
    def typed(*words: str | Path | int) -> Ended:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return typed


def save_tiny_net(folder: Path) -> Path:
    """A network that trains in no time, as a model folder in timm's layout."""
    import timm
    import torch
    from timm.models import save_for_hf

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5)
    save_for_hf(net, folder, safe_serialization=True)
    return folder
