"""From a record to a sample. A record is what one row of any container is: names with values, as JSON has them.

Containers (JSON, CSV, parquet, arrow, tar) give records, `Rows`; they know nothing of conversations. Layouts say what
the names mean; they know nothing of files. `RecordDataset` puts the two together, and `Columns` renames for both.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

from visgain.data.conversation import (
    Role,
    Said,
    Unusable,
    id_text,
    kind_of,
    make_turns,
    printable,
    raw_fingerprint,
)
from visgain.data.images import ImageFile
from visgain.data.videos import FRAMES, listed_videos, video_frames, with_frames
from visgain.errors import ConfigError, DataError
from visgain.registry import Registry, suggest
from visgain.types import IMAGE_MARK, ImageRef, Sample, Skipped

KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "images": ("image_bytes", "images", "image"),
    "videos": ("videos", "video"),
    "id": ("id", "__key__"),
    "source": ("source", "data_source"),
    "prompt": ("query", "instruction", "question", "prompt"),
    "input": ("input",),
    "response": ("response", "output", "answer"),
    "history": ("history",),
    "caption": ("caption", "captions", "text", "txt"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "user": (),
    "assistant": (),
    "system": (),
    "mark": (),
    "frames": (),
}
"""What --columns can say: a key with the names that are tried where it does not say it.

