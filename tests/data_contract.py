"""What every data format promises, as tests to inherit: subclass `DataContract` and say how to write a dataset."""

import multiprocessing
import pickle
import shutil
from pathlib import Path

import pytest

from visgain.data import Dataset, open_dataset
from visgain.types import Sample, Skipped


def rows_of(dataset: Dataset) -> list[Sample | Skipped]:
    return [dataset[row] for row in range(len(dataset))]


def described(row: Sample | Skipped) -> tuple[object, ...]:
    """Everything that a row is, as plain values."""
    if isinstance(row, Skipped):
        return (row.row, row.id, row.reason, row.source, row.fingerprint, row.n_images)
    return (row.row, row.id, row.turns, row.source, row.fingerprint, [image.key for image in row.images])


class DataContract:
    """`write` makes a dataset of several rows, at least one of them Skipped, in an empty folder."""

    def write(self, folder: Path) -> Path:
        """Returns what --data takes."""
        raise NotImplementedError

    def change(self, folder: Path) -> None:
        """Write the dataset again, with another text in its last row."""
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        folder = tmp_path / "first"
        folder.mkdir()
        return self.write(folder)

    def test_it_has_a_length_and_no_rows_outside(self, path: Path) -> None:
        dataset = open_dataset(path)
        assert len(dataset) > 2
        for row in (-1, len(dataset)):
            with pytest.raises(IndexError):
                dataset[row]

    def test_every_row_is_a_sample_or_a_skipped_row_in_its_own_place(self, path: Path) -> None:
        rows = rows_of(open_dataset(path))
        assert [row.row for row in rows] == list(range(len(rows)))
        assert {type(row) for row in rows} == {Sample, Skipped}
        assert all(isinstance(row.id, str) and row.id for row in rows)
        assert all(row.reason for row in rows if isinstance(row, Skipped))
        for row in rows:
            if isinstance(row, Sample):
                assert [turn.role for turn in row.turns] == ["user", "assistant"] * (len(row.turns) // 2)
                assert sum(turn.text.count("<image>") for turn in row.turns) == len(row.images)

    def test_rows_do_not_depend_on_the_order_they_are_read_in(self, path: Path) -> None:
        forward = [described(row) for row in rows_of(open_dataset(path))]
        dataset = open_dataset(path)
        backward = [described(dataset[row]) for row in reversed(range(len(dataset)))]
        assert forward == backward[::-1]
        assert len({fingerprint for *_, fingerprint, _ in forward}) == len(forward)

    def test_it_travels_to_another_process_without_its_rows(self, path: Path) -> None:
        dataset = open_dataset(path)
        here = [described(row) for row in rows_of(dataset)]
        assert [described(row) for row in rows_of(pickle.loads(pickle.dumps(dataset)))] == here
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply(_described_rows, (dataset,)) == here
        assert len(pickle.dumps(dataset)) < 20_000

    def test_its_fingerprint_belongs_to_its_content_and_not_to_its_place(self, path: Path, tmp_path: Path) -> None:
        before = open_dataset(path)
        rows = [described(row) for row in rows_of(before)]
        first, second = tmp_path / "first", tmp_path / "second" / "first"
        shutil.copytree(first, second)
        moved = open_dataset(Path(str(path).replace(str(first), str(second))))
        assert moved.fingerprint == before.fingerprint
        assert [described(row) for row in rows_of(moved)] == rows

    def test_a_changed_row_is_noticed(self, path: Path, tmp_path: Path) -> None:
        before = open_dataset(path)
        rows = rows_of(before)
        fingerprint = before.fingerprint
        self.change(tmp_path / "first")
        after = open_dataset(path)
        assert after.fingerprint != fingerprint
        changed = [old.fingerprint != new.fingerprint for old, new in zip(rows, rows_of(after), strict=True)]
        assert changed == [False] * (len(rows) - 1) + [True]


def _described_rows(dataset: Dataset) -> list[tuple[object, ...]]:
    return [described(row) for row in rows_of(dataset)]
