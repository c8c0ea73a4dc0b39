"""Which counterfactual finds the tokens that need the picture? AUROC of token gain against the world's ground truth.

The embedded model scores the same conversations under every counterfactual. Besides the AUROC over all answer tokens,
the table gives the mean gain in nats of each sort of visual word and of the rest, which shows *what* a counterfactual
hides: a blur that leaves coarse colours standing gives colour words no gain.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from _results import result_row, write_results
from visgain.analysis.truth import auroc, read_truth, token_truth
from visgain.config import ScoreConfig, WorldConfig
from visgain.counterfactuals import parse_condition
from visgain.scoring.run import run_score
from visgain.storage import flat_values, list_lengths, read_scores
from visgain.world.dataset import write_world
from visgain.world.evaluate import SORTS

CASES = (
    *(f"blur:sigma={sigma}" for sigma in (0.02, 0.05, 0.1, 0.2, 0.4, 1.0)),
    "mean",
    *(f"noise:step={step}" for step in (250, 500, 750, 999)),
    *(f"shuffle:grid={grid}" for grid in (3, 6, 12)),
    "swap",
    "drop",
    "mask",
)
BASELINE = "mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="worlds to average over")
    parser.add_argument("--cases", nargs="+", default=CASES, help="which, the baseline among them; not all are kept")
    options = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            world = Path(scratch) / f"world-{seed}"
            write_world(WorldConfig(out=world, split="train", rows=options.rows, seed=1000 + seed))
            for case in options.cases:
                out = Path(scratch) / f"{seed}-{case}"
                run_score(ScoreConfig(model=options.model, data=world / "data.json", out=out, counterfactual=case))
                for metric, value in measure(out, world).items():
                    measured[case][metric].append(value)
    table = {case: {metric: float(np.mean(values)) for metric, values in m.items()} for case, m in measured.items()}
    spread = {case: float(np.std(m["AUROC"], ddof=1)) if options.seeds > 1 else 0.0 for case, m in measured.items()}
    print_table(table, spread)
    rows = [
        result_row(
            benchmark="counterfactuals",
            case=parse_condition(case).spec,
            metric=metric,
            ours=value,
            baseline=table[BASELINE][metric],
            baseline_name=BASELINE,
            ratio=value / table[BASELINE][metric],
        )
        for case, metrics in table.items()
        for metric, value in metrics.items()
        if metric == "AUROC"
    ]
    if options.cases == CASES:
        write_results("counterfactuals", rows)


def measure(scores: Path, world: Path) -> dict[str, float]:
    """AUROC, and the mean gain in nats of each sort of visual word and of all other tokens."""
    table = read_scores(scores)
    gain, visual = token_truth(table, read_truth(world / "truth.jsonl"))
    words = np.asarray(token_words(table, world))
    result = {"AUROC": auroc(gain, visual)}
    for sort in ("colour", "content", "size", "place", "count", "existence", "relation"):
        chosen = visual & np.isin(words, sorted(SORTS[sort]))
        result["kind" if sort == "content" else sort] = float(gain[chosen].mean())
    result["other"] = float(gain[~visual].mean())
    return result


def token_words(table, world: Path) -> list[str]:
    """The text of every scored token, in the order of `token_truth`."""
    multimodal = table.filter(table.column("gain").is_valid())
    data = json.loads((world / "data.json").read_text())
    columns = {name: flat_values(multimodal.column(name)) for name in ("turn", "char_start", "char_end")}
    rows = np.repeat(multimodal.column("row").to_numpy(), list_lengths(multimodal.column("token_id")))
    return [
        data[row]["conversations"][2 * turn + 1]["value"][start:end].strip().lower()
        for row, turn, start, end in zip(rows, *columns.values(), strict=True)
    ]


def print_table(table: dict[str, dict[str, float]], spread: dict[str, float]) -> None:
    metrics = list(next(iter(table.values())))
    print(f"| counterfactual | {' | '.join(metrics)} |")
    print("|---|" + "---:|" * len(metrics))
    for case, values in table.items():
        cells = [f"{value:.3f}" if name == "AUROC" else f"{value:+.2f}" for name, value in values.items()]
        cells[0] += f" ± {spread[case]:.3f}"
        print(f"| {case} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
