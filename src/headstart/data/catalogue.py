"""Named data sets as plain folders of pictures: `DIR/CLASS/*`, or `DIR/{train,val,test}/CLASS/*`.

Official splits are kept where a set has them. What is fetched is not changed: files are linked or copied as
they are; sets that come as arrays are written as PNG. Downloads are kept in the cache, so that a fetch that
was cut short goes on where it stopped, and so that files can be put there by hand.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headstart.data.cache import Say
from headstart.data.picture import EXTENSIONS
from headstart.disk import cache_dir
from headstart.errors import ConfigError, OutputError, Unreachable, unknown

MARK = ".headstart-data.json"
"""Lies in a finished folder and says what it holds."""

_CLIPART = {
    "animals": "animals",
    "buildings": "buildings",
    "flags": "signs_and_symbols/flags",
    "food": "food",
    "music": "recreation/music",
    "office": "office",
    "people": "people",
    "plants": "plants",
    "tools": "tools",
    "transportation": "transportation",
}
_FASHION = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_DEBIAN = {  # package -> where its files lie
    "openclipart-png": Path("/usr/share/openclipart/png"),
    "dataset-fashion-mnist": Path("/usr/share/datasets/fashion-mnist"),
}


@dataclass(frozen=True)
class Item:
    """One picture of a set.

    Attributes:
        side: 'train', 'val' or 'test'; None: the set has no official split.
        label: name of the class.
        name: file name, unique within side and label.
        source: a file, or what gives the image.
    """

    side: str | None
    label: str
    name: str
    source: Path | Callable[[], Image.Image]


@dataclass(frozen=True)
class Named:
    """A set that can be fetched by name.

    Attributes:
        about: one line for people.
        licence: under what terms its pictures may be used.
        home: where it is described, and can be had by hand.
        items: its pictures; may fetch, and may use the given folder, which is removed afterwards.
    """

    about: str
    licence: str
    home: str
    items: Callable[[Path, Say], Iterable[Item]]


def fetch(
    name: str, out: str | Path, *, per_class: int | None = None, seed: int = 0, say: Say = print
) -> Path:
    """Make the folder of a named set.

    Args:
        name: one of `NAMES`.
        out: the folder to make. One that holds exactly what is asked for is taken as it is.
        per_class: at most so many pictures per class (and official side), drawn at random; None: all.
        seed: of that draw.
        say: told what happens.

    Returns:
        The folder.

    Raises:
        ConfigError: a name that does not exist.
        OutputError: `out` holds something else, or cannot be written.
        Unreachable: the set could not be had; says what was tried and what to do by hand.
    """
    if name not in NAMES:
        raise ConfigError(unknown("data set", name, NAMES))
    if per_class is not None and per_class < 1:
        raise ConfigError(f"per_class is {per_class}. Give 1 or more, or leave it out for all pictures.")
    out = Path(out).expanduser()
    asked = {"name": name, "per_class": per_class, "seed": seed if per_class is not None else None}
    if _finished(out, asked):
        say(f"{out} holds {name} already.")
        return out
    temp = out.parent / f".{out.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        temp.mkdir()
        with tempfile.TemporaryDirectory(prefix="headstart-") as work:
            chosen = _choose(NAMES[name].items(Path(work), say), per_class, seed)
            if not chosen:
                raise Unreachable(f"{name} was fetched, but no pictures were in it. See {NAMES[name].home}.")
            for item in chosen:
                _put(item, temp)
        about = {"licence": NAMES[name].licence, "home": NAMES[name].home, "pictures": len(chosen)}
        (temp / MARK).write_text(json.dumps({"asked": asked, **about}, indent=1), encoding="utf-8")
        if out.is_dir():
            out.rmdir()  # it is empty: _finished saw to that
        temp.rename(out)
    except OSError as error:
        raise OutputError(f"{name} cannot be written to {out}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    classes = {item.label for item in chosen}
    say(f"{out}: {len(chosen)} pictures of {len(classes)} classes. Licence: {NAMES[name].licence}.")
    return out


def _finished(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder is there as asked; what is there and is not that is refused."""
    if not out.exists():
        return False
    if out.is_dir():
        try:
            mark = json.loads((out / MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            mark = None
        if isinstance(mark, dict):
            if mark.get("asked") == asked:
                return True
            held = mark.get("asked")
            raise OutputError(f"{out} holds another set ({held}). Choose another folder, or remove this one.")
        if not any(out.iterdir()):
            return False
    raise OutputError(f"{out} holds something else. Choose another folder, or remove this one.")


def _sweep(out: Path) -> None:
    """Remove what killed fetches left behind, after a day."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        if time.time() - path.stat().st_mtime > 24 * 3600:
            shutil.rmtree(path, ignore_errors=True)


def _choose(items: Iterable[Item], per_class: int | None, seed: int) -> list[Item]:
    """All pictures, or a seeded sample per side and class that does not depend on their order."""
    by_class: defaultdict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        by_class[item.side or "", item.label].append(item)
    chosen: list[Item] = []
    for (side, label), members in sorted(by_class.items()):
        members.sort(key=lambda item: item.name)
        if per_class is not None and len(members) > per_class:
            draw = random.Random(f"{seed}/{side}/{label}")
            members = sorted(draw.sample(members, per_class), key=lambda item: item.name)
        chosen.extend(members)
    return chosen


def _put(item: Item, root: Path) -> None:
    """One picture into its folder: linked where the disk allows it, else copied, else written as PNG."""
    folder = root.joinpath(*([item.side] if item.side else []), _safe(item.label))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _safe(item.name)
    if not isinstance(item.source, Path):
        item.source().save(target, format="PNG")
        return
    try:
        os.link(item.source.resolve(), target)
    except OSError:  # another disk, another owner, or a disk without links
        shutil.copyfile(item.source, target)


def _safe(name: str) -> str:
    """A class or file name that is one path component."""
    cleaned = name.strip().replace("/", "-").replace("\\", "-").replace("\0", "")
    return f"_{cleaned}" if cleaned.startswith(".") or not cleaned else cleaned


# -- Debian packages -------------------------------------------------------------------------------------


def _debian(package: str, work: Path, say: Say) -> Path:
    """Where the files of a Debian package lie: installed, or unpacked here without root.

    Raises:
        Unreachable: neither; with what was tried.
    """
    installed = _DEBIAN[package]
    if installed.is_dir():
        say(f"Using {installed} of the installed package {package}.")
        return installed
    by_hand = f"By hand: sudo apt-get update && sudo apt-get install {package}, then again."
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise Unreachable(
            f"{installed} is not there, and {' and '.join(missing)} to fetch the Debian package "
            f"{package} are not on this machine. On Debian or Ubuntu: sudo apt-get install {package}, then "
            f"copy {installed}."
        )
    say(f"Fetching the Debian package {package} (no root needed) ...")
    state = work / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True)
    # Fresh containers have no package lists: then lists of our own, in a folder of our own.
    own = [
        *("-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state}"),
        *("-o", f"Dir::Cache::archives={state / 'archives'}", "-o", "APT::Sandbox::User="),
    ]
    attempts = ([["download", package]], [[*own, "update"], [*own, "download", package]])
    reason = ""
    for attempt in attempts:
        for arguments in attempt:
            reason = _run(["apt-get", "-q", *arguments], work)
        found = sorted(work.glob(f"{package}_*.deb"))
        if found:
            reason = _run(["dpkg-deb", "-x", str(found[0]), str(work / "unpacked")], work)
            place = work / "unpacked" / installed.relative_to("/")
            if place.is_dir():
                return place
    raise Unreachable(
        f"Tried {installed} and apt-get download {package}, with the machine's and with fresh package lists"
        f"{f' ({reason})' if reason else ''}. {by_hand}"
    )


def _run(command: list[str], work: Path) -> str:
    """Run a tool; returns '' or the last line of its complaint."""
    try:
        done = subprocess.run(
            command, cwd=work, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return "no answer for 15 minutes"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (
        (done.stderr or done.stdout).strip().splitlines()[-1:][0] if done.stderr or done.stdout else "failed"
    )


def _clipart(work: Path, say: Say) -> Iterator[Item]:
    root = _debian("openclipart-png", work, say)
    for label, folder in _CLIPART.items():
        for path in sorted((root / folder).rglob("*")):
            # Links lead to pictures of other folders, so one picture would have two labels.
            if path.suffix.lower() not in EXTENSIONS or path.is_symlink() or not path.is_file():
                continue
            if not _is_giant(path):
                name = "_".join(path.relative_to(root / folder).parts)
                yield Item(None, label, name, path)


def _is_giant(path: Path) -> bool:
    """Some drawings were rendered to 169 million pixels and more: each takes as long as all the others."""
    with path.open("rb") as file:
        head = file.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big") > 50_000_000


def _fashion_mnist(work: Path, say: Say) -> Iterator[Item]:
    try:
        root = _debian("dataset-fashion-mnist", work, say)
    except Unreachable as first:
        say("Debian's package cannot be had; trying torchvision's download ...")
        try:
            yield from _torchvision("FashionMNIST", {"train": {"train": True}, "test": {"train": False}})(
                work, say
            )
        except Unreachable as second:
            raise Unreachable(f"{first} {second}") from None
        return
    for side, prefix in (("train", "train"), ("test", "t10k")):
        pictures = _idx(root / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(root / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        for i, label in enumerate(labels):
            yield Item(side, _FASHION[label], f"{i:05d}.png", _Array(pictures[i]))


def _idx(path: Path, *, header: int) -> np.ndarray:
    """The bytes of an IDX file after its header."""
    try:
        with gzip.open(path, "rb") as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=header)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unreachable(f"{path} is damaged ({error}). Install its Debian package again.") from None


@dataclass(frozen=True)
class _Array:
    """An image that is made when it is written."""

    pixels: np.ndarray

    def __call__(self) -> Image.Image:
        return Image.fromarray(self.pixels)


def _digits(work: Path, say: Say) -> Iterator[Item]:
    from sklearn.datasets import load_digits

    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        # 8 x 8 pixels of 17 grey levels: kept that small, every use enlarges them as it needs.
        yield Item(None, str(label), f"{i:04d}.png", _Array(np.round(pixels * (255 / 16)).astype(np.uint8)))


# -- torchvision -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _torchvision:  # noqa: N801  a maker of item sources, named as they are
    """A set of `torchvision.datasets`.

    Attributes:
        kind: name of the class.
        sides: official side -> arguments of the class; '' for a set without one.
        classes: names by label, for sets that do not tell them.
        inner: for sets that are folders of classes once unpacked: that folder, below the root.
        drop: folders in it that are no class.
    """

    kind: str
    sides: dict[str, dict[str, Any]]
    classes: tuple[str, ...] = ()
    inner: str | None = None
    drop: tuple[str, ...] = field(default=())

    def __call__(self, work: Path, say: Say) -> Iterator[Item]:
        from torchvision import datasets

        root = cache_dir() / "downloads" / self.kind.lower()
        root.mkdir(parents=True, exist_ok=True)
        say(f"Fetching {self.kind} with torchvision into {root} ...")
        for side, arguments in self.sides.items():
            data = self._open(getattr(datasets, self.kind), root, arguments)
            if self.inner is not None:
                yield from self._folders(root / self.inner)
                continue
            names = self.classes or tuple(data.classes)
            for i, (label, source) in enumerate(_members(data)):
                name = source.name if isinstance(source, Path) else f"{i:05d}.png"
                yield Item(side or None, names[label], name, source)

    def _open(self, kind: Callable[..., Any], root: Path, arguments: dict[str, Any]) -> Any:
        try:
            try:
                # Files that are there already, put by hand or fetched before, need no network.
                return kind(root=str(root), download=False, **arguments)
            except (RuntimeError, OSError, ValueError, EOFError):
                return kind(root=str(root), download=True, **arguments)
        except Exception as error:  # noqa: BLE001  torchvision raises whatever its downloaders raise
            reason = " ".join(str(error).split()) or type(error).__name__
            home = next(named.home for named in NAMES.values() if _kind(named) == self.kind)
            raise Unreachable(
                f"Tried torchvision's download of {self.kind} ({reason[:200].rstrip('.')}). By hand: get the "
                f"files from {home}, put them under {root} as torchvision.datasets.{self.kind} expects them, "
                "then again."
            ) from None

    def _folders(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.rglob("*")):
            label = path.relative_to(folder).parts[0]
            if label not in self.drop and path.is_file() and path.suffix.lower() in EXTENSIONS:
                yield Item(None, label, "_".join(path.relative_to(folder / label).parts), path)


def _kind(named: Named) -> str | None:
    if isinstance(named.items, _torchvision):
        return named.items.kind
    return "FashionMNIST" if named.items is _fashion_mnist else None


def _members(data: Any) -> Iterator[tuple[int, Path | Callable[[], Image.Image]]]:
    """Label and file of each picture; where a set holds arrays, what makes the image."""
    for files in ("_image_files", "_images"):
        if hasattr(data, files):
            for path, label in zip(getattr(data, files), data._labels, strict=True):
                yield int(label), Path(path)
            return
    for samples in ("_samples", "samples"):
        if hasattr(data, samples):
            for path, label in getattr(data, samples):
                yield int(label), Path(path)
            return
    for i in range(len(data)):
        image, label = data[i]
        yield int(label), _Array(np.array(image))


_THREE = {side: {"split": side} for side in ("train", "val", "test")}
_TWO = {side: {"split": side} for side in ("train", "test")}
_FLAG = {"train": {"train": True}, "test": {"train": False}}
_RESEARCH = "none stated; offered for research"

NAMES: dict[str, Named] = {
    "clipart": Named(
        "2,500 drawings of ten kinds of things, out of Debian's openclipart-png (131 MB)",
        "public domain (CC0)",
        "https://packages.debian.org/openclipart-png",
        _clipart,
    ),
    "fashion-mnist": Named(
        "70,000 grey pictures of ten kinds of clothes, 28 x 28 (31 MB)",
        "MIT",
        "https://github.com/zalandoresearch/fashion-mnist",
        _fashion_mnist,
    ),
    "digits": Named(
        "1,797 handwritten digits, 8 x 8, from scikit-learn: no download",
        "CC BY 4.0 (UCI, Optical Recognition of Handwritten Digits)",
        "https://archive.ics.uci.edu/dataset/80",
        _digits,
    ),
    "flowers102": Named(
        "8,189 photographs of 102 flowers (330 MB)",
        _RESEARCH,
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        _torchvision("Flowers102", _THREE),
    ),
    "pets": Named(
        "7,349 photographs of 37 breeds of cats and dogs (800 MB)",
        "CC BY-SA 4.0",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        _torchvision("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    ),
    "dtd": Named(
        "5,640 photographs of 47 textures (600 MB)",
        _RESEARCH,
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        _torchvision("DTD", _THREE),
    ),
    "aircraft": Named(
        "10,000 photographs of 100 aircraft (2.8 GB)",
        "non-commercial research only",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        _torchvision("FGVCAircraft", _THREE),
    ),
    "cars": Named(
        "16,185 photographs of 196 cars; its home is gone, the files must be put in place by hand",
        "non-commercial research only",
        "https://github.com/pytorch/vision/issues/7545",
        _torchvision("StanfordCars", _TWO),
    ),
    "food101": Named(
        "101,000 photographs of 101 dishes (5 GB)",
        "scientific fair use only",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        _torchvision("Food101", _TWO),
    ),
    "caltech101": Named(
        "8,677 pictures of 101 kinds of things (130 MB; needs gdown)",
        "CC BY 4.0",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        _torchvision(
            "Caltech101",
            {"": {}},
            inner="caltech101/101_ObjectCategories",
            drop=("BACKGROUND_Google",),
        ),
    ),
    "caltech256": Named(
        "29,780 pictures of 256 kinds of things (1.2 GB; needs gdown)",
        "CC BY 4.0",
        "https://data.caltech.edu/records/nyy15-4j048",
        _torchvision("Caltech256", {"": {}}, inner="caltech256/256_ObjectCategories", drop=("257.clutter",)),
    ),
    "eurosat": Named(
        "27,000 satellite pictures of ten kinds of land, 64 x 64 (90 MB)",
        "MIT",
        "https://github.com/phelber/EuroSAT",
        _torchvision("EuroSAT", {"": {}}),
    ),
    "cifar10": Named(
        "60,000 pictures of ten kinds of things, 32 x 32 (170 MB)",
        _RESEARCH,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _torchvision("CIFAR10", _FLAG),
    ),
    "cifar100": Named(
        "60,000 pictures of 100 kinds of things, 32 x 32 (170 MB)",
        _RESEARCH,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _torchvision("CIFAR100", _FLAG),
    ),
    "stl10": Named(
        "13,000 pictures of ten kinds of things, 96 x 96 (2.6 GB)",
        _RESEARCH,
        "https://cs.stanford.edu/~acoates/stl10/",
        _torchvision("STL10", _TWO),
    ),
    "svhn": Named(
        "99,289 pictures of house numbers, 32 x 32 (250 MB)",
        "non-commercial use only",
        "http://ufldl.stanford.edu/housenumbers/",
        _torchvision("SVHN", _TWO, classes=tuple("0123456789")),
    ),
}
"""Every named set, by name."""
