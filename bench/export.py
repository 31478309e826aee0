"""Claims: an exported bundle is ready within a second, and `predict` costs a network a tenth at most.

The network is efficientnet-lite0 at its own 224 pixels, exported to ONNX; onnxruntime runs it, without torch.

    load      in fresh processes, `headstart.load(BUNDLE, engine="onnx")` with all that it imports, after
              onnxruntime was imported; median. What importing onnxruntime itself takes is told beside it.
    predict   1,000 JPEGs of 100 kB (1,000 x 750 pixels) through `Predictor.stream`, from files to labels.
              Bare: the same files decoded and prepared by as many threads as the machine has cores, then
              run, ready, in batches of 32 on the same onnxruntime session; the two times added up. Ours and
              bare take turns; the ratio of speeds is the median over the turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import measurement
from headstart.data.picture import open_picture
from headstart.ship.predict import Predictor, load
from measurement import Check, median

LOAD, PREDICT = 1.0, 0.9
CLASSES, BATCH = 10, 32
FRESH = """
import json, sys, time
start = time.perf_counter()
import onnxruntime
middle = time.perf_counter()
import headstart
predictor = headstart.load(sys.argv[1], engine="onnx")
end = time.perf_counter()
print(json.dumps([middle - start, end - middle, "torch" in sys.modules]))
"""


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    here = measurement.begin("export")
    repeats, many = (1, 64) if options.quick else (options.repeats, 1000)
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), size=64 if options.quick else 224)
        paths = _pictures(Path(folder) / "pictures", many)
        loads = [_fresh(bundle) for _ in range(1 + repeats)][1:]  # the first fills the disk cache
        predictor = load(bundle, engine="onnx")
        said, wanted = _ours(predictor, paths[:BATCH])[1], _bare(predictor, paths[:BATCH])[1]
        assert said == wanted, "predict and the bare session say different things"
        ours, bare = [], []
        for repeat in range(repeats):
            turns = [
                lambda: ours.append(many / _ours(predictor, paths)[0]),
                lambda: bare.append(many / _bare(predictor, paths)[0]),
            ]
            for turn in turns if repeat % 2 == 0 else reversed(turns):
                turn()
    seconds = [each[1] for each in loads]
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"  pictures per second: {median(ours):.1f} by predict, {median(bare):.1f} bare")
    checks = [
        Check(
            "load beyond importing onnxruntime",
            median(seconds),
            LOAD,
            at_least=False,
            unit=" s",
            spread=(min(seconds), max(seconds)),
        ),
        Check("torch loaded by it", float(any(each[2] for each in loads)), 0, at_least=False),
        Check(
            f"speed of predict on {many} pictures / bare",
            median(ratios),
            PREDICT,
            at_least=True,
            spread=(min(ratios), max(ratios)),
        ),
    ]
    details = {
        "load_seconds": [round(each, 3) for each in seconds],
        "onnxruntime_import_seconds": [round(each[0], 3) for each in loads],
        "predict_per_second": [round(each, 2) for each in ours],
        "bare_per_second": [round(each, 2) for each in bare],
        "pictures": many,
    }
    return measurement.finish(
        "export",
        "A bundle is ready within 1.0 s beyond importing onnxruntime, and predict keeps 0.9 of the speed of "
        "decoding and running alone.",
        here,
        checks,
        details,
        quick=options.quick,
    )


def _bundle(folder: Path, size: int) -> Path:
    """efficientnet-lite0 with a head for ten classes that has learnt nothing, as ONNX."""
    import torch

    from headstart.nets import zoo
    from headstart.parts.head import find_head, replace_head
    from headstart.ship import bundle
    from headstart.ship.export import export

    torch.manual_seed(0)
    found = zoo.load(img_size=size)
    head = find_head(found.net)
    replace_head(found.net, head, CLASSES)
    torch.nn.init.normal_(found.net.get_submodule(head).get_parameter("weight"), std=0.1)  # no ties
    bundle.save(
        folder / "model",
        found.net.eval(),
        config=found.config,
        preprocess=found.preprocess,
        classes=[f"class {index}" for index in range(CLASSES)],
        card={"model": "efficientnet-lite0"},
    )
    export(folder / "model", folder / "bundle", formats=("onnx",), check=False)
    return folder / "bundle"


def _pictures(folder: Path, many: int) -> list[Path]:
    """JPEGs of about 100 kB; there are 32 of them, each under several names."""
    folder.mkdir()
    for seed in range(min(32, many)):
        rng = np.random.default_rng(seed)
        forms = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((1000, 750))
        pixels = np.asarray(forms) + rng.normal(0, 9, (750, 1000, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{seed:04d}.jpg", quality=62)
    paths = []
    for index in range(many):
        path = folder / f"{index:04d}.jpg"
        if not path.exists():
            os.link(folder / f"{index % 32:04d}.jpg", path)
        paths.append(path)
    return paths


def _fresh(bundle: Path) -> tuple[float, float, bool]:
    command = [sys.executable, "-c", FRESH, str(bundle)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported, loaded, torch = json.loads(done.stdout)
    return imported, loaded, torch


def _ours(predictor: Predictor, paths: list[Path]) -> tuple[float, list[str | None]]:
    start = time.perf_counter()
    said = [row.label for row in predictor.stream(paths, batch_size=BATCH)]
    return time.perf_counter() - start, said


def _bare(predictor: Predictor, paths: list[Path]) -> tuple[float, list[str | None]]:
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ready = list(threads.map(lambda path: predictor.prepare(open_picture(path)), paths))
    said: list[str | None] = []
    for at in range(0, len(ready), BATCH):
        logits = predictor.logits(np.stack(ready[at : at + BATCH]))
        said += [predictor.classes[int(best)] for best in logits.argmax(1)]
    return time.perf_counter() - start, said


if __name__ == "__main__":
    raise SystemExit(main())
