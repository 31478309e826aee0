"""What to know about a set of pictures before learning from it: plain data, and lines for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from headstart.data.facts import Facts, Progress, inspect
from headstart.data.folder import SPLITS, Table
from headstart.records import Record

_SHOWN = 5


class Audit(Record):
    """The findings; paths are relative to `root`.

    `duplicates` and `near_duplicates` are groups of paths. `crossing` are the groups whose pictures lie on
    more than one side of a split that was given, `contradicting` those with more than one label.
    """

    root: str
    pictures: int
    readable: int
    classes: dict[str, int] = Field(description="readable pictures per class")
    splits: dict[str, dict[str, int]] | None = Field(description="readable pictures per given side and class")
    imbalance: float | None = Field(description="largest class / smallest class; None: a class is empty")
    unreadable: dict[str, str] = Field(description="path: reason")
    remarks: dict[str, str] = Field(description="path: what is odd about a picture that is used all the same")
    duplicates: list[list[str]]
    near_duplicates: list[list[str]]
    crossing: list[list[str]]
    contradicting: list[list[str]]
    too_small: dict[str, int] = Field(
        description="classes of fewer than 3 different pictures: cannot be split"
    )
    small: dict[str, int] = Field(
        description="classes of fewer than 20 different pictures: scores will be rough"
    )
    smallest_side: int | None = Field(description="pixels of the shortest side of any picture")
    median_side: int | None = Field(description="median over pictures of the shorter side, in pixels")
    notes: list[str]

    @property
    def clean(self) -> bool:
        """Nothing was found that needs a decision."""
        return not (
            self.unreadable or self.duplicates or self.near_duplicates or self.contradicting or self.too_small
        )

    def lines(self) -> list[str]:
        """The findings in sentences, most important first."""
        least, most = min(self.classes.values()), max(self.classes.values())
        each = f"{least} to {most}" if least < most else f"{most}"
        lines = [f"{self.readable} pictures of {len(self.classes)} classes in {self.root}, {each} per class."]
        if self.splits is not None:
            sides = ", ".join(f"{sum(counts.values())} {side}" for side, counts in self.splits.items())
            lines.append(f"Given split: {sides}.")
        if self.too_small:
            lines.append(
                "Too small to be split (3 different pictures are needed): "
                f"{_some([f'{name} ({count})' for name, count in self.too_small.items()])}."
            )
        elif self.small:
            lines.append(
                "Few different pictures, so their scores will be rough: "
                f"{_some([f'{name} ({count})' for name, count in self.small.items()])}."
            )
        if self.imbalance is not None and self.imbalance >= 3:
            lines.append(
                f"The largest class has {self.imbalance:.1f} times the pictures of the smallest: "
                "look at balanced accuracy, and try --class-weights auto."
            )
        if self.unreadable:
            listed = [f"{path}: {reason}" for path, reason in self.unreadable.items()]
            lines.append(
                f"{_n(len(listed), 'file')} cannot be read and will be skipped: {_some(listed, '; ')}."
            )
        if self.contradicting:
            lines.append(
                f"{_n(len(self.contradicting), 'group')} of (nearly) equal pictures with different labels: "
                f"{_groups(self.contradicting)}. One of the labels is wrong."
            )
        if self.crossing:
            lines.append(
                f"{_n(len(self.crossing), 'group')} of (nearly) equal pictures across the given split: "
                f"{_groups(self.crossing)}. Training will leave out the copies of held-out pictures."
            )
        if self.duplicates:
            lines.append(
                f"{_n(len(self.duplicates), 'group')} of exact copies "
                f"({sum(map(len, self.duplicates))} files): {_groups(self.duplicates)}. "
                "They will stay on one side of the split."
            )
        if self.near_duplicates:
            lines.append(
                f"{_n(len(self.near_duplicates), 'group')} of nearly equal pictures: "
                f"{_groups(self.near_duplicates)}. They will stay on one side of the split."
            )
        if self.remarks:
            listed = [f"{path}: {remark}" for path, remark in self.remarks.items()]
            lines.append(
                f"{_n(len(listed), 'picture')} with odd metadata, used all the same: {_some(listed, '; ')}."
            )
        if self.clean:
            lines.append("No unreadable files, no duplicates.")
        return lines + self.notes


def _n(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _some(items: Sequence[str], between: str = ", ") -> str:
    shown = between.join(items[:_SHOWN])
    return f"{shown}{between}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown


def _groups(groups: list[list[str]]) -> str:
    return _some([" = ".join(group[:3]) + (" = ..." if len(group) > 3 else "") for group in groups], "; ")


def audit(
    table: Table,
    facts: Facts | None = None,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Look at every picture.

    Args:
        table: the pictures, as `scan` found them.
        facts: what is known of them already (`Pictures.facts`); None: every file is opened.
        cache: folder of the cache; None: the usual one.
        progress: called with (done, all) while files are opened.
    """
    if facts is None:
        facts = inspect(table.root, table.paths, cache=cache, progress=progress)
    names = [table.relative(i) for i in range(len(table))]
    copies: defaultdict[str, list[int]] = defaultdict(list)
    for i, sha in enumerate(facts.hashes):
        if sha is not None:
            copies[sha].append(i)
    exact = [group for group in copies.values() if len(group) > 1]
    near = _near(facts, copies)
    alike = near + [group for group in exact if not any(set(group) <= set(wide) for wide in near)]

    def different(group: list[int], values: Sequence[Any]) -> bool:
        return len({values[i] for i in group}) > 1

    counts = Counter(table.labels[i] for i, sha in enumerate(facts.hashes) if sha is not None)
    unlike = Counter(table.labels[group[0]] for group in copies.values())
    classes = {name: counts[k] for k, name in enumerate(table.classes)}
    apart = {name: unlike[k] for k, name in enumerate(table.classes)}
    shorter = sorted(min(size) for size in facts.sizes.values())
    least = min(classes.values())
    return Audit(
        root=str(table.root),
        pictures=len(table),
        readable=sum(classes.values()),
        classes=classes,
        splits=_sides(table, facts),
        imbalance=max(classes.values()) / least if least else None,
        unreadable={names[i]: reason for i, reason in sorted(facts.errors.items())},
        remarks={names[i]: note for i, note in sorted(facts.notes.items())},
        duplicates=[[names[i] for i in group] for group in exact],
        near_duplicates=[[names[i] for i in group] for group in near],
        crossing=[
            [names[i] for i in group]
            for group in alike
            if table.split is not None and different(group, table.split)
        ],
        contradicting=[[names[i] for i in group] for group in alike if different(group, table.labels)],
        too_small={name: n for name, n in apart.items() if n < 3},
        small={name: n for name, n in apart.items() if 3 <= n < 20},
        smallest_side=shorter[0] if shorter else None,
        median_side=shorter[len(shorter) // 2] if shorter else None,
        notes=list(table.notes),
    )


def _near(facts: Facts, copies: dict[str, list[int]]) -> list[list[int]]:
    """Groups of near duplicates, exact copies of their members included, sorted."""
    above: dict[int, int] = {}

    def top(i: int) -> int:
        while above.setdefault(i, i) != i:
            i = above[i]
        return i

    for i, j in facts.near:
        above[max(top(i), top(j))] = min(top(i), top(j))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i in sorted(above):
        groups[top(i)].extend(copies[str(facts.hashes[i])])
    return [sorted(group) for _, group in sorted(groups.items())]


def _sides(table: Table, facts: Facts) -> dict[str, dict[str, int]] | None:
    if table.split is None:
        return None
    counted = {side: dict.fromkeys(table.classes, 0) for side in SPLITS if side in table.split}
    for side, label, sha in zip(table.split, table.labels, facts.hashes, strict=True):
        if side is not None and sha is not None:
            counted[side][table.classes[label]] += 1
    return counted
