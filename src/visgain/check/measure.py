"""A few rows scored as `score` would, by its own plan, feed, self-check and engine: does it work, and how fast?

What a forward pass costs is measured on units of the plan, with the rows that share a picture in the whole dataset.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from visgain.check.reading import Reading, told
from visgain.check.scan import Outline, outline
from visgain.config import ScoreConfig
from visgain.data import Dataset
from visgain.errors import VisgainError
from visgain.scoring import run
from visgain.scoring.engine import WAYS, Choice, Engine, Extent
from visgain.scoring.feed import Feed
from visgain.scoring.forward import answer_nll
from visgain.scoring.plan import Plan, make_plan
from visgain.storage import PER_IMAGE_SCHEMA, SCORE_SCHEMA, score_table, write_part
from visgain.types import Sample, Skipped, TokenScores
from visgain.vlm.float8 import make_draft
from visgain.vlm.load import VLM
from visgain.vlm.threads import computing_with, n_threads

UNITS, ROWS = 24, 96
"""Units of the plan, and rows in them, that are scored at most."""

SLOW = 0.5
"""Seconds for one plain forward over a middling row. Beyond, the ways are not compared, which takes some sixty."""

SLOW_SECONDS = 20.0
"""For such a model, about so long is spent on measuring."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a part of the measured rows took."""

    rows: Sequence[Outline]
    n_units: int
    feed_seconds: float  # decoding, counterfactual, preparing, tokenising, in one process
    model_seconds: float  # both conditions


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What scoring some rows told. `failure`: why it could not."""

    way: str = ""
    rejected: Mapping[str, str] = field(default_factory=dict)
    tried: bool = False  # whether the ways were compared
    workers: int = 0
    parts: Sequence[Timed] = ()
    scores: Sequence[TokenScores] = ()
    skipped: Sequence[Skipped] = ()
    token_bytes: float = 0.0  # on disk, of an answer token with what belongs to its row
    part_bytes: float = 0.0  # on disk, of a part beside its tokens
    vocabulary: int = 0
    dtype: str = ""
    counterfactual: str = ""
    failure: str = ""

    @property
    def n_tokens(self) -> int:
        return sum(len(score.nll_seen) for score in self.scores)

    @property
    def seen(self) -> np.ndarray:
        """NLLs of all measured answer tokens, float32 [A]."""
        return np.concatenate([score.nll_seen for score in self.scores]) if self.scores else np.zeros(0, np.float32)

    @property
    def blind(self) -> np.ndarray:
        return np.concatenate([score.nll_blind for score in self.scores]) if self.scores else np.zeros(0, np.float32)


class Chosen:
    """Some rows of a dataset as a dataset: position k is `rows[k]`, which keeps its number."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]) -> None:
        self.path, self.image_root = dataset.path, dataset.image_root
        self._dataset, self._rows = dataset, rows

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int, /) -> Sample | Skipped:
        return self._dataset[self._rows[position]]


