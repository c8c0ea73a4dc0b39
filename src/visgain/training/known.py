"""What a training must know of its rows before it begins, from a look at some of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

from visgain.training.collate import Rows, TrainingRow

KNOWN_ROWS = 256
"""How many rows, spread over all, are looked at (at their text and not at their pictures)."""


class KnownRows:
    """Some rows of a training, to choose from: the same on every rank. If any row has a picture, so has one of them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @cached_property
    def _by_size(self) -> list[int]:
        """With the fewest pictures and then the least text first, those without pictures last."""
        n = self.rows.n_selected
        spread = dict.fromkeys(k * n // KNOWN_ROWS for k in range(KNOWN_ROWS))
        outlines = {row: self.rows.outline(row) for row in spread}
        if not any(outline.n_images for outline in outlines.values()):
            # One picture, wherever it is, decides which way a model can take and what ranks wait for.
            for row in tqdm(range(n), desc="looking for pictures", unit="row", delay=2, leave=False):
                outline = self.rows.outline(row)
                if outline.n_images:
                    outlines[row] = outline
                    break
        return sorted(outlines, key=lambda row: (outlines[row].n_images == 0, outlines[row]))

    @cached_property
    def silent(self) -> TrainingRow:
        """The smallest row that has pictures (if one has), with no weight: it goes along where a picture must."""
        row = self.rows[self._by_size[0]]
        return replace(row, weight=np.zeros_like(row.weight))

    def probes(self) -> list[TrainingRow]:
        """Rows to try a way of computing on: small, middling and large with pictures, the smallest and largest without.

        The first of them twice: how rows stand side by side is tried, and those whose pictures are unlike may go apart.
        """
        seeing = [row for row in self._by_size if self.rows.outline(row).n_images]
        blind = self._by_size[len(seeing) :]
        chosen = [*seeing[:1], *seeing[len(seeing) // 2 :][:1], *seeing[-1:], *blind[:1], *blind[-1:]]
        rows = [self.rows[row] for row in dict.fromkeys(chosen)]
        return [*rows, rows[0]]

    def estimate(self, row: int) -> float:
        """About how many tokens `row` has."""
        outline, silent = self.rows.outline(row), self.rows.outline(self._by_size[0])
        a_picture = self.silent.encoded.n_image_tokens / max(1, silent.n_images)
        return outline.n_images * a_picture + outline.n_chars / 4 + 1
