"""Weights from a file: read without running code, matched to a network by name and shape, reported."""

from __future__ import annotations

import argparse
import pickle
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor, nn

from headstart.errors import MethodError, ModelError, first_line
from headstart.nets.architecture import Architecture
from headstart.parts.head import find_head

State = dict[str, Tensor]

# Under which key training scripts keep the weights. Averaged weights come first, as timm reads them too.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "teacher",
    "student",
    "encoder",
    "backbone",
)

# Buffers that a network makes for itself; files written by other versions lack or have them.
_DERIVED = ("num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask", "k_idx")

# What DDP, torch.compile and common training scripts put before every name.
_WRAPPED = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")

# How files of torch.save begin: a zip archive, or a pickle as before torch 1.6.
_TORCH = (b"PK", b"\x80")

# Norm scales and shifts may be called otherwise in a file (fc_norm for norm); kernels may not be missing.
_MAY_LACK = 0.02


@dataclass(frozen=True)
class Report:
    """How a file's tensors fit a network; names are the network's, without the file's prefix."""

    matched: int
    total: int  # tensors of the network, without those that it makes for itself
    missing: tuple[str, ...]  # in the network only
    unexpected: tuple[str, ...]  # in the file only
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape in file, in network
    wrapper: str = ""  # the key that held the weights
    prefix: str = ""  # what stood before every name
    head: str = "from the file"  # or why it is a fresh one

    def sentence(self) -> str:
        """One line for people."""
        parts = [f"{self.matched} of {self.total} tensors matched"]
        if self.prefix or self.wrapper:
            where = [f"under '{self.wrapper}'"] if self.wrapper else []
            where += [f"with prefix '{self.prefix}'"] if self.prefix else []
            parts[0] += f" ({', '.join(where)})"
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.mismatched:
            parts.append(
                f"{len(self.mismatched)} of another shape ({_some([m[0] for m in self.mismatched])})"
            )
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not used ({_some(self.unexpected)})")
        return f"{', '.join(parts)}; head {self.head}."


def read(path: Path) -> tuple[State, str]:
    """The tensors of a weights file on the CPU, and the key they stood under ("" where there was none).

    safetensors, or what `torch.save` wrote; the latter is read with `weights_only=True`, so that no code
    in the file can run.

    Raises:
        ModelError: no file, not readable, truncated, a pickle of other things, or no tensors in it.
    """
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder; weights are a file. A timm model folder goes in --model.")
    if not path.is_file():
        raise ModelError(f"There is no weights file '{path}'.")
    try:
        with path.open("rb") as file:
            begins = file.read(9)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}.") from error
    if not begins:
        raise ModelError(f"The weights file '{path}' is empty.")
    if _is_safetensors(path, begins):
        found: Any = _safetensors(path)
    elif begins.startswith(_TORCH):
        found = _pickled(path)
    else:
        raise ModelError(f"'{path}' is not a weights file: neither safetensors nor torch.save.")
    state, wrapper = _unwrapped(found, path)
    broken = [name for name, value in state.items() if value.is_floating_point() and not _finite(value)]
    if broken:
        raise ModelError(
            f"The weights in '{path}' are not all numbers: {_some(broken)} hold NaN or infinity."
        )
    return state, wrapper


def fit(
    architecture: Architecture, state: State, *, where: str, wrapper: str = ""
) -> tuple[nn.Module, Report]:
    """Build the architecture and fill it with a file's tensors.

    Names may carry a prefix. A head of another number of classes is taken over with its own width; where
    the file has no head that fits, the network keeps a fresh one. timm's own translation of older names
    and of position embeddings of another size is used where names or shapes do not fit as they are.

    Args:
        architecture: what to build.
        state: the file's tensors.
        where: the file, for messages.
        wrapper: the key that the tensors stood under.

    Raises:
        ModelError: the tensors belong to another architecture; says how much matched.
    """
    net = architecture.build()
    head = _head_of(net)
    fitted, prefix = _without_prefix(state, net)
    report = _compare(fitted, net, wrapper, prefix)
    if _refusal(report, net, head):
        bare, common = (fitted, prefix) if prefix else _without_wrapping(state)
        translated = _translated(architecture.name, bare, net)
        if translated is not None:
            again = _compare(translated, net, wrapper, common)
            if again.matched > report.matched:
                fitted, report = translated, again
    reason = _refusal(report, net, head)
    if reason:
        raise ModelError(
            f"The weights in '{where}' do not belong to '{architecture.name}': {report.matched} of "
            f"{report.total} tensors matched; {reason} Give the network they were trained for with --model."
        )
    classes = _classes_in(fitted, net, head)
    if classes is not None and classes != architecture.num_classes:
        net = architecture.with_classes(classes).build()
        report = _compare(fitted, net, wrapper, prefix)
    net.load_state_dict({**net.state_dict(), **_usable(fitted, net)})
    return net, _about_head(report, head, architecture.num_classes, classes)


def _is_safetensors(path: Path, begins: bytes) -> bool:
    # A safetensors file begins with the length of its header (8 bytes), then the header, a JSON object.
    return path.suffix == ".safetensors" or (len(begins) == 9 and begins[8:9] == b"{" and begins[:2] != b"PK")


def _safetensors(path: Path) -> State:
    try:
        state: State = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"'{path}' is not a whole safetensors file; was it cut off on the way? ({first_line(error)})"
        ) from error
    return state


