"""What lies on disk: score parts, selections, run.json, skipped.jsonl. Written whole or not at all.

A file is written beside its final name and renamed, so a file that exists is complete. `run.json` is written first and
says which configuration the folder belongs to; a run with another configuration stops and prints the difference.
The schemas here are the public format (docs/schema.md).
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64
from tqdm import tqdm

from visgain.errors import StorageError
from visgain.types import Selection, Skipped, TokenScores

SCORE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("skip_reason", pa.string()),  # null where the row was scored or is text-only
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("n_image_tokens", pa.int32(), nullable=False),
        pa.field("n_prompt_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("gain", pa.float64()),  # nats, mean of token gains; null for text-only and skipped rows
        pa.field("token_id", pa.list_(pa.int32()), nullable=False),
        pa.field("turn", pa.list_(pa.int32()), nullable=False),
        pa.field("char_start", pa.list_(pa.int32()), nullable=False),
        pa.field("char_end", pa.list_(pa.int32()), nullable=False),
        pa.field("nll_seen", pa.list_(pa.float32()), nullable=False),  # nats; empty for text-only and skipped rows
        pa.field("nll_blind", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row of a score part for every row of the dataset: scored, text-only or skipped."""

PER_IMAGE_SCHEMA = pa.schema(
    [
        *SCORE_SCHEMA,
        pa.field("image_gain", pa.list_(pa.float64()), nullable=False),  # nats; empty for text-only and skipped rows
        pa.field("nll_blind_image", pa.list_(pa.list_(pa.float32())), nullable=False),  # [images][answer tokens]
    ]
)
"""The same of a run that blinds each image on its own. A run says in its identity whether it does."""

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("fingerprint", pa.int64(), nullable=False),
        pa.field("token_id", pa.list_(pa.int32()), nullable=False),
        pa.field("keep", pa.list_(pa.bool_()), nullable=False),
    ]
)
"""One row for every kept row of the dataset. The k-th supervised label must be token_id[k]; it is active if keep[k]."""

SOFT_SELECTION_SCHEMA = pa.schema(
    [
        *SELECTION_SCHEMA,
        pa.field("weight", pa.list_(pa.float32()), nullable=False),  # of each token's loss: above 0 if keep[k], else 0
    ]
)
"""The same of a selection with soft weights. Without them every kept token weighs 1."""

CANDIDATES_SCHEMA = pa.schema([pa.field("row", pa.int64(), nullable=False)])
"""The rows that a selection was chosen from: those of its scores that were not skipped."""

CANDIDATES = "candidates.parquet"
"""In a selection's folder."""

_CHUNK_ROWS = 1 << 13
"""Rows in one chunk of a list column that we build, and in one batch that is read: bounds the memory of either."""

_BATCH_BYTES = 1 << 24
"""A batch that is read is not filled up beyond this, so that long answers make small batches."""

_PART_NAME = re.compile(r"part-(\d{5,})-of-(\d{5,})\.parquet")


# ---------------------------------------------------------------- atomic files


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error about `path` (disk full, no permission) into one StorageError."""
    try:
        yield
    except OSError as error:
        hint = "free some space and run the same command again to resume" if error.errno == 28 else "check --out"
        raise StorageError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` on success, removed on failure."""
    # Processes on several machines may share the folder, so a process number is not enough.
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Parsed contents of one of our own JSON files. Raises StorageError that names `what` is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist: {path.parent} holds no {what}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {what} from {path}: {error}") from error


def file_hash(path: Path) -> str:
    """Hexadecimal hash of a file's bytes. Raises StorageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------- run.json


def claim_run(folder: Path, identity: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Make `folder` belong to the run described by `identity`. Returns True if it already did (a resume).

    `identity` is everything that the result depends on; `record` is kept for the reader (versions, times) and may
    differ between starts. Raises StorageError with the differing keys if the folder belongs to another run.
    """
    path = folder / "run.json"
    identity = json.loads(json.dumps(identity))
    if path.exists():
        before = read_json(path, "run")["identity"]
        changed = list(_differences(before, identity))
        if changed:
            raise StorageError(
                f"{folder} belongs to a run with another configuration; use another --out, or undo the change:\n"
                + "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in changed)
            )
        return True
    if any(folder.glob("part-*.parquet")):
        raise StorageError(f"{folder} holds score parts but no run.json; use another --out")
    write_json(path, {"identity": identity, **record})
    return False


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    elif before != now:
        yield prefix, before, now


# ---------------------------------------------------------------- scores


