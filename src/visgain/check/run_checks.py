"""What scoring a few rows shows: whether it works, whether the model looks at its pictures, whether there is room."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from visgain.check.estimate import Estimate
from visgain.check.findings import Finding, count, listed, shortened, some
from visgain.check.measure import SLOW, Measured


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured, and what it means for the whole."""

    measured: Measured
    estimate: Estimate


def scoring_fails(facts: Trial) -> Finding | None:
    """`score` would stop at its start."""
    told = facts.measured.failure
    if not told:
        return None
    blind = "do not reach the model" in told
    return Finding(
        check="scoring-fails",
        severity="error",
        what="the model does not see its pictures" if blind else "scoring a few rows fails",
        seen=shortened(told, 240),
        mend="check the processor and the template: are they this model's?"
        if blind
        else "if it speaks of image features or tokens, the processor is not this model's (patch_size, image_token); "
        "else try another --template or --dtype",
    )


def not_finite(facts: Trial) -> Finding | None:
    """Numbers that left the dtype's range."""
    rows = [skip.row for skip in facts.measured.skipped if "non-finite" in skip.reason]
    if not rows:
        return None
    return Finding(
        check="not-finite",
        severity="error" if not facts.measured.scores else "warning",
        what=f"{count(len(rows), 'measured row')} gave a log-probability that is no number",
        seen=f"in {facts.measured.dtype}",
        rows=some(rows),
        mend="--dtype bfloat16, or --dtype float32; if that does not help, the weights are damaged",
    )


def knows_nothing(facts: Trial) -> Finding | None:
    """Answers that the model finds no likelier than any others."""
    seen, guess = facts.measured.seen, math.log(max(2, facts.measured.vocabulary))
    if not len(seen) or seen.mean() < 0.9 * guess:
        return None
    return Finding(
        check="untrained",
        severity="warning",
        what="the model predicts the answers no better than by guessing: gains would be noise",
        seen=f"{seen.mean():.2f} nats a token; guessing among {facts.measured.vocabulary:,} tokens costs {guess:.2f}",
        mend="is it trained, aligned at least, and read with the template that it was trained on?",
    )


def ignores_pictures(facts: Trial) -> Finding | None:
    """A counterfactual that changes next to nothing."""
    if not facts.measured.n_tokens or facts.measured.counterfactual.startswith("none"):
        return None
    gain = facts.measured.blind - facts.measured.seen
    mean = float(np.abs(gain).mean())
    if mean >= 0.01:
        return None
    return Finding(
        check="ignores-pictures",
        severity="warning",
        what=f"the counterfactual {facts.measured.counterfactual} hardly changes the answers: gains would be noise",
        seen=f"{mean:.1g} nats a token on average",
        mend="align the model first; try --counterfactual swap to see whether the counterfactual is too weak",
    )


def slow_way(facts: Trial) -> Finding | None:
    """Faster ways of scoring that do not agree with this model's own forward."""
    if not facts.measured.rejected:
        return None
    told = [f"{way}: {shortened(reason, 80)}" for way, reason in facts.measured.rejected.items()]
    return Finding(
        check="slower-way",
        severity="note",
        what=f"scores come in the way {facts.measured.way!r}, as faster ones do not agree with the model's own forward",
        seen=listed(told, 4),
    )


def disk_full(facts: Trial) -> Finding | None:
    """Scores that would not fit."""
    needed, free = facts.estimate.disk_bytes, facts.estimate.free_bytes
    if needed is None or not free or needed < 0.9 * free:
        return None
    return Finding(
        check="disk-full",
        severity="error",
        what=f"the scores would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
        mend="--out on another disk",
    )


def slow_model(facts: Trial) -> Finding | None:
    """A model that takes seconds for one row."""
    if facts.measured.failure or facts.measured.tried or not facts.measured.parts:
        return None
    return Finding(
        check="slow-model",
        severity="note",
        what=f"one row takes more than {SLOW} s here, so the ways of scoring were not compared",
        seen="the time is that of the plainest way, one conversation after the other: an upper limit",
        mend="--device cuda on a machine with a GPU",
    )


CHECKS: list[Callable[[Trial], Finding | None]] = [
    scoring_fails,
    not_finite,
    knows_nothing,
    ignores_pictures,
    slow_way,
    slow_model,
    disk_full,
]
