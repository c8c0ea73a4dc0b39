"""Where a model looks when it predicts answer tokens: the share of its attention that goes to the picture, by layer.

For layer l and answer token t, the share of a group G of tokens is the mean over heads of the sum over k in G of the
attention weight from position t - 1, which predicts t, to k. The groups share out the whole sequence, so shares add up
to 1: `start` (the first token, which many models use as a sink), `picture`, `text` (other tokens of the prompts, system
prompt and questions), `answers` (answer tokens so far). Only those rows of attention are computed; there are never
whole maps in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from visgain.config import AnalyzeConfig
from visgain.data import Dataset, open_dataset
from visgain.errors import DataError, EncodingError, ImageError, ModelError
from visgain.tables import Line, Table, Z, write_table
from visgain.types import Encoded, Sample
from visgain.vlm.attention import attending
from visgain.vlm.batch import pad_batch
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.pack import placed
from visgain.vlm.template import make_encoder

GROUPS = ("start", "picture", "text", "answers")
WATCHED = "visgain_watched"
"""Name of the attention under which shares are measured."""


@torch.inference_mode()
def attention_shares(vlm: VLM, encoded: Encoded) -> Float64[np.ndarray, "L A G"]:
    """Shares of each layer's attention before each answer token, by group (see the module's description).

    An answer token at position 0, which nothing predicts, is left out. Raises ModelError where attention cannot be
    watched.
    """
    rows = np.flatnonzero(encoded.is_answer[1:])
    group = torch.from_numpy(group_of(encoded, vlm.image_token_id)).to(vlm.device)
    watch = _Watch(rows=torch.from_numpy(rows).to(vlm.device), group=group)
    inputs = {name: placed(value, vlm.model) for name, value in pad_batch([encoded], 0).inputs.items()}
    with _watched(vlm, watch):
        vlm.model.base_model(**inputs, use_cache=False)
    if not watch.shares:
        raise ModelError(f"{vlm.name} does not attend through transformers' attention interface")
    layers = [watch.shares[layer] for layer in sorted(watch.shares)]
    return torch.stack(layers).double().cpu().numpy()


def group_of(encoded: Encoded, image_token_id: int) -> Int64[np.ndarray, " T"]:
    """The number of each token's group in GROUPS."""
    group = np.full(len(encoded.input_ids), GROUPS.index("text"))
    group[encoded.is_answer] = GROUPS.index("answers")
    group[encoded.input_ids == image_token_id] = GROUPS.index("picture")
    if group[0] == GROUPS.index("text"):
        group[0] = GROUPS.index("start")
    return group


def analyze_attention(config: AnalyzeConfig) -> Table:
    """Measure `config.model` on rows of `config.data`, and write the table and the figure to `config.out`."""
    dataset = open_dataset(Path(config.data or ""), config.image_root)
    vlm = load_vlm(
        str(config.model), dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    table = attention_table(vlm, make_encoder(vlm, config.template, config.max_length), dataset, config.rows)
    write_table(config.out, table)
    return table


def attention_table(vlm: VLM, encoder: Encoder, dataset: Dataset, n_rows: int) -> Table:
    """The mean share of the picture by layer, over answer tokens and then over at most `n_rows` rows, evenly spread.

    The table's notes hold the means of all groups, and how many rows were read, measured and could not be. Raises
    DataError if no row can be measured.
    """
    counts = {"rows": 0, "measured": 0, "without a picture": 0, "skipped": 0}
    means: list[np.ndarray] = []
    for row in tqdm(_spread(len(dataset), n_rows), desc="watching attention", unit="row", mininterval=0.5):
        counts["rows"] += 1
        sample = dataset[row]
        if isinstance(sample, Sample) and not sample.images:
            counts["without a picture"] += 1
            continue
        try:
            if not isinstance(sample, Sample):
                raise EncodingError(sample.reason)
            encoded = encoder.encode(sample, [image.open() for image in sample.images])
        except (EncodingError, ImageError):
            counts["skipped"] += 1
            continue
        means.append(attention_shares(vlm, encoded).mean(1))
        counts["measured"] += 1
    if not means:
        raise DataError(f"none of {counts['rows']} rows could be measured: {counts}")
    return _table(np.stack(means), counts)


def _table(shares: Float64[np.ndarray, "N L G"], counts: dict[str, int]) -> Table:
    picture = shares[:, :, GROUPS.index("picture")]
    half = Z * picture.std(0, ddof=1) / np.sqrt(len(picture)) if len(picture) > 1 else None
    mean = picture.mean(0)
    lines = [
        Line(
            label=f"layer {layer}",
            mean=float(mean[layer]),
            low=None if half is None else float(mean[layer] - half[layer]),
            high=None if half is None else float(mean[layer] + half[layer]),
            n=len(picture),
            rows=len(picture),
        )
        for layer in range(len(mean))
    ]
    groups = {name: shares[:, :, i].mean(0).tolist() for i, name in enumerate(GROUPS)}
    return Table(
        name="attention-on-picture",
        title="Attention on the picture by layer",
        unit="share",
        of="rows",
        lines=lines,
        notes={"groups": groups, "counts": counts},
    )


def _spread(n: int, wanted: int) -> list[int]:
    """At most `wanted` of n rows, evenly spread."""
    return [int(row) for row in np.unique(np.linspace(0, n - 1, min(n, wanted)).round())]


# ---------------------------------------------------------------- watching


class _Watch:
    """What is measured in one forward."""

    def __init__(self, rows: Tensor, group: Tensor) -> None:
        self.rows = rows  # query positions [A]
        self.one_hot = torch.nn.functional.one_hot(group, len(GROUPS)).float()  # [T, G]
        self.shares: dict[int, Tensor] = {}  # layer -> [A, G]


_active: _Watch | None = None


@contextmanager
def _watched(vlm: VLM, watch: _Watch) -> Iterator[None]:
    global _active
    _active = watch
    try:
        with attending(vlm.model, WATCHED):
            yield
    finally:
        _active = None


def watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in transformers' calling convention; notes the shares of the active watch."""
    capped = options.get("softcap") is not None  # which scaled-dot-product attention does not know
    forward = eager_attention_forward if capped else sdpa_attention_forward
    attended, _ = forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    layer, watch = getattr(module, "layer_idx", None), _active
    if watch is not None and layer is not None and key.shape[2] == len(watch.one_hot) == query.shape[2]:
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], dim=0).float()
        scores = query[0, :, watch.rows].float() @ keys.transpose(1, 2) * (scaling or query.shape[-1] ** -0.5)
        if capped:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if attention_mask is None:
            positions = torch.arange(key.shape[2], device=scores.device)
            scores = scores.masked_fill(positions > watch.rows[:, None], float("-inf"))
        else:
            scores = scores + attention_mask[0, 0, watch.rows, : key.shape[2]].float()
        watch.shares[layer] = (scores.softmax(-1) @ watch.one_hot).mean(0)
    return attended, None


AttentionInterface.register(WATCHED, watched_attention)
AttentionMaskInterface.register(WATCHED, eager_mask)