def score_table(records: Iterable[TokenScores | Skipped], schema: pa.Schema = SCORE_SCHEMA) -> pa.Table:
    """Records of any order as a table in `schema`, sorted by row."""
    rows = [_score_row(record) for record in sorted(records, key=lambda record: record.row)]
    return pa.Table.from_pylist(rows, schema=schema)


def score_schema(run: Mapping[str, Any]) -> pa.Schema:
    """The schema of a run's parts, from its record (run.json)."""
    return PER_IMAGE_SCHEMA if run.get("identity", {}).get("per_image") else SCORE_SCHEMA


def _score_row(record: TokenScores | Skipped) -> dict[str, Any]:
    shared = {
        "row": record.row,
        "id": record.id,
        "fingerprint": record.fingerprint,
        "source": record.source,
        "n_images": record.n_images,
    }
    if isinstance(record, Skipped):
        lists = ("token_id", "turn", "char_start", "char_end", "nll_seen", "nll_blind", "image_gain", "nll_blind_image")
        empty: dict[str, Any] = {name: [] for name in lists}
        counts = {"n_image_tokens": 0, "n_prompt_tokens": 0, "truncated": False}
        return {**shared, **counts, **empty, "skip_reason": record.reason, "gain": None}
    return {
        **shared,
        "skip_reason": None,
        "n_image_tokens": record.n_image_tokens,
        "n_prompt_tokens": record.n_prompt_tokens,
        "truncated": record.truncated,
        "gain": record.mean_gain if len(record.nll_seen) else None,
        "token_id": record.token_id,
        "turn": record.turn,
        "char_start": record.chars[:, 0],
        "char_end": record.chars[:, 1],
        "nll_seen": record.nll_seen,
        "nll_blind": record.nll_blind,
        "image_gain": record.image_gain,
        "nll_blind_image": record.nll_blind_image,
    }


def part_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"part-{index:05d}-of-{count:05d}.parquet"


def write_part(folder: Path, index: int, count: int, table: pa.Table) -> None:
    """Write part `index` of `count`, whole or not at all."""
    floats = ["gain", "nll_seen.list.element", "nll_blind.list.element"]
    if "nll_blind_image" in table.column_names:
        floats += ["image_gain.list.element", "nll_blind_image.list.element.list.element"]
    integers = [f"{name}.list.element" for name in ("token_id", "turn", "char_start", "char_end")]
    with atomic_path(part_path(folder, index, count)) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            row_group_size=_CHUNK_ROWS,  # a reader needs memory for one
            use_dictionary=["source", "skip_reason", *integers],
            use_byte_stream_split=floats,
        )


def finished_parts(folder: Path, count: int) -> set[int]:
    """Indices of the parts already written. Raises StorageError if the folder is split into another number of parts."""
    finished = set()
    for path in folder.glob("part-*.parquet"):
        match = _PART_NAME.fullmatch(path.name)
        if match is None or int(match[2]) != count:
            raise StorageError(f"{path} is not one of the {count} parts of this run; move it away or use another --out")
        finished.add(int(match[1]))
    return finished


def score_parts(folder: Path, *, partial: bool = False) -> list[Path]:
    """The parts of a finished run, in their order. `partial`: accept a run that has parts missing.

    Raises StorageError if the folder holds no scores or an unfinished run.
    """
    n_parts = read_json(folder / "run.json", "scores").get("n_parts")
    if not isinstance(n_parts, int):
        raise StorageError(f"{folder / 'run.json'} is not the record of a score run; point --scores at one")
    finished = finished_parts(folder, n_parts)
    missing = n_parts - len(finished)
    if not finished or (missing and not partial):
        raise StorageError(f"{folder} is unfinished: {missing} of {n_parts} parts missing; run `visgain score` again")
    return [part_path(folder, index, n_parts) for index in sorted(finished)]


def scan_scores(folder: Path, columns: Sequence[str], *, description: str) -> Iterator[pa.Table]:
    """All scores of a finished run, some thousand rows at a time, in the order of the parts.

    Memory does not grow with the number of rows. Progress under `description` goes to stderr if it takes seconds.
    Raises StorageError if the folder holds no scores, a damaged part, or an unfinished run.
    """
    paths = score_parts(folder)
    n_rows = read_json(folder / "run.json", "scores").get("n_rows")
    with tqdm(total=n_rows, desc=description, unit="row", delay=2, mininterval=0.5) as progress:
        for table in _read_ahead(_batches(paths, list(columns))):
            yield table
            progress.update(len(table))


