"""Every family of the zoo that has a processor here answers in batches as one by one, and shows where it looks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL.Image import Image

from naive import built, picture
from tiny_models import make_sample
from visgain.errors import ModelError
from visgain.evaluation import generate
from visgain.evaluation.attention import GROUPS, attention_shares, group_of
from visgain.evaluation.decoders import parse_decoder
from visgain.evaluation.decoding import noised
from visgain.evaluation.generate import Ask, Prompt
from visgain.types import Encoded
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.load import VLM
from visgain.vlm.template import make_encoder
from zoo import ZOO

NEW = 6
QUESTIONS = ("What is this?", "Is there a red dog on the table in this picture, or is that a cup?", "And this?")
FAMILIES = [name for name, entry in ZOO.items() if entry.processor]


def marked(quick: Iterable[str]) -> list[object]:
    """The families; all but the `quick` ones are slow together."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in FAMILIES]


@dataclass(frozen=True)
class Blocks:
    """A picture of random blocks."""

    seed: int

    @property
    def key(self) -> str:
        return str(self.seed)

    def hint(self) -> None:
        return None

    def open(self) -> Image:
        return picture(self.seed)


ASKS = [Ask.plain(question, [Blocks(seed)]) for seed, question in enumerate(QUESTIONS)]


NO_END = 1 << 40
"""In place of the tokens that end an answer, which random weights say soon."""


def said(vlm: VLM, asks: list[Ask], decoding: str = "greedy") -> list[list[int]]:
    """The tokens of the answers to `asks`, side by side."""
    encoder = make_encoder(vlm)
    pictures = [tuple(image.open() for image in ask.images) for ask in asks]
    prompts = [
        Prompt(ask=ask, images=images, encoded=encoder.prompt(ask.turns, images))
        for ask, images in zip(asks, pictures, strict=True)
    ]
    with torch.inference_mode():
        tokens: list[list[int]] = parse_decoder(decoding)(vlm, encoder, prompts, NEW).tolist()
    return tokens


@torch.inference_mode()
def plainly(vlm: VLM, ask: Ask) -> list[int]:
    """The most likely token after the whole sequence so far, alone and without any cache."""
    prompt = make_encoder(vlm).prompt(ask.turns, [image.open() for image in ask.images])
    ids, inputs = torch.from_numpy(prompt.input_ids)[None], dict(prompt.model_inputs)
    for _ in range(NEW):
        logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        for name in inputs.keys() & set(PER_TOKEN_INPUTS):  # a new token is text, and sees what the last one saw
            new = inputs[name][:, -1:]
            new = new if name == "cross_attention_mask" else torch.zeros_like(new)
            inputs[name] = torch.cat([inputs[name], new], dim=1)
    return [int(token) for token in ids[0, len(prompt.input_ids) :]]


# M-RoPE (qwen), token types (gemma3, paligemma), cross-attention (mllama), completed questions (blip-2), packed patches
QUICK = ("qwen2_vl", "qwen3_vl", "gemma3", "paligemma", "mllama", "blip-2", "pixtral", "internvl")
SAY_IMAGES = ("qwen2_5_vl",)
"""Their random weights say image tokens, which a forward without a cache takes for pictures."""
ALONE = ("instructblip",)
"""What looks at their pictures reads the question, too: only questions of one length go side by side."""


@pytest.mark.parametrize("name", marked(QUICK))
def test_a_batch_answers_as_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "end_ids", lambda vlm: [NO_END])
    vlm = built(name)
    found = [said(vlm, [ask])[0] for ask in ASKS]
    if name not in ALONE:
        assert said(vlm, ASKS) == found
    if name not in SAY_IMAGES:
        assert found == [plainly(vlm, ask) for ask in ASKS]


@pytest.mark.parametrize("name", ["got_ocr2", "aria"])
def test_models_that_take_pictures_as_they_are_answer_in_16_bits(name: str) -> None:
    vlm = replace(built(name), model=copy.deepcopy(built(name).model).to(torch.bfloat16))
    for decoding in ("greedy", "vcd:second=blur"):
        assert all(said(vlm, ASKS[:2], decoding))
    assert np.allclose(attention_shares(vlm, encoded(vlm)).sum(-1), 1, atol=1e-2)


def test_masks_over_pictures_get_no_noise() -> None:
    vlm = built("phi4_multimodal")
    prompt = make_encoder(vlm).prompt(ASKS[0].turns, [picture(0)])
    masks = {name: value for name, value in prompt.model_inputs.items() if "mask" in name}
    changed = noised(prompt, 500, torch.Generator().manual_seed(0)).model_inputs
    assert any(value.is_floating_point() for value in masks.values())
    assert all(changed[name] is value for name, value in masks.items())
    assert said(vlm, ASKS[:2], "vcd")


@pytest.mark.parametrize(
    ("name", "decoding", "told"),
    [
        ("blip-2", "vcd:second=blur", "does not hand out its cache"),
        ("paligemma2", "var:dims=1/3", "has parts that cannot be edited"),
    ],
)
def test_what_a_model_cannot_do_is_told(name: str, decoding: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        said(built(name), ASKS[:1], decoding)


# ---------------------------------------------------------------- attention


def encoded(vlm: VLM) -> Encoded:
    return make_encoder(vlm).encode(make_sample("<image>\nWhat is this?", "A red cup."), [picture(0)])


@pytest.mark.parametrize("name", ["paligemma2"])  # its attention scores are capped
def test_attention_is_that_of_the_models_own_maps(name: str) -> None:
    vlm = built(name)
    one = encoded(vlm)
    found = attention_shares(vlm, one)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        maps = model(
            input_ids=torch.from_numpy(one.input_ids)[None], **one.model_inputs, output_attentions=True
        ).attentions
    rows = np.flatnonzero(one.is_answer) - 1
    group = group_of(one, vlm.image_token_id)
    expected = [
        [[weights[0].mean(0)[row].numpy()[group == g].sum() for g in range(len(GROUPS))] for row in rows]
        for weights in maps
    ]
    assert np.allclose(found, expected, atol=1e-5)