def measure(config: ScoreConfig, vlm: VLM, dataset: Dataset, reading: Reading) -> Measured:
    """Score some rows of `reading` as `config` says. What goes wrong comes back as `failure`."""
    workers = run.n_workers(config, vlm)
    try:
        counterfactual = run.blind_condition(config)
        with computing_with(n_threads(vlm)):
            pace = _forward_seconds(vlm, reading)
            chosen = Chosen(dataset, _rows(reading, pace))
            if not len(chosen):
                return Measured()  # why is told of each row
            source = replace(run.make_feed(config, dataset, counterfactual, vlm), dataset=chosen)
            plan = make_plan(chosen, len(chosen), part_rows=-(-len(chosen) // 2))
            wanted = list(WAYS) if config.way == "auto" else [config.way]
            vlm, choice = run.checked_way(config, source, vlm, plan, wanted) if pace < SLOW else (vlm, _untried(config))
            return _scored(config, vlm, choice, source, plan, workers, tried=pace < SLOW)
    except VisgainError as error:
        return Measured(failure=str(error))
    except Exception as error:  # models are other people's programs
        return Measured(failure=told(error))


def _forward_seconds(vlm: VLM, reading: Reading) -> float:
    """Seconds of the model's plain forward over one sampled row, a middling one, when it is warm; 0 without any."""
    encoded = [read.cut for read in reading.rows if read.cut is not None and read.sample.images]
    if not encoded:
        return 0.0
    middling = sorted(encoded, key=lambda one: len(one.input_ids))[len(encoded) // 2]
    paces: list[float] = []
    while len(paces) < 2 or (min(paces) > SLOW and sum(paces) < 8 * SLOW):  # a busy machine is no slow model
        start = time.perf_counter()
        answer_nll(vlm, [middling])
        paces.append(time.perf_counter() - start)
        if paces[0] > 8 * SLOW:
            break
    return min(paces)


def _untried(config: ScoreConfig) -> Choice:
    way = "single" if config.way == "auto" else config.way
    return Choice(way=way, rejected={}, tried=Extent(), finite=True)


def _rows(reading: Reading, pace: float) -> list[int]:
    """Rows to score: sampled ones that can be, spread evenly, with those that share their pictures."""
    usable = {read.sample.row for read in reading.rows if read.cut is not None and read.sample.images}
    units = [unit for unit in reading.scan.units() if any(one.row in usable for one in unit)]
    affordable = UNITS if pace < SLOW else max(2, min(UNITS, int(SLOW_SECONDS / (2 * pace))))
    places = np.linspace(0, len(units) - 1, min(affordable, len(units))).round().astype(int).tolist()
    rows: list[int] = []
    for place in places:
        rows += [one.row for one in units[place]][: max(1, ROWS - len(rows)) if pace < SLOW else 1]
        if len(rows) >= ROWS:
            break
    return sorted(rows)


def _scored(
    config: ScoreConfig, vlm: VLM, choice: Choice, source: Feed, plan: Plan, workers: int, *, tried: bool
) -> Measured:
    if config.dtype == run.DRAFT:
        make_draft(vlm.model)
    pack_tokens = config.batch_tokens or run.PACK_TOKENS.get(vlm.device.type, run.PACK_TOKENS["cpu"])
    engine = Engine(vlm=vlm, way=choice.way, pack_tokens=pack_tokens, tried=choice.tried)
    scorer = run.Scorer(engine=engine, source=source, config=config, workers=workers)
    parts, records = [], []
    for part in tqdm(range(plan.n_parts), desc="measuring", unit="part", leave=False):
        timed, found = _timed(scorer, plan, part)
        parts.append(timed)
        records += found
    token_bytes, part_bytes = _disk(records, PER_IMAGE_SCHEMA if config.per_image else SCORE_SCHEMA)
    return Measured(
        way=choice.way,
        rejected=choice.rejected,
        tried=tried,
        workers=workers,
        parts=parts,
        scores=[record for record in records if isinstance(record, TokenScores) and len(record.nll_seen)],
        skipped=[record for record in records if isinstance(record, Skipped)],
        token_bytes=token_bytes,
        part_bytes=part_bytes,
        vocabulary=int(vlm.model.config.get_text_config(decoder=True).vocab_size),
        dtype=str(vlm.model.dtype).removeprefix("torch."),
        counterfactual=source.counterfactual.spec,
    )


def _timed(scorer: run.Scorer, plan: Plan, part: int) -> tuple[Timed, list[TokenScores | Skipped]]:
    units = plan.units(part)
    start = time.perf_counter()
    fed = [scorer.source[part, rows] for rows in units]
    ready = time.perf_counter()
    records = scorer.score_part(fed, lambda n: None)
    end = time.perf_counter()
    samples = [scorer.source.dataset[row] for rows in units for row in rows]
    timed = Timed(
        rows=[outline(sample) for sample in samples if isinstance(sample, Sample)],
        n_units=len(units),
        feed_seconds=ready - start,
        model_seconds=end - ready,
    )
    return timed, records


def _disk(records: Sequence[TokenScores | Skipped], schema: pa.Schema) -> tuple[float, float]:
    """Bytes on disk of one more answer token, and of a part apart from those: the difference that more rows make."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for number, some in enumerate((records, records[::2])):
            write_part(Path(folder), number, 2, score_table(some, schema))
            size = next(Path(folder).glob(f"part-{number:05d}-*")).stat().st_size
            sizes.append((size, sum(len(one.token_id) for one in some if isinstance(one, TokenScores))))
    (size, tokens), (less, fewer) = sizes
    each = (size - less) / max(1, tokens - fewer)
    return each, max(0.0, size - each * tokens)
