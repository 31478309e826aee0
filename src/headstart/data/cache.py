"""Decode once: a resized uint8 store of a set of pictures, memory-mapped from disk.

    <cache>/stores/<key>/          plain.u8   uint8 [M, S, S, 3]      exactly what evaluation sees
                                   large.u8   uint8, ragged           what augmentation crops from
                                   meta.json  shapes, hashes, what was unreadable, near duplicates

A store is written under a temporary name and renamed when it is whole, so a store that is there is whole
(its sizes are checked none the less: disks lose the ends of files). The key is a hash of the contents and
the preprocessing. One process builds while others wait on a lock; where there are no locks several may
build, and the first to rename wins. What a killed process left behind is swept away by the next builder.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from headstart.data.duplicates import near_pairs
from headstart.data.facts import Facts, Progress, decoded, first_of_each, hashed
from headstart.data.preprocess import Preprocess
from headstart.disk import cache_dir, read_json
from headstart.errors import DataError, OutputError

FORMAT = 1
"""Part of every key: raise it when what is stored changes."""

Say = Callable[[str], None]

_STALE = 24 * 3600.0  # seconds after which a temporary folder of another set is taken for abandoned


def quiet(text: str) -> None:
    """A `say` that says nothing."""


class Pictures:
    """The decoded pictures of a set.

    Attributes:
        facts: what is known of each file.
        rows: [N] int64, the row of each file in the store; -1: unreadable.
        where: the folder of the store; None: it is held in memory.
    """

    def __init__(self, facts: Facts, rows: np.ndarray, store: _Store) -> None:
        self.facts = facts
        self.rows = rows
        self._store = store

    @property
    def where(self) -> Path | None:
        """The folder of the store; None: it is held in memory."""
        return self._store.folder

    def plain(self, indices: Sequence[int]) -> np.ndarray:
        """Evaluation pictures of these files: uint8 [n, S, S, 3]."""
        picked: np.ndarray = self._store.plain[self.rows[list(indices)]]
        return picked

    def large(self, index: int) -> np.ndarray:
        """What augmentation crops from, of one file: uint8 [h, w, 3], read-only."""
        row = int(self.rows[index])
        height, width = self._store.shapes[row]
        start = int(self._store.offsets[row])
        view: np.ndarray = self._store.large[start : start + int(height) * int(width) * 3].reshape(
            height, width, 3
        )
        return view

    def in_memory(self) -> Pictures:
        """The same pictures, sent whole where they are pickled: to a machine that has not the files."""
        store = copy.copy(self._store)
        store.folder, store.plain, store.large = None, np.asarray(store.plain), np.asarray(store.large)
        return Pictures(self.facts, self.rows, store)

    @classmethod
    def build(
        cls,
        root: Path,
        paths: Sequence[Path],
        preprocess: Preprocess,
        *,
        cache: Path | None = None,
        progress: Progress | None = None,
        say: Say = quiet,
    ) -> Pictures:
        """Open the store of these files, building it if it is not there.

        Args:
            root: the folder the index is kept for.
            paths: the files.
            preprocess: what the network expects.
            cache: folder of the cache; None: `cache_dir()`.
            progress: called with (done, all) while decoding.
            say: told in a sentence when something is out of the ordinary.

        Raises:
            DataError: no file could be read.
            OutputError: neither disk nor memory has room.
        """
        cache = cache or cache_dir()
        facts = hashed(root, paths, cache)
        first = first_of_each(facts.hashes)
        order = sorted(first)
        if not order:
            raise DataError(_all_broken(paths, facts.errors))
        files = [paths[first[sha]] for sha in order]
        digest = hashlib.sha256(f"{FORMAT}\n{_pixels(preprocess)}\n".encode())
        digest.update("\n".join(order).encode())
        key = digest.hexdigest()[:32]
        try:
            store = _open_or_build(cache / "stores", key, order, files, preprocess, progress, say)
        except OutputError as error:
            say(f"{error} The pictures are kept in memory instead, and are decoded again next time.")
            store = _in_memory(order, files, preprocess, progress)
        row_of = {sha: row for row, sha in enumerate(store.contents)}
        for i, sha in enumerate(facts.hashes):
            if sha in store.errors:
                facts.hashes[i], facts.errors[i] = None, store.errors[sha]
            elif sha is not None:
                facts.sizes[i] = store.sizes[row_of[sha]]
                if sha in store.notes:
                    facts.notes[i] = store.notes[sha]
        facts.near = [(first[store.contents[a]], first[store.contents[b]]) for a, b in store.near]
        if not row_of:
            raise DataError(_all_broken(paths, facts.errors))
        rows = np.array([-1 if sha is None else row_of[sha] for sha in facts.hashes], dtype=np.int64)
        return cls(facts, rows, store)


def _all_broken(paths: Sequence[Path], errors: dict[int, str]) -> str:
    shown = "; ".join(f"{paths[i].name}: {reason}" for i, reason in sorted(errors.items())[:3])
    return (
        f"None of the {len(paths)} pictures can be read. {shown}. Give files in a format that Pillow opens."
    )


def _pixels(preprocess: Preprocess) -> str:
    """The part of the preprocessing that changes stored pixels."""
    fields = {"size", "crop_pct", "interpolation", "crop_mode"}
    if preprocess.crop_mode == "border":
        fields.add("mean")
    return json.dumps(preprocess.model_dump(mode="json", include=fields), sort_keys=True)


class _Store:
    """Decoded pixels of M contents, on disk or in memory."""

    def __init__(
        self, meta: dict[str, Any], plain: np.ndarray, large: np.ndarray, folder: Path | None
    ) -> None:
        self.meta, self.folder = meta, folder
        self.plain, self.large = plain, large
        self.contents: list[str] = meta["contents"]
        self.errors: dict[str, str] = meta["errors"]
        self.notes: dict[str, str] = meta["notes"]
        self.near: list[tuple[int, int]] = [(a, b) for a, b in meta["near"]]
        self.sizes: list[tuple[int, int]] = [(w, h) for w, h in meta["sizes"]]
        self.shapes = np.array(meta["shapes"], dtype=np.int64).reshape(-1, 2)
        self.offsets = np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves instead of being sent the pixels.
        state = dict(self.__dict__)
        if self.folder is not None:
            state["plain"] = state["large"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.folder is not None:
            self.plain, self.large = _map(self.folder, self.meta)

    @classmethod
    def open(cls, folder: Path) -> _Store | None:
        """The store in a folder, or None where there is none or it is damaged."""
        meta = read_json(folder / "meta.json")
        if meta.get("format") != FORMAT:
            return None
        try:
            if any((folder / name).stat().st_size != size for name, size in meta["bytes"].items()):
                return None
            return cls(meta, *_map(folder, meta), folder)
        except (OSError, ValueError, LookupError, TypeError):
            return None


def _map(folder: Path, meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    size = int(meta["size"])
    count = len(meta["contents"])
    if count == 0:  # an empty file cannot be mapped
        return np.empty((0, size, size, 3), np.uint8), np.empty(0, np.uint8)
    plain = np.memmap(folder / "plain.u8", dtype=np.uint8, mode="r", shape=(count, size, size, 3))
    return plain, np.memmap(folder / "large.u8", dtype=np.uint8, mode="r")


def _fill(
    order: list[str],
    files: list[Path],
    preprocess: Preprocess,
    progress: Progress | None,
    plain: Callable[[bytes], Any],
    large: Callable[[bytes], Any],
) -> dict[str, Any]:
    """Decode everything, hand the pixels on, and return what the store has to know of them."""
    meta: dict[str, Any] = {
        "format": FORMAT, "size": preprocess.size, "contents": [], "shapes": [], "sizes": [],
        "errors": {}, "notes": {}, "near": [],
    }  # fmt: skip
    hashes: list[int] = []
    thumbnails: list[np.ndarray] = []
    for sha, done in zip(order, decoded(files, preprocess, progress), strict=True):
        if done.error is not None:
            meta["errors"][sha] = done.error
            continue
        assert done.plain is not None and done.large is not None and done.thumbnail is not None
        plain(done.plain.tobytes())
        large(done.large.tobytes())
        meta["contents"].append(sha)
        meta["shapes"].append(done.large.shape[:2])
        meta["sizes"].append(done.size)
        if done.note is not None:
            meta["notes"][sha] = done.note
        hashes.append(done.dhash)
        thumbnails.append(done.thumbnail)
    if hashes:
        meta["near"] = near_pairs(np.array(hashes, dtype=np.uint64), np.stack(thumbnails))
    return meta


def _in_memory(
    order: list[str], files: list[Path], preprocess: Preprocess, progress: Progress | None
) -> _Store:
    need = _estimate(len(order), preprocess)
    free = psutil.virtual_memory().available
    if need > 0.9 * free:
        raise OutputError(
            f"The decoded pictures need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory "
            "are free. Make room on a disk and say where with the environment variable HEADSTART_CACHE."
        )
    plain, large = io.BytesIO(), io.BytesIO()
    meta = _fill(order, files, preprocess, progress, plain.write, large.write)
    shape = (len(meta["contents"]), preprocess.size, preprocess.size, 3)
    return _Store(
        meta,
        np.frombuffer(plain.getbuffer(), np.uint8).reshape(shape),
        np.frombuffer(large.getbuffer(), np.uint8),
        None,
    )


def _estimate(count: int, preprocess: Preprocess) -> int:
    """Bytes of a store, for pictures of the usual 4:3."""
    side = round(1.25 * preprocess.size)
    return count * 3 * (preprocess.size**2 + side * side * 4 // 3)


def _open_or_build(
    stores: Path,
    key: str,
    order: list[str],
    files: list[Path],
    preprocess: Preprocess,
    progress: Progress | None,
    say: Say,
) -> _Store:
    final = stores / key
    store = _Store.open(final)
    if store is not None:
        return store
    try:
        stores.mkdir(parents=True, exist_ok=True)
        with _lock(stores / f".{key}.lock", say) as alone:
            store = _Store.open(final)  # somebody may have built it while we waited
            if store is not None:
                return store
            _sweep(stores, key, alone)
            temp = stores / f".{key}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
            try:
                _write(temp, order, files, preprocess, progress)
                return _install(temp, final)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
    except OSError as error:
        raise OutputError(_no_room(stores, len(order), preprocess, error)) from None


def _no_room(stores: Path, count: int, preprocess: Preprocess, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = _estimate(count, preprocess) / 1e9
        return (
            f"The disk of the picture cache {stores.parent} is full; it needs about {need:.1f} GB. "
            "The environment variable HEADSTART_CACHE says where it lies."
        )
    return (
        f"The picture cache {stores.parent} cannot be written ({error.strerror or error}). "
        "The environment variable HEADSTART_CACHE says where it lies."
    )


def _write(
    temp: Path, order: list[str], files: list[Path], preprocess: Preprocess, progress: Progress | None
) -> None:
    """Write a whole store into a new folder and push it to the disk."""
    temp.mkdir()
    # Written through files, not through a map: a full disk is then an error and not a dead process.
    with (temp / "plain.u8").open("wb") as plain, (temp / "large.u8").open("wb") as large:
        meta = _fill(order, files, preprocess, progress, plain.write, large.write)
        for file in (plain, large):
            file.flush()
            os.fsync(file.fileno())
    meta["bytes"] = {name: (temp / name).stat().st_size for name in ("plain.u8", "large.u8")}
    with (temp / "meta.json").open("w", encoding="utf-8") as text:
        json.dump(meta, text)
        text.flush()
        os.fsync(text.fileno())


def _install(temp: Path, final: Path) -> _Store:
    """Rename a whole store into place; where another is there already and whole, that one is taken."""
    for _ in range(10):
        try:
            temp.replace(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.ENOTDIR):
                raise
            there = _Store.open(final)
            if there is not None:
                return there
            # Damaged: out of the way under a name nobody opens, then once more.
            aside = final.with_name(f".{final.name}.damaged.{uuid.uuid4().hex[:8]}")
            try:
                final.replace(aside)
            except FileNotFoundError:
                continue  # another process was quicker
            shutil.rmtree(aside, ignore_errors=True)
            continue
        there = _Store.open(final)
        if there is None:
            raise OutputError(f"The picture cache {final} was damaged while it was written. Try again.")
        return there
    raise OutputError(f"The picture cache {final} is damaged and cannot be replaced. Remove it by hand.")


def _sweep(stores: Path, key: str, alone: bool) -> None:
    """Remove what killed processes left: of this key at once, of others after a day."""
    for path in stores.glob(".*.*"):
        if path.suffix == ".lock" or not path.is_dir():
            continue
        try:
            old = time.time() - path.stat().st_mtime > _STALE
        except FileNotFoundError:
            continue
        if old or (alone and path.name.startswith(f".{key}.")):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path, say: Say) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields False where the system or the disk has none."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            say("Another process is preparing the same pictures; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
