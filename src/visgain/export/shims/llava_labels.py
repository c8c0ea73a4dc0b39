"""Labels that LLaVA, or a trainer that grew out of it, gives a row, held to the masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from visgain.export.shims.masks import IGNORED, MaskError, Masks, content_key, logger

_TURNS = (
    ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
)
"""Where answers begin and end in templates of which LLaVA-NeXT supervises more than the answers."""


class Options(NamedTuple):
    """What the command line says before the training script."""

    masks: str
    allow_mismatch: bool
    check: bool


def record_key(record: Mapping[str, Any]) -> int:
    """What a row of data.json says, as one number: its pictures and turns, but not its id: some loaders change that."""
    image = record.get("image")
    images = [] if image is None else [image] if isinstance(image, str) else list(image)
    turns = [text for turn in record["conversations"] for text in (turn["from"], turn["value"])]
    return content_key(*images, *turns)


class Guard:
    """Holds the labels of one dataset of the trainer to the masks."""

    def __init__(self, tokenizer: Any, options: Options) -> None:
        self.options = options
        self.masks = Masks(options.masks, getattr(tokenizer, "decode", None))
        self.turns = _turns_of(tokenizer)
        self.asked: int | None = None  # the row that the trainer was asked for
        self.row: Any = None  # nanoVLM's: the row that is in work
        self.told = self.masks.told  # with "mismatch": rows without any label

    def verify(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises MaskError unless `records` are the rows of data.json, all of them, in its order."""
        wanted = Path(self.masks.path).with_name("data.json")
        if len(records) != len(self.masks):
            raise MaskError(
                f"the trainer reads {len(records)} rows and the selection keeps {len(self.masks)}; "
                f"give the trainer {wanted}, whole and alone"
            )
        if "key" not in self.masks.columns:
            raise MaskError(
                f"{self.masks.path} is of an export to another trainer; run `visgain export --to llava` again"
            )
        keys = self.masks.columns["key"].tolist()
        for index, (record, key) in enumerate(zip(records, keys)):  # noqa: B905 Python 3.9
            if record_key(record) != key:
                raise MaskError(
                    f"the trainer's row {index} is not row {index} of the export (row {int(self.masks.rows[index])} of "
                    f"the dataset that was scored); give the trainer {wanted} as it was written"
                )

    def select(self, index: int, item: Mapping[str, Any], has_image: bool) -> Tensor:
        """The labels of the index-th kept row, with -100 on all that are not to carry loss. Raises MaskError."""
        mask, labels = self.masks.at(index), cast("Tensor", item["labels"])
        if not bool((labels != IGNORED).any()):
            self._mismatched(mask.row, len(mask.token_id))
            return labels
        labels = _answers_only(item["input_ids"], labels, self.turns)
        # Trainers cut a row when its pictures have become tokens, which is after the dataset; scores are cut already.
        if has_image:
            labels = self.masks.without_excess(mask, labels)
        return self.masks.labels(mask, labels, item["input_ids"])

    def _mismatched(self, row: int, n_tokens: int) -> None:
        """A row whose every label is -100: LLaVA's way to say that its own counting of tokens did not add up."""
        self.told["mismatch"] = count = self.told.get("mismatch", 0) + 1
        text = (
            f"row {row}: the trainer gives no label to any of its {n_tokens} answer tokens, which it calls a "
            "'tokenization mismatch': an empty question or answer, the end token or a role in a text, or a tokenizer "
            "that its template was not written for"
        )
        if not self.options.allow_mismatch:
            raise MaskError(
                f"{text}. `visgain_launch.py --check` counts such rows; leave them out of the dataset, or start with "
                "--allow-mismatch to train without them"
            )
        if count & (count - 1) == 0:  # the first, second, fourth ...
            logger.warning("%s. %d such rows so far in this process, trained on without any loss", text, count)


def _turns_of(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids of the beginnings and ends of answers in the templates of _TURNS that this tokenizer knows."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    known = [turn for turn in _TURNS if all(text.split("|>")[0] + "|>" in vocabulary for text in turn)]
    encoded = [[tokenizer.encode(text, add_special_tokens=False) for text in turn] for turn in known]
    return [(head, end) for head, end in encoded]


def _answers_only(input_ids: Tensor, labels: Tensor, turns: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """`labels` without those outside of answers, if the template supervises the heads of the assistant's turns."""
    ids = input_ids.tolist()
    inside = torch.zeros(len(ids), dtype=torch.bool)
    supervises_heads = False
    for head, end in turns:
        for at in range(len(ids) - len(head) + 1):
            if ids[at : at + len(head)] == head:
                start = at + len(head)
                stop = next((k for k in range(start, len(ids)) if ids[k] == end[0]), len(ids))
                stop += len(end) if ids[stop : stop + len(end)] == end else 1
                inside[start:stop] = True
                supervises_heads = supervises_heads or bool(labels[at] != IGNORED)
    return labels.masked_fill(~inside.to(labels.device), IGNORED) if supervises_heads else labels
