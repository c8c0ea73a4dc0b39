"""`visgain score`: every row of a dataset, seen and blind, into atomic parts.

    plan (which rows together)  ->  claims (which part is ours)  ->  feed (rows to tensors, in workers)
         ->  engine (tensors to NLLs)  ->  records (NLLs to a part on disk)

A part depends on the plan and on nothing else, so it does not matter which process makes it, or after how many
interruptions. Packs do not reach over the end of a part.
"""

from __future__ import annotations

import datetime as dt
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import BaseFileLock
from tqdm import tqdm

import visgain
from visgain.config import ScoreConfig
from visgain.counterfactuals import Condition, Counterfactual, parse_condition
from visgain.data import Dataset, open_dataset, reading
from visgain.errors import ConfigError
from visgain.scoring.claims import Rank, alone, claim
from visgain.scoring.draft import FILE as DRAFT_FILE
from visgain.scoring.draft import compare_draft
from visgain.scoring.engine import WAYS, Choice, Engine, Extent, PerCondition, choose_way, scored, with_longest
from visgain.scoring.feed import Fed, Feed, deaths_told, feed, skipped
from visgain.scoring.plan import Plan, make_plan, probe_units, read_plan, rotated, write_plan
from visgain.scoring.unit import Unit
from visgain.storage import (
    PER_IMAGE_SCHEMA,
    SCORE_SCHEMA,
    claim_run,
    file_hash,
    finished_parts,
    part_path,
    read_json,
    score_table,
    write_part,
)
from visgain.summary import ScoreSummary, summarise_scores
from visgain.types import Skipped, TokenScores
from visgain.vlm.float8 import make_draft
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name, pick_device
from visgain.vlm.profiles import find_profile
from visgain.vlm.projector import with_projector
from visgain.vlm.template import make_encoder
from visgain.vlm.threads import computing_with, n_threads

PACK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens in one forward pass by default. A CPU is fastest while a pack's states fit into its caches."""

DRAFT = "float8"
"""The dtype of a draft: asked for, never chosen; the rest of the model is in bfloat16."""

PROBE_UNITS, PROBE_ROWS = 4, 3
"""How much the self-check tries the ways of scoring on."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Everything that turns the rows of a unit into their records."""

    engine: Engine
    source: Feed
    config: ScoreConfig
    workers: int

    def score_part(self, fed: Iterable[Fed], done: Callable[[int], Any]) -> list[TokenScores | Skipped]:
        """The records of all rows of `fed`, which is one part; `done` is told how many rows were finished."""
        records: list[TokenScores | Skipped] = []
        waiting: dict[int, Sequence[TokenScores]] = {}

        def units() -> Iterator[Unit]:
            for item in fed:
                records.extend(item.done)
                done(len(item.done))
                for unit, measured in zip(item.units, item.records, strict=True):
                    waiting[id(unit)] = measured
                    yield unit

        overflown: list[tuple[Unit, TokenScores, int]] = []
        for unit, nlls in scored(self.engine, units()):
            for number, (record, found) in enumerate(zip(waiting.pop(id(unit)), nlls, strict=True)):
                measured = self._measured(record, found)
                if is_finite(measured):
                    records.append(measured)
                else:
                    overflown.append((unit, record, number))
            done(len(nlls))
        return records + self._rescued(overflown)

    def _rescued(self, overflown: Sequence[tuple[Unit, TokenScores, int]]) -> list[TokenScores | Skipped]:
        """Rows whose numbers left float16's range, again in bfloat16 if the dtype is ours to choose."""
        reason = "the model gave a non-finite log-probability; try another --dtype"
        if not overflown or self.config.dtype != "auto" or self.engine.vlm.model.dtype != torch.float16:
            return [skipped(record, reason) for _, record, _ in overflown]
        records: list[TokenScores | Skipped] = []
        for unit, record, number in overflown:
            [found] = self._wider.score([unit.some(slice(number, number + 1))])
            measured = self._measured(record, found)
            records.append(measured if is_finite(measured) else skipped(record, reason))
        return records

    def _measured(self, record: TokenScores, nlls: PerCondition) -> TokenScores:
        seen, blind, *alone = nlls
        if self.source.per_image and not alone:
            alone = [blind]  # the only picture
        return replace(record, nll_seen=seen, nll_blind=blind, nll_blind_image=tuple(alone))

    @cached_property
    def _wider(self) -> Engine:
        """The same with numbers of a wider range, loaded when the first row needs it."""
        return replace(self.engine, vlm=load_model(self.config, "bfloat16"))


