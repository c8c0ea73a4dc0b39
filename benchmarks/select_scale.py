"""Time and memory of `visgain select` on as many rows and tokens as LLaVA-1.5's instruction data.

Writes synthetic scores of 665,298 rows and about 60 million answer tokens (the source mix of llava_v1_5_mix665k, parts
strided over the rows as `visgain score` writes them), selects with the paper's rule, and compares with a loop over the
rows on a smaller set: the same result, time and memory for a row. CPU seconds are measured beside wall seconds, because
the latter depend on what else the machine is doing. Run as `python benchmarks/select_scale.py [--rows N]`.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from _results import result_row, write_results
from visgain.config import SelectConfig
from visgain.rowset import RowSet
from visgain.rules import Pool, find_rule
from visgain.selection import run_select
from visgain.storage import (
    SCORE_SCHEMA,
    SELECTION_SCHEMA,
    claim_run,
    flat_values,
    list_column,
    list_lengths,
    read_scores,
    read_selection_table,
    write_part,
    write_selection,
)

SOURCES = {"coco": 364_100, "vg": 86_417, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "text": 40_688}
ROWS = sum(SOURCES.values())
TOKENS_PER_ROW = 90  # about 60M in all
PART_ROWS = 512
LOOP_ROWS = 20_000
KEEP = 70.0


def write_scores(
    folder: Path, n_rows: int, tokens_per_row: int = TOKENS_PER_ROW, part_rows: int = PART_ROWS, seed: int = 0
) -> int:
    """Write the parts and run.json of a finished synthetic run; returns its number of answer tokens."""
    n_parts = math.ceil(n_rows / part_rows)
    identity = {"model": "synthetic", "counterfactual": "none", "seed": seed}
    claim_run(folder, identity, {"n_parts": n_parts, "n_rows": n_rows})
    last = np.cumsum([round(count * n_rows / ROWS) + 1 for count in SOURCES.values()])
    tokens = 0
    for index in tqdm(range(n_parts), desc="writing scores", unit="part", delay=2):
        rows = np.arange(index, n_rows, n_parts)
        source = np.array(list(SOURCES))[np.searchsorted(last, rows, side="right")]
        rng = np.random.default_rng((seed, index))
        lengths = 1 + rng.negative_binomial(2, 2 / (tokens_per_row + 1), len(rows))
        write_part(folder, index, n_parts, synthetic_part(rows, source, lengths, rng))
        tokens += int(lengths.sum())
    return tokens


def synthetic_part(rows: np.ndarray, source: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> pa.Table:
    n = len(rows)
    multimodal = source != "text"
    scored = np.where(multimodal, lengths, 0)
    seen = rng.exponential(0.6, scored.sum()).astype(np.float32)
    blind = np.maximum(seen + rng.normal(0.2, 0.7, len(seen)), 0).astype(np.float32)
    token_gain = blind - seen
    gain = np.full(n, np.nan)
    first = np.cumsum(scored) - scored
    gain[multimodal] = np.add.reduceat(token_gain, first[multimodal], dtype=np.float64) / scored[multimodal]
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    char_start = (4 * position).astype(np.int32)
    last = position == np.repeat(lengths - 1, lengths)  # the end of the turn is zero characters wide
    columns: dict[str, Any] = {
        "row": rows,
        "id": [f"{row:012d}" for row in rows],
        "fingerprint": rng.integers(-(2**63), 2**63 - 1, n),
        "source": source.tolist(),
        "skip_reason": pa.nulls(n, pa.string()),
        "n_images": multimodal.astype(np.int32),
        "n_image_tokens": (576 * multimodal).astype(np.int32),
        "n_prompt_tokens": np.full(n, 640, np.int32),
        "truncated": np.zeros(n, bool),
        "gain": pa.array(gain, mask=~multimodal),
        "token_id": list_column(rng.zipf(1.3, lengths.sum()).clip(max=31_999).astype(np.int32), lengths),
        "turn": list_column(np.zeros(lengths.sum(), np.int32), lengths),
        "char_start": list_column(char_start, lengths),
        "char_end": list_column((char_start + np.where(last, 0, 4)).astype(np.int32), lengths),
        "nll_seen": list_column(seen, scored),
        "nll_blind": list_column(blind, scored),
    }
    return pa.table(columns, schema=SCORE_SCHEMA)


def select(scores: Path, out: Path) -> None:
    run_select(SelectConfig(scores=scores, out=out, keep=KEEP))


def select_in_a_loop(scores: Path, out: Path) -> None:
    """The paper's rule as one would first write it, from and to the same files."""
    columns = ["row", "id", "fingerprint", "n_images", "gain", "token_id", "nll_seen", "nll_blind"]
    samples = read_scores(scores, columns).to_pylist()
    ranked = sorted((sample["gain"] for sample in samples if sample["n_images"]), reverse=True)
    tau = ranked[math.ceil(Fraction(str(KEEP)) * len(ranked) / 100) - 1]
    kept = []
    for sample in samples:
        if not sample["n_images"]:
            sample["keep"] = np.ones(len(sample["token_id"]), bool)
        elif sample["gain"] >= tau:
            gain = np.array(sample["nll_blind"], np.float32) - np.array(sample["nll_seen"], np.float32)
            sample["keep"] = gain.astype(np.float64) >= tau
        else:
            continue
        kept.append({name: sample[name] for name in SELECTION_SCHEMA.names})
    table = pa.Table.from_pylist(kept, schema=SELECTION_SCHEMA)
    write_selection(out, [table], {"tau": tau, "token_tau": tau, "keep_percent": KEEP})


