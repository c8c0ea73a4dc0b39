"""`visgain eval`: generate -> judge -> score, each with a file in the benchmark's folder, resumable, runnable alone.

out/pope/run.json          what the answers depend on
out/pope/answers.jsonl     {benchmark, split, id, prediction, meta}
out/pope/judgements.jsonl  where a judge is needed
out/pope/metrics.json      every metric with its interval, variant, counts, hash of the data
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import visgain
from visgain.config import EvalConfig
from visgain.data.images import ImageFile
from visgain.errors import ConfigError, DataError
from visgain.evaluation.answers import Answer, joined, read_answers
from visgain.evaluation.benchmark import BENCHMARKS, Benchmark, Item, JudgedBenchmark, Question
from visgain.evaluation.bootstrap import Estimate, estimates
from visgain.evaluation.decoders import parse_decoder
from visgain.evaluation.export import EXPORTS, export_answers
from visgain.evaluation.foreign import read_foreign
from visgain.evaluation.generate import Ask, Decoder, answers
from visgain.evaluation.judge import JudgeOptions, judge_answers
from visgain.evaluation.judgements import (
    Judgement,
    judged,
    read_judgements,
    require_readable,
    short_hash,
    summary,
    write_judgements,
)
from visgain.registry import suggest
from visgain.storage import atomic_path, claim_run, storage_errors, write_json
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name
from visgain.vlm.profiles import find_profile
from visgain.vlm.template import make_encoder

ANSWERS, JUDGEMENTS, METRICS = "answers.jsonl", "judgements.jsonl", "metrics.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's metrics, as metrics.json holds them."""

    benchmark: str
    variant: str
    questions: int
    unparsed: int  # replies that the protocol could not read
    data_hash: str  # of the questions: keys, prompts, images' names and facts
    metrics: Mapping[str, Estimate]
    counts: Mapping[str, float]
    notes: Mapping[str, str]
    limited: bool = False  # asked the first questions only
    judge: Mapping[str, Any] | None = None  # who judged, with which words, how often


class Models:
    """The model that is asked, loaded when the first benchmark needs it."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config

    @cached_property
    def vlm(self) -> VLM:
        config = self._config
        if config.model is None:
            raise ConfigError("no answers yet: give the model with --model, or answers to score with --answers")
        return load_vlm(
            config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
        )

    @cached_property
    def encoder(self) -> Encoder:
        return make_encoder(self.vlm, self._config.template, self._config.max_length)


def run_eval(config: EvalConfig) -> list[Result]:
    """Every benchmark that is asked for, through the stages that are asked for. Raises VisgainError for any mistake."""
    find_profile(config.template)
    benchmarks = [BENCHMARKS.get(name)() for name in config.names]  # all names first: a typo must not cost a night
    for name in config.exports:
        EXPORTS.get(name)
    asked = {benchmark.name: read_questions(config, benchmark) for benchmark in benchmarks}
    variants = {benchmark.name: _variant(config, benchmark) for benchmark in benchmarks}
    if "generate" in config.stages and config.model is not None:
        for name, questions in asked.items():
            require_pictures(name, questions)
    models, results = Models(config), []
    for benchmark in benchmarks:
        questions, folder = asked[benchmark.name], config.out / benchmark.name
        if "generate" in config.stages:
            generate(config, benchmark, questions, models)
        if config.exports:
            _export(config, benchmark, questions)
        if "judge" in config.stages and config.judge is not None and isinstance(benchmark, JudgedBenchmark):
            judge(config, benchmark, questions)
        if "score" in config.stages:
            results.append(score(config, benchmark, questions, variants[benchmark.name]))
            write_json(folder / METRICS, asdict(results[-1]))
    return results


def read_questions(config: EvalConfig, benchmark: Benchmark) -> list[Question]:
    """The benchmark's questions in the user's copy, no two of equal keys. Raises DataError."""
    questions = benchmark.questions(_data(config, benchmark), config.image_root)
    if not questions:
        raise DataError(f"{benchmark.name}: the data holds no questions")
    if len({question.key for question in questions}) < len(questions):
        raise DataError(f"{benchmark.name}: two questions of the data have the same split and id")
    return questions[: config.limit]


def require_pictures(benchmark: str, questions: Sequence[Question]) -> None:
    """Raises DataError if a picture's file is missing, ImageError if it may not be read: not after half a night."""
    named = {
        (image.root, image.path): image for one in questions for image in one.images if isinstance(image, ImageFile)
    }
    missing = [image for image in named.values() if not image.is_there()]
    if missing:
        raise DataError(
            f"{len(missing)} of {benchmark}'s {len(named)} picture files are missing, the first is "
            f"{missing[0].root / missing[0].path}; --image-root names the folder that they are in"
        )


