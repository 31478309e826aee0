"""Train, val and test: stratified, seeded, and nothing that belongs together torn apart.

The split depends on the content of the pictures, their labels and groups, the shares and the seed; not on
file names, on the order of files, or on where the folder lies.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headstart.data.duplicates import components
from headstart.data.folder import SPLITS, Table
from headstart.disk import whole
from headstart.errors import DataError

_COLUMNS = ("path", "label", "split", "sha256")


@dataclass(frozen=True)
class Split:
    """Which picture is on which side.

    Attributes:
        table: the pictures.
        hashes: [N] SHA-256 of each file's content; None: unreadable.
        sides: [N] 'train', 'val', 'test'; None: left out (unreadable, or a copy of a held-out picture).
        notes: what people should know about how it was made.
    """

    table: Table
    hashes: list[str | None]
    sides: list[str | None]
    notes: list[str] = field(default_factory=list)

    def index(self, side: str) -> list[int]:
        """Indices into the table of one side, ascending."""
        return [i for i, here in enumerate(self.sides) if here == side]

    def counts(self) -> dict[str, dict[str, int]]:
        """Pictures per side and class name: {'train': {'cat': 12, ...}, ...}."""
        counted = {side: dict.fromkeys(self.table.classes, 0) for side in SPLITS}
        for label, side in zip(self.table.labels, self.sides, strict=True):
            if side is not None:
                counted[side][self.table.classes[label]] += 1
        return counted

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (content hash, class name, side): equal data give equal text."""
        digest = hashlib.sha256()
        for line in sorted(
            f"{sha}\t{self.table.classes[label]}\t{side}\n"
            for sha, label, side in zip(self.hashes, self.table.labels, self.sides, strict=True)
            if side is not None
        ):
            digest.update(line.encode())
        return digest.hexdigest()

    def write(self, path: str | Path) -> None:
        """Write `split.csv`: relative path, label, split, content hash, one row per picture in use.

        Raises:
            OutputError: the file cannot be written.
        """
        # File names that are no UTF-8 are written as they are.
        with (
            whole(Path(path)) as fresh,
            fresh.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for i, side in enumerate(self.sides):
                if side is not None:
                    label = self.table.classes[self.table.labels[i]]
                    writer.writerow((self.table.relative(i), label, side, self.hashes[i]))

    @classmethod
    def read(cls, path: str | Path, table: Table) -> Split:
        """Read `split.csv` back onto the same pictures.

        Raises:
            DataError: a file that is no split, or a picture whose path or label is not in the table.
        """
        where = {table.relative(i): i for i in range(len(table))}
        hashes: list[str | None] = [None] * len(table)
        sides: list[str | None] = [None] * len(table)
        try:
            with Path(path).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != _COLUMNS:
                    raise DataError(f"{path} is not a split: its columns should be {', '.join(_COLUMNS)}.")
                for row in reader:
                    i = where.get(row["path"])
                    if i is None:
                        raise DataError(
                            f"{path} names {row['path']}, which is not among the pictures any more."
                        )
                    label = table.classes[table.labels[i]]
                    if row["label"] != label or row["split"] not in SPLITS:
                        raise DataError(
                            f"{path} says {row['label']}, {row['split']} for {row['path']}, "
                            f"but the picture's label is {label}."
                        )
                    hashes[i], sides[i] = row["sha256"], row["split"]
        except OSError as error:
            raise DataError(f"The split {path} cannot be read: {error.strerror or error}.") from None
        return cls(table, hashes, sides)


def split(
    table: Table,
    hashes: Sequence[str | None],
    *,
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int,
    near: Iterable[tuple[int, int]] = (),
) -> Split:
    """Divide pictures into train, val and test.

    What belongs together stays on one side: exact copies, near copies, pictures of one group. Each class is
    divided by the shares on its own, with at least one picture on each side where it has three or more that
    do not belong together; a class of two is trained on one and tested on the other, and val lacks it.

    A split that was given is kept. What it lacks is carved out of its training pictures (test where only
    train and val were given, val where only train and test, both where only train), and training pictures
    that are copies of held-out ones are left out.

    Args:
        table: the pictures.
        hashes: [N] content hashes; None: unreadable, left out.
        shares: of train, val and test; above 0, adding up to 1.
        seed: of the random order.
        near: pairs of indices of near duplicates.

    Raises:
        DataError: a class that cannot be both learned and tested, and what to do.
    """
    notes: list[str] = []
    units = _Units(table, hashes, list(near), notes)
    sides: list[str | None] = [None] * len(table)
    if table.split is None:
        units.at_least_two()
        units.place(range(len(units.members)), dict(zip(SPLITS, shares, strict=True)), seed, sides)
    else:
        sides = [side if sha is not None else None for side, sha in zip(table.split, hashes, strict=True)]
        units.uncross(sides)
        _carve(units, sides, shares, seed)
    result = Split(table, list(hashes), sides, notes)
    _every_class(result)
    return result


def joined(whole: Split) -> Split:
    """A split whose val pictures are training pictures; test stays as it is.

    Args:
        whole: the split.
    """
    sides = ["train" if side == "val" else side for side in whole.sides]
    return Split(whole.table, whole.hashes, sides, whole.notes)


def fewer(whole: Split, size: int) -> Split:
    """A split with so many of its training pictures; val and test stay as they are.

    Stratified, and nested: the pictures of a smaller size are among those of every larger one. Each class
    keeps one at least. Which they are depends on the contents and labels alone, so that equal splits give
    equal parts.

    Args:
        whole: the split.
        size: how many training pictures.

    Raises:
        DataError: more than there are, or fewer than there are classes.
    """
    train = whole.index("train")
    of_class: dict[int, list[int]] = defaultdict(list)
    drawn = {i: hashlib.sha256(f"fewer:{whole.hashes[i]}".encode()).digest() for i in train}
    for i in sorted(train, key=lambda i: drawn[i]):
        of_class[whole.table.labels[i]].append(i)
    if size > len(train):
        raise DataError(f"train_size is {size}, and there are {len(train)} training pictures. Ask for fewer.")
    if size < len(of_class):
        raise DataError(
            f"train_size is {size}, and each of the {len(of_class)} classes needs a picture to learn from. "
            f"Ask for {len(of_class)} or more."
        )
    # The k-th of the n pictures of a class stands at (k + 1/2)/n: any number of first ones is stratified.
    place = {
        i: (k > 0, (k + 0.5) / len(members), label)
        for label, members in of_class.items()
        for k, i in enumerate(members)
    }
    kept = set(sorted(train, key=lambda i: place[i])[:size])
    sides = [None if side == "train" and i not in kept else side for i, side in enumerate(whole.sides)]
    return Split(whole.table, whole.hashes, sides, whole.notes)


class _Units:
    """Pictures that belong together, placed as one."""

    def __init__(
        self, table: Table, hashes: Sequence[str | None], near: list[tuple[int, int]], notes: list[str]
    ) -> None:
        self.table, self.hashes, self.notes = table, hashes, notes
        links: list[tuple[int, int]] = []
        first: dict[str, int] = {}
        for i, sha in enumerate(hashes):
            if sha is None:
                continue
            for key in (sha, *(["group\0" + table.groups[i]] if table.groups is not None else [])):
                links.append((first.setdefault(key, i), i))
        sure = self._members(links)
        near = [(i, j) for i, j in near if hashes[i] is not None and hashes[j] is not None]
        joined = self._members(links + near)
        # Near copies are a judgement: where it would leave a class untestable, it yields.
        before, after = self._per_class(sure), self._per_class(joined)
        yielding = {label for label, count in after.items() if count < min(3, before[label])}
        if yielding:
            near = [
                (i, j) for i, j in near if table.labels[i] not in yielding and table.labels[j] not in yielding
            ]
            joined = self._members(links + near)
            notes.append(
                f"Nearly all pictures of {self._names(yielding)} look alike; near duplicates among them were "
                "not kept on one side."
            )
        self.members = joined
        self.keys = [min(str(hashes[i]) for i in unit) for unit in joined]

    def _members(self, links: list[tuple[int, int]]) -> list[list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for i, number in enumerate(components(len(self.hashes), links)):
            if self.hashes[i] is not None:
                found[number].append(i)
        return list(found.values())

    def _labels(self, unit: Iterable[int]) -> Counter[int]:
        return Counter(self.table.labels[i] for i in unit)

    def _per_class(self, members: list[list[int]]) -> Counter[int]:
        return Counter(label for unit in members for label in self._labels(unit))

    def _names(self, labels: Iterable[int]) -> str:
        return ", ".join(f"'{self.table.classes[label]}'" for label in sorted(labels))

    def at_least_two(self) -> None:
        """A class needs something to learn from and something to test on."""
        per_class = self._per_class(self.members)
        pictures = Counter(self.table.labels[i] for i, sha in enumerate(self.hashes) if sha is not None)
        for label, name in enumerate(self.table.classes):
            if per_class[label] >= 2:
                continue
            if pictures[label] == 0:
                raise DataError(
                    f"The class '{name}' has no picture that can be read. Add some, or remove it."
                )
            if pictures[label] == 1:
                raise DataError(
                    f"The class '{name}' has one picture only: it cannot be both learned and tested. "
                    "Add pictures to it (five or more), or remove its folder."
                )
            raise DataError(
                f"All {pictures[label]} pictures of the class '{name}' are copies of each other or of one "
                "group: they have to stay on one side, so the class cannot be both learned and tested. "
                "Add other pictures to it, or remove it."
            )

    def place(
        self, which: Iterable[int], shares: dict[str, float], seed: int, sides: list[str | None]
    ) -> None:
        """Put units on sides so that each class comes as near to the shares as can be."""
        units = sorted(which, key=lambda u: (-len(self.members[u]), self._draw(seed, u)))
        labels = {u: self._labels(self.members[u]) for u in units}
        total: Counter[int] = Counter()
        count: Counter[int] = Counter()
        for u in units:
            total.update(labels[u])
            count.update(labels[u].keys())
        wanted = {label: _targets(total[label], count[label], shares) for label in total}
        have: dict[int, Counter[str]] = {label: Counter() for label in total}
        where: dict[int, str] = {}
        for u in units:

            def lack(side: str, u: int = u) -> float:
                """How much of what this side still wants the unit would fill."""
                return sum(
                    n * (wanted[label][side] - have[label][side]) / max(wanted[label][side], 0.5)
                    for label, n in labels[u].items()
                )

            best = max(shares, key=lack)
            where[u] = best
            for label, n in labels[u].items():
                have[label][best] += n
        self._repair(units, labels, wanted, where)
        for u, side in where.items():
            for i in self.members[u]:
                sides[i] = side

    @staticmethod
    def _repair(
        units: list[int],
        labels: dict[int, Counter[int]],
        wanted: dict[int, dict[str, int]],
        where: dict[int, str],
    ) -> None:
        """Large units can starve a side of a class; give it the smallest one from a side with several."""
        for label in sorted(wanted):
            for side in ("train", "test", "val"):
                mine = [u for u in units if label in labels[u]]
                if not wanted[label].get(side) or any(where[u] == side for u in mine):
                    continue
                per_side = Counter(where[u] for u in mine)
                spare = [u for u in mine if per_side[where[u]] > 1]
                if spare:
                    # Units are sorted by size: the last one moves least.
                    alone = [u for u in spare if len(labels[u]) == 1] or spare
                    where[alone[-1]] = side

    def _draw(self, seed: int, unit: int) -> bytes:
        return hashlib.sha256(f"{seed}:{self.keys[unit]}".encode()).digest()

    def uncross(self, sides: list[str | None]) -> None:
        """Leave out training (then val) pictures that are copies of held-out ones."""
        dropped: Counter[str] = Counter()
        kept = list(sides)
        for unit in self.members:
            here = {sides[i] for i in unit} - {None}
            if len(here) < 2:
                continue
            strongest = "test" if "test" in here else "val"
            for i in unit:
                if kept[i] not in (None, strongest):
                    dropped[str(kept[i])] += 1
                    kept[i] = None
        lost = {
            label
            for label in range(len(self.table.classes))
            if any(s == "train" and y == label for s, y in zip(sides, self.table.labels, strict=True))
            and not any(s == "train" and y == label for s, y in zip(kept, self.table.labels, strict=True))
        }
        if lost:
            raise DataError(
                f"All training pictures of {self._names(lost)} are copies (or of the groups) of pictures in "
                "val or test. Learning from them would make the scores worthless: add other pictures."
            )
        sides[:] = kept
        for side, count in sorted(dropped.items()):
            self.notes.append(
                f"{count} {side} pictures are left out: they are copies, near copies or of the groups of "
                "pictures that are held out."
            )


def _targets(total: int, units: int, shares: dict[str, float]) -> dict[str, int]:
    """How many of `total` pictures each side should have: rounded, at least one where units allow it."""
    # With two units val goes without; with one, everything but train does.
    preferred: tuple[str, ...] = ("train", "test", "val")
    order = [side for side in preferred if side in shares][: max(units, 1)]
    whole = sum(shares[side] for side in order)
    exact = {side: total * shares[side] / whole for side in order}
    wanted = {side: max(1, int(exact[side])) for side in order}
    while sum(wanted.values()) < total:
        wanted[max(order, key=lambda side: exact[side] - wanted[side])] += 1
    while sum(wanted.values()) > total:
        wanted[max(order, key=lambda side: (wanted[side] > 1, wanted[side] - exact[side]))] -= 1
    return {side: wanted.get(side, 0) for side in shares}


def _carve(units: _Units, sides: list[str | None], shares: tuple[float, float, float], seed: int) -> None:
    """Make the sides that were not given out of the training pictures."""
    share = dict(zip(SPLITS, shares, strict=True))
    lacking = [side for side in ("val", "test") if side not in sides]
    if not lacking:
        return
    if "test" in lacking:
        units.at_least_two()
    before = sides.count("train")
    which = [u for u, unit in enumerate(units.members) if any(sides[i] == "train" for i in unit)]
    left_out = {i for i, side in enumerate(sides) if side is None}
    units.place(
        which, {side: share[side] for side in SPLITS if side == "train" or side in lacking}, seed, sides
    )
    for i in left_out:
        sides[i] = None
    made = " and ".join(f"{sides.count(side)} for {side}" for side in lacking)
    units.notes.append(
        f"No {' and no '.join(lacking)} pictures were given: of {before} training pictures, "
        f"{made} were set aside."
    )


def _every_class(result: Split) -> None:
    """No class may be lost on the way to a side that needs it."""
    counts = result.counts()
    for side in ("train", "test"):
        if lost := [name for name, count in counts[side].items() if count == 0]:
            raise DataError(
                f"No readable {side} picture is left of {', '.join(repr(name) for name in lost[:5])}. "
                "Add pictures, or remove the class."
            )
    lacking = [name for name, count in counts["val"].items() if count == 0]
    if len(lacking) == len(counts["val"]):
        raise DataError("No picture is left for val: every class has two pictures only. Add pictures.")
    if lacking:
        result.notes.append(f"val has no pictures of {', '.join(lacking[:5])}: too few pictures.")
