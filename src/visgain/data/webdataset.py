"""WebDataset: tar files whose members are pictures and texts, read by their place and never extracted.

Of a sample the pictures are its images, `json` holds the fields of its record, and what stands in other texts (`txt`,
`cls` ...) is a field under the member's kind. A text is the caption where the record says nothing of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from visgain.data.conversation import Unusable, printable
from visgain.data.identity import content_hash
from visgain.data.images import ImageSpan
from visgain.data.parts import base_of, find_parts, whole
from visgain.data.records import KEYS, Columns, PathImages, RecordDataset
from visgain.data.tablefiles import Pictures
from visgain.data.tarindex import Group, Member, TarIndex, read_member
from visgain.errors import DataError
from visgain.types import ImageRef

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "avif", "img", "image"})
_TEXTS = ("txt", "text", "caption", "cls", "cls2", "question", "answer", "prompt", "response", "id", "source")
_OTHER_MEDIA = frozenset({"mp4", "avi", "mov", "mkv", "webm", "wav", "mp3", "flac", "m4a", "ogg"})
_MAX_TEXT = 64 << 20
_LOOKED_AT = 256  # samples, for the names of fields; to read every text would be to read the tar
_TAR_MARK = slice(257, 262)


class Unfit:
    """Stands where an image should, with the reason why the sample cannot be used."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return self.reason


def _is_unfit(value: Any) -> bool:
    return isinstance(value, Unfit)


class TarPictures(Pictures):
    """Images of tar members."""

    def __call__(self, value: Any) -> ImageRef:
        if isinstance(value, Unfit):
            raise Unusable(printable(value.reason))
        return super().__call__(value)


class TarRows:
    """The samples of tar files as records."""

    def __init__(self, path: Path, shards: Sequence[Path], columns: Columns, max_pixels: int) -> None:
        """Raises DataError if a shard is damaged, or holds no samples."""
        self.path = path
        self.max_pixels = max_pixels
        self.columns = columns
        self._shards = tuple(shards)
        self._names = _shard_names(self._shards)
        self._index = TarIndex(self._shards)
        if not len(self):
            raise DataError(f"{path} holds no rows: no member of its tar files has a name like 0001.jpg")
        self.fields = self._first_fields()

    @cached_property
    def fingerprint(self) -> str:
        """See `content_hash`."""
        return content_hash(self._shards)

    def _first_fields(self) -> Collection[str]:
        """The names in the first samples. Raises DataError if none of them can be used."""
        records = [self[row] for row in range(min(len(self), _LOOKED_AT))]
        unfit = [record[self._pictures][0] for record in records if any(map(_is_unfit, record[self._pictures]))]
        if len(unfit) == len(records):
            raise DataError(f"none of the first {len(unfit)} samples in {self.path} can be used: {unfit[0].reason}")
        return sorted({name for record in records for name in record})

    @property
    def _pictures(self) -> str:
        """The field of the images."""
        return self.columns.names.get("images", "images")

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        group = self._index[row]
        record: dict[str, Any] = {"id": group.key}
        if group.problem is not None:
            return self._unfit(record, group.problem)
        try:
            texts = self._texts(group)
            return {**record, **texts, self._pictures: self._images(group, texts)}
        except Unusable as reason:
            return self._unfit(record, str(reason))

    def _unfit(self, record: dict[str, Any], reason: str) -> dict[str, Any]:
        return {**record, self._pictures: [Unfit(reason)]}

    def _texts(self, group: Group) -> dict[str, Any]:
        """The fields of the sample, those of its pictures left out."""
        fields: dict[str, Any] = {}
        others: dict[str, Any] = {}
        for member in group.members:
            last = member.kind.rpartition(".")[2]
            if last in _OTHER_MEDIA:
                raise Unusable(f"the sample has a member {group.key}.{member.kind}, and only pictures are read")
            if last in PICTURES or member.kind == self._pictures:
                continue
            if last in ("json", "jsn"):
                fields |= _object(group, member, self._text(group, member))
            elif last in _TEXTS or member.kind in self.columns.names.values():
                others[member.kind] = self._text(group, member)
        if not fields and not others:
            raise Unusable(f"the tar has no text (json, txt ...) beside {group.key}.{group.members[0].kind}")
        if others and not any(_says(key, fields, self.columns) for key in ("messages", "response", "caption")):
            caption = next((others[kind] for kind in ("txt", "text", "caption", "cls") if kind in others), None)
            others = {**others, "caption": caption} if caption is not None else others
        return {**others, **fields}

    def _text(self, group: Group, member: Member) -> str:
        name = f"{group.key}.{member.kind}"
        if member.size > _MAX_TEXT:
            raise Unusable(f"the member {name} has {member.size} bytes, too many for a text")
        content = read_member(self._shards[group.shard], member)
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise Unusable(f"the member {name} is not UTF-8 text (byte {error.start})") from None

    def _images(self, group: Group, texts: Mapping[str, Any]) -> list[ImageSpan]:
        """The sample's pictures: in the order of the record if it names them, else in that of the tar."""
        wanted = self.columns.names.get("images")
        members = [member for member in group.members if member.kind.rpartition(".")[2] in PICTURES]
        if wanted is not None and any(member.kind == wanted for member in group.members):
            members = [member for member in group.members if member.kind == wanted]
        named = [each for each in _named_images(texts, self.columns) if isinstance(each, str)]
        if named and not members:
            raise Unusable(f"the sample names the image {named[0]}, and the tar has no picture beside {group.key}")
        if named and len(named) != len(members):
            raise Unusable(f"the sample names {len(named)} images, and the tar has {len(members)} pictures beside it")
        by_name = {PurePosixPath(f"{group.key}.{member.kind}").name: member for member in members}
        if (
            named
            and len(by_name) == len(members)
            and all(PurePosixPath(name).name.lower() in by_name for name in named)
        ):
            members = [by_name[PurePosixPath(name).name.lower()] for name in named]
        return [
            ImageSpan(
                container=self._shards[group.shard],
                name=f"{group.key}.{member.kind}",
                offset=member.offset,
                size=member.size,
                max_pixels=self.max_pixels,
                shard=self._names[group.shard],
            )
            for member in members
        ]


