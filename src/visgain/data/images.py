"""Pictures from files that nobody vouches for: never outside of the image folder, never larger than allowed.

A picture is a file (`ImageFile`), a piece of a larger file (`ImageSpan`), or bytes that a table hands out
when asked (`data/table.py`); `decode` and `content_hint` serve them all.

What comes out is what the usual trainers see, `Image.convert("RGB")`, except that it is always upright (EXIF) and that
16-bit grey is scaled rather than clipped. Transparency is dropped, as they do, not blended onto a background.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from visgain.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF")
"""What is decoded, recognised by content: plain rasters, nothing that runs programs or refers to other files."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SHOWN_CHARS = 200
_HINT_BYTES = 4096
Bytes = IO[bytes] | io.BytesIO
_MAX_PIXEL_BYTES, _MAX_METADATA_BYTES = 16, 64 << 20
"""Far above what any of the formats needs; a guard against reading a film that is called a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """An image of a dataset: a path as the dataset writes it, relative to `root`."""

    root: Path
    path: str
    max_pixels: int = 100_000_000  # refused from the header on, before anything is decoded
    follow_links: bool = False  # whether symbolic links may lead out of the root

    @property
    def key(self) -> str:
        """The path without detours, with forward slashes."""
        return PurePath(os.path.normpath(self.path)).as_posix()

    def hint(self) -> str | None:
        """See `content_hint`; None where the file may or can not be read, or is empty."""
        try:
            with self._locate().open("rb") as file:
                return content_hint(file) if os.fstat(file.fileno()).st_size else None
        except (ImageError, OSError, ValueError):
            return None

    def open(self) -> Image.Image:
        """Decode to an upright RGB picture without metadata; of an animation, the first frame.

        Raises ImageError with a reason of one line, and nothing else, whatever the path and the file hold.
        """
        return decode(self.path, lambda: self._locate().open("rb"), self.max_pixels)

    def beside(self, path: str) -> ImageFile:
        """What lies at another path, under the same rules."""
        return replace(self, path=path)

    def is_there(self) -> bool:
        """Whether there is anything at the path. Raises ImageError if it is not allowed to look."""
        target = self._allowed()
        try:
            return target.exists()
        except OSError as error:  # e.g. a name that is too long
            raise ImageError(f"cannot read image {_one_line(self.path)}: {error.strerror or error}") from error

    def names(self) -> list[str]:
        """Names of the files in the folder at the path; none if it is no folder. Raises ImageError as `is_there`."""
        target = self._allowed()
        try:
            return [entry.name for entry in os.scandir(target) if entry.is_file()] if target.is_dir() else []
        except OSError as error:
            raise ImageError(f"cannot read image folder {_one_line(self.path)}: {error.strerror or error}") from error

    def _locate(self) -> Path:
        """The path of a regular file that is allowed to be read."""
        target = self._allowed()
        if not stat.S_ISREG(target.stat().st_mode):  # before opening: a pipe would wait for ever
            raise ImageError(f"image {_one_line(self.path)} is not a regular file")
        return target

    def _allowed(self) -> Path:
        """The path of whatever is there, if it may be read."""
        shown = _one_line(self.path)
        if not self.path:
            raise ImageError("the image path is empty")
        if "\0" in self.path:
            raise ImageError(f"image path {shown} holds a null byte")
        if self.path[:5].lower() == "data:":
            raise ImageError(f"image {self.path[:40]}... stands in the text itself (base64); write it to a file")
        if _URL.match(self.path):
            raise ImageError(f"image {shown} is a URL; download it and give --image-root")
        relative = PurePath(os.path.normpath(self.path))
        if relative.anchor:
            raise ImageError(f"image path {shown} is absolute and does not lie below --image-root")
        if relative.parts[:1] == ("..",):
            raise ImageError(f"image path {shown} leads out of --image-root")
        target = self.root / relative
        try:
            is_inside = self.follow_links or target.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that no file can have
            raise ImageError(f"cannot read image {shown}: {_one_line(str(error))}") from error
        if not is_inside:
            raise ImageError(f"image {shown} is a link out of --image-root; --follow-links allows that")
        return target


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpan:
    """A picture that lies in one piece inside of a larger file, such as a member of a tar."""

    container: Path
    name: str  # for messages, and part of the key
    offset: int  # bytes
    size: int  # bytes
    max_pixels: int = 100_000_000
    shard: str = ""  # what the dataset calls the container, where its file name is not enough

    @property
    def key(self) -> str:
        """The picture's name, and where it lies, because names repeat."""
        return f"{self.name} at {self.offset} in {self.shard or self.container.name}"

    def hint(self) -> str | None:
        """See `content_hint`; None where the bytes cannot be read, or there are none."""
        if self.size == 0:
            return None
        try:
            with self.container.open("rb") as file:
                return content_hint(file, self.offset, self.size)
        except OSError:
            return None

    def open(self) -> Image.Image:
        """Decode as `ImageFile` does. Raises ImageError, and nothing else."""
        return decode(self.name, self.content, self.max_pixels)

    def __repr__(self) -> str:
        return f"image {self.key}"  # part of the fingerprint of a row that cannot be scored, wherever it is kept

    def content(self) -> io.BytesIO:
        """The picture's file as it lies there. Raises ImageError, OSError or what a damaged container makes of it."""
        require_plausible(self.name, self.size, self.max_pixels)
        with self.container.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ImageError(f"image {_one_line(self.name)} is cut off: {self.container.name} ends inside of it")
        return io.BytesIO(content)


