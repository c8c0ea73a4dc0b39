"""Processes that train together as torchrun starts them, but quickly: from a process that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from visgain.cli import main

_server = multiprocessing.get_context("forkserver")
# By names that are found from everywhere: the server of Python 3.11 does not know of this folder.
_server.set_forkserver_preload(
    ["visgain.training.run", "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava"]
)


def train_together(
    folder: Path, arguments: Sequence[object], *, world: int = 2, before: Callable[[], None] | None = None
) -> list[int]:
    """Run `visgain train ARGUMENTS` in `world` ranks over gloo and return their exit codes.

    `before`, a function at the top of a module, runs first in every rank. What a rank tells is in
    `folder/told-RANK.txt`. Ranks that still run after two minutes hang: they are killed and have the code -9.
    """
    port = str(_free_port())
    words = ["train", *map(str, arguments)]
    processes = [
        _server.Process(target=_train, args=(words, rank, world, port, folder / f"told-{rank}.txt", before))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(120)
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
    )
    torch.set_num_threads(1)
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(descriptor, sys.stdout.fileno())
    if before is not None:
        before()
    main(words)
