"""From a finished run to a bundle: in the formats asked for, calibrated, and proven to say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from headstart.data.picture import Unreadable, open_picture
from headstart.data.preprocess import Preprocess
from headstart.errors import ConfigError, DataError, unknown
from headstart.nets.architecture import quiet
from headstart.ship import bundle, contents, verify
from headstart.ship import card as model_card
from headstart.ship import folder as files
from headstart.ship import run as runs
from headstart.ship.calibration import Calibration, calibrate
from headstart.ship.engines import Engine, Onnx, Torch, session
from headstart.ship.find import find
from headstart.ship.formats import NotWritten, to_onnx, to_pt2
from headstart.ship.pixels import from_pixels
from headstart.ship.scores import intervals
from headstart.ship.verify import Says

FORMATS = ("safetensors", "onnx", "pt2")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    calibration: Calibration
    verified: dict[str, dict[str, Any]]  # by form, as `ship.verify` says it
    not_written: dict[str, str] = field(default_factory=dict)  # by format, why


def export(
    source: str | Path,
    out: str | Path,
    *,
    formats: Sequence[str] = ("safetensors", "onnx"),
    with_preprocessing: bool = False,
    static: bool = False,
    accuracy: float = 0.95,
    data: str | Path | None = None,
    pictures: int = 100,
    check: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a bundle, whole or not at all; a bundle that was there before is replaced.

    Args:
        source: the folder of a run, of a comparison (its chosen run), or of a model.
        out: where to.
        formats: of 'safetensors', 'onnx' and 'pt2'. One that the network has no form in is left out and
            named.
        with_preprocessing: a second ONNX file, with the preprocessing inside.
        static: one ordinary network in the place of one in which each picture takes its own way. It is
            another network: it is scored and calibrated anew, on the run's own val and test.
        accuracy: that answers should have; the threshold for `unsure` is found for it.
        data: where the run's pictures lie now, or any pictures for a model of which the run is not known.
        pictures: with how many to verify, 50 or more.
        check: whether to verify at all.
        say: told what people should know.

    Raises:
        ConfigError: a wish that cannot be fulfilled.
        ModelError: no such model; or a form of it that says something else (`ship.verify.Disagreement`).
        DataError: pictures to verify with that are not there.
        OutputError: a folder that holds something else, or cannot be written.
    """
    asked = _asked(formats, with_preprocessing, accuracy, pictures)
    where = None if data is None else Path(data).expanduser()
    with _read(Path(source).expanduser(), where, static) as (model, trained, finished):
        calibration = _calibration(trained.calibration, finished, accuracy)
        shown = _pictures(finished, where, pictures) if check else []
        if check and len(shown) < verify.ENOUGH:
            say(f"Verified with {len(shown)} pictures only: there are no more that it did not learn from.")
        with files.whole(out) as fresh:
            document = _copy(model, fresh, trained, calibration, weights="safetensors" in asked)
            refused = _write(fresh, asked, trained, calibration, with_preprocessing)
            for name, why in refused.items():
                say(f"{name} was not written: {why}")
            found = _verified(fresh, trained, calibration, shown)
            checked = {
                "formats": found,
                "not_written": refused,
                "held_out": finished is not None and check,
                "versions": {name: version(name) for name in _packages(asked)},
            }
            files.write_json(fresh / files.VERIFICATION, checked)
            text = model_card.write(
                document,
                calibration=calibration,
                verification=checked,
                intervals=intervals(finished.scored) if finished is not None else None,
                files=sorted(path.name for path in fresh.iterdir()),
            )
            files.write_text(fresh / files.CARD, text)
        return Exported(Path(out), calibration, found, refused)


