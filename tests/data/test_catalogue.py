"""Named sets, from stand-ins of where they come from: no test touches the network."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from headstart.data import catalogue
from headstart.data.catalogue import MARK, NAMES, fetch
from headstart.data.folder import scan
from headstart.errors import ConfigError, OutputError, Unreachable


def picture(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (value % 256, 7, 9)).save(path)
    return path


def quiet(text: str) -> None:
    pass


def tree(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@pytest.fixture
def clipart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Debian's package as if it were installed: six pictures per class, one deep, one linked, one giant."""
    root = tmp_path / "openclipart"
    for folder in catalogue._CLIPART.values():
        for i in range(5):
            picture(root / folder / f"{i}.png", i)
        picture(root / folder / "deep" / "0.png", 9)
        (root / folder / "link.png").symlink_to(root / folder / "0.png")
        giant = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 10_000, 6_000, 8, 2, 0, 0, 0)
        (root / folder / "giant.png").write_bytes(giant)
        (root / folder / "0.txt").write_text("author")
    monkeypatch.setitem(catalogue._DEBIAN, "openclipart-png", root)
    return root


def test_clipart_of_the_installed_package(clipart: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = fetch("clipart", tmp_path / "out", say=said.append)
    table = scan(out)
    assert table.classes == sorted(catalogue._CLIPART) and len(table) == 60 and table.notes == []
    assert (out / "flags" / "deep_0.png").is_file() and not any(p.is_symlink() for p in out.rglob("*"))
    assert "installed package" in said[0] and "60 pictures of 10 classes" in said[-1]
    assert json.loads((out / MARK).read_text())["licence"].startswith("public domain")


def test_sample_is_seeded(clipart: Path, tmp_path: Path) -> None:
    first, again, other = (
        tree(fetch("clipart", tmp_path / name, per_class=3, seed=seed, say=quiet))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert len(first) == 31 and first == again != other


def test_out_that_holds_something(clipart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds something else"):
        fetch("clipart", out, say=quiet)
    assert (out / "mine").is_dir()
    (out / "mine").rmdir()
    fetch("clipart", out, per_class=2, say=quiet)  # an empty folder is fine
    said: list[str] = []
    monkeypatch.setattr(catalogue, "_put", None)  # nothing is written a second time
    fetch("clipart", out, per_class=2, say=said.append)
    assert said == [f"{out} holds clipart already."]
    with pytest.raises(OutputError, match="holds another set"):
        fetch("clipart", out, per_class=3, say=quiet)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="something else"):
        fetch("clipart", tmp_path / "file", say=quiet)
    with pytest.raises(ConfigError, match="Did you mean 'clipart'"):
        fetch("clippart", tmp_path / "x")
    with pytest.raises(ConfigError, match="per_class is 0"):
        fetch("clipart", tmp_path / "x", per_class=0)


def test_half_made_is_never_finished(clipart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = catalogue._put, [0]

    def put(item: Any, root: Path) -> None:
        count[0] += 1
        if count[0] == 10:
            raise OSError(28, "No space left on device")
        real(item, root)

    monkeypatch.setattr(catalogue, "_put", put)
    (tmp_path / "sets").mkdir()
    old = tmp_path / "sets" / ".out.partial-1-abc"
    old.mkdir()
    os.utime(old, (1e9, 1e9))
    with pytest.raises(OutputError, match="No space left"):
        fetch("clipart", tmp_path / "sets" / "out", say=quiet)
    assert list((tmp_path / "sets").iterdir()) == []
    assert len(scan(fetch("clipart", tmp_path / "sets" / "out", say=quiet))) == 60


def test_files_are_copied_where_they_cannot_be_linked(
    clipart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = fetch("clipart", tmp_path / "out", per_class=1, say=quiet)
    assert len(scan(out)) == 10


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")


@needs_dpkg
@pytest.mark.parametrize("lists", ["there", "missing", "unreachable"])
def test_clipart_by_apt(clipart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: str) -> None:
    """A real little .deb through a stand-in for apt-get, with and without the machine's package lists."""
    installed = Path("/usr/share/headstart-test-clipart")
    build = tmp_path / "deb"
    shutil.copytree(clipart, build / installed.relative_to("/"), symlinks=True)
    (build / "DEBIAN").mkdir()
    (build / "DEBIAN" / "control").write_text(
        "Package: openclipart-png\nVersion: 1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n"
    )
    deb = tmp_path / "openclipart-png_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(build), str(deb)], check=True, capture_output=True)
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f'case "{lists} $*" in\n'
        f"  there*download*|missing*Dir::State*download*) cp {deb} . ;;\n"
        "  missing*update*) ;;\n"
        "  *) echo 'E: Unable to locate package openclipart-png' >&2; exit 100 ;;\n"
        "esac\n"
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(catalogue._DEBIAN, "openclipart-png", installed)
    if lists == "unreachable":
        with pytest.raises(Unreachable, match=r"Unable to locate.*sudo apt-get install openclipart-png"):
            fetch("clipart", tmp_path / "out", say=quiet)
        assert not (tmp_path / "out").exists()
        return
    assert len(scan(fetch("clipart", tmp_path / "out", say=quiet))) == 60
    assert len((tmp_path / "calls").read_text().splitlines()) == (1 if lists == "there" else 3)


def test_no_apt_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue._DEBIAN, "openclipart-png", tmp_path / "not" / "there")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match="apt-get and dpkg-deb"):
        fetch("clipart", tmp_path / "out", say=quiet)


def idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


def test_fashion_mnist_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "package"
    root.mkdir()
    rng = np.random.default_rng(0)
    held = {}
    for prefix, n in (("train", 40), ("t10k", 20)):
        held[prefix] = rng.integers(0, 256, (n, 28, 28))
        idx(root / f"{prefix}-images-idx3-ubyte.gz", held[prefix])
        idx(root / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    monkeypatch.setitem(catalogue._DEBIAN, "dataset-fashion-mnist", root)
    out = fetch("fashion-mnist", tmp_path / "out", say=quiet)
    table = scan(out)
    assert table.split is not None and table.split.count("train") == 40 and table.split.count("test") == 20
    assert table.classes == sorted(catalogue._FASHION)
    assert np.array_equal(np.asarray(Image.open(out / "test" / "bag" / "00018.png")), held["t10k"][18])
    (root / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(Unreachable, match="damaged"):
        fetch("fashion-mnist", tmp_path / "other", say=quiet)


def test_fashion_mnist_falls_back_and_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue._DEBIAN, "dataset-fashion-mnist", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))

    def offline(self: Any) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets.FashionMNIST, "download", offline)
    with pytest.raises(Unreachable, match=r"apt-get.*torchvision.*Error downloading.*By hand"):
        fetch("fashion-mnist", tmp_path / "out", say=quiet)


def test_digits(tmp_path: Path) -> None:
    out = fetch("digits", tmp_path / "out", per_class=4, say=quiet)
    table = scan(out)
    assert table.classes == list("0123456789") and len(table) == 40
    pixels = np.stack([np.asarray(Image.open(p)) for p in table.paths])
    assert pixels.shape == (40, 8, 8) and pixels.max() == 255


# The real classes of torchvision, on tiny files laid out as their archives are.


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "downloads"


def test_flowers(downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = downloads / "flowers102" / "flowers-102"
    for i in range(1, 7):
        picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    savemat(base / "imagelabels.mat", {"labels": [[1, 2, 1, 2, 1, 2]]})
    monkeypatch.setattr(datasets.flowers102, "check_integrity", lambda *a: True)
    out = fetch("flowers102", tmp_path / "out", say=quiet)
    table = scan(out)
    assert table.classes == ["hard-leaved pocket orchid", "pink primrose"]
    assert table.split == ["test", "test", "train", "train", "val", "val"]
    assert (out / "val/pink primrose/image_00003.jpg").samefile(base / "jpg/image_00003.jpg")


def test_pets(downloads: Path, tmp_path: Path) -> None:
    base = downloads / "oxfordiiitpet" / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "Abyssinian_2", "pug_1", "pug_2"):
        picture(base / "images" / f"{name}.jpg")
    (base / "annotations").mkdir()
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\npug_1 2 2 1\n")
    (base / "annotations" / "test.txt").write_text("Abyssinian_2 1 1 1\npug_2 2 2 1\n")
    out = fetch("pets", tmp_path / "out", say=quiet)
    assert tree(out)[1:] == [
        "test/Abyssinian/Abyssinian_2.jpg",
        "test/Pug/pug_2.jpg",
        "train/Abyssinian/Abyssinian_1.jpg",
        "train/Pug/pug_1.jpg",
    ]


def test_dtd_and_aircraft_and_food(downloads: Path, tmp_path: Path) -> None:
    base = downloads / "dtd" / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for k, side in enumerate(("train", "val", "test")):
        names = [f"{c}/{c}_{k}.jpg" for c in ("banded", "dotted")]
        for name in names:
            picture(base / "images" / name, k)
        (base / "labels" / f"{side}1.txt").write_text("\n".join(names) + "\n")
    assert scan(fetch("dtd", tmp_path / "dtd", say=quiet)).split == [
        "test",
        "test",
        "train",
        "train",
        "val",
        "val",
    ]

    base = downloads / "fgvcaircraft" / "fgvc-aircraft-2013b" / "data"
    (base).mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nF/A-18\n")
    for k, side in enumerate(("train", "val", "test")):
        (base / f"images_variant_{side}.txt").write_text(f"{k}0 707-320\n{k}1 F/A-18\n")
        for c in range(2):
            picture(base / "images" / f"{k}{c}.jpg", k)
    assert scan(fetch("aircraft", tmp_path / "aircraft", say=quiet)).classes == ["707-320", "F-A-18"]

    base = downloads / "food101" / "food-101"
    (base / "meta").mkdir(parents=True)
    for k, side in enumerate(("train", "test")):
        (base / "meta" / f"{side}.json").write_text(json.dumps({c: [f"{c}/{k}"] for c in ("pie", "soup")}))
        for c in ("pie", "soup"):
            picture(base / "images" / c / f"{k}.jpg", k)
    assert tree(fetch("food101", tmp_path / "food", say=quiet))[1:] == [
        "test/pie/1.jpg",
        "test/soup/1.jpg",
        "train/pie/0.jpg",
        "train/soup/0.jpg",
    ]


def test_caltech_and_eurosat(downloads: Path, tmp_path: Path) -> None:
    for name in ("ant", "crab", "BACKGROUND_Google"):
        picture(downloads / "caltech101" / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg")
    (downloads / "caltech101/caltech101/Annotations").mkdir()
    assert tree(fetch("caltech101", tmp_path / "c101", say=quiet))[1:] == [
        "ant/image_0001.jpg",
        "crab/image_0001.jpg",
    ]
    for name in ("001.ak47", "002.flag", "257.clutter"):
        picture(downloads / "caltech256" / "caltech256" / "256_ObjectCategories" / name / "001_0001.jpg")
    assert scan(fetch("caltech256", tmp_path / "c256", say=quiet)).classes == ["001.ak47", "002.flag"]
    for name in ("Forest", "River"):
        picture(downloads / "eurosat" / "eurosat" / "2750" / name / f"{name}_1.jpg")
    assert scan(fetch("eurosat", tmp_path / "euro", say=quiet)).classes == ["Forest", "River"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
def test_sets_of_arrays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays become PNG files that hold exactly their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    items = NAMES[name].items
    assert isinstance(items, catalogue._torchvision)

    class Standin:
        classes = ("cat", "dog", "hen")

        def __init__(self, root: str, download: bool, **arguments: Any) -> None:
            assert arguments in items.sides.values()

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.fromarray(pixels[i]), i % 3

    monkeypatch.setattr(datasets, items.kind, Standin)
    out = fetch(name, tmp_path / "out", say=quiet)
    table = scan(out)
    assert table.classes == (["0", "1", "2"] if name == "svhn" else ["cat", "dog", "hen"])
    assert table.split is not None and table.split.count("train") == table.split.count("test") == 6
    assert np.array_equal(np.asarray(Image.open(out / "train" / table.classes[1] / "00004.png")), pixels[4])


@pytest.mark.parametrize("name", [name for name, named in NAMES.items() if catalogue._kind(named)])
def test_unreachable_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every torchvision set, offline: its own class, its own arguments, one sentence."""
    from urllib.error import URLError

    def offline(*args: Any, **more: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(catalogue._DEBIAN, "dataset-fashion-mnist", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(Unreachable) as caught:
        fetch(name, tmp_path / "out", say=quiet)
    said = str(caught.value)
    assert "By hand" in said and NAMES[name].home in said and str(tmp_path / "cache") in said
    assert "\n" not in said and not (tmp_path / "out").exists()


def test_every_set_is_described() -> None:
    wanted = "clipart fashion-mnist digits flowers102 pets dtd aircraft cars food101 caltech101 caltech256"
    assert list(NAMES) == [*wanted.split(), "eurosat", "cifar10", "cifar100", "stl10", "svhn"]
    assert all(named.about and named.licence and named.home.startswith("http") for named in NAMES.values())
