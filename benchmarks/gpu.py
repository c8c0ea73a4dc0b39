"""Scoring on a GPU: LLaVA-1.5-7B's shapes with random weights, LLaVA-665K's lengths and repetition of pictures.

    python benchmarks/gpu.py [--model 7b|tiny] [--rows 192] [--dtype float16 bfloat16]

Prints samples a second, the share of this card's measured matrix-product ceiling that the model's arithmetic reaches
(MFU), and the hours that LLaVA-665K's 624,610 multimodal rows would take, for our engine, the naive loop and padded
batches. `--model tiny --device cpu` runs the same code anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

import score
from _results import result_row, write_results
from visgain.scoring.engine import Engine, scored
from visgain.scoring.run import PACK_TOKENS
from visgain.scoring.unit import Unit
from visgain.vlm.load import VLM

ROWS_665K = 624_610
SHAPES = {
    "7b": {
        "text": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "vocabulary": 32_064,
    },
    "tiny": {
        "text": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4},
        "vision": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vocabulary": 1000,
    },
}


def build(name: str, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    shape = SHAPES[name]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape["vision"], image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(**shape["text"], vocab_size=shape["vocabulary"], max_position_embeddings=4096),
        image_token_index=score.IMAGE_TOKEN,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def ceiling(dtype: torch.dtype, device: str, seconds: float = 2.0) -> float:
    """FLOP/s of large matrix products on this device: the most that any model can reach."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    n, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            a @ b
        synchronise(device)
        n += 10
    return 2 * size**3 * n / (time.perf_counter() - begin)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def flops(model: LlavaForConditionalGeneration, units: Sequence[Unit], *, shared: bool) -> float:
    """Multiply-adds, counted twice, of scoring `units` in both conditions; without recomputation if `shared`."""
    text, vision = model.config.text_config, model.config.vision_config
    body = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    total = 0.0
    for unit in units:
        lengths = [len(row.input_ids) for row in unit.rows]
        answers = sum(len(row.turn) for row in unit.rows)
        prefix = score.SYSTEM_TOKENS + score.IMAGE_TOKENS if shared and len(lengths) > 1 else 0
        tokens = sum(lengths) - prefix * (len(lengths) - 1)
        pairs = prefix**2 / 2 + sum((length**2 - prefix**2) / 2 for length in lengths)
        pictures = 1 if shared else len(lengths)
        total += 2 * body * tokens + 4 * text.hidden_size * text.num_hidden_layers * pairs
        total += 2 * text.hidden_size * text.vocab_size * answers
        total += pictures * (2 * tower * patches + 4 * vision.hidden_size * vision.num_hidden_layers * patches**2)
    return 2 * total


def ours(vlm: VLM, units: Sequence[Unit]) -> score.Scores:
    engine = Engine(vlm=vlm, way="shared", pack_tokens=PACK_TOKENS[vlm.device.type], tried=score.TRIED)
    found = {id(unit): pairs for unit, pairs in scored(engine, units)}
    return [nll for unit in units for pair in found[id(unit)] for nll in pair]


def naive(vlm: VLM, units: Sequence[Unit]) -> score.Scores:
    found = []
    for unit in units:
        for row in unit.rows:
            for pictures in (unit.seen, unit.blind):
                ids = torch.from_numpy(row.input_ids)[None].to(vlm.device)
                labels = torch.where(torch.from_numpy(row.is_answer)[None].to(vlm.device), ids, -100)
                pixels = pictures["pixel_values"].to(vlm.device, vlm.model.dtype)
                with torch.inference_mode():
                    logits = vlm.model(input_ids=ids, labels=labels, pixel_values=pixels).logits[0].float()
                where = torch.from_numpy(np.flatnonzero(row.is_answer)).to(vlm.device)
                nll = torch.nn.functional.cross_entropy(logits[where - 1], ids[0, where], reduction="none")
                found.append(nll.cpu().numpy())
    return found


def padded(vlm: VLM, units: Sequence[Unit]) -> score.Scores:
    return score.padded(vlm, units, size=8)


def timed(way: Callable[[VLM, Sequence[Unit]], score.Scores], vlm: VLM, units: Sequence[Unit]) -> tuple[float, float]:
    """Wall seconds, and peak GiB of the device's memory (0 on a CPU)."""
    device = str(vlm.device)
    way(vlm, units[:4])
    synchronise(device)
    if vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    way(vlm, units)
    synchronise(device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if vlm.device.type == "cuda" else 0.0
    return time.perf_counter() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="7b")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rng = np.random.default_rng(0)
    vocabulary = SHAPES[options.model]["vocabulary"]
    units = score.make_units(score.draw_case("665k", options.rows, rng), vocabulary, rng)
    where = torch.cuda.get_device_name().replace(" ", "-").lower() if options.device.startswith("cuda") else None
    results = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        vlm = VLM(name=options.model, model=build(options.model, dtype, options.device), processor=score._NoProcessor())
        top = ceiling(dtype, options.device)
        n = options.rows
        print(f"\n{options.model}, {name}: {n} rows about {len(units)} pictures; ceiling {top / 1e12:.1f} TFLOP/s")
        print(f"{'':18}{'rows/s':>9}{'MFU':>8}{'hours for 665K':>16}{'peak GiB':>10}{'ratio':>7}")
        measured = {way.__name__: timed(way, vlm, units) for way in (naive, padded, ours)}
        for way, (seconds, peak) in measured.items():
            mfu = flops(vlm.model, units, shared=way == "ours") / seconds / top
            hours = ROWS_665K / n * seconds / 3600
            ratio = measured["naive"][0] / seconds
            print(f"{way:18}{n / seconds:>9.2f}{mfu:>8.1%}{hours:>16.2f}{peak:>10.1f}{ratio:>7.2f}")
        first, best = measured["naive"][0], measured["ours"][0]
        case = f"{options.model}, {name}, 665k mix, {n} rows, ceiling {top / 1e12:.1f} TFLOP/s"
        for metric, mine, base in (
            ("seconds_per_row", best / n, first / n),
            ("hours_for_665k", ROWS_665K / n * best / 3600, ROWS_665K / n * first / 3600),
            ("peak_gib", measured["ours"][1], measured["naive"][1]),
        ):
            results.append(
                result_row(
                    benchmark="gpu",
                    case=case,
                    metric=metric,
                    ours=mine,
                    baseline=base,
                    baseline_name="naive loop, same dtype",
                    ratio=base / mine if mine else 1.0,
                )
            )
        mfu = flops(vlm.model, units, shared=True) / best / top
        results.append(
            result_row(
                benchmark="gpu",
                case=case,
                metric="model_flop_utilisation",
                ours=mfu,
                baseline=flops(vlm.model, units, shared=False) / first / top,
                baseline_name="naive loop, same dtype",
                ratio=mfu / (flops(vlm.model, units, shared=False) / first / top),
            )
        )
        del vlm
    if where is None:
        print("\nnot written: results are kept for GPUs only")
    else:
        print(f"\nwrote {write_results('gpu', results, where)}")


if __name__ == "__main__":
    sys.exit(main())
