"""A benchmark in pieces, one seed of one task each: processes of their own, and what is done stays done."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from measurement import HERE

Piece = tuple[str, int]  # a task, and the seed of its split


def arguments(parser: argparse.ArgumentParser, out: Path) -> None:
    """What a benchmark in pieces is asked, and what it tells the process of a piece."""
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, help="pieces at a time; else 1 on the CPU, up to 6 on a GPU")
    parser.add_argument("--out", type=Path, default=out, help="goes on where it was")
    parser.add_argument("--piece", help=argparse.SUPPRESS)  # what a process of its own is told


def run(script: str, pieces: Sequence[Piece], options: argparse.Namespace, *more: str) -> None:
    """Each piece in a process that runs `script` anew with `--piece`, so many at a time."""
    on_gpu = min(6, max(1, (os.cpu_count() or 2) // 2))
    at_once = options.jobs or (on_gpu if torch.cuda.is_available() else 1)
    # A quick run puts "-quick" after the folder, and so will the process of the piece.
    out = options.out.with_name(options.out.name.removesuffix("-quick")) if options.quick else options.out
    passed = ["--out", str(out), "--epochs", str(options.epochs), "--only", *options.only, *more]
    if options.data is not None:
        passed += ["--data", str(options.data.resolve())]
    if options.quick:
        passed += ["--quick"]
    threads = {} if at_once == 1 else {"OMP_NUM_THREADS": "2"}

    def start(piece: Piece) -> None:
        name, seed = piece
        command = [sys.executable, str(HERE / script), "--piece", f"{name}:{seed}", *passed]
        subprocess.run(command, check=True, env=os.environ | threads)

    with ThreadPoolExecutor(at_once) as several:
        list(several.map(start, pieces))


def asked(options: argparse.Namespace) -> Piece:
    """Which piece this process is for."""
    name, _, seed = options.piece.partition(":")
    return name, int(seed)


def path(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a piece's results lie."""
    out: Path = options.out / f"{name}-{options.epochs}-epochs-seed-{seed}.json"
    return out


def kept(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What is there of a piece."""
    where = path(options, name, seed)
    found: dict[str, Any] = json.loads(where.read_text(encoding="utf-8")) if where.exists() else {}
    return found


def keep(options: argparse.Namespace, name: str, seed: int, found: dict[str, Any]) -> None:
    """Put a piece's results where `kept` looks."""
    where = path(options, name, seed)
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(found), encoding="utf-8")
