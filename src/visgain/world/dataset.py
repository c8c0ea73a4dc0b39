"""Write a split of the world as a LLaVA-format dataset with its ground truth.

A split is a folder: data.json (LLaVA format), images/, and truth.jsonl with one object a row:
{"row", "topics": [...], "keys": [...], "answers": [[[start, end], ...], ...], "things": [...]}, where `answers` gives
for each answer the character spans of the words that need the picture. A split with lists (`Split.listed`) has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from visgain.config import WorldConfig
from visgain.storage import storage_errors, write_json, write_text
from visgain.world.draw import draw_picture
from visgain.world.scene import MAX_OBJECTS, Scene, draw_scene
from visgain.world.talk import (
    COMMON_SENSE,
    TEXT_ONLY,
    VISUAL,
    Exchange,
    Lister,
    Speaker,
    caption,
    colour,
    conversation,
    count,
    existence,
    far_relations,
    notes,
    place,
    relation,
    relations,
    size,
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a split talks about. The shares are of rows and add up to at most 1; the rest are visual conversations."""

    bias: float
    turns: tuple[int, int]  # fewest and most exchanges in a visual conversation
    captions: float = 0.0
    common_sense: float = 0.0
    text_only: float = 0.0
    existence: float = 0.0
    objects: tuple[int, int] = (1, MAX_OBJECTS)  # fewest and most in a picture
    lister: Lister = notes
    listed: float = 0.0  # of rows, which are all that `lister` has to say
    visual: tuple[Speaker, ...] = VISUAL  # what visual conversations are about

    @property
    def has_truth(self) -> bool:
        """Notes come in any order, and what relations told before imply is not marked: lists have no ground truth."""
        return not self.listed

    def draw(self, rng: np.random.Generator, scene: Scene, bias: float) -> list[Exchange]:
        """One row's conversation about `scene`."""
        share = rng.random()
        if share < self.captions:
            return [caption(rng, scene, bias)]
        if share < self.captions + self.common_sense:
            return conversation(rng, scene, bias, COMMON_SENSE, 1)
        speakers = self.visual
        if share < self.captions + self.common_sense + self.existence:
            speakers = (existence,)
        elif share > 1 - self.listed and (listed := self.lister(rng, scene)):
            return listed
        turns = int(rng.integers(self.turns[0], self.turns[1] + 1))
        return conversation(rng, scene, bias, speakers, turns)


EVERYTHING = Split(
    bias=0.0,
    captions=0.15,
    common_sense=0.03,
    text_only=0.03,
    existence=0.1,
    turns=(3, 4),
    listed=0.05,
    visual=(*VISUAL, place, count, relation, relation),
)

SPLITS = {
    # Many exchanges to a picture: the same image tokens teach more.
    "align": Split(bias=0.0, captions=0.4, common_sense=0.04, text_only=0.04, turns=(1, 4)),
    # As in LLaVA's mixture, a good part of the instruction data can be answered without looking.
    "train": Split(bias=0.9, captions=0.15, common_sense=0.25, text_only=0.06, existence=0.15, turns=(1, 3)),
    "test": Split(bias=-1.0, captions=0.2, existence=0.35, turns=(1, 1)),
    # The embedded model learns to see (one object to a picture), to look around ("align"), to find an object by its
    # kind ("notes"), to answer about it ("ask"), everything together ("questions"), how objects stand to each other
    # ("relate", "far"), which in a conversation of other questions is asked too seldom, everything once more, and with
    # more to "count".
    "easy": Split(bias=0.0, captions=0.5, common_sense=0.02, text_only=0.02, turns=(1, 1), objects=(1, 1)),
    "notes": Split(bias=0.0, turns=(1, 1), listed=1.0),
    "ask": Split(
        bias=0.0,
        turns=(2, 4),
        listed=0.2,
        visual=(colour, size, place),
    ),
    "questions": Split(
        bias=0.0, captions=0.15, common_sense=0.03, text_only=0.03, existence=0.1, turns=(3, 4), listed=0.15
    ),
    "relate": Split(
        bias=0.0, turns=(2, 4), lister=relations, listed=0.85, visual=(place, count), objects=(3, MAX_OBJECTS)
    ),
    "far": Split(bias=0.0, turns=(1, 2), lister=far_relations, listed=1.0, visual=(place,), objects=(2, MAX_OBJECTS)),
    "everything": EVERYTHING,
    "count": replace(EVERYTHING, visual=(*VISUAL, count, count, count, relation)),
}


@dataclass(frozen=True, kw_only=True)
class WorldRow:
    scene: Scene | None  # None for a text-only row
    exchanges: tuple[Exchange, ...]


def draw_row(split: Split, bias: float, seed: int, row: int) -> tuple[WorldRow, np.random.Generator]:
    """Row `row` of a split, and the generator to paint it with. Rows do not depend on each other or on their number."""
    rng = np.random.default_rng([seed, row])
    scene = draw_scene(rng, bias, *split.objects)
    if rng.random() < split.text_only:
        return WorldRow(scene=None, exchanges=tuple(conversation(rng, scene, bias, TEXT_ONLY, 1))), rng
    return WorldRow(scene=scene, exchanges=tuple(split.draw(rng, scene, bias))), rng


def write_world(config: WorldConfig) -> Path:
    """Draw the split into `config.out` and return the path of its data.json, written last."""
    split = SPLITS[config.split]
    bias = split.bias if config.bias is None else config.bias
    # Splits must not share pictures even when their seeds are equal.
    seed = config.seed * 100 + list(SPLITS).index(config.split)
    images = config.out / "images"
    with storage_errors(config.out):
        images.mkdir(parents=True, exist_ok=True)
    data, truth = [], []
    for row in tqdm(range(config.rows), desc=f"drawing {config.split}", unit="row", mininterval=0.5):
        drawn, rng = draw_row(split, bias, seed, row)
        name = None
        if drawn.scene is not None:
            name = f"images/{row:06d}.png"
            with storage_errors(config.out / name):
                draw_picture(drawn.scene, rng).save(config.out / name)
        data.append(_llava_row(config.split, row, name, drawn))
        truth.append(json.dumps(_truth_row(row, drawn)) + "\n")
    (config.out / "truth.jsonl").unlink(missing_ok=True)
    if split.has_truth:
        write_text(config.out / "truth.jsonl", "".join(truth))
    write_json(config.out / "data.json", data)
    return config.out / "data.json"


def _llava_row(split: str, row: int, image: str | None, drawn: WorldRow) -> dict[str, Any]:
    first = "" if image is None else "<image>\n"
    turns = list(_turns(first, drawn.exchanges))
    topics = dict.fromkeys(exchange.topic for exchange in drawn.exchanges)
    source = "text" if image is None else next(iter(topics)) if len(topics) == 1 else "conversation"
    fields: dict[str, Any] = {"id": f"{split}-{row:06d}", "source": source}
    return fields | ({} if image is None else {"image": image}) | {"conversations": turns}


def _turns(first: str, exchanges: tuple[Exchange, ...]) -> Iterator[dict[str, str]]:
    for number, said in enumerate(exchanges):
        yield {"from": "human", "value": (first if number == 0 else "") + said.question}
        yield {"from": "gpt", "value": said.answer}


def _truth_row(row: int, drawn: WorldRow) -> dict[str, Any]:
    return {
        "row": row,
        "topics": [said.topic for said in drawn.exchanges],
        "keys": [said.key for said in drawn.exchanges],
        "answers": [said.visual for said in drawn.exchanges],
        "things": [asdict(thing) for thing in drawn.scene.things] if drawn.scene else [],
    }
