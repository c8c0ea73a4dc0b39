"""Training: forward and backward of one step, ours against the plain Trainer's, on the same rows and weights.

    python benchmarks/train.py [--shape A B] [--active 100 66 21] [--batch 4 8] [--rows N] [--trl-python PATH]

The models are those of benchmarks/score.py: shape A has 66M parameters with the head 2% of the body (a 7B's
proportion), shape B 105M with a vocabulary of 32,000. Rows have the lengths of LLaVA-665K's mixture and 576 image
tokens each; of their answer tokens a random share is active. Vision is frozen, projector and language are trained, in
float32.

    padded, full logits    what transformers' Trainer does: batches of --batch rows in random order, logits of all
                           tokens, the model's own loss
    padded, active head    the same batches; only hidden states of active tokens go through the head
    packs, full logits     conversations side by side without padding; logits of all tokens
    packs, active head     ours: both
    TRL                    padded, TRL 1.16's loss in chunks, as its SFTTrainer computes it ("nll", formerly
                           "chunked_nll"); with --trl-python, a Python that has trl (tests/test_export_trl.py
                           makes one, in .venv/environments)

Every way must give the same gradients. CPU seconds are of this process on one thread; peak memory is above what is
there before the step, gradients and weights not included. The memory of the loss alone is that of going from final
states to loss and back. Ratios above 1 are in our favour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast
from transformers.utils import logging

from _results import REPOSITORY, result_row, write_results
from score import IMAGE_TOKEN, VOCABULARY, _peak, _reset_peak, build, draw_case, make_units
from visgain.training.collate import IGNORED, Collator, TrainingRow
from visgain.training.packing import PACKED, PADDED, Way, cut, laid_out
from visgain.training.trainer import PACK_TOKENS
from visgain.vlm.attention import packed
from visgain.vlm.forward import states_nll
from visgain.vlm.pack import pack_apart

BATCHES = (4, 8)  # rows of a padded batch; 8 is the plain Trainer's own, and the more rows, the more padding
ACTIVE = (100, 66, 21)
BASELINE = "padded, full logits"

Rows = Sequence[TrainingRow]
Step = Callable[[LlavaForConditionalGeneration, Rows], float]
"""Adds the gradients of the mean NLL of all active tokens, and returns it."""


def make_model(shape: str) -> LlavaForConditionalGeneration:
    model = build(shape).train()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    return model


def make_rows(shape: str, n: int) -> list[TrainingRow]:
    rng = np.random.default_rng(0)
    units = make_units(draw_case("665k", n, rng), VOCABULARY[shape], rng)
    rows = [row for unit in units for row in unit.rows]
    return [TrainingRow(encoded=row, weight=np.ones(len(row.turn), np.float32)) for row in rows]


def with_active(rows: Rows, percent: int) -> list[TrainingRow]:
    """`rows` with so many of their answer tokens active, at random."""
    rng = np.random.default_rng(1)
    sizes = [len(row.weight) for row in rows]
    chosen = rng.permutation(sum(sizes)) < round(sum(sizes) * percent / 100)
    parts = np.split(chosen.astype(np.float32), np.cumsum(sizes)[:-1])
    return [replace(row, weight=part) for row, part in zip(rows, parts, strict=True)]


def n_active(rows: Rows) -> int:
    return sum(int(row.active.sum()) for row in rows)


# ---------------------------------------------------------------- the ways


def plain(size: int) -> Step:
    """Batches in the order of the rows, as the plain Trainer takes them, divided by the tokens of the step."""

    def step(model: LlavaForConditionalGeneration, rows: Rows) -> float:
        return sum(_back(model(**batch, num_items_in_batch=n_active(rows)).loss) for batch in _batches(rows, size))

    return step


def _batches(rows: Rows, size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), size):
        yield Collator(0)(rows[start : start + size])


def trl(size: int) -> Step:
    """As SFTTrainer computes it."""

    def step(model: LlavaForConditionalGeneration, rows: Rows) -> float:
        outputs = (model(**batch, fused_lm_head=True) for batch in _batches(rows, size))
        return sum(_back(-output.log_probs.sum() / n_active(rows)) for output in outputs)

    return step


def our_way(way: Way, most: int) -> Step:
    def step(model: LlavaForConditionalGeneration, rows: Rows) -> float:
        total = 0.0
        for numbers in cut(rows, side_by_side=way.side_by_side, most=most):
            one = way.make(model, [rows[number] for number in numbers], image_token_id=IMAGE_TOKEN, pad_id=0)
            with laid_out(model, one):
                total += _back((way.nll(model, model.forward, one, one.inputs) * one.weight).sum() / n_active(rows))
        return total

    return step


def packs_with_full_logits(model: LlavaForConditionalGeneration, rows: Rows) -> float:
    total = 0.0
    for numbers in cut(rows, side_by_side=True, most=PACK_TOKENS["cpu"]):
        some = [rows[number] for number in numbers]
        made = pack_apart(model, [row.encoded for row in some], IMAGE_TOKEN)
        labels = made.inputs["input_ids"].new_full(made.inputs["input_ids"].shape, IGNORED)
        active = torch.from_numpy(np.concatenate([row.active for row in some]))
        labels[0, made.layout.wanted[active]] = made.targets[active]
        made.layout.last_attention = None  # all states are used
        with packed(model, made.layout):
            logits = model(**made.inputs, use_cache=False).logits.float()
            loss = cross_entropy(logits[0], labels[0], ignore_index=IGNORED, reduction="sum") / n_active(rows)
            del logits
            total += _back(loss)
    return total


def _back(loss: Tensor) -> float:
    loss.backward()
    return float(loss.detach())


OURS = "packs, active head"


def ways(batch: int) -> dict[str, Step]:
    return {
        BASELINE: plain(batch),
        "padded, active head": our_way(PADDED, batch),
        "packs, full logits": packs_with_full_logits,
        OURS: our_way(PACKED, PACK_TOKENS["cpu"]),
    }


# ---------------------------------------------------------------- the loss alone


def loss_memory(model: LlavaForConditionalGeneration, rows: Rows, size: int) -> tuple[float, float]:
    """MiB at most of going from the final states of a padded batch to loss and back: the plain way, and ours."""
    batch = next(_batches(rows, size))
    states = torch.randn(*batch["labels"].shape, model.config.text_config.hidden_size)

    def whole(states: Tensor) -> Tensor:
        logits = model.lm_head(states)
        loss: Tensor = model.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])
        return loss

    def chunks(states: Tensor) -> Tensor:
        row, position = (batch["labels"] != IGNORED).nonzero(as_tuple=True)
        output = LlavaModelOutputWithPast(last_hidden_state=states[row, position - 1][None])
        return states_nll(model, output, batch["input_ids"][row, position]).mean()

    peaks = []
    for way in (whole, chunks):
        leaf = states.clone().requires_grad_()
        before = _reset_peak()
        way(leaf).backward()
        peaks.append(_peak() - before)
    return peaks[0], peaks[1]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Cost:
    cpu: float  # seconds of this process
    peak: float  # MiB
    loss: float


def cost(step: Step, model: LlavaForConditionalGeneration, rows: Rows, repeats: int) -> Cost:
    """The best of `repeats`; the gradients of the last are left in `model`."""
    runs = []
    for _ in range(repeats):
        for parameter in model.parameters():  # there from the start, as in all steps but the first
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = _reset_peak()
        start = time.process_time()
        loss = step(model, rows)
        runs.append(Cost(time.process_time() - start, _peak() - before, loss))
    return min(runs, key=lambda run: run.cpu)


def gradient(model: LlavaForConditionalGeneration) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def padding(rows: Rows, batch: int) -> float:
    """Share of the positions of padded batches that hold no token."""
    lengths = [len(row.encoded.input_ids) for row in rows]
    parts = [lengths[k : k + batch] for k in range(0, len(rows), batch)]
    return 1 - sum(lengths) / sum(max(part) * len(part) for part in parts)


def measure(
    shape: str, percent: int, batch: int, n_rows: int, repeats: int, trl_python: str | None
) -> list[dict[str, Any]]:
    model, rows = make_model(shape), with_active(make_rows(shape, n_rows), percent)
    n_tokens = np.mean([len(row.encoded.input_ids) for row in rows])
    print(
        f"\nshape {shape}, {percent}% active: {n_rows} rows, {n_tokens:.0f} tokens a row, {n_active(rows)} active; "
        f"{padding(rows, batch):.0%} of padded batches of {batch} is padding; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':26}{'CPU s':>8}{'peak MiB':>10}{'time':>7}{'memory':>8}{'gradient error':>16}")
    results: list[dict[str, Any]] = []
    where = f"shape {shape}, {percent}% active, {n_rows} rows by {batch}, {padding(rows, batch):.0%} padding"

    def add(case: str, metric: str, ours: float, baseline: float, name: str = BASELINE) -> None:
        values = {"ours": round(ours, 3), "baseline": round(baseline, 3)}
        results.append(
            result_row(benchmark="train", case=f"{where}; {case}", metric=metric, baseline_name=name, **values)
        )

    costs: dict[str, Cost] = {}
    reference = torch.zeros(0)
    for name, step in ways(batch).items():
        one = costs[name] = cost(step, model, rows, repeats)
        found = gradient(model)
        reference = found if name == BASELINE else reference
        error = float((found - reference).norm() / reference.norm())
        _tell(name, one, costs[BASELINE], f"{error:.1e}")
        if error > 1e-4:
            raise SystemExit(f"{name}: gradients differ from those of the plain step")
        if name != BASELINE:
            add(f"{name}; gradients within {error:.1e}", "cpu_seconds", one.cpu, costs[BASELINE].cpu)
            add(name, "peak_mib", one.peak, costs[BASELINE].peak)
            add(name, "cpu_ms_per_active_token", *(1e3 * c.cpu / n_active(rows) for c in (one, costs[BASELINE])))
    if trl_python is not None:
        theirs = _trl_cost(trl_python, shape, percent, batch, n_rows, repeats)
        _tell("TRL", theirs, costs[BASELINE], "-")
        if abs(theirs.loss - costs[BASELINE].loss) > 1e-4:
            raise SystemExit(f"TRL's loss is {theirs.loss} and the plain step's {costs[BASELINE].loss}")
        add("packs, active head", "cpu_seconds", costs[OURS].cpu, theirs.cpu, "TRL")
        add("packs, active head", "peak_mib", costs[OURS].peak, theirs.peak, "TRL")
    plainly, ours = loss_memory(model, rows, batch)
    print(f"{'loss alone, MiB':26}{plainly:>8.0f} plain, {ours:.0f} ours: {plainly / max(ours, 1):.1f} times less")
    add("the loss alone", "peak_mib", max(ours, 1.0), plainly)
    return results


def _tell(name: str, one: Cost, base: Cost, error: str) -> None:
    times, less = f"{base.cpu / one.cpu:.2f}", f"{base.peak / one.peak:.2f}"
    print(f"{name:26}{one.cpu:>8.1f}{one.peak:>10.0f}{times:>7}{less:>8}{error:>16}", flush=True)


_BESIDE = """\
import os, runpy, sys
sys.path += os.environ["BESIDE"].split(os.pathsep)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script with what TRL's Python has, and of ours what it lacks."""


