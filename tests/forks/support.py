"""What the stand-ins for LLaVA's relatives share: a tokenizer, LLaVA's labels, and a loop in place of a training.

Each stand-in has the module paths, class names, attributes, keys and label rules of the trainer that it stands for, as
docs/trainers/llava.md lists them with their sources, and none of its models. It runs where only torch, Pillow and
tokenizers are.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from tokenizers import Tokenizer as Fast
from torch.utils.data import DataLoader

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
IMAGE = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Tokenizer:
    """A tokenizers.Tokenizer with the names that the trainers use of a transformers one."""

    pad_token_id = 0
    legacy = True

    def __init__(self, file, model_max_length=2048):
        self.fast = Fast.from_file(file)
        self.bos_token_id = self.fast.token_to_id("<s>")
        self.model_max_length = model_max_length
        vocabulary = self.fast.get_vocab()
        self.additional_special_tokens_ids = [
            vocabulary[token] for token in ("<|im_start|>", "<|im_end|>") if token in vocabulary
        ]

    def __call__(self, text, add_special_tokens=True, truncation=False):
        ids = self.encode(text, add_special_tokens)
        return SimpleNamespace(input_ids=ids[: self.model_max_length] if truncation else ids)

    def encode(self, text, add_special_tokens=True):
        return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        return self.fast.decode(ids, skip_special_tokens=False)

    def get_vocab(self):
        return self.fast.get_vocab()

    def chat(self, role, content):
        return self.encode(f"<|im_start|>{role}\n{content}<|im_end|>\n", add_special_tokens=False)


def tokenizer_image_token(text, tokenizer):
    """Ids of a text that is tokenised anew around pictures, with one BOS in front if the tokenizer writes any."""
    pieces = [tokenizer(piece).input_ids for piece in text.split(IMAGE)]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids = pieces[0][:1] if has_bos else []
    for number, piece in enumerate(pieces):
        ids += [IMAGE_TOKEN_INDEX] * (number > 0) + piece[has_bos:]
    return ids


def v1_line(turns, *, has_image):
    """LLaVA's template v1. An empty text leaves `ROLE:` alone."""
    turns = turns if turns[0]["from"] == "human" else turns[1:]
    line = SYSTEM + " "
    for number, turn in enumerate(turns):
        assert turn["from"] == ("human", "gpt")[number % 2]
        value = turn["value"]
        if has_image and IMAGE in value:
            value = (IMAGE + "\n" + value.replace(IMAGE, "").strip()).strip()
        role, end = (("USER", " "), ("ASSISTANT", "</s>"))[number % 2]
        line += f"{role}: {value}{end}" if value else f"{role}:"
    return line


def count_rounds(line, tokenizer, *, has_image):
    """Ids and labels of a line of template v1 by counting the tokens of each round, or no labels if that fails."""

    def tokenize(text):
        return tokenizer_image_token(text, tokenizer) if has_image else tokenizer(text, truncation=True).input_ids

    ids = torch.tensor(tokenize(line))
    labels, position = ids.clone(), 1
    labels[:1] = IGNORE_INDEX
    for part in line.split("</s>"):
        sides = part.split(" ASSISTANT: ")
        if not part or len(sides) != 2:
            break
        asked = len(tokenize(sides[0] + " ASSISTANT: ")) - 2
        labels[position : position + asked] = IGNORE_INDEX
        position += len(tokenize(part))
    labels[position:] = IGNORE_INDEX
    if position < tokenizer.model_max_length and position != int(ids.ne(tokenizer.pad_token_id).sum()):
        labels[:] = IGNORE_INDEX
        print(f"WARNING: tokenization mismatch: {position} vs. {len(ids)}. (ignored)")
    return ids, labels


def open_picture(folder, name):
    with Image.open(Path(folder) / name) as image:
        pixels = image.convert("RGB").resize((2, 2)).tobytes()
    return torch.tensor(list(pixels), dtype=torch.float32).reshape(2, 2, 3)


def read_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_path")
    parser.add_argument("--image_folder")
    parser.add_argument("--tokenizer")
    parser.add_argument("--output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start_method")
    parser.add_argument("--model_max_length", type=int, default=2048)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--dataset.finetune_stage_components", dest="components", type=json.loads)  # prismatic's
    parser.add_argument("--train_dataset_path")  # nanoVLM's
    parser.add_argument("--stream_dataset", type=int, default=0)  # nanoVLM's, from its models/config.py
    arguments, _ = parser.parse_known_args()
    if arguments.components is not None:
        arguments.data_path, arguments.image_folder = arguments.components
    return arguments


def collate(items):
    return items


def train(dataset, arguments):
    """Go through the dataset as a trainer does, in an order that is not its own, and write down what it says."""
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=order,
        collate_fn=collate,
        num_workers=arguments.workers,
        multiprocessing_context=arguments.start_method,
    )
    items = [item for batch in loader for item in batch]
    write(arguments, zip(order, items, strict=True))


def write(arguments, items):
    with Path(arguments.output).open("w") as file:
        for index, item in items:
            said = {"index": index, "input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist()}
            file.write(json.dumps(said) + "\n")
