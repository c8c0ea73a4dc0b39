"""Answering: our batches against a plain loop of one `generate` a question, same model, same questions, same answers.

    python benchmarks/generate.py [--rows 96] [--batch-size 16]

The embedded model answers questions about the embedded world; CPU seconds of this process on one thread. Most of a
small model's time is the number of calls, which is what batches save; on a large model they save reading the weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _results import result_row, write_results
from visgain.config import WorldConfig
from visgain.data import open_dataset
from visgain.evaluation.generate import Ask, end_ids, generate_answers, pad_id
from visgain.types import Sample
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world

MAX_NEW_TOKENS = 64


@torch.inference_mode()
def one_by_one(vlm: VLM, samples: list[Sample]) -> list[str]:
    encoder, said = make_encoder(vlm), []
    for sample in samples:
        ask = Ask.first_of(sample)
        prompt = encoder.prompt(ask.turns, [image.open() for image in ask.images])
        ids = torch.from_numpy(prompt.input_ids)[None]
        output = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **prompt.model_inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad_id(vlm),
            eos_token_id=end_ids(vlm),
        )
        said.append(vlm.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return said


def timed(answer: Callable[[], list[str]]) -> tuple[float, list[str]]:
    begin = time.process_time()
    said = answer()
    return time.process_time() - begin, said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vlm = load_vlm("embedded", device="cpu")
    with tempfile.TemporaryDirectory() as name:
        data = write_world(WorldConfig(out=Path(name), split="test", rows=options.rows, seed=3))
        dataset = open_dataset(data)
        samples = [sample for row in range(len(dataset)) if isinstance(sample := dataset[row], Sample)]
        one_by_one(vlm, samples[:2])
        plain, expected = timed(lambda: one_by_one(vlm, samples))
        ours, found = timed(
            lambda: generate_answers(
                vlm,
                make_encoder(vlm),
                samples,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=options.batch_size,
            )
        )
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"{len(samples)} questions, {same} answers equal: one by one {plain:.1f} s, batches {ours:.1f} s of CPU")
    print(f"ratio {plain / ours:.2f}")
    row = result_row(
        benchmark="generate",
        case=f"embedded model, {len(samples)} questions, batches of {options.batch_size}; {same} answers equal",
        metric="cpu_seconds",
        ours=round(ours, 3),
        baseline=round(plain, 3),
        baseline_name="one generate a question",
    )
    print(f"\nwrote {write_results('generate', [row])}")


if __name__ == "__main__":
    sys.exit(main())
