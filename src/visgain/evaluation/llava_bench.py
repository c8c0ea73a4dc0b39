"""LLaVA-Bench (in the wild): open questions, answers compared with a reference by a judge. Liu et al. 2023.

Data: `questions.jsonl`, `context.jsonl` (what the picture shows, in words) and `answers_gpt4.jsonl` (the references) in
one folder; or the hub's table with all of that in its rows. The judge never sees the picture. It is told the reference
first and the answer second, and gives both a score from 1 to 10 on the first line of its reply.

The relative score is 100 * mean(answer) / mean(reference), of means rounded to three decimals, itself rounded to one. A
reply that cannot be read counts as -1 for both and stays in the means. Published numbers are the mean of three runs'
scores as they were printed: without the rounding in between, LLaVA-1.5-7B's 65.4 would be 65.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64

from visgain.data.images import ImageFile
from visgain.errors import DataError
from visgain.evaluation.benchmark import (
    Item,
    JudgeRequest,
    Metric,
    Question,
    Scored,
    Weights,
    average,
    judge_runs,
    ratio,
)
from visgain.evaluation.hub import image_folder, local_copy, preferred
from visgain.evaluation.judge_prompt import filled
from visgain.evaluation.records import Record, by_id, field_named, read_records, unique
from visgain.types import ImageRef

CATEGORIES = ("conv", "detail", "complex")
UNREADABLE = (-1.0, -1.0)

SYSTEM = "You compare answers with care, and you grade them without favour."
PROMPT = """\
[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}

[End of Assistant 1]

[Assistant 2]
{answer}

[End of Assistant 2]

[System]
Above are a user's question about an image and what two AI assistants answered. You cannot see the image; the context \
describes it in a few sentences, which you may take for true. How helpful, relevant and accurate is each answer, and \
is it as detailed as the question asks for? Give each assistant one overall score from 1 to 10, where more is better.
Write the two scores, first that of Assistant 1, then that of Assistant 2, with one space between them, on the first \
line, and nothing else on that line. From the second line on, explain your scores. Which answer comes first must not \
matter to you.

"""

Pair = tuple[float, float]
"""Scores of the reference and of the answer."""


def official(review: str) -> Pair:
    """Two numbers and nothing else on the first line, with one space or comma between them; else UNREADABLE."""
    return _pair(review.split("\n")[0].replace(",", " ").split(" "))


def lmms_eval(review: str) -> Pair:
    """The first two numbers on the first line that is not empty, whatever stands around them; else UNREADABLE."""
    return _pair(re.findall(r"-?\d+(?:\.\d+)?", review.strip().split("\n")[0])[:2])


def _pair(texts: Sequence[str]) -> Pair:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return UNREADABLE
    return (numbers[0], numbers[1]) if len(numbers) == 2 and all(map(math.isfinite, numbers)) else UNREADABLE


@dataclass(frozen=True, kw_only=True)
class Variant:
    about: str
    read: Callable[[str], Pair]
    is_rounded: bool  # whether means are rounded to 3 decimals, and what is made of them to 1


VARIANTS: Mapping[str, Variant] = {
    "official": Variant(about="two numbers alone on the first line", read=official, is_rounded=True),
    "lmms-eval": Variant(about="the first two numbers on the first line", read=lmms_eval, is_rounded=True),
    "vlmevalkit": Variant(about="read as the official one, nothing rounded", read=official, is_rounded=False),
}


class LlavaBench:
    name = "llava_bench_wild"
    source = "liuhaotian/llava-bench-in-the-wild on the hub"
    variants: Mapping[str, str] = {name: variant.about for name, variant in VARIANTS.items()}
    max_new_tokens = 1024

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """See the module. References and context may be missing; then only recorded reviews can be scored."""
        data = local_copy(data, "liuhaotian/llava-bench-in-the-wild", ["*.jsonl", "images/*"], self.source)
        found = preferred(data, ("questions.jsonl", "*.parquet"), "questions.jsonl and no table of LLaVA-Bench")
        if found[0].suffix == ".parquet":
            rows = [row for path in found for row in read_records(path)]
            return unique([_from_table(row) for row in rows], data)
        return unique(_from_files(found[0], image_root), data)

    def request(self, question: Question, prediction: str, prompt: str | None) -> JudgeRequest:
        """As the official script asks gpt-4-0314: temperature 0.2, up to 1,024 tokens."""
        facts = question.facts
        for name, file in (("context", "context.jsonl"), ("reference", "answers_gpt4.jsonl")):
            if facts[name] is None:
                raise DataError(f"question {question.id} has no {name}; a judge needs {file} beside questions.jsonl")
        fields = {"question": question.prompt, "answer": prediction}
        fields |= {name: facts[name] for name in ("context", "reference", "category")}
        system, user = (SYSTEM, filled(PROMPT, fields)[1]) if prompt is None else filled(prompt, fields)
        return JudgeRequest(user=user, system=system, temperature=0.2, max_tokens=1024)

    def is_readable(self, judgement: str) -> bool:
        return official(judgement) != UNREADABLE

    def reviews(self, path: Path, questions: Sequence[Question]) -> dict[tuple[str, str], tuple[str, ...]]:
        """One run from JSON lines `{question_id, content}`."""
        return {("", name): (row.text("content"),) for name, row in by_id(read_records(path), "question_id").items()}

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Keys: `relative` (the mean over runs), `conv.relative`, ...; of several runs also `run1.relative`, ..."""
        how, n, runs = VARIANTS[variant], len(items), judge_runs(items)
        pairs = np.array([[how.read(text) for text in item.judgements] for item in items], np.float64)
        category = np.array([item.question.facts["category"] for item in items], dtype=object)
        groups = {"": np.ones(n, bool)}
        groups |= {f"{name}.": category == name for name in CATEGORIES if (category == name).any()}
        by_run = [
            {
                f"{group}{name}": metric
                for group, where in groups.items()
                for name, metric in _metrics(pairs[:, run], where, how).items()
            }
            for run in range(runs)
        ]
        metrics: dict[str, Metric] = {name: average([one[name] for one in by_run]) for name in by_run[0]}
        if runs > 1:
            metrics |= {
                f"run{r}.{name}": metric for r, one in enumerate(by_run, start=1) for name, metric in one.items()
            }
        unread = int((pairs == UNREADABLE).all(axis=2).sum())
        return Scored(metrics=metrics, unparsed=unread, counts={"runs": runs, "replies": n * runs})


