"""Stands for LLaVA's llava/train/train.py."""

import json
from pathlib import Path

from support import Tokenizer as AutoTokenizer
from support import count_rounds, open_picture, read_arguments, v1_line
from support import train as go
from torch.utils.data import Dataset


class LazySupervisedDataset(Dataset):
    def __init__(self, data_path, tokenizer, data_args):
        super().__init__()
        self.list_data_dict = json.loads(Path(data_path).read_text())
        self.tokenizer = tokenizer
        self.data_args = data_args

    def __len__(self):
        return len(self.list_data_dict)

    @property
    def modality_lengths(self):
        lengths = [sum(len(turn["value"].split()) for turn in row["conversations"]) for row in self.list_data_dict]
        return [n if "image" in row else -n for n, row in zip(lengths, self.list_data_dict, strict=True)]

    def __getitem__(self, i):
        row = self.list_data_dict[i]
        has_image = "image" in row
        line = v1_line(row["conversations"], has_image=has_image)
        input_ids, labels = count_rounds(line, self.tokenizer, has_image=has_image)
        item = {"input_ids": input_ids, "labels": labels}
        if has_image:
            item["image"] = open_picture(self.data_args.image_folder, row["image"])
        return item


def train(attn_implementation=None):
    arguments = read_arguments()
    tokenizer = AutoTokenizer(arguments.tokenizer, arguments.model_max_length)
    go(LazySupervisedDataset(data_path=arguments.data_path, tokenizer=tokenizer, data_args=arguments), arguments)


if __name__ == "__main__":
    train()
