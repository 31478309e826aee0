"""A run from pictures on disk to a model that predicts, on a tiny network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import headstart
from headstart.errors import ConfigError, DataError, HeadstartError, OutputError, TrainingError
from headstart.records import Result, Run
from headstart.training.events import Reporter
from headstart.training.folder import claimed
from headstart.training.job import Prepared, build, execute, prepare


def asked(pictures: Path, model: Path, **fields: Any) -> dict[str, Any]:
    return {"data": str(pictures), "model": str(model), "epochs": 2, "batch_size": 8} | fields


def train(pictures: Path, model: Path, out: Path, **fields: Any) -> headstart.training.job.Trained:  # type: ignore[name-defined]
    given = asked(pictures, model, **fields)
    return headstart.train(given.pop("data"), out=out, **given)


@pytest.mark.parametrize("method", ["scratch", "probe", "full", "lp-ft", "l2-sp"])
def test_every_method_leaves_a_result_and_a_model_that_says_the_same(
    method: str, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    trained = train(pictures, tiny_model, out, method=method)
    result = Result.read(out / "result.json")
    assert result == trained.result
    assert result.status == "finished" and result.method == method
    assert result.val is not None and result.test is not None and result.parameters is not None
    assert result.test.n == len(np.load(out / "predictions.npz")["test_labels"])
    assert result.seconds > 0 and result.phases and result.fingerprints is not None
    assert result.peak_memory_mb is not None and result.peak_memory_mb > 50
    assert result.recipe is not None and result.recipe.norm == "eval"
    assert result.flops is not None and result.flops > 1e6 and result.n_train == 21
    assert result.device is not None and result.device.startswith("cpu, ")
    assert set(result.versions) >= {"headstart", "torch", "timm", "python"}
    if method == "probe":
        assert result.parameters.trained < 0.05 * result.parameters.shipped
    else:
        assert result.parameters.trained == result.parameters.shipped

    # What the saved model says of the test files is what was scored.
    kept = np.load(out / "predictions.npz")
    rows = [line.split(",") for line in (out / "split.csv").read_text().splitlines()[1:]]
    paths = [pictures / row[0] for row in rows if row[2] == "test"]
    # The saved model is calibrated: its temperature lies between what was scored and what it says.
    calibration = headstart.load(out).calibration
    assert calibration.val is not None and calibration.val.n == result.val.n
    calibrated = calibration.probabilities(np.log(kept["test_probabilities"]))
    by_hash = dict(zip(kept["test_hashes"], calibrated, strict=True))
    hashes = {row[0]: row[3] for row in rows}
    for said in trained.predict(list(paths)):
        expected = by_hash[hashes[str(Path(said.path).relative_to(pictures))]]
        got = [said.probabilities[name] for name in result.classes]
        assert got == pytest.approx(expected, abs=1e-4)
    assert not (out / "last.pt").exists()


def test_a_finished_run_is_not_run_again(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    first = train(pictures, tiny_model, tmp_path / "run")
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    again = train(pictures, tiny_model, tmp_path / "run")
    assert again.result == first.result
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == stamp


def test_another_run_in_the_folder_is_refused_unless_told(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    train(pictures, tiny_model, tmp_path / "run", method="probe")
    with pytest.raises(OutputError, match=r"holds another run.*--overwrite"):
        train(pictures, tiny_model, tmp_path / "run", method="full")
    replaced = train(pictures, tiny_model, tmp_path / "run", method="full", overwrite=True)
    assert replaced.result.method == "full"


def test_a_folder_with_something_else_is_left_alone(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds something else \(thesis.tex\)"):
            train(pictures, tiny_model, out, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_out_that_is_a_file_is_said_so(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used for the run"):
        train(pictures, tiny_model, tmp_path / "file")


def test_the_key_is_of_what_was_asked_and_not_of_where(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def key(where: Path = pictures, **fields: Any) -> str:
        return prepare(Run.asked(**asked(where, tiny_model, **fields)), say=lambda _: None).key

    first = key()
    pictures.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert key(moved) == first
    assert key(moved, device="cpu", workers=1) == first
    different = {key(moved, **each) for each in [{"epochs": 3}, {"method": "full"}, {"seed": 1}, {"lr": 0.5}]}
    assert len(different | {first}) == 5
    Image.new("RGB", (40, 40), "red").save(moved / "class_a" / "new.png")
    assert key(moved) != first


def test_hyper_parameters_and_presets_reach_the_run(pictures: Path, tiny_model: Path) -> None:
    def prepared(**fields: Any) -> Prepared:
        return prepare(Run.asked(**asked(pictures, tiny_model, method="l2-sp", **fields)), say=lambda _: None)

    assert prepared(hyper={"alpha": 0.5}).hyper["alpha"] == 0.5
    run = Run.asked(data=str(pictures), model=str(tiny_model), method="l2-sp", preset="paper")
    paper = prepare(run, say=lambda _: None)
    assert paper.batch_size == 64 and paper.recipe.nesterov is False and paper.recipe.schedule == "step"
    mine = prepared(preset="paper", lr=0.3)  # what a person asks for overrules the preset
    assert mine.recipe.lr == 0.3 and mine.batch_size == 8
    with pytest.raises(ConfigError, match=r"hyper-parameter of 'l2-sp' 'alhpa'. Did you mean 'alpha'"):
        prepared(hyper={"alhpa": 1})
    with pytest.raises(ConfigError, match="does not fit"):
        prepared(hyper={"params": "some"})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"method": "delat"}, "Unknown method"),
        ({"methodd": "full"}, "Unknown key 'methodd'. Did you mean 'method'"),
        ({"epochs": 0}, "epochs"),
        ({"lr": "fast"}, "lr"),
        ({"batch_size": 1, "norm": "train"}, "no statistics of a single picture"),
        ({"batch_size": 4, "grad_accum": 8}, "cuts a batch of 4 into nothing"),
        ({"device": "abacus"}, "Unknown device"),
        ({"augment": "wild"}, "augment"),
        ({"split": (0.5, 0.5, 0.5)}, "add up to 1"),
    ],
)
def test_bad_input_is_said_in_a_line_or_two(
    fields: dict[str, Any], match: str, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(HeadstartError, match=match) as caught:
        train(pictures, tiny_model, tmp_path / "run", **fields)
    assert len(str(caught.value).splitlines()) <= 2


def test_batches_of_one_work_where_the_statistics_are_kept(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    result = train(
        pictures, tiny_model, tmp_path / "run", method="full", batch_size=1, epochs=1, lr=1e-4
    ).result
    assert result.status == "finished"


def test_a_loss_that_is_not_a_number_is_a_failed_run_with_its_reason(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"The loss became (nan|inf).*epoch \d+, step \d+"):
        train(pictures, tiny_model, tmp_path / "run", method="full", lr=1e30, epochs=3)
    failed = Result.read(tmp_path / "run" / "result.json")
    assert failed.status == "failed" and "loss became" in str(failed.reason)


def test_broken_pictures_are_skipped_and_all_of_them_is_an_error(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (pictures / "class_a" / "000.png").write_bytes(b"no picture")
    told: list[str] = []

    class Listening(Reporter):
        def say(self, text: str) -> None:
            told.append(text)

    train(pictures, tiny_model, tmp_path / "run", method="probe", reporter=Listening())
    assert any("000.png" in text for text in told)
    with pytest.raises(DataError, match=r"000\.png"):
        train(pictures, tiny_model, tmp_path / "strict", method="probe", strict=True)
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError):
        train(pictures, tiny_model, tmp_path / "none", method="probe")


def test_class_weights_and_mixing_and_averaging_train(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    result = train(
        pictures,
        tiny_model,
        tmp_path / "run",
        class_weights="auto",
        mixup=0.2,
        cutmix=1.0,
        ema=0.0,
        grad_accum=2,
        augment="trivial",
        patience=2,
        precision="bf16",
    ).result
    assert result.status == "finished" and result.recipe is not None and result.recipe.ema == 0.0
    assert result.kept is not None and result.kept.startswith("best")


def test_runs_of_one_seed_share_pictures_and_network(pictures: Path, tiny_model: Path) -> None:
    first = prepare(Run.asked(**asked(pictures, tiny_model)), say=lambda _: None)
    same = prepare(Run.asked(**asked(pictures, tiny_model, method="full")), share=first, say=lambda _: None)
    assert same.task is first.task and same.pretrained is first.pretrained
    other = prepare(Run.asked(**asked(pictures, tiny_model, seed=1)), share=first, say=lambda _: None)
    assert other.task is not first.task and other.pretrained is first.pretrained
    assert same.fingerprints == first.fingerprints != other.fingerprints


def test_training_leaves_the_shared_network_as_it_was(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    prepared = prepare(Run.asked(**asked(pictures, tiny_model, method="full")), say=lambda _: None)
    before = {name: value.clone() for name, value in prepared.pretrained.net.state_dict().items()}
    execute(prepared, tmp_path / "run")
    for name, value in prepared.pretrained.net.state_dict().items():
        assert torch.equal(value, before[name])


def test_claim_tells_an_unfinished_run_from_a_finished_one(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    prepared = prepare(Run.asked(**asked(pictures, tiny_model)), say=lambda _: None)
    folder, key = tmp_path / "run", prepared.key

    def claim(*, resume: bool) -> Result | None:
        with claimed(folder, key, {}, resume=resume, overwrite=False) as finished:
            return finished

    assert claim(resume=False) is None
    with pytest.raises(OutputError, match=r"unfinished. Go on with --resume"):
        claim(resume=False)
    assert claim(resume=True) is None


def test_a_claim_that_was_cut_short_and_a_model_of_another_run_are_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".run.json.4711").write_text("{")
    (folder / "error.txt").write_text("")
    with claimed(folder, "one", {}, resume=False, overwrite=False) as finished:
        assert finished is None
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    with claimed(folder, "two", {}, resume=False, overwrite=True) as finished:
        assert finished is None
    assert not (folder / "model").exists()
    assert json.loads((folder / "run.json").read_text())["key"] == "two"


def test_a_run_that_another_process_works_on_is_left_to_it(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    class Other(Reporter):
        """The same run asked for once more, and another one over it, while the first is at work."""

        said: ClassVar[list[str]] = []

        def epoch(self, record: dict[str, Any]) -> None:
            for more in ({}, {"overwrite": True}, {"seed": 1, "overwrite": True}):
                with pytest.raises(OutputError) as caught:
                    train(pictures, tiny_model, tmp_path / "run", method="full", **more)
                self.said.append(str(caught.value))

    result = train(pictures, tiny_model, tmp_path / "run", method="full", epochs=1, reporter=Other()).result
    assert result.status == "finished"
    assert Other.said == [
        f"Another process is at work on the run in {tmp_path / 'run'}. Wait for it, or give another --out."
    ] * len(Other.said)
    assert len(Other.said) == 3


def test_the_key_is_of_what_a_file_of_class_weights_says(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def key(weight: float) -> str:
        file = tmp_path / "weights.yaml"
        file.write_text(f"class_a: {weight}")
        run = Run.asked(**asked(pictures, tiny_model, class_weights=str(file)))
        return prepare(run, say=lambda _: None).key

    assert key(2.0) == key(2.0) != key(3.0)


def test_a_full_disk_does_not_hide_why_a_run_failed(
    pictures: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("result.json could not be written: No space left on device.")

    monkeypatch.setattr("headstart.training.job._leave", full)
    with pytest.raises(TrainingError, match="Try a lower --lr"):
        train(pictures, tiny_model, tmp_path / "run", method="full", lr=1e30, optimizer="sgd")


def test_file_names_that_are_no_utf8_train_and_predict(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    old = pictures / "class_a" / "000.png"
    new = pictures / "class_a" / os.fsdecode(b"\xe9t\xe9.png")
    try:
        old.rename(new)
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    out = tmp_path / "run"
    trained = train(pictures, tiny_model, out, method="probe")
    old_archive = pictures.rename(tmp_path / os.fsdecode(b"\xe9t\xe9"))
    assert train(old_archive, tiny_model, tmp_path / "again", method="probe").result.status == "finished"
    assert Result.read(tmp_path / "again" / "result.json").run.data == str(old_archive)
    new = old_archive / "class_a" / new.name
    assert b"class_a/\xe9t\xe9.png,class_a," in (out / "split.csv").read_bytes()
    assert trained.predict(new)[0].label is not None


SCRIPT = """
import sys, headstart
from headstart.training.events import Lines
data, model, out = sys.argv[1:]
headstart.train(data, out=out, model=model, method="lp-ft", epochs=6, batch_size=8, ema=0.5,
    channels_last=True, reporter=Lines())
