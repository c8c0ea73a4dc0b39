"""MM-Vet: questions that need several abilities at once, graded by a judge from 0 to 1. Yu et al. 2023.

Data: `mm-vet.json` `{"v1_0": {imagename, question, answer, capability, ...}}` and `images/`; LLaVA's JSON lines without
references and capabilities (enough to ask a model and to score recorded grades); rows `{id, image, question, answer,
capability}`; the hub's table. CC BY-NC 4.0.

The judge, who sees no picture, completes a table: question | reference | answer | grade. In the reference `<AND>` joins
what must all be there, `<OR>` what may each stand for the other. An answer with a line break or a bar in it breaks its
row, there as here. A grade that cannot be read is asked for again; if that fails five times, it is 0.

Scores are percent. Of several runs (the paper's were five) the total is the mean, and `std` that of the population.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visgain.data.images import ImageFile
from visgain.errors import DataError
from visgain.evaluation.benchmark import Item, JudgeRequest, Metric, Question, Scored, average, judge_runs, ratio
from visgain.evaluation.hub import image_folder, local_copy, preferred
from visgain.evaluation.judge_prompt import filled
from visgain.evaluation.records import Record, field_named, read_json, read_records, unique
from visgain.types import ImageRef

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Recognition, text in the image, knowledge, language generation, where things are, mathematics."""

RETRY = "\nPredict the correctness of the answer (digit): "

PROMPT = """\
Grade the prediction of an AI model against the ground truth. Where the ground truth has <AND>, the prediction is \
all right only if it has every one of the elements that <AND> joins; where it has <OR>, any one of them is enough. A \
grade is a number with one decimal, from 0.0 (nothing is right) over 0.1, 0.2 and so on to 1.0 (all is right). Fill in \
the last cell of the last row with the grade, and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What are the roots of the parabola? | 2 <AND> -7 | They are 3 and 8. | 0.0
What are the roots of the parabola? | 2 <AND> -7 | One root is x = 2. | 0.5
What are the roots of the parabola? | 2 <AND> -7 | -7 | 0.5
What are the roots of the parabola? | 2 <AND> -7 | x = 2 or x = 7 | 0.5
What are the roots of the parabola? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
Why is this sign funny? | It says that the library for people who are afraid of heights is on the top floor. Those who \
are meant to visit it are the very ones who will not dare to go up there. | It is about a library and people who fear \
heights. | 0.4
Why is this sign funny? | It says that the library for people who are afraid of heights is on the top floor. Those who \
are meant to visit it are the very ones who will not dare to go up there. | A library for people with a fear of \
heights was put on the highest floor. Its own visitors would be too scared to reach it, and the sign tells that as if \
nothing were wrong. | 1.0

{question} | {reference} | {answer} | """


def official(reply: str) -> float | None:
    """The number from 0 to 1 before the first space; None if there is none."""
    return _grade(reply.split(" ")[0].strip())


def vlmevalkit(reply: str) -> float | None:
    """The reply as a number from 0 to 1; None if it is none."""
    return _grade(reply)


def _grade(text: str) -> float | None:
    try:
        grade = float(text)
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None  # nan is none either


READERS: Mapping[str, Callable[[str], float | None]] = {"official": official, "vlmevalkit": vlmevalkit}


