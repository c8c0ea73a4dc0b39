"""Where the members of tar files lie, by sample: found by one pass over the headers, kept, and mapped.

As in WebDataset, the members of a sample follow each other and share their name up to the first dot after the last
slash; what comes behind it is the member's kind: `0007.jpg` and `0007.json`, `0007.left.png` and `0007.right.png`.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa
from tqdm import tqdm

from visgain.data.blocks import TableFile
from visgain.data.cache import derived
from visgain.data.conversation import printable
from visgain.errors import DataError

KIND = "tar-1"
"""Name and version of the index."""

_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("problem", pa.string()),  # null if the sample is sound
        pa.field("kind", pa.list_(pa.string())),
        pa.field("offset", pa.list_(pa.int64())),  # bytes
        pa.field("size", pa.list_(pa.int64())),  # bytes
    ]
)
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_ROWS = 1 << 13  # in one batch of the index
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    kind: str  # what follows the key and a dot in the member's name
    offset: int  # bytes
    size: int  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The members of one sample."""

    shard: int
    key: str
    members: tuple[Member, ...]
    problem: str | None = None  # why it cannot be used


class TarIndex:
    """The samples of several tar files, in the order of the files and in each of its members."""

    def __init__(self, shards: Sequence[Path]) -> None:
        """Makes the index if the shards were never seen as they are. Raises DataError where one is damaged."""
        self.table = TableFile.of(derived(KIND, shards, lambda target: _write(shards, target)))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int, /) -> Group:
        cells = self.table.cells((), row)
        shard, key, problem, kinds, offsets, sizes = (cells[name].as_py() for name in _SCHEMA.names)
        members = tuple(
            Member(kind=kind, offset=offset, size=size)
            for kind, offset, size in zip(kinds, offsets, sizes, strict=True)
        )
        return Group(shard=shard, key=key, members=members, problem=problem)


def _write(shards: Sequence[Path], target: Path) -> None:
    with (
        pa.ipc.new_file(target, _SCHEMA) as writer,
        tqdm(enumerate(shards), total=len(shards), desc="indexing", unit="tar", delay=1, leave=False) as shown,
    ):
        groups = itertools.chain.from_iterable(_groups(number, shard) for number, shard in shown)
        while some := list(itertools.islice(groups, _ROWS)):
            columns = [
                [group.shard for group in some],
                [group.key for group in some],
                [group.problem for group in some],
                [[member.kind for member in group.members] for group in some],
                [[member.offset for member in group.members] for group in some],
                [[member.size for member in group.members] for group in some],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))


def _groups(number: int, shard: Path) -> Iterator[Group]:
    """The samples of one file. Members that have no key (no dot in the name, hidden files, folders) are no samples."""
    files = (info for info in read_headers(shard) if not info.isdir())
    named = ((info, match) for info in files if (match := _NAME.fullmatch(info.name)))
    for key, members in itertools.groupby(named, key=lambda one: one[1][1]):
        yield _group(number, key, [(info, match[2]) for info, match in members])


def _group(number: int, key: str, members: Sequence[tuple[tarfile.TarInfo, str]]) -> Group:
    kinds = [kind.lower() for _, kind in members]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    special = next((info for info, _ in members if not info.isreg() or info.issparse()), None)
    problem = None
    if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
        problem = "the name of the tar's member is absolute or leads out of the tar"
    elif special is not None:
        problem = f"the tar's member {special.name} is a link or something else than a plain file"
    elif twice is not None:
        problem = f"the tar has more than one member {key}.{twice}"
    found = [
        Member(kind=kind, offset=info.offset_data, size=info.size)
        for kind, (info, _) in zip(kinds, members, strict=True)
    ]
    problem = None if problem is None else printable(problem)
    return Group(shard=number, key=printable(key), members=tuple(found), problem=problem)


def read_headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, without reading them and with bounded memory.

    Raises DataError that says where the file is damaged, cut short, or goes on behind its end: `tarfile` would take
    the first and the last for the end, and leave out the rest without a word.
    """
    n_members = 0
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                    n_members += 1
                    yield info
                end = tar.offset  # where it found no further header
            _check_end(path, file, end, n_members)
    except tarfile.TarError as error:
        raise DataError(f"{path} is damaged after {n_members} members: {error}; {_AGAIN}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


_AGAIN = "copy or download it again"


def _check_end(path: Path, file: IO[bytes], end: int, n_members: int) -> None:
    """A tar ends with zeros from `end` on."""
    file.seek(end)
    first = file.read(_BLOCK)
    if len(first) < _BLOCK:
        raise DataError(f"{path} is cut short after {n_members} members (byte {end}); {_AGAIN}")
    if any(first):
        raise DataError(f"{path} is damaged after {n_members} members (byte {end}); {_AGAIN}")
    while more := file.read(1 << 16):
        if more.count(0) < len(more):
            raise DataError(
                f"{path} goes on behind its end after {n_members} members (byte {end}), as when tar files are joined "
                "with cat; give them as several files"
            )


def _refuse_compressed(path: Path, file: IO[bytes]) -> None:
    head = file.read(8)
    file.seek(0)
    kind = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if kind is not None:
        raise DataError(f"{path} is compressed ({kind}), so its members cannot be read by their place; unpack it once")


def read_member(path: Path, member: Member) -> bytes:
    """The member's bytes. Raises DataError if the file is no longer what it was."""
    with path.open("rb") as file:
        file.seek(member.offset)
        content = file.read(member.size)
    if len(content) < member.size:
        raise DataError(f"{path} changed since it was opened; start again")
    return content
