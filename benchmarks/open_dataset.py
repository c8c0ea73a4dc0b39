"""Opening a dataset of many rows: the first time, when it is indexed, and the second, when the index is there.

    python benchmarks/open_dataset.py [--rows 1_000_000]

Writes JSON lines of LLaVA form (about 270 bytes a row), and opens them in processes of their own: CPU time, which other
processes disturb less, and peak memory (beside that of importing visgain) of `open_dataset` with its fingerprint.
Compared with `json.loads` of every line, which is what a reader without an index does each time. Where that does not
fit the memory, `--no-baseline` leaves it out and compares with the first opening. Also prints how long it takes to read
1,000 rows from anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from _results import result_row, write_results

_TOLD = """
import json, random, resource, sys, time
from pathlib import Path
import visgain, visgain.data.jsontext, visgain.data.messages, visgain.data.llava
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin, cpu = time.perf_counter(), time.process_time()
{work}
print(json.dumps({{"seconds": time.process_time() - cpu, "wall": time.perf_counter() - begin,
                   "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}}))
"""

OPEN = "dataset = visgain.open_dataset(Path(sys.argv[1])); dataset.fingerprint"
READ = f"""{OPEN}
draw = random.Random(0)
begin, cpu = time.perf_counter(), time.process_time()
for _ in range(1000):
    dataset[draw.randrange(len(dataset))]
"""
LOAD = "rows = [json.loads(line) for line in Path(sys.argv[1]).open(encoding='utf-8')]"


def write_rows(path: Path, n_rows: int) -> None:
    words = ["a", "kettle", "stands", "on", "the", "red", "table", "beside", "two", "cups"]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(n_rows):
            answer = " ".join(draw.choices(words, k=12))
            turns = [
                {"from": "human", "value": "<image>\nWhat is on the table?"},
                {"from": "gpt", "value": answer},
            ]
            record = {"id": f"{row:012d}", "image": f"coco/train/{row:012d}.jpg", "conversations": turns}
            file.write(json.dumps(record) + "\n")
    os.utime(path, (0, 0))


def measure(work: str, path: Path, cache: Path) -> tuple[float, float, float]:
    """CPU seconds, peak MiB and wall seconds of `work` in a process of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", _TOLD.format(work=work), str(path)]
    told = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    return told["seconds"], told["mib"], told["wall"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where there is room for the file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        data, cache = Path(name) / "data.jsonl", Path(name) / "cache"
        write_rows(data, options.rows)
        print(f"{options.rows:,} rows, {data.stat().st_size / 1e9:.2f} GB")
        first = measure(OPEN, data, cache)
        second = measure(OPEN, data, cache)
        read = measure(READ, data, cache)
        index = sum(file.stat().st_size for file in (cache / "visgain").iterdir())
        loaded = first if options.no_baseline else measure(LOAD, data, cache)
    against = "first opening" if options.no_baseline else "json.loads of every line"
    for what, (seconds, mib, wall) in (("first", first), ("second", second), (against, loaded)):
        print(f"{what:>26}: {seconds:9.3f} s of CPU {wall:9.3f} s {mib:9.1f} MiB")
    print(f"{'index':>26}: {index / 2**20:9.1f} MiB on disk; 1,000 rows from anywhere in {1e3 * read[0]:.0f} ms")
    case = f"{options.rows} rows"
    rows = [
        result_row(
            benchmark="open_dataset", case=f"{case}, {opening}", metric=metric, ours=ours, baseline=base,
            baseline_name=against,
        )
        for opening, measured in (("first opening", first), ("second opening", second))
        for metric, ours, base in zip(("cpu_seconds", "peak_mib"), measured[:2], loaded[:2], strict=True)
        if not (options.no_baseline and opening == "first opening")
    ]  # fmt: skip
    print(f"\nwrote {write_results('open_dataset', rows)}")


if __name__ == "__main__":
    main()
