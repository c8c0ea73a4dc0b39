"""What is in an MSCOCO picture, as CHAIR takes it: objects with an outline, and objects that its five captions mention.

Read from the annotation files of MSCOCO (`instances_val2014.json`, `captions_val2014.json`, ...; once, and kept), or
from one JSON file of image id -> objects that somebody made of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visgain.data.cache import derived
from visgain.errors import DataError
from visgain.evaluation.chair_objects import OBJECT_OF
from visgain.evaluation.hub import files
from visgain.evaluation.records import Record, read_json, read_records, read_text

PREPARED = ("objects.json", "gt_objects.json")
IDS = ("chair_ids.txt", "chair_ids.json", "chair_ids.jsonl")
DRAWN = 500
"""Pictures that are asked about where no list says which."""

_ANNOTATIONS = re.compile(r"(instances|captions).*\.json")
_YEAR = re.compile(r"20\d\d")


@dataclass(frozen=True, kw_only=True)
class Picture:
    id: int
    file: str
    objects: tuple[str, ...]  # by annotation, each once
    captions: tuple[str, ...] = ()  # of people


def read_pictures(data: Path) -> tuple[list[Picture], str]:
    """The pictures to be described, and in words where they and their truth come from. Raises DataError.

    data: a file of image id -> objects, or a folder with one, or with annotation files. A list of ids in that folder
    (`chair_ids.txt`, or a `.json` or `.jsonl` such as a file of captions) says which pictures; else 500 are drawn.
    """
    folder = data.parent if data.is_file() else data
    prepared = [data] if data.is_file() else [data / name for name in PREPARED if (data / name).is_file()]
    if prepared:
        known, candidates, truth = _prepared(prepared[0]), None, prepared[0].name
    else:
        sources = files(data, lambda name: bool(_ANNOTATIONS.fullmatch(name)), "instances_*.json and captions_*.json")
        known, candidates = _annotated(sources)
        truth = ", ".join(source.name for source in sources)
    listed = next((folder / name for name in IDS if (folder / name).is_file()), None)
    if listed is not None:
        ids, which = _listed(listed, known), f"listed in {listed.name}"
    elif candidates is None:
        ids, which = sorted(known), "that are there"
    else:
        ids, which = _drawn(candidates), f"drawn of {len(candidates)}"
    digest = hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest()[:16]
    return [known[one] for one in ids], f"{len(ids)} {which} (sha256 of their ids {digest}); truth: {truth}"


def _prepared(path: Path) -> dict[int, Picture]:
    whole = read_json(path)
    if not isinstance(whole, dict) or not whole:
        raise DataError(f"{path} must be one JSON object of image id -> list of objects")
    record, pictures = Record(where=str(path), fields=whole), {}
    for name in whole:
        number = _number(name, str(path))
        objects = tuple(_object(one, f"image {name} of {path}") for one in record.texts(name))
        pictures[number] = Picture(id=number, file=f"COCO_val2014_{number:012d}.jpg", objects=objects)
    return pictures


def _object(name: str, where: str) -> str:
    if name not in OBJECT_OF:
        raise DataError(f"{where}: {name[:40]!r} is none of the 80 objects of MSCOCO")
    return OBJECT_OF[name]


def _number(value: Any, where: str) -> int:
    """An image id, which is a whole number in MSCOCO, also where it is written as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{where}: the image id is {str(value)[:40]!r}, not a whole number")


# ---------------------------------------------------------------- annotation files


def _annotated(sources: Sequence[Path]) -> tuple[dict[int, Picture], list[int]]:
    """Every picture of the annotation files, and the ids of those that may be drawn: of val, if there are any."""
    for kind in ("instances", "captions"):
        if not any(source.name.startswith(kind) for source in sources):
            raise DataError(f"{sources[0].parent} has no {kind}_*.json; CHAIR needs instances and captions")
    years = sorted({year for source in sources for year in _YEAR.findall(source.name)})
    if len(years) > 1:
        raise DataError(f"{sources[0].parent} has annotations of {' and '.join(years)}; name a folder with one release")
    rows = read_json(derived("chair-1", sources, lambda path: _write(sources, path)))
    pictures = {
        number: Picture(id=number, file=file, objects=tuple(objects), captions=tuple(captions))
        for number, file, objects, captions, _ in rows
    }
    val = [row[0] for row in rows if row[4]]
    return pictures, val or list(pictures)


