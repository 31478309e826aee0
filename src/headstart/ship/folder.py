"""A model folder on disk: the names of its files, their hashes, and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from headstart.errors import ModelError, OutputError, first_line

CONFIG, LABELS, PREPROCESS, CALIBRATION = (
    "config.json",
    "labels.json",
    "preprocess.json",
    "calibration.json",
)
WEIGHTS, ONNX, ONNX_PIXELS, EXPORTED = (
    "model.safetensors",
    "model.onnx",
    "model-from-pixels.onnx",
    "model.pt2",
)
# What config.json may describe of a network that timm cannot build by name; `ship.rebuild` builds these.
DESCRIBED = frozenset({"routed", "pruned"})

CARD, VERIFICATION, SUMS = "README.md", "verification.json", "SHA256SUMS"


@contextlib.contextmanager
def whole(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when all is written, or never.

    Raises:
        OutputError: `folder` holds something else than a model, or cannot be written.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise OutputError(f"'{target}' holds something else than a model; give another folder.")
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file; a model is a folder.")
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        write_sums(fresh)
        if target.exists():
            target.rename(replaced)
        fresh.rename(target)
    except OSError as error:
        why = f"{error.strerror}." if error.strerror else first_line(error)
        raise OutputError(f"The model could not be written to '{target}': {why}") from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data."""
    # Names that are no UTF-8 hold lone surrogates; with a backslash these are JSON's own escapes.
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, with backslashes in what is no UTF-8."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Read plain data; a file that cannot be read is a `ModelError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read: {first_line(error)}") from error


def copy(folder: Path, to: Path, names: Iterable[str]) -> None:
    """Copy files of one model folder into another."""
    for name in names:
        shutil.copyfile(folder / name, to / name)


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file, as `sha256sum -c SHA256SUMS` reads it."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != SUMS
    )
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check(folder: Path, names: Iterable[str]) -> None:
    """See that files are there and as they were written; without SHA256SUMS there is nothing to compare.

    Args:
        folder: of the model.
        names: the files that are about to be read. One that the folder never had is not missed.

    Raises:
        ModelError: the file, and the hash that was expected and found.
    """
    sums = _sums(folder)
    for name in names:
        if name not in sums:
            continue
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"'{folder}' is not complete: {name} is missing, which {SUMS} lists. "
                "Copy the whole folder again."
            )
        found = _sha256(path)
        if found != sums[name]:
            raise ModelError(
                f"'{path}' was altered: its SHA-256 is {found[:12]}…, and {SUMS} says {sums[name][:12]}…. "
                "Was it cut off on the way? Copy it again, or export the run again."
            )


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that name all that decides what a model says."""
    sums = _sums(folder)
    said = [name for name in (CONFIG, LABELS, PREPROCESS, CALIBRATION, WEIGHTS) if (folder / name).is_file()]
    if WEIGHTS not in said and (folder / ONNX).is_file():
        said.append(ONNX)
    text = "".join(f"{name} {sums.get(name) or _sha256(folder / name)}\n" for name in said)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def listed(folder: Path, name: str) -> bool:
    """Whether a file belongs to the folder, there or not."""
    return name in _sums(folder)


def _sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {name: value for value, name in (line.split("  ", 1) for line in lines if line)}
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' is damaged: a hash and a file name per line are expected.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
