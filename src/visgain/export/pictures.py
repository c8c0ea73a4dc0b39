"""Pictures as foreign trainers take them: files with a path. Those that are files stay where they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from visgain.data.images import ImageFile
from visgain.errors import DataError, ImageError
from visgain.export.rows import KeptRow
from visgain.storage import atomic_path
from visgain.types import ImageRef

FOLDER = "images"


def picture_paths(kept: KeptRow, out: Path) -> list[str]:
    """The absolute path of each picture of a row, in order.

    Pictures that lie in tables, tars or videos are written to `out`/images, once each. Raises DataError for one that
    cannot be read.
    """
    try:
        return [_path(image, out) for image in kept.sample.images]
    except ImageError as error:
        raise DataError(f"row {kept.row}: {error}; score and select again") from error


def _path(image: ImageRef, out: Path) -> str:
    if isinstance(image, ImageFile):
        if not image.is_there():
            raise ImageError(f"image {image.path} is gone")
        return os.path.normpath(Path(image.root).absolute() / image.path)
    name = hashlib.blake2b(image.key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = out.absolute() / FOLDER / f"{name}.png"
    if not path.exists():  # an export that was interrupted left it whole
        with atomic_path(path) as temporary:
            image.open().save(temporary, format="PNG")
    return str(path)
