"""`headstart train` and all that can be wrong with what it is given."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typed import Typed, save_tiny_net, typing

from headstart.records import Result

SMALL = ("--img-size", 32, "--epochs", 1, "--device", "cpu", "--method", "full")


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_net(tmp_path_factory.mktemp("net"))


def test_a_run(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ("train", pictures, "--model", net, "--out", out, *SMALL, "--set", "head_lr=2", "--lr", "1e-3")
    ended = typed(*asked)
    assert ended.code == 0, ended.err
    assert "epoch 1/1" in ended.err
    result = Result.read(out / "result.json")
    assert result.test is not None
    assert f"accuracy {result.test.accuracy:.3f}" in ended.out
    assert f"headstart predict {out}" in ended.out
    assert result.hyper["head_lr"] == 2
    assert result.run.lr == 1e-3

    # The file beside it asks for the same run again, which is finished.
    config = out / "config.resolved.yaml"
    assert yaml.safe_load(config.read_text())["hyper"] == {"head_lr": 2}
    ended = typed("train", "--config", config, "--out", out, "--json")
    assert ended.code == 0, ended.err
    assert "finished already" in ended.err
    record = json.loads(ended.out)
    assert record["folder"] == str(out)
    assert record["test"] == result.test.model_dump()

    # Another run does not go where this one lies, unless that is asked for.
    assert "holds another run" in typed(*asked, "--seed", 1).refusal
    ended = typed(*asked, "--seed", 1, "--overwrite", "--json")
    assert json.loads(ended.out)["seed"] == 1


def test_an_interrupted_run_goes_on(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart.training.events import Lines

    out = tmp_path / "run"
    asked = ("train", pictures, "--model", net, "--out", out, *SMALL, "--epochs", 3)
    epoch = Lines.epoch

    def stop(self: Lines, record: dict[str, Any]) -> None:
        epoch(self, record)
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Lines, "epoch", stop)
        ended = typed(*asked)
    assert ended.code == 130
    assert ended.err.strip().endswith("--resume")
    assert f"headstart train {pictures}" in ended.err
    refusal = typed(*asked).refusal
    assert "unfinished" in refusal and "--resume" in refusal
    ended = typed(*asked, "--resume")
    assert ended.code == 0
    assert "resumed after epoch 2" in ended.err
    assert "epoch 3/3" in ended.err and "epoch 1/3" not in ended.err


def one_class(pictures: Path) -> None:
    shutil.rmtree(pictures / "class_b")
    shutil.rmtree(pictures / "class_c")


def one_picture(pictures: Path) -> None:
    for path in sorted((pictures / "class_b").iterdir())[1:]:
        path.unlink()


def all_broken(pictures: Path) -> None:
    for path in pictures.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40])


def text_files(pictures: Path) -> None:
    for path in pictures.rglob("*.png"):
        path.with_suffix(".jpg").write_text("I am not a picture.")
        path.unlink()


def other_classes_in_test(pictures: Path) -> None:
    (pictures / "train").mkdir()
    (pictures / "test").mkdir()
    for name in ("class_a", "class_b"):
        (pictures / name).rename(pictures / "train" / name)
    (pictures / "class_c").rename(pictures / "test" / "class_c")


def empty(pictures: Path) -> None:
    shutil.rmtree(pictures)
    pictures.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty, "no pictures"),
        (one_class, "class"),
        (one_picture, "class_b"),
        (all_broken, "read"),
        (text_files, "read"),
        (other_classes_in_test, "class_c"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare", "check"])
def test_pictures_that_cannot_be_learned_from(
    typed: Typed,
    pictures: Path,
    net: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Any,
    said: str,
    command: str,
) -> None:
    spoil(pictures)
    monkeypatch.chdir(tmp_path)
    if command == "check":
        ended = typed("check", pictures)
        ended = ended._replace(out="")  # findings are printed all the same
    else:
        words = SMALL if command == "train" else (*SMALL[:-2], "--methods", "full", "--seeds", 1)
        ended = typed(command, pictures, "--model", net, "--out", tmp_path / "out", *words)
    assert said.casefold() in ended.refusal.casefold()


def test_a_broken_picture_is_named_and_skipped_unless_strict(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path
) -> None:
    (pictures / "class_a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    asked = ("train", pictures, "--model", net, *SMALL)
    ended = typed(*asked, "--out", tmp_path / "a")
    assert ended.code == 0
    assert "class_a/broken.jpg" in ended.err
    assert "broken.jpg" in typed(*asked, "--out", tmp_path / "b", "--strict").refusal


def rows(folder: Path, spoil: str) -> Path:
    lines = [f"{p.relative_to(folder)},{p.parent.name}" for p in sorted(folder.rglob("*.png"))]
    lines[0] = {"missing": "nowhere.png,class_a", "label": lines[0].split(",")[0] + ","}[spoil]
    (folder / "table.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
    return folder / "table.csv"


def test_a_table_that_names_no_file_or_no_label(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path
) -> None:
    asked = ("--model", net, "--out", tmp_path / "out", *SMALL)
    assert "label" in typed("train", rows(pictures, "label"), *asked).refusal
    ended = typed("train", rows(pictures, "missing"), *asked, "--strict")
    assert "nowhere.png" in ended.refusal
    refusal = typed("train", pictures / "table.csv", *asked, "--image-col", "imag").refusal
    assert "imag" in refusal


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "l2sp"), "Did you mean 'l2-sp'?"),
        (("--model", "resnet5O"), "Did you mean 'resnet50'?"),
        (("--set", "epoch=3"), "Did you mean 'epochs'?"),
        (("--set", "heads_lr=3"), "Did you mean 'head_lr'?"),
        (("--set", "head_lr=fast"), "head_lr = 'fast' does not fit"),
        (("--preset", "paper"), "has no presets"),
        (("--epochs", 0), "epochs: input should be greater than or equal to 1. Got 0."),
        (("--split", 0.5, 0.5, 0.5), "three shares"),
        (("--lr", "inf"), "lr: input should be a finite number. Got inf."),
        (("--schedule", "cosin"), "'cosine'"),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--device", "tpu9"), "tpu9"),
        (("--class-weights", "nowhere.json"), "nowhere.json"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--batch-size", 1, "--norm", "train"), "BatchNorm"),
        (("--grad-accum", 64), "grad_accum"),
    ],
)
def test_what_was_asked_cannot_be(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path, words: tuple[Any, ...], said: str
) -> None:
    asked = ("train", pictures, "--model", net, "--out", tmp_path / "out", *SMALL)
    assert said in typed(*asked, *words).refusal
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "result.json").exists()


def test_something_has_to_be_given(typed: Typed, pictures: Path) -> None:
    assert "Which pictures?" in typed("train", "--out", "x").refusal
    assert "--out" in typed("train", pictures).refusal


def test_pictures_that_are_not_there(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    asked = ("--model", net, "--out", tmp_path / "out", *SMALL)
    refusal = typed("train", pictures.with_name("picture"), *asked).refusal
    assert "does not exist. Did you mean" in refusal


def test_weights_of_another_network(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    asked = ("train", pictures, "--model", "test_vit", "--out", tmp_path / "out", *SMALL)
    assert "model.safetensors" in typed(*asked, "--weights", net / "model.safetensors").refusal


def test_a_folder_that_holds_something_else(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all my work")
    for more in ((), ("--overwrite",)):
        asked = ("train", pictures, "--model", net, "--out", tmp_path / "out", *SMALL, *more)
        assert "holds something else (thesis.tex)" in typed(*asked).refusal
    assert (tmp_path / "out" / "thesis.tex").read_text() == "all my work"


def test_a_loss_that_is_not_a_number(typed: Typed, pictures: Path, net: Path, tmp_path: Path) -> None:
    asked = ("train", pictures, "--model", net, "--out", tmp_path / "out", *SMALL)
    # A single step an epoch: the loss before it is still a number, what comes after it is not.
    refusal = typed(*asked, "--epochs", 3, "--lr", "1e30", "--warmup", 0).refusal
    assert "no numbers any more after phase 'fine-tune', epoch 1, step 1. Try a lower --lr" in refusal
    assert Result.read(tmp_path / "out" / "result.json").status == "failed"


def test_a_full_disk_keeps_the_last_checkpoint(
    typed: Typed, pictures: Path, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    saved = 0
    save = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args, **kwargs)

    asked = ("train", pictures, "--model", net, "--out", tmp_path / "out", *SMALL, "--epochs", 3)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert "the disk is full. The last good one stays" in typed(*asked).refusal
    ended = typed(*asked, "--resume")
    assert ended.code == 0
    assert "resumed after epoch 1" in ended.err
