"""DocVQA: questions about scanned documents. Mathew et al. 2021, arXiv 2007.00398.

Data: the challenge's JSON `{dataset_name, data: [{questionId, question, image, answers, ...}]}` (its val split has
answers, its test split none), or lmms-lab/DocVQA's parquet files.

ANLS is one minus the normalised edit distance to the nearest answer, and 0 below one half. The distance is taken after
lower case and single spaces, but divided by the length of the longer text as it was before, as the challenge's server
does it: doubled spaces make a mistake cheaper. Exact match is after the same normalisation (`exact_match`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from visgain.errors import DataError
from visgain.evaluation.benchmark import Item, Question, Scored, mean
from visgain.evaluation.hub import files, local_copy
from visgain.evaluation.records import Record, read_records, unique

LLAVA, CAMBRIAN = "\nAnswer the question using a single word or phrase.", "\nGive the short answer directly."

_FILE = re.compile(r"(val|.*validation).*\.(json|parquet)")


class DocVQA:
    name = "docvqa"
    source = "https://rrc.cvc.uab.es/?ch=17 (val_v1.0_withQT.json), or lmms-lab/DocVQA on the hub"
    variants: Mapping[str, str] = {"official": "ANLS of the challenge's server, and exact match"}
    max_new_tokens = 32

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """The questions at `data`: a JSON or parquet file, a folder with one called val..., or lmms-lab/DocVQA."""
        data = local_copy(data, "lmms-lab/DocVQA", ["DocVQA/validation-*.parquet"], self.source)
        found = files(data, lambda name: bool(_FILE.fullmatch(name)), "val*.json or validation*.parquet")
        questions = []
        for path in found:
            questions += [_question(row, image_root or path.parent) for row in read_records(path, inside="data")]
        return unique(questions, data)

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """`anls` and `exact_match`, in percent."""
        answers = [item.question.facts["answers"] for item in items]
        said = [item.prediction for item in items]
        exact = [any(normal(a) == normal(s) for a in some) for s, some in zip(said, answers, strict=True)]
        metrics = {
            "anls": mean([anls(s, some) for s, some in zip(said, answers, strict=True)], scale=100),
            "exact_match": mean(exact, scale=100),
        }
        return Scored(metrics=metrics, counts={"empty": sum(not text.strip() for text in said)})


def anls(said: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one reply, 0 or from 0.5 to 1."""
    nearest = min(_normalised_distance(said, answer) for answer in answers)
    return 1 - nearest if 1 - nearest >= 0.5 else 0.0


def _normalised_distance(said: str, answer: str) -> float:
    longer = max(len(answer), len(said))  # before normalisation
    return distance(normal(said), normal(answer)) / longer if longer else 0.0


def normal(text: str) -> str:
    """Lower case, single spaces, none around."""
    return " ".join(text.lower().split())


def distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of characters to insert, delete or replace."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _question(row: Record, root: Path) -> Question:
    if not row.has("answers"):
        raise DataError(f"{row.where} has no answers; DocVQA's test split is scored by its server, use the val split")
    answers = row.texts("answers")
    if not answers:
        raise row.wrong("answers", "a list with an answer")
    document = str(row.fields.get("docId", ""))
    page = str(row.fields.get("ucsf_document_page_no", ""))
    return Question(
        id=row.id("questionId"),
        prompt=row.text("question") + LLAVA,
        images=(row.image("image", root),),
        facts={"answers": list(answers), "text": row.text("question")},
        cluster=f"{document}/{page}" if document else "",
    )
