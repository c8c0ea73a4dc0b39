"""Processes that train together as torchrun starts them, but quickly: from a process that has everything imported."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from visgain.cli import main

_server = multiprocessing.get_context("forkserver")
# By names that are found from everywhere: the server of Python 3.11 does not know of this folder.
_server.set_forkserver_preload(
    ["visgain.training.run", "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava"]
)


TIME = 120
"""Seconds that ranks have; who needs longer hangs."""


def train_together(
    folder: Path, arguments: Sequence[object], *, world: int = 2, before: Callable[[], None] | None = None
) -> list[int]:
    """Run `visgain train ARGUMENTS` in `world` ranks over gloo and return their exit codes.

    "{rank}" in an argument becomes the rank's number. `before`, a function at the top of a module, runs first in every
    rank. What a rank tells is in `folder/told-RANK.txt`. When one fails the others are killed, as torchrun does, and
    after TIME all.
    """
    port = str(_free_port())
    words = ["train", *map(str, arguments)]
    processes = [
        _server.Process(
            target=_train,
            args=([w.format(rank=rank) for w in words], rank, world, port, folder / f"told-{rank}.txt", before),
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + TIME
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                time.sleep(1)  # for the last words of the others
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _train(words: list[str], rank: int, world: int, port: str, told: Path, before: Callable[[], None] | None) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(descriptor, sys.stdout.fileno())
    faulthandler.dump_traceback_later(TIME - 10)  # where it hangs
    if before is not None:
        before()
    main(words)


# ---------------------------------------------------------------- what may happen first in a rank


def shard_on_cpu() -> None:
    """Let Accelerate shard models on CPU, by telling it that this is a GPU.

    Else it takes no notice of FSDP's settings there, and none of DeepSpeed's, although both can.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    if find_spec("deepspeed"):
        import deepspeed

        # Messages by shared memory would be faster, once that has been compiled.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
        deepspeed.init_distributed("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


def die_in_the_second_checkpoint() -> None:
    """Kill this process when its files of the second checkpoint are written and the checkpoint is not yet complete."""
    from transformers import Trainer

    save, saved = Trainer._save_checkpoint, []

    def dying(self: Trainer, *args: object) -> None:
        save(self, *args)
        saved.append(self.state.global_step)
        if len(saved) == 2:
            os.kill(os.getpid(), 9)

    Trainer._save_checkpoint = dying


def shard_and_die() -> None:
    shard_on_cpu()
    die_in_the_second_checkpoint()


if (
    __name__ == "__main__"
):  # for torchrun: whatever follows, sharded on CPU; killed in between if the first word is "die"
    if dies := sys.argv[1] == "die":
        die_in_the_second_checkpoint()
    shard_on_cpu()
    main(sys.argv[1 + dies :])
