"""POPE: is there such an object in the picture? Li et al. 2023, arXiv 2305.10355.

Data: JSON lines `{question_id, image, text, label}`, one file a strategy (random, popular, adversarial) and set
(MSCOCO, A-OKVQA, GQA); LLaVA's single file with a `category`; the hub's tables. `question_id` begins at 1 in each
official file.

Two MSCOCO releases are in use: 2023-08 (2,910 random questions, and "imange" for "image" after a vowel), and the one
since 2023-11 (3,000). Scores of one are not comparable with scores of the other, so a result names what it saw.

The positive class is yes. Headline numbers are means over the splits, as published; pooled ones stand beside them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool

from visgain.data.images import ImageFile
from visgain.evaluation.benchmark import Item, Metric, Question, Scored, average, ratio
from visgain.evaluation.hub import files, local_copy
from visgain.evaluation.records import Record, field_named, read_records, unique

SETS, STRATEGIES = ("coco", "aokvqa", "gqa"), ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's; others ask otherwise

RELEASES = {
    "0e839b36580da8fc1d93d7e5b4a84b9d": "release 2023-08",
    "d750b74dab4754beaf2356f00dcf72b9": "release 2023-08",
    "8b5d7155ec8e653d57238bfd351caaa3": "release 2023-08",
    "ee05b066788568f589069e57f075a93b": "release 2023-11",
    "2655ad812ccc61c4e770534fb5eef7a2": "release 2023-11",
    "42bb63f31d72fbab36c8baa9f248e8eb": "release 2023-11",
}
"""Hash of a split's (image, text, label), in any order -> the release it belongs to. MSCOCO only."""

_FILE = re.compile(r"(?:(coco|aokvqa|gqa)_)?.*pope.*\.jsonl?", re.IGNORECASE)
_HUB_FILE = re.compile(r"(random|popular|adversarial|test)-\d+-of-\d+\.parquet")
_NOT_IN_NUMBERS = re.compile(r"\.(?!\d)")


@dataclass(frozen=True, kw_only=True)
class Parser:
    """How an implementation reads replies."""

    about: str
    read: Callable[[str, str], str | None]
    """(reply, label) -> yes, no, or None for a reply that is neither, which is wrong."""
    counts_unread: bool = True
    """Whether what is neither counts as a no in recall; else it is in no cell of the table."""


def official(reply: str, label: str = "") -> str:
    """No if one of the words before the first full stop is No, no or not; anything else is yes, nothing included."""
    words = reply.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def opera(reply: str, label: str = "") -> str:
    """As `official`, over the whole reply, and with NO and every n't."""
    words = reply.replace(".", "").replace(",", "").split(" ")
    return "no" if {"No", "no", "not", "NO"} & set(words) or any(word.endswith("n't") for word in words) else "yes"


def vcd(reply: str, label: str) -> str:
    """The label if the reply holds it, inside of words too; else its opposite."""
    holds = label in reply.lower()
    return label if holds else {"yes": "no", "no": "yes"}[label]


def vlmevalkit(reply: str, label: str = "") -> str | None:
    """Yes or no if exactly one of them is a word of the reply."""
    said = {"yes", "no"} & set(_without_punctuation(reply.lower()).split())
    return said.pop() if len(said) == 1 else None


def lmms_eval(reply: str, label: str = "") -> str | None:
    """Yes or no if the reply is nothing else, whatever the case."""
    word = reply.lower().strip()
    return word if word in ("yes", "no") else None


def cambrian(reply: str, label: str = "") -> str | None:
    """The first word without full stops, colons and commas around it."""
    words = reply.lower().split()
    word = words[0].strip(".:,") if words else ""
    return word if word in ("yes", "no") else None


def _without_punctuation(text: str) -> str:
    """As in VQA's evaluation: a mark with a space beside it somewhere vanishes everywhere, others become spaces."""
    has_thousands = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        vanishes = has_thousands or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    return _NOT_IN_NUMBERS.sub("", cleaned, count=32)  # 32 is the value of a flag that it passes in the wrong place


PARSERS: Mapping[str, Parser] = {
    "official": Parser(about="No, no or not before the first full stop is no, all else yes", read=official),
    "opera": Parser(about="No, no, NO, not or n't anywhere is no, all else yes (OPERA, PAI)", read=opera),
    "vcd": Parser(about="right if the label occurs in the reply, inside of words too", read=vcd),
    "vlmevalkit": Parser(about="exactly one of the words yes and no, else wrong", read=vlmevalkit),
    "lmms-eval": Parser(about="the reply is yes or no and nothing else", read=lmms_eval, counts_unread=False),
    "cambrian": Parser(about="the first word is yes or no, else wrong", read=cambrian),
}


