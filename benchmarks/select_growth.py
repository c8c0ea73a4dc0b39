"""How time and memory of `visgain select` and `visgain report` grow with the number of rows.

Writes synthetic scores of 10 thousand, 100 thousand and a million rows (those of select_scale.py), and runs each verb
on them in a process of its own. Time for a row should stay, and peak memory should not grow once there is more data
than fits the buffers. Up to a million rows, selecting is compared with the same rule on whole columns in memory: it
must keep the same tokens. Larger runs fit the disk with fewer tokens, e.g.
`python benchmarks/select_growth.py --rows 100_000_000 --tokens 3 --part-rows 65536`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from _results import machine, result_row, write_results
from select_scale import KEEP, PART_ROWS, TOKENS_PER_ROW, Cost, Work, cost_in_a_fresh_process, select, write_scores
from visgain.config import ReportConfig, SelectConfig
from visgain.report.html import write_report
from visgain.rules import kept_count
from visgain.selection import run_select
from visgain.storage import (
    SELECTION_SCHEMA,
    flat_values,
    list_column,
    list_lengths,
    read_scores,
    read_selection_table,
    write_selection,
)

COMPARED_ROWS = 1_000_000
"""Up to so many rows the rule is also applied in memory."""


def select_random(scores: Path, out: Path) -> None:
    run_select(SelectConfig(scores=scores, out=out, keep=KEEP, by="random"))


def select_tokens(scores: Path, out: Path) -> None:
    run_select(SelectConfig(scores=scores, out=out, keep=KEEP, keep_tokens=50, end_of_turn="keep"))


def report(scores: Path, out: Path) -> None:
    write_report(ReportConfig(scores=scores, out=out / "report.html", selection=out))


VERBS: dict[str, Work] = {
    "select --by random": select_random,
    "select --keep-tokens 50 --end-of-turn keep": select_tokens,
    "select": select,
    "report": report,  # of the selection before it
}


def select_in_memory(scores: Path, out: Path) -> None:
    """The paper's rule on whole columns."""
    table = read_scores(scores, ["row", "id", "fingerprint", "n_images", "gain", "token_id", "nll_seen", "nll_blind"])
    multimodal = table.column("n_images").to_numpy() > 0
    length = list_lengths(table.column("token_id"))
    gains = table.column("gain").to_numpy()
    place = int(multimodal.sum()) - kept_count(int(multimodal.sum()), KEEP)
    tau = np.partition(gains[multimodal], place)[place]
    kept = ~multimodal | (gains >= tau)
    keep = np.repeat(kept, length)
    token_gain = flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))
    keep[np.repeat(multimodal, length)] &= token_gain >= np.float64(tau)
    inside = np.repeat(kept, length)
    lists = [list_column(v[inside], length[kept]) for v in (flat_values(table.column("token_id")), keep)]
    rows = table.select(["row", "id", "fingerprint"]).filter(pa.array(kept))
    selected = pa.table([*rows.columns, *lists], schema=SELECTION_SCHEMA)
    write_selection(out, [selected], {"tau": float(tau), "token_tau": float(tau), "keep_percent": KEEP})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes, ascending")
    parser.add_argument("--tokens", type=int, default=TOKENS_PER_ROW, help="answer tokens of a row, on average")
    parser.add_argument("--part-rows", type=int, default=PART_ROWS, help="rows of a part")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--scratch", type=Path, help="folder for the scores (about 8 bytes a token and 40 a row)")
    options = parser.parse_args()
    default = (parser.get_default("rows"), TOKENS_PER_ROW) == (options.rows, options.tokens)
    measured, equal = [], True
    for n_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            rows, same = measure(Path(scratch), n_rows, options)
        measured += rows
        equal &= same
    name = machine() if default else f"{options.rows[-1]}x{options.tokens}-{machine()}"
    print(f"\nwrote {write_results('select_growth', with_growth(measured), name)}")
    return 0 if equal else 1


def measure(scratch: Path, n_rows: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Costs of each verb on `n_rows` rows, and whether selecting part by part keeps what selecting in memory keeps."""
    tokens = write_scores(scratch / "scores", n_rows, options.tokens, options.part_rows)
    size = sum(path.stat().st_size for path in (scratch / "scores").iterdir())
    print(f"{n_rows:,} rows, {tokens:,} tokens, {size / 1e9:.2f} GB", flush=True)
    case = {"rows": n_rows, "tokens": tokens}
    measured = []
    for verb in options.verbs:
        cost = cost_in_a_fresh_process(VERBS[verb], scratch / "scores", scratch / "selection")
        measured.append({**case, "verb": verb, "cost": cost})
        show(verb, cost, n_rows)
    if n_rows > COMPARED_ROWS or "select" not in options.verbs:
        return measured, True
    in_memory = cost_in_a_fresh_process(select_in_memory, scratch / "scores", scratch / "in-memory")
    show("the same in memory", in_memory, n_rows)
    select(scratch / "scores", scratch / "selection")
    same = read_selection_table(scratch / "selection").equals(read_selection_table(scratch / "in-memory"))
    print(f"  same selection: {same}")
    next(row for row in measured if row["verb"] == "select")["baseline"] = (in_memory, same)
    return measured, same


def show(verb: str, cost: Cost, n_rows: int) -> None:
    seconds = f"{cost.wall:7.1f} s wall{cost.cpu:7.1f} s CPU{cost.cpu * 1e6 / n_rows:8.2f} us CPU a row"
    print(f"  {verb:43}{seconds}{cost.peak:8,.0f} MiB at most", flush=True)


def with_growth(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Result rows: selecting beside selecting in memory, and each verb beside itself on the fewest rows."""
    rows = []
    for one in measured:
        case = f"{one['verb']}, {one['rows']} rows, {one['tokens']} tokens"
        first = next(other for other in measured if other["verb"] == one["verb"])
        beside = [(first["cost"], f"{first['rows']} rows", first["rows"])]
        if "baseline" in one:
            in_memory, same = one["baseline"]
            beside.append((in_memory, f"whole columns in memory, {'equal' if same else 'ANOTHER'} result", one["rows"]))
        for cost, name, n_rows in beside:
            for metric, ours, baseline in [
                ("wall_us_per_row", one["cost"].wall * 1e6 / one["rows"], cost.wall * 1e6 / n_rows),
                ("cpu_us_per_row", one["cost"].cpu * 1e6 / one["rows"], cost.cpu * 1e6 / n_rows),
                ("peak_mib", one["cost"].peak, cost.peak),
            ]:
                rows.append(
                    result_row(
                        benchmark="select_growth",
                        case=case,
                        metric=metric,
                        ours=round(ours, 3),
                        baseline=round(baseline, 3),
                        baseline_name=name,
                    )
                )
    return rows


if __name__ == "__main__":
    sys.exit(main())
