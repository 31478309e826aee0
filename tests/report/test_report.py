"""The report from files alone: what it says, what it survives, and how large and quick it is."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import ADVICE, FIGURES, everything, folder, more

from headstart import calibration
from headstart.cli import main
from headstart.errors import OutputError
from headstart.records import Recipe
from headstart.report import figures, insides, write
from headstart.report.evidence import Seen, read
from headstart.report.methods_section import paragraphs
from headstart.report.page import render

INSIDE = ("l2-sp", "delta", "hybrid-forward", "l2t-ww", "transtailor", "spottune", "adafilter")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("told"), ("probe", "full", *INSIDE))


@pytest.fixture(scope="module")
def page(compared: Path) -> str:
    """The page without Plotly and without markup's line ends."""
    return _own(write(compared).read_text(encoding="utf-8"))


def _own(text: str) -> str:
    return re.sub(r"<script>.*?</script>", "", text, flags=re.S)


def test_it_lies_in_the_folder_and_is_small_enough(compared: Path) -> None:
    path = write(compared)
    assert path == compared / "report.html"
    assert path.stat().st_size < 6e6
    assert sorted(each.name for each in compared.iterdir() if each.name.startswith(".report")) == []


def test_the_verdict_comes_first(page: str, compared: Path) -> None:
    verdict = json.loads((compared / "verdict.json").read_text())
    order = [
        page.index("<h1"),
        page.index(verdict["sentence"].split(":")[0]),
        page.index('id="methods"'),
        page.index('id="evidence"'),
        page.index('id="cost"'),
        page.index('id="errors"'),
        page.index('id="training"'),
        page.index('id="insides"'),
        page.index('id="data"'),
        page.index('id="again"'),
    ]
    assert order == sorted(order)


def test_what_the_leaders_accuracy_is_worth_is_said_of_the_leader(tmp_path: Path) -> None:
    out = folder(tmp_path, ("probe", "full"))
    verdict = json.loads((out / "verdict.json").read_text())
    taken = verdict["take"]["method"]
    other = next(name for name in ("probe", "full") if name != taken)

    def said(leader: str) -> str:
        luck = {"naive": 0.83, "corrected": {"mean": 0.81, "lo": 0.78, "hi": 0.84}, "candidates": 2}
        (out / "verdict.json").write_text(json.dumps(verdict | {"luck": luck | {"method": leader}}))
        return _own(write(out).read_text(encoding="utf-8")).replace("\N{NO-BREAK SPACE}", " ")

    for leader in (taken, other):
        text = said(leader)
        assert f"Of 2 methods {leader} is the best on the validation pictures: 83.0 % there." in text
        assert "81.0 % (78.0 to 84.0) is to be expected" in text
        assert (f"This is about {other}, and not about {taken}" in text) == (leader == other)
        assert "tuned on the same pictures" not in text
    with (out / "results.csv").open() as file:
        columns = file.readline().strip().split(",")
    row = ",".join({"role": "trial", "status": "finished"}.get(column, "") for column in columns)
    with (out / "results.csv").open("a") as file:
        file.write(f"{row}\n")
    tuned = "Hyper-parameters were tuned on the same pictures, and the luck of that is still in both numbers"
    for leader in (taken, other):
        assert re.search(rf"\.\s+{tuned}", said(leader)), "a sentence begins without a space before it"


def test_it_asks_for_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert not re.findall(r"@import|url\(", page)


def test_names_of_classes_are_text_and_nothing_else(page: str) -> None:
    assert "<img src=x" not in page
    assert "</script><script>document.title" not in page
    assert "&lt;img src=x onerror=" in page
    for spec in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.S):
        assert "<" not in spec
        assert "<img" not in "".join(str(each) for each in json.loads(spec)["data"])  # Plotly would read it


