"""Batches: a pure function of seed, epoch and picture; and all of a task's bad input."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headstart.data.loader import Task, Train, draw, load
from headstart.data.picture import Unreadable, open_picture
from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, DataError
from headstart.records import Run

PREPROCESS = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def paint(root: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("set"), {"a": 20, "b": 15, "ü c": 10})


@pytest.fixture
def task(root: Path) -> Task:
    return load(Run(data=str(root), seed=3), PREPROCESS)


def batches(train: Train, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    train.epoch = epoch
    return list(train)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(x, y, strict=True)
    )


def joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def test_task(task: Task, root: Path) -> None:
    assert task.classes == ["a", "b", "ü c"] and task.split_seed == 3
    assert task.counts["train"] == {"a": 12, "b": 9, "ü c": 6}
    assert len(task.fingerprint) == 64 and task.unreadable == {} and task.notes == []
    assert all(path.is_file() for path in task.paths("test")) and len(task.paths("val")) == 9
    other = load(Run(data=str(root), seed=4, split_seed=3), PREPROCESS)
    assert other.fingerprint == task.fingerprint
    assert load(Run(data=str(root), seed=4), PREPROCESS).fingerprint != task.fingerprint


def test_plain_is_what_prediction_sees(task: Task) -> None:
    for side in ("train", "val", "test"):
        loader = task.plain(side, 4)
        found = list(loader)
        assert len(found) == len(loader)
        x, y = joined(found)
        assert torch.equal(y, task.labels(side)) and y.dtype == torch.int64
        expected = torch.stack(
            [torch.from_numpy(PREPROCESS.plain(open_picture(p))) for p in task.paths(side)]
        )
        assert torch.equal(x, PREPROCESS.normalise(expected.permute(0, 3, 1, 2)))
        assert x.is_contiguous() and [task.classes[k] for k in y] == [p.parent.name for p in task.paths(side)]
    with pytest.raises(ConfigError, match="Did you mean 'test'"):
        task.plain("tets")


def test_an_epoch_holds_every_training_picture_once(task: Task) -> None:
    by_pixels = {x.numpy().tobytes() for x in joined(list(task.plain("train")))[0]}
    for size in (2, 5, 13, 26, 27, 100):
        found = batches(task.train(size, 0, "none"))
        assert {x.numpy().tobytes() for x in joined(found)[0]} == by_pixels
        assert sum(len(y) for _, y in found) == 27
        assert len(found) == len(task.train(size, 0))
        assert min(len(y) for _, y in found) >= 2  # 27 = 26 + 1 = 13 + 13 + 1
    assert [len(y) for _, y in batches(task.train(13, 0))] == [13, 14]
    assert [len(y) for _, y in batches(task.train(1, 0))] == [1] * 27


@pytest.mark.parametrize("kind", ["standard", "trivial"])
def test_pure_function_of_seed_epoch_and_picture(task: Task, kind: str) -> None:
    train = task.train(8, 1, kind)
    first, second = batches(train, 0), batches(train, 1)
    torch.manual_seed(123)
    np.random.seed(5)
    assert same(batches(train, 0), first) and same(batches(task.train(8, 1, kind), 1), second)
    assert not same(first, second) and not same(first, batches(task.train(8, 2, kind), 0))
    # Other batch sizes: the same pictures in the same order with the same augmentation.
    for size in (3, 27):
        for a, b in zip(joined(batches(task.train(size, 1, kind), 0)), joined(first), strict=True):
            assert torch.equal(a, b)


def test_the_global_random_state_is_left_alone(task: Task) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    for mixes in ({}, {"mixup": 0.4, "cutmix": 1.0}):
        torch.manual_seed(7)
        for _ in task.train(8, 1, "trivial", **mixes):
            pass
        list(task.plain("val"))
        assert torch.equal(torch.rand(3), expected)
    # And within an epoch: what a training step draws does not change the next batch, or the other way round.
    torch.manual_seed(7)
    drawn = []
    for _ in task.train(9, 1):
        drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)


@pytest.mark.parametrize("mixes", [{}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5}])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_same_batch(task: Task, world: int, mixes: dict[str, Any]) -> None:
    alone = batches(task.train(10, 1, **mixes), 2)
    shares = [batches(task.train(10, 1, rank=rank, world=world, **mixes), 2) for rank in range(world)]
    assert same([joined(list(parts)) for parts in zip(*shares, strict=True)], alone)
    assert min(len(y) for share in shares for _, y in share) >= 2


def test_mixup_and_cutmix_labels(task: Task) -> None:
    for mixes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        found = batches(task.train(9, 1, **mixes))
        for x, y in found:
            assert x.shape == (9, 3, 16, 16) and y.shape == (9, 3) and y.dtype == torch.float32
            assert torch.allclose(y.sum(1), torch.ones(9))
        assert any(((y > 0.01) & (y < 0.99)).any() for _, y in found)
        assert same(found, batches(task.train(9, 1, **mixes)))


def test_workers_give_the_same_batches_and_draw_nothing(task: Task) -> None:
    expected = [batches(task.train(10, 1), epoch) for epoch in range(2)]
    train = task.train(10, 1, workers=2)
    state = torch.get_rng_state()
    assert same(batches(train, 0), expected[0]) and same(batches(train, 1), expected[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stopped_epoch_does_not_spoil_the_next(task: Task) -> None:
    train = task.train(5, 1)
    expected = batches(train, 1)
    train.epoch = 0
    assert len(list(itertools.islice(train, 2))) == 2
    assert same(batches(train, 1), expected)


def test_the_folder_may_move_and_lose_its_order(task: Task, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "moved")
    moved = load(Run(data=str(tmp_path / "moved"), seed=3), PREPROCESS)
    assert moved.fingerprint == task.fingerprint
    assert same(batches(moved.train(8, 1)), batches(task.train(8, 1)))


def test_bad_arguments(task: Task) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'no-flip'"):
        task.train(8, 0, "noflip")
    with pytest.raises(ConfigError, match="cannot be divided over 4 processes"):
        task.train(2, 0, world=4)
    with pytest.raises(ConfigError, match="27 training pictures cannot be divided"):
        task.train(64, 0, world=64)


def test_class_weights(task: Task, tmp_path: Path) -> None:
    assert task.class_weights("none") is None
    auto = task.class_weights("auto")
    assert auto is not None and auto.dtype == torch.float32
    expected = torch.tensor([1 / 12, 1 / 9, 1 / 6])
    assert torch.allclose(auto, expected / expected.mean())
    (tmp_path / "w.json").write_text(json.dumps({"a": 2, "ü c": 4}))
    (tmp_path / "w.yaml").write_text("a: 2\nü c: 4\n")
    for name in ("w.json", "w.yaml"):
        given = task.class_weights(str(tmp_path / name))
        assert given is not None and torch.allclose(given, torch.tensor([2.0, 1.0, 4.0]) * 3 / 7)
    wrong = {
        "unknown.json": ('{"aa": 1}', "Did you mean 'a'"),
        "zero.json": ('{"a": 0}', "above 0"),
        "text.json": ('{"a": "x"}', "above 0"),
        "nan.json": ('{"a": NaN}', "above 0"),
        "list.json": ("[1]", "should hold class: weight"),
        "broken.json": ("{", "not valid JSON"),
        "broken.yaml": ("a: [", "not valid YAML"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            task.class_weights(str(tmp_path / name))
    with pytest.raises(ConfigError, match="Allowed: auto, none"):
        task.class_weights("balanced")


def test_broken_pictures(tmp_path: Path) -> None:
    root = paint(tmp_path / "set", {"a": 8, "b": 8})
    (root / "a" / "03.png").write_text("text")
    (root / "b" / "05.png").write_bytes(b"")
    said: list[str] = []
    task = load(Run(data=str(root)), PREPROCESS, say=said.append)
    assert task.unreadable == {"a/03.png": "is a text file, not a picture", "b/05.png": "is empty (0 bytes)"}
    assert any(note.startswith("2 of 16 pictures cannot be read") and "a/03.png" in note for note in said)
    assert sum(len(y) for _, y in task.train(4, 0)) == sum(task.counts["train"].values())
    assert root / "a" / "03.png" not in {p for side in ("train", "val", "test") for p in task.paths(side)}
    with pytest.raises(Unreadable, match=r"a/03\.png: is a text file"):
        load(Run(data=str(root), strict=True), PREPROCESS)
    for path in (root / "a").iterdir():
        path.write_text(f"text {path.name}")
    with pytest.raises(DataError, match="'a' has no picture that can be read"):
        load(Run(data=str(root)), PREPROCESS)


def test_given_split_of_a_csv(tmp_path: Path) -> None:
    root = paint(tmp_path / "set", {"a": 8, "b": 8})
    sides = "rrrrrvtt"
    full = {"r": "train", "v": "valid", "t": "test"}
    rows = [f"{c}/{i:02d}.png,{c},{full[sides[i]]}" for c in "ab" for i in range(8)]
    (root / "all.csv").write_text("image,label,part\n" + "\n".join(rows))
    task = load(Run(data=str(root / "all.csv"), split_col="part"), PREPROCESS)
    assert task.counts == {"train": {"a": 5, "b": 5}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 2}}
    assert {p.name for p in task.paths("test")} == {"06.png", "07.png"}


def test_draw() -> None:
    seeds = {draw(*numbers) for numbers in itertools.product(range(10), range(10), range(-3, 10))}
    assert len(seeds) == 1300 and all(0 <= seed < 2**63 for seed in seeds)
    assert draw(1, 2, 3) == draw(1, 2, 3) != draw(3, 2, 1)
