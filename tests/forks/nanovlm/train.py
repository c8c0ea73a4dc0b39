"""Stands for nanoVLM's train.py: tables are shuffled and split, here read by pyarrow and there by `datasets`."""

import random
from pathlib import Path

import pyarrow.parquet as pq
from data.advanced_datasets import ConstantLengthDataset
from data.datasets import VQADataset
from support import Tokenizer, collate, read_arguments, write
from torch.utils.data import DataLoader


class Table(list):
    def __init__(self, rows, column_names):
        super().__init__(rows)
        self.column_names = column_names


def get_dataloaders(arguments):
    table = pq.read_table(Path(arguments.train_dataset_path))
    rows = table.to_pylist()
    random.Random(0).shuffle(rows)
    n_val = len(rows) // 5
    tokenizer = Tokenizer(arguments.tokenizer)
    val, train = (
        VQADataset(Table(part, table.column_names), tokenizer, None, 4) for part in (rows[:n_val], rows[n_val:])
    )
    packed = DataLoader(ConstantLengthDataset(train), batch_size=1, collate_fn=collate, num_workers=arguments.workers)
    return packed, DataLoader(val, batch_size=1, collate_fn=collate)


if __name__ == "__main__":
    arguments = read_arguments()
    loaders = get_dataloaders(arguments)
    write(arguments, enumerate(item for loader in loaders for batch in loader for item in batch))
