import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.errors import OutputError, TrainingError
from headstart.training.checkpoint import Checkpoint


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save({"weights": torch.arange(3), "history": [{"loss": 1.0, "val": None}]})
    loaded = Checkpoint(tmp_path).load()
    assert loaded is not None
    assert loaded["weights"].tolist() == [0, 1, 2]
    assert loaded["history"] == [{"loss": 1.0, "val": None}]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path).load() is None


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"epoch": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"disk is full.*last good one stays"):
        checkpoint.save({"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load() == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path)
    real = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return real(Path("/dev/full") if "w" in mode else self, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OutputError, match="disk is full"):
        checkpoint.save({"weights": torch.zeros(100_000)})


def test_a_file_that_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        Checkpoint(tmp_path).load()


def test_a_truncated_checkpoint_is_said_so(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save({"weights": torch.zeros(1000)})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        Checkpoint(tmp_path).load()


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "last.pt.123.new").write_bytes(b"half")
    assert Checkpoint(tmp_path).load() is None
    assert list(tmp_path.iterdir()) == []