@contextmanager
def _read(
    source: Path, data: Path | None, static: bool
) -> Iterator[tuple[Path, bundle.Bundle, runs.Finished | None]]:
    """The model folder that is exported, what lies in it, and its run where that is known."""
    model = find(source)
    trained, finished = bundle.read(model), runs.of_model(model)
    if not static:
        yield model, trained, finished
        return
    trained, finished = _settled(trained, finished, data)
    with TemporaryDirectory() as folder:
        own = Path(folder) / "model"
        bundle.save(
            own,
            trained.net,
            config=trained.config,
            preprocess=trained.preprocess,
            classes=trained.classes,
            card=trained.card,
        )
        yield own, trained, finished


def _asked(
    formats: Sequence[str], with_preprocessing: bool, accuracy: float, pictures: int
) -> tuple[str, ...]:
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(unknown("format", name, FORMATS))
    if not formats:
        raise ConfigError(f"Give one format or more of: {', '.join(FORMATS)}.")
    if with_preprocessing and "onnx" not in formats:
        raise ConfigError("Preprocessing goes into the ONNX file: ask for the format onnx too.")
    if not 0 < accuracy < 1:
        raise ConfigError(f"An accuracy lies between 0 and 1, such as 0.95; {accuracy} was given.")
    if pictures < verify.ENOUGH:
        raise ConfigError(f"Verify with {verify.ENOUGH} pictures or more; {pictures} were asked for.")
    return tuple(name for name in FORMATS if name in formats)


def _settled(
    trained: bundle.Bundle, finished: runs.Finished | None, data: Path | None
) -> tuple[bundle.Bundle, runs.Finished | None]:
    """The static form of a network, with scores of its own where its run is known."""
    trained = bundle.settled(trained)
    if finished is None:
        return trained, None
    network, scored, card = Torch(trained.net, trained.preprocess, "cpu"), {}, dict(trained.card)
    for split, rows in runs.labelled(finished, data).items():
        logits, labels = [], []
        for path, label in rows:
            try:
                pixels = trained.preprocess.plain(open_picture(path))
            except Unreadable:
                continue
            logits.append(network(pixels[None])[0])
            labels.append(label)
        if labels:
            said, truth = Calibration().probabilities(np.stack(logits)), np.array(labels)
            scored[split] = (said.astype(np.float32), truth)
            at = np.maximum(said[np.arange(len(truth)), truth], np.finfo(np.float32).tiny)
            right = float((said.argmax(1) == truth).mean())
            card[split] = {"n": len(truth), "accuracy": right, "log_loss": float(-np.log(at).mean())}
    return replace(trained, card=card), replace(finished, scored=scored)


def _calibration(known: Calibration, finished: runs.Finished | None, accuracy: float) -> Calibration:
    """Of the run's own predictions; of a model that stands alone what it was shipped with."""
    if finished is None or "val" not in finished.scored:
        return known
    return calibrate(*finished.scored["val"], accuracy=accuracy, test=finished.scored.get("test"))


def _pictures(finished: runs.Finished | None, where: Path | None, pictures: int) -> list[Path]:
    if finished is not None:
        try:
            return runs.held_out(finished, where)[:pictures]
        except DataError as error:
            raise DataError(
                f"The pictures to verify with cannot be found. {error} "
                "Say where they lie now with --data, or leave it out with --no-verify."
            ) from error
    if where is None:
        raise ConfigError(
            "Which pictures should it be verified with? Of a model that lies outside its run nobody knows: "
            "give a folder with --data, or leave it out with --no-verify."
        )
    return runs.pictures_of(where)[:pictures]


def _copy(
    model: Path, fresh: Path, trained: bundle.Bundle, calibration: Calibration, *, weights: bool
) -> dict[str, Any]:
    """The model folder as it is, with its calibration; gives what a card is written from."""
    files.copy(model, fresh, (files.CONFIG, *((files.WEIGHTS,) if weights else ())))
    files.write_json(fresh / files.LABELS, trained.classes)
    files.write_json(fresh / files.PREPROCESS, trained.preprocess.to_dict())
    files.write_json(fresh / files.CALIBRATION, calibration.to_dict())
    kind = type(trained.net)
    own = {"class": f"{kind.__module__}.{kind.__qualname__}", "card": trained.card}
    document: dict[str, Any] = files.read_json(fresh / files.CONFIG)
    return {"label_names": trained.classes, "headstart": own} | document


