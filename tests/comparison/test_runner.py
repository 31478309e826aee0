from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import NO_MEMORY, NOT_HERE, Heard, MadeUp

from headstart.comparison import ledger
from headstart.comparison.runner import Comparison, compare
from headstart.errors import ConfigError, DataError, MethodError, ModelError, OutputError
from headstart.records import Run


def run(out: Path, world: MadeUp, **more: Any) -> Comparison:
    asked: dict[str, Any] = {"methods": "probe,full,l2-sp", "seeds": 2, "epochs": 3}
    return compare("pictures", out=out, executor=world, **(asked | more))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_runs_and_all_files(tmp_path: Path) -> None:
    out, world, heard = tmp_path / "out", MadeUp(), Heard()
    found = run(out, world, reporter=heard)
    assert world.trained == [(m, s) for s in (0, 1) for m in ("probe", "full", "l2-sp")]
    assert len(found.results) == len(heard.rows) == 6
    assert [(index, total) for _, index, total in heard.runs] == [(i, 6) for i in range(1, 7)]
    assert heard.ended == 1
    table = rows(out)
    assert [(row["method"], row["seed"], row["status"]) for row in table[:2]] == [
        ("probe", "0", "finished"),
        ("full", "0", "finished"),
    ]
    assert {row["shipped"] for row in table} == {"20"}
    assert float(table[0]["test_accuracy"]) == pytest.approx(found.results[0].test.accuracy)  # type: ignore[union-attr]
    for row in table:
        assert (out / row["folder"] / "predictions.npz").is_file()
        assert Path(row["folder"]).name.startswith(f"{row['method']}-")
        assert row["folder"].endswith(f"-s{row['seed']}")
    asked = json.loads((out / "compare.json").read_text())
    assert (asked["methods"], asked["seeds"], asked["baseline"]) == (
        ["probe", "full", "l2-sp"],
        [0, 1],
        "full",
    )
    assert json.loads((out / "verdict.json").read_text())["sentence"] == found.verdict


def test_pictures_and_network_of_a_seed_are_handed_on(tmp_path: Path) -> None:
    world = MadeUp()
    run(tmp_path / "out", world)
    assert [ready.shared is None for ready in world.prepared] == [True] + [False] * 5


def test_a_finished_run_is_never_run_again_and_new_ones_are_added(tmp_path: Path) -> None:
    out, world = tmp_path / "out", MadeUp()
    first = run(out, world)
    world.trained.clear()
    again = run(out, world)
    assert world.trained == []
    assert again.judgement == first.judgement
    wider = run(out, world, methods="probe,full,l2-sp,lp-ft", seeds=3)
    assert len(world.trained) == 6
    assert len(wider.results) == 12
    narrower = run(out, world, methods="probe,full")
    assert [row["method"] for row in narrower.table] == ["probe", "full"]
    assert len(rows(out)) == 4
    run(out, world, epochs=4)
    assert len(world.trained) == 12
    assert len(list((out / "runs").iterdir())) == 18


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    world = MadeUp()
    before = run(tmp_path / "out", world)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    after = run(tmp_path / "elsewhere", world)
    assert len(world.trained) == 6
    assert after.judgement == before.judgement


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NO_MEMORY, "Out of memory on cuda. Use a smaller --batch-size."),
        (NOT_HERE, "l2-sp cannot run here: no source."),
        (RuntimeError("first line\nmat1 and mat2 do not fit\n"), "RuntimeError: mat1 and mat2 do not fit"),
        (MemoryError(), "Out of memory. Use a smaller --batch-size or --img-size."),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_a_run_that_fails_is_a_row_and_is_tried_again(tmp_path: Path, error: Exception, reason: str) -> None:
    out, world, heard = tmp_path / "out", MadeUp(broken={"l2-sp": error}), Heard()
    found = run(out, world, reporter=heard)
    assert len(found.results) == 4
    assert [(each.method, each.seed, each.reason) for each in found.failed] == [
        ("l2-sp", 0, reason),
        ("l2-sp", 1, reason),
    ]
    broken = [row for row in rows(out) if row["status"] == "failed"]
    assert [row["reason"] for row in broken] == [reason, reason]
    assert type(error).__name__ in (out / broken[0]["folder"] / "error.txt").read_text()
    assert [row.status for row in heard.rows].count("failed") == 2
    assert (found.table[2]["failed"], found.table[2]["reason"], found.table[2]["seeds"]) == (2, reason, [])
    world.broken.clear()
    world.trained.clear()
    assert len(run(out, world).results) == 6
    assert world.trained == [("l2-sp", 0), ("l2-sp", 1)]
    assert not (out / broken[0]["folder"] / "error.txt").exists()