def test_every_method_has_its_own_picture(page: str) -> None:
    evidence_of = {
        "l2-sp": "How far each layer has moved",
        "delta": "Which channels are held",
        "hybrid-forward": "The loss of each way",
        "l2t-ww": "Which layers are matched",
        "transtailor": "Accuracy as the network is cut",
        "spottune": "the tuned copy of a block",
        "adafilter": "the tuned form of a layer",
    }
    for title in evidence_of.values():
        assert title in page
    assert "Channels kept, layer by layer" in page


def test_the_page_that_a_browser_draws_has_every_figure(tmp_path: Path) -> None:
    """Of a figure that this folder does not bring about, no browser would say that it cannot be drawn."""
    evidence = read(everything(tmp_path))
    assert evidence.taken is not None
    given = {"evidence": evidence, "taken": evidence.taken, "audit": evidence.audit, "sides": {}}
    ids = set()
    for name, draw in inspect.getmembers(figures, inspect.isfunction):
        signature = inspect.signature(draw)
        if name.startswith("_") or "Figure" not in str(signature.return_annotation):
            continue
        found = draw(*(given[each] for each in signature.parameters))
        ids |= {figure.id for figure in (found if isinstance(found, list) else [found])}
    for i, label in enumerate(evidence.labels):
        ids |= {figure.id for figure in insides.pictures(evidence.of(label)[0], f"inside-{i}")}
    assert {id.rpartition("-")[2] for id in ids if id.startswith("inside-")} == {
        *("distance", "channels", "losses", "pairs", "flops", "kept", "routes")
    }
    assert ids == FIGURES
    assert set(re.findall(r'id="plot-([^"]+)"', render(evidence))) == FIGURES


@pytest.mark.parametrize(
    ("accepted", "left", "narrowest"),
    [
        ((True, False), "after the last accepted one 80\N{NO-BREAK SPACE}% of the FLOPs", "keeps 88 % of"),
        ((True, True), "after the last accepted one 60\N{NO-BREAK SPACE}% of the FLOPs", "keeps 56 % of"),
        ((False, False), "none was accepted, so the network is whole", "so the network is whole"),
    ],
)
def test_what_is_left_is_what_the_last_accepted_round_left(
    compared: Path, accepted: tuple[bool, ...], left: str, narrowest: str
) -> None:
    run = next(run for run in read(compared).runs if run.label == "transtailor")
    rounds = [
        each | {"accepted": yes} for each, yes in zip(run.result.diagnostics["rounds"], accepted, strict=True)
    ]
    result = run.result.model_copy(update={"diagnostics": run.result.diagnostics | {"rounds": rounds}})
    flops, kept = insides.pictures(Seen(run.label, run.folder, result), "x")
    assert left in flops.says
    assert narrowest in kept.says


