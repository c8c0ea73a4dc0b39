"""Stands for nanoVLM's data/advanced_datasets.py: a thread reads rows and packs several into one sequence."""

import itertools
import threading
from queue import Queue

import torch
from torch.utils.data import IterableDataset, get_worker_info


class ConstantLengthDataset(IterableDataset):
    def __init__(self, dataset, max_sample_length=1024, seq_length=1024, queue_size=2, max_images_per_example=4):
        self.dataset = dataset
        self.max_sample_length = max_sample_length
        self.seq_length = seq_length
        self.max_images_per_example = max_images_per_example
        self.queue_size = queue_size
        self._sentinel = object()

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)

        def make_base_iterator():
            if not hasattr(self.dataset.dataset, "__len__"):
                return self.dataset.iter_for_worker()
            return (self.dataset[i] for i in itertools.islice(range(len(self.dataset)), first, None, step))

        queue = Queue(maxsize=self.queue_size)
        producer = threading.Thread(target=self._producer, args=(make_base_iterator, queue), daemon=True)
        producer.start()
        while True:
            batch_of_batches = queue.get()
            if batch_of_batches is self._sentinel:
                producer.join()  # not in nanoVLM, whose process does not end so soon after that
                break
            yield from batch_of_batches

    def _producer(self, make_iterator, queue):
        packs, length = [[]], 0
        for sample in make_iterator():
            if sample is None or len(sample["input_ids"]) >= self.max_sample_length:
                continue
            if len(sample["images"]) > self.max_images_per_example:
                continue
            padded = (("input_ids", self.dataset.tokenizer.pad_token_id), ("labels", -100))
            sample |= {key: torch.cat([sample[key], torch.tensor([value])]) for key, value in padded}
            length += len(sample["input_ids"])
            if length > self.seq_length and packs[-1]:
                packs, length = [*packs, []], len(sample["input_ids"])
            packs[-1].append(sample)
        queue.put(
            [{key: torch.cat([row[key] for row in pack]) for key in ("input_ids", "labels")} for pack in packs if pack]
        )
        queue.put(self._sentinel)
