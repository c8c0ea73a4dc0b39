"""Stands for nanoVLM's train.py: tables are shuffled or streamed, and split; pyarrow in place of `datasets`."""

import random
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from data.advanced_datasets import ConstantLengthDataset
from data.datasets import VQADataset
from support import Tokenizer, collate, read_arguments, write
from torch.utils.data import DataLoader, get_worker_info


class Table(list):
    def __init__(self, rows, column_names):
        super().__init__(rows)
        self.column_names = column_names


class Stream:
    """Each process of a loader gets its own part, as from an IterableDataset of `datasets`."""

    def __init__(self, rows, column_names):
        self.rows = rows
        self.column_names = column_names

    def __iter__(self):
        info = get_worker_info()
        yield from islice(self.rows, *((info.id, None, info.num_workers) if info else (None,)))


def get_dataloaders(arguments):
    table = pq.read_table(Path(arguments.train_dataset_path))
    rows = table.to_pylist()
    if not arguments.stream_dataset:
        random.Random(0).shuffle(rows)
    n_val = len(rows) // 5
    tokenizer = Tokenizer(arguments.tokenizer)
    kind = Stream if arguments.stream_dataset else Table
    train, val = (
        ConstantLengthDataset(VQADataset(kind(part, table.column_names), tokenizer, None, 4))
        for part in (rows[n_val:], rows[:n_val])
    )
    packed = DataLoader(train, batch_size=1, collate_fn=collate, num_workers=arguments.workers)
    return packed, DataLoader(val, batch_size=1, collate_fn=collate, num_workers=1)


if __name__ == "__main__":
    arguments = read_arguments()
    loaders = get_dataloaders(arguments)
    write(arguments, enumerate(item for loader in loaders for batch in loader for item in batch))
