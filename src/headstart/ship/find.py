"""Where the model is: in the folder of a run, of a comparison (its chosen run), or of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.errors import ModelError
from headstart.ship import folder as files
from headstart.ship.folder import CONFIG


def find(folder: Path) -> Path:
    """The model folder inside the folder of a run or a comparison, or the folder itself.

    Raises:
        ModelError: with what the folder is and what is missing.
    """
    if not folder.exists():
        raise ModelError(f"There is no folder '{folder}'.")
    if not folder.is_dir():
        if folder.name in (files.WEIGHTS, files.ONNX):
            return find(folder.parent)
        raise ModelError(f"'{folder}' is a file; give the folder of a run, a comparison or a model.")
    if (folder / "verdict.json").is_file():
        return _of_run(_chosen(folder))
    if (folder / "result.json").is_file() or (folder / "model").is_dir():
        return _of_run(folder)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "runs").is_dir():
        raise ModelError(
            f"'{folder}' is a comparison that is not finished: it has no verdict.json. Run the same command "
            "again to go on, or give one of the folders under runs/."
        )
    if (folder / "last.pt").is_file() or (folder / "run.json").is_file():
        raise ModelError(f"The run in '{folder}' is not finished. Go on with it (--resume), then predict.")
    raise ModelError(
        f"'{folder}' holds no model: neither a run (result.json), nor a comparison (verdict.json), "
        f"nor a model folder ({CONFIG})."
    )


def _of_run(folder: Path) -> Path:
    if (folder / "result.json").is_file():
        result = _object(folder / "result.json")
        status = result.get("status", "finished")
        if status != "finished":
            reason = f" {result['reason']}" if result.get("reason") else ""
            raise ModelError(
                f"The run in '{folder}' has no model to predict with: it {_was(status)}.{reason}"
            )
    model = folder / "model"
    if not (model / CONFIG).is_file():
        raise ModelError(f"The run in '{folder}' has no model: '{model}' is missing or incomplete.")
    return model


def _chosen(folder: Path) -> Path:
    """The run that a comparison's verdict takes."""
    verdict = _object(folder / "verdict.json")
    take = verdict.get("take")
    name = take.get("run") if isinstance(take, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"'{folder / 'verdict.json'}' takes no run (its take.run is {name!r}). "
            "Give one of the folders under runs/."
        )
    run = folder / "runs" / name
    if Path(name).name != name or not run.is_dir():
        raise ModelError(f"'{folder / 'verdict.json'}' takes the run '{name}', which is not under runs/.")
    return run


def _object(path: Path) -> dict[str, Any]:
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise ModelError(f"'{path}' is damaged: an object is expected.")
    return value


def _was(status: Any) -> str:
    return "was interrupted; go on with --resume" if status == "interrupted" else f"has {status}"
