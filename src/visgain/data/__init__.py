"""Datasets: files of rows, read one row at a time into samples.

`open_dataset` looks at the first bytes of a file and hands it to the format that recognises them. A format is one
object in `FORMATS`, or an entry point in the group `visgain.data_formats`; see `DataFormat` for what it promises.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Protocol, runtime_checkable

from visgain.errors import DataError
from visgain.registry import Registry
from visgain.types import Sample, Skipped

_SNIFFED_BYTES = 4096


@runtime_checkable
class Dataset(Protocol):
    """Rows of one dataset file, in its order. Picklable, so that it can travel to loader processes.

    A row that cannot be scored is a Skipped with the reason; it is never replaced by a neighbour. Opening a dataset
    does not open its images, so a Sample can still turn out to have an image that raises ImageError.
    """

    path: Path
    image_root: Path

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset file's bytes in hexadecimal, computed on first use."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample | Skipped:
        """The row at this position, from 0. Raises IndexError outside of `range(len(dataset))`."""
        ...


@runtime_checkable
class DataFormat(Protocol):
    """How one kind of dataset file is recognised and opened. A Dataset class with a `recognises` classmethod is one."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether a file that starts with `head` (no byte-order mark, no leading white space) is of this format."""
        ...

    def __call__(self, path: Path, image_root: Path, *, max_pixels: int, follow_links: bool) -> Dataset:
        """Read the file. Raises DataError that says where it is malformed."""
        ...


FORMATS: Registry[DataFormat] = Registry("data format", {"llava": "visgain.data.llava:LlavaDataset"})


def open_dataset(
    path: Path, image_root: Path | None = None, *, max_pixels: int = 100_000_000, follow_links: bool = False
) -> Dataset:
    """The dataset in the file `path`, its images relative to `image_root` (by default the file's own folder).

    Raises DataError when the file or the image folder is missing, unreadable, empty, malformed or of no known format.
    """
    head = _head(path)
    if not head:
        raise DataError(f"{path} holds no rows: the file is empty")
    image_root = path.parent if image_root is None else image_root
    if not image_root.is_dir():
        raise DataError(f"image folder {image_root} does not exist or is not a folder; check --image-root")
    for name in FORMATS.names():
        data_format = FORMATS.get(name)
        if data_format.recognises(path, head):
            return data_format(path, image_root, max_pixels=max_pixels, follow_links=follow_links)
    raise DataError(
        f"{path} is in no known data format ({', '.join(FORMATS.names())}); "
        "a LLaVA dataset is UTF-8 text, either one JSON list of rows or one JSON object a line"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a regular file from its first sign on; empty where there is none."""
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder; --data takes the dataset file inside it")
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{path} is not a regular file; --data takes a dataset file")
        with path.open("rb") as file:
            return file.read(_SNIFFED_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except FileNotFoundError:
        raise DataError(f"dataset {path} does not exist; check --data") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read dataset {path}: {error}") from error
