"""Claims on parts: one holder, no holder once it has ended, and file systems that cannot tell."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from visgain.errors import StorageError
from visgain.scoring.claims import Rank, alone, claim


def claimed_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """Another process that has claimed part 3, and holds it until its stdin is closed or it is killed."""
    code = f"""
import sys
from pathlib import Path
from visgain.scoring.claims import alone, claim
with alone(Path({str(folder)!r}), "run"):
    pass
lock = claim(Path({str(folder)!r}), 3)
print("claimed", flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


@pytest.mark.parametrize("end", [lambda process: process.kill(), lambda process: process.stdin.close()])
def test_a_part_has_one_holder_and_is_free_when_it_ends_however_it_ends(
    end: Callable[[subprocess.Popen[str]], None], tmp_path: Path
) -> None:
    with claimed_elsewhere(tmp_path) as process:
        assert claim(tmp_path, 3) is None
        other = claim(tmp_path, 4)
        assert other is not None
        end(process)
        process.wait()
    lock = claim(tmp_path, 3)
    assert lock is not None
    assert claim(tmp_path, 3) is None  # nor does a process get a part twice
    lock.release()
    other.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_clear_message_and_no_wait(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match="--out") as caught, alone(tmp_path, "run"):
        pytest.fail("this process may not be alone")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(StorageError, match="--out"):
        claim(tmp_path, 3)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Rank(number=5, world=8, local=1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Rank(number=2, world=4, local=0)),
        ({"RANK": "0"}, Rank()),  # a variable of somebody else's
    ],
)
def test_the_launcher_says_which_process_this_is(
    environment: dict[str, str], rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == rank
