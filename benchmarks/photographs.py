"""The whole path on real photographs, at a size that a processor can train: assemble, align, score, select, tune, look.

    python benchmarks/photographs.py --data ../shared/data --out /tmp/photographs

The parts are the embedded model's vision tower (it has seen drawings alone) and a language model of random weights with
a vocabulary learned from the texts. Pictures are split by a hash of their name, so that no stage sees a held-out one.
Every stage resumes. What is measured lands in results/photographs-<machine>.json and photographs.svg of --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from _results import write_results
from visgain.config import AssembleConfig, ScoreConfig, SelectConfig, TrainConfig
from visgain.scoring.run import run_score
from visgain.selection import run_select
from visgain.storage import read_scores
from visgain.training.assemble import run_assemble
from visgain.training.run import SUMMARY, TrainSummary, run_train

mpl.use("svg")
from matplotlib import pyplot as plt

ALIGN = Path(__file__).with_name("photographs-align.yaml")
HELD_OUT = 10  # one picture in so many
ARMS = {
    "vanilla": {"by": "sample", "keep": 100.0},
    "random": {"by": "random", "keep": 70.0},  # as many rows and tokens as vig
    "vig": {"by": "sample+token", "keep": 70.0},
}
VOCABULARY = 2048
WIDTH = 192


# ---------------------------------------------------------------- data and parts


def is_held_out(row: dict[str, Any]) -> bool:
    """By the row's pictures; a row without any by its id. Rows that share a picture share their side."""
    images = row.get("image") or row["id"]
    names = images if isinstance(images, list) else [images]
    return any(hashlib.sha256(str(name).encode()).digest()[0] % HELD_OUT == 0 for name in names)


def split(source: Path, out: Path, name: str) -> None:
    rows = json.loads(source.read_text())
    for part, held in ((name, False), (f"{name}-held-out", True)):
        chosen = [row for row in rows if is_held_out(row) == held]
        if name == "captions" and held:
            chosen = chosen[::5]  # of the five captions of a picture one
        (out / f"{part}.json").write_text(json.dumps(chosen))


def write_language(out: Path, data: Path) -> None:
    """A Llama of random weights and a byte-level BPE of the texts that are trained on."""
    rows = [row for name in ("captions", "mix") for row in json.loads((data / f"{name}.json").read_text())]
    texts = [turn["value"] for row in rows for turn in row["conversations"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH + WIDTH // 2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=WIDTH**-0.5,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    fast.save_pretrained(out)


# ---------------------------------------------------------------- what was measured


def seen_and_gain(scores: Path) -> dict[str, float]:
    """Mean NLL of the answer tokens with their picture, and mean gain, in nats; tokens of rows with pictures alone."""
    seen, blind = [], []
    for row in read_scores(scores).to_pylist():
        if row["nll_seen"] is not None and row["nll_blind"] is not None and row["n_images"]:
            seen += row["nll_seen"]
            blind += row["nll_blind"]
    gain = np.asarray(blind) - np.asarray(seen)
    return {
        "tokens": len(seen),
        "nll": round(float(np.mean(seen)), 4),
        "gain": round(float(gain.mean()), 4),
        "tokens_over_0.1": round(float((gain > 0.1).mean()), 4),
    }


def curve(run: Path) -> list[tuple[int, float]]:
    """Step and loss as they were logged."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def draw(curves: dict[str, list[tuple[int, float]]], out: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "photographs"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for place, names in zip(axes, (("align",), tuple(ARMS)), strict=True):
        for name in names:
            steps, losses = map(np.asarray, zip(*curves[name], strict=True))
            window = max(1, len(losses) // 40)
            smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
            place.plot(steps[window - 1 :], smooth, label=name)
        place.set_xlabel("optimiser step")
        place.set_ylabel("loss of the active tokens, nats")
        place.legend(frameon=False)
        place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


# ---------------------------------------------------------------- the path


class Clock:
    """Wall and CPU seconds of each stage, kept beside what it made, so that a resumed path knows them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = json.loads(path.read_text()) if path.is_file() else {}

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if name not in self.seconds:
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            self.seconds[name] = {"wall": round(spent[0], 1), "cpu": round(spent[1], 1)}
            self.path.write_text(json.dumps(self.seconds, indent=2))
        return result


def run(images: Path, out: Path) -> dict[str, Any]:
    data, clock = out / "data", Clock(out / "seconds.json")
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "mix-held-out.json").is_file():
        split(images / "flickr8k" / "llava_align.json", data, "captions")
        split(images / "mix.json", data, "mix")
        write_language(out / "language", data)
    if not (out / "base").is_dir():
        assemble = AssembleConfig(
            vision="embedded", language=str(out / "language"), out=out / "base", vision_feature_layer=-1
        )
        clock.stage("assemble", lambda: run_assemble(assemble))

    def train(name: str, model: str, file: str, **options: Any) -> Any:
        if (out / name / SUMMARY).is_file():
            return TrainSummary(**json.loads((out / name / SUMMARY).read_text()))
        config = TrainConfig(
            model=str(out / model), data=data / f"{file}.json", image_root=images, out=out / name, **options
        )
        return clock.stage(name, lambda: run_train(config))

    def score(name: str, model: str, file: str, template: str) -> Any:
        config = ScoreConfig(
            model=str(out / model),
            data=data / f"{file}.json",
            image_root=images,
            out=out / name,
            template=template,
            workers=0,
        )
        return clock.stage(name, lambda: run_score(config))

    aligned = train("align", "base", "captions", recipe=str(ALIGN))
    scored = score("scores", "align", "mix", "llava-1.5")
    counts = {}
    for name, rule in ARMS.items():
        config = SelectConfig(scores=out / "scores", out=out / f"select-{name}", **rule)
        clock.stage(f"select-{name}", lambda config=config: run_select(config))
        told = json.loads((out / f"select-{name}" / "selection.json").read_text())
        counts[name] = {key: told[key] for key in ("tau", "totals", "by_source")}
    tuned = {}
    options = {"recipe": "tune", "learning_rate": 3e-4, "batch_size": 32, "micro_batch": 32, "save_steps": 100}
    options |= {"max_steps": steps_of_one_epoch(data / "mix.json", 32), "template": "llava-1.5"}
    for name in ARMS:
        tuned[name] = train(name, "align", "mix", selection=out / f"select-{name}", **options)
    held_out = {}
    for model in ("align", *ARMS):
        for file, template in (("captions", "llava-1.5-align"), ("mix", "llava-1.5")):
            score(f"held-out/{model}-{file}", model, f"{file}-held-out", template)
            held_out[f"{model} {file}"] = seen_and_gain(out / "held-out" / f"{model}-{file}")
    curves = {name: curve(out / name) for name in ("align", *ARMS)}
    draw(curves, out / "photographs.svg")
    return {
        "aligned": vars(aligned),
        "scored": vars(scored),
        "selected": counts,
        "tuned": {name: vars(done) for name, done in tuned.items()},
        "held_out": held_out,
        "curves": {name: points[:: max(1, len(points) // 20)] for name, points in curves.items()},
        "seconds": clock.seconds,
    }


def steps_of_one_epoch(data: Path, batch: int) -> int:
    return -(-len(json.loads(data.read_text())) // batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("photographs"))
    options = parser.parse_args()
    measured = run(options.data, options.out)
    for name, values in measured["held_out"].items():
        print(f"{name:<20}" + "".join(f"{key} {value:<12}" for key, value in values.items()))
    print(json.dumps(measured["seconds"], indent=2))
    write_results("photographs", [measured])


if __name__ == "__main__":
    main()
