"""Starts the training script of LLaVA, or of a trainer that grew out of it, and lets selected answer tokens carry loss.

    python visgain_launch.py llava/train/train_mem.py --data_path OUT/data.json ...
    deepspeed visgain_launch.py llava/train/train_mem.py --deepspeed ./scripts/zero3.json --data_path OUT/data.json ...
    torchrun --nproc-per-node 8 visgain_launch.py scripts/pretrain.py ...
    python visgain_launch.py --check llava/train/train_mem.py ...      # read every row as in training, then stop

Nothing of the trainer is changed on disk. Its dataset classes, and classes derived from them, are recognised by name
when they are defined, in whatever module, and the labels of each row are held to masks.safetensors, which lies beside
this file. A trainer whose dataset is not known is stopped before it trains on all tokens.

Needs torch (1.13 or newer) and the standard library (Python 3.9 or newer).
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib
import operator
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from visgain.export.shims.llava_labels import Guard, Options
from visgain.export.shims.masks import IGNORED, MaskError

LISTED = {
    "LazySupervisedDataset": "list_data_dict",  # LLaVA, LLaVA-NeXT, ShareGPT4V, TinyLLaVA
    "ProcessorSFTDataset": "dataset",  # TinyLLaVA 1.0
    "FinetuneDataset": "examples",  # prismatic, Open-Qwen2VL
    "AlignDataset": "examples",
}
"""Datasets whose i-th item is the i-th row of data.json, and the attribute that holds these rows."""

ROW = "visgain_row"
"""The column of nanoVLM's tables that says which row of the scored dataset a row is."""

_SHOWN = 10


class _State:
    options = Options("", False, False)
    guarded = False  # whether a dataset was opened whose labels are held to the masks
    empty_batches = 0


# ---------------------------------------------------------------- the trainer's classes


def _recognise(cls: Any) -> None:
    """Guard a dataset class that was just defined, if it is one that we know or is derived from one."""
    name, own = cls.__name__, vars(cls)
    if name in LISTED and "__getitem__" in own:
        _guard_listed(cls, LISTED[name])
    elif hasattr(cls, "_visgain_field") and not hasattr(cls.__getitem__, "_visgain"):
        _guard_items(cls)  # derived, with a __getitem__ of its own or of another parent
    elif hasattr(cls, "_visgain_base"):
        _require_same_steps(cls)
    elif name == "VQADataset" and hasattr(cls, "_get_messages") and "_get_labels" in own:
        _guard_nanovlm(cls)
    elif name == "ConstantLengthDataset" and "_producer" in own:
        _guard_producer(cls)
    elif name == "FinetuneLargeDataset":
        _refuse(
            cls,
            "Open-Qwen2VL's stage large-finetune reads one file a row and goes on without the picture when it cannot "
            "open it; use the stage finetune (or full-finetune), which reads data.json",
        )


def _after_init(cls: Any, then: Callable[[Any], None]) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        then(self)
        _State.guarded = True
        if _State.options.check:
            raise SystemExit(check(self))

    cls.__init__ = guarded


def _guard_listed(cls: Any, field: str) -> None:
    def begin(self: Any) -> None:
        tokenizer = getattr(self, "tokenizer", None) or getattr(getattr(self, "processor", None), "tokenizer", None)
        self._visgain = Guard(tokenizer, _State.options)
        if not hasattr(cls, "_get_item"):
            self._visgain.turns = []  # only LLaVA-NeXT supervises more than answers
        self._visgain.verify(getattr(self, field))

    cls._visgain_field = field
    _after_init(cls, begin)
    _guard_items(cls)
    cls.__reduce_ex__ = _reduce
    if "_get_item" in vars(cls):
        _guard_neighbours(cls)


def _guard_items(cls: Any) -> None:
    """Hold the labels of `cls.__getitem__` to the masks."""
    getitem = cls.__getitem__

    @functools.wraps(getitem)
    def guarded(self: Any, index: Any) -> Any:
        guard: Guard = self._visgain
        if guard.asked is not None:  # by a class that is derived from this one, and whose own item is held
            return getitem(self, index)
        index = operator.index(index)
        guard.asked = index
        try:
            item = getitem(self, index)
        finally:
            guard.asked = None
        has_image = getattr(self, self._visgain_field)[index].get("image") is not None
        return {**item, "labels": guard.select(index, item, has_image)}

    guarded._visgain = True  # type: ignore[attr-defined]
    cls.__getitem__ = guarded


