"""Pictures from files that nobody vouches for: never outside of the image folder, never larger than allowed.

What comes out is what the usual trainers see, `Image.convert("RGB")`, except that it is always upright (EXIF) and that
16-bit grey is scaled rather than clipped. Transparency is dropped, as they do, not blended onto a background.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_SHOWN_CHARS = 200
_HINT_BYTES = 4096


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
        """The file's size and a hash of its first and last bytes; None where it may or can not be read."""
        try:
            with self._locate().open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest = hashlib.blake2b(str(size).encode(), digest_size=12)
                for start in (0, max(0, size - _HINT_BYTES)):
                    file.seek(start)
                    digest.update(file.read(_HINT_BYTES))
        except (ImageError, OSError, ValueError):
            return None
        return digest.hexdigest()

    def open(self) -> Image.Image:
        """Decode to an upright RGB picture without metadata; of an animation, the first frame.

        Raises ImageError with a reason of one line, and nothing else, whatever the path and the file hold.
        """
        try:
            return self._decode(self._locate())
        except ImageError:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise ImageError(f"image not found: {_one_line(self.path)}") from None
        except Exception as error:  # decoders raise nearly anything on damaged files, MemoryError included
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ImageError(f"cannot read image {_one_line(self.path)}: {_one_line(why)}") from error

    def _locate(self) -> Path:
        """The path of a regular file that is allowed to be read."""
        shown = _one_line(self.path)
        if not self.path:
            raise ImageError("the image path is empty")
        if "\0" in self.path:
            raise ImageError(f"image path {shown} holds a null byte")
        if _URL.match(self.path):
            raise ImageError(f"image {shown} is a URL; download it and give --image-root")
        relative = PurePath(os.path.normpath(self.path))
        if relative.anchor:
            raise ImageError(f"image path {shown} is absolute; it must be relative to --image-root")
        if relative.parts[:1] == ("..",):
            raise ImageError(f"image path {shown} leads out of --image-root")
        target = self.root / relative
        if not self.follow_links and not target.resolve().is_relative_to(self.root.resolve()):
            raise ImageError(f"image {shown} is a link out of --image-root; --follow-links allows that")
        if not stat.S_ISREG(target.stat().st_mode):  # before opening: a pipe would wait for ever
            raise ImageError(f"image {shown} is not a regular file")
        return target

    def _decode(self, target: Path) -> Image.Image:
        with target.open("rb") as file, _quiet_pillow():
            image = _identify(file)
            if image is None:
                raise ImageError(f"image {_one_line(self.path)} is empty, damaged or not one of {', '.join(FORMATS)}")
            width, height = image.size
            if width * height > self.max_pixels:
                raise ImageError(
                    f"image {_one_line(self.path)} has {width} x {height} pixels; --max-pixels is {self.max_pixels}"
                )
            image.load()
            rgb = _to_rgb(_upright(image))
        rgb.info.clear()  # else a processor that looks at EXIF would turn the picture once more
        return rgb


def _identify(file: IO[bytes]) -> Image.Image | None:
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
