"""MMBench: multiple choice over some twenty skills, each question asked with its options rotated. Liu et al. 2023,
arXiv 2307.06281.

Data: TSV `index, question, hint, A, B, C, D, answer, category, image, ...` with pictures as base64, or the hub's
lmms-lab/MMBench. The rotations of question i have the index i + k * 1,000,000. Releases differ in rows (LLaVA's dev
file of July 2023 has 4,377 for 1,176 questions), and scores of different releases are not comparable.

Circular (the published number): a question counts if every rotation is right. Vanilla: the unrotated rows alone.

Variants are ways to find the letter in a reply; see `choice`. What has none is wrong and counted as unparsed; MMBench
gives those replies to a language model. Where an item carries such a model's reply, the letter is taken from it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL.Image import Image

from visgain.data.images import decode
from visgain.errors import DataError
from visgain.evaluation import choice
from visgain.evaluation.benchmark import Item, Metric, Question, Scored, ratio
from visgain.evaluation.hub import files, local_copy
from visgain.evaluation.records import Record, field_named, read_records, unique
from visgain.types import ImageRef

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
ROTATION = 1_000_000

_MATCHERS: Mapping[str, choice.Matcher] = {
    "official": choice.mmbench_2023,
    "vlmevalkit": choice.vlmevalkit,
    "cambrian": choice.cambrian,
}
_NOTHING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
        *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""What pandas reads as missing. LLaVA reads the file with it, so an option "None" ends the options."""

_FILE = re.compile(r".*mmbench.*\.tsv|dev-.*\.parquet", re.IGNORECASE)
_REFERENCE = re.compile(r"\d{1,64}")


@dataclass(frozen=True, kw_only=True)
class Base64Image:
    """A picture written as base64 in a cell of a table."""

    name: str
    text: str
    max_pixels: int = 100_000_000

    @cached_property
    def key(self) -> str:
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()

    def hint(self) -> str | None:
        """None: the key says it."""
        return None

    def open(self) -> Image:
        """Decode as `ImageFile` does. Raises ImageError, and nothing else."""
        return decode(self.name, lambda: io.BytesIO(base64.b64decode(self.text, validate=True)), self.max_pixels)


class MMBench:
    name = "mmbench"
    source = "https://github.com/open-compass/MMBench (mmbench_dev_20230712.tsv), or lmms-lab/MMBench on the hub"
    variants: Mapping[str, str] = {
        "official": "a letter that stands alone or in brackets, else the text of one option (2023)",
        "vlmevalkit": "a letter near the end, else the text of one option (today's VLMEvalKit)",
        "cambrian": "the first character after the last `answer is` or `answer:`",
    }
    max_new_tokens = 1024

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """The rows of the file or folder `data`, or of lmms-lab/MMBench (English, dev)."""
        data = local_copy(data, "lmms-lab/MMBench", ["en/dev-*.parquet"], self.source)
        questions = []
        for path in files(data, lambda name: bool(_FILE.fullmatch(name)), "MMBench table (mmbench_dev_*.tsv)"):
            rows = read_records(path)
            by_index = {row.id("index"): row for row in rows}
            questions += [_question(row, by_index, image_root or path.parent) for row in rows]
        return unique(questions, data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Keys: `circular` (published), `vanilla`, and `circular.` with each category; in percent."""
        letters = [_letter(item, _MATCHERS[variant]) for item in items]
        right = [x == item.question.facts["answer"] for x, item in zip(letters, items, strict=True)]
        groups: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            groups.setdefault(int(item.question.id) % ROTATION, []).append(place)
        firsts = np.zeros(len(items))  # one row stands for its group, whose rows are always drawn together
        hits = np.zeros(len(items))
        for places in groups.values():
            firsts[places[0]] = 1
            hits[places[0]] = all(right[place] for place in places)
        unrotated = np.array([int(item.question.id) < ROTATION for item in items], float)

        metrics: dict[str, Metric] = {
            "circular": ratio(hits, firsts, scale=100),
            "vanilla": ratio(np.array(right, float) * unrotated, unrotated, scale=100),
        }
        for fact in ("category", "l2-category"):
            found = [item.question.facts[fact] for item in items]
            for name in sorted(set(found) - {""}):
                where = firsts * np.array([one == name for one in found], float)
                metrics[f"circular.{name}"] = ratio(hits * where, where, scale=100)
        offered = [item.question.facts["answer"] in item.question.facts["options"] for item in items]
        return Scored(
            metrics=metrics,
            unparsed=sum(letter is None for letter in letters),
            counts={"rows": len(items), "questions": len(groups), "answer_not_offered": offered.count(False)},
        )


def _letter(item: Item, match: choice.Matcher) -> str | None:
    options = item.question.facts["options"]
    found = match(item.prediction, options)
    return match(item.judgements[0], options) if found is None and item.judgements else found


def _question(row: Record, rows: Mapping[str, Record], root: Path) -> Question:
    index = row.id("index")
    if not index.isascii() or not index.isdigit():
        raise row.wrong("index", "a whole number")
    options: dict[str, str] = {}
    for letter in "ABCD":
        if _is_missing(row, letter):
            break
        options[letter] = row.text(letter)
    if _is_missing(row, "answer"):
        raise DataError(f"{row.where} has no answer; MMBench's test split is scored by its server, use the dev split")
    hint = "" if _is_missing(row, "hint") else row.text("hint") + "\n"
    lines = [hint + row.text("question"), *(f"{letter}. {text}" for letter, text in options.items())]
    return Question(
        id=index,
        prompt="\n".join(lines) + SUFFIX,
        images=(_image(row, rows, root),),
        facts={
            "answer": row.one_of("answer", tuple("ABCD")),
            "options": options,
            "category": _fact(row, ("category",)),
            "l2-category": _fact(row, ("l2-category", "L2-category")),
        },
        cluster=str(int(index) % ROTATION),
    )


def _is_missing(row: Record, name: str) -> bool:
    value = row.fields.get(name)
    if isinstance(value, str):
        return value in _NOTHING or value.lower() in ("nan", "none")
    return value is None or value != value  # nan


def _fact(row: Record, names: Sequence[str]) -> str:
    name = next((name for name in names if not _is_missing(row, name)), None)
    return "" if name is None else row.text(name)


def _image(row: Record, rows: Mapping[str, Record], root: Path) -> ImageRef:
    """The picture: base64, the index of the row that has it (VLMEvalKit), a path (`image_path`), or a parquet cell."""
    name = field_named(row, ("image", "image_path"))
    value = row.fields[name]
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        if value not in rows:
            raise row.wrong(name, "the index of a row in this file")
        value = rows[value].fields[name]
    if name == "image" and isinstance(value, str) and value:
        return Base64Image(name=f"image of {row.where}", text=value)
    return row.image(name, root)
