"""Pictures of rows that are written again as a dataset of their own: which names they have there, relative to what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visgain.data.images import ImageFile
from visgain.storage import storage_errors
from visgain.types import ImageRef


def place_images(rows: Sequence[Sequence[ImageRef]], folder: Path) -> tuple[list[list[str]], Path]:
    """The names of each row's pictures, and the folder that they are relative to.

    Files of one folder stay where they are; all other pictures are written to folder/images as PNG. Raises ImageError
    for one of those that cannot be read.
    """
    images = [image for row in rows for image in row]
    roots = {image.root if isinstance(image, ImageFile) else None for image in images}
    root = next(iter(roots)) if len(roots) == 1 else None
    if root is not None:
        return [[image.path for image in row if isinstance(image, ImageFile)] for row in rows], root
    names: dict[str, str] = {}
    return [[_copied(image, folder, names) for image in row] for row in rows], folder


def _copied(image: ImageRef, folder: Path, names: dict[str, str]) -> str:
    if image.key not in names:
        names[image.key] = f"images/{len(names):06d}.png"
        path = folder / names[image.key]
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.open().save(path)
    return names[image.key]