def _batches(paths: Iterable[Path], columns: list[str]) -> Iterator[pa.Table]:
    """The rows of all parts: small parts are gathered until they are a batch, large ones come by row groups."""
    waiting: list[pa.Table] = []
    for path in paths:
        for table in _row_groups(path, columns):
            waiting.append(table)
            if sum(map(len, waiting)) >= _CHUNK_ROWS or sum(table.nbytes for table in waiting) >= _BATCH_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups that are not empty."""
    with _part_errors(path), pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            table = file.read_row_group(index, columns=columns).select(columns)
            if len(table):
                yield table


_Item = TypeVar("_Item")


def _read_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items, of which the next ones are made in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(3))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def read_scores(folder: Path, columns: Sequence[str] | None = None, *, partial: bool = False) -> pa.Table:
    """All scores of a finished run in memory, sorted by row; `scan_scores` is for more than fit there.

    `columns`: which ones to read (default all). `partial`: accept a run that has parts missing.
    Raises StorageError if the folder holds no scores, a damaged part, or an unfinished run.
    """
    paths = score_parts(folder, partial=partial)
    names = list(score_schema(read_json(folder / "run.json", "scores")).names if columns is None else columns)
    fields = [PER_IMAGE_SCHEMA.field(name) for name in names]
    lists = [field.name for field in fields if _is_flat_list(field.type)]
    table = _read_parts(paths, list(dict.fromkeys(["row", *(name for name in names if name not in lists)])))
    order = np.argsort(table.column("row").to_numpy(), kind="stable")
    sorted_columns = {name: table.column(name).take(pa.array(order)) for name in table.column_names}
    for name in lists:  # one at a time, which takes as long and 40% less memory than all at once
        sorted_columns[name] = _reordered_lists(*_read_lists(paths, name), order)
    return pa.table([sorted_columns[name] for name in names], schema=pa.schema(fields))


def _is_flat_list(kind: pa.DataType) -> bool:
    """Whether `kind` is a list of numbers, not of lists."""
    return bool(pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type))


def _read_parts(paths: Sequence[Path], columns: list[str]) -> pa.Table:
    with ThreadPoolExecutor() as pool:  # the parts are too small for Arrow's own threads to help
        return pa.concat_tables(pool.map(lambda path: _read_part(path, columns), paths))


def _read_part(path: Path, columns: list[str]) -> pa.Table:
    """One part as it lies on disk. Raises StorageError if it is damaged or lacks one of the columns."""
    with _part_errors(path), pq.ParquetFile(path) as file:  # pq.read_table costs several times as much for a small file
        return file.read(columns=columns).select(columns)


@contextmanager
def _part_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise StorageError(f"{path} is not a score part of this version: {error.args[0]}") from error
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {error}; delete it and run `visgain score` again") from error


def _read_lists(paths: Sequence[Path], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column of several parts, in the order of the parts: flat values and lengths."""
    column = _read_parts(paths, [name]).column(name)
    return flat_values(column), list_lengths(column)


def _reordered_lists(values: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> pa.ChunkedArray:
    """The lists at the positions `order` (int64). Arrow's `take` would hold an index of 8 bytes for every value."""
    first = np.cumsum(lengths) - lengths
    chunks: list[pa.Array] = []
    for start in range(0, len(order), _CHUNK_ROWS):
        rows = order[start : start + _CHUNK_ROWS]
        length = lengths[rows]
        index = np.arange(length.sum()) + np.repeat(first[rows] - (np.cumsum(length) - length), length)
        chunks += list_column(values[index], length).chunks
    return pa.chunked_array(chunks, type=pa.list_(pa.from_numpy_dtype(values.dtype)))


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Length of each list of a list column: int64 [rows]."""
    return np.asarray(pc.list_value_length(column).to_numpy(), dtype=np.int64)


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """All values of a list column, one after another, in row order."""
    return np.asarray(pc.list_flatten(column).to_numpy())


def list_column(values: np.ndarray, lengths: np.ndarray) -> pa.ChunkedArray:
    """A list column from its flat values and the length of each list: what flat_values and list_lengths take apart.

    In chunks of rows, because one chunk cannot hold 2**31 values.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = np.concatenate([np.zeros(1, np.int64), ends])
    chunks = []
    for start in range(0, len(lengths), _CHUNK_ROWS):
        offsets = bounds[start : start + _CHUNK_ROWS + 1]
        flat = pa.array(values[offsets[0] : offsets[-1]])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), flat))
    return pa.chunked_array(chunks, type=pa.list_(pa.from_numpy_dtype(values.dtype)))