def _shard_names(shards: Sequence[Path]) -> list[str]:
    """What tells shards apart, wherever the dataset lies: file names, or the ways to them if these repeat."""
    names = [shard.name for shard in shards]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    return [shard.absolute().relative_to(common).as_posix() for shard in shards]


class WebDatasetFormat:
    """Tar files, one or many."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether the file begins like a tar or calls itself one, or the folder or pattern leads to some."""
        if not head:
            return bool(find_parts(path, (".tar",)))
        return head[_TAR_MARK] == b"ustar" or path.name.lower().endswith(
            (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst")
        )

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
        base = base_of(path)
        shards = find_parts(path, (".tar",)) or [path]
        rows = TarRows(whole(path), shards, columns, max_pixels)
        root = (base.parent if base.is_file() else base) if image_root is None else image_root
        return RecordDataset(
            rows,
            root,
            layout=layout,
            columns=columns,
            max_pixels=max_pixels,
            follow_links=follow_links,
            open_image=TarPictures(PathImages(root=root, max_pixels=max_pixels, follow_links=follow_links)),
            name=base.stem,
        )


WEBDATASET = WebDatasetFormat()


def _object(group: Group, member: Member, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"the member {group.key}.{member.kind} is not valid JSON: {error}") from None
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict):
        raise Unusable(f"the member {group.key}.{member.kind} holds no JSON object")
    return value


def _says(key: str, fields: Mapping[str, Any], columns: Columns) -> bool:
    return columns.value(key, fields) is not None


def _named_images(texts: Mapping[str, Any], columns: Columns) -> list[Any]:
    value: Any = next((texts[name] for name in KEYS["images"] if texts.get(name)), [])
    return value if isinstance(value, list) else [value]
