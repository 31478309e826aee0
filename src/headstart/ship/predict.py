"""Predictions from a model folder: the same preprocessing as at evaluation, and none of the training code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.data.picture import EXTENSIONS, Unreadable, open_picture
from headstart.errors import ModelError
from headstart.ship import bundle
from headstart.ship.bundle import Bundle


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture, or why it says nothing."""

    path: str
    label: str | None  # the most probable class
    probability: float | None  # of that class, 0 to 1
    probabilities: dict[str, float] = field(default_factory=dict)  # all classes, most probable first
    error: str | None = None  # why there is no prediction

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
            "error": self.error,
        }


class Predictor:
    """A network that is ready to look at pictures.

    Attributes:
        net: the network, in eval mode.
        classes: class names, in the order of the outputs.
        preprocess: what is done to a picture before the network sees it.
        card: what is known of how the network was made.
    """

    def __init__(self, model: Bundle, *, device: str = "auto") -> None:
        self.device = _device(device)
        self.net: nn.Module = model.net.to(self.device).eval()
        self.classes = model.classes
        self.preprocess = model.preprocess
        self.card = model.card

    def predict(self, paths: str | Path | Iterable[str | Path], *, batch_size: int = 32) -> list[Prediction]:
        """Look at pictures, in the order given; folders are walked, their pictures sorted by name.

        A file that cannot be read is a row with an error, and the others go on.

        Args:
            paths: one path or many, of pictures and folders.
            batch_size: pictures per forward pass.
        """
        return list(self.stream(paths, batch_size=batch_size))

    def stream(
        self, paths: str | Path | Iterable[str | Path], *, batch_size: int = 32
    ) -> Iterator[Prediction]:
        """As `predict`, one prediction after the other as they are made."""
        if batch_size < 1:
            raise ModelError(f"batch_size is 1 or more; {batch_size} was given.")
        given = [paths] if isinstance(paths, str | Path) else paths
        every = (found for path in given for found in _pictures(Path(path)))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            while batch := list(islice(every, batch_size)):
                yield from self._batch(batch, threads)

    def _batch(self, batch: Sequence[Path | Prediction], threads: ThreadPoolExecutor) -> list[Prediction]:
        rows = list(threads.map(self._open, batch))
        pixels = [row for row in rows if isinstance(row, Tensor)]
        said = iter(self._probabilities(torch.stack(pixels)).tolist() if pixels else [])
        return [
            row if isinstance(row, Prediction) else self._row(path, next(said))
            for path, row in zip(batch, rows, strict=True)
        ]

    def _open(self, path: Path | Prediction) -> Tensor | Prediction:
        """uint8 [3, S, S], or the row of a file that is no picture."""
        if isinstance(path, Prediction):
            return path
        try:
            picture = self.preprocess.plain(open_picture(path))
        except Unreadable as error:
            return _nothing(path, error.reason)
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()

    def _probabilities(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float32 [B, K] on the CPU."""
        with torch.inference_mode():
            logits: Tensor = self.net(self.preprocess.normalise(pixels.to(self.device)))
            return logits.float().softmax(dim=1).cpu()

    def _row(self, path: Path | Prediction, said: list[float]) -> Prediction:
        assert isinstance(path, Path)
        order = sorted(range(len(said)), key=lambda index: -said[index])
        probabilities = {self.classes[index]: said[index] for index in order}
        label = self.classes[order[0]]
        return Prediction(str(path), label, probabilities[label], probabilities)


def load(path: str | Path, *, net: nn.Module | None = None, device: str = "auto") -> Predictor:
    """Load what was trained: the folder of a run, of a comparison (its chosen run), or of a model.

    Args:
        path: the folder.
        net: the network to fill, where timm cannot build it by name.
        device: "auto" (CUDA where it works, else the CPU), "cpu", "cuda", "cuda:0", "mps".

    Raises:
        ModelError: no such folder, nothing to predict with in it, or a damaged model.
    """
    return Predictor(bundle.read(find(Path(path).expanduser()), net), device=device)


def find(folder: Path) -> Path:
    """The model folder inside the folder of a run or a comparison, or the folder itself.

    Raises:
        ModelError: with what the folder is and what is missing.
    """
    if not folder.exists():
        raise ModelError(f"There is no folder '{folder}'.")
    if not folder.is_dir():
        if folder.name == bundle.WEIGHTS:
            return find(folder.parent)
        raise ModelError(f"'{folder}' is a file; give the folder of a run, a comparison or a model.")
    if (folder / "verdict.json").is_file():
        return _of_run(_chosen(folder))
    if (folder / "result.json").is_file() or (folder / "model").is_dir():
        return _of_run(folder)
    if (folder / bundle.CONFIG).is_file():
        return folder
    if (folder / "runs").is_dir():
        raise ModelError(
            f"'{folder}' is a comparison that is not finished: it has no verdict.json. Run the same command "
            "again to go on, or give one of the folders under runs/."
        )
    if (folder / "last.pt").is_file() or (folder / "run.json").is_file():
        raise ModelError(f"The run in '{folder}' is not finished. Go on with it (--resume), then predict.")
    raise ModelError(
        f"'{folder}' holds no model: neither a run (result.json), nor a comparison (verdict.json), "
        f"nor a model folder ({bundle.CONFIG})."
    )


def _of_run(folder: Path) -> Path:
    if (folder / "result.json").is_file():
        result = _object(folder / "result.json")
        status = result.get("status", "finished")
        if status != "finished":
            reason = f" {result['reason']}" if result.get("reason") else ""
            raise ModelError(
                f"The run in '{folder}' has no model to predict with: it {_was(status)}.{reason}"
            )
    model = folder / "model"
    if not (model / bundle.CONFIG).is_file():
        raise ModelError(f"The run in '{folder}' has no model: '{model}' is missing or incomplete.")
    return model


def _chosen(folder: Path) -> Path:
    """The run that a comparison's verdict takes."""
    verdict = _object(folder / "verdict.json")
    take = verdict.get("take")
    name = take.get("run") if isinstance(take, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"'{folder / 'verdict.json'}' takes no run (its take.run is {name!r}). "
            "Give one of the folders under runs/."
        )
    run = folder / "runs" / name
    if Path(name).name != name or not run.is_dir():
        raise ModelError(f"'{folder / 'verdict.json'}' takes the run '{name}', which is not under runs/.")
    return run


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' is damaged: an object is expected.")
    return value


def _was(status: Any) -> str:
    return "was interrupted; go on with --resume" if status == "interrupted" else f"has {status}"


def _pictures(path: Path) -> Iterator[Path | Prediction]:
    """The path itself, or the pictures under a folder; folders that cannot be read are rows."""
    if not path.is_dir():
        yield path
        return
    failed: list[OSError] = []
    found = False
    seen: set[str] = set()  # linked folders are walked as in training, but none twice
    for here, folders, files in os.walk(path, onerror=failed.append, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                found = True
                yield Path(here) / name
    for error in failed:
        yield _nothing(Path(error.filename or path), f"the folder cannot be read: {error.strerror}")
    if not found and not failed:
        yield _nothing(path, "no pictures in this folder")


def _nothing(path: Path, reason: str) -> Prediction:
    return Prediction(str(path), None, None, {}, reason)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The device '{asked}' cannot be used here. Give auto or cpu.") from error
    return device