def _metrics(pairs: Float64[np.ndarray, "n 2"], where: Bool[np.ndarray, " n"], how: Variant) -> dict[str, Metric]:
    """Of one run and the questions that are `where`: percent, and ten times the mean scores."""
    reference, model = (ratio(pairs[:, which] * where, where) for which in (0, 1))

    def rounded(value: float, decimals: int) -> float:
        return round(value, decimals) if how.is_rounded else value

    def relative(weights: Weights) -> float:
        above, below = rounded(model(weights), 3), rounded(reference(weights), 3)
        return rounded(above / below * 100, 1) if below else float("nan")

    return {
        "relative": relative,
        "reference": lambda weights: rounded(rounded(reference(weights), 3) * 10, 1),
        "model": lambda weights: rounded(rounded(model(weights), 3) * 10, 1),
    }


# ---------------------------------------------------------------- files


def _from_files(path: Path, image_root: Path | None) -> list[Question]:
    folder, rows = path.parent, read_records(path)
    root = image_folder(folder, image_root, rows[0].text("image") if rows else "")
    references = _beside(folder / "answers_gpt4.jsonl", "question_id")
    contexts = _beside(folder / "context.jsonl", "image")
    return [
        _question(
            row,
            prompt=row.text("text"),
            image=ImageFile(root=root, path=row.text("image")),
            context=_found(contexts, row.text("image"), "caption", row),
            reference=_found(references, row.id("question_id"), "text", row),
            cluster=row.text("image"),
        )
        for row in rows
    ]


def _from_table(row: Record) -> Question:
    image = row.fields.get("image")
    if not isinstance(image, ImageRef):
        raise row.wrong("image", "a picture")
    return _question(
        row,
        prompt=row.text("question"),
        image=image,
        context=_lines(row, "caption"),
        reference=row.text(field_named(row, ("gpt_answer", "gpt4_ans"))),
        cluster=row.id(field_named(row, ("image_id", "image_name"))),
    )


def _question(
    row: Record, *, prompt: str, image: ImageRef, context: str | None, reference: str | None, cluster: str
) -> Question:
    facts = {"category": row.one_of("category", CATEGORIES), "context": context, "reference": reference}
    return Question(id=row.id("question_id"), prompt=prompt, images=(image,), facts=facts, cluster=cluster)


def _beside(path: Path, key: str) -> dict[str, Record] | None:
    """The rows of a file by what is in `key`; None if there is no such file."""
    return by_id(read_records(path), key) if path.is_file() else None


def _found(rows: dict[str, Record] | None, name: str, field: str, asker: Record) -> str | None:
    if rows is None:
        return None
    if name not in rows:
        raise DataError(f"{asker.where}: nothing for {name!r} in the file with each {field!r} beside it")
    return _lines(rows[name], field)


def _lines(row: Record, field: str) -> str:
    """A text, or several, one a line."""
    return "\n".join(row.texts(field)) if isinstance(row.fields.get(field), list) else row.text(field)
