"""A small scored dataset on disk: drawn pictures, a LLaVA file, scores, and a selection if asked for."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from visgain import storage
from visgain.config import ExportConfig, SelectConfig
from visgain.data import open_dataset
from visgain.selection import run_select
from visgain.types import Sample, Skipped, TokenScores

EVIL = "<script>alert('x')</script> & \"red\""


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


def records() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "id": f"c{k}",
            "image": f"{('coco', 'vg')[k % 2]}/{k}.png",
            "conversations": conversation("<image>\nWhat is it?", f"A {color} ball on the grass."),
        }
        for k, color in enumerate(["red", "blue", "red", "green", "blue", "red", "blue", "green"])
    ]
    rows.append({"id": "t", "conversations": conversation("Capital of France?", "Paris.")})
    rows.append({"id": "evil", "image": "coco/0.png", "conversations": conversation("<image>\n<b>Q</b>?", EVIL)})
    rows.append(
        {
            "id": "two",
            "image": ["coco/0.png", "vg/1.png"],
            "conversations": conversation(
                "<image>\n<image>\nCompare [bold]them[/bold].", "One is\nred.", "Sure?", "Yes"
            ),
        }
    )
    rows.append({"id": "gone", "image": "coco/gone.png", "conversations": conversation("<image>\nWhat?", "No idea.")})
    return rows


def token_spans(text: str) -> list[tuple[int, int]]:
    """Words with the space in front of them, punctuation apart, long words in two, and the end of turn."""
    spans = []
    for match in re.finditer(r" ?\w+|\s|[^\w\s]", text):
        middle = (match.start() + match.end()) // 2
        cut = [middle] if match.end() - match.start() > 5 else []
        edges = [match.start(), *cut, match.end()]
        spans += list(pairwise(edges))
    return [*spans, (len(text), len(text))]


def score(sample: Sample, rng: np.random.Generator) -> TokenScores:
    answers = [token_spans(answer) for answer in sample.answers]
    turn = np.array([k for k, spans in enumerate(answers) for _ in spans], dtype=np.int32)
    chars = np.array([span for spans in answers for span in spans], dtype=np.int32)
    n_scored = len(turn) if sample.images else 0
    seen = rng.gamma(1.0, 1.0, n_scored).astype(np.float32)
    return TokenScores(
        row=sample.row,
        id=sample.id,
        fingerprint=sample.fingerprint,
        source=sample.source,
        n_images=len(sample.images),
        n_image_tokens=4 * len(sample.images),
        n_prompt_tokens=20,
        truncated=False,
        token_id=rng.integers(0, 999, len(turn)).astype(np.int32),
        turn=turn,
        chars=chars,
        nll_seen=seen,
        nll_blind=(seen + rng.normal(0.4, 1.0, n_scored)).astype(np.float32),
    )


def write_dataset(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for row in records():
        images = row.get("image", [])
        for name in [images] if isinstance(images, str) else images:
            if "gone" not in name:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)).save(path)
    path = folder / "data.json"
    path.write_text(json.dumps(records()))
    return path


def with_image_gains(scored: TokenScores) -> TokenScores:
    """Each image a tenth of a nat more than the one before, at every token."""
    nlls = [scored.nll_seen + np.float32(k / 10) for k in range(1, scored.n_images + 1)]
    return replace(scored, nll_blind_image=tuple(nlls))


def write_scores(
    folder: Path, data: Path, counterfactual: str = "blur:sigma=0.1", *, per_image: bool = False
) -> list[TokenScores]:
    """Score every row with drawn numbers; the row without its picture is skipped. Returns the scored rows."""
    dataset = open_dataset(data, data.parent, max_pixels=1_000_000, follow_links=False)
    rng = np.random.default_rng(1)
    scored: list[TokenScores] = []
    lines: list[TokenScores | Skipped] = []
    for row in range(len(dataset)):
        sample = dataset[row]
        assert isinstance(sample, Sample)
        if sample.id == "gone":
            reason = "image coco/gone.png does not exist"
            lines.append(Skipped(row=row, id="gone", reason=reason, source=sample.source, n_images=1))
            continue
        scored.append(with_image_gains(score(sample, rng)) if per_image else score(sample, rng))
        lines.append(scored[-1])
    identity = {"model": "tiny <model>", "counterfactual": counterfactual, "template": "auto", "seed": 3}
    run = {"n_parts": 2, "n_rows": len(lines), "data": str(data), "image_root": str(data.parent), "max_pixels": 10**6}
    identity |= {"per_image": True} if per_image else {}
    storage.claim_run(folder, identity, {**run, "follow_links": False, "versions": {"visgain": "9.9"}})
    schema = storage.PER_IMAGE_SCHEMA if per_image else storage.SCORE_SCHEMA
    storage.write_part(folder, 0, 2, storage.score_table(lines[:5], schema))
    storage.write_part(folder, 1, 2, storage.score_table(lines[5:], schema))
    return scored


def write_selection(folder: Path, scored: list[TokenScores], tau: float) -> None:
    """The paper's rule at a given tau: rows and tokens that reach it, and text-only rows whole."""
    kept = []
    for row in scored:
        if len(row.nll_seen) and row.mean_gain < tau:
            continue
        keep = row.gain >= tau if len(row.nll_seen) else np.ones(len(row.token_id), dtype=bool)
        kept.append(
            {"row": row.row, "id": row.id, "fingerprint": row.fingerprint, "token_id": row.token_id, "keep": keep}
        )
    table = pa.Table.from_pylist(kept, schema=storage.SELECTION_SCHEMA)
    record = {"rule": "sample+token", "keep_percent": 70.0, "tau": tau, "token_tau": tau}
    storage.write_selection(folder, [table], record)


def to_export(folder: Path, to: str) -> ExportConfig:
    """A dataset, its scores, a selection, and the options that export it."""
    data = write_dataset(folder / "data")
    write_scores(folder / "scores", data)
    run_select(SelectConfig(scores=folder / "scores", out=folder / "selection"))
    return ExportConfig(selection=folder / "selection", data=data, to=to, out=folder / "out")


def softened(config: ExportConfig, folder: Path) -> ExportConfig:
    """What `to_export` made, with soft weights."""
    scores = config.selection.parent / "scores"
    run_select(SelectConfig(scores=scores, out=folder / "selection", weights="clamp:low=1,high=5,window=3"))
    return replace(config, selection=folder / "selection", out=folder / "out")


def selected(config: ExportConfig) -> list[dict[str, Any]]:
    """The rows of the selection, as the file has them."""
    return storage.read_selection_table(config.selection).to_pylist()
