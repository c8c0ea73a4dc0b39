"""Processes that train one model together, as torchrun starts them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from visgain.errors import VisgainError

T = TypeVar("T")


def from_first(make: Callable[[], T], *, everywhere: bool = False) -> T:
    """What `make` gives in the first process, for all of them.

    If it raises a VisgainError there, that process raises it, and the others end without a word. With `everywhere` the
    others run it too, for what else it does, and whatever it gives or raises there is of no account.
    """
    if not distributed.is_initialized():
        return make()
    is_first = distributed.get_rank() == 0
    made: list[T | VisgainError | None] = [None]
    if is_first or everywhere:
        try:
            made = [make()]
        except VisgainError as error:
            made = [error]
    distributed.broadcast_object_list(made)
    value = made[0]
    if isinstance(value, VisgainError):
        raise value if is_first else SystemExit(1)
    return value  # type: ignore[return-value]


def leave() -> None:
    """Part from the other processes, when the work of all is done and nothing needs the wrapped model any more.

    That model must go first. If it is the last to hold the group, the group ends while Python is locked, and may wait
    for ever for a thread of its own that waits for Python.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()