def _guard_neighbours(cls: Any) -> None:
    """LLaVA-NeXT: a row that cannot be read is an error, and not a reason to train on the next one in its place."""
    get_item = cls._get_item

    @functools.wraps(get_item)
    def guarded(self: Any, index: Any) -> Any:
        asked = self._visgain.asked
        if asked is not None and operator.index(index) != asked:
            raise MaskError(
                f"the trainer's row {asked} cannot be read, and row {index} is not trained on in its place; "
                "mend its picture or leave the row out of the dataset, then score and select again"
            )
        return get_item(self, index)

    cls._get_item = guarded


def _guard_nanovlm(cls: Any) -> None:
    """nanoVLM: the row says which it is. Its labels are shifted by one already, which does not change their order."""

    def begin(self: Any) -> None:
        names = getattr(self.dataset, "column_names", None)
        if names is not None and ROW not in names:
            raise MaskError(f"nanoVLM's dataset has no column {ROW}; train on the tables that `visgain export` wrote")
        if _State.options.check and not hasattr(self.dataset, "__len__"):
            raise MaskError("--check asks for rows by their place; set stream_dataset to False in models/config.py")
        self._visgain = Guard(self.tokenizer, _State.options)

    get_messages, get_labels = cls._get_messages, cls._get_labels

    @functools.wraps(get_messages)
    def messages(self: Any, item: Any, *args: Any, **kwargs: Any) -> Any:
        self._visgain.row = item.get(ROW)
        return get_messages(self, item, *args, **kwargs)

    @functools.wraps(get_labels)
    def labels(self: Any, input_ids: Tensor, mask: Tensor) -> Any:
        row, masks = self._visgain.row, self._visgain.masks
        if row is None:
            raise MaskError(f"a row of nanoVLM's dataset has no {ROW}; do not mix in tables of other origin")
        return masks.labels(masks.of(row), get_labels(self, input_ids, mask))

    _after_init(cls, begin)
    cls._get_messages, cls._get_labels = messages, labels
    cls.__reduce_ex__ = _reduce
    cls._visgain_base = cls


def _require_same_steps(cls: Any) -> None:
    """Of classes derived from nanoVLM's, those that go from a row to its labels in a way of their own are refused."""
    steps = ("__getitem__", "iter_for_worker", "_process_data", "_get_messages", "_get_labels")
    changed = [name for name in steps if getattr(cls, name, None) is not getattr(cls._visgain_base, name, None)]
    if changed:
        _refuse(
            cls,
            f"{cls.__qualname__} changes {', '.join(changed)} of nanoVLM's VQADataset, so its labels could not be held "
            "to the masks; train with VQADataset itself",
        )


class _Raises:
    """Stands for a list of batches in nanoVLM's queue, and raises where they would be gone through."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Any:
        raise self.error


def _guard_producer(cls: Any) -> None:
    """nanoVLM: an error in the thread that fills the queue ends the reading, which would else wait for ever."""
    producer = cls._producer

    @functools.wraps(producer)
    def guarded(self: Any, make_iterator: Any, queue: Any) -> None:
        try:
            producer(self, make_iterator, queue)
        except BaseException as error:
            queue.put(_Raises(error))

    cls._producer = guarded


def _refuse(cls: Any, why: str) -> None:
    def refused(self: Any, *args: Any, **kwargs: Any) -> None:
        raise MaskError(why)

    cls.__init__ = refused


# ---------------------------------------------------------------- the trainer's process


def install(options: Options) -> None:
    """From here on the dataset classes that are defined are guarded, and so are loaders and loss. Once a process."""
    _State.options = options
    if getattr(Dataset, "_visgain", False):
        return

    def init_subclass(cls: Any, **kwargs: Any) -> None:
        super(Dataset, cls).__init_subclass__(**kwargs)
        _recognise(cls)

    dataset: Any = Dataset
    dataset.__init_subclass__ = classmethod(cast("Any", init_subclass))
    dataset._visgain = True
    _guard_loaders()
    _guard_loss()


def _guard_loaders() -> None:
    """Whoever loads data without a dataset that we know would train on all tokens."""
    loader: Any = DataLoader
    init = loader.__init__

    @functools.wraps(init)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        _guard_steps()
        if not _State.guarded:
            kind = type(args[0] if args else kwargs.get("dataset"))
            raise MaskError(
                f"data of {kind.__module__}.{kind.__qualname__} is about to be loaded, and no dataset that is known "
                f"here was opened ({', '.join(LISTED)}, nanoVLM's VQADataset): all tokens would carry loss"
            )
        init(self, *args, **kwargs)

    loader.__init__ = guarded


def _guard_loss() -> None:
    """The mean over no label is nan, in logs and averages and for whoever looks at the loss. Here it is 0."""
    cross_entropy = functional.cross_entropy

    @functools.wraps(cross_entropy)
    def guarded(
        input: Tensor,  # noqa: A002 its name in torch
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORED,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        if reduction == "mean" and not target.is_floating_point() and not bool((target != ignore_index).any()):
            _State.empty_batches += 1
            reduction = "sum"
        return cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    functional.cross_entropy = guarded
    atexit.register(_tell_empty_batches)


def _guard_steps() -> None:
    """Trainer since transformers 4.46 divides by the labels of a whole step, on all devices, which may be 0 as well."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if not hasattr(trainer, "get_batch_samples") or hasattr(trainer, "_visgain"):
        return
    get_batch_samples = trainer.get_batch_samples

    @functools.wraps(get_batch_samples)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        batches, count = get_batch_samples(self, *args, **kwargs)
        if count is not None and count == 0:
            _State.empty_batches += len(batches)
            count = count + 1
        return batches, count

    trainer.get_batch_samples, trainer._visgain = guarded, True


