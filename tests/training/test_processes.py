"""A run in two processes, as `torchrun` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_train_one_network(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    losses = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        )
        options = ["--model", str(tiny_model), "--method", "full", "--epochs", "2", "--batch-size", "8"]
        options += ["--lr", "0.01", "--device", "cpu", "--set", "channels_last=false"]
        done = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "headstart",
                "train",
                str(pictures),
                *options,
                "--out",
                str(out),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Next:") == 1  # one of them speaks
        losses[processes] = [
            json.loads(line)["val_log_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        assert json.loads((out / "result.json").read_text())["status"] == "finished"
    # Statistics are held and the shares are equal, so the two differ by rounding only.
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)
