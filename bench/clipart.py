"""The pictures the benchmarks train on: ten classes of Debian's openclipart, divided once for everybody.

And, for comparisons that divide them by themselves, so many of each class, of fashion-mnist too.

Whoever is compared reads the same `train`, `val` and `test` folders. They are divided by headstart's own
split, so that no copy or near copy of a picture lies on two sides, and nobody has to leave one out.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

from headstart.data.catalogue import fetch
from headstart.data.loader import load
from headstart.data.picture import EXTENSIONS, open_picture
from headstart.data.preprocess import Preprocess
from headstart.records import Run
from measurement import DATA

_CATALOGUE = {"clipart": "clipart", "fashion": "fashion-mnist"}
_MOST = 200  # pictures of a class that are fetched; more would only be looked at, and never used


def fetched(given: Path | None) -> Path:
    """The folder of class folders; fetched on first use."""
    return fetch("clipart", DATA / "clipart", per_class=_MOST) if given is None else given


def divided(
    source: Path,
    preprocess: Preprocess,
    *,
    seed: int,
    per_class: Mapping[str, int],
    shrunk: bool = False,
) -> Path:
    """A folder train, val, test / class / picture; made on first use.

    Args:
        source: folder of class folders.
        preprocess: what the network expects; near copies are found at this size.
        seed: of the split.
        per_class: most pictures of a class on each side.
        shrunk: store the pictures as PNG, composited on white, short side 1.25 × the network's input (as
            large as augmentation needs them), so that the time to decode does not dominate. Else the files
            themselves are linked.
    """
    asked = f"{source.resolve()} {preprocess.canonical()} {sorted(per_class.items())}"
    kind = "shrunk" if shrunk else "whole"
    out = DATA / f"{kind}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}-seed-{seed}"
    if out.exists():
        return out
    smallest = min(len(list(folder.iterdir())) for folder in source.iterdir() if folder.is_dir())
    # As many for train and val as are wanted even of the smallest class, as far as it goes; the rest: test.
    wanted = {side: 1.1 * per_class[side] / smallest for side in ("train", "val")}
    shrink = max(1.0, sum(wanted.values()) / 0.8)
    train, val = wanted["train"] / shrink, wanted["val"] / shrink
    run = Run(data=str(source), split=(train, val, 1 - train - val), split_seed=seed)
    task = load(run, preprocess, say=print)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    draw = random.Random(seed)
    for side, most in per_class.items():
        kept: dict[int, int] = {}
        chosen = list(zip(task.paths(side), task.labels(side).tolist(), strict=True))
        draw.shuffle(chosen)
        for path, label in chosen:
            if kept.get(label, 0) == most:
                continue
            kept[label] = kept.get(label, 0) + 1
            folder = temporary / side / task.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            if shrunk:
                preprocess.reduce(open_picture(path)).save(folder / f"{kept[label]:03d}.png")
            else:
                _link(path, folder / f"{kept[label]:03d}{path.suffix.lower()}")
    temporary.rename(out)
    return out


def drawn(name: str, given: Path | None, *, per_class: int) -> Path:
    """A folder of class folders with at most so many pictures each; made on first use, and always the same.

    Args:
        name: "clipart" or "fashion".
        given: a folder that holds one of that name, or the clipart itself; either in class folders or divided
            into train, val and test. None, or no fashion there: the set is fetched.
        per_class: most pictures of a class.
    """
    out = DATA / f"drawn-{name}-{per_class}"
    if out.exists():
        return out
    if given is not None and ((given / name).is_dir() or name == "clipart"):
        source = given / name if (given / name).is_dir() else given
    else:
        source = fetch(_CATALOGUE[name], DATA / f"{name}-{per_class}", per_class=per_class)
    sides = [side for side in (source / "train", source / "val", source / "test") if side.is_dir()]
    classes: dict[str, list[Path]] = {}
    for side in sides or [source]:
        for path in sorted(side.glob("*/*")):
            if path.suffix.lower() in EXTENSIONS:
                classes.setdefault(path.parent.name, []).append(path)
    if not classes:
        raise SystemExit(f"{source} has no pictures in class folders.")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    draw = random.Random(0)
    for label, paths in sorted(classes.items()):
        (temporary / label).mkdir(parents=True)
        for i, path in enumerate(draw.sample(paths, min(per_class, len(paths)))):
            _link(path, temporary / label / f"{i:03d}{path.suffix.lower()}")
    temporary.rename(out)
    return out


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
