"""The audit says what is there, in data and in sentences."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from headstart.data.audit import Audit, audit
from headstart.data.cache import Pictures
from headstart.data.folder import scan
from headstart.data.preprocess import Preprocess


def smooth(path: Path, seed: int, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image.resize((size, size), Image.Resampling.BICUBIC).save(path)
    return path


def test_clean(tmp_path: Path) -> None:
    for i in range(40):
        smooth(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    found = audit(scan(tmp_path))
    assert found.clean and found.classes == {"a": 20, "b": 20} and found.imbalance == 1.0
    assert found.smallest_side == found.median_side == 64 and found.splits is None
    assert found.lines() == [
        f"40 pictures of 2 classes in {tmp_path}, 20 per class.",
        "No unreadable files, no duplicates.",
    ]
    assert Audit.model_validate(json.loads(found.canonical())) == found


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    for i in range(9):
        smooth(tmp_path / "train" / "a" / f"{i}.png", i)
    for i in range(4):
        smooth(tmp_path / "test" / "a" / f"{i}.png", 100 + i)
    smooth(tmp_path / "train" / "b" / "0.png", 50)
    smooth(tmp_path / "test" / "b" / "0.png", 51)
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/a/copy.png")
    Image.open(tmp_path / "train/a/1.png").resize((40, 40)).save(tmp_path / "test/a/near.png")
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "train/b/contradiction.png")
    (tmp_path / "train/a/text.jpg").write_text("text")
    found = audit(scan(tmp_path))
    assert found.unreadable == {"train/a/text.jpg": "is a text file, not a picture"}
    assert found.duplicates == [
        ["train/a/0.png", "train/a/copy.png"],
        ["train/a/2.png", "train/b/contradiction.png"],
    ]
    assert found.near_duplicates == [["test/a/near.png", "train/a/1.png"]]
    assert found.crossing == [["test/a/near.png", "train/a/1.png"]]
    assert found.contradicting == [["train/a/2.png", "train/b/contradiction.png"]]
    assert found.splits == {"train": {"a": 10, "b": 2}, "test": {"a": 5, "b": 1}}
    assert found.too_small == {"b": 2} and found.small == {"a": 14} and found.imbalance == 5.0
    text = "\n".join(found.lines())
    for said in (
        "1 file cannot be read",
        "different labels",
        "across the given split",
        "Too small to be split",
        "5.0 times",
        "Given split: 12 train, 6 test",
    ):
        assert said in text, said
    assert not found.clean


def test_facts_of_the_cache_give_the_same_audit(tmp_path: Path) -> None:
    for i in range(8):
        smooth(tmp_path / "ab"[i % 2] / f"{i}.png", i // 3)
    table = scan(tmp_path)
    pictures = Pictures.build(table.root, table.paths, Preprocess(size=16))
    assert audit(table, pictures.facts) == audit(table)


def test_empty_class(tmp_path: Path) -> None:
    smooth(tmp_path / "a" / "1.png", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.png").write_bytes(b"")
    found = audit(scan(tmp_path))
    assert found.imbalance is None and found.too_small == {"a": 1, "b": 0}
    assert "0 to 1 per class" in found.lines()[0]
