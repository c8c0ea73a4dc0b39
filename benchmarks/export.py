"""How time and memory of `visgain export` grow with the rows, and what a trainer pays to look masks up.

Writes a synthetic dataset in LLaVA's JSON (one question, one picture a row, a few picture files) and a selection of all
its rows, 90 tokens each, and runs exporters on them in a process of their own. Time for a row should stay, and peak
memory should not grow. The masks are then opened as a shim does, and looked up in random order; beside it the same from
JSON lines, the format that needs no reader.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from _results import result_row, write_results
from select_scale import Cost, cost_in_a_fresh_process
from visgain.config import ExportConfig
from visgain.data import open_dataset
from visgain.export.run import run_export
from visgain.export.shims.masks import Masks
from visgain.storage import SELECTION_SCHEMA, list_column, write_selection

TOKENS = 90
WINDOW = 1 << 16
LOOKED_UP = 20_000
PICTURES = 16
COMPARED_ROWS = 100_000
"""Up to so many rows masks are also looked up in JSON lines, which have to be in memory."""


def write_data(folder: Path, n_rows: int) -> None:
    (folder / "images").mkdir(parents=True)
    for k in range(PICTURES):
        Image.new("RGB", (8, 8), (k, k, k)).save(folder / "images" / f"{k}.png")
    with (folder / "data.json").open("w") as file:
        for row in range(n_rows):
            turns = [("human", "<image>\nWhat is in this picture?"), ("gpt", f"Number {row}. " + "word " * 60)]
            talk = [{"from": who, "value": text} for who, text in turns]
            record = {"id": f"{row:09d}", "image": f"images/{row % PICTURES}.png", "conversations": talk}
            file.write(("[\n" if row == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")
    dataset, rng = open_dataset(folder / "data.json"), np.random.default_rng(0)
    tables = (_window(dataset, start, n_rows, rng) for start in range(0, n_rows, WINDOW))
    write_selection(folder / "selection", tables, {})


def _window(dataset: Any, start: int, n_rows: int, rng: np.random.Generator) -> pa.Table:
    rows = np.arange(start, min(start + WINDOW, n_rows))
    length = np.full(len(rows), TOKENS)
    return pa.table(
        [
            pa.array(rows),
            pa.array([f"{row:09d}" for row in rows]),
            pa.array([dataset[row].fingerprint for row in rows]),
            list_column(rng.integers(0, 32_000, len(rows) * TOKENS).astype(np.int32), length),
            list_column(rng.random(len(rows) * TOKENS) < 0.66, length),
        ],
        schema=SELECTION_SCHEMA,
    )


def export_hf(data: Path, out: Path) -> None:
    run_export(ExportConfig(selection=data / "selection", data=data / "data.json", to="hf", out=out))


def export_trl(data: Path, out: Path) -> None:
    run_export(ExportConfig(selection=data / "selection", data=data / "data.json", to="trl", out=out))


def export_llava_json(data: Path, out: Path) -> None:
    run_export(ExportConfig(selection=data / "selection", data=data / "data.json", to="llava-json", out=out))


def look_up(data: Path, out: Path) -> None:
    masks = Masks(data / "hf" / "masks.safetensors")
    for index in random.Random(0).choices(range(len(masks)), k=LOOKED_UP):
        masks.at(index)


def look_up_lines(data: Path, out: Path) -> None:
    with (data / "masks.jsonl").open() as file:
        masks = [json.loads(line) for line in file]
    for index in random.Random(0).choices(range(len(masks)), k=LOOKED_UP):
        masks[index]["token_id"]


EXPORTERS = {"hf": export_hf, "trl": export_trl, "llava-json": export_llava_json}


def write_lines(masks: Masks, path: Path) -> None:
    with path.open("w") as file:
        for index in range(len(masks)):
            mask = masks.at(index)
            record = {"row": mask.row, "token_id": mask.token_id.tolist(), "keep": mask.keep.tolist()}
            file.write(json.dumps(record) + "\n")


def show(what: str, cost: Cost, n_rows: int) -> None:
    per_row = f"{cost.cpu * 1e6 / n_rows:8.1f} us CPU a row"
    print(f"  {what:22}{cost.wall:7.1f} s wall{cost.cpu:7.1f} s CPU{per_row}{cost.peak:8,.0f} MiB at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="sizes, ascending")
    options = parser.parse_args()
    results, first = [], dict[str, tuple[Cost, int]]()
    for n_rows in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch)
            started = time.perf_counter()
            write_data(data, n_rows)
            print(f"{n_rows:,} rows, {n_rows * TOKENS:,} tokens (made in {time.perf_counter() - started:.0f} s)")
            for name, work in EXPORTERS.items():
                cost = cost_in_a_fresh_process(work, data, data / name)
                show(name, cost, n_rows)
                fewest, n_fewest = first.setdefault(name, (cost, n_rows))
                case = f"--to {name}, {n_rows} rows, {n_rows * TOKENS} tokens"
                for metric, ours, baseline in [
                    ("cpu_us_per_row", cost.cpu * 1e6 / n_rows, fewest.cpu * 1e6 / n_fewest),
                    ("peak_mib", cost.peak, fewest.peak),
                ]:
                    results.append(
                        result_row(
                            benchmark="export",
                            case=case,
                            metric=metric,
                            ours=round(ours, 2),
                            baseline=round(baseline, 2),
                            baseline_name=f"{n_fewest} rows",
                        )
                    )
            if n_rows > COMPARED_ROWS:
                continue
            write_lines(Masks(data / "hf" / "masks.safetensors"), data / "masks.jsonl")
            ours, lines = (cost_in_a_fresh_process(work, data, data / "out") for work in (look_up, look_up_lines))
            show("look up, masks", ours, LOOKED_UP)
            show("look up, JSON lines", lines, LOOKED_UP)
            for metric, here, there in [
                ("cpu_s", ours.cpu, lines.cpu),
                ("growth_mib", max(ours.growth, 0.1), lines.growth),
            ]:
                results.append(
                    result_row(
                        benchmark="export",
                        case=f"opening the masks of {n_rows} rows and looking {LOOKED_UP} up",
                        metric=metric,
                        ours=round(here, 3),
                        baseline=round(there, 3),
                        baseline_name="JSON lines, read into memory",
                    )
                )
    print(f"\nwrote {write_results('export', results)}")


if __name__ == "__main__":
    main()
