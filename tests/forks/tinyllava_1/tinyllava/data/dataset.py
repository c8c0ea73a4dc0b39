"""Stands for TinyLLaVA's tinyllava/data/dataset.py from version 1.0 on: a processor's chat template and its own mask.

Rows come from the package `datasets`, which turns ids of digits into numbers and gives every row every field.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from support import IGNORE_INDEX, open_picture
from torch.utils.data import Dataset


def load_training_dataset(data_args):
    rows = json.loads(Path(data_args.data_path).read_text())
    return [
        {"id": index, "image": row.get("image"), "conversations": row["conversations"]}
        for index, row in enumerate(rows)
    ]


class ProcessorSFTDataset(Dataset):
    def __init__(self, dataset, processor, data_args):
        super().__init__()
        self.dataset = dataset
        self.processor = processor
        self.data_args = data_args

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        sample = dict(self.dataset[i])
        if sample["image"] is not None:
            open_picture(self.data_args.image_folder, sample["image"])
        tokenizer, input_ids, labels = self.processor.tokenizer, [], []
        for turn in sample["conversations"]:
            if turn["from"] == "human":
                before = tokenizer.chat("user", turn["value"]) + tokenizer.encode("<|im_start|>assistant\n", False)
                input_ids, labels = input_ids + before, labels + [IGNORE_INDEX] * len(before)
            else:
                said = tokenizer.encode(f"{turn['value']}<|im_end|>\n", False)
                input_ids, labels = input_ids + said, labels + said
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}


def make_supervised_data_module(tokenizer, data_args):
    processor = SimpleNamespace(tokenizer=tokenizer)
    return {"train_dataset": ProcessorSFTDataset(load_training_dataset(data_args), processor, data_args)}