def is_finite(record: TokenScores) -> bool:
    return all(np.isfinite(nll).all() for nll in (record.nll_seen, record.nll_blind, *record.nll_blind_image))


# ---------------------------------------------------------------- the run


def run_score(config: ScoreConfig) -> ScoreSummary:
    """Score the whole dataset into `config.out`, resuming what is there. Raises VisgainError for any user's mistake.

    Any number of processes may run this at the same time on the same folder: they share the work.
    """
    if config.backend == "ray":
        from visgain.scoring.cluster import score_on_ray  # knows us

        score_on_ray(config)
    else:
        score_rest(config, Rank.here())
    with alone(config.out, "run"):
        if config.dtype == DRAFT and not (config.out / DRAFT_FILE).exists():
            _compare_draft(config)
        return summarise_scores(config.out)


def _compare_draft(config: ScoreConfig) -> None:
    """A finished draft against the dtype that the device would have had by default."""
    dataset = scored_dataset(config)
    vlm = load_model(config, _best_dtype(config))
    source = make_feed(replace(config, per_image=False), dataset, parse_condition(config.counterfactual), vlm)
    plan = read_plan(config.out, read_json(config.out / "run.json", "scores")["n_parts"])
    with computing_with(n_threads(vlm)):
        compare_draft(config.out, plan, source, vlm)


def score_rest(config: ScoreConfig, rank: Rank) -> None:
    """Work as one of any number of processes until every part is on disk."""
    scorer, plan = open_run(config)
    if config.per_image and rank.number == 0:
        tqdm.write(f"visgain: --per-image computes {plan.per_image_cost:.1f} times as much as without", file=sys.stderr)
    threads = n_threads(scorer.engine.vlm)
    with computing_with(threads), Progress(config.out, plan, shown=rank.number == 0) as progress:
        while missing := sorted(set(range(plan.n_parts)) - finished_parts(config.out, plan.n_parts)):
            if not score_parts(scorer, plan, rotated(missing, rank.number, rank.world), progress):
                time.sleep(1)  # other processes have what is left; if one dies, its part is free
                progress.look()


def score_parts(scorer: Scorer, plan: Plan, parts: Iterable[int], progress: Progress) -> int:
    """Score those of `parts` that no other process holds, one after the other; returns how many those were.

    While a part is computed, the next one is claimed and prepared, and the one before written.
    """
    out, schema = scorer.config.out, PER_IMAGE_SCHEMA if scorer.source.per_image else SCORE_SCHEMA
    locks: dict[int, BaseFileLock] = {}

    def items() -> Iterator[tuple[int, Sequence[int]]]:
        for part in parts:
            lock = claim(out, part)
            if lock is None:
                continue
            if part_path(out, part, plan.n_parts).exists():
                lock.release()
                continue
            locks[part] = lock
            yield from ((part, unit) for unit in plan.units(part))

    def finish(part: int, records: list[TokenScores | Skipped]) -> None:
        write_part(out, part, plan.n_parts, score_table(records, schema))
        locks.pop(part).release()

    n_written = 0
    writing: Future[None] | None = None
    try:
        with deaths_told(), ThreadPoolExecutor(1) as writer:
            fed = feed(scorer.source, items(), scorer.workers)
            for part, group in itertools.groupby(fed, key=lambda item: item.part):
                records = scorer.score_part(group, progress.update)
                if writing is not None:
                    writing.result()
                writing = writer.submit(finish, part, records)
                n_written += 1
            if writing is not None:
                writing.result()
    finally:
        for lock in locks.values():
            lock.release()
    progress.look()
    return n_written


