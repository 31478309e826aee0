"""A task to learn: pictures of a `Run`, decoded, divided, and handed out as batches.

What a training batch holds is a pure function of (seed, epoch, index of the picture): the order of an epoch
and each picture's augmentation do not depend on the batch size, on workers, on the number of processes or
on anybody else's random numbers. That is what makes a resumed run bit-equal and a comparison paired.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from headstart.data.cache import Pictures, Say, quiet
from headstart.data.facts import Progress
from headstart.data.folder import SPLITS, Table, scan
from headstart.data.picture import Unreadable
from headstart.data.preprocess import Preprocess
from headstart.data.splits import Split, fewer, split
from headstart.data.transforms import KINDS, augment
from headstart.errors import ConfigError, unknown
from headstart.records import Run


def draw(*numbers: int) -> int:
    """A seed of 63 bits out of whole numbers: equal numbers, equal seed; else unrelated."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@dataclass
class Task:
    """What there is to learn.

    Attributes:
        table: files and labels as found.
        pictures: the decoded pictures.
        split: which picture is on which side.
        preprocess: what the network expects.
        split_seed: the seed the split was made with.
        notes: what people should know, in sentences.
    """

    table: Table
    pictures: Pictures
    split: Split
    preprocess: Preprocess
    split_seed: int
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Sorted class names; a label is an index into them."""
        return self.table.classes

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Pictures per side and class name."""
        return self.split.counts()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the pictures, their labels and their split."""
        return self.split.fingerprint

    @property
    def unreadable(self) -> dict[str, str]:
        """Relative path -> why it could not be read."""
        return {self.table.relative(i): why for i, why in sorted(self.pictures.facts.errors.items())}

    def paths(self, side: str) -> list[Path]:
        """The files of one side, in the order in which `plain` yields them."""
        return [self.table.paths[i] for i in self.split.index(_known(side))]

    def labels(self, side: str) -> Tensor:
        """int64 [n], in the order in which `plain` yields them."""
        return torch.tensor([self.table.labels[i] for i in self.split.index(_known(side))], dtype=torch.int64)

    def class_weights(self, spec: str = "none") -> Tensor | None:
        """Weights of the classes in the loss: float32 [K] with mean 1, or None.

        Args:
            spec: 'none'; 'auto' (inverse frequency in the training pictures); or a JSON or YAML file of
                class name: weight, in which classes that are not named weigh 1.

        Raises:
            ConfigError: a file that cannot be read, an unknown class, a weight that is not above 0.
        """
        if spec == "none":
            return None
        if spec == "auto":
            count = Counter(self.labels("train").tolist())
            weights = torch.tensor([1.0 / count[k] for k in range(len(self.classes))], dtype=torch.float64)
        else:
            given = _weights_file(spec, self.classes)
            weights = torch.tensor([given.get(name, 1.0) for name in self.classes], dtype=torch.float64)
        return (weights / weights.mean()).to(torch.float32)

    def train(
        self,
        batch_size: int,
        seed: int,
        augment: str = "standard",
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: str | torch.device = "cpu",
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> Train:
        """Batches to learn from; set `.epoch` before each pass.

        Args:
            batch_size: pictures per step over all processes. Process `rank` of `world` gets its share.
            seed: of order and augmentation.
            augment: 'standard', 'no-flip', 'trivial', 'none'.
            rank: number of this process.
            world: number of processes.
            workers: processes that prepare pictures; 0: this one.
            device: where batches are put.
            mixup: alpha of mixup (arXiv 1710.09412); 0: off.
            cutmix: alpha of cutmix (arXiv 1905.04899); 0: off. With both, a coin decides per batch.

        Raises:
            ConfigError: an augmentation that does not exist, or a batch smaller than the number of processes.
        """
        return Train(
            self, batch_size, seed, augment, rank, world, workers, torch.device(device), mixup, cutmix
        )

    def plain(self, side: str, batch_size: int = 64, device: str | torch.device = "cpu") -> Plain:
        """One side as evaluation sees it: no augmentation, always the same order.

        Args:
            side: 'train', 'val' or 'test'.
            batch_size: pictures per batch; the last may be smaller.
            device: where batches are put.
        """
        return Plain(self, _known(side), batch_size, torch.device(device))


def _known(side: str) -> str:
    if side not in SPLITS:
        raise ConfigError(unknown("split", side, SPLITS))
    return side


def load(
    run: Run,
    preprocess: Preprocess,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    say: Say = quiet,
) -> Task:
    """Find, decode and divide the pictures of a run.

    Args:
        run: what was asked: data, columns, shares, seeds, strictness.
        preprocess: what the network expects of a picture.
        cache: folder of the cache; None: the usual one.
        progress: called with (done, all) while pictures are decoded; not called when all is in the cache.
        say: told in sentences what people should know.

    Raises:
        DataError: pictures, labels or splits that cannot be used.
        Unreadable: with `run.strict`, the first picture that cannot be read.
    """
    table = scan(
        run.data,
        image_col=run.image_col,
        label_col=run.label_col,
        split_col=run.split_col,
        group_col=run.group_col,
    )
    pictures = Pictures.build(table.root, table.paths, preprocess, cache=cache, progress=progress, say=say)
    facts = pictures.facts
    notes = list(table.notes)
    if facts.errors:
        worst = sorted(facts.errors)
        if run.strict:
            raise Unreadable(str(table.paths[worst[0]]), facts.errors[worst[0]])
        shown = "; ".join(f"{table.relative(i)}: {facts.errors[i]}" for i in worst[:3])
        more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
        notes.append(f"{len(worst)} of {len(table)} pictures cannot be read and are skipped: {shown}{more}.")
    seed = run.split_seed if run.split_seed is not None else run.seed
    divided = split(table, facts.hashes, shares=run.split, seed=seed, near=facts.near)
    notes += divided.notes
    if run.train_size is not None:
        divided = fewer(divided, run.train_size)
    for note in notes:
        say(note)
    return Task(table, pictures, divided, preprocess, seed, notes)


def _weights_file(spec: str, classes: list[str]) -> dict[str, float]:
    path = Path(spec).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"class_weights is '{spec}', and no such file can be read ({error.__class__.__name__}). "
            "Allowed: auto, none, or a JSON or YAML file of class: weight."
        ) from None
    try:
        data = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(
            f"{path} is not valid {path.suffix.lstrip('.').upper() or 'YAML'}: {line}."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} should hold class: weight, such as {classes[0]}: 2.0.")
    weights: dict[str, float] = {}
    for key, value in data.items():
        name = str(key)
        if name not in classes:
            raise ConfigError(f"{path}: {unknown('class', name, classes)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{path}: the weight of '{name}' is {value!r}. Give a number above 0.")
        weights[name] = float(value)
    return weights


# -- batches ---------------------------------------------------------------------------------------------


class Plain:
    """One side in its fixed order: (x float32 [B, 3, S, S] normalised, y int64 [B])."""

    def __init__(self, task: Task, side: str, batch_size: int, device: torch.device) -> None:
        self._task = task
        self._index = task.split.index(side)
        self._labels = task.labels(side)
        self._size = max(1, batch_size)
        self._device = device

    def __len__(self) -> int:
        return -(-len(self._index) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._index), self._size):
            pixels = self._task.pictures.plain(self._index[start : start + self._size])
            y = self._labels[start : start + self._size].to(self._device)
            yield _to_input(torch.from_numpy(pixels), self._task.preprocess, self._device), y


def _to_input(pixels: Tensor, preprocess: Preprocess, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] -> normalised float32 [B, 3, S, S] on the device, contiguous."""
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return preprocess.normalise(pixels.to(device).permute(0, 3, 1, 2).contiguous())


