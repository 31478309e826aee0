"""One picture from a file: upright, opaque, RGB, eight bits; or a reason why not."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from headstart.errors import DataError

EXTENSIONS = frozenset(
    f".{ending}"
    for ending in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "bmp", "dib", "gif", "tif", "tiff", "webp"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif", "tga", "ico", "pcx"),
    )
)
"""File name endings that are taken for pictures, in lower case."""

# What Pillow raises on damaged input, by experience and by its own fuzz tests.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_STRIP = 1 << 20  # pixels
_GIANT = 24_000_000  # pixels; one picture of this size or more is decoded at a time


class Unreadable(DataError):
    """A file that holds no picture that can be decoded.

    Attributes:
        path: the file, as it was given.
        reason: why, in a few words, without the path.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}.")
        self.path = path
        self.reason = reason


class _Collector:
    """Takes what Pillow warns about, per thread.

    Python's filters are global, so the first that enters installs and the last that leaves restores;
    between these a warning of Pillow goes to the list of the thread that decodes, and any other warning
    goes where it would have gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._catch: warnings.catch_warnings[None] | None = None
        self._local = threading.local()

    @contextmanager
    def __call__(self) -> Iterator[list[str]]:
        outer: list[str] | None = getattr(self._local, "notes", None)
        notes: list[str] = []
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._install()
        self._local.notes = notes
        try:
            yield notes
        finally:
            self._local.notes = outer
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._catch is not None:
                    self._catch.__exit__(None, None, None)
                    self._catch = None

    def _install(self) -> None:
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.filterwarnings("always", module=r"PIL\.")
        before = warnings.showwarning

        def show(message, category, filename, lineno, file=None, line=None):  # type: ignore[no-untyped-def]
            notes = getattr(self._local, "notes", None)
            if notes is None:
                before(message, category, filename, lineno, file, line)
            else:
                giant = issubclass(category, Image.DecompressionBombWarning)
                notes.append("very many pixels" if giant else " ".join(str(message).split()).rstrip("."))

        warnings.showwarning = show


_collect = _Collector()
_alone = threading.Lock()


def _is_giant(image: Image.Image) -> bool:
    return image.width * image.height >= _GIANT


def open_picture(source: str | Path | BinaryIO) -> Image.Image:
    """Open a picture as people see it.

    The EXIF orientation is applied, transparency lies on white, grey, palette, CMYK and 16-bit pictures
    become RGB (16 bits are scaled, not clipped). Of an animation it is the first frame.

    Args:
        source: a path, or a binary file object.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        Unreadable: the file and the reason.
    """
    return open_with_notes(source)[0]


def open_with_notes(
    source: str | Path | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
) -> tuple[Image.Image, list[str]]:
    """As `open_picture`, with what Pillow had to remark on the file (damaged metadata, mostly).

    Args:
        source: a path, or a binary file object.
        name: what to call the file in an error; None: its own name.
        formats: Pillow's names of the formats that are tried; None: all that it has.
        most_pixels: refuse a picture whose header claims more, before it is decoded; None: Pillow's bound.
    """
    shown = name or (
        str(source) if isinstance(source, str | Path) else str(getattr(source, "name", "picture"))
    )
    if formats is not None:
        Image.init()  # else Pillow knows only five formats by name
        formats = tuple(each for each in formats if each in Image.OPEN)
    with _collect() as notes:
        try:
            if isinstance(source, str | Path):
                content = Path(source).read_bytes()
                stream: BinaryIO = io.BytesIO(content)
            else:
                stream = source
            with Image.open(stream, formats=formats) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    raise Unreadable(shown, _too_large(image, most_pixels))
                with _alone if _is_giant(image) else nullcontext():
                    image.load()
                    picture = _rgb(image)
                    orientation = _orientation(image, notes)
            if orientation in _UPRIGHT:
                picture = picture.transpose(_UPRIGHT[orientation])
        except _DAMAGE as error:
            raise Unreadable(shown, _reason(error, source)) from None
    return picture, list(dict.fromkeys(notes))


def _too_large(image: Image.Image, most: int) -> str:
    return f"too large: {image.width} x {image.height} pixels, and at most {most / 1e6:g} million are taken"


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation, 1 where the metadata is damaged: that's no reason to lose the picture."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    except _DAMAGE as error:
        notes.append(f"damaged EXIF data ({type(error).__name__})")
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB of eight bits, transparency on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency, laid on white."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    # In strips: one picture of 169 million pixels would otherwise be held four times over.
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white.paste(strip.convert("RGB"), (0, top), mask=strip.getchannel("A"))
    return white


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of 16 bits, 32 bits or floating point as eight bits.

    Whole numbers up to 65535 are taken for 16 bits; larger ones, and floating point, are scaled by the
    smallest full range that holds them (1, 255, 65535, else their own largest value).
    """
    grey = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if grey.size and grey.min() < 0:
        grey = grey - grey.min()
    top = float(grey.max()) if grey.size else 0.0
    ranges = (65535.0,) if np.issubdtype(values.dtype, np.integer) else (1.0, 255.0, 65535.0)
    full = next((r for r in ranges if top <= r), top)
    scaled: np.ndarray = np.round(grey * (255.0 / full)).astype(np.uint8)
    return scaled


def _reason(error: BaseException, source: str | Path | BinaryIO) -> str:
    """Why a file could not be read, in a few plain words."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not a picture"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million pixels"
    if isinstance(error, MemoryError):
        return "too large for the memory"
    if isinstance(error, TimeoutError):
        return str(error) or "took too long to read"
    if isinstance(error, UnidentifiedImageError):
        return _not_a_picture(source)
    text = " ".join(str(error).split()).rstrip(".")
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return f"truncated: the file ends too early ({text})" if text else "truncated"
    return f"broken ({text or type(error).__name__})"


def _not_a_picture(source: str | Path | BinaryIO) -> str:
    """What a file is that Pillow does not know."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            start = file.read(512)
    else:
        source.seek(0)
        start = source.read(512)
    if not start:
        return "is empty (0 bytes)"
    if b"\0" not in start:
        try:
            start.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start < len(start) - 4:
                return "is not a picture in a format that Pillow knows"
        return "is a text file, not a picture"
    return "is not a picture in a format that Pillow knows"
