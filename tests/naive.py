"""What scores must be: the model's own forward over one conversation after the other, with nothing of ours.

And random conversations about random pictures to try it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from tiny_models import make_sample
from visgain.scoring.engine import NLL
from visgain.scoring.unit import Unit
from visgain.types import Encoded, Sample
from visgain.vlm.load import VLM
from zoo import ZOO


@cache
def built(name: str) -> VLM:
    return ZOO[name].build()


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Coarse random blocks: two of them differ at every scale that a model looks at."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def naive_nll(vlm: VLM, encoded: Encoded) -> np.ndarray:
    """Full logits at batch 1 from the model as it is: nothing of our head, batching or masks."""
    ids = torch.from_numpy(encoded.input_ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **encoded.model_inputs}
    with torch.no_grad():
        logits = vlm.model(**inputs, use_cache=False).logits[0]
    log_q = torch.log_softmax(logits.double(), dim=-1)
    where = encoded.is_answer.nonzero()[0]
    return -log_q[where - 1, encoded.input_ids[where]].numpy()


# ---------------------------------------------------------------- conversations

SIZES = ((40, 30), (24, 40))
QUESTIONS = ("What is this?", "What is", "What is this? Say it.", "And", "Is there a dog?")  # some begin others
ANSWERS = ("A", "A red", "A red cup.", "no", "No, there is a dog.", "Yes, a cup on a table. " * 6)


@dataclass(frozen=True, kw_only=True)
class About:
    """Conversations about the same pictures, each as its texts in turn."""

    seeds: tuple[int, ...]
    size: tuple[int, int]
    talks: tuple[tuple[str, ...], ...]

    @property
    def samples(self) -> list[Sample]:
        return [make_sample(*texts, images=len(self.seeds)) for texts in self.talks]

    def pictures(self, *, blind: bool = False) -> list[Image.Image]:
        return [picture(seed + 100 * blind, self.size) for seed in self.seeds]


@st.composite
def talks(draw: st.DrawFn, n_pictures: int) -> tuple[str, ...]:
    """Questions and answers, with the pictures' marks before or after some of the questions."""
    texts = list(
        draw(st.lists(st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(ANSWERS)), min_size=1, max_size=3))
    )
    questions = [question for question, _ in texts]
    late = draw(st.integers(0, 3)) == 0
    for _ in range(n_pictures):
        turn = draw(st.integers(0, len(questions) - 1)) if late else 0
        before = draw(st.integers(0, 4)) > 0
        questions[turn] = f"<image>\n{questions[turn]}" if before else f"{questions[turn]}<image>"
    return tuple(text for question, (_, answer) in zip(questions, texts, strict=True) for text in (question, answer))


@st.composite
def abouts(draw: st.DrawFn) -> About:
    n_pictures = draw(st.sampled_from([1, 1, 1, 2]))
    return About(
        seeds=tuple(draw(st.integers(0, 5)) for _ in range(n_pictures)),
        size=draw(st.sampled_from([SIZES[0], *SIZES])),
        talks=tuple(draw(st.lists(talks(n_pictures), min_size=1, max_size=4))),
    )


def fitting(name: str, about: About) -> About:
    """`about` as the family takes pictures: where they are drawn, or before the first question."""
    if ZOO[name].pictures == "between turns":
        return about
    seeds = about.seeds[:1] if ZOO[name].pictures == "one" else about.seeds
    bare = [[text.replace("<image>\n", "").replace("<image>", "") for text in talk] for talk in about.talks]
    return replace(about, seeds=seeds, talks=tuple(("<image>\n" * len(seeds) + talk[0], *talk[1:]) for talk in bare))


@lru_cache(maxsize=16)
def encoded(name: str, about: About, *, blind: bool = False) -> tuple[Encoded, ...]:
    return tuple(ZOO[name].encode(built(name), sample, about.pictures(blind=blind)) for sample in about.samples)


def unit(name: str, about: About) -> Unit:
    return Unit.of(encoded(name, about), encoded(name, about, blind=True)[0].model_inputs)


@lru_cache(maxsize=16)
def naive_pairs(name: str, about: About) -> list[tuple[np.ndarray, np.ndarray]]:
    """(seen, blind) of each conversation."""
    vlm = built(name)
    both = zip(encoded(name, about), encoded(name, about, blind=True), strict=True)
    return [(naive_nll(vlm, seen), naive_nll(vlm, blind)) for seen, blind in both]


def worst(found: Sequence[tuple[NLL, NLL]], expected: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest difference in nats."""
    return max(
        float(np.abs(one - other).max())
        for pair, naive in zip(found, expected, strict=True)
        for one, other in zip(pair, naive, strict=True)
    )
