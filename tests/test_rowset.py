"""A set of rows against Python's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiny_scores import patient
from visgain.rowset import RowSet

N = 60
rows = st.lists(st.integers(0, N - 1), max_size=20)


@patient
@given(st.lists(rows, max_size=5), rows)
def test_a_row_set_is_a_set(added: list[list[int]], other: list[int]) -> None:
    held, ours = set[int](), RowSet(N)
    for some in added:
        again = ours.add(np.array(some, np.int64))
        assert again.tolist() == sorted({row for row in some if row in held or some.count(row) > 1})
        held |= set(some)
        assert len(ours) == len(held)
    asked = np.arange(-5, N + 20)
    assert ours.holds(asked).tolist() == [row in held for row in asked.tolist()]
    assert [row for block in ours for row in block.tolist()] == sorted(held)
    less = RowSet(N)
    less.add(np.unique(np.array(other, np.int64)))
    assert [row for block in ours.without(less) for row in block.tolist()] == sorted(held - set(other))


def test_rows_beyond_one_block_are_found() -> None:
    far = np.array([3, 1_500_000, 2_999_999])
    ours = RowSet(3_000_000)
    ours.add(far)
    assert np.concatenate(list(ours.without(RowSet(3_000_000)))).tolist() == far.tolist()
    assert ours.holds(far + 1).tolist() == [False] * 3
    assert not RowSet(0).holds(np.arange(3)).any()
