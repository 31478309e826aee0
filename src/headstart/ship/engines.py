"""What runs the network: torch, or onnxruntime alone. Each is imported when it is asked for."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from headstart.data.preprocess import Preprocess
from headstart.errors import ModelError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn

ENGINES = ("auto", "onnx", "torch")


class Engine(Protocol):
    """A network that is ready; may be called from several threads."""

    name: str

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> logits float32 [B, K]."""
        ...


class Torch:
    """The network as a torch module.

    Args:
        net: takes normalised pictures; in eval mode.
        preprocess: normalises them.
        device: "auto" (CUDA where it works, else the CPU), "cpu", "cuda", "cuda:0", "mps".
    """

    name = "torch"

    def __init__(self, net: nn.Module, preprocess: Preprocess, device: str = "auto") -> None:
        self.device = _device(device)
        self.net: nn.Module = net.to(self.device)
        self._preprocess = preprocess

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> logits float32 [B, K]."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
            logits: np.ndarray = self.net(self._preprocess.normalise(batch)).float().cpu().numpy()
        return logits


class Onnx:
    """The network as an ONNX file, on the CPU.

    Args:
        path: of the file; it takes normalised pictures.
        preprocess: normalises them.
        threads: of one call; None: as many as this process has cores.

    Raises:
        ModelError: onnxruntime is not installed, or does not take the file.
    """

    name = "onnx"

    def __init__(self, path: Path, preprocess: Preprocess, threads: int | None = None) -> None:
        self._session = session(path, threads)
        self._preprocess = preprocess
        self._input = self._session.get_inputs()[0].name
        outputs = self._session.get_outputs()[0].shape[-1]
        self.outputs = outputs if isinstance(outputs, int) else None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> logits float32 [B, K]."""
        said = self._session.run(["logits"], {self._input: self._preprocess.normalised(pixels)})
        logits: np.ndarray = said[0]
        return logits


def has_onnxruntime() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


def session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        ModelError: onnxruntime is not installed, or does not take the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            "onnxruntime is not installed. Install it with: pip install 'headstart[onnx]'"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    # A thread that spins while it waits takes its core from those that decode pictures.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class of their own
        raise ModelError(f"onnxruntime does not take '{path}': {first_line(error)}") from error


def _cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _device(asked: str) -> torch.device:
    import torch

    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"The device '{asked}' cannot be used here. Give auto or cpu.") from error
    return device