def _tell_empty_batches() -> None:
    if _State.empty_batches:
        print(
            f"visgain: {_State.empty_batches} batches had no token that carries loss; their loss was 0", file=sys.stderr
        )


def _reduce(self: Any, protocol: Any) -> Any:
    """Guarded datasets travel to loader processes that are spawned and not forked, and are guarded there."""
    cls = type(self)
    return _rebuild, (cls.__module__, cls.__qualname__, _State.options), self.__dict__


def _rebuild(module: str, name: str, options: Options) -> Any:
    if not getattr(Dataset, "_visgain", False):
        install(options)
    found = sys.modules.get("__mp_main__") if module == "__main__" and "__mp_main__" in sys.modules else None
    cls = operator.attrgetter(name)(found or importlib.import_module(module))
    if cls.__reduce_ex__ is not _reduce:  # its module was imported before us
        for each in reversed(cls.__mro__):
            _recognise(each)
    _State.guarded = True
    return cls.__new__(cls)


# ---------------------------------------------------------------- --check


class _Checked(Dataset):  # type: ignore[type-arg]
    """What there is to say of each row: (kind, text), or None."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        guard: Guard = self.dataset._visgain
        before = dict(guard.told)
        try:
            self.dataset[index]
        except MaskError as error:
            return ("no label" if guard.told.get("mismatch") != before.get("mismatch") else "drift"), str(error)
        except Exception as error:
            return "unreadable", f"the trainer's row {index}: {type(error).__name__}: {error}"
        new = [kind for kind in guard.told if guard.told[kind] != before.get(kind)]
        return {"mismatch": ("no label", ""), "cut": ("scores cut", "")}[new[0]] if new else None


def check(dataset: Any) -> int:
    """Read every row as in training and say what would happen. Returns the exit status: 1 if training would stop."""
    loader = DataLoader(
        _Checked(dataset), batch_size=None, num_workers=min(8, os.cpu_count() or 1), collate_fn=lambda row: row
    )
    counts: dict[str, int] = {}
    for said in loader:
        if said is not None:
            kind, text = said
            counts[kind] = counts.get(kind, 0) + 1
            if text and counts[kind] <= _SHOWN:
                print(f"{kind}: {text}")
    wrong = {kind for kind in counts if kind != "scores cut"}
    if dataset._visgain.options.allow_mismatch:
        wrong.discard("no label")
    print(
        f"visgain: {len(dataset)} rows read, {sum(counts[kind] for kind in wrong)} of them would stop the training",
        end="",
    )
    print("".join(f"; {kind}: {count}" for kind, count in sorted(counts.items())))
    return 1 if wrong else 0


# ---------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the training script as if it had been started itself."""
    here = Path(__file__).absolute().parent
    parser = argparse.ArgumentParser(description="Train on the selected answer tokens alone.", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="read every row as in training, say what is wrong, stop")
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="train without rows that the trainer gives no label"
    )
    parser.add_argument("--masks", default=here / "masks.safetensors", help="[default: beside this file]")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed puts it here
    parser.add_argument("-m", action="store_true", dest="is_module", help="SCRIPT is a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="the trainer's own")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="and its arguments")
    said = parser.parse_args(arguments)
    install(Options(str(Path(said.masks).absolute()), said.allow_mismatch, said.check))
    rank = [] if said.local_rank is None else [f"--local_rank={said.local_rank}"]
    sys.argv = [said.script, *rank, *said.arguments]
    sys.path[0] = str(Path.cwd() if said.is_module else Path(said.script).absolute().parent)
    sys.path.append(str(here))  # processes that are spawned import this file by its name
    if said.is_module:
        runpy.run_module(said.script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(said.script, run_name="__main__")


if __name__ == "__main__":
    # As a module with a name of its own: errors and datasets travel between processes, and are looked up by it.
    sys.path.insert(1, str(Path(__file__).absolute().parent))
    importlib.import_module(Path(__file__).stem).main()
