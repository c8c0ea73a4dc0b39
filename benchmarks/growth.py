"""Growth of scoring: time must be linear in the rows, and memory flat.

    python benchmarks/growth.py [--rows 1000 10000 100000]

Five conversations of the embedded world a picture, the embedded model, one process of its own for each size. Time is
the CPU's, so that other work on the machine does not show in it; the seconds that loading takes are in all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _results import result_row, write_results
from visgain.config import WorldConfig
from visgain.world.dataset import write_world

ROWS_A_PICTURE = 5


def write_rows(world: Path, data: Path, n_rows: int) -> None:
    """`n_rows` rows about the pictures of `world`: each picture with the conversations of its neighbours too."""
    rows = json.loads((world / "data.json").read_text())
    n_pictures = n_rows // ROWS_A_PICTURE
    with data.open("w") as file:
        for number in range(n_rows):
            picture, talk = rows[number % n_pictures], rows[number * 7 % len(rows)]
            file.write(json.dumps({**talk, "id": str(number), "image": picture["image"]}) + "\n")


def score(data: Path, images: Path, out: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident MiB of one `visgain score`."""
    command = [sys.executable, "-m", "visgain", "score", "--model", "embedded", "--data", str(data)]
    command += ["--image-root", str(images), "--out", str(out), "--workers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "visgain score failed"
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        pictures = max(options.rows) // ROWS_A_PICTURE
        write_world(WorldConfig(out=scratch / "world", split="align", rows=int(pictures * 1.1), seed=9))
        rows = [row for row in json.loads((scratch / "world" / "data.json").read_text()) if "image" in row]
        (scratch / "world" / "data.json").write_text(json.dumps(rows))
        print(f"{'rows':>10}{'wall s':>9}{'CPU s':>9}{'CPU ms a row':>14}{'peak MiB':>10}")
        for n_rows in options.rows:
            write_rows(scratch / "world", scratch / "data.jsonl", n_rows)
            wall, cpu, peak = score(scratch / "data.jsonl", scratch / "world", scratch / f"scores-{n_rows}")
            measured.append((n_rows, cpu, peak))
            print(f"{n_rows:>10,}{wall:>9.1f}{cpu:>9.1f}{1e3 * cpu / n_rows:>14.2f}{peak:>10.0f}", flush=True)
    first, smallest = measured[0], f"{measured[0][0]} rows"
    results = [
        result_row(
            benchmark="growth", case=f"{n} rows", metric=metric, ours=ours, baseline=base, baseline_name=smallest
        )
        for n, cpu, peak in measured[1:]
        for metric, ours, base in (
            ("cpu_ms_per_row", 1e3 * cpu / n, 1e3 * first[1] / first[0]),
            ("peak_mib", peak, first[2]),
        )
    ]
    print(f"\nwrote {write_results('growth', results)}")


if __name__ == "__main__":
    sys.exit(main())
