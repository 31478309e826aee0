"""The pictures that went wrong, as small copies inside the page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from headstart.report.evidence import Evidence, Seen
from headstart.report.figures import classes_of

SHOWN = 24
_SIDE = 192  # pixels of the longer side: sharp on a screen of two dots per point, some 6 kB each
_LARGEST = 50_000_000  # pixels: a picture that unpacks to more is not worth the wait


@dataclass(frozen=True)
class Mistake:
    """One test picture that the shipped model gets wrong."""

    path: str  # relative to the data; empty where split.csv does not name it
    truth: str
    answer: str
    sure: float  # probability of the answer
    truth_probability: float
    missed_by: int  # of so many methods
    methods: int
    suspect: bool  # nobody gets it, though the model is good: perhaps the label is wrong
    thumbnail: str | None  # data: address; None where the file is not there any more


def sides(run: Seen) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Of a run's split: content hash to relative path; pictures per side and class."""
    paths: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    try:
        with (run.folder / "split.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                paths.setdefault(str(row["sha256"]), str(row["path"]))
                side = counts.setdefault(str(row["split"]), {})
                side[str(row["label"])] = side.get(str(row["label"]), 0) + 1
    except (OSError, csv.Error, KeyError):
        return {}, {}
    order = [side for side in ("train", "val", "test") if side in counts]
    return paths, {side: counts[side] for side in order}


def mistakes(evidence: Evidence, taken: Seen, paths: Mapping[str, str]) -> tuple[list[Mistake], int]:
    """The worst errors of the model to take, surest first, and how many there are in all."""
    said = taken.said
    if said is None:
        return [], 0
    classes = classes_of(taken, said)
    wrong = np.flatnonzero(said.wrong)
    sure = said.probabilities[wrong, said.answers[wrong]]
    worst = wrong[np.argsort(-sure, kind="stable")][:SHOWN]
    missed, methods = _missed(evidence, taken, said.hashes[worst])
    root = Path(taken.result.run.data)
    root = root if root.is_dir() else root.parent
    found = []
    for place, i in enumerate(worst):
        path = paths.get(str(said.hashes[i]), "")
        answer = int(said.answers[i])
        found.append(
            Mistake(
                path=path,
                truth=classes[said.labels[i]],
                answer=classes[answer],
                sure=float(said.probabilities[i, answer]),
                truth_probability=float(said.probabilities[i, said.labels[i]]),
                missed_by=int(missed[place]),
                methods=methods,
                suspect=bool(
                    methods > 2 and missed[place] == methods and len(wrong) < 0.3 * len(said.labels)
                ),
                thumbnail=_thumbnail(root / path) if path else None,
            )
        )
    return found, len(wrong)


def _missed(evidence: Evidence, taken: Seen, hashes: np.ndarray) -> tuple[np.ndarray, int]:
    """How many methods, on the same split and seed, get each of these pictures wrong; of how many."""
    count, methods = np.zeros(len(hashes), int), 0
    here = (taken.result.split_seed, taken.result.seed)
    for run in evidence.runs:
        if (run.result.split_seed, run.result.seed) != here or run.said is None:
            continue
        wrong = dict(zip(run.said.hashes.tolist(), run.said.wrong.tolist(), strict=True))
        if not all(each in wrong for each in hashes.tolist()):
            continue
        methods += 1
        count += np.array([wrong[each] for each in hashes.tolist()], int)
    return count, methods


def _thumbnail(path: Path) -> str | None:
    """A small JPEG as a data: address; None for a file that is not there or no picture."""
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _LARGEST:
                return None
            opened.draft("RGB", (_SIDE * 2, _SIDE * 2))
            picture = ImageOps.exif_transpose(opened)
            picture.thumbnail((_SIDE, _SIDE))
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                rgba = picture.convert("RGBA")
                picture = Image.new("RGB", rgba.size, "white")
                picture.paste(rgba, mask=rgba.getchannel("A"))
            bytes_ = io.BytesIO()
            picture.convert("RGB").save(bytes_, "JPEG", quality=72, optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(bytes_.getvalue()).decode("ascii")
