"""Scoring: our engine against the naive loop and against padded batches, on the same rows and weights in one process.

    python benchmarks/score.py [--shape A B] [--case coco-3 665k mix captions] [--rows N]

Naive is one sample at a time, two forwards, full logits, Hugging Face's loss on top. Models have random weights and
LLaVA-1.5's proportions: shape A has 66M parameters with the head 2% of the body (a 7B's proportion), shape B 105M with
a vocabulary of 32,000 (SmolVLM's proportion). 576 image tokens a picture, 35 tokens of system prompt. The lengths:

    coco-3    LLaVA-665K's mean lengths, three conversations a picture, as its COCO part has
    665k      the same lengths, its mixture: 58% of the rows are about COCO pictures with three each, the rest has one
    mix       one conversation a picture, lengths of ../shared/data/mix.json (a recorded summary where that is absent)
    captions  one caption of about 20 tokens a picture

CPU seconds are of this process on one thread; ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from _results import result_row, write_results
from visgain.scoring.engine import Engine, Extent, scored
from visgain.scoring.forward import answer_nll
from visgain.scoring.run import PACK_TOKENS
from visgain.scoring.unit import Unit
from visgain.types import Encoded
from visgain.vlm.load import VLM

IMAGE_TOKEN, IMAGE_TOKENS, SYSTEM_TOKENS = 5, 576, 35
VOCABULARY = {"A": 1840, "B": 32_000}
CASES = {"coco-3": 12, "665k": 21, "mix": 8, "captions": 8}
"""Rows of each by default: with 21 the mixture has 1.62 rows a picture, nearly LLaVA-665K's 1.64."""
COCO_SHARE = 364_100 / 624_610
TRIED = Extent(tokens=1 << 30, shared=1 << 30, pictures=1 << 30)  # the self-check is a cost of a run, not of a row
MIX = Path(__file__).parents[2] / "shared" / "data" / "mix.json"
MIX_QUARTILES = ([9, 14, 15, 50, 128], [1, 9, 13, 17, 29])  # tokens of questions and answers: 5, 25, 50, 75, 95%


def build(shape: str, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A LLaVA of the shape with random weights."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=12,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
            projection_dim=256,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY[shape],
            hidden_size=640,
            intermediate_size=1472,
            num_hidden_layers=12,
            num_attention_heads=10,
            num_key_value_heads=10,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval().to(dtype)


@dataclass(frozen=True)
class Pictures:
    """Lengths (question, answer) in tokens of the conversations about one picture."""

    lengths: Sequence[tuple[int, int]]


def draw_case(case: str, n_rows: int, rng: np.random.Generator) -> list[Pictures]:
    """`n_rows` conversations of a case, by picture; the share of rows that share a picture is met as it goes."""
    share = {"coco-3": 1.0, "665k": COCO_SHARE}.get(case, 0.0)
    lengths = iter(_lengths(case, rng))
    groups: list[Pictures] = []
    done = in_threes = 0
    while done < n_rows:
        size = min(n_rows - done, 3 if in_threes < share * done or share == 1 else 1)
        groups.append(Pictures([next(lengths) for _ in range(size)]))
        done += size
        in_threes += size if size == 3 else 0
    return groups


def _lengths(case: str, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    known = _mix_lengths()
    while True:
        if case == "captions":
            yield 10, int(np.clip(rng.normal(20, 5), 6, 60))
        elif case == "mix":
            yield known[int(rng.integers(len(known)))]
        else:  # about 131 tokens of questions and 94 of answers; conversations vary by about as much as their mean
            question, answer = rng.lognormal(-0.25, 0.7, 2) * (131, 94)
            yield int(np.clip(question, 12, 700)), int(np.clip(answer, 3, 500))


def _mix_lengths() -> list[tuple[int, int]]:
    if not MIX.exists():
        return list(zip(*MIX_QUARTILES, strict=True))
    rows = (row for row in json.loads(MIX.read_text()) if row.get("image"))
    turns = ([(turn["from"], len(turn["value"]) / 4) for turn in row["conversations"]] for row in rows)
    sums = ([sum(n for who, n in said if (who == "human") == human) for human in (True, False)] for said in turns)
    return [(max(4, round(question)), min(600, max(2, round(answer)))) for question, answer in sums]


def make_units(groups: Sequence[Pictures], vocabulary: int, rng: np.random.Generator) -> list[Unit]:
    """Random tokens of the drawn lengths, and random pictures."""
    system = rng.integers(10, vocabulary, SYSTEM_TOKENS)
    return [_unit(group, system, vocabulary, rng) for group in groups]


def _unit(group: Pictures, system: np.ndarray, vocabulary: int, rng: np.random.Generator) -> Unit:
    seen, blind = (torch.from_numpy(rng.standard_normal((1, 3, 336, 336), np.float32)) for _ in range(2))
    rows = []
    for question, answer in group.lengths:
        text = rng.integers(10, vocabulary, question + answer)
        ids = np.concatenate([system, np.full(IMAGE_TOKENS, IMAGE_TOKEN), text])
        rows.append(
            Encoded(
                input_ids=ids,
                is_answer=np.arange(len(ids)) >= len(ids) - answer,
                turn=np.zeros(answer, np.int32),
                chars=np.zeros((answer, 2), np.int32),
                n_image_tokens=IMAGE_TOKENS,
                model_inputs={"pixel_values": seen},
            )
        )
    return Unit.of(rows, {"pixel_values": blind})


# ---------------------------------------------------------------- the ways to compare

Scores = list[np.ndarray]


def naive(vlm: VLM, units: Sequence[Unit]) -> Scores:
    found = []
    for unit in units:
        for row in unit.rows:
            for pictures in (unit.seen, unit.blind):
                ids = torch.from_numpy(row.input_ids)[None]
                labels = torch.where(torch.from_numpy(row.is_answer)[None], ids, -100)
                with torch.inference_mode():
                    logits = vlm.model(input_ids=ids, labels=labels, **pictures).logits[0]
                where = np.flatnonzero(row.is_answer)
                nll = torch.nn.functional.cross_entropy(logits[where - 1], ids[0, where], reduction="none")
                found.append(nll.numpy())
    return found


def padded(vlm: VLM, units: Sequence[Unit], size: int = 6) -> Scores:
    """Batches of rows of similar length, padded, with logits where they are needed."""
    rows = [(row, unit) for unit in units for row in unit.rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0].input_ids))
    found: list[np.ndarray] = [np.zeros(0)] * (2 * len(rows))
    for start in range(0, len(rows), size):
        batch = order[start : start + size]
        for condition in (0, 1):
            samples = [_whole(*rows[i], condition) for i in batch]
            for i, nll in zip(batch, answer_nll(vlm, samples), strict=True):
                found[2 * i + condition] = nll
    return found


