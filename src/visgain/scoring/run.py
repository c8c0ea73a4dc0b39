"""`visgain score`: every row of a dataset, seen and blind, into atomic parts.

A part is encoded in windows of rows, so that memory does not grow with the part; each window is batched by length,
run twice (real image, counterfactual) in the same shapes, and put back into row order. Nothing of a row's result
depends on which rows share its batch (beyond float rounding), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL.Image import Image
from tqdm import tqdm

import visgain
from visgain.config import ScoreConfig
from visgain.counterfactuals import Counterfactual, parse_counterfactual
from visgain.data import Dataset, open_dataset
from visgain.errors import EncodingError, ImageError
from visgain.scoring.forward import answer_nll
from visgain.scoring.plan import plan_batches, plan_parts
from visgain.storage import (
    claim_run,
    finished_parts,
    list_lengths,
    read_json,
    read_scores,
    score_table,
    write_part,
    write_skipped,
)
from visgain.types import Encoded, Sample, Skipped, TokenScores
from visgain.vlm.batch import signature
from visgain.vlm.encode import Encoder, without_end_of_turn
from visgain.vlm.load import VLM, load_vlm, model_fingerprint, model_name
from visgain.vlm.template import make_encoder

WINDOW_ROWS = 64
"""Rows encoded at a time: enough to batch by length, few enough to hold their pixels."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Everything that turns a row into its scores."""

    dataset: Dataset
    vlm: VLM
    encoder: Encoder
    counterfactual: Counterfactual
    config: ScoreConfig

    def score_rows(self, rows: Sequence[int], done: Callable[[int], Any]) -> list[TokenScores | Skipped]:
        """Scores of `rows` in their order; `done` is told how many rows were finished, window by window."""
        records: list[TokenScores | Skipped] = []
        for start in range(0, len(rows), WINDOW_ROWS):
            window = rows[start : start + WINDOW_ROWS]
            records += self._score_window(window)
            done(len(window))
        return records

    def _score_window(self, rows: Sequence[int]) -> list[TokenScores | Skipped]:
        prepared = [self.prepare(row) for row in rows]
        pairs = [item for item in prepared if isinstance(item, Pair)]
        multimodal = [pair for pair in pairs if pair.blind is not None]
        nlls = dict(zip((pair.sample.row for pair in multimodal), self._forward(multimodal), strict=True))
        return [
            item if isinstance(item, Skipped) else _record(item, *nlls.get(item.sample.row, (_NONE, _NONE)))
            for item in prepared
        ]

    def _forward(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(seen, blind) NLLs of each pair."""
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        lengths = [len(pair.seen.input_ids) for pair in pairs]
        groups = [signature(pair.seen) for pair in pairs]
        for batch in plan_batches(lengths, groups, self.config.batch_tokens):
            # The two conditions run in the same shapes: they are subtracted, and kernels round by shape.
            seen = answer_nll(self.vlm, [pairs[i].seen for i in batch])
            blind = answer_nll(self.vlm, [blind for i in batch if (blind := pairs[i].blind) is not None])
            results.update(zip(batch, zip(seen, blind, strict=True), strict=True))
        return [results[i] for i in range(len(pairs))]

    def prepare(self, row: int) -> Pair | Skipped:
        """Row `row`, decoded and encoded in both conditions, or the reason why it cannot be."""
        sample = self.dataset[row]
        if isinstance(sample, Skipped):
            return sample
        try:
            seen_images = [image.open() for image in sample.images]
            seen = self._encode(sample, seen_images)
            blind = self._encode(sample, self._blind_images(sample, seen_images)) if sample.images else None
        except (ImageError, EncodingError) as error:
            return skipped(sample, str(error))
        if blind is not None and not np.array_equal(seen.input_ids, blind.input_ids):
            return skipped(sample, "the counterfactual changed the number of image tokens")
        return Pair(sample=sample, seen=seen, blind=blind)

    def _encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        encoded = self.encoder.encode(sample, images)
        return without_end_of_turn(encoded) if self.config.end_of_turn == "ignore" else encoded

    def _blind_images(self, sample: Sample, images: Sequence[Image]) -> list[Image]:
        # Seeded by row and image, so that no other row, order or resumption changes what is drawn.
        rngs = [np.random.default_rng([self.config.seed, sample.row, number]) for number in range(len(images))]
        return [
            self.counterfactual(image, rng=rng, other=lambda key=ref.key, rng=rng: self._other_image(key, rng))  # type: ignore[misc]
            for image, ref, rng in zip(images, sample.images, rngs, strict=True)
        ]

    def _other_image(self, key: str, rng: np.random.Generator) -> Image:
        """A picture of another key, from a row drawn by `rng`. Raises EncodingError if 1,000 draws find none."""
        for _ in range(1000):
            other = self.dataset[int(rng.integers(len(self.dataset)))]
            if isinstance(other, Skipped) or not other.images or other.images[0].key == key:
                continue
            try:
                return other.images[0].open()
            except ImageError:
                continue
        raise EncodingError("the dataset holds no other picture to swap in")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample in both conditions; `blind` is None for a text-only sample."""

    sample: Sample
    seen: Encoded
    blind: Encoded | None


_NONE = np.zeros(0, dtype=np.float32)


def skipped(sample: Sample, reason: str) -> Skipped:
    return Skipped(
        row=sample.row,
        id=sample.id,
        reason=reason,
        source=sample.source,
        fingerprint=sample.fingerprint,
        n_images=len(sample.images),
    )


def _record(pair: Pair, nll_seen: np.ndarray, nll_blind: np.ndarray) -> TokenScores | Skipped:
    if not (np.isfinite(nll_seen).all() and np.isfinite(nll_blind).all()):
        return skipped(pair.sample, "the model gave a non-finite log-probability; try another --dtype")
    return TokenScores(
        row=pair.sample.row,
        id=pair.sample.id,
        fingerprint=pair.sample.fingerprint,
        source=pair.sample.source,
        n_images=len(pair.sample.images),
        n_image_tokens=pair.seen.n_image_tokens,
        n_prompt_tokens=pair.seen.n_prompt_tokens,
        truncated=pair.seen.truncated,
        token_id=pair.seen.token_id.astype(np.int32),
        turn=pair.seen.turn,
        chars=pair.seen.chars,
        nll_seen=nll_seen,
        nll_blind=nll_blind,
    )


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    rows: int
    multimodal: int
    text_only: int
    skipped: int
    answer_tokens: int
    mean_gain: float


def run_score(config: ScoreConfig) -> ScoreSummary:
    """Score the whole dataset into `config.out`, resuming what is there. Raises VisgainError for any user's mistake."""
    scorer = open_scorer(config)
    n_rows = min(len(scorer.dataset), config.limit or len(scorer.dataset))
    parts = plan_parts(n_rows, config.part_rows)
    claim_run(config.out, _identity(scorer), _record_of(scorer, n_rows, len(parts)))
    # A resumed run keeps the parts it was started with, whatever --part-rows says now.
    n_parts = read_json(config.out / "run.json", "scores")["n_parts"]
    if n_parts != len(parts):
        parts = [range(first, n_rows, n_parts) for first in range(n_parts)]
    finished = finished_parts(config.out, n_parts)
    with tqdm(
        total=n_rows,
        initial=sum(len(parts[index]) for index in finished),
        desc="scoring",
        unit="row",
        mininterval=0.5,
    ) as progress:
        for index in sorted(set(range(n_parts)) - finished):
            write_part(config.out, index, n_parts, score_table(scorer.score_rows(parts[index], progress.update)))
    return _summarise(config.out)


def open_scorer(config: ScoreConfig) -> Scorer:
    """Check the cheap things first: options, dataset, then the model."""
    counterfactual = parse_counterfactual(config.counterfactual)
    dataset = open_dataset(
        config.data, config.image_root, max_pixels=config.max_pixels, follow_links=config.follow_links
    )
    vlm = load_vlm(config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code)
    encoder = make_encoder(vlm, config.template, config.max_length)
    return Scorer(dataset=dataset, vlm=vlm, encoder=encoder, counterfactual=counterfactual, config=config)


def _identity(scorer: Scorer) -> dict[str, Any]:
    """Everything that a row's scores depend on."""
    config = scorer.config
    return {
        "model": model_name(config.model),
        "model_fingerprint": model_fingerprint(config.model),
        "data_fingerprint": scorer.dataset.fingerprint,
        "limit": config.limit,
        "counterfactual": scorer.counterfactual.spec,
        "template": scorer.encoder.name,
        "max_length": config.max_length,
        "end_of_turn": config.end_of_turn,
        "seed": config.seed,
        "dtype": config.dtype,
        "max_pixels": config.max_pixels,
        "follow_links": config.follow_links,
    }


def _record_of(scorer: Scorer, n_rows: int, n_parts: int) -> dict[str, Any]:
    return {
        "n_rows": n_rows,
        "n_parts": n_parts,
        "data": str(scorer.dataset.path.resolve()),
        "image_root": str(scorer.dataset.image_root.resolve()),
        "max_pixels": scorer.config.max_pixels,
        "follow_links": scorer.config.follow_links,
        "device": str(scorer.vlm.device),
        "batch_tokens": scorer.config.batch_tokens,
        "versions": {
            "visgain": visgain.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _summarise(folder: Path) -> ScoreSummary:
    """Counts over all parts; writes skipped.jsonl, the last file of a run."""
    scores = read_scores(folder, ["row", "id", "skip_reason", "n_images", "gain", "token_id"])
    n_skipped = write_skipped(folder, scores)
    gain = scores.column("gain").drop_null().to_numpy()
    return ScoreSummary(
        rows=len(scores),
        multimodal=len(gain),
        text_only=len(scores) - len(gain) - n_skipped,
        skipped=n_skipped,
        answer_tokens=int(list_lengths(scores.column("token_id")).sum()),
        mean_gain=float(gain.mean()) if len(gain) else float("nan"),
    )