class MMVet:
    name = "mmvet"
    source = "https://github.com/yuweihao/MM-Vet (mm-vet.zip), or lmms-lab/MMVet on the hub"
    variants: Mapping[str, str] = {
        "official": "the number before the first space, from 0 to 1; else 0",
        "vlmevalkit": "the whole reply is a number from 0 to 1; else 0",
    }
    max_new_tokens = 1024

    def questions(self, data: Path, image_root: Path | None) -> list[Question]:
        """See the module. Keys are the official `v1_0`, `v1_1`, ... whatever the file."""
        data = local_copy(data, "lmms-lab/MMVet", ["data/*.parquet"], self.source)
        usual = ("mm-vet.json", "llava-mm-vet.jsonl", "questions.jsonl", "*.parquet")
        paths = preferred(data, usual, "mm-vet.json and no other file of MM-Vet that is known")
        rows = [row for path in paths[: None if paths[0].suffix == ".parquet" else 1] for row in _rows(path)]
        names = [str(row.fields[key]) for row in rows[:1] for key in ("imagename", "image") if key in row.fields]
        root = image_folder(paths[0].parent, image_root, names[0] if names else "")
        return unique([_question(row, root) for row in rows], data)

    def request(self, question: Question, prediction: str, prompt: str | None) -> JudgeRequest:
        """As the official script asks: temperature 0, up to 3 tokens; an unreadable grade is asked for again."""
        reference = question.facts["reference"]
        if reference is None:
            raise DataError(f"question {question.id} has no reference answer; a judge needs mm-vet.json")
        fields = {
            "question": question.prompt,
            "reference": reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> "),
            "answer": prediction,
        }
        system, user = filled(PROMPT if prompt is None else prompt, fields)
        return JudgeRequest(user=user, system=system, temperature=0.0, max_tokens=3, retry=user + RETRY)

    def is_readable(self, judgement: str) -> bool:
        return official(judgement) is not None

    def reviews(self, path: Path, questions: Sequence[Question]) -> dict[tuple[str, str], tuple[str, ...]]:
        """All runs from the official grade file `{"v1_0": {model: [...], content: [...], score: [...]}}`."""
        return {("", row.id("id")): row.texts("content") for row in _entries(path)}

    def score(self, items: Sequence[Item], variant: str) -> Scored:
        """Keys: `total` and each capability, means over the runs; of several runs also `std` and `run1.total`, ..."""
        read, runs = READERS[variant], judge_runs(items)
        grades = [[read(text) for text in item.judgements] for item in items]
        scores = np.array([[grade or 0.0 for grade in row] for row in grades], np.float64)
        listed = [item.question.facts["capability"] for item in items]
        groups = {"total": np.ones(len(items))}
        groups |= {name: np.array([name in one for one in listed], np.float64) for name in _order(listed)}
        by_run = [
            {name: ratio(scores[:, run] * has, has, scale=100) for name, has in groups.items()} for run in range(runs)
        ]
        metrics: dict[str, Metric] = {name: average([one[name] for one in by_run]) for name in groups}
        if runs > 1:
            totals = [one["total"] for one in by_run]
            metrics["std"] = lambda weights: float(np.std([total(weights) for total in totals]))
            metrics |= {
                f"run{r}.{name}": metric for r, one in enumerate(by_run, start=1) for name, metric in one.items()
            }
        return Scored(
            metrics=metrics,
            unparsed=sum(grade is None for row in grades for grade in row),
            counts={"runs": runs, "replies": len(items) * runs}
            | {f"{name}.questions": float(has.sum()) for name, has in groups.items() if name != "total"},
        )


# ---------------------------------------------------------------- files


def _entries(path: Path) -> list[Record]:
    """The objects of `{"v1_0": {...}, ...}` as records with an `id`."""
    whole = read_json(path)
    if not isinstance(whole, dict) or not all(isinstance(fields, dict) for fields in whole.values()):
        raise DataError(f'{path} is no JSON object like {{"v1_0": {{...}}, ...}}')
    return [Record(where=f"{name} in {path}", fields={**fields, "id": name}) for name, fields in whole.items()]


def _rows(path: Path) -> list[Record]:
    """Rows of whatever format; the official one is an object of objects."""
    if path.suffix.lower() == ".json" and isinstance(read_json(path), dict):
        return _entries(path)
    return read_records(path)


def _question(row: Record, root: Path) -> Question:
    picture = row.fields.get("image")
    image: ImageRef
    if isinstance(picture, ImageRef):
        image, cluster = picture, row.text("image_source") if row.has("image_source") else ""
    else:
        cluster = row.text(field_named(row, ("imagename", "image")))
        image = ImageFile(root=root, path=cluster)
    return Question(
        id=_official_id(row.id(field_named(row, ("id", "question_id")))),
        prompt=row.text(field_named(row, ("question", "text"))),
        images=(image,),
        facts={"reference": row.text("answer") if row.has("answer") else None, "capability": _capabilities(row)},
        cluster=cluster,
    )


def _official_id(name: str) -> str:
    """LLaVA numbers the questions; the official names have `v1_` in front."""
    return f"v1_{name}" if name.isdecimal() else name


def _capabilities(row: Record) -> list[str]:
    """Sorted names, of which the official file has a list and the hub's table a string with commas."""
    value: Any = row.fields.get("capability")
    if value is None:
        return []
    names = value.split(",") if isinstance(value, str) else row.texts("capability")
    return sorted({name.strip() for name in names} - {""})


def _order(listed: Sequence[Sequence[str]]) -> list[str]:
    """The capabilities that there are, in the official order."""
    found = {name for names in listed for name in names}
    return [*(name for name in CAPABILITIES if name in found), *sorted(found - set(CAPABILITIES))]