def _write(sources: Sequence[Path], path: Path) -> None:
    """[id, file, objects, captions, whether of val] for every picture with outlines annotated."""
    found: dict[int, tuple[str, set[str], list[str], bool]] = {}
    for source in sorted(sources, key=lambda source: not source.name.startswith("instances")):
        whole = _slim(source)
        if source.name.startswith("instances"):
            names = {one["id"]: _object(one["name"], str(source)) for one in whole["categories"]}
            for image in whole["images"]:
                found[image["id"]] = (image["file_name"], set(), [], "val" in source.name)
            for one in whole["annotations"]:
                found[one["image_id"]][1].add(names[one["category_id"]])
        else:
            for one in whole["annotations"]:
                if one["image_id"] in found:
                    found[one["image_id"]][2].append(one["caption"])
    rows = [
        [one, file, sorted(objects), captions, val] for one, (file, objects, captions, val) in sorted(found.items())
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


_NEEDED: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "instances": {"image_id": int, "category_id": int},
    "captions": {"image_id": int, "caption": str},
    "categories": {"id": int, "name": str},
}


def _slim(source: Path) -> dict[str, list[dict[str, Any]]]:
    """An annotation file, without outlines, which are nearly all of its half a gigabyte. Raises DataError."""
    try:
        whole: Any = json.loads(read_text(source), object_pairs_hook=_without_outline)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON: {error}") from None
    kind = "instances" if source.name.startswith("instances") else "captions"
    wanted = {"annotations": kind} | ({"images": "images", "categories": "categories"} if kind == "instances" else {})
    for name, row in wanted.items():
        rows = whole.get(name) if isinstance(whole, dict) else None
        if not isinstance(rows, list):
            raise DataError(f"{source} has no list {name!r}; it is no annotation file of MSCOCO")
        for number, one in enumerate(rows):
            if not isinstance(one, dict) or any(not isinstance(one.get(k), t) for k, t in _NEEDED[row].items()):
                raise DataError(f"{source}: entry {number} of {name!r} lacks {' or '.join(_NEEDED[row])}")
    if kind == "instances":
        images, categories = {one["id"] for one in whole["images"]}, {one["id"] for one in whole["categories"]}
        for number, one in enumerate(whole["annotations"]):
            if one["image_id"] not in images or one["category_id"] not in categories:
                raise DataError(f"{source}: entry {number} of 'annotations' is of an unknown image or category")
    return {name: whole[name] for name in wanted}


def _without_outline(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in ("segmentation", "bbox")}


# ---------------------------------------------------------------- which pictures


def _listed(path: Path, known: dict[int, Picture]) -> list[int]:
    if path.suffix == ".txt":
        ids = [_number(line.strip(), str(path)) for line in read_text(path).split("\n") if line.strip()]
    elif path.suffix == ".json" and isinstance(whole := read_json(path), list):
        ids = [
            _number(one["image_id"] if isinstance(one, dict) and "image_id" in one else one, str(path)) for one in whole
        ]
    else:
        ids = [_number(row.id("image_id"), row.where) for row in read_records(path)]
    unknown = [one for one in ids if one not in known]
    if unknown:
        raise DataError(f"{path} lists {len(unknown)} images without annotations: {_some(unknown)}")
    if len(set(ids)) < len(ids):
        raise DataError(f"{path} lists images more than once: {_some([i for i in set(ids) if ids.count(i) > 1])}")
    return ids


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def _drawn(ids: Iterable[int]) -> list[int]:
    """The first of them in an order that depends on nothing but the ids: the official draw depends on the disk's."""
    return sorted(ids, key=lambda one: hashlib.sha256(str(one).encode()).digest())[:DRAWN]