def _write(
    fresh: Path,
    asked: Sequence[str],
    trained: bundle.Bundle,
    calibration: Calibration,
    with_preprocessing: bool,
) -> dict[str, str]:
    """Write the other formats; gives why one could not be."""
    preprocess, refused = trained.preprocess, {}
    if "onnx" in asked:
        try:
            to_onnx(
                trained.net,
                fresh / files.ONNX,
                preprocess=preprocess,
                classes=trained.classes,
                calibration=calibration,
            )
        except NotWritten as error:
            refused[files.ONNX] = error.reason
    if with_preprocessing and files.ONNX not in refused:
        try:
            from_pixels(fresh / files.ONNX, fresh / files.ONNX_PIXELS, preprocess, calibration)
        except NotWritten as error:
            refused[files.ONNX_PIXELS] = error.reason
    if "pt2" in asked:
        try:
            to_pt2(trained.net, fresh / files.EXPORTED, preprocess=preprocess)
        except NotWritten as error:
            refused[files.EXPORTED] = error.reason
    return refused


def _verified(
    fresh: Path, trained: bundle.Bundle, calibration: Calibration, pictures: Sequence[Path]
) -> dict[str, dict[str, Any]]:
    if not pictures:
        return {}
    network = Torch(trained.net, trained.preprocess, "cpu")
    return verify.verify(
        _says(network, trained.preprocess),
        _forms(fresh, trained),
        pictures,
        trained.classes,
        calibration,
    )


def _forms(fresh: Path, trained: bundle.Bundle) -> dict[str, Says]:
    """Everything that was written, read back from the folder, with the preprocessing that lies there."""
    preprocess = contents.read(fresh).preprocess
    assert preprocess is not None
    forms: dict[str, Says] = {}
    if (fresh / files.WEIGHTS).is_file():
        if trained.config is not None:
            forms["timm"] = _by_timm(fresh)
        if trained.config is not None or contents.read(fresh).own.keys() & files.DESCRIBED:
            again = bundle.read(fresh)
            forms[files.WEIGHTS] = _says(Torch(again.net, again.preprocess, "cpu"), again.preprocess)
    if (fresh / files.ONNX).is_file():
        forms[files.ONNX] = _says(Onnx(fresh / files.ONNX, preprocess), preprocess)
    if (fresh / files.ONNX_PIXELS).is_file():
        forms[files.ONNX_PIXELS] = _by_pixels(fresh / files.ONNX_PIXELS)
    if (fresh / files.EXPORTED).is_file():
        module = torch.export.load(fresh / files.EXPORTED).module()
        forms[files.EXPORTED] = _says(Torch(module, preprocess, "cpu"), preprocess)
    return forms


def _says(engine: Engine, preprocess: Preprocess) -> Says:
    def says(image: Image.Image) -> np.ndarray:
        logits: np.ndarray = engine(preprocess.plain(image)[None])[0]
        return logits

    return says


def _by_timm(folder: Path) -> Says:
    """As somebody uses the folder who has timm and not headstart."""
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    with quiet():
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config: dict[str, Any] = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    transform: Any = create_transform(**config, is_training=False)

    def says(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = net(transform(image)[None])[0].numpy()
        return logits

    return says


def _by_pixels(path: Path) -> Says:
    running = session(path)

    def says(image: Image.Image) -> np.ndarray:
        logits: np.ndarray = running.run(["logits"], {"picture": np.asarray(image)[None]})[0][0]
        return logits

    return says


def _packages(asked: Sequence[str]) -> list[str]:
    return ["headstart", "torch", "timm", *(["onnx", "onnxscript", "onnxruntime"] if "onnx" in asked else [])]
