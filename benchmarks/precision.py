"""What fewer bits cost: gains and selections in 16 and 8 bits against float32, on the embedded world and model.

    python benchmarks/precision.py [--rows 1000] [--keep 70]

`error` is of token gains in nats; `overlap` is the share of tokens, among those that either selection keeps, that both
keep. Weights, states and attention are in the dtype; logits and log-probabilities are float32 always. The baseline of
16 bits leaves the logits in the dtype, as a model's own forward does; that of float8 is bfloat16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from _results import result_row, write_results
from visgain.config import ScoreConfig, SelectConfig, WorldConfig
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import flat_values, list_lengths, read_scores, read_selection
from visgain.world.dataset import write_world

HALF = ("bfloat16", "float16")
BASELINES = {**{dtype: f"{dtype} logits" for dtype in HALF}, "float8": "bfloat16"}


def token_gain(scores: Path) -> np.ndarray:
    table = read_scores(scores, ["nll_seen", "nll_blind"])
    return flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))


def kept_tokens(scores: Path, selection: Path) -> np.ndarray:
    """For every answer token of the multimodal rows, in row order, whether it is kept."""
    table: pa.Table = read_scores(scores, ["row", "nll_seen"])
    lengths = dict(zip(table.column("row").to_pylist(), list_lengths(table.column("nll_seen")).tolist(), strict=True))
    chosen = read_selection(selection)
    kept = dict(zip(chosen.rows.tolist(), chosen.keep, strict=True))
    return np.concatenate([kept.get(row, np.zeros(n, bool))[:n] for row, n in lengths.items() if n])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--keep", type=float, default=70.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = write_world(WorldConfig(out=scratch / "world", rows=options.rows, seed=5))
        gains, kept, tau = {}, {}, {}
        for name in ("float32", *BASELINES, *(f"{dtype} logits" for dtype in HALF)):
            scores, selection = scratch / name, scratch / f"{name}-selection"
            with rounded_logits() if "logits" in name else nullcontext():
                run_score(ScoreConfig(model="embedded", data=data, out=scores, dtype=name.split()[0]))
            run_select(SelectConfig(scores=scores, out=selection, keep=options.keep))
            gains[name] = token_gain(scores)
            kept[name], tau[name] = kept_tokens(scores, selection), read_selection(selection).tau
    exact = gains["float32"]
    print(f"{len(exact)} answer tokens, gain {exact.mean():.3f} +- {exact.std():.3f} nats, tau {tau['float32']:.4f}")
    print(f"{'':18}{'mean error':>12}{'p99':>9}{'largest':>9}{'tau off by':>12}{'overlap':>9}")
    found = {name: compared(gains, kept, tau, name) for name in gains if name != "float32"}
    for name, values in found.items():
        print(
            f"{name:18}"
            + "".join(f"{value:>{w}.5f}" for value, w in zip(values.values(), (12, 9, 9, 12, 9), strict=True))
        )
    rows = [
        result_row(
            benchmark="precision",
            case=f"embedded, {options.rows} rows, keep {options.keep:g}%, {dtype}",
            metric=metric,
            ours=value,
            baseline=found[baseline][metric],
            baseline_name=baseline,
            ratio=value / found[baseline][metric] if metric == "kept_tokens_overlap" else None,
        )
        for dtype, baseline in BASELINES.items()
        for metric, value in found[dtype].items()
    ]
    print(f"\nwrote {write_results('precision', rows)}")


def compared(
    gains: dict[str, np.ndarray], kept: dict[str, np.ndarray], tau: dict[str, float], name: str
) -> dict[str, float]:
    error = np.abs(gains[name] - gains["float32"])
    return {
        "gain_error_mean_nats": float(error.mean()),
        "gain_error_p99_nats": float(np.quantile(error, 0.99)),
        "gain_error_max_nats": float(error.max()),
        "tau_error_nats": abs(tau[name] - tau["float32"]),
        "kept_tokens_overlap": float((kept[name] & kept["float32"]).sum() / (kept[name] | kept["float32"]).sum()),
    }


@contextmanager
def rounded_logits() -> Iterator[None]:
    """Let the output head compute in the model's dtype."""
    with (
        patch("visgain.vlm.forward.float32_head", lambda head: nullcontext()),
        patch("visgain.vlm.logits.float32_head", lambda head: nullcontext()),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
