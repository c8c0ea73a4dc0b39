"""Stands for TinyLLaVA's tinyllava/data/dataset.py before version 1.0, with its template for Llama."""

import copy
import json
from pathlib import Path

from support import IMAGE, SYSTEM, count_rounds, open_picture
from torch.utils.data import Dataset


class TextPreprocess:
    """Questions and answers by their places; a picture's mark goes to the front of its question."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, messages):
        messages = messages if messages[0]["from"] == "human" else messages[1:]
        line = SYSTEM + " "
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            text = question["value"]
            if IMAGE in text:
                text = (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()
            line += f"USER: {text} ASSISTANT: {answer['value']}</s>"
        input_ids, labels = count_rounds(line, self.tokenizer, has_image=True)
        return {"input_ids": input_ids, "labels": labels}


class LazySupervisedDataset(Dataset):
    def __init__(self, data_path, tokenizer, data_args):
        super().__init__()
        self.tokenizer = tokenizer
        self.list_data_dict = json.loads(Path(data_path).read_text())
        self.data_args = data_args
        self.text_preprocess = TextPreprocess(tokenizer)

    def __len__(self):
        return len(self.list_data_dict)

    def __getitem__(self, i):
        sources = self.list_data_dict[i]
        data_dict = self.text_preprocess(copy.deepcopy(sources["conversations"]))
        if "image" in sources:
            data_dict["image"] = open_picture(self.data_args.image_folder, sources["image"])
        return data_dict


def make_supervised_data_module(tokenizer, data_args):
    return {"train_dataset": LazySupervisedDataset(data_args.data_path, tokenizer, data_args)}
