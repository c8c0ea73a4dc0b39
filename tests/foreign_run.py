"""A small LLaVA, drawn data and the commands of a guide, for tests in which a foreign trainer trains on a selection."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_llava
from environments import commands
from visgain.cli import main
from visgain.storage import read_scores, read_selection_table

IGNORED = -100
THINGS = ("cup", "dog", "house", "cat", "table", "picture", "woman", "man", "people")


def write_folder(folder: Path) -> None:
    """model/ and data.json with its pictures: one and two turns, two questions about one picture with the same answers,
    and rows without a picture."""
    vlm = tiny_llava.clip_llava(tiny_llava.vicuna_like("legacy"), side=56)
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [{"id": "000", "conversations": _turns("Who is there?", "No one, not even a dog.")}]
    for k, thing in enumerate(THINGS):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        talk = _turns("<image>\nWhat is this?", f"A red {thing} on a table.", "Is there a dog?", "No, a cat.")
        rows.append({"id": f"00{k + 1}", "image": f"{k}.png", "conversations": talk[: 2 + 2 * (k % 3 > 0)]})
    for question in ("Is this a cat?", "Is this a man?"):
        rows.append({"id": "twin", "image": "0.png", "conversations": _turns(f"<image>\n{question}", "No, it is not.")})
    rows.append({"id": "last", "conversations": _turns("What is helpful?", "A detailed answer.")})
    (folder / "data.json").write_text(json.dumps(rows))


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def run_ours(guide: Path, folder: Path) -> None:
    """The guide's commands of visgain, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands(guide):
            if command[0] == "visgain":
                main(command[1:])


def supervised_spans(input_ids: list[int], row: Mapping[str, Any]) -> list[int] | None:
    """Positions of a row's answer tokens in a trainer's input, by searching for each answer; None if one is missing."""
    token_id, turn = np.array(row["token_id"]), np.array(row["turn"])
    position, found = 0, []
    for number in range(turn.max() + 1):
        answer = token_id[turn == number].tolist()
        starts = range(position, len(input_ids) - len(answer) + 1)
        start = next((start for start in starts if input_ids[start : start + len(answer)] == answer), None)
        if start is None:
            return None
        position = start + len(answer)
        found += range(start, position)
    return found


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the selection with what is known of their tokens, and their questions."""
    turns = {row["row"]: row["turn"] for row in read_scores(folder / "scores", ["row", "turn"]).to_pylist()}
    data = json.loads((folder / "data.json").read_text())
    return [
        {**row, "turn": turns[row["row"]], "question": data[row["row"]]["conversations"][0]["value"]}
        for row in read_selection_table(folder / "selection").to_pylist()
    ]


def trained_rows(batches: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each row of the collated batches: input_ids, labels, and loss_scale if there is one."""
    for batch in batches:
        for k in range(len(batch["input_ids"])):
            yield {name: values[k] for name, values in batch.items()}


def check_labels(
    folder: Path, batches: list[dict[str, Any]], tokenizer: Any = None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every kept row was trained on once, and of its tokens exactly the selected carried loss. Returns the pairs.

    `tokenizer`: the one that was trained with, if not that of `write_folder`.
    """
    tokenizer = tokenizer or tiny_llava.vicuna_like("legacy")
    kept = {row["row"]: row for row in kept_rows(folder)}
    pairs = []
    for trained in trained_rows(batches):
        text = tokenizer.decode([token for token in trained["input_ids"] if token >= 0])  # LLaVA's pictures are -200
        fits = [
            row
            for row in kept.values()
            if row["question"].removeprefix("<image>").strip() in text and supervised_spans(trained["input_ids"], row)
        ]
        row = max(fits, key=lambda row: len(row["token_id"]))
        positions = supervised_spans(trained["input_ids"], row)
        assert positions is not None
        expected = [IGNORED] * len(trained["labels"])
        for position, token, keep in zip(positions, row["token_id"], row["keep"], strict=True):
            expected[position] = token if keep else IGNORED
        assert trained["labels"] == expected
        pairs.append((trained, kept.pop(row["row"])))
    assert not kept
    return pairs