def _data(config: EvalConfig, benchmark: Benchmark) -> Path:
    """--data itself, or what is named like the benchmark in it."""
    if config.data is None:
        raise ConfigError(f"--data is missing; {benchmark.name} is to be had from {benchmark.source}")
    own = [path for path in sorted(config.data.glob(f"{benchmark.name}*")) if path.stem == benchmark.name]
    if own:
        return own[0]
    if len(config.names) > 1:
        raise DataError(
            f"{config.data} holds no {benchmark.name}/ (or a file of that name); with several benchmarks, --data is a "
            f"folder with one for each. {benchmark.name} is to be had from {benchmark.source}"
        )
    return config.data


def _variant(config: EvalConfig, benchmark: Benchmark) -> str:
    known = list(benchmark.variants)
    wanted = config.variants.get(benchmark.name, config.variants.get("", known[0]))
    if wanted not in known:
        raise ConfigError(f"{benchmark.name} has no variant {wanted!r}; {suggest(wanted, known)}")
    return wanted


# ---------------------------------------------------------------- generate


def generate(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question], models: Models) -> None:
    """Complete answers.jsonl, from --answers or by asking the model what is not answered yet."""
    folder = config.out / benchmark.name
    data_hash = questions_hash(questions)
    if config.answers is not None:
        given = joined(
            questions, read_foreign(config.answers, benchmark.name, questions), f"answers in {config.answers}"
        )
        source = {"answers": short_hash("".join(answer.line() for answer in given)), "questions": data_hash}
        claim_run(folder, source, {"answers": str(config.answers.resolve())})
        _write(folder / ANSWERS, given)
        return
    if config.model is None and (folder / ANSWERS).is_file():
        return
    decoder = parse_decoder(config.decoding, config.seed)
    length = config.max_new_tokens or benchmark.max_new_tokens
    identity: dict[str, Any] = {
        "questions": data_hash,
        "model": None if config.model is None else model_name(config.model),
        "model_fingerprint": None if config.model is None else model_fingerprint(config.model),
        "template": models.encoder.name,
        "max_length": config.max_length,
        "decoding": decoder.spec,
        "max_new_tokens": length,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "seed": config.seed,
    }
    claim_run(folder, identity, {"visgain": visgain.__version__})
    _ask(config, benchmark, questions, models, decoder, length)


def _ask(
    config: EvalConfig,
    benchmark: Benchmark,
    questions: Sequence[Question],
    models: Models,
    decoder: Decoder,
    max_new_tokens: int,
) -> None:
    path = config.out / benchmark.name / ANSWERS
    place = {question.key: i for i, question in enumerate(questions)}
    before = read_answers(path, benchmark.name, cut_last=True) if path.exists() else []
    known = {place[answer.key]: answer for answer in before if answer.key in place}
    if len(known) < len(questions):
        _write(path, known.values())  # without a line that an interruption cut
        batches = answers(
            models.vlm,
            models.encoder,
            [Ask.plain(question.prompt, question.images) for question in questions],
            max_new_tokens=max_new_tokens,
            batch_size=config.batch_size,
            decoder=decoder,
            known=known,
            description=f"asking {benchmark.name}",
        )
        with storage_errors(path), path.open("a", encoding="utf-8", newline="\n") as file:
            for batch in batches:
                new = {i: _answer(benchmark, questions[i], text) for i, text in batch if i not in known}
                file.write("".join(answer.line() for answer in new.values()))
                file.flush()
                known |= new
    _write(path, [known[i] for i in range(len(questions))])  # in their order, whatever that of asking was