def _trl_cost(python: str, shape: str, *numbers: int) -> Cost:
    """TRL's step by a Python that has it: this file once more, on the same rows and weights."""
    command = [python, "-c", _BESIDE, __file__, "--as-trl", shape, *map(str, numbers)]
    folders = [str(Path(__file__).parent), str(REPOSITORY / "src"), sysconfig.get_path("purelib")]
    environment = {**os.environ, "BESIDE": os.pathsep.join(folders)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} cannot run TRL's step: {done.stderr.strip().splitlines()[-1]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _as_trl(shape: str, percent: int, batch: int, n_rows: int, repeats: int) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, rows = make_model(shape), with_active(make_rows(shape, n_rows), percent)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer asks for them
    print(json.dumps(asdict(cost(trl(batch), model, rows, repeats))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=list(VOCABULARY), default=list(VOCABULARY))
    parser.add_argument("--active", nargs="+", type=int, default=ACTIVE, help="percent of the answer tokens")
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES, help="rows of a padded batch")
    parser.add_argument("--rows", type=int, help="of a step; without it, those of one batch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--trl-python", help="also measure TRL, with this interpreter")
    parser.add_argument("--as-trl", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if options.as_trl:
        shape, *numbers = options.as_trl
        _as_trl(shape, *map(int, numbers))
        return
    if options.trl_python is None:
        print("TRL is left out; --trl-python PATH names an interpreter that has it")
    results = [
        row
        for shape in options.shape
        for percent in options.active
        for batch in options.batch
        for row in measure(shape, percent, batch, options.rows or batch, options.repeats, options.trl_python)
    ]
    print(f"\nwrote {write_results('train', results)}")


if __name__ == "__main__":
    sys.exit(main())