def content_hint(file: IO[bytes], start: int = 0, size: int | None = None) -> str:
    """The content's size and a hash of its first and last bytes: the same for equal content, wherever it lies."""
    size = file.seek(0, os.SEEK_END) - start if size is None else size
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    for first in (0, max(0, size - _HINT_BYTES)):
        file.seek(start + first)
        digest.update(file.read(min(_HINT_BYTES, size - first)))
    return digest.hexdigest()


def require_plausible(name: str, size: int, max_pixels: int) -> None:
    """Raises ImageError for so many bytes that no picture within `max_pixels` needs them."""
    if size > _MAX_METADATA_BYTES + _MAX_PIXEL_BYTES * max_pixels:
        raise ImageError(
            f"image {_one_line(name)} has {size} bytes, more than --max-pixels {max_pixels} can need; it is not read"
        )


def decode(name: str, source: Callable[[], Bytes], max_pixels: int) -> Image.Image:
    """The upright RGB picture in the bytes that `source` opens, without metadata; of an animation, the first frame.

    Raises ImageError with a reason of one line, and nothing else, whatever the name and the bytes are.
    """
    shown = _one_line(name)
    try:
        with source() as file, _quiet_pillow():
            return _decoded(shown, file, max_pixels)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"image not found: {shown}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files, MemoryError included
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"cannot read image {shown}: {_one_line(why)}") from error


def _decoded(shown: str, file: Bytes, max_pixels: int) -> Image.Image:
    image = _identify(file)
    if image is None:
        raise ImageError(f"image {shown} is empty, damaged or not one of {', '.join(FORMATS)}")
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"image {shown} has {width} x {height} pixels; --max-pixels is {max_pixels}")
    image.load()
    rgb = _to_rgb(_upright(image))
    rgb.info.clear()  # else a processor that looks at EXIF would turn the picture once more
    return rgb


def _identify(file: Bytes) -> Image.Image | None:
    """The picture in the file, its header read and its pixels not yet; None where no format recognises it.

    Stands in for `Image.open`, whose own limit of pixels is a global variable that warns before it refuses.
    """
    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and (accept is None or accept(prefix) is True):
            file.seek(0)
            try:
                return factory(file, "")
            except (SyntaxError, IndexError, TypeError):  # how decoders say "not mine after all"
                continue
    return None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says. Unreadable EXIF says nothing."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the parser raises nearly anything; the pixels are sound
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"32-bit grey pixels (mode {image.mode}) have no known range; save the picture with 8 or 16 bits"
        )
    return image.convert("RGB")


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings: what it can decode is decoded, also where warnings are errors.

    Only Pillow's, because filters are shared by all threads: two that overlap here may leave the filter in place.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _one_line(text: str) -> str:
    """Text from outside as part of a message: one short line that any file and terminal takes."""
    text = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
    return text if text.isprintable() else repr(text)
