"""Saving and resuming: a checkpoint is whole or it is not there."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from headstart.errors import OutputError, TrainingError


class Checkpoint:
    """The resume state of one run, `last.pt` in its folder.

    It is written beside the old one, flushed to disk and renamed over it: a process killed at any moment,
    or a disk that fills up, leaves the last good one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "last.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint.

        Raises:
            OutputError: it could not be written; the one before is untouched.
        """
        fresh = self.path.with_name(f"last.pt.{os.getpid()}.new")
        try:
            with fresh.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else str(error)
            last = "The last good one stays; resume from it" if self.path.exists() else "Start again"
            raise OutputError(
                f"The checkpoint in {self.path.parent} could not be written: {reason}. "
                f"{last} when there is room."
            ) from error

    def load(self) -> dict[str, Any] | None:
        """The saved state on the CPU, or None where nothing was saved.

        Raises:
            TrainingError: there is a file, but it is not a checkpoint.
        """
        for stale in self.path.parent.glob("last.pt.*.new"):
            stale.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise TrainingError(
                f"{self.path} cannot be read as a checkpoint ({type(error).__name__}). "
                "Delete it to start this run again from its first epoch."
            ) from error
        return state

    def delete(self) -> None:
        """Forget it: the run is finished."""
        self.path.unlink(missing_ok=True)