def _whole(row: Encoded, unit: Unit, condition: int) -> Encoded:
    [found] = [one for one in unit.rows_with((unit.seen, unit.blind)[condition]) if one.input_ids is row.input_ids]
    return found


def ours(vlm: VLM, units: Sequence[Unit]) -> Scores:
    engine = Engine(vlm=vlm, way="shared", pack_tokens=PACK_TOKENS["cpu"], tried=TRIED)
    found = {id(unit): pairs for unit, pairs in scored(engine, units)}
    return [nll for unit in units for pair in found[id(unit)] for nll in pair]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Cost:
    cpu: float  # seconds of this process
    wall: float  # seconds
    peak: float  # MiB resident at most, above what was there before
    scores: Scores


def cost(way: Callable[[VLM, Sequence[Unit]], Scores], vlm: VLM, units: Sequence[Unit], repeats: int) -> Cost:
    """The best of `repeats`."""
    runs = []
    for _ in range(repeats):
        before = _reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        scores = way(vlm, units)
        runs.append(Cost(time.process_time() - cpu, time.perf_counter() - wall, _peak() - before, scores))
    return min(runs, key=lambda run: run.cpu)


def _reset_peak() -> float:
    """Forget the highest resident memory so far (Linux); returns the present one in MiB."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but kept would hide what the next one needs
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def worst(a: Scores, b: Scores) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def measure(shape: str, case: str, n_rows: int, repeats: int, sixteen: bool) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    units = make_units(draw_case(case, n_rows, rng), VOCABULARY[shape], rng)
    vlm = VLM(name=shape, model=build(shape), processor=_NoProcessor())
    tokens = 2 * sum(len(row.input_ids) for unit in units for row in unit.rows)
    computed = 2 * sum(Engine(vlm=vlm, way="shared", pack_tokens=1).n_tokens(unit) for unit in units)
    longest = [max(len(row.input_ids) for row in unit.rows) for unit in units]
    print(
        f"\nshape {shape}, {case}: {n_rows} rows about {len(units)} pictures, {tokens / 2 / n_rows:.0f} tokens a row, "
        f"{1 - computed / tokens:.0%} of them shared (longest {max(longest)}), load {os.getloadavg()[0]:.1f}"
    )
    ours(vlm, units[:1])
    base = cost(naive, vlm, units, repeats)
    results: list[dict[str, object]] = []
    ways = [("ours, float32", ours, vlm), ("padded batches of 6, float32", padded, vlm)]
    if sixteen:
        half = VLM(name=shape, model=build(shape, torch.bfloat16), processor=_NoProcessor())
        ways.append(("ours, bfloat16", ours, half))
    print(f"{'':30}{'CPU s':>8}{'wall s':>8}{'peak MiB':>10}{'tokens/s':>10}{'ratio':>7}{'error':>10}")
    print(f"{'naive, float32':30}{base.cpu:>8.1f}{base.wall:>8.1f}{base.peak:>10.0f}{tokens / base.cpu:>10.0f}")
    for name, way, model in ways:
        one = cost(way, model, units, repeats)
        error = worst(one.scores, base.scores)
        print(
            f"{name:30}{one.cpu:>8.1f}{one.wall:>8.1f}{one.peak:>10.0f}{tokens / one.cpu:>10.0f}"
            f"{base.cpu / one.cpu:>7.2f}{error:>10.1e}"
        )
        what = f"shape {shape}, {case}, {n_rows} rows; {name}; largest error {error:.1e} nats"
        for metric, value, baseline in (
            ("cpu_seconds", one.cpu, base.cpu),
            ("wall_seconds", one.wall, base.wall),
            ("peak_mib", max(one.peak, 1.0), max(base.peak, 1.0)),
        ):
            results.append(
                result_row(
                    benchmark="score",
                    case=what,
                    metric=metric,
                    ours=round(value, 3),
                    baseline=round(baseline, 3),
                    baseline_name="naive loop, float32",
                )
            )
    return results


class _NoProcessor:
    """Rows come as tokens here; only the padding token is asked for."""

    class tokenizer:  # noqa: N801 - stands for an attribute
        pad_token_id = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(VOCABULARY), default=list(VOCABULARY))
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rows", type=int, help="of each case; by default what its distribution needs")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-bfloat16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = [
        row
        for shape in options.shape
        for case in options.case
        for row in measure(shape, case, options.rows or CASES[case], options.repeats, not options.no_bfloat16)
    ]
    print(f"\nwrote {write_results('score', results)}")


if __name__ == "__main__":
    sys.exit(main())