@dataclass(frozen=True)
class _Step:
    """One batch to prepare: positions in the table, and where in training this is."""

    epoch: int
    number: int
    indices: list[int]
    extra: bool  # the first picture is the neighbour's, and only there to be mixed in


class Train:
    """Shuffled, augmented batches of the training side.

    A last batch that would leave a process with fewer than two pictures (BatchNorm cannot learn from one) is
    joined to the one before; so every picture is seen once an epoch, and no step is smaller than two, unless
    a batch size of one per process was asked for.

    With several processes the batch of a step is cut into consecutive shares; where it does not divide
    evenly the first shares hold one more.

    Attributes:
        epoch: which pass comes next; set it before iterating.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int,
        seed: int,
        kind: str,
        rank: int,
        world: int,
        workers: int,
        device: torch.device,
        mixup: float,
        cutmix: float,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(unknown("augmentation", kind, KINDS))
        if batch_size < world:
            raise ConfigError(
                f"A batch of {batch_size} cannot be divided over {world} processes. Give {world} or more."
            )
        self.epoch = 0
        self._task, self._seed, self._batch = task, seed, batch_size
        self._rank, self._world, self._workers, self._device = rank, world, workers, device
        self._index = task.split.index("train")
        if len(self._index) < world:
            raise ConfigError(
                f"{len(self._index)} training pictures cannot be divided over {world} processes."
            )
        self._mixes = _mixes(mixup, cutmix, len(task.classes))
        self._views = _Views(task.pictures, task.preprocess, kind, seed)
        self._starts = self._cut(len(self._index))
        self._pool: DataLoader[Any] | None = None

    def _cut(self, n: int) -> list[int]:
        """First position of every step, and the end."""
        starts = [*range(0, n, self._batch), n]
        least = 2 * self._world if self._batch >= 2 * self._world else self._world
        if len(starts) > 2 and n - starts[-2] < least:
            del starts[-2]
        return starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _steps(self) -> Iterator[_Step]:
        generator = torch.Generator().manual_seed(draw(self._seed, self.epoch, -1))
        order = torch.randperm(len(self._index), generator=generator).tolist()
        for number in range(len(self)):
            whole = [self._index[k] for k in order[self._starts[number] : self._starts[number + 1]]]
            at = [len(whole) * rank // self._world for rank in range(self._world + 1)]
            mine = whole[at[self._rank] : at[self._rank + 1]]
            extra = bool(self._mixes) and len(mine) < len(whole)
            if extra:
                # Mixing pairs each picture with the one before it in the whole batch: bring that one along.
                mine = [whole[at[self._rank] - 1], *mine]
            yield _Step(self.epoch, number, mine, extra)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self._task.table.labels
        for step, pixels in self._prepared():
            x = _to_input(pixels, self._task.preprocess, self._device)
            y = torch.tensor([labels[i] for i in step.indices], dtype=torch.int64, device=self._device)
            yield self._mix(step, x, y) if self._mixes else (x, y)

    def _prepared(self) -> Iterator[tuple[_Step, Tensor]]:
        if self._workers == 0:
            for step in self._steps():
                yield step, self._views[step]
            return
        if self._pool is None:
            # Not fork: torch has threads, and a forked process may hang on their locks.
            method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
            self._pool = DataLoader(
                self._views,
                batch_size=None,
                sampler=_Order(self),
                num_workers=self._workers,
                persistent_workers=True,
                multiprocessing_context=method,
                generator=torch.Generator(),  # or it would draw from everybody's random numbers
            )
        yield from zip(self._steps(), self._pool, strict=True)

    def _mix(self, step: _Step, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mix every picture with the one before it; x [B, 3, S, S], y [B] -> [B, 3, S, S], [B, K]."""
        with torch.random.fork_rng(devices=[]):
            # The same on all processes: the coin, the share and the box belong to the step.
            torch.default_generator.manual_seed(draw(self._seed, step.epoch, step.number, -2))
            mixed, soft = self._mixes[int(torch.randint(len(self._mixes), (1,)))](x, y)
        return (mixed[1:], soft[1:]) if step.extra else (mixed, soft)


