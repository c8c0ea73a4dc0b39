"""Any number of processes in one folder, however they end: every part once, and the numbers of a single run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ranks import Runner, holder, runners, times_written
from visgain.config import ScoreConfig
from visgain.scoring.claims import Rank, alone, claim
from visgain.scoring.run import run_score

N_PARTS = 12


@pytest.fixture(scope="session")
def whole(blank_model: Path, small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of one process from start to end."""
    out = tmp_path_factory.mktemp("whole")
    run_score(ScoreConfig(model=str(blank_model), data=small_world / "data.json", out=out, part_rows=5, workers=0))
    assert len(list(out.glob("part-*"))) == N_PARTS
    return out


@pytest.fixture
def arguments(blank_model: Path, small_world: Path, tmp_path: Path) -> list[str]:
    """`visgain score` into tmp_path/out in twelve parts."""
    named = {"model": blank_model, "data": small_world / "data.json", "out": tmp_path / "out", "part-rows": 5}
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return ["score", *options, "--workers", "0"]


def tables(folder: Path) -> dict[str, object]:
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))}


def assert_same_parts(one: Path, other: Path) -> None:
    """To the last bit, file by file."""
    found, expected = tables(one), tables(other)
    assert found.keys() == expected.keys()
    assert all(found[name].equals(expected[name]) for name in expected)
    assert not list(one.glob("*.tmp*"))
    assert (one / "skipped.jsonl").read_text() == (other / "skipped.jsonl").read_text()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


# ---------------------------------------------------------------- locks


