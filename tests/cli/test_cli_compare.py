"""`headstart compare` and `headstart predict`, one after the other as a person would."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from typed import Ended, Typed, save_tiny_net, typing

from headstart.cli.compare import _numbers, show
from headstart.comparison.ledger import Entry
from headstart.comparison.runner import Comparison
from headstart.comparison.verdict import judge
from headstart.errors import ConfigError
from headstart.records import Run

SMALL = ("--img-size", 32, "--epochs", 1, "--device", "cpu")


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_net(tmp_path_factory.mktemp("net"))


def lines(ended: Ended) -> list[str]:
    return ended.out.splitlines()


def test_compare_then_predict(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    asked = ("compare", pictures, "--model", net, "--out", out, "--methods", "probe,full", *SMALL)
    ended = typed(*asked, "--seeds", 2)
    assert ended.code == 0, ended.err
    said = lines(ended)
    assert said[0].startswith("method") and "against full, 95 %" in said[0]
    assert [line.split()[0] for line in said[1:3]] == ["probe", "full"]
    assert "baseline" in said[2]
    verdict = json.loads((out / "verdict.json").read_text())
    assert f"Verdict:   {verdict['sentence']}" in said
    assert f"Next:      headstart predict {out} PICTURES" in said
    assert (out / "config.resolved.yaml").is_file() and (out / "results.csv").is_file()

    # Again, out of the file beside it: nothing is trained, and stdout is JSON alone.
    ended = typed("compare", "--config", out / "config.resolved.yaml", "--out", out, "--json")
    assert ended.code == 0, ended.err
    assert "epoch" not in ended.err
    record = json.loads(ended.out)
    assert record["sentence"] == verdict["sentence"]
    assert record["folder"] == str(out)

    (pictures / "class_a" / "broken.jpg").write_text("no")
    broken, whole = pictures / "class_a" / "broken.jpg", pictures / "class_b" / "000.png"

    ended = typed("predict", out, whole, broken, tmp_path / "nowhere.png", "--top", 2)
    assert ended.code == 0
    said = lines(ended)
    assert said[0].startswith(str(whole)) and said[0].count("class_") == 3
    assert "cannot be read" in said[1] and "cannot be read" in said[2]
    assert ended.err == "headstart: 2 of 3 could not be read.\n"

    ended = typed("predict", out, pictures, "--format", "csv", "--top", 9)
    table = list(csv.DictReader(io.StringIO(ended.out)))
    assert len(table) == 37
    assert list(table[0])[:5] == ["path", "label", "probability", "label_2", "probability_2"]
    good = [row for row in table if not row["error"]]
    assert len(good) == 36
    assert all(
        abs(sum(float(row[k]) for k in ("probability", "probability_2", "probability_3")) - 1) < 1e-4
        for row in good
    )

    run = out / "runs" / verdict["take"]["run"].removeprefix("runs/")
    ended = typed("predict", run, whole, broken, "--format", "jsonl")
    records = [json.loads(line) for line in lines(ended)]
    assert [record["path"] for record in records] == [str(whole), str(broken)]
    assert list(records[0]["probabilities"]) == [records[0]["label"]]
    assert records[1]["label"] is None and records[1]["error"]
    assert lines(typed("predict", run / "model", whole, "--format", "jsonl"))[0] == lines(ended)[0]

    ended = typed("predict", out, broken)
    assert ended.code == 1
    assert ended.err == "headstart: 1 of 1 could not be read.\n"
    assert "Did you mean 'jsonl'" in typed("predict", out, whole, "--format", "json").refusal


def test_a_failed_run_is_a_row_and_2(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    # The rate of the head alone explodes, and only full has it.
    asked = (
        "compare",
        pictures,
        "--model",
        net,
        "--out",
        tmp_path / "out",
        "--methods",
        "probe,full",
        *SMALL,
    )
    ended = typed(*asked, "--seeds", 1, "--epochs", 3, "--set", "full.head_lr=1e30", "--warmup", 0)
    assert ended.code == 2, ended.err
    row = next(line for line in lines(ended) if line.startswith("full "))
    assert "1 failed" in row
    assert any(line.startswith("full, seed 0: ") and "no numbers any more" in line for line in lines(ended))
    assert "probe" in next(line for line in lines(ended) if line.startswith("Verdict:"))


def test_a_method_that_was_skipped_is_a_line_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(data="pictures", method="spottune")
    reason = "spottune cannot run here: no blocks."
    entries = [Entry("spottune", run, status="skipped", reason=reason) for _ in range(2)]
    found = judge(entries, labels=["spottune"], baseline="spottune")
    show(Comparison(Path("compared"), found, [], [], []))
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["spottune", "0,", "2", "skipped"]
    assert said[2] == f"spottune, skipped: {reason}"


def test_a_bare_hyper_parameter_goes_to_all_that_have_it(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("compare", pictures, "--model", net, "--out", out, *SMALL, "--methods", "probe,full,l2-sp")
    ended = typed(*asked, "--seeds", "4,", "--set", "head_lr=3", "--set", "l2-sp.head_lr=5", "--json")
    assert ended.code == 0, ended.err
    results = [json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")]
    assert {r["method"]: r["hyper"].get("head_lr") for r in results} == {
        "probe": None,
        "full": 3,
        "l2-sp": 5,
    }
    assert {r["seed"] for r in results} == {4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--methods", "full,l2sp"), "Did you mean 'l2-sp'?"),
        (("--methods", "l2-sp:papr"), "Did you mean 'paper'?"),
        (("--methods", ","), "No method"),
        (("--seeds", "0"), "seeds"),
        (("--seeds", "x"), "Got 'x'"),
        (("--seeds", "1,-2"), "seeds"),
        (("--set", "seed=3"), "Use --seeds"),
        (("--set", "method=full"), "Use --methods"),
        (("--set", "l2-sp.alpa=1"), "Did you mean 'alpha'?"),
        (("--set", "nix.alpha=1"), "nix"),
        (("--set", "alpa=1"), "Did you mean 'alpha'?"),
        (("--set", "epoch=1"), "Did you mean 'epochs'?"),
        (("--baseline", "ful"), "Did you mean 'full'?"),
    ],
)
def test_what_was_asked_cannot_be(
    typed: Typed, pictures: Path, tmp_path: Path, words: tuple[Any, ...], said: str
) -> None:
    assert said in typed("compare", pictures, "--out", tmp_path / "out", *SMALL, *words).refusal
    assert not (tmp_path / "out").exists()


def test_something_has_to_be_given(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    assert "Which pictures?" in typed("compare", "--out", "x").refusal
    assert "--out" in typed("compare", pictures).refusal
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    assert "holds something else" in typed("compare", pictures, "--out", tmp_path / "out").refusal


def test_nothing_to_predict_with(typed: Typed, pictures: Path, tmp_path: Path) -> None:
    assert "There is no folder" in typed("predict", tmp_path / "nowhere", pictures).refusal
    assert "holds no model" in typed("predict", pictures, pictures).refusal


def test_seeds() -> None:
    assert [_numbers("seeds", given) for given in (3, "3", "0,4", "7,", [1, 2])] == [
        3,
        3,
        [0, 4],
        [7],
        [1, 2],
    ]
    with pytest.raises(ConfigError):
        _numbers("seeds", None)


@pytest.mark.slow
def test_everything_at_once(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    """Searched, on two splits, with fewer labels too, and a curve; then the same line trains nothing."""
    out = tmp_path / "compared"
    asked = ("compare", pictures, "--model", net, "--out", out, "--methods", "probe,full", *SMALL)
    more = ("--splits", 2, "--seeds", 1, "--trials", 2, "--train-size", "6,all", "--learning-curve")
    ended = typed(*asked, *more)
    assert ended.code == 0, ended.err
    assert "runs done;" in ended.err and "leads on val:" in ended.err
    told = json.loads((out / "compare.json").read_text())
    assert (told["splits"], told["train_sizes"], told["trials"]) == ([0, 1], [6, None], 2)
    assert told["command"].startswith("headstart ")
    studies = json.loads((out / "search.json").read_text())["studies"]
    assert len(studies) == 8  # two methods, two splits, two sizes
    assert {len(study["trials"]) for study in studies} == {2}
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["role"] for row in rows} == {"run", "trial", "curve"}
    assert {row["status"] for row in rows} == {"finished"}
    assert not any(row["test_accuracy"] for row in rows if row["role"] == "trial")
    models = [path.parent.name for path in out.glob("runs/*/model")]
    assert len(models) == sum(row["role"] != "trial" for row in rows)
    curve = json.loads((out / "curve.json").read_text())
    assert curve["advice"] in ended.out
    before = (out / "results.csv").read_text()
    ended = typed(*asked, *more)
    assert "epoch" not in ended.err
    assert (out / "results.csv").read_text() == before
    ended = typed("compare", "--config", out / "config.resolved.yaml", "--out", out)
    assert ended.code == 0, ended.err
    assert (out / "results.csv").read_text() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--trials", 0), "trials is how many"),
        (("--budget", "soon"), "such as 90s"),
        (("--jobs", 0), "jobs is how many"),
        (("--on", "slurm"), "on is 'ray'"),
        (("--splits", "some"), "splits takes a number"),
        (("--train-size", "few"), "train_sizes are numbers"),
        (("--track", "wanbd"), "Did you mean 'wandb'"),
        (("--set", "trial=true"), "Use --trials"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(
    typed: Typed, pictures: Path, tmp_path: Path, more: tuple[Any, ...], said: str
) -> None:
    ended = typed("compare", pictures, "--out", tmp_path / "out", "--methods", "full", *more)
    assert ended.code == 1
    assert said in ended.err and "Traceback" not in ended.err
