"""Where the gain is: by source, by class of word, by position in the answer. `visgain analyze --scores`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from visgain.analysis.categories import CLASSES, Classify, by_list
from visgain.analysis.words import span_gains
from visgain.data import Dataset
from visgain.scored import TOKEN_COLUMNS, UNNAMED, RowTokens, row_tokens, scored_sample
from visgain.storage import scan_scores
from visgain.tables import Means, Table

END = "end of turn"


def gain_tables(scores: Path, dataset: Dataset | None, classify: Classify = by_list) -> list[Table]:
    """Tables of the scored rows of a finished run; without the dataset there are no words.

    Memory does not grow with the rows. Raises StorageError if the run is unfinished or damaged, DataError if the
    dataset changed since it was scored.
    """
    sources, positions, classes = Means(), Means(), Means()
    for row, source in _rows(scores):
        sources.add_row([(source, float(row.gain.mean(dtype=np.float64)))])
        positions.add_row(zip(_positions(row), row.gain.tolist(), strict=True))
        if dataset is not None:
            classes.add_row(_word_gains(row, dataset, classify))
    bins = [*(_bin_name(k) for k in range(40)), END]
    tables = [
        Table(
            name="gain-by-source",
            title="Gain by source",
            unit="nats, mean over samples",
            of="samples",
            lines=sources.lines(),
        ),
        Table(
            name="gain-by-position",
            title="Gain by position in the answer",
            unit="nats a token",
            of="tokens",
            lines=positions.lines(bins),
        ),
    ]
    if dataset is not None:
        lines = classes.lines()
        order = [*CLASSES, END] if {line.label for line in lines} <= {*CLASSES, END} else None
        tables.append(
            Table(
                name="gain-by-word-class",
                title="Gain by class of word",
                unit="nats a word",
                of="words",
                lines=classes.lines(order),
            )
        )
    return tables


def _rows(scores: Path) -> Iterator[tuple[RowTokens, str]]:
    """The scored rows with their sources."""
    for table in scan_scores(scores, [*TOKEN_COLUMNS, "source"], description="analysing"):
        names = dict(zip(table.column("row").to_pylist(), table.column("source").to_pylist(), strict=True))
        for row in row_tokens(table.select(list(TOKEN_COLUMNS))):
            yield row, names[row.row] or UNNAMED


def _positions(row: RowTokens) -> Iterator[str]:
    """For each answer token: which of its answer's tokens it is, in bins that double; the end of a turn apart."""
    _, first = np.unique(row.turn, return_index=True)
    place = np.arange(len(row.turn)) - first[np.unique(row.turn, return_inverse=True)[1]]
    is_end = row.chars[:, 0] == row.chars[:, 1]
    for number, end in zip(place.tolist(), is_end.tolist(), strict=True):
        yield END if end else _bin_name((number + 1).bit_length() - 1)


def _bin_name(k: int) -> str:
    """1, 2-3, 4-7, 8-15, ..."""
    low, high = 1 << k, (1 << k + 1) - 1
    return str(low) if low == high else f"{low}-{high}"


def _word_gains(row: RowTokens, dataset: Dataset, classify: Classify) -> Iterator[tuple[str, float]]:
    """(class, gain) of each word, and of each end of a turn."""
    sample = scored_sample(dataset, row.row, row.fingerprint)
    for index, text in enumerate(sample.answers):
        here = row.of_answer(index)
        chars, gain = row.chars[here], row.gain[here]
        words = classify(text)
        name = {(start, end): label for start, end, label in words}
        for span, value in span_gains(list(name), chars, gain):
            yield name[span], value
        yield from ((END, value) for value in gain[chars[:, 0] >= len(text)].tolist())
