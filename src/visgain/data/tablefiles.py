"""Where tables are found: parquet and Arrow files, folders of them, and what `datasets.save_to_disk` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from visgain.data.images import ImageSpan
from visgain.data.parts import base_of, choose, find_parts, whole
from visgain.data.records import Columns, Layout, PathImages, RecordDataset, find_layout
from visgain.data.table import TableImage, TableRows
from visgain.errors import DataError
from visgain.types import ImageRef

_MAGIC = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # parquet, Arrow file, Arrow stream
_SUFFIXES = (".parquet", ".arrow")
_DICT, _STATE = "dataset_dict.json", "state.json"


class TableFormat:
    """Parquet and Arrow."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether the file begins like a table, or the folder or pattern leads to some."""
        return head.startswith(_MAGIC) if head else bool(find_tables(path))

    def __call__(
        self,
        path: Path,
        image_root: Path | None,
        *,
        max_pixels: int,
        follow_links: bool,
        columns: Columns,
        layout: str | None,
    ) -> RecordDataset:
        files = find_tables(path)
        if not files:
            raise DataError(f"{path} holds no parquet or Arrow files")
        base = base_of(path)
        root = (base.parent if base.is_file() else base) if image_root is None else image_root
        opened = PathImages(root=root, max_pixels=max_pixels, follow_links=follow_links)
        return table_dataset(TableRows(whole(path), files, columns, max_pixels), opened, layout, base.stem)


def table_dataset(rows: TableRows, images: PathImages, layout: str | None, name: str) -> RecordDataset:
    """`rows` as samples; pictures that are no bytes are files, read by `images`. `name`: the dataset's.

    Raises DataError for files that do not belong together: one would be read as what the other is.
    """
    if layout is None and not set(rows.columns.names) - {"images"}:
        _require_one_layout(rows)
    return RecordDataset(
        rows,
        images.root,
        layout=layout,
        columns=rows.columns,
        max_pixels=images.max_pixels,
        follow_links=images.follow_links,
        open_image=Pictures(images),
        name=name,
    )


def _require_one_layout(rows: TableRows) -> None:
    found: dict[Layout, Path] = {}
    for fields, file in rows.kinds.items():
        with suppress(DataError):  # a file may lack a column
            found.setdefault(find_layout(fields, Columns(), file), file)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise DataError(f"{one} and {other.name} hold rows of different layouts; let --data name one of the files")


TABLE = TableFormat()


class Pictures:
    """Images that a container already made, and whatever else `otherwise` makes an image of."""

    def __init__(self, otherwise: Callable[[Any], ImageRef]) -> None:
        self._otherwise = otherwise

    def __call__(self, value: Any) -> ImageRef:
        return value if isinstance(value, TableImage | ImageSpan) else self._otherwise(value)


def find_tables(path: Path) -> list[Path]:
    """The files of the table at `path`, in order; empty if there is none. Raises DataError for an unclear folder."""
    base, part = base_of(path), str(path)[len(str(base_of(path))) + 1 :]
    if (base / _DICT).is_file():
        return _saved_parts(base, part)
    if (base / _STATE).is_file():
        return _saved(base)
    return find_parts(path, _SUFFIXES)


def _saved_parts(folder: Path, part: str) -> list[Path]:
    """Of a saved DatasetDict the split that is wanted."""
    splits = _read(folder / _DICT).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) and Path(name).name == name for name in splits):
        raise DataError(f"{folder / _DICT} names no splits; save the dataset again")
    (chosen,) = choose([f"{name}/{_STATE}" for name in splits], part, str(folder))
    return _saved(folder / chosen.removesuffix(f"/{_STATE}"))


def _saved(folder: Path) -> list[Path]:
    """The files of a dataset saved to disk. Raises DataError if one is missing or its rows stand in another order."""
    state = _read(folder / _STATE)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder} was saved with its rows in an order of their own; "
            "load it and save it again with a newer version of datasets"
        )
    names = [each.get("filename") for each in state.get("_data_files") or [] if isinstance(each, dict)]
    files = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    missing = next((file for file in files if not file.is_file()), None)
    if not files or len(files) < len(names) or missing:
        raise DataError(f"{folder} is not complete: {missing or 'its state.json names no data'}; copy or save it again")
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}
