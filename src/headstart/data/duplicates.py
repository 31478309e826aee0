"""Pictures that are the same, or nearly: copies saved again, scaled or lightly compressed.

Two pictures are near duplicates when their difference hashes (dHash: 64 signs of horizontal differences)
are at most 6 bits apart, their 16 x 16 thumbnails correlate to more than 0.995, and their mean colours are
less than 16 grey levels apart. The hash alone is not enough: drawings on white, digits or flags share it by
the hundred. Flat pictures have nothing to correlate and are compared by content only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 6
CORRELATION = 0.995
COLOUR = 16.0
_FLAT = 4.0  # standard deviation of the thumbnail, in grey levels
_ROWS = 2048  # pictures compared at once with all others


def look(image: Image.Image) -> tuple[int, np.ndarray]:
    """The difference hash and the thumbnail of an RGB picture.

    Returns:
        The hash as a whole number of 64 bits, and uint8 [16, 16, 3].
    """
    # One pass over the large picture, then both from the small one.
    small = image.resize((36, 32), Image.Resampling.BOX)
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big"), np.asarray(small.resize((16, 16), Image.Resampling.BOX))


def near_pairs(hashes: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of near duplicates.

    Args:
        hashes: uint64 [N]
        thumbnails: uint8 [N, 16, 16, 3]
    """
    n = len(hashes)
    if n < 2:
        return []
    colour = thumbnails.reshape(n, -1, 3).mean(axis=1, dtype=np.float32)
    flat = (thumbnails.reshape(n, -1, 3) - colour[:, None]).reshape(n, -1)
    deviation = flat.std(axis=1)
    textured = deviation >= _FLAT
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs: list[tuple[int, int]] = []
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        for other in range(start, n, _ROWS):
            end = min(other + _ROWS, n)
            apart = _ones(hashes[start:stop, None] ^ hashes[None, other:end])
            i, j = np.nonzero(apart <= BITS)
            i, j = i + start, j + other
            keep = (i < j) & textured[i] & textured[j]
            i, j = i[keep], j[keep]
            for piece in range(0, len(i), 65536):
                a, b = i[piece : piece + 65536], j[piece : piece + 65536]
                alike = np.einsum("nd,nd->n", flat[a], flat[b]) > CORRELATION
                alike &= np.abs(colour[a] - colour[b]).max(axis=1) < COLOUR
                pairs.extend(zip(a[alike].tolist(), b[alike].tolist(), strict=True))
    return pairs


def _ones(values: np.ndarray) -> np.ndarray:
    """How many bits are set: uint64 [...] -> uint8 [...] (numpy 1 has no bitwise_count)."""
    if hasattr(np, "bitwise_count"):
        counted: np.ndarray = np.bitwise_count(values)
        return counted
    table = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
    spread: np.ndarray = table[values[..., None].view(np.uint8)].sum(axis=-1, dtype=np.uint8)
    return spread


def components(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """[N] the number of the connected component of each of n things."""
    pairs = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    numbers: list[int] = connected_components(graph, directed=False)[1].tolist()
    return numbers