The first ten are fields of a row, `role` and `content` fields of a turn; `user`, `assistant` and `system` are names of
roles beside the usual ones, `mark` is what stands in the text where an image is, `frames` how many frames of a video
are shown at most.
"""

_ROLES: tuple[Role, ...] = ("user", "assistant", "system")
_NOT_FIELDS = ("role", "content", "user", "assistant", "system", "mark", "frames")
MARKS = ("<ImageHere>", "<IMG_CONTEXT>", "<__dj__image>")
"""What stands for an image in the texts of XComposer, xtuner and Data-Juicer, where IMAGE_MARK does not."""

_INLINE = re.compile(r"<img>(.+?)</img>", re.DOTALL)
_OTHER_MEDIA = ("audio", "audios")


@dataclass(frozen=True)
class Columns:
    """What the user, or a file beside the dataset, says about the names in it; equal for all formats."""

    names: Mapping[str, str] = field(default_factory=dict)
    said_by: str = "--columns"

    @classmethod
    def of(cls, given: str | Mapping[str, str] | None) -> Columns:
        """From `key=name,key=name` or a mapping. Raises ConfigError for what is none, UnknownName for unknown keys."""
        if given is None:
            return cls()
        if isinstance(given, str):
            pairs = [part.partition("=") for part in given.split(",") if part.strip()]
            wrong = next((key for key, equals, name in pairs if not (equals and key.strip() and name.strip())), None)
            if wrong is not None:
                raise ConfigError(f"--columns has {wrong!r} without a name; write e.g. messages=dialog,images=pictures")
            keys = [key.strip() for key, _, _ in pairs]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ConfigError(f"--columns has the key {twice!r} more than once; one field has one name")
            given = {key.strip(): name.strip() for key, _, name in pairs}
        for key in given:
            if key not in KEYS:
                raise ConfigError(f"--columns has the unknown key {key!r}; {suggest(key, KEYS)}")
        if (frames := given.get("frames", "1")) and not (frames.isdecimal() and int(frames)):
            raise ConfigError(f"--columns says frames={frames}; it is a number of frames, at least 1")
        return cls(dict(sorted(given.items())))

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def roles(self) -> dict[str, Role]:
        """The roles that the user names beside the usual ones."""
        return {self.names[role]: role for role in _ROLES if role in self.names}

    @property
    def frames(self) -> int:
        """How many frames of a video are shown at most."""
        return int(self.names.get("frames", FRAMES))

    def name(self, key: str, fields: Collection[str]) -> str | None:
        """The name for `key` among `fields`: the one said, else the first usual one; None if it is not there."""
        wanted = (self.names[key],) if key in self.names else KEYS[key]
        return next((name for name in wanted if name in fields), None)

    def value(self, key: str, record: Mapping[str, Any]) -> Any:
        """What the record has for `key`: of several usual names the first that holds something; None for nothing."""
        wanted = (self.names[key],) if key in self.names else KEYS[key]
        values = [record[name] for name in wanted if name in record]
        return next((value for value in values if not _is_nothing(value)), values[0] if values else None)

    def check(self, fields: Collection[str], path: Path) -> None:
        """Raises ConfigError if a field that the user names is not in the dataset."""
        for key, name in self.names.items():
            if key not in _NOT_FIELDS and name not in fields:
                raise ConfigError(
                    f"{self.said_by} says {key}={name}, but no row of {path} has {name!r}; {suggest(name, fields)}"
                )


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and len(value) == 0)


# ---------------------------------------------------------------- layouts


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What a layout finds in a record."""

    said: Sequence[Said]  # with IMAGE_MARK where the record says that an image stands
    images: Sequence[Any] = ()  # those that stand in the turns themselves, in order; not the field of images
    videos: Sequence[Any] = ()  # the same


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the fields of one kind of record mean."""

    recognises: Callable[[Collection[str], Columns], bool]
    """Whether records with these fields are of this layout."""
    read: Callable[[Mapping[str, Any], Columns, int], Talk]
    """Of a record, the columns, and the number of its images; raises Unusable."""


LAYOUTS: Registry[Layout] = Registry(
    "data layout",
    {
        "messages": "visgain.data.messages:MESSAGES",
        "llava": "visgain.data.llava:LLAVA",
        "pairs": "visgain.data.prompts:PAIRS",
        "texts": "visgain.data.finevision:TEXTS",
        "completions": "visgain.data.completions:COMPLETIONS",
        "prompts": "visgain.data.prompts:PROMPTS",
        "captions": "visgain.data.captions:CAPTIONS",
    },
)
ORDER = ("messages", "llava", "texts", "pairs", "completions", "prompts", "captions")
"""In which layouts are asked; those of other packages come first, because they are more special."""


_TOLD_BY = {"response": "prompts", "caption": "captions"}
"""Fields that only one layout has: who names one means that layout, whatever other fields there are."""


def find_layout(fields: Collection[str], columns: Columns, path: Path, wanted: str | None = None) -> Layout:
    """The layout of records with these fields: `wanted`, or the first that recognises them.

    Raises DataError with the fields that there are if none does, ConfigError if `columns` names a field that is not
    there, UnknownName for an unknown `wanted`.
    """
    columns.check(fields, path)
    if wanted is not None:
        return LAYOUTS.get(wanted)
    named = next((key for key in ("messages", "response", "caption") if key in columns.names), None)
    if named in _TOLD_BY:
        return LAYOUTS.get(_TOLD_BY[named])
    for name in (*(name for name in LAYOUTS.names() if name not in ORDER), *ORDER):
        layout = LAYOUTS.get(name)
        if layout.recognises(fields, columns):
            return layout
    shown = ", ".join(sorted(map(repr, fields))[:20]) or "none"
    raise DataError(
        f"{path} is in no known layout ({', '.join(ORDER)}): its rows have the fields {printable(shown)}; if it holds "
        "conversations under other names, say so, e.g. --columns messages=NAME or prompt=NAME,response=NAME"
    )


# ---------------------------------------------------------------- from a record to a sample


def read_record(
    row: int, record: Any, *, layout: Layout, columns: Columns, open_image: Callable[[Any], ImageRef], name: str
) -> Sample | Skipped:
    """One row. `open_image` makes an image of what stands for one in the record, or raises Unusable.

    `name`: the dataset's, the source of rows that say none and whose images lie in no folder.
    """
    fields = record if isinstance(record, Mapping) else {}
    images: tuple[ImageRef, ...] = ()
    row_id = id_text(columns.value("id", fields), row)
    without = _is_nothing(columns.value("images", fields))
    try:
        if not isinstance(record, Mapping):
            raise Unusable(f"the row is {kind_of(record)}, not an object")
        images = tuple(map(open_image, _listed_images(columns.value("images", fields))))
        videos = listed_videos(columns.value("videos", fields))
        talk = layout.read(fields, columns, len(images) + len(videos))
        talk = _mark_places(talk, columns, has_images=bool(images))
        images = _all_images(images, tuple(map(open_image, talk.images)))
        frames = [video_frames(video, open_image, columns.frames) for video in talk.videos or videos]
        said, images = with_frames(talk.said, images, frames)
        without = not images
        _refuse_other_media(fields)
        turns = make_turns(said, n_images=len(images))
    except Unusable as reason:
        return Skipped(
            row=row,
            id=row_id,
            reason=str(reason),
            source=_source(fields, columns, images, without, name),
            fingerprint=raw_fingerprint(record),
            n_images=len(images),
        )
    return Sample(
        row=row, id=row_id, turns=turns, images=images, source=_source(fields, columns, images, without, name)
    )


def _listed_images(value: Any) -> Sequence[Any]:
    """What stands in the field of images: one, several or none."""
    if _is_nothing(value) and not isinstance(value, str):
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _all_images(listed: tuple[ImageRef, ...], inline: tuple[ImageRef, ...]) -> tuple[ImageRef, ...]:
    """The images in the order of their marks: the list of them, or those in the turns."""
    if listed and inline and [image.key for image in listed] != [image.key for image in inline]:
        raise Unusable("the row's list of images and the images in its turns are not the same")
    return inline or listed


def _mark_places(talk: Talk, columns: Columns, *, has_images: bool) -> Talk:
    """With IMAGE_MARK for the marks of other tools, and images whose path stands in the text taken out of it."""
    users = [text for role, text in talk.said if role == "user"]
    said, images = talk.said, talk.images
    marks = (columns.names["mark"],) if "mark" in columns.names else MARKS
    if "mark" in columns.names or not any(IMAGE_MARK in text for text in users):
        for mark in marks:
            said = [(role, text.replace(mark, IMAGE_MARK)) for role, text in said]
    if not has_images and not images and any(_INLINE.search(text) for text in users):
        images = [path.strip() for text in users for path in _INLINE.findall(text)]
        said = [(role, _INLINE.sub(IMAGE_MARK, text) if role == "user" else text) for role, text in said]
    return replace(talk, said=said, images=images)


def _refuse_other_media(fields: Mapping[str, Any]) -> None:
    for name in _OTHER_MEDIA:
        if not _is_nothing(fields.get(name)):
            raise Unusable(f"the row has {name!r}, and only pictures and frames of videos are read")


def _source(fields: Mapping[str, Any], columns: Columns, images: tuple[ImageRef, ...], without: bool, name: str) -> str:
    """What the row says, else the first folder of its first image, else the dataset's name; `text` without images."""
    for field_name in (columns.names["source"],) if "source" in columns.names else KEYS["source"]:
        if isinstance(said := fields.get(field_name), str) and said:
            return printable(said)
    if without:
        return "text"
    folder, slash, _ = images[0].key.removeprefix("./").partition("/") if images else ("", "", "")  # "./": in tars
    return printable(folder if slash and folder not in ("", "..") else name)


