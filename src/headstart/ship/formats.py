"""The network in formats that others run: ONNX, and torch.export's .pt2. Nothing is pickled.

Both take `pixels`, float32 [B, 3, S, S] normalised as preprocess.json says, for any B, and give `logits`,
float32 [B, K]. The ONNX file carries classes, preprocessing and temperature in its metadata, so that these
are known wherever the file goes alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, ModelError, first_line
from headstart.ship.calibration import Calibration


class NotWritten(ModelError):
    """A network that has no form in this format.

    Attributes:
        reason: why, with the layer.
    """

    def __init__(self, format: str, reason: str) -> None:
        super().__init__(f"The network cannot be written as {format}: {reason}")
        self.reason = reason


def to_onnx(
    net: nn.Module,
    path: Path,
    *,
    preprocess: Preprocess,
    classes: Sequence[str],
    calibration: Calibration,
) -> None:
    """Write a network as ONNX, with torch's exporter.

    Args:
        net: in eval mode, on the CPU.
        path: of the file.
        preprocess: of its pictures.
        classes: names of its outputs.
        calibration: of its probabilities.

    Raises:
        NotWritten: with the layer that ONNX, or the exporter, has no form for.
        ConfigError: the packages are not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Writing ONNX takes the packages of an extra: pip install 'headstart[onnx]'"
        ) from error
    program = _followed(net, preprocess.size, "ONNX")
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["logits"],
            )
            assert made is not None
            made.model.metadata_props.update(metadata(preprocess, classes, calibration))
            made.save(path)
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NotWritten("ONNX", _untranslated(program, error)) from error


def metadata(preprocess: Preprocess, classes: Sequence[str], calibration: Calibration) -> dict[str, str]:
    """What an ONNX file carries besides the network, as JSON by name."""
    return {
        "headstart.classes": json.dumps(list(classes), ensure_ascii=False),
        "headstart.preprocess": json.dumps(preprocess.to_dict()),
        "headstart.temperature": json.dumps(calibration.temperature),
        "headstart.threshold": json.dumps(calibration.threshold),
    }


def to_pt2(net: nn.Module, path: Path, *, preprocess: Preprocess) -> None:
    """Write a network as a torch.export archive.

    Args:
        net: in eval mode, on the CPU.
        path: of the file.
        preprocess: of its pictures.

    Raises:
        NotWritten: with the layer that torch.export cannot follow.
    """
    program = _followed(net, preprocess.size, ".pt2")
    program._example_inputs = None  # they alone would be pickled
    try:
        with _quiet():
            torch.export.save(program, path)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NotWritten(".pt2", first_line(error)) from error


def _followed(net: nn.Module, size: int, format: str) -> torch.export.ExportedProgram:
    """The operations of a network, for any number of pictures."""
    pixels = torch.zeros(2, 3, size, size)
    try:
        return _export(net, (pixels,))
    except _UNFOLLOWED as error:
        name, why = _unfollowed(net, pixels, error)
        raise NotWritten(format, f"torch.export cannot follow {name}. ({why})") from error


# What torch.export raises on what it cannot follow, by experience: its own errors are of these.
_UNFOLLOWED = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
)


def _export(net: nn.Module, given: tuple[Any, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(each, Tensor) and each.ndim else None for each in given)
    with _quiet(), torch.no_grad():
        return torch.export.export(net.eval(), given, dynamic_shapes=shapes, strict=False)


def _unfollowed(net: nn.Module, pixels: Tensor, error: Exception) -> tuple[str, str]:
    """The smallest layer that torch.export cannot follow, for people, and why."""
    given: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            given.setdefault(name, args)

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in net.named_modules() if name]
    try:
        with torch.no_grad():
            net(pixels)
    except _UNFOLLOWED:
        return "the network, which does not run", first_line(error)
    finally:
        for hook in hooks:
            hook.remove()
    where, here, why = "", net, error
    found = True
    while found:
        found = False
        for child, module in here.named_children():
            name = f"{where}.{child}" if where else child
            args = given.get(name)
            if not args or not all(isinstance(each, Tensor) for each in args):
                continue
            try:
                _export(module, args)
            except _UNFOLLOWED as deeper:
                where, here, why, found = name, module, deeper, True
                break
    kind = type(here).__name__
    return (f"the layer '{where}' ({kind})" if where else f"{kind} itself"), _plain(why)


def _untranslated(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """The operation that has no ONNX form, and the layer it stands in."""
    said, cause = "", error.__cause__
    text = str(error)
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    op = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w*)'", text)
    if op is None:
        return _plain(error)
    name = op.group(1)
    said = f"the operation {name.replace('aten.', '')} has no ONNX form"
    with _quiet():
        nodes = program.run_decompositions().graph.nodes
    for node in nodes:
        if str(node.target).startswith(name):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            if stack and stack[-1][0]:
                kind = str(stack[-1][1]).rsplit(".", 1)[-1]
                where = str(stack[-1][0]).removeprefix("L['self'].")
                return f"{said}; it is in the layer '{where}' ({kind})."
    return f"{said}."


def _plain(error: BaseException) -> str:
    """The first line of an error that says something, without terminal colours."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("-", "#", "from user code"))]
    return said[0].rstrip(".") + "." if said else f"{type(error).__name__}."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks to themselves: what matters is checked afterwards."""
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch",
            "torch.onnx",
            "torch.export",
            "torch._export",
            "torch.fx",
            "onnxscript",
            "onnx_ir",
        )
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