class Pope:
    name = "pope"
    source = "https://github.com/AoiDragon/POPE (output/), or lmms-lab/POPE on the hub; images: COCO val2014, GQA"
    variants: Mapping[str, str] = {name: parser.about for name, parser in PARSERS.items()}
    max_new_tokens = 128

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """Every question of the official files at `data`: a file, a folder, a pattern of files, or lmms-lab/POPE."""
        if "*" not in data.name:
            data = local_copy(data, "lmms-lab/POPE", ["Full/*.parquet"], self.source)
        found = files(data, lambda name: bool(_FILE.fullmatch(name) or _HUB_FILE.fullmatch(name)), "POPE files")
        split_files = [
            path for path in found if not path.name.startswith("test-")
        ]  # the hub has both, of the same rows
        questions = []
        for path in split_files or found:
            rows = read_records(path)
            questions += [_question(row, path, image_root) for row in rows]
        return unique(questions, data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """See the module. Keys: the mean over splits (`f1`), over all questions (`pooled.f1`), of one set or split."""
        parser = PARSERS[variant]
        split = np.array([item.question.split for item in items], dtype=object)
        wants = np.array([item.question.facts["label"] == "yes" for item in items], dtype=bool)
        replies = [parser.read(item.prediction, item.question.facts["label"]) for item in items]
        said = np.array(replies, dtype=object)
        names = sorted(set(split), key=_order)

        parts = {name: _table(split == name, wants, said, parser) for name in names}
        sets = sorted({name.partition("/")[0] for name in names})
        groups = {f"{one}.": [parts[name] for name in names if name.partition("/")[0] == one] for one in sets}
        metrics: dict[str, Metric] = {}
        for metric in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
            metrics[metric] = average([part[metric] for part in parts.values()])
        for prefix, group in groups.items():
            if len(groups) > 1:
                metrics |= {f"{prefix}{metric}": average([part[metric] for part in group]) for metric in group[0]}
        pooled = _table(np.ones(len(items), bool), wants, said, parser)
        metrics |= {f"pooled.{metric}": value for metric, value in pooled.items()}
        metrics |= {f"{name}.{metric}": value for name, part in parts.items() for metric, value in part.items()}
        return Scored(
            metrics=metrics,
            unparsed=sum(reply is None for reply in replies),
            counts=_counts(names, split, wants, said),
            notes={name: _release([i.question for i in items if i.question.split == name]) for name in names},
        )


def _question(row: Record, path: Path, image_root: Path | None) -> Question:
    group, strategy = _split_of(row, path)
    text = row.text(field_named(row, ("text", "question")))
    label = row.text(field_named(row, ("label", "answer"))).strip().lower()
    if label not in ("yes", "no"):
        raise row.wrong(field_named(row, ("label", "answer")), "yes or no")
    picture = row.image("image", image_root or path.parent)
    image = PurePosixPath(row.text("image" if isinstance(picture, ImageFile) else "image_source")).stem
    return Question(
        id=row.id("question_id"),
        split=f"{group}/{strategy}" if strategy else group,
        prompt=text + SUFFIX,
        images=(picture,),
        facts={"label": label, "text": text, "image": image},
        cluster=f"{group}/{image}",
    )


def _split_of(row: Record, path: Path) -> tuple[str, str]:
    """(set, strategy): from the row where it says so, else from the file's name; no strategy where nothing does."""
    name = path.stem.lower()
    group = next((one for one in ("aokvqa", "gqa") if one in name), "coco")
    field = next((one for one in ("category", "subset") if row.has(one)), None)
    if field is not None:
        return group, row.one_of(field, STRATEGIES)
    return group, next((one for one in STRATEGIES if one in name), "")


def _order(split: str) -> tuple[int, int]:
    group, _, strategy = split.partition("/")
    return SETS.index(group), STRATEGIES.index(strategy) if strategy else -1


def _table(
    where: Bool[np.ndarray, " n"], wants: Bool[np.ndarray, " n"], said: np.ndarray, parser: Parser
) -> dict[str, Metric]:
    """Metrics of the questions that are `where`, in percent. What has no value (no yes at all, say) is nan."""
    yes, no = said == "yes", said == "no"
    hit = where & wants & yes
    missed = where & wants & (~yes if parser.counts_unread else no)
    precision = ratio(hit, where & yes, scale=100)
    recall = ratio(hit, hit | missed, scale=100)

    def f1(weights: np.ndarray) -> float:
        p, r = precision(weights), recall(weights)
        return 2 * p * r / (p + r) if p + r else 0.0  # nan if one of them is

    return {
        "f1": f1,
        "accuracy": ratio(where & np.where(wants, yes, no), where, scale=100),
        "precision": precision,
        "recall": recall,
        "yes_ratio": ratio(where & yes, where, scale=100),
    }


def _counts(
    names: Sequence[str], split: np.ndarray, wants: Bool[np.ndarray, " n"], said: np.ndarray
) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name in names:
        where, yes, no = split == name, said == "yes", said == "no"
        cells = {"questions": where, "TP": where & wants & yes, "FP": where & ~wants & yes}
        cells |= {"TN": where & ~wants & no, "FN": where & wants & no, "unparsed": where & ~yes & ~no}
        counts |= {f"{name}.{cell}": int(is_in.sum()) for cell, is_in in cells.items()}
    return counts


def _release(questions: Sequence[Question]) -> str:
    """What a split's questions are: their release where it is known, how many, and a hash."""
    facts = [question.facts for question in questions]
    lines = sorted("\t".join((fact["image"], fact["text"], fact["label"])) for fact in facts)
    found = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
    return f"{RELEASES.get(found, 'unknown release')}, {len(questions)} questions, {found}"