class Progress:
    """A bar over all rows of the run, those of other processes included whenever one looks."""

    def __init__(self, out: Path, plan: Plan, *, shown: bool) -> None:
        self._out, self._plan = out, plan
        self._bar = tqdm(
            total=len(plan.row),
            initial=self._on_disk(),
            desc="scoring",
            unit="row",
            mininterval=0.5,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: int) -> None:
        self._bar.update(n)

    def look(self) -> None:
        self._bar.n = self._on_disk()
        self._bar.refresh()

    def _on_disk(self) -> int:
        finished = finished_parts(self._out, self._plan.n_parts)
        return len(self._plan.row) if len(finished) == self._plan.n_parts else sum(map(self._plan.n_rows, finished))


# ---------------------------------------------------------------- opening a run


def open_run(config: ScoreConfig) -> tuple[Scorer, Plan]:
    """Check the cheap things first: options, dataset, then the model; then plan, or read the plan of a run begun."""
    counterfactual = blind_condition(config)
    find_profile(config.template)  # a mistyped name is told before the model is loaded
    dataset = scored_dataset(config)
    vlm = load_model(config, run_dtype(config))
    source = make_feed(config, dataset, counterfactual, vlm)
    with alone(config.out, "run"):
        known = (config.out / "run.json").exists()
        if known:
            claim_run(config.out, _identity(config, source, vlm), {})
            record = read_json(config.out / "run.json", "scores")
            plan = read_plan(config.out, record["n_parts"])
        else:
            n_rows = min(len(dataset), config.limit or len(dataset))
            plan = make_plan(dataset, n_rows, config.part_rows)
        wanted = [record["way"]] if known else list(WAYS) if config.way == "auto" else [config.way]
        vlm, choice = checked_way(config, source, vlm, plan, wanted)
        if not known:
            write_plan(config.out, plan)
            claim_run(config.out, _identity(config, source, vlm), _record_of(config, source, vlm, plan, choice.way))
    if config.dtype == DRAFT:
        make_draft(vlm.model)  # after the check, which needs better numbers
    pack_tokens = config.batch_tokens or PACK_TOKENS.get(vlm.device.type, PACK_TOKENS["cpu"])
    engine = Engine(vlm=vlm, way=choice.way, pack_tokens=pack_tokens, tried=choice.tried)
    return Scorer(engine=engine, source=source, config=config, workers=n_workers(config, vlm)), plan


def blind_condition(config: ScoreConfig) -> Condition:
    """What `config.counterfactual` says. Raises UnknownName, or ConfigError if it is wrong or not for --per-image."""
    condition = parse_condition(config.counterfactual)
    if config.per_image and not isinstance(condition, Counterfactual):
        raise ConfigError(
            f"--per-image does not go with --counterfactual {condition.name}, which puts no picture in an image's "
            "place; use blur, mean or another that does"
        )
    return condition


def scored_dataset(config: ScoreConfig) -> Dataset:
    return open_dataset(
        config.data,
        config.image_root,
        max_pixels=config.max_pixels,
        follow_links=config.follow_links,
        columns=config.columns,
        format=config.format,
    )


def make_feed(config: ScoreConfig, dataset: Dataset, counterfactual: Condition, vlm: VLM) -> Feed:
    """Raises ModelError if the model's processor cannot be blind in this way."""
    source = Feed(
        dataset=dataset,
        encoder=make_encoder(vlm, config.template, config.max_length),
        counterfactual=counterfactual,
        seed=config.seed,
        end_of_turn=config.end_of_turn,
        per_image=config.per_image,
    )
    source.require_blind()
    return source