# ---------------------------------------------------------------- datasets of records


@runtime_checkable
class Rows(Protocol):
    """The records of one file or folder, read when asked for. Picklable, and no more than an index in memory."""

    @property
    def path(self) -> Path: ...

    @property
    def fields(self) -> Collection[str]:
        """The names that records have, over all rows."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the content in hexadecimal."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any:
        """The record at a position in range. Raises DataError if the file is no longer what it was."""
        ...


@dataclass(frozen=True, kw_only=True)
class PathImages:
    """Images that records name by their path."""

    root: Path
    max_pixels: int
    follow_links: bool

    def __call__(self, value: Any) -> ImageRef:
        """A path, or an object with a path or URL."""
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("path", "url") if value.get(name)), value)
        if not isinstance(value, str):
            raise Unusable(f"'image' holds {kind_of(value)}, not a path")
        path = value.removeprefix("file://")
        if path.startswith(os.sep):  # as some tools write them; outside of the root they are refused when opened
            with suppress(ValueError):
                path = os.path.normpath(path)
                path = str(PurePath(path).relative_to(os.path.normpath(self.root.absolute())))
        return ImageFile(root=self.root, path=path, max_pixels=self.max_pixels, follow_links=self.follow_links)


class RecordDataset:
    """Rows of a container, read by a layout. `open_image` is PathImages where it is not told.

    `name`: the source of rows that say none; by default the file's or folder's.
    """

    def __init__(
        self,
        rows: Rows,
        image_root: Path,
        *,
        layout: str | None,
        columns: Columns,
        max_pixels: int,
        follow_links: bool,
        open_image: Callable[[Any], ImageRef] | None = None,
        name: str | None = None,
    ) -> None:
        self.path = rows.path
        self.name = rows.path.stem if name is None else name
        self.image_root = image_root
        self.rows = rows
        self.columns = columns
        self._wanted = layout
        find_layout(rows.fields, columns, rows.path, layout)  # fails now if at all
        self._open_image = open_image or PathImages(root=image_root, max_pixels=max_pixels, follow_links=follow_links)

    @cached_property
    def _layout(self) -> Layout:
        return find_layout(self.rows.fields, self.columns, self.path, self._wanted)

    @property
    def fingerprint(self) -> str:
        """Hash of the dataset's content in hexadecimal, and of what a file beside it says of its columns.

        What --columns says has its own place in a run's record.
        """
        if not self.columns.names or self.columns.said_by == "--columns":
            return self.rows.fingerprint
        both = f"{self.rows.fingerprint}\0{json.dumps(dict(self.columns.names), sort_keys=True)}"
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int, /) -> Sample | Skipped:
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a dataset of {len(self)} rows")
        return read_record(
            row,
            self.rows[row],
            layout=self._layout,
            columns=self.columns,
            open_image=self._open_image,
            name=self.name,
        )