def _answer(benchmark: Benchmark, question: Question, text: str) -> Answer:
    return Answer(benchmark=benchmark.name, split=question.split, id=question.id, prediction=text)


def _write(path: Path, lines: Iterable[Answer]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line.line() for line in lines)


# ---------------------------------------------------------------- judge and score


def judge(config: EvalConfig, benchmark: JudgedBenchmark, questions: Sequence[Question]) -> None:
    """Write judgements.jsonl, from --judge. Raises JudgeError if the judge fails; what it said is kept."""
    options = JudgeOptions(
        judge=str(config.judge),
        runs=config.judge_runs,
        prompt=config.judge_prompt,
        concurrency=config.judge_concurrency,
        per_minute=config.judge_per_minute,
        price=config.judge_price,
    )
    predictions = _predictions(config, benchmark, questions)
    write_judgements(
        config.out / benchmark.name / JUDGEMENTS, judge_answers(benchmark, questions, predictions, options)
    )


def score(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question], variant: str) -> Result:
    """Metrics of the answers on disk. Raises DataError if they, or a judge's words, do not fit the questions.

    Raises JudgeError if too many of a judge's replies cannot be read, unless it is forced.
    """
    predictions = _predictions(config, benchmark, questions)
    judgements = _judgements(config, benchmark)
    said = judged(questions, predictions, judgements) if judgements else [()] * len(questions)
    items = [
        Item(question=question, prediction=prediction, judgements=runs)
        for question, prediction, runs in zip(questions, predictions, said, strict=True)
    ]
    scored = benchmark.score(items, variant)
    if judgements and not config.force:
        require_readable(scored.unparsed, len(judgements))
    return Result(
        benchmark=benchmark.name,
        variant=variant,
        questions=len(questions),
        unparsed=scored.unparsed,
        data_hash=questions_hash(questions),
        metrics=estimates(scored.metrics, [question.cluster or question.id for question in questions]),
        counts=scored.counts,
        notes=scored.notes,
        limited=config.limit is not None,
        judge=summary(judgements) if judgements else None,
    )


def _export(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question]) -> None:
    answered = _answered(config, benchmark, questions)
    model = config.model or "unknown"
    export_answers(
        config.out / benchmark.name, config.exports, list(zip(questions, answered, strict=True)), Path(model).name
    )


def _answered(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question]) -> list[Answer]:
    path = config.out / benchmark.name / ANSWERS
    if not path.is_file():
        raise DataError(f"{path} does not exist: run the stage `generate` first, or give --answers")
    return joined(questions, read_answers(path, benchmark.name), f"answers in {path}")


def _predictions(config: EvalConfig, benchmark: Benchmark, questions: Sequence[Question]) -> list[str]:
    return [answer.prediction for answer in _answered(config, benchmark, questions)]


def _judgements(config: EvalConfig, benchmark: Benchmark) -> list[Judgement]:
    if not isinstance(benchmark, JudgedBenchmark):
        return []
    path = config.out / benchmark.name / JUDGEMENTS
    if not path.is_file():
        raise ConfigError(f"{benchmark.name} is graded by a judge: give --judge MODEL@URL, or recorded reviews")
    return read_judgements(path, benchmark.name)


def questions_hash(questions: Sequence[Question]) -> str:
    """Hash of everything that questions hold, so that scores of different releases cannot be taken for comparable."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        images = [image.key for image in question.images]
        fields = [question.split, question.id, question.prompt, images, question.facts]
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