def test_a_part_has_one_holder_at_a_time(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    lock = claim(tmp_path, 3)
    assert lock is not None
    assert claim(tmp_path, 3) is None
    other = claim(tmp_path, 4)
    assert other is not None
    lock.release()
    again = claim(tmp_path, 3)
    assert again is not None
    again.release()
    other.release()


def test_a_part_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    process = holder(tmp_path, 0)
    assert not is_free(tmp_path, 0)
    process.kill()
    process.join()
    assert is_free(tmp_path, 0)


def is_free(folder: Path, part: int) -> bool:
    lock = claim(folder, part)
    if lock is not None:
        lock.release()
    return lock is not None


def test_only_one_is_alone_and_the_next_one_waits(tmp_path: Path) -> None:
    events: list[str] = []

    def enter(name: str, pause: float) -> None:
        with alone(tmp_path / "new" / "folder", "run"):
            events.append(f"{name} enters")
            time.sleep(pause)
            events.append(f"{name} leaves")

    first = threading.Thread(target=enter, args=("first", 0.3))
    first.start()
    wait_until(lambda: events)
    enter("second", 0)
    first.join()
    assert events == ["first enters", "first leaves", "second enters", "second leaves"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(number=3, world=8, local=1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"}, Rank(number=5, world=6, local=2)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "2"},
            Rank(number=0, world=2, local=0),
        ),
        ({"RANK": "1"}, Rank()),
    ],
)
def test_a_rank_is_what_the_launcher_says(
    environment: dict[str, str], expected: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == expected


# ---------------------------------------------------------------- sharing the work


def test_two_processes_share_the_parts_and_write_each_once(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    with runners(tmp_path, pause=0.3) as start:
        both = [start(arguments), start(arguments)]
        assert [runner.exit_code() for runner in both] == [0, 0]
        assert times_written(tmp_path / "notes.txt") == dict.fromkeys(range(N_PARTS), 1)
        assert all(runner.parts() for runner in both)
    assert_same_parts(tmp_path / "out", whole)


def ranks(n: int) -> list[dict[str, str]]:
    return [{"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)} for rank in range(n)]


def test_ranks_begin_at_different_parts_and_leave_none_out(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    with runners(tmp_path, pause=0.3) as start:
        both = [start(arguments, environment) for environment in ranks(2)]
        assert [runner.exit_code() for runner in both] == [0, 0]
        assert times_written(tmp_path / "notes.txt") == dict.fromkeys(range(N_PARTS), 1)
        assert both[1].parts()[0] >= N_PARTS // 2, "half of what the other has left"
    assert_same_parts(tmp_path / "out", whole)


@pytest.mark.slow
def test_torchrun_starts_ranks_that_share_the_work(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "visgain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_parts(tmp_path / "out", whole)


def test_a_killed_process_costs_what_it_was_at_and_the_others_finish(
    whole: Path, arguments: list[str], tmp_path: Path
) -> None:
    with runners(tmp_path, pause=0.3) as start:
        first, second = (start(arguments, environment) for environment in ranks(2))
        wait_until(lambda: len(first.parts()) >= 2)
        first.kill()
        assert second.exit_code() == 0
        assert times_written(tmp_path / "notes.txt") == dict.fromkeys(range(N_PARTS), 1)
    assert_same_parts(tmp_path / "out", whole)


def test_nothing_of_a_killed_process_keeps_its_parts(arguments: list[str], tmp_path: Path) -> None:
    with runners(tmp_path, pause=0.1) as start:
        runner = start([*arguments[:-1], "2"])  # two worker processes
        wait_until(runner.parts)
        runner.kill()
        done = set(times_written(tmp_path / "notes.txt"))
        wait_until(lambda: all(is_free(tmp_path / "out", part) for part in range(N_PARTS)), seconds=2)
        assert len(done) < N_PARTS


def test_a_run_resumes_with_another_number_of_processes(whole: Path, arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments[:-1], "1"]  # a worker process
    with runners(tmp_path, pause=0.03) as start:
        begun = [start(arguments, environment) for environment in ranks(2)]
        wait_until(lambda: sum(times_written(tmp_path / "notes.txt").values()) >= 3)
        for runner in begun:
            runner.kill()
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.parquet")}
        assert 3 <= len(kept) < N_PARTS
        more = [start(arguments, environment) for environment in ranks(3)]
        assert [runner.exit_code() for runner in more] == [0, 0, 0]
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_parts(tmp_path / "out", whole)


def test_of_two_configurations_at_the_same_time_one_stops_and_nothing_is_mixed(
    whole: Path, arguments: list[str], tmp_path: Path
) -> None:
    with runners(tmp_path) as start:
        specs = ("blur", "mean")
        both: dict[str, Runner] = {spec: start([*arguments, "--counterfactual", spec]) for spec in specs}
        codes = {spec: runner.exit_code() for spec, runner in both.items()}
        assert sorted(codes.values()) == [0, 1]
        winner, loser = sorted(codes, key=lambda spec: codes[spec])
        message = both[loser].message()
        assert "belongs to a run with another configuration" in message
        assert "counterfactual: '" in message
        assert "Traceback" not in message
        assert both[loser].parts() == []
    identity = json.loads((tmp_path / "out/run.json").read_text())["identity"]
    assert identity["counterfactual"].startswith(winner)
    if winner == "mean":
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        whole = tmp_path / "mean"
        run_score(
            ScoreConfig(
                model=options["--model"],
                data=Path(options["--data"]),
                out=whole,
                part_rows=5,
                workers=0,
                counterfactual="mean",
            )
        )
    assert_same_parts(tmp_path / "out", whole)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("workers", ["0", "1"])
def test_two_interruptions_in_a_row_are_one_message_and_the_run_resumes(
    workers: str, whole: Path, arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*arguments[:-1], workers]
    with runners(tmp_path, pause=0.4) as start:
        runner = start(arguments)
        wait_until(lambda: len(runner.parts()) >= 2)
        os.kill(runner.pid, signal.SIGINT)
        time.sleep(0.02)
        with suppress(ProcessLookupError):  # on a busy machine it may have ended by now
            os.kill(runner.pid, signal.SIGINT)
        assert runner.exit_code() == 1
        assert "the same command resumes" in runner.message()
        assert "Traceback" not in runner.message()
        again = start(arguments)
        assert again.exit_code() == 0
        assert times_written(tmp_path / "notes.txt") == dict.fromkeys(range(N_PARTS), 1)
    assert_same_parts(tmp_path / "out", whole)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_parts(
    kills: int, whole: Path, arguments: list[str], tmp_path: Path
) -> None:
    moments = random.Random(kills)
    with runners(tmp_path, pause=0.02) as start:
        for number in range(kills):
            runner = start([*arguments[:-1], str(number % 2)])
            runner.process.join(moments.uniform(0, 4))
            runner.kill()
        last = start(arguments)
        assert last.exit_code() == 0
        assert all(times in (0, 1, 2) for times in times_written(tmp_path / "notes.txt").values())
    assert_same_parts(tmp_path / "out", whole)
