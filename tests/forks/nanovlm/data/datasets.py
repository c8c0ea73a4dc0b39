"""Stands for nanoVLM's data/datasets.py since FineVision: `texts`, `images`, a rating a turn, labels shifted by one."""

import torch
from support import open_picture
from torch.utils.data import Dataset


class BaseDataset(Dataset):
    def __init__(self, dataset, tokenizer, image_processor, mp_image_token_length, visual_dependency_min_rating=1):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.mp_image_token_length = mp_image_token_length
        self.visual_dependency_min_rating = visual_dependency_min_rating
        self.prefix_len = len(tokenizer.encode("<|im_start|>assistant\n", False))

    def __len__(self):
        return len(self.dataset)

    def _get_messages(self, item, splitted_image_counts):
        messages = []
        for index, text in enumerate(item["texts"]):
            ratings = item.get("visual_dependency_ratings")
            rating = None if ratings is None else ratings[index]
            if rating is not None and rating < self.visual_dependency_min_rating:
                continue
            messages += [("user", text["user"]), ("assistant", text["assistant"])]
        if messages:
            pictures = "<image>" * len(splitted_image_counts) * self.mp_image_token_length
            messages[0] = ("user", pictures + messages[0][1])
        return messages

    def _prepare_inputs_and_loss_mask(self, messages):
        input_ids, mask = [], []
        for role, content in messages:
            segment = self.tokenizer.chat(role, content)
            said = len(segment) - self.prefix_len if role == "assistant" else 0
            input_ids += segment
            mask += [False] * (len(segment) - said) + [True] * said
        return torch.tensor(input_ids), torch.tensor(mask), torch.ones(len(input_ids))


class VQADataset(BaseDataset):
    def iter_for_worker(self):
        for item in self.dataset:
            yield self._process_data(item)

    def __getitem__(self, idx):
        return self._process_data(self.dataset[idx])

    def _process_data(self, item):
        images = [open_picture("", image["path"]) for image in item["images"] or []]
        messages = self._get_messages(item, [(1, 1)] * len(images))
        if not messages:
            return None
        input_ids, mask, attention_mask = self._prepare_inputs_and_loss_mask(messages)
        labels = self._get_labels(input_ids, mask)
        return {"images": images, "input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _get_labels(self, input_ids, mask):
        labels = input_ids.clone().masked_fill(~mask, -100)
        labels = labels.roll(-1)
        labels[-1] = -100
        return labels
