"""Decode once: built, found again, shared by processes, damaged, full."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from headstart.data import cache as module
from headstart.data import facts
from headstart.data.cache import Pictures
from headstart.data.facts import inspect
from headstart.data.picture import open_picture
from headstart.data.preprocess import Preprocess
from headstart.errors import DataError, OutputError

PREPROCESS = Preprocess(size=24)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(12):
        path = tmp_path / "data" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        height, width = rng.integers(20, 60, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))
        paths.append(path)
    return paths


def build(files: list[Path], cache: Path, **more: Any) -> Pictures:
    return Pictures.build(files[0].parent, files, PREPROCESS, cache=cache, **more)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("this should not be needed")

    for name in names:
        monkeypatch.setattr(facts, name, refuse)


def check(pictures: Pictures, files: list[Path]) -> None:
    for i, path in enumerate(files):
        image = open_picture(path)
        assert np.array_equal(pictures.plain([i])[0], PREPROCESS.plain(image))
        assert np.array_equal(pictures.large(i), np.asarray(PREPROCESS.reduce(image)))
        assert pictures.facts.sizes[i] == image.size


def test_built_then_found_without_reading_a_file(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    first = build(files, tmp_path / "c", progress=lambda done, all_: seen.append((done, all_)))
    check(first, files)
    assert seen == [(k, 12) for k in range(1, 13)]
    assert not first.large(0).flags.writeable
    forbid(monkeypatch, "_decode")
    opened: list[str] = []
    real = Path.open

    def watch(self: Path, *args: Any, **more: Any) -> Any:
        opened.append(self.name)
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "open", watch)
    second = build(files, tmp_path / "c")
    assert not [name for name in opened if name.endswith(".png")]
    monkeypatch.setattr(Path, "open", real)
    assert second.facts == first.facts and second.where == first.where
    check(second, files)


def test_moved_folder_and_copies_share_one_store(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(files, tmp_path / "c")
    other = Path(shutil.copytree(files[0].parent, tmp_path / "moved"))
    shutil.copy(other / "3.png", other / "copy.png")
    forbid(monkeypatch, "_decode")
    moved = build([*(other / path.name for path in files), other / "copy.png"], tmp_path / "c")
    assert moved.where == first.where
    assert moved.facts.hashes[3] == moved.facts.hashes[12]
    assert np.array_equal(moved.plain([3]), moved.plain([12]))


def test_changed_files_sizes_and_interpolations_are_other_stores(files: list[Path], tmp_path: Path) -> None:
    first = build(files, tmp_path / "c")
    bilinear = PREPROCESS.model_copy(update={"interpolation": "bilinear"})
    other = Pictures.build(files[0].parent, files, bilinear, cache=tmp_path / "c")
    assert other.where != first.where
    # Mean and deviation change no stored pixel.
    same = PREPROCESS.model_copy(update={"mean": (0.1, 0.1, 0.1)})
    assert Pictures.build(files[0].parent, files, same, cache=tmp_path / "c").where == first.where
    Image.new("RGB", (30, 30), "red").save(files[0])
    changed = build(files, tmp_path / "c")
    assert changed.where != first.where
    check(changed, files)


def test_same_size_same_second_is_noticed(files: list[Path], tmp_path: Path) -> None:
    """Written again right after it was read, same length and same modification time."""
    a, b = (Image.new("RGB", (30, 30), color) for color in ("#010203", "#030201"))
    path = files[0].with_suffix(".bmp")
    a.save(path)
    stat = path.stat()
    build([path, *files], tmp_path / "c")
    b.save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check(build([path, *files], tmp_path / "c"), [path, *files])


def test_broken_pictures_are_skipped_and_named(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files[2].write_bytes(files[2].read_bytes()[:60])
    files[5].write_text("I am text")
    files[7].unlink()
    first = build(files, tmp_path / "c")
    assert sorted(first.facts.errors) == [2, 5, 7]
    assert "text file" in first.facts.errors[5] and first.facts.errors[7] == "does not exist"
    assert first.rows[[2, 5, 7]].tolist() == [-1, -1, -1]
    good = [i for i in range(12) if i not in (2, 5, 7)]
    for i in good:
        assert np.array_equal(first.plain([i])[0], PREPROCESS.plain(open_picture(files[i])))
    forbid(monkeypatch, "_decode")
    assert build(files, tmp_path / "c").facts == first.facts
    monkeypatch.undo()
    assert inspect(files[0].parent, files, cache=tmp_path / "c") == first.facts


def test_a_pipe_is_not_waited_for(files: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    facts = inspect(tmp_path, [*files, tmp_path / "pipe.png"], cache=tmp_path / "cache")
    assert facts.errors == {len(files): "is no file but a pipe, a socket or a device"}


def test_all_broken(files: list[Path], tmp_path: Path) -> None:
    for i, path in enumerate(files):
        path.write_text(f"text {i}")
    for _ in range(2):  # found in the cache the second time
        with pytest.raises(DataError, match="None of the 12 pictures can be read"):
            build(files, tmp_path / "c")
    for path in files:
        path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        build(files, tmp_path / "c")


@pytest.mark.parametrize("name", ["plain.u8", "large.u8", "meta.json"])
@pytest.mark.parametrize("damage", ["short", "empty", "gone"])
def test_damaged_store_is_rebuilt(files: list[Path], tmp_path: Path, name: str, damage: str) -> None:
    where = build(files, tmp_path / "c").where
    assert where is not None
    path = where / name
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "short" else 0)
    again = build(files, tmp_path / "c")
    assert again.where == where
    check(again, files)
    assert sorted(p.name for p in where.parent.iterdir() if p.suffix != ".lock") == [where.name]


def test_damaged_index_is_no_harm(files: list[Path], tmp_path: Path) -> None:
    build(files, tmp_path / "c")
    for path in (tmp_path / "c" / "index").iterdir():
        path.write_text('{"half')
    check(build(files, tmp_path / "c"), files)


def _build_in_process(files: list[Path], cache: Path, start: Any, results: Any) -> None:
    start.wait()
    said: list[str] = []
    pictures = Pictures.build(files[0].parent, files, PREPROCESS, cache=cache, say=said.append)
    results.put((str(pictures.where), pictures.plain(range(len(files))).tobytes(), said))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_build_at_once(
    files: list[Path], tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:  # as on a disk without locks: both build, the first to rename wins
        monkeypatch.setitem(sys.modules, "fcntl", None)
    # fork: a fresh process would spend its time importing torch
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    if locks:
        workers = [
            context.Process(target=_build_in_process, args=(files, tmp_path / "c", start, results))
            for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        got = [results.get(timeout=60) for _ in workers]
        for worker in workers:
            worker.join()
    else:
        # Two builders in step in one process: each has written everything when it comes to renaming.
        cache = tmp_path / "c"
        real = module._install
        inner: list[Pictures] = []

        def install(temp: Path, final: Path) -> Any:
            if not inner:
                monkeypatch.setattr(module, "_install", real)
                inner.append(build(files, cache))
            return real(temp, final)

        monkeypatch.setattr(module, "_install", install)
        outer = build(files, cache)
        got = [(str(p.where), p.plain(range(12)).tobytes(), []) for p in (outer, *inner)]
    assert got[0][:2] == got[1][:2]
    check(build(files, tmp_path / "c"), files)
    left = [p.name for p in (tmp_path / "c" / "stores").iterdir() if p.suffix != ".lock"]
    assert left == [Path(got[0][0]).name]


def test_waits_for_the_other_builder(files: list[Path], tmp_path: Path) -> None:
    where = build(files, tmp_path / "c").where
    assert where is not None
    shutil.rmtree(where)
    lock = where.parent / f".{where.name}.lock"
    code = (
        "import fcntl, sys, time\n"
        f"f = open({str(lock)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(0.7)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    said: list[str] = []
    started = time.monotonic()
    check(build(files, tmp_path / "c", say=said.append), files)
    assert time.monotonic() - started > 0.3 and "waiting" in said[0]
    holder.wait()
    holder.stdout.close()


def test_what_killed_builders_left_is_swept_away(files: list[Path], tmp_path: Path) -> None:
    where = build(files, tmp_path / "c").where
    assert where is not None
    shutil.rmtree(where)
    mine, fresh, old = (where.parent / name for name in (f".{where.name}.1.ab", ".other.1.ab", ".older.1.ab"))
    for path in (mine, fresh, old):
        path.mkdir()
        (path / "plain.u8").write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    check(build(files, tmp_path / "c"), files)
    assert [path.exists() for path in (mine, fresh, old)] == [False, True, False]


def test_full_disk_falls_back_to_memory(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 5000

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

    def opened(self: Path, *args: Any, **more: Any) -> Any:
        file = real(self, *args, **more)
        return Full(file) if self.name == "large.u8" and args == ("wb",) else file

    monkeypatch.setattr(Path, "open", opened)
    said: list[str] = []
    pictures = build(files, tmp_path / "c", say=said.append)
    assert pictures.where is None
    assert "is full" in said[0] and "kept in memory" in said[0] and "HEADSTART_CACHE" in said[0]
    check(pictures, files)
    check(pickle.loads(pickle.dumps(pictures)), files)
    assert [p.name for p in (tmp_path / "c" / "stores").iterdir() if p.suffix != ".lock"] == []

    class Little:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(OutputError, match="of memory are free"):
        build(files, tmp_path / "c")


def test_cache_that_cannot_be_written(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    check(build(files, tmp_path / "file", say=said.append), files)
    assert "cannot be written" in said[0]


def test_pickled_store_maps_the_files(files: list[Path], tmp_path: Path) -> None:
    data = pickle.dumps(build(files, tmp_path / "c"))
    assert len(data) < 12_000
    check(pickle.loads(data), files)


def test_near_duplicates_are_facts(files: list[Path], tmp_path: Path) -> None:
    smooth = Image.fromarray(np.random.default_rng(5).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth.resize((90, 90), Image.Resampling.BICUBIC).save(files[0])
    Image.open(files[0]).resize((60, 60)).save(files[3])
    shutil.copy(files[3], files[4])
    first = build(files, tmp_path / "c")
    assert [sorted(pair) for pair in first.facts.near] == [[0, 3]]
    assert build(files, tmp_path / "c").facts.near == first.facts.near
    # The network's input size has no say in what is a duplicate.
    other = Pictures.build(files[0].parent, files, Preprocess(size=9), cache=tmp_path / "c")
    assert other.facts.near == first.facts.near


def test_store_of_another_format_is_rebuilt(files: list[Path], tmp_path: Path) -> None:
    where = build(files, tmp_path / "c").where
    assert where is not None
    meta = json.loads((where / "meta.json").read_text())
    (where / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    check(build(files, tmp_path / "c"), files)
    assert json.loads((where / "meta.json").read_text())["format"] == module.FORMAT
