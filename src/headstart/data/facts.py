"""What is known of the files of a set: which content each holds, and whether it is a picture.

<cache>/index/<root>.json      which content a path held, by size and times: a second run reads no file
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from headstart.data.duplicates import look, near_pairs
from headstart.data.picture import Unreadable, open_with_notes
from headstart.data.preprocess import Preprocess
from headstart.disk import cache_dir, read_json, write_json
from headstart.errors import OutputError

Progress = Callable[[int, int], None]

_PIECE = 32  # pictures decoded before they are handed on: bounds the memory


@dataclass
class Facts:
    """What opening the files taught.

    Attributes:
        hashes: [N] SHA-256 of the content; None: no picture can be had from this file.
        errors: index -> reason, for each None in `hashes`.
        notes: index -> what Pillow remarked on a picture that is used all the same.
        near: pairs of indices of near duplicates (first occurrence of each content).
        sizes: index -> (width, height) as stored upright.
    """

    hashes: list[str | None]
    errors: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    near: list[tuple[int, int]] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Decoded:
    """One picture, opened: everything that is kept of it."""

    error: str | None = None
    note: str | None = None
    size: tuple[int, int] = (0, 0)
    dhash: int = 0
    thumbnail: np.ndarray | None = None
    plain: np.ndarray | None = None
    large: np.ndarray | None = None


def _decode(path: Path, preprocess: Preprocess | None) -> Decoded:
    try:
        image, notes = open_with_notes(path)
    except Unreadable as error:
        return Decoded(error=error.reason)
    dhash, thumbnail = look(image)
    done = Decoded(note="; ".join(notes) or None, size=image.size, dhash=dhash, thumbnail=np.array(thumbnail))
    if preprocess is not None:
        done.plain = preprocess.plain(image)
        done.large = np.array(preprocess.reduce(image))
    return done


def _threads() -> int:
    """Decoding threads: Pillow lets go of the interpreter while it decodes."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(16, cores))


def decoded(
    paths: Sequence[Path], preprocess: Preprocess | None, progress: Progress | None
) -> Iterator[Decoded]:
    """Decode files in order, some at a time."""
    with ThreadPoolExecutor(_threads(), thread_name_prefix="decode") as pool:
        for start in range(0, len(paths), _PIECE):
            for offset, done in enumerate(
                pool.map(lambda path: _decode(path, preprocess), paths[start : start + _PIECE])
            ):
                yield done
                if progress is not None:
                    progress(start + offset + 1, len(paths))


def inspect(
    root: Path, paths: Sequence[Path], *, cache: Path | None = None, progress: Progress | None = None
) -> Facts:
    """Open every file once and keep nothing but facts: for an audit before there is a network.

    Args:
        root: the folder the index is kept for.
        paths: the files.
        cache: folder of the cache; None: `cache_dir()`.
        progress: called with (done, all).
    """
    facts = hashed(root, paths, cache or cache_dir())
    first = first_of_each(facts.hashes)
    order = sorted(first)
    rows = list(decoded([paths[first[sha]] for sha in order], None, progress))
    _spread(facts, paths, order, rows)
    known = [i for i, row in enumerate(rows) if row.error is None]
    if known:
        pairs = near_pairs(
            np.array([rows[i].dhash for i in known], dtype=np.uint64),
            np.stack([t for i in known if (t := rows[i].thumbnail) is not None]),
        )
        facts.near = [(first[order[known[a]]], first[order[known[b]]]) for a, b in pairs]
    return facts


def _spread(facts: Facts, paths: Sequence[Path], order: list[str], rows: list[Decoded]) -> None:
    """Copy what is known of each content to each file that holds it."""
    by_content = dict(zip(order, rows, strict=True))
    for i in range(len(paths)):
        sha = facts.hashes[i]
        if sha is None:
            continue
        row = by_content[sha]
        if row.error is not None:
            facts.hashes[i], facts.errors[i] = None, row.error
            continue
        facts.sizes[i] = row.size
        if row.note is not None:
            facts.notes[i] = row.note


def first_of_each(hashes: Sequence[str | None]) -> dict[str, int]:
    """Content -> the first file that holds it."""
    first: dict[str, int] = {}
    for i, sha in enumerate(hashes):
        if sha is not None:
            first.setdefault(sha, i)
    return first


def hashed(root: Path, paths: Sequence[Path], cache: Path) -> Facts:
    """Content hashes; files whose size and times are known from before are not read."""
    name = hashlib.sha256(str(root.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    place = cache / "index" / f"{name}.json"
    known: dict[str, list[Any]] = read_json(place)
    fresh: dict[str, list[Any]] = {}
    facts = Facts([None] * len(paths))

    def one(path: Path) -> tuple[list[Any] | None, str | None]:
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):  # a pipe would be waited for until somebody writes into it
                return None, "is no file but a pipe, a socket or a device"
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            entry = known.get(str(path.absolute()))
            if entry is not None and entry[:3] == stamp:
                return entry, None
            started = time.time_ns()
            with path.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            # A file written a moment ago may be written again within the clock's step: look again next time.
            settled = stat.st_mtime_ns < started - 50_000_000
            return [*(stamp if settled else [-1, -1, -1]), sha], None
        except FileNotFoundError:
            return None, "does not exist"
        except PermissionError:
            return None, "no permission to read it"
        except OSError as error:
            return None, f"cannot be read ({error.strerror or error})"

    with ThreadPoolExecutor(_threads(), thread_name_prefix="hash") as pool:
        for i, (entry, reason) in enumerate(pool.map(one, paths)):
            if entry is None:
                facts.errors[i] = str(reason)
            else:
                facts.hashes[i] = entry[3]
                fresh[str(paths[i].absolute())] = entry
    if fresh != known:
        with suppress(OSError, OutputError):  # the index only saves time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, fresh)
    return facts