@dataclass(frozen=True)
class InMemory:
    """Scores that are one pool."""

    pool: Pool

    def values(self) -> list[np.ndarray]:
        return [self.pool.value]

    def rows(self) -> RowSet:
        raise NotImplementedError

    def pools(self, purpose: str) -> Iterator[Pool]:
        yield self.pool


def rule_alone(scores: Path) -> tuple[float, float]:
    """CPU seconds of the rule on rows that are in memory already: vectorised, and in a loop over the rows."""
    table = read_scores(scores, ["row", "n_images", "gain", "nll_seen", "nll_blind"])
    multimodal = table.column("n_images").to_numpy() > 0
    token_gain = flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))
    pool = Pool(
        row=table.column("row").to_numpy()[multimodal],
        value=table.column("gain").to_numpy()[multimodal],
        length=list_lengths(table.column("nll_seen"))[multimodal],
        token_gain=token_gain,
        end_of_turn=np.zeros(len(token_gain), bool),
    )
    rows = list(zip(pool.value.tolist(), np.split(token_gain, np.cumsum(pool.length)[:-1]), strict=True))

    begin = time.process_time()
    choice = find_rule(InMemory(pool), SelectConfig(scores=scores, out=scores, keep=KEEP)).decide(pool)
    middle = time.process_time()
    tau = sorted((gain for gain, _ in rows), reverse=True)[math.ceil(Fraction(str(KEEP)) * len(rows) / 100) - 1]
    masks = [tokens.astype(np.float64) >= tau if gain >= tau else np.zeros(len(tokens), bool) for gain, tokens in rows]
    end = time.process_time()
    assert np.array_equal(choice.active, np.concatenate(masks))
    return middle - begin, end - middle


Work = Callable[[Path, Path], None]


@dataclass(frozen=True, kw_only=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds of the process, all threads
    peak: float  # MiB resident at most
    growth: float  # MiB above what the process held before


def cost(work: Work, scores: Path, out: Path) -> Cost:
    before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    work(scores, out)
    peak = peak_mib()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall=wall, cpu=cpu, peak=peak, growth=peak - before)


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cost_in_a_fresh_process(work: Work, scores: Path, out: Path) -> Cost:
    """Peak memory never falls within a process, so each piece of work gets its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost, work, scores, out).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the synthetic scores")
    parser.add_argument("--scratch", type=Path, help="folder for the temporary scores (about 12 bytes a token)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        return measure(Path(scratch), options.rows)


def measure(scratch: Path, n_rows: int) -> int:
    n_few = min(LOOP_ROWS, n_rows)
    tokens = write_scores(scratch / "scores", n_rows)
    write_scores(scratch / "few", n_few)
    size = sum(path.stat().st_size for path in (scratch / "scores").iterdir())
    print(f"{n_rows:,} rows, {tokens:,} tokens, {size / tokens:.1f} bytes a token on disk")

    ours = cost_in_a_fresh_process(select, scratch / "scores", scratch / "selection")
    loop = cost_in_a_fresh_process(select_in_a_loop, scratch / "few", scratch / "by-loop")
    select(scratch / "few", scratch / "by-select")
    equal = read_selection_table(scratch / "by-loop").equals(read_selection_table(scratch / "by-select"))

    print(f"select: {ours.wall:.1f} s wall, {ours.cpu:.1f} s CPU, peak {ours.peak:,.0f} MiB")
    print(f"loop on {n_few:,} rows: {loop.wall:.1f} s wall, {loop.cpu:.1f} s CPU, peak {loop.peak:,.0f} MiB")
    print(f"load of the machine {os.getloadavg()[0]:.1f}; same selection as the loop: {equal}\n")
    rows = [
        result_row(
            benchmark="select_scale",
            case=f"{n_rows} rows, {tokens} tokens, keep {KEEP:g}%; peak {ours.peak:.0f} MiB",
            metric=metric,
            ours=round(getattr(ours, quantity) * unit / n_rows, 3),
            baseline=round(getattr(loop, quantity) * unit / n_few, 3),
            baseline_name=f"loop over {n_few} rows, same files in and out, {'equal' if equal else 'ANOTHER'} result",
        )
        for metric, quantity, unit in [
            ("wall_us_per_row", "wall", 1e6),
            ("cpu_us_per_row", "cpu", 1e6),
            ("peak_growth_kib_per_row", "growth", 1024),
        ]
    ]
    vectorised, looped = rule_alone(scratch / "few")
    rows.append(
        result_row(
            benchmark="select_scale",
            case=f"{n_few} rows in memory, the rule alone",
            metric="cpu_us_per_row",
            ours=round(vectorised * 1e6 / n_few, 3),
            baseline=round(looped * 1e6 / n_few, 3),
            baseline_name=f"loop over {n_few} rows, equal result",
        )
    )
    print(f"{'':24}{'select':>10}{'loop':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['metric']:24}{row['ours']:>10.2f}{row['baseline']:>10.2f}{row['ratio']:>8.1f}  {row['case']}")
    print(f"\nwrote {write_results('select_scale', rows)}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
