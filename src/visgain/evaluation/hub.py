"""The user's copy of a benchmark, or the one on the Hugging Face hub by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from visgain.errors import DataError


def local_copy(data: Path, repository: str, patterns: Iterable[str], source: str) -> Path:
    """`data` where it exists; else, if it is called `repository`, the folder of the downloaded dataset.

    patterns: the files of the repository that are needed. source: where else the data is to be had, for messages.
    Raises DataError if there is neither.
    """
    if data.exists():
        return data
    if data.as_posix() != repository:
        raise DataError(f"{data} does not exist; name a file, a folder, or {repository} to download it ({source})")
    return download(repository, patterns, source)


def download(repository: str, patterns: Iterable[str], source: str) -> Path:
    """The folder of a dataset of the hub, downloaded if it is not in the cache. Raises DataError."""
    from huggingface_hub import snapshot_download  # half a second, and not needed for local copies
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot download {repository} from the Hugging Face hub, and it is not in the cache: {why}. "
            f"Download it where there is a network and name its folder ({source})"
        ) from error


def files(data: Path, is_wanted: Callable[[str], bool], what: str) -> list[Path]:
    """`data` itself if it is a file, else the files below it whose names are wanted, sorted. Raises DataError.

    `data` may be a pattern such as `pope/*_2023-08.jsonl`.
    what: such files in words, for the message that there are none.
    """
    if data.is_file():
        return [data]
    if "*" in data.name:
        found = sorted(path for path in data.parent.glob(data.name) if path.is_file())
    else:
        found = sorted(path for path in data.rglob("*") if is_wanted(path.name) and path.is_file())
    if not found:
        raise DataError(f"{data} {'holds' if data.exists() else 'does not exist: there is'} no {what}")
    return found


def preferred(data: Path, patterns: Iterable[str], what: str) -> list[Path]:
    """`data` itself if it is a file, else the files below it that match the first pattern for which there are any.

    what: such files in words, for the message that there are none. Raises DataError.
    """
    if data.is_file():
        return [data]
    for pattern in patterns:
        if found := sorted(path for path in data.rglob(pattern) if path.is_file()):
            return found
    raise DataError(f"{data} {'holds' if data.exists() else 'does not exist: there is'} no {what}")


def image_folder(folder: Path, image_root: Path | None, name: str) -> Path:
    """What image names are relative to: `image_root`, else where `name` is: in `images`, in `folder`, or beside it."""
    if image_root is not None:
        return image_root
    usual = [folder / "images", folder, folder.parent]
    return next((root for root in usual if (root / name).is_file()), usual[0])