def _mixes(mixup: float, cutmix: float, classes: int) -> list[Any]:
    mixes: list[Any] = []
    if mixup > 0:
        mixes.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix > 0:
        mixes.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    return mixes


class _Order(Sampler[_Step]):
    """The steps of the epoch that the loader stands at."""

    def __init__(self, train: Train) -> None:
        self._train = train

    def __iter__(self) -> Iterator[_Step]:
        return self._train._steps()

    def __len__(self) -> int:
        return len(self._train)


class _Views(Dataset[Tensor]):
    """Augmented pictures of one step; what worker processes are sent."""

    def __init__(self, pictures: Pictures, preprocess: Preprocess, kind: str, seed: int) -> None:
        self._pictures, self._size, self._seed = pictures, preprocess.size, seed
        self._change = None if kind == "none" else augment(kind, preprocess.size, preprocess.interpolation)

    def __getitem__(self, step: _Step) -> Tensor:
        """uint8 [B, S, S, 3]"""
        if self._change is None:
            return torch.from_numpy(self._pictures.plain(step.indices))
        batch = np.empty((len(step.indices), self._size, self._size, 3), dtype=np.uint8)
        with torch.random.fork_rng(devices=[]):
            for row, index in enumerate(step.indices):
                torch.default_generator.manual_seed(draw(self._seed, step.epoch, index))
                batch[row] = self._change(Image.fromarray(self._pictures.large(index)))
        return torch.from_numpy(batch)
