"""`headstart fisher`: how much each weight of a network matters to what it says of some pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.cli import outcome
from headstart.cli.options import Json, run_options
from headstart.errors import ConfigError, DataError, OutputError
from headstart.records import Run

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.data.preprocess import Preprocess

_NOT_HERE = ("source", "source_weights", "precision", "workers", "channels_last", "compile")
_OF_THE_NET = ("model", "weights", "img_size")
_AT_ONCE = 16  # pictures in memory; the network sees one at a time


@run_options("Network", "Machine", without=_NOT_HERE)
def run(
    flags: dict[str, Any],
    data: Annotated[
        Path, typer.Argument(help="A folder of pictures, with or without class folders.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where it goes.", metavar="FILE.safetensors")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="At most so many, drawn from all.")] = 1000,
    samples: Annotated[
        int, typer.Option(min=0, help="Labels drawn per picture; 0: all classes, which takes long.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies at --out.")] = False,
    json: Json = False,
) -> int:
    """Estimate a network's Fisher information, for l2-sp's variants l2-sp-fisher and gl-sp-fisher.

    The paper takes pictures of the kind that the network was pretrained on. Without them take training
    pictures of the task; no labels are used. The network, its --weights and --img-size must be those of the
    run that will use the file.

    Example: headstart fisher photos/ --out fisher.safetensors
    """
    if out is None:
        raise ConfigError("Where should it go? Give a new file with --out, such as fisher.safetensors.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise OutputError(f"'{out}' exists already. Give another file with --out, or --overwrite.")
    asked = Run.asked(**({"data": str(data)} | flags))
    files = _files(data)

    import torch

    from headstart.cli.progress import counting, say_on_stderr
    from headstart.nets import zoo
    from headstart.parts.fisher import estimate, save
    from headstart.training.machine import Machine

    machine = Machine(asked.device)
    loaded = zoo.load(asked.model, weights=asked.weights, img_size=asked.img_size, say=say_on_stderr)
    if loaded.matched is not None and loaded.matched.head.startswith("is fresh"):
        raise ConfigError(
            f"The head of '{asked.model}' {loaded.matched.head}. Fisher information needs the predictions of "
            "a trained one: give weights with a head."
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = _Opened([files[i] for i in order], loaded.preprocess)
    with counting("looking at pictures") as progress:
        net = loaded.net.to(machine.device)
        total = min(pictures, len(files))
        found = estimate(
            net,
            ((x.to(machine.device), None) for x in batches),
            samples=samples or None,
            pictures=pictures,
            seed=seed,
            inputs=f"{data.resolve().name} ({loaded.preprocess.size} px)",
            step=lambda done: progress(done, total),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save(found, out)
    if batches.broken:
        say_on_stderr(f"{len(batches.broken)} pictures cannot be read, such as {batches.broken[0]}.")
    if json:
        outcome.show_json(found.provenance | {"file": str(out)})
    else:
        labels = "all classes" if found.samples is None else f"labels drawn per picture: {found.samples}"
        print(f"{out}: {len(found.diagonal)} tensors of {asked.model}, {found.pictures} pictures, {labels}")
        same = [f"--{name.replace('_', '-')} {flags[name]}" for name in _OF_THE_NET if name in flags]
        variant = "--method l2-sp --set variant=l2-sp-fisher"
        print(" ".join(["Next:  headstart train PHOTOS", *same, variant, f"--set fisher={out}", "--out DIR"]))
    return outcome.GOOD


def _files(folder: Path) -> list[Path]:
    from headstart.data.picture import EXTENSIONS

    if not folder.is_dir():
        raise DataError(f"'{folder}' is no folder. Give a folder of pictures.")
    inside = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    found = [
        path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(f"There are no pictures in '{folder}'.")
    return found


class _Opened:
    """Pictures as evaluation sees them, in batches [B, 3, S, S]; those that cannot be read are noted."""

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self._files, self._preprocess = files, preprocess
        self.broken: list[str] = []

    def __iter__(self) -> Iterator[Tensor]:
        import numpy as np
        import torch

        from headstart.data.picture import Unreadable, open_picture

        batch: list[Any] = []
        for number, path in enumerate(self._files, 1):
            try:
                batch.append(self._preprocess.plain(open_picture(path)))
            except Unreadable as error:
                self.broken.append(str(error))
            if batch and (len(batch) == _AT_ONCE or number == len(self._files)):
                pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).contiguous()
                yield self._preprocess.normalise(pixels)
                batch = []
        if len(self.broken) == len(self._files):
            raise DataError(f"None of the {len(self._files)} pictures can be read. {self.broken[0]}")
