"""What lies on the disk, as a table: pictures, labels, and what was given beside them."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headstart.data.picture import EXTENSIONS
from headstart.errors import DataError, nearest, unknown

SPLITS = ("train", "val", "test")
"""The three sides of a split, in their usual order."""

_SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_IMAGE_NAMES = ("image", "path", "file", "file_name", "filename", "image_path", "img", "filepath", "picture")
_LABEL_NAMES = ("label", "class", "category", "target", "labels", "class_name", "species", "y")
_SPLIT_COLUMNS = ("split", "set", "subset", "side", "partition", "fold")
_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


@dataclass(frozen=True)
class Table:
    """Pictures and labels as they were found; nothing has been opened yet.

    Attributes:
        root: the folder that relative paths are relative to.
        paths: [N] the files, sorted by their relative path.
        labels: [N] indices into `classes`.
        classes: the sorted names of the classes.
        split: [N] 'train', 'val' or 'test' where the user gave a split; None where he gave none.
        groups: [N] pictures of one group have to stay on one side; None: no groups.
        notes: what people should know (folders without pictures, files with other endings).
    """

    root: Path
    paths: list[Path]
    labels: list[int]
    classes: list[str]
    split: list[str | None] | None = None
    groups: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def relative(self, index: int) -> str:
        """The path of one picture relative to the root, with forward slashes."""
        path = self.paths[index]
        try:
            return path.relative_to(self.root).as_posix()
        except ValueError:
            return Path(os.path.relpath(path, self.root)).as_posix()


def scan(
    data: str | Path,
    *,
    image_col: str | None = None,
    label_col: str | None = None,
    split_col: str | None = None,
    group_col: str | None = None,
) -> Table:
    """Find pictures and labels.

    Args:
        data: `DIR` with one folder per class, `DIR` with train, val (or validation, valid) and test, each
            with one folder per class, or a CSV file whose paths are relative to its own folder.
        image_col: CSV: the column with the path; None: the first of the usual names.
        label_col: CSV: the column with the label; None: the first of the usual names.
        split_col: CSV: the column that says train, val or test; None: no split is given.
        group_col: CSV: the column whose equal values stay on one side; None: no groups.

    Raises:
        DataError: with what was found and what was expected.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        given = {
            "image_col": image_col,
            "label_col": label_col,
            "split_col": split_col,
            "group_col": group_col,
        }
        for name, value in given.items():
            if value is not None:
                raise DataError(f"{name} names a column of a CSV file, but {path} is a folder.")
        return _folder(path)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _csv(path, image_col, label_col, split_col, group_col)
    raise DataError(
        f"{path} is neither a folder nor a CSV file. Give a folder with one folder of pictures per class, "
        "or a CSV file with a column of paths and one of labels."
    )


