"""Claims: to be served costs a network at most a fifth of its throughput and half of its latency.

The network is efficientnet-lite0 at its own 224 pixels, exported to ONNX, behind `headstart serve BUNDLE`
as it comes, in a process of its own on this machine. The pictures are JPEGs of 100 kB (1,000 x 750 pixels).

    throughput  16 clients (threads of one further process, connections kept) send one picture per request,
                all at once; pictures per second over all of them. Bare: the same pictures decoded and
                prepared by as many threads as the machine has cores, then run, ready, in batches of 16 on the
                same kind of onnxruntime session; the two times added up. The clients' own work is in the
                served time.
    latency     one client, one picture at a time, median. Bare: decoding, preparing and running that picture
                in this process, median.

Served and bare take turns; the ratios are medians over the turns. What the server answers is checked against
what the bare session says.
"""

from __future__ import annotations

import http.client
import io
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import measurement
from headstart.ship.intake import Upload, prepared
from headstart.ship.limits import Limits
from headstart.ship.predict import Predictor, load
from measurement import Check, median

THROUGHPUT, LATENCY = 0.8, 1.5
CLIENTS, BATCH = 16, 16
CLASSES = 10


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    here = measurement.begin("serve")
    repeats, many, single = (1, 32, 10) if options.quick else (options.repeats, 640, 150)
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), size=64 if options.quick else 224)
        pictures = [_jpeg(seed) for seed in range(32)]
        bodies = [pictures[i % len(pictures)] for i in range(many)]
        predictor = load(bundle, engine="onnx")
        context = multiprocessing.get_context("spawn")
        with (
            _served(bundle, Path(folder) / "log") as port,
            ProcessPoolExecutor(1, mp_context=context) as elsewhere,
        ):
            said = elsewhere.submit(_ask, port, pictures, 1).result()[1]  # warms up both, and is checked
            _same(said, [predictor.judge(_prepared(each, predictor)[None])[0].label for each in pictures])
            _bare(predictor, bodies[: 2 * BATCH])
            served, bare, slow, quick = [], [], [], []
            for repeat in range(repeats):
                turns = [
                    lambda: served.append(many / elsewhere.submit(_ask, port, bodies, CLIENTS).result()[0]),
                    lambda: bare.append(many / _bare(predictor, bodies)),
                    lambda: slow.append(median(elsewhere.submit(_ask, port, bodies[:single], 1).result()[2])),
                    lambda: quick.append(median(_one_by_one(predictor, bodies[:single]))),
                ]
                for turn in turns if repeat % 2 == 0 else reversed(turns):
                    turn()
    throughput = [a / b for a, b in zip(served, bare, strict=True)]
    latency = [a / b for a, b in zip(slow, quick, strict=True)]
    print(f"  pictures per second: {median(served):.1f} served to {CLIENTS} clients, {median(bare):.1f} bare")
    print(f"  one picture: {1e3 * median(slow):.2f} ms served, {1e3 * median(quick):.2f} ms bare")
    checks = [
        Check(
            f"throughput served to {CLIENTS} clients / bare",
            median(throughput),
            THROUGHPUT,
            at_least=True,
            spread=(min(throughput), max(throughput)),
        ),
        Check(
            "median latency of one picture served / bare",
            median(latency),
            LATENCY,
            at_least=False,
            spread=(min(latency), max(latency)),
        ),
    ]
    details = {
        "pictures": many,
        "bytes_per_picture": round(float(np.mean([len(each) for each in pictures]))),
        "served_per_second": [round(each, 2) for each in served],
        "bare_per_second": [round(each, 2) for each in bare],
        "served_ms": [round(1e3 * each, 3) for each in slow],
        "bare_ms": [round(1e3 * each, 3) for each in quick],
    }
    return measurement.finish(
        "serve",
        "Served to 16 clients a network keeps 0.8 of its throughput, and one picture takes at most 1.5 times "
        "as long.",
        here,
        checks,
        details,
        quick=options.quick,
    )


# ---------------------------------------------------------------------------------------------- one's own


def _bundle(folder: Path, size: int) -> Path:
    """efficientnet-lite0 with a head for ten classes that has learnt nothing, as ONNX."""
    import torch

    from headstart.nets import zoo
    from headstart.parts.head import find_head, replace_head
    from headstart.ship import bundle
    from headstart.ship.export import export

    torch.manual_seed(0)
    found = zoo.load(img_size=size)
    replace_head(found.net, find_head(found.net), CLASSES)
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


def _jpeg(seed: int) -> bytes:
    """A picture with large forms and fine grain, of the quality that makes it about 100 kB."""
    rng = np.random.default_rng(seed)
    forms = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((1000, 750), 3)
    grain = rng.normal(0, 9, (750, 1000, 1))
    pixels = (np.asarray(forms) + grain).clip(0, 255).astype(np.uint8)
    best = b""
    for quality in range(20, 96, 3):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
        best = stream.getvalue()
        if len(best) >= 100_000:
            break
    return best


def _prepared(content: bytes, predictor: Predictor) -> np.ndarray:
    return prepared(Upload(None, content), predictor.prepare, Limits())


def _bare(predictor: Predictor, bodies: list[bytes]) -> float:
    """Seconds to decode all, on all cores, and then to run all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ready = np.stack(list(threads.map(lambda body: _prepared(body, predictor), bodies)))
    decoded = time.perf_counter() - start
    start = time.perf_counter()
    for at in range(0, len(ready), BATCH):
        predictor.judge(ready[at : at + BATCH])
    return decoded + time.perf_counter() - start


def _one_by_one(predictor: Predictor, bodies: list[bytes]) -> list[float]:
    took = []
    for body in bodies:
        start = time.perf_counter()
        predictor.judge(_prepared(body, predictor)[None])
        took.append(time.perf_counter() - start)
    return took


def _same(said: list[str], expected: list[str | None]) -> None:
    if said != expected:
        raise SystemExit(f"The server says {said}, and the network {expected}.")


# ------------------------------------------------------------------------------------------------- served


@contextmanager
def _served(bundle: Path, log: Path) -> Iterator[int]:
    """The port of `headstart serve`, which ends with the block."""
    command = [measurement.command(), "serve", str(bundle), "--port", "0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while "http://" not in (said := log.read_text(encoding="utf-8")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"headstart serve did not start: {said}")
            time.sleep(0.05)
        yield int(said.partition("http://127.0.0.1:")[2].split(".")[0].split()[0])
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(port: int, bodies: list[bytes], clients: int) -> tuple[float, list[str], list[float]]:
    """Wall clock of all, the labels in order, and the seconds of each; runs in a process of its own."""

    def client(mine: range) -> list[tuple[int, str, float]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        out = []
        for index in mine:
            start = time.perf_counter()
            connection.request("POST", "/predict", bodies[index], {"Content-Type": "image/jpeg"})
            reply = connection.getresponse()
            body = reply.read()
            seconds = time.perf_counter() - start
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {body[:200]!r}")
            out.append((index, json.loads(body)["predictions"][0]["label"], seconds))
        connection.close()
        return out

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(client, [range(at, len(bodies), clients) for at in range(clients)]))
    wall = time.perf_counter() - start
    rows = sorted(row for rows in found for row in rows)
    return wall, [label for _, label, _ in rows], [seconds for _, _, seconds in rows]


if __name__ == "__main__":
    raise SystemExit(main())
