"""Names on the hub, with a hub that is played: what it lists, what it hands out, and when it is away."""

import fnmatch
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from data_contract import rows_of
from visgain.data import is_there, open_dataset
from visgain.data.hub import HUB
from visgain.errors import DataError
from visgain.types import Sample


class PlayedHub:
    """Data sets by name and revision: file name -> rows. Snapshots go to a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repos: dict[tuple[str, str | None], dict[str, list[dict[str, Any]]]] = {}
        self.away: Exception | None = None
        self.commit = "c1"
        self.downloads: list[str] = []

    def dataset_info(self, repo: str, *, revision: str | None = None, timeout: float | None = None) -> SimpleNamespace:
        if self.away is not None:
            raise self.away
        if not any(name == repo for name, _ in self.repos):
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        if (repo, revision) not in self.repos:
            raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        names = ["README.md", *self.repos[repo, revision]]
        siblings = [SimpleNamespace(rfilename=name) for name in names]
        return SimpleNamespace(sha=f"{self.commit}-{revision}", siblings=siblings)

    def snapshot_download(self, repo: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        commit, _, branch = revision.partition("-")
        assert commit == self.commit
        files = self.repos[repo, None if branch == "None" else branch]
        for name, rows in files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                path = self.folder / commit / name
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(rows), path)
                self.downloads.append(name)
        return str(self.folder / commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayedHub:
    played = PlayedHub(tmp_path / "hub")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda _, *args, **kw: played.dataset_info(*args, **kw))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", played.snapshot_download)
    return played


def qa(*answers: str) -> list[dict[str, Any]]:
    return [{"question": "What?", "answer": answer} for answer in answers]


def answers(name: str) -> list[str]:
    rows = rows_of(open_dataset(Path(name)))
    assert all(isinstance(row, Sample) for row in rows)
    return [row.turns[1].text for row in rows if isinstance(row, Sample)]


def test_a_name_is_its_parquet_files_in_order(hub: PlayedHub) -> None:
    files = {f"data/train-{n:05d}-of-00011.parquet": qa(str(n)) for n in (10, 0, 2)}
    hub.repos["owner/talks", None] = files
    assert answers("owner/talks") == ["0", "2", "10"]
    assert is_there(Path("owner/talks"))


def test_only_the_split_that_was_named_is_fetched(hub: PlayedHub) -> None:
    hub.repos["owner/talks", None] = {
        "chart/train-00000-of-00001.parquet": qa("chart"),
        "doc/train-00000-of-00001.parquet": qa("doc"),
        "doc/test-00000-of-00001.parquet": qa("doc test"),
    }
    assert answers("owner/talks:chart") == ["chart"]
    assert answers("owner/talks:doc/test") == ["doc test"]
    assert hub.downloads == ["chart/train-00000-of-00001.parquet", "doc/test-00000-of-00001.parquet"]
    with pytest.raises(
        DataError, match=r"owner/talks holds several datasets: chart/train .*name one, e.g. --data owner"
    ):
        open_dataset(Path("owner/talks"))
    with pytest.raises(DataError, match=r"owner/talks holds no 'dev'; it holds chart/train"):
        open_dataset(Path("owner/talks:dev"))


def test_without_parquet_files_the_hubs_own_conversion_is_read(hub: PlayedHub) -> None:
    hub.repos["owner/json", None] = {}
    with pytest.raises(DataError, match="owner/json on the hub has no parquet files, and no conversion"):
        open_dataset(Path("owner/json"))
    hub.repos["owner/json", "refs/convert/parquet"] = {"default/train/0000.parquet": qa("converted")}
    assert answers("owner/json") == ["converted"]


def test_rows_say_the_data_sets_name_as_their_source(hub: PlayedHub) -> None:
    hub.repos["owner/talks.v2", None] = {"data/train-00000-of-00001.parquet": [{"image": "a.png", "caption": "x"}]}
    dataset = open_dataset(Path("owner/talks.v2:train"))
    assert dataset[0].source == "talks.v2"
    assert dataset.image_root == hub.folder / "c1"


def test_a_hub_that_is_away_means_what_was_fetched_before_or_one_message(hub: PlayedHub) -> None:
    hub.repos["owner/talks", None] = {"data/train-00000-of-00001.parquet": qa("before")}
    hub.away = ConnectionError("Name or service not known")
    with pytest.raises(DataError, match=r"owner/talks is no file or folder here.*cannot be fetched: Name or service"):
        open_dataset(Path("owner/talks"))
    hub.away = None
    fingerprint = open_dataset(Path("owner/talks")).fingerprint
    hub.away = ConnectionError("gone")
    assert answers("owner/talks") == ["before"]
    assert open_dataset(Path("owner/talks")).fingerprint == fingerprint
    (hub.folder / "c1" / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="cannot be fetched: gone"):
        open_dataset(Path("owner/talks"))


def test_a_new_state_of_the_data_set_has_another_fingerprint(hub: PlayedHub) -> None:
    hub.repos["owner/talks", None] = {"data/train-00000-of-00001.parquet": qa("old")}
    before = open_dataset(Path("owner/talks")).fingerprint
    hub.commit, hub.repos["owner/talks", None] = "c2", {"data/train-00000-of-00001.parquet": qa("new")}
    assert open_dataset(Path("owner/talks")).fingerprint != before


def test_a_name_that_nobody_knows_is_told_as_path_and_as_name(hub: PlayedHub) -> None:
    with pytest.raises(DataError, match="owner/nothing does not exist: it is no file or folder here, and no data set"):
        open_dataset(Path("owner/nothing"))


@pytest.mark.parametrize(
    ("name", "could_be"),
    [
        ("owner/name", True),
        ("HuggingFaceM4/FineVision:CoSyn_400k_chart/train", True),
        ("owner/name.v1.5", True),
        ("data/train.json", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("name", False),
        ("../owner", False),
        ("owner/name:", False),
    ],
)
def test_what_could_be_a_name(name: str, could_be: bool) -> None:
    assert HUB.recognises(Path(name), b"") is could_be


def test_without_a_network_the_message_comes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # A port on which nobody listens, asked as the real client asks.
    here = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: here)
    before = time.monotonic()
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        open_dataset(Path("owner/talks"))
    assert time.monotonic() - before < 10
    assert "\n" not in str(caught.value)


def test_what_is_remembered_is_readable(hub: PlayedHub, tmp_path: Path) -> None:
    hub.repos["owner/talks", None] = {"data/train-00000-of-00001.parquet": qa("x")}
    open_dataset(Path("owner/talks"))
    (record,) = (tmp_path / "cache" / "visgain").glob("hub-*.json")
    assert json.loads(record.read_text()) == {
        "folder": str(hub.folder / "c1"),
        "commit": "c1-None",
        "files": ["data/train-00000-of-00001.parquet"],
    }
