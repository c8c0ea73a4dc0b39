"""Does the work divide, and what does a death cost? 1, 2 and 4 processes in one folder, and Ray with a worker killed.

The embedded model scores the same conversations with one thread a process. Wall seconds are from the command to its
end; scoring seconds from the plan to the last part, without the seconds that each process takes to load libraries and
the model; CPU seconds are those of all processes together. In the last case one of Ray's two workers is killed with
half of the parts done. All results must be equal. Other work on the machine makes wall seconds worthless: the load
beside them should be below the number of processes. Run as `python benchmarks/ranks.py [--rows N]`.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from _results import result_row, write_results
from visgain.config import WorldConfig
from visgain.storage import read_scores
from visgain.world.dataset import write_world

PROCESSES = (1, 2, 4)
N_PARTS = 24


@dataclass(frozen=True, kw_only=True)
class Cost:
    wall: float  # seconds
    scoring: float  # seconds of them from the plan to the last part
    cpu: float  # seconds of all processes; Ray's own servers and workers are not among them
    load: float  # of the machine before the start
    lost: int = 0  # parts begun by the worker that was killed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(scratch), options.rows)


def measure(scratch: Path, n_rows: int) -> int:
    write_world(WorldConfig(out=scratch / "world", rows=n_rows, seed=7))
    command = [sys.executable, "-m", "visgain", "score", "--model", "embedded", "--data"]
    command += [str(scratch / "world/data.json"), "--workers", "0", "--part-rows", str(-(-n_rows // N_PARTS))]
    costs: dict[str, Cost] = {}
    for n in PROCESSES:
        out = scratch / f"{n} processes"
        ranks = [{"RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(n)} for k in range(n)]
        costs[out.name] = cost(command, out, ranks)
    # Ray's workers would be nice to everybody else on the machine, the other processes are not.
    ray = [{"RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}]
    out = scratch / "Ray"
    costs[out.name] = cost([*command, "--backend", "ray"], out, ray)
    out = scratch / "Ray, a worker killed"
    costs[out.name] = cost([*command, "--backend", "ray"], out, ray, kill_a_worker)

    reference = read_scores(scratch / "1 processes")
    equal = {name: read_scores(scratch / name).equals(reference) for name in costs}
    print(f"\n{n_rows} rows in {N_PARTS} parts, {os.cpu_count()} cores\n")
    print(f"{'':24}{'wall s':>8}{'scoring s':>11}{'times':>7}{'CPU s':>8}{'load before':>13}  result")
    base = costs["1 processes"]
    for name, one in costs.items():
        cpu = f"{one.cpu:8.1f}" if "Ray" not in name else f"{'':8}"
        result = "equal" if equal[name] else "ANOTHER"
        times = base.scoring / one.scoring
        print(f"{name:24}{one.wall:8.1f}{one.scoring:11.1f}{times:7.2f}{cpu}{one.load:13.1f}  {result}")
    print(f"parts that the killed worker had begun: {costs['Ray, a worker killed'].lost} of {N_PARTS}")
    if max(one.load for one in costs.values()) > (os.cpu_count() or 1):
        print("the machine was busy with other work: the times say little")

    rows = [
        result_row(
            benchmark="ranks",
            case=f"{name}, {n_rows} rows; load {one.load:.1f}; {'equal' if equal[name] else 'ANOTHER'} result",
            metric=f"{quantity}_s",
            ours=round(getattr(one, quantity), 2),
            baseline=round(getattr(base, quantity), 2),
            baseline_name=f"1 process; load {base.load:.1f}",
        )
        for name, one in costs.items()
        for quantity in (("wall", "scoring") if "Ray" in name else ("wall", "scoring", "cpu"))
    ]
    lost = costs["Ray, a worker killed"].lost
    rows.append(
        result_row(
            benchmark="ranks",
            case="Ray, a worker killed",
            metric="parts_scored_again",
            ours=lost,
            baseline=N_PARTS,
            baseline_name="all parts",
            ratio=N_PARTS / max(1, lost),
        )
    )
    print(f"\nwrote {write_results('ranks', rows)}")
    return 0 if all(equal.values()) else 1


def cost(
    command: Sequence[str],
    out: Path,
    environments: Sequence[dict[str, str]],
    disturb: Callable[[Path], int] | None = None,
) -> Cost:
    """Run `command` into `out`, once for each of `environments` at the same time; `disturb` says how much it broke."""
    load = os.getloadavg()[0]
    print(f"{out.name} ...", file=sys.stderr, flush=True)
    cpu, wall = children_seconds(), time.perf_counter()
    processes = [
        subprocess.Popen(
            [*command, "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for environment in environments
    ]
    lost = disturb(out) if disturb is not None else 0
    for process in processes:
        _, error = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(error.decode())
    wall, cpu = time.perf_counter() - wall, children_seconds() - cpu
    last = max(path.stat().st_mtime for path in out.glob("part-*.parquet"))
    return Cost(wall=wall, scoring=last - (out / "run.json").stat().st_mtime, cpu=cpu, load=load, lost=lost)


def children_seconds() -> float:
    """CPU seconds of all processes that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def kill_a_worker(out: Path) -> int:
    """Kill a process that works in `out` when half of the parts are done; returns how many parts it had begun."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if len(list(out.glob("part-*.parquet"))) >= N_PARTS // 2 and (claims := claimed_parts(out)):
            pid, parts = claims.popitem()
            os.kill(pid, signal.SIGKILL)
            return sum(not list(out.glob(f"{part}-of-*.parquet")) for part in parts)
        time.sleep(0.01)
    raise RuntimeError(f"no worker to kill in {out}")


def claimed_parts(out: Path) -> dict[int, list[str]]:
    """Process -> the parts that it holds a lock on, of those that are not written yet. Linux only."""
    names = {path.stat().st_ino: path.stem for path in (out / ".locks").glob("part-*.lock")}
    claims: dict[int, list[str]] = defaultdict(list)
    for line in Path("/proc/locks").read_text().splitlines():
        # 1: FLOCK  ADVISORY  WRITE 12345 fe:00:6789 0 EOF
        pid, inode = line.split()[4:6]
        name = names.get(int(inode.rpartition(":")[2]))
        if name is not None:
            claims[int(pid)].append(name)
    return claims


if __name__ == "__main__":
    sys.exit(main())
