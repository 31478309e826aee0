"""The split: stratified, seeded, and nothing that belongs together torn apart."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from headstart.data.folder import Table
from headstart.data.splits import Split, fewer, split
from headstart.errors import DataError, OutputError


def table(
    counts: dict[str, int], *, root: str = "data", groups: list[str] | None = None, sides: str | None = None
) -> tuple[Table, list[str | None]]:
    classes = sorted(counts)
    names = [(name, i) for name in classes for i in range(counts[name])]
    made = Table(
        Path(root),
        [Path(root) / name / f"{i:04d}.png" for name, i in names],
        [classes.index(name) for name, _ in names],
        classes,
        split=None if sides is None else [{"r": "train", "v": "val", "t": "test"}[s] for s in sides],
        groups=groups,
    )
    return made, [f"{name}-{i}" for name, i in names]


def test_shares_per_class() -> None:
    made = split(*table({"a": 100, "b": 10, "c": 5, "d": 3}), seed=0)
    assert made.counts() == {
        "train": {"a": 60, "b": 6, "c": 3, "d": 1},
        "val": {"a": 20, "b": 2, "c": 1, "d": 1},
        "test": {"a": 20, "b": 2, "c": 1, "d": 1},
    }
    assert made.notes == []
    skewed = split(*table({"a": 10, "b": 10}), shares=(0.9, 0.05, 0.05), seed=0).counts()
    assert skewed["val"] == skewed["test"] == {"a": 1, "b": 1}


def test_seed_decides_and_nothing_else() -> None:
    pictures, hashes = table({"a": 40, "b": 30})
    first = split(pictures, hashes, seed=3)
    assert split(pictures, hashes, seed=3).sides == first.sides
    assert split(pictures, hashes, seed=4).sides != first.sides
    # Other names, another order, another place: the same contents on the same sides.
    order = list(range(70))
    random.Random(0).shuffle(order)
    moved = Table(
        Path("/else/where"),
        [Path("/else/where") / f"{k}.png" for k in range(70)],
        [pictures.labels[i] for i in order],
        pictures.classes,
    )
    again = split(moved, [hashes[i] for i in order], seed=3)
    assert [again.sides[k] for k in range(70)] == [first.sides[i] for i in order]
    assert again.fingerprint == first.fingerprint
    assert split(pictures, hashes, seed=4).fingerprint != first.fingerprint


def together(made: Split, keys: list[str]) -> bool:
    return all(
        len({side for side, k in zip(made.sides, keys, strict=True) if k == key}) == 1 for key in set(keys)
    )


def test_copies_groups_and_near_copies_stay_together() -> None:
    pictures, hashes = table({"a": 60, "b": 60})
    copies = [f"content-{i // 3}" for i in range(120)]
    for seed in range(5):
        made = split(pictures, list(copies), seed=seed)
        assert together(made, copies)
        assert abs(made.counts()["train"]["a"] - 36) <= 3
        near = [(i, i + 1) for i in range(0, 120, 2)]
        assert together(split(pictures, hashes, seed=seed, near=near), [str(i // 2) for i in range(120)])
        groups = [f"patient {i % 12}" for i in range(120)]  # every group has both classes
        grouped, hashes = table({"a": 60, "b": 60}, groups=groups)
        made = split(grouped, hashes, seed=seed)
        assert together(made, groups)
        assert all(min(made.counts()[side].values()) > 0 for side in ("train", "val", "test"))


def test_one_large_group_starves_no_side() -> None:
    groups = ["big"] * 17 + ["x", "y", "z"] + [f"b{i}" for i in range(20)]
    made, hashes = table({"a": 20, "b": 20}, groups=groups)
    for seed in range(5):
        counts = split(made, hashes, seed=seed).counts()
        assert all(counts[side]["a"] >= 1 for side in counts), counts


def test_classes_too_small() -> None:
    with pytest.raises(DataError, match=r"'b' has one picture only.*Add pictures"):
        split(*table({"a": 9, "b": 1}), seed=0)
    made = split(*table({"a": 9, "b": 2}), seed=0)
    assert [made.counts()[side]["b"] for side in ("train", "val", "test")] == [1, 0, 1]
    assert any("val has no pictures of b" in note for note in made.notes)
    pictures, hashes = table({"a": 9, "b": 4})
    with pytest.raises(DataError, match="All 4 pictures of the class 'b' are copies"):
        split(pictures, [*hashes[:9], "x", "x", "x", "x"], seed=0)
    with pytest.raises(DataError, match="'b' has no picture that can be read"):
        split(pictures, [*hashes[:9], None, None, None, None], seed=0)
    with pytest.raises(DataError, match="for val"):
        split(*table({"a": 2, "b": 2}), seed=0)


def test_near_copies_yield_where_a_class_would_be_lost() -> None:
    pictures, hashes = table({"a": 9, "b": 5})
    chain = [(9, 10), (10, 11), (11, 12), (12, 13)]
    made = split(pictures, hashes, seed=0, near=[*chain, (0, 1)])
    assert all(made.counts()[side]["b"] >= 1 for side in ("train", "val", "test"))
    assert made.sides[0] == made.sides[1]
    assert any("'b' look alike" in note for note in made.notes)


def test_unreadable_pictures_are_left_out() -> None:
    pictures, hashes = table({"a": 9, "b": 9})
    hashes[4] = None
    made = split(pictures, hashes, seed=0)
    assert made.sides[4] is None and sum(side is None for side in made.sides) == 1


def test_given_splits_are_kept_and_copies_of_held_out_pictures_are_not_learned() -> None:
    sides = ("rrrrrrvvtt") * 2
    pictures, hashes = table({"a": 10, "b": 10}, sides=sides)
    made = split(pictures, hashes, seed=0)
    assert made.sides == pictures.split and made.notes == []
    hashes[0] = hashes[8]  # train = test
    hashes[6] = hashes[9]  # val = test
    made = split(pictures, hashes, seed=0, near=[(1, 7)])  # train ~ val
    assert [made.sides[i] for i in (0, 6, 8, 9, 1, 7)] == [None, None, "test", "test", None, "val"]
    assert any(note.startswith("2 train pictures are left out") for note in made.notes)
    assert any(note.startswith("1 val pictures are left out") for note in made.notes)
    for i in range(6):
        hashes[i] = hashes[8]
    with pytest.raises(DataError, match="All training pictures of 'a' are copies"):
        split(pictures, hashes, seed=0)


@pytest.mark.parametrize(
    ("sides", "expected", "said"),
    [
        ("r" * 6 + "v" * 2, {"train": 4, "val": 2, "test": 2}, "No test pictures were given: of 12"),
        ("r" * 6 + "t" * 2, {"train": 4, "val": 2, "test": 2}, "No val pictures were given"),
        ("r" * 10, {"train": 6, "val": 2, "test": 2}, "No val and no test pictures were given"),
    ],
)
def test_what_a_given_split_lacks_is_carved_and_said(sides: str, expected: dict[str, int], said: str) -> None:
    pictures, hashes = table({"a": len(sides), "b": len(sides)}, sides=sides * 2)
    made = split(pictures, hashes, seed=0)
    assert {side: counts["a"] for side, counts in made.counts().items()} == expected
    assert all(
        now == before
        for now, before in zip(made.sides, pictures.split or [], strict=True)
        if before != "train"
    )
    assert said in made.notes[0]


def test_written_and_read_back(tmp_path: Path) -> None:
    pictures, hashes = table({"a": 9, "b, with comma": 9})
    hashes[2] = None
    made = split(pictures, hashes, seed=0)
    made.write(tmp_path / "split.csv")
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "path,label,split,sha256" and len(lines) == 18
    assert lines[1].startswith("a/0000.png,a,")
    back = Split.read(tmp_path / "split.csv", pictures)
    assert back.sides == made.sides and back.hashes == made.hashes
    assert back.fingerprint == made.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["split.csv"]
    other, _ = table({"a": 3, "b, with comma": 9})
    with pytest.raises(DataError, match="not among the pictures any more"):
        Split.read(tmp_path / "split.csv", other)
    with pytest.raises(OutputError, match="could not be written"):
        made.write(tmp_path / "gone" / "split.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="could not be written"):
        made.write(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "split.csv"]  # no half of one is left
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is not a split"):
        Split.read(tmp_path / "x.csv", pictures)
    with pytest.raises(DataError, match="cannot be read"):
        Split.read(tmp_path / "y.csv", pictures)


def test_large_and_uneven() -> None:
    counts = {f"c{k}": 3 + 7 * k for k in range(30)}
    made = split(*table(counts), seed=1)
    total = Counter(made.sides)
    n = sum(counts.values())
    assert abs(total["train"] / n - 0.6) < 0.02 and abs(total["test"] / n - 0.2) < 0.02


def test_fewer_pictures_are_nested_stratified_and_touch_nothing_else() -> None:
    made, hashes = table({"a": 100, "b": 50, "c": 10})
    whole = split(made, hashes, seed=3)
    before: set[int] = set()
    for size in (3, 16, 48, 95, 96):
        part = fewer(whole, size)
        train = set(part.index("train"))
        assert len(train) == size
        assert before <= train <= set(whole.index("train"))
        assert (part.index("val"), part.index("test")) == (whole.index("val"), whole.index("test"))
        counted = Counter(made.labels[i] for i in train)
        for label, n in enumerate((60, 30, 6)):
            assert counted[label] >= 1
            assert abs(counted[label] - size * n / 96) <= 1.01
        before = train
    assert fewer(whole, 96).fingerprint == whole.fingerprint
    assert fewer(whole, 48).fingerprint != whole.fingerprint


def test_which_pictures_are_kept_depends_on_their_contents_alone() -> None:
    made, hashes = table({"a": 40, "b": 40})
    kept = {hashes[i] for i in fewer(split(made, hashes, seed=1), 20).index("train")}
    order = random.Random(0).sample(range(80), 80)
    shuffled = Table(
        made.root, [made.paths[i] for i in order], [made.labels[i] for i in order], made.classes, None, None
    )
    again = fewer(split(shuffled, [hashes[i] for i in order], seed=1), 20)
    assert {again.hashes[i] for i in again.index("train")} == kept


@pytest.mark.parametrize(("size", "message"), [(97, "there are 96 training"), (2, "Ask for 3 or more")])
def test_sizes_that_cannot_be_had(size: int, message: str) -> None:
    whole = split(*table({"a": 100, "b": 50, "c": 10}), seed=0)
    with pytest.raises(DataError, match=message):
        fewer(whole, size)