def _missing(path: Path) -> str:
    """The sentence for a path that does not exist, with the nearest name that does."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = [entry.name for entry in os.scandir(parent)] if parent.is_dir() else []
    guess = nearest(path.name, names)
    if guess is not None:
        return f"{path} does not exist. Did you mean {parent / guess}?"
    return f"{path} does not exist. In {parent}: {_some(sorted(names)) or 'nothing'}."


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


# -- folders ---------------------------------------------------------------------------------------------


@dataclass
class _Level:
    """One folder: its visible sub-folders and the pictures directly in it."""

    folders: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def _look(folder: Path) -> _Level:
    """List one folder, hidden entries left out."""
    level = _Level()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        raise DataError(
            f"No permission to read the folder {folder}. Give yourself the right to read it, or move it away."
        ) from None
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be read: {error.strerror or error}.") from None
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _JUNK:
            continue
        path = folder / entry.name
        if entry.is_dir():
            level.folders.append(path)
        elif path.suffix.lower() in EXTENSIONS:
            level.pictures.append(path)
        else:
            level.others[path.suffix.lower() or "no ending"] += 1
    return level


def _pictures(folder: Path, others: Counter[str], above: frozenset[str] = frozenset()) -> list[Path]:
    """All pictures in a folder and below; a link that leads back up is not followed again."""
    real = os.path.realpath(folder)
    if real in above:
        return []
    level = _look(folder)
    others.update(level.others)
    found = list(level.pictures)
    for sub in level.folders:
        found.extend(_pictures(sub, others, above | {real}))
    return found


def _folder(root: Path) -> Table:
    others: Counter[str] = Counter()
    top = _look(root)
    sides = _sides(root, top)
    notes: list[str] = []
    rows: list[tuple[Path, str, str | None]] = []
    if sides is None:
        for folder in top.folders:
            found = _pictures(folder, others)
            if not found:
                notes.append(f"The folder {folder.name} holds no pictures and is left out.")
            rows.extend((path, folder.name, None) for path in found)
        if rows and top.pictures:
            raise DataError(
                f"{len(top.pictures)} pictures lie directly in {root}, beside the folders of the classes: "
                f"{_some([path.name for path in top.pictures])}. Move them into the folder of their class."
            )
    else:
        for side, folder in sides:
            for sub in _look(folder).folders:
                found = _pictures(sub, others)
                if not found:
                    notes.append(f"The folder {folder.name}/{sub.name} holds no pictures and is left out.")
                rows.extend((path, sub.name, side) for path in found)
    if others:
        listed = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        notes.append(f"Files that are no pictures by their ending are left out: {listed}.")
    if not rows:
        raise DataError(_no_pictures(root, top, others))
    if sides is None and len({label for _, label, _ in rows}) == 1 and not top.pictures:
        _only_one_folder(root, top)
    return _table(root, rows, None, notes, what=str(root))


def _sides(root: Path, top: _Level) -> list[tuple[str, Path]] | None:
    """The folders train, val and test, or None where the folders are the classes themselves."""
    named = [(side, folder) for folder in top.folders if (side := _SPLIT_NAMES.get(folder.name.lower()))]
    # 'train' and 'test' can be classes too (a train and a bus): a split has folders of classes inside.
    levels = {folder: _look(folder) for _, folder in named}
    named = [(side, folder) for side, folder in named if levels[folder].folders]
    if not named or any(levels[folder].pictures for _, folder in named):
        return None
    counts = Counter(side for side, _ in named)
    if twice := [side for side, count in counts.items() if count > 1]:
        both = ", ".join(folder.name for side, folder in named if side == twice[0])
        raise DataError(f"{root} has more than one folder for {twice[0]}: {both}. Keep one of them.")
    names = {folder for _, folder in named}
    beside = [folder for folder in top.folders if folder not in names and _pictures(folder, Counter())]
    if "train" not in counts:
        if beside:
            return None
        raise DataError(
            f"{root} has {_some([folder.name for _, folder in named])} but no train. "
            "Expected: train, val and test with one folder per class in each, or the folders of the classes."
        )
    if beside:
        raise DataError(
            f"{root} has {_some([folder.name for _, folder in named])}, and beside them folders with "
            f"pictures that belong to no split: {_some([folder.name for folder in beside])}. Move these away."
        )
    return named


def _no_pictures(root: Path, top: _Level, others: Counter[str]) -> str:
    expected = "Expected one folder per class with pictures in it, such as cats/1.jpg and dogs/2.jpg."
    if top.pictures:
        return f"{len(top.pictures)} pictures lie directly in {root}, in no folder. {expected}"
    others = others + top.others
    if others:
        listed = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        return f"{root} holds no pictures, only {listed}. {expected} Endings: {' '.join(sorted(EXTENSIONS))}."
    return f"{root} is empty: no pictures were found in it. {expected}"


def _only_one_folder(root: Path, top: _Level) -> None:
    """An unpacked archive often has one folder too many; say where the classes are."""
    inside = top.folders
    only = next(folder for folder in inside if _pictures(folder, Counter()))
    below = [folder for folder in _look(only).folders if _pictures(folder, Counter())]
    if len(below) > 1:
        raise DataError(
            f"{root} holds one folder only, {only.name}, so there is one class. "
            f"The folders in it look like classes ({_some([f.name for f in below])}). Did you mean {only}?"
        )


# -- CSV -------------------------------------------------------------------------------------------------


def _csv(
    path: Path, image_col: str | None, label_col: str | None, split_col: str | None, group_col: str | None
) -> Table:
    header, records = _read(path)
    image = _column(path, header, "image_col", image_col, _IMAGE_NAMES)
    label = _column(path, header, "label_col", label_col, _LABEL_NAMES)
    split = _column(path, header, "split_col", split_col, ())
    group = _column(path, header, "group_col", group_col, ())
    assert image is not None and label is not None
    if not records:
        raise DataError(f"{path} has a header and no rows.")
    root = path.parent

    for column, what in ((image, "path"), (label, "label")):
        empty = [line for line, record in records if not record[column].strip()]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(records)} rows of {path} have no {what} in the column "
                f"'{header[column]}': {'line' if len(empty) == 1 else 'lines'} "
                f"{_some([str(line) for line in empty])}. Fill them in or remove these rows."
            )
    files = [root / record[image].strip() for _, record in records]
    gone = [file for file in dict.fromkeys(files) if not file.is_file()]
    if gone:
        shown = _some(
            [record[image].strip() for (_, record), f in zip(records, files, strict=True) if f in set(gone)]
        )
        raise DataError(
            f"{len(gone)} of {len(set(files))} files named in {path} do not exist: {shown}. "
            f"Paths are relative to {root.absolute()}. Correct the column '{header[image]}' or remove "
            "these rows."
        )

    rows: list[tuple[Path, str, str | None]] = []
    groups: list[str] = []
    seen: dict[Path, tuple[str, str | None, int]] = {}
    notes: list[str] = []
    repeated = 0
    for (line, record), file in zip(records, files, strict=True):
        name = record[label].strip()
        side = None if split is None else _side(path, line, record[split].strip(), header[split])
        if file in seen:
            if seen[file][:2] != (name, side):
                raise DataError(
                    f"{path} names {record[image].strip()} twice, on lines {seen[file][2]} and {line}, with "
                    "different labels or splits. A picture has one label: remove one of the rows."
                )
            repeated += 1
            continue
        seen[file] = (name, side, line)
        rows.append((file, name, side))
        groups.append("" if group is None else record[group].strip())
    if repeated:
        notes.append(f"{repeated} rows of {path.name} repeat a picture and are left out.")
    if split is None and (unused := _unused_split(header, records)) is not None:
        notes.append(
            f"The column '{unused}' of {path.name} says train, val or test and is not used: "
            f"--split-col {unused} keeps that split."
        )
    if group is not None:
        # A row without a group stands for itself.
        groups = [text or f"\0{index}" for index, text in enumerate(groups)]
    return _table(root, rows, groups if group is not None else None, notes, what=str(path))


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows with their line numbers; the delimiter is the commonest of , ; | tab in the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except PermissionError:
        raise DataError(f"No permission to read {path}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text. Save it as CSV in UTF-8.") from None
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        raise DataError(f"{path} is empty. Expected a header such as image,label and one row per picture.")
    delimiter = max(",;|\t", key=first.count)
    try:
        # Not splitlines, which would also cut a name at the rarer line ends of Unicode.
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        header = [name.strip() for name in next(row for row in reader if any(cell.strip() for cell in row))]
        records = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file that can be read: {error}.") from None
    # A short row is padded: an empty cell is then reported as what is missing.
    return header, [(line, row + [""] * (len(header) - len(row))) for line, row in records]


def _column(
    path: Path, header: list[str], option: str, asked: str | None, usual: tuple[str, ...]
) -> int | None:
    flag = "--" + option.replace("_", "-")
    if asked is not None:
        if asked in header:
            return header.index(asked)
        raise DataError(f"{path}: {unknown('column', asked, header)} Columns: {', '.join(header)}.")
    folded = [name.lower() for name in header]
    for name in usual:
        if name in folded:
            return folded.index(name)
    if usual:
        what = "path of the picture" if option == "image_col" else "label"
        raise DataError(
            f"{path} has no column that is known to hold the {what}. Say which with {flag}. "
            f"Columns: {', '.join(header)}."
        )
    return None


def _unused_split(header: list[str], records: list[tuple[int, list[str]]]) -> str | None:
    """A column that holds a whole split, though nobody named it."""
    for column, name in enumerate(header):
        said = {_SPLIT_NAMES.get(record[column].strip().lower()) for _, record in records}
        if name.lower() in _SPLIT_COLUMNS and None not in said and len(said) > 1:
            return name
    return None


def _side(path: Path, line: int, value: str, column: str) -> str:
    side = _SPLIT_NAMES.get(value.lower())
    if side is None:
        what = f"'{value}'" if value else "nothing"
        raise DataError(
            f"{path}, line {line}: the column '{column}' says {what}. "
            "Allowed: train, val (validation, valid), test."
        )
    return side


# -- both ------------------------------------------------------------------------------------------------


def _table(
    root: Path,
    rows: list[tuple[Path, str, str | None]],
    groups: list[str] | None,
    notes: list[str],
    *,
    what: str,
) -> Table:
    classes = sorted({label for _, label, _ in rows})
    for name in classes:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise DataError(
                f"{what}: the name of the class '{shown}' is not UTF-8, as in archives made on old systems. "
                "Rename its folder."
            )
    if len(classes) == 1:
        raise DataError(
            f"{what} has one class only, '{classes[0]}' ({len(rows)} pictures). "
            "At least two are needed to tell apart."
        )
    given = any(side is not None for _, _, side in rows)
    if given:
        _same_classes(rows, what, notes)
    index = {name: number for number, name in enumerate(classes)}
    table = Table(root, [path for path, _, _ in rows], [index[label] for _, label, _ in rows], classes)
    # One order, whatever order the disk or the CSV gave: all that follows is then the same everywhere.
    order = sorted(range(len(rows)), key=lambda i: table.relative(i))
    return Table(
        root=root,
        paths=[rows[i][0] for i in order],
        labels=[table.labels[i] for i in order],
        classes=classes,
        split=[rows[i][2] for i in order] if given else None,
        groups=[groups[i] for i in order] if groups is not None else None,
        notes=notes,
    )


def _same_classes(rows: Iterable[tuple[Path, str, str | None]], what: str, notes: list[str]) -> None:
    """What is tested has to be what is learned."""
    by_side: dict[str, set[str]] = {}
    for _, label, side in rows:
        by_side.setdefault(str(side), set()).add(label)
    train = by_side.get("train", set())
    if not train:
        raise DataError(f"{what} gives a split without training pictures.")
    for side in ("test", "val"):
        there = by_side.get(side)
        if there is None:
            continue
        extra, lacking = sorted(there - train), sorted(train - there)
        if extra or (lacking and side == "test"):
            parts = []
            if lacking:
                parts.append(f"only in train: {_some(lacking)}")
            if extra:
                parts.append(f"only in {side}: {_some(extra)}")
            raise DataError(
                f"{what}: the classes of train and {side} differ; {'; '.join(parts)}. "
                "Give both the same class names."
            )
        if lacking:
            notes.append(f"val has no pictures of {_some(lacking)}.")