# ---------------------------------------------------------------- selections


def write_selection(
    folder: Path,
    tables: Iterable[pa.Table],
    record: Mapping[str, Any],
    schema: pa.Schema = SELECTION_SCHEMA,
    candidates: Iterable[Int64[np.ndarray, " _"]] | None = None,
) -> None:
    """Write selection.parquet, candidates.parquet and, last, selection.json: without it there is no selection.

    `tables`: the kept rows in `schema` (SELECTION_SCHEMA or SOFT_SELECTION_SCHEMA), in row order over all tables; each
    is a row group of the file. `candidates`: the rows that they were chosen from, ascending over all blocks (None: it
    is not said which).
    """
    with atomic_path(folder / "selection.parquet") as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(schema))
        (folder / "selection.json").unlink(missing_ok=True)  # else an old record could describe a new table
        (folder / CANDIDATES).unlink(missing_ok=True)
    if candidates is not None:
        _write_candidates(folder / CANDIDATES, candidates)
    write_json(folder / "selection.json", record)


def _write_candidates(path: Path, candidates: Iterable[Int64[np.ndarray, " _"]]) -> None:
    with atomic_path(path) as temporary:
        options = {"compression": "zstd", "use_dictionary": False}
        # Most are one after another: their differences are next to nothing.
        with pq.ParquetWriter(temporary, CANDIDATES_SCHEMA, column_encoding="DELTA_BINARY_PACKED", **options) as writer:
            for row in candidates:
                writer.write_table(pa.table([row], schema=CANDIDATES_SCHEMA))


def read_candidates(folder: Path) -> Int64[np.ndarray, " n"]:
    """The rows that the selection was chosen from, ascending. Raises StorageError if they are missing or damaged."""
    path = folder / CANDIDATES
    with selection_errors(path):
        return np.asarray(pq.read_table(path, schema=CANDIDATES_SCHEMA).column("row").to_numpy(), dtype=np.int64)


def read_selection_table(folder: Path) -> pa.Table:
    """The kept rows with token ids, keep masks and, where there are any, weights, in memory; else `scan_selection`.

    In SOFT_SELECTION_SCHEMA if the selection has weights, else in SELECTION_SCHEMA.
    """
    schema = selection_schema(folder)
    return pa.concat_tables([schema.empty_table(), *scan_selection(folder, schema.names)])


def selection_schema(folder: Path) -> pa.Schema:
    """SOFT_SELECTION_SCHEMA or SELECTION_SCHEMA. Raises StorageError if there is no selection or it is damaged."""
    read_json(folder / "selection.json", "selection")
    path = folder / "selection.parquet"
    with selection_errors(path):
        return SOFT_SELECTION_SCHEMA if "weight" in pq.read_schema(path).names else SELECTION_SCHEMA


def scan_selection(folder: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The kept rows, some thousand at a time. Raises StorageError if there is no selection or it is damaged."""
    read_json(folder / "selection.json", "selection")
    path = folder / "selection.parquet"
    schema = pa.schema([SOFT_SELECTION_SCHEMA.field(name) for name in columns])
    with selection_errors(path), pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):  # one at a time: the reader keeps what it read of all it was asked for
            for batch in file.iter_batches(_CHUNK_ROWS, row_groups=[index], columns=schema.names):
                yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


@contextmanager
def selection_errors(path: Path) -> Iterator[None]:
    """Turn an error of reading `path` into one StorageError."""
    try:
        yield
    except (KeyError, OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {path}: {error}; run `visgain select` again") from error


def find_rows(path: Path, row: Int64[np.ndarray, " n"], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Those of the rows `row` that a score part or a selection holds; other row groups are not read in full."""
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            here = np.isin(file.read_row_group(index, columns=["row"]).column(0).to_numpy(), row)
            if here.any():
                yield file.read_row_group(index, columns=list(columns)).select(columns).filter(pa.array(here))


def read_selection(folder: Path) -> Selection:
    """The selection as one object."""
    record = read_json(folder / "selection.json", "selection")
    table = read_selection_table(folder)
    bounds = np.cumsum(list_lengths(table.column("keep")))[:-1]
    keep = np.split(flat_values(table.column("keep")).astype(bool), bounds) if len(table) else []

    def number(key: str) -> float:
        return float("nan") if record[key] is None else float(record[key])

    return Selection(
        tau=number("tau"),
        token_tau=number("token_tau"),
        keep_percent=float(record["keep_percent"]),
        rows=np.asarray(table.column("row").to_numpy(), dtype=np.int64),
        keep=tuple(keep),
    )
