"""From sampled rows and a measured batch to the whole dataset: tokens, hours, bytes.

A row's tokens are predicted from what is known of every row, its bytes of text and its number of pictures, with the
ratios of the sampled rows of its source (a ratio estimator). Sampling error is what the sampled rows are off by.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from safetensors import safe_open

from visgain.check.measure import Measured
from visgain.check.reading import Reading
from visgain.check.scan import Outline, Scan
from visgain.config import ScoreConfig
from visgain.vlm.load import VLM, resolve_model

SHARING = ("shared", "mutual", "cached")
"""Ways that compute the tokens of a picture once for all rows about it."""

TRAIN_BYTES = 16
"""For each trained parameter in float32: weight, gradient, and two moments of Adam."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens of one source's rows."""

    text: float  # a byte of text, what the template adds included
    image: float  # a picture
    answer: float  # a byte of answer, the ends of turns included
    error: float  # standard deviation in tokens of a row's length from its prediction
    n: int  # sampled rows


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The whole dataset. Ranges are two standard errors of sampling; of time also the spread of two measured halves."""

    rows: int
    scored_rows: int
    tokens: float  # of all rows, pictures included: what training reads in one epoch
    image_tokens: float
    answer_tokens: float
    margin: float  # of the tokens, relative: 0.05 is 5 percent
    longer: float  # rows longer than --max-length
    seconds: tuple[float, float, float] | None = None  # low, likely, high: scoring with one process on this machine
    disk_bytes: float | None = None
    free_bytes: int = 0  # on the disk of --out
    weights_bytes: int = 0
    memory_bytes: int = 0  # of the device
    train_bytes: int = 0  # weights, gradients and Adam's moments in float32, without activations


def estimate(config: ScoreConfig, vlm: VLM, reading: Reading, measured: Measured | None) -> Estimate:
    scan = reading.scan
    rates = _rates(reading)
    bad = set(scan.without_picture())
    rows = [one for one in scan.rows if one.row not in bad]
    lengths = np.minimum(predicted(rows, rates), reading.max_length)
    scale = scan.scale * _readable(reading)
    seconds = None
    margin = _margin(rows, rates, lengths)
    if measured is not None and measured.parts and measured.scores:
        seconds = _seconds(scan, rates, measured, scale, margin)
    answer_tokens = scale * _answer_tokens(reading, rows, rates)
    return Estimate(
        rows=scan.n_rows,
        scored_rows=round(scale * sum(bool(one.images) for one in rows)),
        tokens=scale * float(lengths.sum()),
        image_tokens=scale * sum(rates[one.source].image * len(one.images) for one in rows),
        answer_tokens=answer_tokens,
        margin=margin,
        longer=scale * float((predicted(rows, rates) > reading.max_length).sum()),
        seconds=seconds,
        disk_bytes=_disk(config, scan, measured, answer_tokens),
        free_bytes=_free_disk(config.out),
        weights_bytes=sum(tensor.nbytes for tensor in vlm.model.parameters()),
        memory_bytes=device_bytes(vlm.device),
        train_bytes=TRAIN_BYTES * vlm.model.num_parameters(),
    )


# ---------------------------------------------------------------- tokens


def _rates(reading: Reading) -> Mapping[str, Rates]:
    """For every source of the scan; those without a sampled row have the rates of all."""
    outlines = {one.row: one for one in reading.scan.rows}
    lines: dict[str, list[tuple[float, float, float, float, float, float]]] = {}
    for read in reading.readable:
        if read.whole is None:
            continue
        one, image = outlines[read.sample.row], read.whole.n_image_tokens
        size = len(read.whole.input_ids)
        line = (one.text, len(one.images), one.answers, size - image, image, len(read.whole.turn))
        lines.setdefault(one.source, []).append(line)
    whole = _rate([line for some in lines.values() for line in some])
    return {one.source: whole for one in reading.scan.rows} | {name: _rate(some) for name, some in lines.items()}


def _rate(lines: Sequence[tuple[float, float, float, float, float, float]]) -> Rates:
    text, images, answers, text_tokens, image_tokens, answer_tokens = np.asarray(lines, np.float64).reshape(-1, 6).T
    per_byte = float(text_tokens.sum() / max(1.0, text.sum()))
    per_image = float(image_tokens.sum() / max(1.0, images.sum()))
    off = text_tokens + image_tokens - per_byte * text - per_image * images
    return Rates(
        text=per_byte,
        image=per_image,
        answer=float(answer_tokens.sum() / max(1.0, answers.sum())),
        error=float(np.sqrt((off**2).sum() / max(1, len(off) - 1))),
        n=len(lines),
    )


def predicted(rows: Sequence[Outline], rates: Mapping[str, Rates]) -> Float64[np.ndarray, " R"]:
    """Tokens of each row if nothing is cut."""
    tokens = [rates[one.source].text * one.text + rates[one.source].image * len(one.images) for one in rows]
    return np.asarray(tokens, dtype=np.float64)


def _answer_tokens(reading: Reading, rows: Sequence[Outline], rates: Mapping[str, Rates]) -> float:
    """Those that the limit leaves of `rows`. Of what lies beyond it, answers have the share that sampled rows show."""
    beyond = [read.whole.is_answer[reading.max_length :] for read in reading.readable if read.whole is not None]
    n_beyond = sum(map(len, beyond))
    share = sum(int(part.sum()) for part in beyond) / n_beyond if n_beyond else 1.0
    answers = np.asarray([rates[one.source].answer * one.answers for one in rows], dtype=np.float64)
    lost = share * np.maximum(0.0, predicted(rows, rates) - reading.max_length)
    return float(np.maximum(0.0, answers - lost).sum())


def _margin(rows: Sequence[Outline], rates: Mapping[str, Rates], lengths: np.ndarray) -> float:
    """Two standard errors of the sum of `lengths`, relative to it."""
    sizes: dict[str, int] = {}
    for one in rows:
        sizes[one.source] = sizes.get(one.source, 0) + 1
    variance = sum((size * rates[name].error) ** 2 / max(1, rates[name].n) for name, size in sizes.items())
    return 2 * math.sqrt(variance) / max(1.0, float(lengths.sum()))


def _readable(reading: Reading) -> float:
    """Share of the rows with sound pictures' files that the encoder and the decoder take."""
    bad = set(reading.scan.without_picture())
    rows = [read for read in reading.rows if read.sample.row not in bad]
    return sum(read.cut is not None for read in rows) / max(1, len(rows))


