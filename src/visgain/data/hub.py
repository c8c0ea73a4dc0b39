"""Data sets of the Hugging Face hub by name: `owner/name`, `owner/name:train`, `owner/name:subset/train`.

Their parquet files are fetched once into the cache of `huggingface_hub`, then read as those of a folder. A data set
without parquet files is read as the hub itself converted it. The state that was fetched (the commit) is kept, so that
without a network the name still means what it meant, and a download that was cut short is never taken for the whole.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from visgain.data.cache import cache_folder
from visgain.data.parts import choose
from visgain.data.records import Columns, PathImages, RecordDataset
from visgain.data.table import TableRows
from visgain.data.tablefiles import table_dataset
from visgain.errors import DataError, StorageError
from visgain.storage import write_json

_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<part>[^:]+(?:[:/][^:/]+)*))?")
_FILES = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet|arrow|tar|zip|gz|ya?ml)$")
"""What ends like this is the path of a file that is not there, not a name."""

_CONVERTED = "refs/convert/parquet"
"""Where the hub keeps its own conversion of a data set."""

_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Files of a data set on this machine."""

    folder: str
    commit: str
    files: Sequence[str]  # relative to the folder, in order

    @property
    def paths(self) -> list[Path]:
        return [Path(self.folder) / name for name in self.files]


class HubFormat:
    """Names on the hub."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether nothing is at `path`, and it could be a name."""
        name = _NAME.fullmatch(str(path))
        return not head and name is not None and not path.exists() and not _FILES.search(name["repo"])

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
        fetched = fetch(str(path))
        root = Path(fetched.folder) if image_root is None else image_root
        rows = TableRows(path, fetched.paths, columns, max_pixels)
        images = PathImages(root=root, max_pixels=max_pixels, follow_links=follow_links)
        return table_dataset(rows, images, layout, path.name.partition(":")[0])


HUB = HubFormat()


def fetch(name: str) -> Fetched:
    """The parquet files of `owner/name[:part]`, downloaded where they are not here yet.

    Raises DataError if there is no such data set or part, it has no tables, or the hub is needed and cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name} is no name of a data set on the hub; write owner/name or owner/name:split")
    record = cache_folder() / f"hub-1-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
    repo, part = match["repo"], match["part"] or ""
    try:
        commit, files = _listed(HfApi(), repo)
        wanted = choose(files, part, repo) if files else []
        if not wanted:
            raise DataError(
                f"the data set {repo} on the hub has no parquet files, and no conversion to them; download it"
            )
        patterns = [glob.escape(each) for each in wanted]
        folder = snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=patterns)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{name} does not exist: it is no file or folder here, and no data set on the hub that you can read; "
            "check --data, or log in with `hf auth login`"
        ) from error
    except DataError:
        raise
    except Exception as error:  # whatever the network library of the day raises
        return _from_before(record, name, error)
    fetched = Fetched(folder=str(folder), commit=commit, files=wanted)
    try:
        write_json(record, asdict(fetched))
    except StorageError as error:
        raise DataError(f"cannot remember what was fetched: {error}") from error
    return fetched


def _listed(api: object, repo: str) -> tuple[str, list[str]]:
    """The commit and the parquet files of a data set as it is, or else as the hub converted it."""
    from huggingface_hub.errors import RevisionNotFoundError

    for revision in (None, _CONVERTED):
        try:
            # Unlike a listing of files this asks once: without a network it fails at once.
            info = api.dataset_info(repo, revision=revision, timeout=_SECONDS)  # type: ignore[attr-defined]
        except RevisionNotFoundError:
            continue
        files = [each.rfilename for each in info.siblings or [] if each.rfilename.endswith(".parquet")]
        if files:
            return str(info.sha), files
    return "", []


def _from_before(record: Path, name: str, error: Exception) -> Fetched:
    """What `name` meant when it was last fetched. Raises DataError if that is not here, whole."""
    try:
        fetched = Fetched(**json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        fetched = None
    if fetched is not None and all(path.is_file() for path in fetched.paths):
        return fetched
    why = " ".join(str(error).split())[:200] or type(error).__name__
    raise DataError(
        f"{name} is no file or folder here, and as the name of a data set on the hub it cannot be fetched: {why}; "
        "check --data or the network"
    ) from error
