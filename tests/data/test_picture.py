"""Pictures of every mode and every kind of damage."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.data import picture as module
from headstart.data.picture import Unreadable, open_picture, open_with_notes


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_picture(path)
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_every_exif_orientation_is_made_upright(tmp_path: Path) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = (255, 0, 0)
    upright[0, 5] = (0, 255, 0)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        path = tmp_path / f"{orientation}.png"
        image = Image.fromarray(np.ascontiguousarray(pixels))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        assert np.array_equal(np.asarray(open_picture(path)), upright), orientation


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_orientation_that_means_nothing_is_ignored(tmp_path: Path, orientation: int) -> None:
    image = Image.new("RGB", (3, 2), "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (3, 2)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "index.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=bytes([0, 255]))
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)
    assert pixel(tmp_path / "half.png") == (255, 127, 127)
    assert pixel(tmp_path / "la.png") == (255, 255, 255)
    for name in ("index.png", "bytes.png"):
        assert pixel(tmp_path / name) == (255, 255, 255)
        assert pixel(tmp_path / name, 1) == (200, 100, 50)
    assert pixel(tmp_path / "key.png") == (255, 255, 255)


def test_strips_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 11, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = np.asarray(open_picture(tmp_path / "a.png"))
    monkeypatch.setattr(module, "_STRIP", 25)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png")), whole)
    alpha = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(whole - expected).max() <= 1


def test_grey_palette_bilevel_and_cmyk(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bilevel.png")
    Image.new("RGB", (2, 2), (9, 9, 200)).quantize(4).save(tmp_path / "palette.gif")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert pixel(tmp_path / "grey.png") == (77, 77, 77)
    assert pixel(tmp_path / "bilevel.png") == (255, 255, 255)
    assert pixel(tmp_path / "palette.gif") == (9, 9, 200)
    red = pixel(tmp_path / "cmyk.jpg")
    assert red[0] > 250 and max(red[1:]) < 5


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert np.asarray(open_picture(tmp_path / f"a.{ending}"))[0, :, 0].tolist() == [0, 100, 255]


def test_wide_integers_and_floats(tmp_path: Path) -> None:
    cases = {
        "int": (np.array([[0, 1 << 20]], np.int32), [0, 255]),
        "negative": (np.array([[-10, 65525]], np.int32), [0, 255]),
        "unit": (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        "nan": (np.array([[np.nan, 255.0]], np.float32), [0, 255]),
        "zero": (np.array([[0.0, 0.0]], np.float32), [0, 0]),
    }
    for name, (values, expected) in cases.items():
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        assert np.asarray(open_picture(tmp_path / f"{name}.tiff"))[0, :, 0].tolist() == expected, name


def test_reasons(tmp_path: Path) -> None:
    good = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good, "JPEG")
    png = io.BytesIO()
    Image.fromarray(noise).save(png, "PNG")
    files = {
        "text.jpg": (b"hello, I am a letter\n", "is a text file"),
        "umlaut.jpg": (("é" * 600).encode(), "is a text file"),
        "empty.png": (b"", "is empty"),
        "binary.png": (bytes(range(256)), "not a picture in a format"),
        "short.jpg": (good.getvalue()[: len(good.getvalue()) // 2], "truncated"),
        "short.png": (png.getvalue()[: len(png.getvalue()) // 2], ""),
        "header.png": (png.getvalue()[:20], ""),
    }
    for name, (content, reason) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(Unreadable) as caught:
            open_picture(path)
        assert caught.value.path == str(path)
        assert reason in caught.value.reason and caught.value.reason
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(Unreadable, match="does not exist"):
        open_picture(tmp_path / "nothing.png")
    with pytest.raises(Unreadable, match="is a folder"):
        open_picture(tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(Unreadable, match="no permission"):
        open_picture(tmp_path / "a.png")


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (300, 300)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 2 - 1)
    with pytest.raises(Unreadable, match="too large"):
        open_picture(tmp_path / "huge.png")
    # Large but below the hard limit: used, and remarked on, without a warning.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 - 1)
    image, notes = open_with_notes(tmp_path / "huge.png")
    assert image.size == (300, 300) and notes == ["very many pixels"]


def test_pillow_s_warnings_become_notes_of_their_own_picture(tmp_path: Path) -> None:
    """Two threads at once; warnings of others pass untouched, and the filters come back as they were."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    noise.save(tmp_path / "good.jpg")
    # An EXIF block whose one entry claims more data than there is.
    tiff = b"II*\0\x08\0\0\0\x01\0" + b"\x0e\x01\x02\0\xff\0\0\0\x1a\0\0\0" + b"\0\0\0\0" + b"ab"
    noise.save(tmp_path / "odd.jpg", exif=b"Exif\0\0" + tiff)
    filters, show = list(warnings.filters), warnings.showwarning
    notes: dict[str, list[list[str]]] = {"good.jpg": [], "odd.jpg": []}

    def work(name: str) -> None:
        for _ in range(20):
            notes[name].append(open_with_notes(tmp_path / name)[1])

    threads = [threading.Thread(target=work, args=(name,)) for name in notes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notes["good.jpg"] == [[]] * 20
    assert all(len(found) == 1 and "tag 270" in found[0] for found in notes["odd.jpg"]), notes["odd.jpg"][:2]
    assert warnings.filters == filters and warnings.showwarning is show


def test_a_file_object_is_a_picture_too() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (2, 3), "blue").save(stream, "PNG")
    assert open_picture(stream).size == (2, 3)
    with pytest.raises(Unreadable, match="is a text file"):
        open_picture(io.BytesIO(b"text"))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == (255, 0, 0)


def test_only_the_formats_that_are_asked_for(tmp_path: Path) -> None:
    for format in ("PNG", "JPEG", "TIFF"):
        stream = io.BytesIO()
        Image.new("RGB", (4, 4)).save(stream, format)
        stream.seek(0)
        assert open_with_notes(stream, formats=("PNG", "JPEG", "TIFF", "NOSUCH"))[0].size == (4, 4)
        stream.seek(0)
        with pytest.raises(Unreadable, match="not a picture"):
            open_with_notes(stream, "x", formats=("GIF",))


def test_a_header_that_claims_too_much_is_refused_before_it_is_decoded() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (30, 20)).save(stream, "PNG")
    assert open_with_notes(io.BytesIO(stream.getvalue()), most_pixels=600)[0].size == (30, 20)
    cut = stream.getvalue()[:60]  # decoding it would say something else
    with pytest.raises(Unreadable, match=r"30 x 20 pixels, and at most 0\.000599 million"):
        open_with_notes(io.BytesIO(cut), "x", most_pixels=599)


def test_a_file_that_takes_too_long() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 30:
                raise TimeoutError("took longer than 3 s to decode")
            return super().read(size)

    stream = io.BytesIO()
    Image.new("RGB", (300, 200)).save(stream, "PNG")
    with pytest.raises(Unreadable, match="took longer than 3 s"):
        open_with_notes(Slow(stream.getvalue()), "x")
