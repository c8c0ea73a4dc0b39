"""Does a benchmark need its pictures? Its own questions and right answers, scored like training data.

The questions of each benchmark become rows of a dataset in LLaVA's format, the benchmark and the split their source;
`visgain score` measures them, and the table of gain by source shows which benchmark leans on text. Questions without a
right answer in words are counted and left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visgain.config import AnalyzeConfig, EvalConfig, ScoreConfig
from visgain.data.placed import place_images
from visgain.errors import DataError
from visgain.evaluation.benchmark import BENCHMARKS, Question
from visgain.evaluation.run import read_questions
from visgain.scoring.run import run_score
from visgain.storage import write_text
from visgain.types import IMAGE_MARK


def score_benchmarks(config: AnalyzeConfig) -> Path:
    """Score what `config.benchmarks` ask and hold for right; returns the folder of the scores. Resumes."""
    asked = EvalConfig(
        benchmarks=config.benchmarks, data=Path(config.data or ""), out=config.out, image_root=config.image_root
    )
    questions = {name: read_questions(asked, BENCHMARKS.get(name)()) for name in asked.names}
    data, root = write_dataset(questions, config.out / "questions")
    run_score(
        ScoreConfig(
            model=str(config.model),
            data=data,
            image_root=root,
            out=config.out / "scores",
            counterfactual=config.counterfactual,
            template=config.template,
            max_length=config.max_length,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    )
    return config.out / "scores"


def write_dataset(questions: Mapping[str, Sequence[Question]], folder: Path) -> tuple[Path, Path]:
    """Questions by benchmark as data.jsonl in `folder`; returns it with the folder that its pictures are relative to.

    Pictures that are files of one folder stay where they are; all others are written as PNG. Raises DataError if no
    question has a right answer.
    """
    answered = [(name, one, said) for name, some in questions.items() for one in some if (said := right_answer(one))]
    n_asked = sum(map(len, questions.values()))
    if not answered:
        raise DataError(f"none of the {n_asked} questions of {', '.join(questions)} has a right answer in words")
    names, root = place_images([one.images for _, one, _ in answered], folder)
    rows = [_row(name, question, said, images) for (name, question, said), images in zip(answered, names, strict=True)]
    write_text(folder / "data.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder / "data.jsonl", root


def right_answer(question: Question) -> str | None:
    """What a benchmark holds for right, in words: a label, the letter of an option, the first of several answers."""
    facts = question.facts
    if isinstance(label := facts.get("label"), str):
        return label.capitalize()
    for name in ("answer", "reference"):
        if isinstance(said := facts.get(name), str) and said.strip():
            # MM-Vet joins alternatives and parts in its references.
            return said.split("<OR>")[0].replace("<AND>", ", ").strip()
    for name in ("answers", "captions"):
        several = facts.get(name)
        if several and isinstance(several, list | tuple) and isinstance(several[0], str):
            return several[0]
    return None


def _row(name: str, question: Question, said: str, images: list[str]) -> dict[str, Any]:
    marks = f"{IMAGE_MARK}\n" * len(images)
    return {
        "id": "/".join(part for part in (name, *question.key) if part),
        "source": "/".join(part for part in (name, question.split) if part),
        **({"image": images} if images else {}),
        "conversations": [
            {"from": "human", "value": marks + question.prompt.replace(IMAGE_MARK, "")},
            {"from": "gpt", "value": said},
        ],
    }