# ---------------------------------------------------------------- time and disk


def _seconds(
    scan: Scan, rates: Mapping[str, Rates], measured: Measured, scale: float, margin: float
) -> tuple[float, float, float]:
    """Low, likely and high seconds of scoring, for one process with its workers."""
    units = scan.units()
    sharing = measured.way in SHARING
    work = scale * sum(_work(unit, rates, sharing) for unit in units)

    def total(parts: Sequence[int]) -> float:
        timed = [measured.parts[k] for k in parts]
        done = sum(_work(unit, rates, sharing) for one in timed for unit in _regrouped(scan, one.rows))
        model = work * sum(one.model_seconds for one in timed) / max(1.0, done)
        feed = scale * len(units) * sum(one.feed_seconds for one in timed) / max(1, sum(one.n_units for one in timed))
        return max(model, feed / measured.workers) if measured.workers else model + feed

    every = range(len(measured.parts))
    each = [total([k]) for k in every]
    return (1 - margin) * min(each), total(every), (1 + margin) * max(each)


def _work(unit: Sequence[Outline], rates: Mapping[str, Rates], sharing: bool) -> float:
    """Tokens that go through the model for `unit` in one condition."""
    text = sum(rates[one.source].text * one.text for one in unit)
    pictures = rates[unit[0].source].image * len(unit[0].images)
    return text + pictures * (1 if sharing else len(unit))


def _regrouped(scan: Scan, rows: Sequence[Outline]) -> list[list[Outline]]:
    """`rows` by their pictures' content."""
    groups: dict[tuple[str, ...], list[Outline]] = {}
    for one in rows:
        groups.setdefault(tuple(scan.pictures.content.get(key, key) for key in one.images), []).append(one)
    return list(groups.values())


def _disk(config: ScoreConfig, scan: Scan, measured: Measured | None, answer_tokens: float) -> float | None:
    if measured is None or not measured.scores:
        return None
    n_parts = math.ceil(scan.n_rows / config.part_rows)
    return n_parts * measured.part_bytes + answer_tokens * measured.token_bytes


def _free_disk(out: Path) -> int:
    folder = out.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


# ---------------------------------------------------------------- memory


def device_bytes(device: torch.device) -> int:
    """Memory of `device` in all; 0 where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else 0
    except (OSError, ValueError):
        return 0


def parameters(name: str) -> int:
    """Numbers in the weight files of a model folder, from their headers alone; 0 for a model that is not here."""
    folder = Path(resolve_model(name))
    total = 0
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
