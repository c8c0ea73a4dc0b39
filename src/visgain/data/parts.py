"""Many files as one dataset: a folder of shards, a pattern, and the name of a part where there are several.

shards/                    every shard in it, in order (10 after 9)
shards/part-{000..099}.tar     those files, all of which must be there
'shards/*.parquet'         those that are there
FOLDER:train               of a folder that holds several datasets, the one called train
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from visgain.errors import DataError

_NUMBERED = re.compile(r"[-_.]?\d+-of-\d+.*$")
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev)(?:ing)?(?![a-z])", re.IGNORECASE)
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"[*?\[{]")
_DEEP = ("*", "*/*", "*/*/*")
_MEANINGLESS = ("data", "default")
"""Folders that say nothing about what is in them."""

_MANY = 100_000


def natural(name: str) -> tuple[object, ...]:
    """A key to sort names by, in which numbers count as numbers."""
    return tuple((int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


def base_of(path: Path) -> Path:
    """What must exist for the dataset `path` to exist: `path` itself, or the folder before a pattern or a part."""
    if path.exists():
        return path
    text = str(path)
    wild = _WILD.search(text)
    if wild:
        return Path(text[: wild.start()].rpartition("/")[0] or ("/" if text.startswith("/") else "."))
    before, colon, _ = text.rpartition(":")
    return Path(before) if colon else path


def whole(path: Path) -> Path:
    """`path` as it reads from any folder."""
    base = base_of(path)
    rest = str(path)[len(str(base)) :] if base != Path() or path == Path() else f"/{path}"
    return Path(f"{base.absolute()}{rest}")


def find_parts(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with one of the `suffixes` that `path` (file, folder, pattern, or folder:part) stands for, in order.

    Empty if there is none. Raises DataError if `path` is not clear, or a file of a range is missing.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return _in_folder(path, "", suffixes)
    if _WILD.search(str(path)):
        found = [Path(name) for pattern in _braced(str(path)) for name in _matching(pattern)]
        return [file for file in found if file.suffix in suffixes]
    before, _, part = str(path).rpartition(":")
    return _in_folder(Path(before), part, suffixes) if before and Path(before).is_dir() else []


def _in_folder(folder: Path, part: str, suffixes: Sequence[str]) -> list[Path]:
    patterns = [f"{depth}{suffix}" for depth in _DEEP for suffix in suffixes]
    files = [file for pattern in patterns for file in folder.glob(pattern) if _is_shown(file, folder)]
    names = [file.relative_to(folder).as_posix() for file in files]
    return [folder / name for name in choose(names, part, str(folder))] if names else []


def _is_shown(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()


# ---------------------------------------------------------------- several datasets in one place


def choose(names: Sequence[str], part: str, where: str) -> list[str]:
    """Those of the files `names` that make up the dataset `part` (empty: the only one), in order.

    Datasets are told apart by folder (a subset) and by what stands before `-00000-of-00007` or reads like a split.
    Raises DataError that lists what there is if `part` is none or several of them.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        groups.setdefault(_label(name), []).append(name)
    wanted = set(filter(None, re.split("[:/]", part)))
    fitting = [label for label in groups if label == part] or [
        label for label in groups if wanted <= set(label.split("/"))
    ]
    shown = ", ".join(f"{label or '(no name)'} ({len(files)} files)" for label, files in list(groups.items())[:20])
    if not fitting:
        raise DataError(f"{where} holds no {part!r}; it holds {shown}")
    if len(fitting) > 1:
        raise DataError(f"{where} holds several datasets: {shown}; name one, e.g. --data {where}:{fitting[0]}")
    return groups[fitting[0]]


def _label(name: str) -> str:
    """What tells the dataset of a file from the others beside it: its folders, then its split."""
    path = PurePosixPath(name)
    folders = [part for part in path.parts[:-1] if part not in _MEANINGLESS]
    stem = path.name.partition(".")[0]
    split = _SPLIT.search(stem)
    own = _NUMBERED.sub("", stem) if _NUMBERED.search(stem) else split[1].lower() if split else ""
    return "/".join([*folders, own] if own and own not in folders else folders)


# ---------------------------------------------------------------- patterns


def _braced(pattern: str) -> Iterator[str]:
    """`{000..010}` and `{a,b}` written out, as a shell would."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for each in _alternatives(braces[1]):
        yield from _braced(pattern[: braces.start()] + each + pattern[braces.end() :])


def _alternatives(inside: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) > _MANY:
        raise DataError(f"{{{inside}}} stands for more than {_MANY:,} files")
    width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
    for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield str(number).zfill(width)


def _matching(pattern: str) -> list[str]:
    """The files that a pattern without braces stands for. Raises DataError if a file without wildcards is missing."""
    if not re.search(r"[*?\[]", pattern):
        if not Path(pattern).is_file():
            raise DataError(f"{pattern} does not exist; check --data")
        return [pattern]
    base = base_of(Path(pattern))
    relative = Path(pattern).relative_to(base) if base != Path() else Path(pattern)
    found = sorted((str(file) for file in base.glob(str(relative)) if file.is_file()), key=natural)
    return list(itertools.islice(found, _MANY))