def _pickled(path: Path) -> Any:
    try:
        # timm's training checkpoints keep their command line in one of these; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _foreign_names(path)
        if names:
            raise ModelError(
                f"'{path}' holds more than weights ({_some(names)}), and reading it could run code of "
                "whoever made it. Save the weights alone: torch.save(net.state_dict(), FILE), or safetensors."
            ) from error
        raise ModelError(f"'{path}' is not a weights file: neither safetensors nor torch.save.") from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise ModelError(
                f"'{path}' is a TorchScript program, not a state dict. Save net.state_dict() instead."
            ) from error
        raise ModelError(f"'{path}' cannot be read; is it whole? ({first_line(error)})") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ModelError(f"'{path}' cannot be read; is it whole? ({first_line(error)})") from error


def _foreign_names(path: Path) -> list[str]:
    try:
        names: list[str] = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 -- no pickle at all; the caller says so
        return []
    return names


def _unwrapped(found: Any, path: Path) -> tuple[State, str]:
    keys: list[str] = []
    while isinstance(found, Mapping):
        inner = next((k for k in _WRAPPERS if isinstance(found.get(k), Mapping) and found[k]), None)
        if inner is None:
            break
        keys.append(inner)
        found = found[inner]
    state = (
        {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not state:
        held = _some([str(key) for key in found]) if isinstance(found, Mapping) else type(found).__name__
        raise ModelError(f"'{path}' holds no weights: no tensors under names in it, but {held or 'nothing'}.")
    return state, ".".join(keys)


def _without_prefix(state: State, net: nn.Module) -> tuple[State, str]:
    """The state under the network's names: the prefix is the one that lets most names match."""
    own = net.state_dict()
    votes: Counter[str] = Counter()
    for name, value in state.items():
        parts = name.split(".")
        for cut in range(len(parts)):
            rest = ".".join(parts[cut:])
            if rest in own and own[rest].shape == value.shape:
                votes[name[: len(name) - len(rest)]] += 1
    if not votes:
        return dict(state), ""
    prefix = max(votes, key=lambda each: (votes[each], -len(each)))
    cut_off = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    # A head may stand beside the wrapped body under its plain name.
    beside = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return {**beside, **cut_off}, prefix


def _without_wrapping(state: State) -> tuple[State, str]:
    """The state without what wrappers put before every name; for names that match in no form as they are."""
    prefix = ""
    while True:
        for each in _WRAPPED:
            if all(name.startswith(prefix + each) for name in state):
                prefix += each
                break
        else:
            return {name[len(prefix) :]: value for name, value in state.items()}, prefix


def _translated(name: str, state: State, net: nn.Module) -> State | None:
    """The state after timm's own filter for this architecture, or None where it has none or it fails."""
    module = sys.modules[model_entrypoint(name).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None)
    if translate is None:
        return None
    try:
        found = translate(dict(state), net)
    except (KeyError, AttributeError, RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None  # written for files of this architecture; these are of another one
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _compare(state: State, net: nn.Module, wrapper: str, prefix: str) -> Report:
    own = {name: value for name, value in net.state_dict().items() if not name.endswith(_DERIVED)}
    given = {name: value for name, value in state.items() if not name.endswith(_DERIVED)}
    both = own.keys() & given.keys()
    wrong = tuple(
        (name, tuple(given[name].shape), tuple(own[name].shape))
        for name in own
        if name in both and given[name].shape != own[name].shape
    )
    return Report(
        matched=len(both) - len(wrong),
        total=len(own),
        missing=tuple(name for name in own if name not in both),
        unexpected=tuple(name for name in given if name not in both),
        mismatched=wrong,
        wrapper=wrapper,
        prefix=prefix,
    )


def _refusal(report: Report, net: nn.Module, head: str) -> str | None:
    """Why the tensors are another architecture's, or None. The head does not count."""
    own = net.state_dict()
    missing = [name for name in report.missing if not _inside(name, head)]
    wrong = [each for each in report.mismatched if not _inside(each[0], head)]
    kernels = [name for name in missing if own[name].ndim >= 2]
    if wrong:
        name, there, here = wrong[0]
        return f"'{name}' is {_shape(there)} there and {_shape(here)} here."
    if kernels or len(missing) > _MAY_LACK * report.total:
        return f"{len(missing)} are missing there ({_some(kernels or missing)})."
    # A deeper network's file has all that a shallower one needs: look for blocks that have no place here.
    children = {name for name, child in net.named_children() if any(True for _ in child.parameters())}
    children.discard(head.partition(".")[0])
    more = [name for name in report.unexpected if name.partition(".")[0] in children]
    if len(more) > _MAY_LACK * report.total:
        return f"{len(more)} have no place here ({_some(more)})."
    return None


def _head_of(net: nn.Module) -> str:
    try:
        return find_head(net)
    except MethodError as error:
        raise ModelError(str(error)) from error


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _classes_in(state: State, net: nn.Module, head: str) -> int | None:
    """Classes of the file's head, or None where it has no head that would fit this network."""
    given, own = state.get(f"{head}.weight"), net.state_dict()[f"{head}.weight"]
    if given is None or given.ndim != own.ndim or given.shape[1:] != own.shape[1:] or not len(given):
        return None
    return len(given)


def _usable(state: State, net: nn.Module) -> State:
    own = net.state_dict()
    return {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}


def _about_head(report: Report, head: str, default: int, classes: int | None) -> Report:
    if classes is None:
        wrong = any(_inside(each[0], head) for each in report.mismatched)
        return replace(
            report, head="is fresh: the file's is of another shape" if wrong else "is fresh: none in the file"
        )
    if classes != default:
        return replace(report, head=f"from the file ({classes} classes)")
    return report


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _some(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
