"""Stands for prismatic's datasets.py: turns are tokenised one by one, the picture comes behind BOS and has no token."""

import json
from pathlib import Path

import torch
from support import IGNORE_INDEX, IMAGE, SYSTEM, open_picture
from torch.utils.data import Dataset


class VicunaV15ChatPromptBuilder:
    def __init__(self):
        self.turn_count = 0

    def add_turn(self, role, message):
        assert role == ("human", "gpt")[self.turn_count % 2]
        message = message.replace(IMAGE, "").strip()
        wrapped = f"USER: {message} ASSISTANT: " if role == "human" else f"{message or ' '}</s>"
        system = SYSTEM + " " if self.turn_count == 0 else ""
        self.turn_count += 1
        return system + wrapped


class FinetuneDataset(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, instruct_json, image_dir, image_transform, tokenizer, prompt_builder_fn):
        super().__init__()
        self.image_dir, self.tokenizer, self.prompt_builder_fn = image_dir, tokenizer, prompt_builder_fn
        self.image_transform = image_transform
        self.examples = json.loads(Path(instruct_json).read_text())

    def __getitem__(self, idx):
        prompt_builder, input_ids, labels = self.prompt_builder_fn(), [], []
        for turn_idx, turn in enumerate(self.examples[idx]["conversations"]):
            message = prompt_builder.add_turn(turn["from"], turn["value"]).rstrip()
            ids = self.tokenizer(message, add_special_tokens=turn_idx == 0).input_ids
            input_ids += ids
            labels += ids if turn_idx % 2 else [IGNORE_INDEX] * len(ids)
        input_ids, labels = (torch.tensor(x)[: self.tokenizer.model_max_length] for x in (input_ids, labels))
        pixel_values = None
        if "image" in self.examples[idx]:
            labels[0] = IGNORE_INDEX
            pixel_values = self.image_transform(self.image_dir, Path(self.examples[idx]["image"]))
        return {"pixel_values": pixel_values, "input_ids": input_ids, "labels": labels}

    def __len__(self):
        return len(self.examples)


def make(arguments, tokenizer):
    return FinetuneDataset(
        Path(arguments.data_path), arguments.image_folder, open_picture, tokenizer, VicunaV15ChatPromptBuilder
    )
