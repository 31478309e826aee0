"""Predictions from a model folder: the same preprocessing as at evaluation, and none of the training code.

With onnxruntime torch is not needed either: nothing here imports it before it is asked for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from headstart.data.picture import EXTENSIONS, Unreadable, open_picture
from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, ModelError, unknown
from headstart.ship import contents
from headstart.ship import folder as files
from headstart.ship.calibration import Calibration
from headstart.ship.engines import ENGINES, Engine, Onnx, Torch, has_onnxruntime
from headstart.ship.find import find

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture, or why it says nothing."""

    path: str
    label: str | None  # the most probable class
    probability: float | None  # of that class, 0 to 1
    probabilities: dict[str, float] = field(default_factory=dict)  # all classes, most probable first
    error: str | None = None  # why there is no prediction
    unsure: bool = False  # whether a human should look: the probability is below the model's threshold

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "unsure": self.unsure,
            "probabilities": self.probabilities,
            "error": self.error,
        }


class Predictor:
    """A network that is ready to look at pictures. Its methods may be called from several threads.

    Attributes:
        classes: class names, in the order of the outputs.
        preprocess: what is done to a picture before the network sees it.
        calibration: what makes probabilities of logits, and `unsure` of probabilities.
        card: what is known of how the network was made.
        folder: the model folder it was read from; None where there is none.
    """

    def __init__(
        self,
        engine: Engine,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        calibration: Calibration | None = None,
        card: dict[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._engine = engine
        self.classes = list(classes)
        self.preprocess = preprocess
        self.calibration = calibration or Calibration()
        self.card = card or {}
        self.folder = folder

    @property
    def engine(self) -> str:
        """What runs the network: "onnx" or "torch"."""
        return self._engine.name

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name the model: equal ones say the same; "" without a folder."""
        return "" if self.folder is None else files.fingerprint(self.folder)

    @property
    def net(self) -> nn.Module:
        """The network as a torch module, in eval mode.

        Raises:
            ModelError: it runs on onnxruntime.
        """
        if not isinstance(self._engine, Torch):
            raise ModelError(
                'This model runs on onnxruntime. For the torch module: load(..., engine="torch").'
            )
        return self._engine.net

    def predict(self, paths: str | Path | Iterable[str | Path], *, batch_size: int = 32) -> list[Prediction]:
        """Look at pictures, in the order given; folders are walked, their pictures sorted by name.

        A file that cannot be read is a row with an error, and the others go on.

        Args:
            paths: one path or many, of pictures and folders.
            batch_size: pictures per forward pass.
        """
        return list(self.stream(paths, batch_size=batch_size))

    def stream(
        self,
        paths: str | Path | Iterable[str | Path],
        *,
        batch_size: int = 32,
        skip: Container[str] = frozenset(),
    ) -> Iterator[Prediction]:
        """As `predict`, one prediction after the other as they are made.

        Args:
            paths: one path or many, of pictures and folders; read as the work goes on.
            batch_size: pictures per forward pass.
            skip: paths of pictures that are left out, as they stand in `Prediction.path`.
        """
        if batch_size < 1:
            raise ModelError(f"batch_size is 1 or more; {batch_size} was given.")
        given = [paths] if isinstance(paths, str | Path) else paths
        found = (each for path in given for each in _pictures(Path(path)))
        every = (each for each in found if not isinstance(each, Path) or str(each) not in skip)
        waiting: deque[tuple[list[Path | Prediction], list[Future[np.ndarray | Prediction]]]] = deque()
        threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            while batch := list(islice(every, batch_size)):
                # The next batch is decoded while the network looks at this one.
                waiting.append((batch, [threads.submit(self._open, each) for each in batch]))
                if len(waiting) > 1:
                    yield from self._rows(*waiting.popleft())
            while waiting:
                yield from self._rows(*waiting.popleft())
        finally:
            threads.shutdown(cancel_futures=True)

    def look(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """Look at pictures that are in memory, in one forward pass; their `path` is empty.

        Args:
            images: of any size, of mode RGB, as `headstart.data.picture.open_picture` gives them.
        """
        return self.judge(np.stack([self.prepare(image) for image in images])) if images else []

    def prepare(self, image: Image.Image) -> np.ndarray:
        """A picture of any size, mode RGB, as the network takes it: uint8 [S, S, 3]."""
        return self.preprocess.plain(image)

    def judge(self, pixels: np.ndarray, names: Sequence[str] | None = None) -> list[Prediction]:
        """Look at pictures that were prepared.

        Args:
            pixels: uint8 [B, S, S, 3], of `prepare`.
            names: for `Prediction.path`.
        """
        said = self.calibration.probabilities(self._engine(pixels))
        return [self._row(name, row) for name, row in zip(names or [""] * len(said), said, strict=True)]

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """What the network itself says of prepared pictures: uint8 [B, S, S, 3] -> float32 [B, K]."""
        return self._engine(pixels)

    def _rows(
        self, batch: Sequence[Path | Prediction], opened: Sequence[Future[np.ndarray | Prediction]]
    ) -> list[Prediction]:
        rows = [each.result() for each in opened]
        names = [str(path) for path, row in zip(batch, rows, strict=True) if not isinstance(row, Prediction)]
        pixels = [row for row in rows if not isinstance(row, Prediction)]
        said = iter(self.judge(np.stack(pixels), names) if pixels else [])
        return [row if isinstance(row, Prediction) else next(said) for row in rows]

    def _open(self, path: Path | Prediction) -> np.ndarray | Prediction:
        """uint8 [S, S, 3], or the row of a file that is no picture."""
        if isinstance(path, Prediction):
            return path
        try:
            return self.prepare(open_picture(path))
        except Unreadable as error:
            return _nothing(path, error.reason)

    def _row(self, path: str, said: np.ndarray) -> Prediction:
        order = np.argsort(-said, kind="stable")
        best = float(said[order[0]])
        probabilities = {self.classes[index]: float(said[index]) for index in order}
        label = self.classes[order[0]]
        return Prediction(path, label, best, probabilities, unsure=self.calibration.unsure(best))


def load(
    path: str | Path,
    *,
    net: nn.Module | None = None,
    device: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """Load what was trained: the folder of a run, of a comparison (its chosen run), or of a model.

    Args:
        path: the folder.
        net: the network to fill, where it cannot be built from the folder.
        device: "auto" (CUDA where it works, else the CPU), "cpu", "cuda", "cuda:0", "mps".
        engine: "onnx" (onnxruntime, on the CPU, without torch), "torch", or "auto": onnx where the folder has
            an ONNX file, onnxruntime is installed and neither a network nor another device is asked for.
        threads: of onnxruntime; None: as many as this process has cores.

    Raises:
        ModelError: no such folder, nothing to predict with in it, or a model that was altered or is damaged.
        ConfigError: an engine that does not exist.
    """
    if engine not in ENGINES:
        raise ConfigError(unknown("engine", engine, ENGINES))
    folder = find(Path(path).expanduser())
    if engine == "auto":
        plain = net is None and device in ("auto", "cpu")
        engine = "onnx" if plain and (folder / files.ONNX).is_file() and has_onnxruntime() else "torch"
    return _by_torch(folder, net, device) if engine == "torch" else _by_onnx(folder, threads)


def _by_torch(folder: Path, net: nn.Module | None, device: str) -> Predictor:
    from headstart.ship import bundle

    model = bundle.read(folder, net)
    return Predictor(
        Torch(model.net, model.preprocess, device),
        model.classes,
        model.preprocess,
        calibration=model.calibration,
        card=model.card,
        folder=folder,
    )


def _by_onnx(folder: Path, threads: int | None) -> Predictor:
    found = contents.read(folder)
    if not (folder / files.ONNX).is_file() and not files.listed(folder, files.ONNX):
        raise ModelError(
            f"'{folder}' has no {files.ONNX}. "
            f"Make one: headstart export {folder} --out NEW_FOLDER --format onnx"
        )
    files.check(folder, (files.ONNX,))
    for name, what in ((files.LABELS, found.classes), (files.PREPROCESS, found.preprocess)):
        if what is None:
            raise ModelError(f"'{folder}' has no {name}, so its ONNX file cannot be used on its own.")
    assert found.classes is not None and found.preprocess is not None
    engine = Onnx(folder / files.ONNX, found.preprocess, threads)
    if engine.outputs is not None:
        contents.count(folder, found.classes, engine.outputs)
    return Predictor(
        engine,
        found.classes,
        found.preprocess,
        calibration=found.calibration,
        card=found.card,
        folder=folder,
    )


def _pictures(path: Path) -> Iterator[Path | Prediction]:
    """The path itself, or the pictures under a folder; folders that cannot be read are rows."""
    if not path.is_dir():
        yield path
        return
    failed: list[OSError] = []
    found = False
    seen: set[str] = set()  # linked folders are walked as in training, but none twice
    for here, folders, names in os.walk(path, onerror=failed.append, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                found = True
                path = Path(here) / name
                waits = path.is_fifo() or path.is_socket()  # nobody may ever write into them
                yield _nothing(path, "is no file but a pipe or a socket") if waits else path
    for error in failed:
        yield _nothing(Path(error.filename or path), f"the folder cannot be read: {error.strerror}")
    if not found and not failed:
        yield _nothing(path, "no pictures in this folder")


def _nothing(path: Path, reason: str) -> Prediction:
    return Prediction(str(path), None, None, {}, reason)
