"""Stands for LLaVA-NeXT's llava/train/train.py: templates v1 and qwen, and a neighbour for what cannot be read."""

import json
from pathlib import Path

import torch
from support import (
    IGNORE_INDEX,
    IMAGE,
    IMAGE_TOKEN_INDEX,
    count_rounds,
    open_picture,
    read_arguments,
    v1_line,
)
from support import Tokenizer as AutoTokenizer
from support import train as go
from torch.utils.data import Dataset


def preprocess_qwen(turns, tokenizer, system="You are a helpful assistant."):
    """Every turn is tokenised apart; the whole of the assistant's and all marks of turns carry loss."""
    newline, *marks = tokenizer.encode("\n", False)[0], *tokenizer.additional_special_tokens_ids
    image = tokenizer.get_vocab()[IMAGE]
    input_ids = tokenizer.chat("system", system)
    labels = [IGNORE_INDEX] * len(input_ids)
    for turn in turns:
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        ids = tokenizer.chat(role, turn["value"])
        input_ids += ids
        labels += ids if role == "assistant" else [IGNORE_INDEX] * len(ids)
    labels = [t if t in (newline, *marks) else label for t, label in zip(input_ids, labels, strict=True)]
    input_ids = [IMAGE_TOKEN_INDEX if t == image else t for t in input_ids]
    return torch.tensor(input_ids), torch.tensor(labels)


class LazySupervisedDataset(Dataset):
    def __init__(self, data_path, tokenizer, data_args):
        super().__init__()
        self.tokenizer = tokenizer
        self.list_data_dict = []
        self.list_data_dict.extend(json.loads(Path(data_path).read_text()))
        self.data_args = data_args

    def __len__(self):
        return len(self.list_data_dict)

    def process_image(self, image_file):
        return open_picture(self.data_args.image_folder, image_file), (2, 2), "image"

    def __getitem__(self, i):
        for attempt in range(3):
            try:
                return self._get_item(i)
            except Exception as e:
                print(f"[Try #{attempt}] Failed to fetch sample {i}. Exception:", e)
        for attempt in range(3):
            try:
                next_index = min(i + 1, len(self.list_data_dict) - 1)
                return self._get_item(next_index)
            except Exception as e:
                print(f"[Try other #{attempt}] Failed to fetch sample {next_index}. Exception:", e)
        return self._get_item(i)

    def _get_item(self, i):
        row = self.list_data_dict[i]
        image = row.get("image", [])
        pictures = [self.process_image(name) for name in (image if isinstance(image, list) else [image])]
        if "video" in row:
            try:
                pictures = [open_picture(self.data_args.image_folder, row["video"])]
            except Exception as e:
                print(f"Failed to read video file: {e}")
                return self._get_item(i + 1)
        if self.tokenizer.additional_special_tokens_ids:
            input_ids, labels = preprocess_qwen(row["conversations"], self.tokenizer)
        else:
            line = v1_line(row["conversations"], has_image=bool(pictures))
            input_ids, labels = count_rounds(line, self.tokenizer, has_image=bool(pictures))
        item = {"input_ids": input_ids, "labels": labels, "id": row.get("id", i)}
        if pictures:
            item["image"] = pictures
        return item


def train():
    arguments = read_arguments()
    tokenizer = AutoTokenizer(arguments.tokenizer, arguments.model_max_length)
    go(LazySupervisedDataset(data_path=arguments.data_path, tokenizer=tokenizer, data_args=arguments), arguments)


if __name__ == "__main__":
    train()