def test_a_method_that_cannot_be_prepared_is_a_row(tmp_path: Path) -> None:
    found = run(tmp_path / "out", MadeUp(unfit={"probe": ConfigError("batch 1"), "l2-sp": MethodError("no")}))
    assert [(each.method, each.reason) for each in found.failed[:2]] == [
        ("probe", "batch 1"),
        ("l2-sp", "no"),
    ]
    assert [result.method for result in found.results] == ["full", "full"]


@pytest.mark.parametrize("error", [DataError("no pictures"), ModelError("no such network")])
def test_pictures_and_networks_that_cannot_be_used_are_an_error(tmp_path: Path, error: Exception) -> None:
    unfit = dict.fromkeys(("probe", "full", "l2-sp"), error)
    with pytest.raises(type(error), match=str(error)):
        run(tmp_path / "out", MadeUp(unfit=unfit))


def test_settings_that_no_method_takes_are_an_error(tmp_path: Path) -> None:
    unfit: dict[str, Exception] = dict.fromkeys(("probe", "full", "l2-sp"), ConfigError("grad_accum 40"))
    with pytest.raises(ConfigError, match="grad_accum 40"):
        run(tmp_path / "out", MadeUp(unfit=unfit))


def test_when_everything_fails_there_is_no_best(tmp_path: Path) -> None:
    found = run(tmp_path / "out", MadeUp(broken=dict.fromkeys(("probe", "full", "l2-sp"), NO_MEMORY)))
    assert found.verdict == f"No run finished: {NO_MEMORY}"
    assert found.judgement.take is None
    with pytest.raises(OutputError, match="no finished run"):
        _ = found.best


def test_the_baseline_may_fail(tmp_path: Path) -> None:
    found = run(tmp_path / "out", MadeUp(broken={"full": NO_MEMORY}))
    assert found.judgement.baseline == "probe"
    assert "full has no finished run; compared with probe instead." in found.judgement.notes


def test_a_seed_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def before(asked: Run) -> None:
        if (asked.method, asked.seed) == ("full", 1):
            raise NO_MEMORY

    found = run(tmp_path / "out", MadeUp(before=before))
    assert [row["seeds"] for row in found.table] == [[0, 1], [0], [0, 1]]
    assert any("full did not finish with every seed" in note for note in found.judgement.notes)


def test_interrupted_by_hand_and_gone_on_with(tmp_path: Path) -> None:
    def before(asked: Run) -> None:
        if (asked.method, asked.seed) == ("full", 1):
            raise KeyboardInterrupt

    out, world, heard = tmp_path / "out", MadeUp(before=before), Heard()
    with pytest.raises(KeyboardInterrupt):
        run(out, world, reporter=heard)
    assert "Interrupted. The same command goes on where it stopped." in heard.lines
    assert heard.ended == 1
    assert [row["status"] for row in rows(out)] == ["finished"] * 4 + ["interrupted", "pending"]
    written = json.loads((out / "verdict.json").read_text())
    assert written["pending"] == 2
    assert written["sentence"].startswith("So far (4 of 6 runs): ")
    world.before = lambda asked: None
    world.trained.clear()
    found = run(out, world)
    assert world.trained == [("full", 1), ("l2-sp", 1)]
    assert [r.diagnostics["resumed"] for r in found.results][4:] == [True, False]
    whole = run(tmp_path / "whole", MadeUp())
    assert found.judgement == whole.judgement


def test_without_resume_an_interrupted_run_starts_over_and_finished_ones_stay(tmp_path: Path) -> None:
    out, world = tmp_path / "out", MadeUp(broken={"l2-sp": RuntimeError("gone")})
    run(out, world)
    world.broken.clear()
    world.trained.clear()
    found = run(out, world, resume=False)
    assert len(world.trained) == 2
    assert not any(result.diagnostics["resumed"] for result in found.results)


