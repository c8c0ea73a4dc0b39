"""Stands for Open-Qwen2VL's datasets.py: prismatic's with pictures inside of the text, and one of one file a row."""

import json
from pathlib import Path

import torch
from support import IGNORE_INDEX, IMAGE_TOKEN_INDEX, open_picture, tokenizer_image_token
from torch.utils.data import Dataset


class Qwen2PromptBuilder:
    def __init__(self):
        self.turn_count = 0

    def add_turn(self, role, message):
        message = message.strip()
        asked = f"<|im_start|>user\n{message}<|im_end|>assistant\n"
        wrapped = f"{message or ' '}<|im_end|>\n" if self.turn_count % 2 else asked
        system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if self.turn_count == 0 else ""
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
            ids = tokenizer_image_token(prompt_builder.add_turn(turn["from"], turn["value"]), self.tokenizer)
            said = [IGNORE_INDEX if t == IMAGE_TOKEN_INDEX else t for t in ids]
            input_ids += ids
            labels += said if turn_idx % 2 else [IGNORE_INDEX] * len(ids)
        pixel_values = None
        if "image" in self.examples[idx]:
            pixel_values = self.image_transform(self.image_dir, Path(self.examples[idx]["image"]))
        return {"pixel_values": pixel_values, "input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}

    def __len__(self):
        return len(self.examples)


class FinetuneLargeDataset(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, instruct_json):
        super().__init__()
        self.examples = json.loads(Path(instruct_json).read_text())


def make(arguments, tokenizer):
    if arguments.start_method == "large-finetune":
        return FinetuneLargeDataset(arguments.data_path)
    return FinetuneDataset(
        Path(arguments.data_path), arguments.image_folder, open_picture, tokenizer, Qwen2PromptBuilder
    )
