"""Who does which part: any number of processes work in one folder, and each part is written by exactly one.

A process that works on a part holds a lock on a file; the operating system lets go of it when the process ends,
however it ends. So nobody needs to know how many processes there are, here or on other machines: started together by
torchrun or srun, or one after the other by hand, they share what is left, and take over the part of one that dies.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from visgain.errors import StorageError
from visgain.storage import storage_errors


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which process this is among those that torchrun or srun started together."""

    number: int = 0
    world: int = 1
    local: int = 0  # on this machine

    @classmethod
    def here(cls) -> Rank:
        """From the launcher's environment variables; alone without a launcher."""
        for number, world, local in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        ):
            if number in os.environ and world in os.environ:
                return cls(
                    number=int(os.environ[number]),
                    world=int(os.environ[world]),
                    local=int(os.environ.get(local, 0)),
                )
        return cls()


def _lock(folder: Path, name: str) -> FileLock:
    # One lock object a process and name would let a process enter twice.
    return FileLock(folder / ".locks" / f"{name}.lock", is_singleton=False)


@contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process is in this block for `folder` and `name`."""
    with storage_errors(folder):
        (folder / ".locks").mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, name)
        _acquire(lock, timeout=-1)
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, part: int) -> FileLock | None:
    """A lock on `part` to release when it is written, or None if another process works on it."""
    return claim_named(folder, f"part-{part:05d}")


def claim_named(folder: Path, name: str) -> FileLock | None:
    """A lock on `name` in `folder` to release when done, or None if another process holds it."""
    lock = _lock(folder, name)
    with storage_errors(folder):
        return lock if _acquire(lock, timeout=0) else None


def _acquire(lock: BaseFileLock, timeout: float) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except NotImplementedError:
        raise _no_locks(lock) from None
    if isinstance(lock, SoftFileLock):  # what filelock falls back to; a process that dies would keep it for ever
        lock.release()
        raise _no_locks(lock)
    return True


def _no_locks(lock: BaseFileLock) -> StorageError:
    return StorageError(
        f"the file system of {lock.lock_file} has no locks, so processes cannot share the work; use an --out on "
        "another file system"
    )