def test_what_a_method_left_in_another_shape_is_no_picture_and_no_error(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full", "delta", "spottune"), seeds=1)
    for name, left in (
        ("delta", {"taps": "none", "rounds": 3}),
        ("spottune", {"by_class": [[1, 2]], "blocks": []}),
    ):
        path = next((out / "runs").glob(f"{name}-*")) / "result.json"
        result = json.loads(path.read_text())
        path.write_text(
            json.dumps(result | {"diagnostics": left | {"over_time": [{"epoch": 1, "pairs": 4}]}})
        )
    evidence = read(out)
    assert [insides.pictures(run, "x") for run in evidence.runs] == [[], [], []]
    render(evidence)


def test_heat_maps_of_many_layers_take_neighbours_together() -> None:
    names = [f"block.{i}.{part}" for i in range(30) for part in ("conv", "norm")]
    found, table = insides._gathered(names, np.ones((60, 2)), distance=True)
    assert found == [f"block.{i}" for i in range(30)]
    assert table == pytest.approx(np.full((30, 2), 2**0.5))
    found, table = insides._gathered([f"l{i}" for i in range(100)], np.ones((100, 2)), distance=False)
    assert len(found) <= 48
    assert table == pytest.approx(1)


def test_the_confusion_matrix_and_the_errors_are_those_of_the_model_to_take(compared: Path) -> None:
    evidence = read(compared)
    taken = evidence.taken
    assert taken is not None
    assert taken.said is not None
    figure = figures.confusion(taken)
    assert figure is not None
    counts = np.array(figure.traces[0]["customdata"])
    assert counts.sum() == 80
    assert 80 - np.trace(counts) == taken.said.wrong.sum()
    recall = {row["name"]: row["recall"] for row in figures.per_class(taken)}
    assert recall["apple"] == pytest.approx(counts[0, 0] / counts[0].sum())


def test_the_calibration_figure_is_the_error_that_the_result_holds(compared: Path) -> None:
    taken = read(compared).taken
    assert taken is not None
    assert taken.said is not None
    error = calibration.bins(taken.said.probabilities, taken.said.labels).error
    figure = figures.reliability(taken)
    assert figure is not None
    assert f"{100 * error:.1f}" in figure.says


def test_many_classes_are_shown_as_those_that_are_confused(tmp_path: Path) -> None:
    out = folder(
        tmp_path, ("full",), seeds=1, n=400, classes=[f"class {i}" for i in range(60)], pictures=False
    )
    taken = read(out).taken
    assert taken is not None
    figure = figures.confusion(taken)
    assert figure is not None
    assert len(figure.traces[0]["x"]) == 30
    assert "Of 60 classes" in figure.note


def test_the_worst_errors_come_with_their_pictures(page: str, compared: Path) -> None:
    assert page.count("data:image/jpeg;base64,") > 5
    assert "missed by" in page


def test_pictures_that_are_gone_leave_a_word(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full", "probe"), pictures=False)
    assert "The picture is not where it was." in write(out).read_text(encoding="utf-8")


def test_what_is_pasted_names_methods_statistics_and_versions(page: str) -> None:
    pasted = re.sub(r"\s+", " ", page[page.index('id="paste"') :])
    assert (
        "We fine-tuned tiny at 32 pixels on 240 training images of 4 classes with probe (Kornblith" in pasted
    )
    assert "2 random stratified splits (training 60%, validation 20%, test 20%" in pasted
    assert "Bayesian bootstrap" in pasted
    assert "headstart 0.1.0, torch 2.15.0, timm 1.0.31" in pasted


def test_a_method_with_another_optimiser_is_named(tmp_path: Path) -> None:
    out = folder(tmp_path, ("l2t-ww", "full", "probe"))
    evidence = read(out)
    for seen in evidence.runs:
        own = "sgd" if seen.label == "l2t-ww" else "adamw"
        recipe = Recipe(optimizer=own, lr=0.01, weight_decay=1e-4)
        object.__setattr__(seen, "result", seen.result.model_copy(update={"recipe": recipe}))
    setup = paragraphs(evidence)[0]
    assert "with AdamW (learning rate" in setup
    assert "unless the method prescribes otherwise; l2t-ww with SGD. Models were" in setup


def test_a_learning_curve_an_audit_and_tuning_are_shown_where_they_are(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full", "probe"))
    more(out, ("full", "probe"))
    text = _own(write(out).read_text(encoding="utf-8"))
    for words in (
        ADVICE,
        "88 readable of 90",
        "1: bad.png",
        "1 groups",
        "One class is small.",
        "tuning of full",
    ):
        assert words in text
    figure = figures.search(read(out))
    assert figure is not None
    assert figure.traces[0]["y"] == [70.5, 72.5, 74.5, 74.5]  # what failed leaves the best where it was
    assert figure.rows[0] == ["full", 0, 4, 12.0, "lr 0.006", "74.0\N{NO-BREAK SPACE}%"]


def test_what_is_pasted_of_tuning_is_what_was_done(tmp_path: Path) -> None:
    methods = ("full", "probe", "l2-sp", "delta")
    out = folder(tmp_path, methods)
    more(out, methods)
    evidence = read(out)
    # No one uses the rate of probe, which takes no steps.
    for i, seen in enumerate(evidence.runs):
        lr = 0.5 if seen.label == "probe" else 0.002 * (i + 1)
        recipe = Recipe(optimizer="sgd", lr=lr, weight_decay=1e-4)
        object.__setattr__(seen, "result", seen.result.model_copy(update={"recipe": recipe}))
    setup, tuning, _ = paragraphs(evidence)
    rates = sorted({seen.result.recipe.lr for seen in evidence.runs if seen.label != "probe"})  # type: ignore[union-attr]
    assert f"SGD (learning rate tuned, {rates[0]:g} to {rates[-1]:g}, weight decay 0.0001, cosine" in setup
    assert tuning == (
        "Hyper-parameters were tuned on validation accuracy, with an equal budget for every method, the "
        "baseline included: 4 trials per split. Learning rate and weight decay were searched from 0.1 to 10 "
        "times the recipe's, alike for all methods but probe. The first trial was each method as it is, the "
        "second of l2-sp the method turned off."
    )
    assert "<dt>recipe of " in render(evidence)


@pytest.mark.parametrize(
    ("asked", "sizes", "words"),
    [
        ({"trials": 1}, [None], "1 trial per split"),
        ({"trials": 4}, [60, None], "4 trials per split and number of labels"),
        (
            {"budget_seconds": 7200.0},
            [None],
            "7,200 seconds in all, in equal shares for every split",
        ),
        (
            {"budget_seconds": 90.0, "trials": 8},
            [60, None],
            "8 trials per split and number of labels or 90 seconds in all, in equal shares for every split "
            "and number of labels, whichever ended first",
        ),
    ],
)
def test_the_budget_is_told_as_it_was_shared_out(
    compared: Path, asked: dict[str, Any], sizes: list[Any], words: str
) -> None:
    evidence = read(compared)
    evidence.asked = evidence.asked | {"tuning": asked, "train_sizes": sizes}
    text = paragraphs(evidence)[1]
    assert f"an equal budget for every method, the baseline included: {words}." in text
    assert "turned off" not in text  # nothing is written down of what was tried
    assert "searched" not in text


def test_tuned_rates_are_a_range_also_where_the_spaces_are_lost(compared: Path) -> None:
    evidence = read(compared)
    for i, seen in enumerate(evidence.runs):
        lr = 0.01 * (i + 1)
        update = {"recipe": Recipe(optimizer="sgd", lr=lr, weight_decay=0.0)}
        run = seen.result.run if i == 0 else seen.result.run.model_copy(update={"lr": lr})
        object.__setattr__(seen, "result", seen.result.model_copy(update=update | {"run": run}))
    most = 0.01 * len(evidence.runs)
    assert f"(learning rate tuned, 0.01 to {most:g}, weight decay 0, " in paragraphs(evidence)[0]


def test_a_rate_that_a_preset_brings_is_not_everyones(compared: Path) -> None:
    evidence = read(compared)
    first = evidence.runs[0]
    recipe = Recipe(optimizer="sgd", lr=0.5, weight_decay=1e-4)
    object.__setattr__(first, "result", first.result.model_copy(update={"recipe": recipe}))
    assert "(learning rate 0.01, weight decay 0.0001, " in paragraphs(evidence)[0]


def test_label_budgets_are_curves_and_their_runs_are_not_mixed_with_those_of_the_verdict(
    tmp_path: Path,
) -> None:
    out = folder(tmp_path, ("full", "probe"))
    verdict = json.loads((out / "verdict.json").read_text())
    few = json.loads(json.dumps(verdict))
    for row in few["rows"]:
        row["learnt_from"] = 60
    (out / "sizes.json").write_text(
        json.dumps([{"train_size": 60, "verdict": few}, {"train_size": None, "verdict": verdict}])
    )
    with (out / "results.csv").open("a") as file:
        file.write(",".join(["full", "", "9", "finished"]) + ",\n")  # a run that the verdict does not name
    evidence = read(out)
    assert len(evidence.runs) == 4
    figure = figures.learning_curve(evidence)
    assert figure is not None
    assert [trace["x"] for trace in figure.traces] == [[60, 240], [60, 240]]
    (out / "sizes.json").write_text("[3")
    assert read(out).unreadable == ["sizes.json"]


def test_one_seed_and_a_small_test_split_are_said_before_everything(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full", "probe"), seeds=1, n=20)
    text = _own(write(out).read_text(encoding="utf-8"))
    assert text.index("One seed: what another seed or split would have changed") < text.index(
        'class="sentence"'
    )
    assert text.index("too small to show most differences") < text.index('class="sentence"')
    assert "no claim" in text
    assert "exact McNemar" in text
    assert 'id="figure-differences"' not in text
    verdict = json.loads((out / "verdict.json").read_text())
    (out / "sizes.json").write_text(json.dumps([{"train_size": None, "verdict": verdict}]))
    figure = figures.learning_curve(read(out))
    assert figure is not None and {row[-1] for row in figure.rows} == {"not measured"}


@pytest.mark.parametrize("cut", [0, 40])
def test_files_cut_in_half_are_named_at_the_top_and_the_rest_is_shown(tmp_path: Path, cut: int) -> None:
    out = folder(tmp_path, ("full", "probe", "l2-sp"))
    runs = sorted((out / "runs").iterdir())
    for name, run in (("result.json", runs[0]), ("predictions.npz", runs[1]), ("metrics.jsonl", runs[2])):
        path = run / name
        path.write_bytes(path.read_bytes()[:cut])
    for name in ("split.csv", "metrics.jsonl"):
        (runs[4] / name).unlink(missing_ok=True)
    for name in ("compare.json", "curve.json", "audit.json"):
        (out / name).write_text('{"half": ')
    text = _own(write(out).read_text(encoding="utf-8"))
    assert "4 files cut off or gone (" in text
    assert f"runs/{runs[0].name}/result.json" in text
    assert 'id="figure-cost"' in text


def test_without_a_table_of_runs_the_verdict_is_still_shown(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full", "probe"))
    (out / "results.csv").unlink()
    text = _own(write(out).read_text(encoding="utf-8"))
    assert "results.csv" in text
    assert "<h1" in text


def test_nothing_finished_yet(tmp_path: Path) -> None:
    out = folder(tmp_path, ("full",), seeds=1)
    verdict = {
        "sentence": "No run has finished yet.",
        "rows": [{"method": "full", "seeds": []}],
        "pending": 2,
    }
    (out / "verdict.json").write_text(json.dumps(verdict))
    (out / "results.csv").write_text("method,status,folder\nfull,pending,\n")
    text = _own(write(out).read_text(encoding="utf-8"))
    assert "Nothing to take yet" in text
    assert "2 runs still to come" in text


def test_mistakes_of_a_person_are_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError, match="holds no comparison"):
        write(tmp_path)
    out = folder(tmp_path, ("full",), seeds=1)
    with pytest.raises(OutputError, match="is a folder"):
        write(out, tmp_path)
    (out / "verdict.json").write_text('{"sentence": ')
    assert main(["report", str(out)]) == 1
    assert "cut off or of another version" in capsys.readouterr().err
    assert main(["report", str(out), str(out), "--out", "x.html"]) == 1


def test_the_command_writes_it_and_tests_over_several_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [
        folder(
            tmp_path / str(i),
            ("full", "l2-sp"),
            seeds=1,
            n=200,
            right={"full": 0.6, "l2-sp": 0.7 + i / 50},
            pictures=False,
        )
        for i in range(2)
    ]
    assert main(["report", str(outs[0]), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    capsys.readouterr()
    assert main(["report", *map(str, outs)]) == 0
    said = capsys.readouterr().out
    assert said.count("Report:") == 2
    assert "Over 2 data sets" in said
    assert "Fewer than six data sets can never reach" in said
    assert main(["report", *map(str, outs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["over_sets"][0]["method"] == "l2-sp"
    assert found["over_sets"][0]["wins"] == 2


def test_it_needs_no_torch(compared: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from headstart.cli import main; "
        f"code = main(['report', {str(compared)!r}, '--out', {str(tmp_path / 'p.html')!r}]); "
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_same_files_give_the_same_page(compared: Path, tmp_path: Path) -> None:
    one, two = (write(compared, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert one == two
