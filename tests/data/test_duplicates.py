"""Near duplicates: saved again is found, alike is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from headstart.data import duplicates
from headstart.data.duplicates import components, look, near_pairs


def photo(seed: int, size: int = 200) -> Image.Image:
    """Smooth random colours, as a photograph has."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def pairs(images: list[Image.Image]) -> list[tuple[int, int]]:
    seen = [look(image) for image in images]
    return near_pairs(np.array([h for h, _ in seen], dtype=np.uint64), np.stack([t for _, t in seen]))


def test_saved_again_scaled_and_brightened_are_found() -> None:
    first = photo(0)
    stream = io.BytesIO()
    first.save(stream, "JPEG", quality=60)
    brighter = Image.fromarray((np.asarray(first).astype(float) * 0.9 + 12).astype(np.uint8))
    images = [first, Image.open(stream), first.resize((90, 90)), brighter, photo(1), photo(2)]
    assert pairs(images) == [(i, j) for i in range(4) for j in range(i + 1, 4)]


def test_alike_is_not_equal() -> None:
    """Digits on black and drawings on white share many hash bits; they are different pictures."""
    digits = load_digits()
    images = [Image.fromarray((d * 15).astype(np.uint8)).convert("RGB") for d in digits.images[:300]]
    assert len(pairs(images)) <= 3
    flat = [Image.new("RGB", (50, 50), (v, 0, 0)) for v in range(0, 250, 10)]
    assert pairs(flat) == []


def test_blocks_agree_with_one_block_and_old_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 8, 50).astype(np.uint64)
    thumbnails = np.repeat(rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8), 5, axis=0)
    whole = near_pairs(hashes, thumbnails)
    assert sorted(whole) == [(i, j) for i in range(50) for j in range(i + 1, 50) if i // 5 == j // 5]
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    assert sorted(near_pairs(hashes, thumbnails)) == sorted(whole)
    counted = duplicates._ones(hashes)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert np.array_equal(duplicates._ones(hashes), counted)


def test_components() -> None:
    assert components(5, [(0, 3), (3, 4)]) == [0, 1, 2, 0, 0]
    assert components(2, []) == [0, 1]
