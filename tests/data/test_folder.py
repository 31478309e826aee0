"""What lies on the disk, in every shape that people bring."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from headstart.data.folder import scan
from headstart.errors import DataError


def make(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i % 256, 0, 0)).save(path)
    return root


def refused(data: Path, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        scan(data, **columns)
    return str(caught.value)


def test_class_folders_recursive_hidden_and_odd_names(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        "cat/1.PNG",
        "cat/deep/er/2.png",
        "Hund & Katze/ü ñ 猫.png",
        "Hund & Katze/b.jpeg",
        "cat/.hidden.png",
        ".trash/3.png",
        "__MACOSX/cat/1.png",
    )
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    table = scan(root)
    assert table.classes == ["Hund & Katze", "cat"]
    assert [table.relative(i) for i in range(len(table))] == [
        "Hund & Katze/b.jpeg",
        "Hund & Katze/ü ñ 猫.png",
        "cat/1.PNG",
        "cat/deep/er/2.png",
    ]
    assert table.labels == [0, 0, 1, 1] and table.split is None and table.groups is None
    assert any("empty" in note for note in table.notes) and any("1 .txt" in note for note in table.notes)


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        root = make(tmp_path, "cat/1.png", os.fsdecode(b"\xe9t\xe9/1.png"))
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    assert "name of the class '\\udce9t\\udce9' is not UTF-8" in refused(root)


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = make(tmp_path / "data", "a/1.png", "b/2.png")
    make(tmp_path / "elsewhere", "3.png")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "b" / "file.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (root / "b" / "dangling.png").symlink_to(tmp_path / "gone.png")
    table = scan(root)
    assert [table.relative(i) for i in range(len(table))] == [
        "a/1.png",
        "a/linked/3.png",
        "b/2.png",
        "b/dangling.png",  # kept: it is reported as unreadable, not lost in silence
        "b/file.png",
    ]


@pytest.mark.parametrize("val", ["val", "validation", "valid", "Val"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    names = [f"{side}/{c}/{i}.png" for side in ("train", val, "test") for c in "ab" for i in range(2)]
    table = scan(make(tmp_path, *names))
    assert table.classes == ["a", "b"]
    assert sorted(zip(map(table.relative, range(12)), table.split or [], strict=True)) == sorted(
        (name, "val" if name.startswith(val) else name.split("/")[0]) for name in names
    )


def test_classes_that_are_called_train_and_test(tmp_path: Path) -> None:
    table = scan(make(tmp_path, "train/1.png", "test/2.png", "bus/3.png"))
    assert table.classes == ["bus", "test", "train"] and table.split is None
    table = scan(make(tmp_path / "two", "train/1.png", "test/2.png"))
    assert table.classes == ["test", "train"]


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty")
    flowers = make(tmp_path / "flowers", "rose/1.png", "tulip/2.png")
    assert f"Did you mean {flowers}?" in refused(tmp_path / "flwers")
    assert f"Did you mean {flowers}?" in refused(tmp_path / "flwers" / "sub")
    assert "one class only, 'a' (2 pictures)" in refused(make(tmp_path / "one", "a/1.png", "a/2.png"))
    nested = make(tmp_path / "zip", "inner/a/1.png", "inner/b/2.png")
    assert f"Did you mean {nested / 'inner'}?" in refused(nested)
    assert "2 pictures lie directly in" in refused(make(tmp_path / "flat", "1.png", "2.png"))
    assert "beside the folders" in refused(make(tmp_path / "both", "1.png", "a/1.png", "b/1.png"))
    (tmp_path / "docs" / "a").mkdir(parents=True)
    (tmp_path / "docs" / "a" / "x.heic").write_bytes(b"x")
    assert "1 .heic" in refused(tmp_path / "docs")
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "neither a folder nor a CSV" in refused(tmp_path / "x.bin")
    assert "column of a CSV" in refused(flowers, label_col="y")


def test_bad_splits(tmp_path: Path) -> None:
    root = make(
        tmp_path / "differ", *[f"train/{c}/1.png" for c in "abc"], *[f"test/{c}/1.png" for c in "bcd"]
    )
    said = refused(root)
    assert "only in train: a" in said and "only in test: d" in said
    assert "but no train" in refused(make(tmp_path / "none", "val/a/1.png", "test/a/1.png", "test/b/1.png"))
    twice = make(tmp_path / "twice", "train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png")
    assert "more than one folder for val" in refused(twice)
    beside = make(tmp_path / "beside", "train/a/1.png", "train/b/1.png", "extra/1.png")
    assert "belong to no split: extra" in refused(beside)
    lacking = make(tmp_path / "lack", "train/a/1.png", "train/b/1.png", "val/a/2.png")
    assert any("val has no pictures of b" in note for note in scan(lacking).notes)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path, "a/1.png", "b/2.png")
    real: Callable[..., Any] = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"No permission to read the folder {root / 'b'}" in refused(root)


def test_a_folder_that_the_system_keeps_shut() -> None:
    """The real thing, also where the tests run as root, whom no mode stops."""
    # Not below tmp_path, into which only its owner may look.
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), "a/1.png", "b/2.png")
        root.chmod(0o755)
        (root / "b").chmod(0)
        mine = os.geteuid()
        try:
            if mine == 0:
                os.seteuid(65534)
            assert f"No permission to read the folder {root / 'b'}" in refused(root)
        finally:
            os.seteuid(mine)
            (root / "b").chmod(0o755)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    make(tmp_path, "p/1.png", "p/2.png", "p/3.png", "p/4.png")
    plain = write(tmp_path / "a.csv", "\ufefffile,label\np/2.png,dog\np/1.png,cat\n\np/2.png,dog\n")
    table = scan(plain)
    assert table.classes == ["cat", "dog"] and table.labels == [0, 1]
    assert table.notes == ["1 rows of a.csv repeat a picture and are left out."]
    rich = write(
        tmp_path / "b.csv",
        "pic;what;side;patient\np/1.png;a;train;7\np/2.png;b;train;7\np/3.png;a;test;\np/4.png;b;validation;\n",
    )
    with pytest.raises(DataError, match="classes of train and test differ"):
        scan(rich, image_col="pic", label_col="what", split_col="side", group_col="patient")
    rich.write_text(rich.read_text().replace("validation", "test"))
    table = scan(rich, image_col="pic", label_col="what", split_col="side", group_col="patient")
    assert table.split == ["train", "train", "test", "test"]
    assert table.groups is not None and table.groups[0] == table.groups[1] == "7"
    assert len(set(table.groups)) == 3  # empty groups stand for themselves


def test_a_split_that_nobody_asked_for_is_pointed_at(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png", "3.png", "4.png")
    rows = "1.png,a,train\n2.png,b,train\n3.png,a,test\n4.png,b,test\n"
    (note,) = scan(write(tmp_path / "t.csv", f"image,label,Split\n{rows}")).notes
    assert note == (
        "The column 'Split' of t.csv says train, val or test and is not used: "
        "--split-col Split keeps that split."
    )
    assert scan(tmp_path / "t.csv", split_col="Split").notes == []
    assert scan(write(tmp_path / "u.csv", f"image,label,weather\n{rows}")).notes == []  # hardly meant


@pytest.mark.parametrize(
    "text",
    [
        "image,label\n1.png,a\n2.png,b\n",
        "image;label\r\n1.png;a\r\n2.png;b\r\n",
        "image|label\n1.png|a\n2.png|b\n",
        "image\tlabel\n1.png\ta\n2.png\tb\n",
        '\n \n"image", label\n"1.png", a\n\n"2.png", b\n',
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, text: str) -> None:
    make(tmp_path, "1.png", "2.png")
    (tmp_path / "t.csv").write_bytes(text.encode())
    table = scan(tmp_path / "t.csv")
    assert [path.name for path in table.paths] == ["1.png", "2.png"] and table.classes == ["a", "b"]


def test_a_name_in_a_csv_may_hold_rare_line_ends(tmp_path: Path) -> None:
    make(tmp_path, "1\u2028x.png", "2.png")
    table = scan(write(tmp_path / "t.csv", "image,label\n1\u2028x.png,a\n2.png,b\n"))
    assert table.paths[0].name == "1\u2028x.png"


def test_bad_csv(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png")
    good = "image,label\n1.png,a\n2.png,b\n"
    path = write(tmp_path / "t.csv", good)
    assert "Did you mean 'label'?" in refused(path, label_col="lable")
    assert "--image-col" in refused(write(tmp_path / "t.csv", "x,label\n1.png,a\n"))
    said = refused(write(tmp_path / "t.csv", good + "3.png,a\n4.png,a\n"))
    assert "2 of 4 files" in said and "3.png, 4.png" in said and f"relative to {tmp_path}." in said
    assert "no label in the column 'label': line 4." in refused(write(tmp_path / "t.csv", good + "1.png,\n"))
    said = refused(write(tmp_path / "t.csv", good + "2.png,\n1.png\n"))
    assert "2 of 4 rows" in said and "lines 4, 5" in said and "no label" in said
    assert "twice, on lines 2 and 4" in refused(write(tmp_path / "t.csv", good + "1.png,b\n"))
    assert "header and no rows" in refused(write(tmp_path / "t.csv", "image,label\n"))
    assert "is empty" in refused(write(tmp_path / "t.csv", ""))
    sided = write(tmp_path / "t.csv", "image,label,s\n1.png,a,train\n2.png,b,tset\n")
    assert "line 3: the column 's' says 'tset'" in refused(sided, split_col="s")
    (tmp_path / "latin.csv").write_bytes(b"image,label\n1.png,\xe9\n")
    assert "not UTF-8" in refused(tmp_path / "latin.csv")
    assert "without training pictures" in refused(
        write(tmp_path / "t.csv", "image,label,s\n1.png,a,test\n2.png,b,test\n"), split_col="s"
    )
