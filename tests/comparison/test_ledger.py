"""What is read of a run's folder, beyond what the tests of the runner see."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from headstart.comparison.ledger import SPLITS, Entry, answers, write_table
from headstart.records import Result, Run, Score


def finished(folder: Path, order: list[int]) -> Result:
    """A run on four pictures, of which it got 'a' and 'd' right, whose files came in this order."""
    folder.mkdir()
    hashes, labels = np.array(["a", "b", "c", "d"]), np.array([0, 1, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    arrays = {"hashes": hashes, "labels": labels, "probabilities": probabilities}
    np.savez(
        folder / "predictions.npz",
        allow_pickle=False,
        **{f"{split}_{name}": each[order] for split in SPLITS for name, each in arrays.items()},
    )
    score = Score(n=4, accuracy=0.5, balanced_accuracy=0.5, macro_f1=0.5, log_loss=1.0)
    run = Run(data="pictures", method="full")
    given = {"run": run, "method": "full", "model": "tiny", "split_seed": 0, "seed": 0, "epochs": 1}
    return Result.model_validate({"status": "finished", "val": score, "test": score, **given})


def test_answers_are_paired_by_content_whatever_the_files_were_called(tmp_path: Path) -> None:
    for number, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2])):
        folder = tmp_path / str(number)
        found = answers(folder, finished(folder, order))
        for split in SPLITS:
            assert found[split].hashes.tolist() == ["a", "b", "c", "d"]
            assert found[split].right.tolist() == [True, False, False, True]


def test_the_table_holds_what_a_run_cost(tmp_path: Path) -> None:
    result = finished(tmp_path / "run", [0, 1, 2, 3]).model_copy(update={"flops": 4_000_000, "seconds": 2.5})
    done = Entry("full", result.run, status="finished", result=result)
    write_table(tmp_path / "results.csv", [done, Entry("full", result.run)])
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["flops"], first["seconds"]) == ("4000000", "2.5")
    assert second["flops"] == ""