"""


@pytest.mark.slow
def test_killed_hard_and_resumed_is_bit_equal(pictures: Path, tiny_model: Path, tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(pictures), str(tiny_model), str(out)]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    straight = start(tmp_path / "straight")
    killed = start(tmp_path / "killed")
    assert killed.stderr is not None
    for line in killed.stderr:  # in the middle of the work, just after some epoch
        if "epoch 3/6" in line:
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert straight.communicate()[0] is None and straight.returncode == 0
    assert (tmp_path / "killed" / "last.pt").exists()
    resumed = start(tmp_path / "killed")
    said = resumed.communicate()[1]
    assert resumed.returncode == 0, said
    assert "resumed after epoch" in said
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "killed")]
    histories = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in each] for each in lines]
    assert histories[0] == histories[1]


def test_interrupted_by_a_person_leaves_a_run_that_goes_on(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    class Stop(Reporter):
        def epoch(self, record: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pictures, tiny_model, tmp_path / "run", reporter=Stop(), epochs=3)
    assert (tmp_path / "run" / "last.pt").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    started = time.perf_counter()
    assert train(pictures, tiny_model, tmp_path / "run", epochs=3).result.epochs == 3
    assert time.perf_counter() - started < 600


def test_a_method_that_foresees_one_optimiser_gets_it_with_its_rate(pictures: Path) -> None:
    """The family of the default network has AdamW, which l2t-ww cannot foresee: nobody has to know that."""
    given = asked(pictures, Path("efficientnet-lite0"), img_size=64)
    said: list[str] = []
    recipes = {
        name: prepare(Run.asked(**given, method=method, **fields), say=said.append).recipe
        for name, method, fields in (
            ("full", "full", {}),
            ("l2t-ww", "l2t-ww", {}),
            ("asked", "l2t-ww", {"optimizer": "adamw"}),
            ("preset", "l2t-ww", {"preset": "paper"}),
            ("clipped", "l2t-ww", {"clip": 2.0}),
        )
    }
    assert recipes["clipped"].clip == 2.0
    assert (recipes["full"].optimizer, recipes["full"].lr) == ("adamw", 3e-4)
    assert (recipes["l2t-ww"].optimizer, recipes["l2t-ww"].lr) == ("sgd", 0.003)
    assert (recipes["asked"].optimizer, recipes["asked"].lr) == ("adamw", 3e-4)  # refused when it begins
    assert (recipes["preset"].optimizer, recipes["preset"].lr) == ("sgd", 0.1)
    assert sum("foresees the steps of sgd" in line for line in said) == 2  # where none was named


def test_a_source_of_another_kind_sees_the_same_pictures_its_own_way(
    pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Another architecture, made for 64 pixels and other colours, is loaded at the run's size and viewed."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(1)
    net = timm.create_model("test_efficientnet", num_classes=5)
    config = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    save_for_hf(net, tmp_path / "other", model_config={"pretrained_cfg": config}, safe_serialization=True)
    given = asked(pictures, tiny_model, method="l2t-ww", source=str(tmp_path / "other"), epochs=1)
    prepared = prepare(Run.asked(**given), say=lambda _: None)
    assert prepared.source is not None
    assert prepared.source.preprocess.size == prepared.pretrained.preprocess.size == 32
    method = build(prepared)
    x = torch.randn(2, 3, 32, 32)
    own = (x * 0.25 + 0.5 - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) / 0.2
    torch.testing.assert_close(method.source.view(x), own)
    torch.testing.assert_close(method.source(x), net.eval()(own))
    said: list[str] = []

    class Heard(Reporter):
        def say(self, text: str) -> None:
            said.append(text)

    result = execute(prepared, tmp_path / "run", reporter=Heard())
    assert result.status == "finished" and result.fingerprints is not None
    assert result.fingerprints.other is not None
    assert sum("pairs of layers and looks 2 steps ahead" in line for line in said) == 1


def test_random_weights_are_the_seeds_and_every_methods_alike(pictures: Path, tiny_model: Path) -> None:
    def prepared(**fields: Any) -> Prepared:
        given = asked(pictures, tiny_model, weights="random", **fields)
        return prepare(Run.asked(**given), say=lambda _: None)

    first = prepared(method="full")
    assert first.recipe.norm == "train" and first.recipe.lr == pytest.approx(0.03)
    assert prepared(method="l2-sp").fingerprints.source == first.fingerprints.source
    start = build(first).net.state_dict()
    for key, value in build(prepared(method="scratch")).net.state_dict().items():
        assert torch.equal(value, start[key]), key
    assert prepared(method="full", seed=1).fingerprints.source != first.fingerprints.source
    shared = prepare(
        Run.asked(**asked(pictures, tiny_model, weights="random", method="full", seed=1)),
        share=first,
        say=lambda _: None,
    )
    assert shared.fingerprints.source == prepared(method="full", seed=1).fingerprints.source
    assert prepare(Run.asked(**asked(pictures, tiny_model)), say=lambda _: None).recipe.norm == "eval"
