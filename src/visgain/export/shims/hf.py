"""For the Hugging Face Trainer: the user's own collator, with -100 on every label that is not to carry loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from visgain.export.shims.masks import Masks

ROW = "visgain_row"
"""The field by which a collator knows which row it sees."""


class SelectedRows(Dataset):  # type: ignore[type-arg]
    """The kept rows of a dataset, each with its number: `dataset[row]` is any mapping."""

    def __init__(self, dataset: Any, masks: Masks) -> None:
        self.dataset, self.masks = dataset, masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.masks.rows[index])
        return {**self.dataset[row], ROW: row}


class SelectiveCollator:
    """A collator round another one, whose `labels` [B, T] may carry loss where the selection says so alone.

    Rows are recognised by the field ROW, which is taken away before `collator` sees them. Raises MaskError where labels
    are not the tokens that were scored.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], masks: Masks) -> None:
        self.collator, self.masks = collator, masks

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        masks = [self.masks.of(row[ROW]) for row in rows]
        batch = self.collator([{name: value for name, value in row.items() if name != ROW} for row in rows])
        labels = [self.masks.labels(mask, batch["labels"][k]) for k, mask in enumerate(masks)]
        batch["labels"] = torch.stack(labels)
        return batch
