"""Pictures as foreign trainers take them: files with a path. Those that are files stay where they are.

But trainers take the pixels as they lie in the file, and what was scored is upright. So a file whose EXIF says that it
is to be turned is not named by its own path: an upright copy is written.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path

from PIL import ExifTags, Image

from visgain.data.images import FORMATS, ImageFile, ImageSpan
from visgain.data.table import TableImage
from visgain.errors import DataError, ImageError
from visgain.export.rows import KeptRow
from visgain.storage import atomic_path
from visgain.types import ImageRef

FOLDER = "images"

_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that every trainer reads, so that bytes of a table or tar need not become PNG, which is far larger."""

_PLAIN = ("RGB", "L")
"""Modes of pixels that a trainer makes the same of as we do."""


def picture_paths(kept: KeptRow, out: Path) -> list[str]:
    """The absolute path of each picture of a row, in order.

    Pictures that lie in tables or tars, or are to be turned, are written to `out`/images, once each. Raises DataError
    for one that cannot be read.
    """
    try:
        return [_path(image, out) for image in kept.sample.images]
    except ImageError as error:
        raise DataError(f"row {kept.row}: {error}; score and select again") from error


def in_export(path: str, out: Path) -> str | None:
    """The path relative to `out` of a picture that was written there; None for one that stays where it is."""
    folder, name = os.path.split(path)
    return f"{FOLDER}/{name}" if folder == str(out.absolute() / FOLDER) else None


def _path(image: ImageRef, out: Path) -> str:
    if not isinstance(image, ImageFile):
        return _written(image, image.key, out)
    if not image.is_there():
        raise ImageError(f"image {image.path} is gone")
    path = os.path.normpath(Path(image.root).absolute() / image.path)
    # With the content, because another picture may come to lie at the same path before the next export.
    return path if _as_it_lies(path) else _written(image, f"{image.key}\0{image.hint()}", out)


def _written(image: ImageRef, key: str, out: Path) -> str:
    """The path of the picture in `out`: its own bytes if they will do, else an upright PNG."""
    name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = out.absolute() / FOLDER / name
    for suffix in _COPIED.values():
        if (there := path.with_suffix(f".{suffix}")).exists():  # of another row, or of an export that was interrupted
            return str(there)
    suffix, content = _copy(image)
    path = path.with_suffix(f".{suffix}")
    with atomic_path(path) as temporary:
        if content is None:
            image.open().save(temporary, format="PNG")
        else:
            temporary.write_bytes(content)
    return str(path)


def _copy(image: ImageRef) -> tuple[str, memoryview | None]:
    """The suffix of the file, and its bytes if these can be copied."""
    if not isinstance(image, ImageSpan | TableImage):
        return "png", None
    try:
        content = image.content()
    except (ImageError, OSError):
        return "png", None  # and opening it says what is wrong
    kind, mode = _as_it_lies(content) or ("", "")
    suffix = _COPIED.get(kind) if mode in _PLAIN else None
    return (suffix, content.getbuffer()) if suffix else ("png", None)


def _as_it_lies(file: str | io.BytesIO) -> tuple[str, str] | None:
    """Format and mode of a picture that need not be turned, from its header; None of others, and where it is unclear.

    Of PNG, what stands behind the pixels is not looked for, since that takes decoding them.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels: how many are allowed was decided when it was scored
            with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
                turn = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)  # PNG's own would decode
                return (picture.format or "", picture.mode) if turn not in range(2, 9) else None
    except Exception:  # decoders raise nearly anything
        return None