def test_overwrite_trains_all_that_was_asked_for_anew(tmp_path: Path) -> None:
    out, world = tmp_path / "out", MadeUp()
    run(out, world)
    run(out, world, methods="probe", overwrite=True)
    assert len(world.trained) == 8
    run(out, world)
    assert len(world.trained) == 8


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from headstart.comparison.runner import compare
        from made_up import MadeUp

        world = MadeUp()
        def before(run):
            if len(world.trained) > int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        world.before = before
        compare("pictures", "probe,full,l2-sp", out=Path(sys.argv[1]), seeds=2, epochs=3, executor=world)
        """
    )
    out = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    for runs in (2, 1):
        done = subprocess.run([sys.executable, "-c", script, str(out), str(runs)], env=env, check=False)
        assert done.returncode == -signal.SIGKILL
    assert [row["status"] for row in rows(out)] == ["finished"] * 3 + ["pending"] * 3
    world = MadeUp()
    found = run(out, world)
    assert world.trained == [("probe", 1), ("full", 1), ("l2-sp", 1)]
    assert [result.diagnostics["resumed"] for result in found.results] == [False] * 2 + [True, True] + [
        False
    ] * 2
    assert found.judgement == run(tmp_path / "whole", MadeUp()).judgement


@pytest.mark.parametrize("name", ["result.json", "predictions.npz"])
@pytest.mark.parametrize("how", ["half", "empty", "noise"])
def test_a_damaged_result_is_done_again_and_said(tmp_path: Path, name: str, how: str) -> None:
    out, world, heard = tmp_path / "out", MadeUp(), Heard()
    before = run(out, world)
    victim = out / rows(out)[1]["folder"] / name
    whole = victim.read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole))
    victim.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": noise}[how])
    world.trained.clear()
    after = run(out, world, reporter=heard)
    assert world.trained == [("full", 0)]
    assert any(f"its {name} cannot be read: it is trained again" in line for line in heard.lines)
    assert after.judgement == before.judgement


def test_predictions_of_another_run_are_not_taken(tmp_path: Path) -> None:
    out, world = tmp_path / "out", MadeUp()
    run(out, world)
    other = run(tmp_path / "other", MadeUp(n=20))
    shutil.copy(
        tmp_path / "other" / "runs" / Path(rows(tmp_path / "other")[0]["folder"]).name / "predictions.npz",
        out / rows(out)[0]["folder"] / "predictions.npz",
    )
    assert other.results
    with pytest.raises(ledger.Unusable, match="not of the same run"):
        ledger.look(out / rows(out)[0]["folder"])
    world.trained.clear()
    run(out, world)
    assert world.trained == [("probe", 0)]


def test_two_runs_of_one_seed_on_other_pictures_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, MadeUp(), methods="probe", seeds=1)
    with pytest.raises(OutputError, match="scored on other pictures"):
        run(out, MadeUp(n=20), methods="probe,full", seeds=1)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds something else \(thesis.txt\)"):
        run(tmp_path, MadeUp())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="cannot be used"):
        run(tmp_path / "thesis.txt", MadeUp())


def test_a_mistake_is_found_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'probe'"):
        run(tmp_path / "out", MadeUp(), methods="prob")
    assert not (tmp_path / "out").exists()


def test_two_comparisons_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    def before(asked: Run) -> None:
        with pytest.raises(OutputError, match="Another process is at work on the comparison"):
            run(tmp_path / "out", MadeUp())

    world = MadeUp(before=before)
    found = run(tmp_path / "out", world, methods="probe", seeds=1)
    assert len(found.results) == 1


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        run(tmp_path / "out", MadeUp())


def test_reasons_with_commas_and_newlines_survive_the_csv(tmp_path: Path) -> None:
    entry = ledger.Entry("full", Run(data="x", method="full"), "failed", 'a, "b"\nc')
    ledger.write_table(tmp_path / "results.csv", [entry])
    assert rows(tmp_path)[0]["reason"] == 'a, "b"\nc'


def test_a_real_comparison(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("headstart.training.job")
    out = tmp_path / "out"
    asked: dict[str, Any] = {
        "methods": "probe,full",
        "out": out,
        "seeds": 2,
        "epochs": 1,
        "model": "test_resnet",
        "img_size": 32,
    }
    weights = tmp_path / "weights.pth"
    import timm
    import torch

    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    found = compare(pictures, **asked, weights=str(weights))
    assert found.failed == []
    assert [len(row["seeds"]) for row in found.table] == [2, 2]
    before = found.verdict
    again = compare(pictures, **asked, weights=str(weights))
    assert again.verdict == before
    assert again.judgement == found.judgement
    said = again.best.predict(sorted(pictures.rglob("*.png"))[:2])
    assert len(said) == 2
