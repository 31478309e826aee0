"""What the training runs on: device, precision, memory layout, processes. All of it is here."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from headstart.disk import read_json, write_json
from headstart.errors import ConfigError, OutputError
from headstart.method import Loss, Method, Phase
from headstart.records import Precision, Recipe

T = TypeVar("T")

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Machine:
    """Where and how a run computes.

    One process on the CPU or one GPU as it is; several under `accelerate launch` or `torchrun`.

    Args:
        device: "auto" takes a GPU where there is one; else "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", or "bf16" / "fp16" autocast (fp16 with loss scaling, GPU only).
    """

    def __init__(self, device: str = "auto", precision: Precision = "fp32") -> None:
        self.device = _device(device)
        if precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("Precision fp16 needs a GPU. On the CPU use fp32, or bf16 where it has it.")
        # accelerate keeps one state per process and refuses a second one with other settings.
        if AcceleratorState._shared_state:
            several = AcceleratorState().num_processes > 1
            AcceleratorState._reset_state(reset_partial_state=not several)
        elif PartialState._shared_state and PartialState().num_processes == 1:
            PartialState._reset_state()
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=_PRECISION[precision])
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        if self.world > 1:
            self.device = self.accelerator.device
        self.precision = precision
        self.channels_last = False
        self._process = psutil.Process()
        self._peak = 0.0

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def described(self) -> str:
        """What it computes on, for people: 'NVIDIA H100 80GB HBM3', 'cpu, 2 threads'."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return name if self.world == 1 else f"{self.world} x {name}"
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            return f"cpu, {threads} thread{'s' if threads != 1 else ''}"
        return self.device.type

    def choose_layout(self, net: nn.Module, x: Tensor, asked: bool | None, notes: Path | None = None) -> None:
        """Lay pictures and weights out channels-last where that is faster, by measuring a few steps.

        Args:
            net: measured as a copy, so nothing of it changes.
            x: a batch as in training; at most eight pictures of it are used.
            asked: True or False takes the choice away.
            notes: a file that remembers what was measured on this machine. The two layouts round
                differently, so runs that are to be compared bit by bit must not be measured twice.
        """
        if asked is None:
            x = x[:8]
            kinds = sorted({type(each).__name__ for each in net.modules()})
            count = sum(parameter.numel() for parameter in net.parameters())
            where = (
                torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
            )
            asked_of = [
                kinds,
                count,
                list(x.shape),
                where,
                self.precision,
                torch.get_num_threads(),
                torch.__version__,
            ]
            key = hashlib.sha256(json.dumps(asked_of).encode()).hexdigest()[:16]
            known = _known_layouts(notes)
            if key not in known:
                known[key] = self._faster_channels_last(net, x)
                _note_layout(notes, key, known[key])
            asked = known[key]
        self.channels_last = asked

    def _faster_channels_last(self, net: nn.Module, x: Tensor) -> bool:
        with torch.random.fork_rng():
            probe = copy.deepcopy(net).to(self.device).train().requires_grad_(True)
            for module in probe.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # a batch of one must be measurable too
            times: dict[bool, list[float]] = {False: [], True: []}
            for channels_last in (False, True, False, True, False, True):
                self.channels_last = channels_last
                self.place(probe)
                start = time.perf_counter()
                with self.autocast():
                    out = probe(self.lay(x))
                out.float().sum().backward()
                probe.zero_grad()
                self.wait()
                times[channels_last].append(time.perf_counter() - start)
        # The first of each also pays for setting up its kernels; 5 % keeps noise from deciding.
        return min(times[True]) < 0.95 * min(times[False])

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, in the chosen layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        module.to(self.device).to(memory_format=layout)

    def lay(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] on the device, in the chosen layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.device, non_blocking=True).contiguous(memory_format=layout)

    def wrap(self, method: Method) -> Callable[[Tensor, Tensor], Loss]:
        """What is called in training: the method, under DDP where there are several processes."""
        if self.world == 1:
            return method
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(method, device_ids=ids)

    def optimizer(self, phase: Phase, recipe: Recipe) -> Any:
        """The phase's optimiser under the recipe, with loss scaling where the precision needs it."""
        options: dict[str, Any]
        if recipe.optimizer == "sgd":
            rule: type[Optimizer] = torch.optim.SGD
            options = {"momentum": recipe.momentum, "nesterov": recipe.nesterov and recipe.momentum > 0}
        else:
            rule = torch.optim.AdamW
            options = {"betas": (recipe.momentum, 0.999)}
        optimizer = phase.optimizer(rule, lr=recipe.lr, weight_decay=recipe.weight_decay, **options)
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision's context."""
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def step(
        self,
        method: Callable[[Tensor, Tensor], Loss],
        optimizer: Any,
        x: Tensor,
        y: Tensor,
        *,
        clip: float | None = None,
        grad_accum: int = 1,
    ) -> Loss:
        """One optimiser step on one batch, in `grad_accum` micro-batches.

        Returns:
            The loss of the batch, averaged over its pictures; nothing in it is part of a graph.
        """
        # DDP averages over processes, not over pictures: a larger share of the batch must count for more.
        weight = self._share(len(x))
        losses: list[tuple[float, Loss]] = []
        # A short last batch goes in fewer pieces: none of a single picture, which BatchNorm cannot take.
        pieces = max(1, min(grad_accum, len(x) // 2))
        micro = list(zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True))
        for i, (part, labels) in enumerate(micro):
            share = len(part) / len(x)
            last = i == len(micro) - 1
            hold = isinstance(method, DistributedDataParallel) and not last
            with method.no_sync() if hold else nullcontext():  # type: ignore[attr-defined]
                with self.autocast():
                    loss = method(part, labels)
                self._note_memory()
                self.accelerator.backward(
                    loss.total if share * weight == 1.0 else loss.total * (share * weight)
                )
            losses.append((share, loss))
        if clip is not None:
            learning = [p for group in optimizer.param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(learning, clip)
        optimizer.step()
        optimizer.zero_grad()
        if len(losses) == 1:
            only = losses[0][1]
            return only._replace(total=only.total.detach())
        parts = {
            name: torch.stack([share * loss.parts[name] for share, loss in losses]).sum()
            for name in losses[0][1].parts
        }
        total = torch.stack([share * loss.total.detach() for share, loss in losses]).sum()
        return Loss(total, torch.cat([loss.logits for _, loss in losses]), parts)

    def _share(self, n: int) -> float:
        """Pictures of this process over the processes' mean."""
        if self.world == 1:
            return 1.0
        every = torch.tensor(float(n), device=self.device)
        torch.distributed.all_reduce(every)
        return n * self.world / float(every)

    def from_main(self, value: T) -> T:
        """The main process's value, in every process; waits for it."""
        if self.world == 1:
            return value
        values = [value]
        broadcast_object_list(values, from_process=0)
        return values[0]

    def forget(self) -> None:
        """Let go of the optimisers of a finished phase."""
        self.accelerator.free_memory()

    def wait(self) -> None:
        """Until everything that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start_memory(self) -> None:
        """Begin to watch the peak."""
        self._peak = 0.0
        _give_back()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._note_memory()

    def peak_memory_mb(self) -> float:
        """Largest memory since `start_memory` in MiB: allocated on the GPU; of the process on the CPU."""
        self._note_memory()
        return self._peak

    def _note_memory(self) -> None:
        # On the CPU this is called between forward and backward, when the activations are all there.
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        else:
            now = self._process.memory_info().rss
        self._peak = max(self._peak, now / 2**20)


def _give_back() -> None:
    """Return what was freed to the system.

    glibc keeps it, so that in a process that does several runs the peak of one would be that of the largest
    before it (measured: 4,138 MB for `full` after `l2t-ww`, 1,374 MB before).
    """
    gc.collect()
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)


class Placed:
    """Batches on the machine: moved and laid out as they are walked."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], machine: Machine) -> None:
        self.batches, self.machine = batches, machine

    def __iter__(self) -> Any:
        for x, y in self.batches:
            yield self.machine.lay(x), y.to(self.machine.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _known_layouts(notes: Path | None) -> dict[str, bool]:
    read = {} if notes is None else read_json(notes)
    return {key: value for key, value in read.items() if isinstance(value, bool)}


def _note_layout(notes: Path | None, key: str, faster: bool) -> None:
    if notes is None:
        return
    # Without the note nothing is lost but two seconds.
    with contextlib.suppress(OSError, OutputError):
        notes.parent.mkdir(parents=True, exist_ok=True)
        # Read again: another process may have added to it.
        write_json(notes, _known_layouts(notes) | {key: faster})


def _device(asked: str) -> torch.device:
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ConfigError(f"Unknown device '{asked}'. Allowed: auto, cpu, cuda, cuda:0, mps.") from None
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= found:
            raise ConfigError(f"Device '{asked}' is not here: {found} GPUs found. Use --device auto or cpu.")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("Device 'mps' is not here. Use --device auto or cpu.")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"Device '{asked}' is not supported. Allowed: auto, cpu, cuda, cuda:0, mps.")
    return device
