"""What is found out once about a dataset and kept: where its rows lie, or its rows in a form that can be mapped.

Kept outside of the dataset, whose folder may be read-only, in the user's cache folder (`XDG_CACHE_HOME`, by default
`~/.cache`) under `visgain`. Everything there can be deleted at any time; it is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from visgain.errors import DataError, StorageError
from visgain.storage import atomic_path


def cache_folder() -> Path:
    """Where derived files are kept; it need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if Path(root).is_absolute() else Path.home() / ".cache") / "visgain"


def derived_path(kind: str, sources: Sequence[Path]) -> Path:
    """Where `derived` keeps its file, whether it is there or not. Raises DataError if a source is missing."""
    return cache_folder() / f"{kind}-{_state(sources)}"


def derived(kind: str, sources: Sequence[Path], write: Callable[[Path], None]) -> Path:
    """The file that `write` makes from `sources`, made now if they were never seen as they are.

    `kind` names what is made and its version, e.g. `tar-1`. A source is known again by its path, size and time of
    change. Processes that ask at the same time wait for the one that writes. Raises DataError if a source is missing
    or the cache cannot be written, and whatever `write` raises.
    """
    path = derived_path(kind, sources)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                with atomic_path(path) as temporary:
                    write(temporary)
    except (OSError, StorageError) as error:
        raise DataError(
            f"cannot keep an index of {sources[0]} in {path.parent}: {error}; "
            "make room there, or let XDG_CACHE_HOME name a folder that can be written"
        ) from error
    return path


def _state(sources: Sequence[Path]) -> str:
    """Hash of the sources' paths, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        try:
            status = source.stat()
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror or error}") from error
        digest.update(
            f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()