def checked_way(config: ScoreConfig, source: Feed, vlm: VLM, plan: Plan, ways: Sequence[str]) -> tuple[VLM, Choice]:
    """The model in a dtype that holds its numbers, and the first of `ways` that computes as it does alone."""
    fed = (source[0, rows] for rows in probe_units(plan, PROBE_ROWS))
    probes = list(itertools.islice((unit for item in fed for unit in item.units), PROBE_UNITS))
    if not probes:  # nothing to score, or nothing that can be
        return vlm, Choice(way="single", rejected={}, tried=Extent(), finite=True)
    longest = min(source.encoder.max_length, _most_positions(vlm), len(probes[0].rows[0].input_ids) + plan.longest_text)
    probes = [with_longest(probes[0], longest), *probes[1:]]
    choice = choose_way(vlm, probes, ways)
    if not choice.finite and config.dtype == "auto" and vlm.model.dtype == torch.float16:
        vlm = load_model(config, "bfloat16")
        choice = choose_way(vlm, probes, ways)
    return vlm, choice


def _most_positions(vlm: VLM) -> int:
    most = getattr(vlm.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 1 << 30


def load_model(config: ScoreConfig, dtype: str) -> VLM:
    device = config.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{Rank.here().local % torch.cuda.device_count()}"  # a GPU for each process of a machine
    dtype = "bfloat16" if dtype == DRAFT else dtype
    return with_projector(
        config.projector,
        lambda: load_vlm(config.model, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code),
    )


def run_dtype(config: ScoreConfig) -> str:
    """The user's dtype, else that of the run begun in the folder, else what the device is good at."""
    if config.dtype != "auto":
        return config.dtype
    if (config.out / "run.json").exists():
        begun = read_json(config.out / "run.json", "scores").get("identity", {}).get("dtype")
        if begun in ("float32", "float16", "bfloat16"):
            return str(begun)
    return _best_dtype(config)


def _best_dtype(config: ScoreConfig) -> str:
    return "float16" if pick_device(config.device).type == "cuda" else "float32"


def n_workers(config: ScoreConfig, vlm: VLM) -> int:
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The model's threads would wait for one whose core a worker has.
    busy = 1 if vlm.device.type == "cuda" else n_threads(vlm)
    return max(0, min(4 if vlm.device.type == "cuda" else 1, cores - busy))


def _identity(config: ScoreConfig, source: Feed, vlm: VLM) -> dict[str, Any]:
    """Everything that a row's scores depend on."""
    return {
        "model": model_name(config.model),
        "model_fingerprint": model_fingerprint(config.model),
        "data_fingerprint": source.dataset.fingerprint,
        "limit": config.limit,
        "counterfactual": source.counterfactual.spec,
        "template": source.encoder.name,
        "max_length": source.encoder.max_length,
        "end_of_turn": config.end_of_turn,
        "seed": config.seed,
        "dtype": DRAFT if config.dtype == DRAFT else str(vlm.model.dtype).removeprefix("torch."),
        "max_pixels": config.max_pixels,
        "follow_links": config.follow_links,
        **({"per_image": True} if config.per_image else {}),  # older runs say nothing of it
        **({"projector": file_hash(config.projector)} if config.projector else {}),
        **reading(config.columns, config.format),
    }


def _record_of(config: ScoreConfig, source: Feed, vlm: VLM, plan: Plan, way: str) -> dict[str, Any]:
    dataset: Dataset = source.dataset
    return {
        "n_rows": len(plan.row),
        "n_parts": plan.n_parts,
        "data": str(dataset.path.resolve() if dataset.path.exists() else dataset.path),
        "image_root": str(dataset.image_root.resolve()),
        "max_pixels": config.max_pixels,
        "follow_links": config.follow_links,
        **reading(config.columns, config.format),
        "device": str(vlm.device),
        "way": way,
        "versions": {
            "visgain": visgain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
