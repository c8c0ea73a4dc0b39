"""Datasets: rows in files and folders, read one row at a time into samples.

`open_dataset` looks at what is there and hands it to the format that recognises it. Formats come in two kinds: FORMATS
say how rows are stored (JSON, CSV, parquet ...), `records.LAYOUTS` what the fields of a row mean. Each is one object
in its registry, or an entry point in the group `visgain.data_formats` or `visgain.data_layouts`.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from visgain.data.records import LAYOUTS, Columns
from visgain.errors import DataError, UnknownName
from visgain.registry import Registry, suggest
from visgain.types import Sample, Skipped

_SNIFFED_BYTES = 4096


@runtime_checkable
class Dataset(Protocol):
    """Rows of one dataset, in its order. Picklable, so that it can travel to loader processes.

    A row that cannot be scored is a Skipped with the reason; it is never replaced by a neighbour. Opening a dataset
    does not open its images, so a Sample can still turn out to have an image that raises ImageError. What is in memory
    does not grow with the content, and the index of rows is shared by all processes.
    """

    path: Path
    image_root: Path

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset's content in hexadecimal."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Sample | Skipped:
        """The row at this position, from 0. Raises IndexError outside of `range(len(dataset))`."""
        ...


@runtime_checkable
class DataFormat(Protocol):
    """How one kind of storage is recognised and opened."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether `path` is of this format.

        `head`: the first bytes of a regular file (no byte-order mark, no leading white space); empty for a folder, and
        for a path where nothing is, which may be a name in some other place.
        """
        ...

    def __call__(
        self,
        path: Path,
        image_root: Path | None,
        *,
        max_pixels: int,
        follow_links: bool,
        columns: Columns,
        layout: str | None,
    ) -> Dataset:
        """Open it. `layout`: a name in `records.LAYOUTS` that the user insists on.

        Raises DataError that says where it is malformed, ConfigError for columns that are not there.
        """
        ...


FORMATS: Registry[DataFormat] = Registry(
    "data format",
    {
        "table": "visgain.data.tablefiles:TABLE",
        "webdataset": "visgain.data.webdataset:WEBDATASET",
        "json": "visgain.data.jsontext:JSON",
        "csv": "visgain.data.csvtext:CSV",
        "hub": "visgain.data.hub:HUB",
    },
)
ORDER: tuple[str, ...] = ("table", "webdataset", "json", "csv", "hub")
"""In which formats are asked; those of other packages come first, because they are more special."""


def open_dataset(
    path: Path,
    image_root: Path | None = None,
    *,
    max_pixels: int = 100_000_000,
    follow_links: bool = False,
    columns: str | Mapping[str, str] | None = None,
    format: str | None = None,  # noqa: A002 - as the flag is called
) -> Dataset:
    """The dataset at `path`, its images relative to `image_root` (by default the folder of the file).

    `columns`: names that sniffing cannot know, as in `--columns` (see `records.KEYS`). `format`: a name in FORMATS or
    `records.LAYOUTS`, instead of sniffing. Raises DataError when the dataset or the image folder is missing,
    unreadable, empty, malformed or of no known format, ConfigError when an option is wrong.
    """
    head = _head(path)
    if image_root is not None and not image_root.is_dir():
        raise DataError(f"image folder {image_root} does not exist or is not a folder; check --image-root")
    storage, layout = _wanted(format)
    data_format = FORMATS.get(storage) if storage else _recognised(path, head)
    return data_format(
        path,
        image_root,
        max_pixels=max_pixels,
        follow_links=follow_links,
        columns=Columns.of(columns),
        layout=layout,
    )


def is_there(path: Path) -> bool:
    """Whether there is something to open: a file, a folder, or a name that a format knows to look up."""
    return path.exists() or any(FORMATS.get(name).recognises(path, b"") for name in FORMATS.names())


def reading(columns: str | Mapping[str, str] | None, format: str | None) -> dict[str, Any]:  # noqa: A002
    """What of the user's words a run's identity holds: only what was said. The dataset's hash knows nothing of it."""
    names = dict(Columns.of(columns).names)
    return {**({"columns": names} if names else {}), **({"format": format} if format else {})}


def _wanted(name: str | None) -> tuple[str | None, str | None]:
    """What `--format` insists on: a format or a layout."""
    if name is None or name in LAYOUTS.names():
        return None, name
    if name not in FORMATS.names():
        known = [*FORMATS.names(), *LAYOUTS.names()]
        raise UnknownName(f"unknown data format {name!r}; {suggest(name, known)}")
    return name, None


def _recognised(path: Path, head: bytes) -> DataFormat:
    for name in (*(name for name in FORMATS.names() if name not in ORDER), *ORDER):
        data_format = FORMATS.get(name)
        if data_format.recognises(path, head):
            return data_format
    known = ", ".join(FORMATS.names())
    if path.is_dir():
        raise DataError(f"{path} is a folder that holds no dataset in a known format ({known})")
    if not path.exists():
        raise DataError(f"dataset {path} does not exist; check --data")
    raise DataError(
        f"{path} is in no known data format ({known}); rows are read e.g. from UTF-8 text that is one JSON list or has "
        "one JSON object a line, from .csv and .tsv"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a regular file from its first sign on; empty where there is no file."""
    try:
        if path.is_dir() or not path.exists():
            return b""
        if not path.is_file():  # reading a pipe would wait for ever
            raise DataError(f"{path} is not a regular file; --data takes a dataset file or folder")
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read dataset {path}: {error}") from error
    if not head:
        raise DataError(f"{path} holds no rows: the file is empty")
    return head
