"""A pack against its definition: what each token sees, where it stands, which token it predicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from naive import SIZES, About, built, encoded
from visgain.types import Encoded
from visgain.vlm import attention as attention_module
from visgain.vlm import forward as forward_module
from visgain.vlm.attention import Layout, Segment, packed, packed_attention
from visgain.vlm.forward import pack_nll
from visgain.vlm.load import VLM
from visgain.vlm.pack import Branch, branches, last_attention, pack, shared_prefix
from zoo import ZOO

# ---------------------------------------------------------------- attention


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Random trees of segments with random pictures and random wanted tokens, as a Layout takes them."""
    segments: list[Segment] = []
    for number in range(draw(st.integers(1, 7))):
        start = segments[-1].stop if segments else 0
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        segments.append(Segment(start=start, stop=start + draw(st.integers(1, 6)), parent=parent))
    length = segments[-1].stop
    block = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
    wanted = sorted(draw(st.sets(st.integers(0, length - 1))))
    tensors = {"wanted": torch.tensor(wanted, dtype=torch.int64), "block": torch.tensor(block, dtype=torch.int64)}
    return {"segments": segments, **tensors, "mutual": draw(st.booleans())}


def chain(layout: Layout, token: int) -> list[int]:
    """The tokens of the conversation up to the end of `token`'s segment."""
    number: int | None = next(k for k, segment in enumerate(layout.segments) if segment.start <= token < segment.stop)
    found: list[int] = []
    while number is not None:
        segment = layout.segments[number]
        found = [*range(segment.start, segment.stop), *found]
        number = segment.parent
    return found


def sees(layout: Layout, window: int | None, query: int, key: int) -> bool:
    """The definition: causal along the conversation, within the window, and both ways inside a picture."""
    tokens = chain(layout, query)
    if key not in tokens:
        return False
    distance = tokens.index(query) - tokens.index(key)
    same = layout.mutual and layout.block[query] > 0 and bool(layout.block[query] == layout.block[key])
    return (distance >= 0 or same) and (window is None or distance < window)


@settings(deadline=None, max_examples=80)
@given(shape=layouts(), window=st.none() | st.integers(1, 12), trimmed=st.booleans(), groups=st.sampled_from([1, 2]))
def test_every_token_of_a_pack_attends_to_what_it_would_see_alone(
    shape: dict[str, Any], window: int | None, trimmed: bool, groups: int
) -> None:
    layout = Layout(**shape)
    length = layout.length
    layer = nn.Module()
    layer.num_key_value_groups = groups
    layout.last_attention = layer if trimmed else None
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, 4, length, 8, generator=generator)
    key, value = (torch.randn(1, 4 // groups, length, size, generator=generator) for size in (8, 6))
    found = attend(layout, layer, query, key, value, window)
    mask = torch.tensor([[sees(layout, window, q, k) for k in range(length)] for q in range(length)])
    scores = (query @ key.repeat_interleave(groups, dim=1).mT).double() * 0.3
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, dim=1).double()
    expected = expected.transpose(1, 2)
    if trimmed:
        others = [token for token in range(length) if token not in layout.wanted]
        expected[:, others] = 0
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


def attend(layout: Layout, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    attention_module._active = layout
    try:
        result, _ = packed_attention(layer, query, key, value, None, scaling=0.3, sliding_window=window)
    finally:
        attention_module._active = None
    return result


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "cache"])
def test_what_attention_in_a_pack_cannot_express_is_refused(name: str) -> None:
    layout = Layout(
        segments=[Segment(start=0, stop=3, parent=None)], wanted=torch.tensor([1]), block=torch.zeros(3).long()
    )
    states = torch.randn(1, 2, 3, 4)
    attention_module._active = layout
    try:
        packed_attention(nn.Module(), states, states, states, None, **{name: None})
        with pytest.raises(NotImplementedError, match=name):
            packed_attention(nn.Module(), states, states, states, None, **{name: 1.0})
    finally:
        attention_module._active = None


@pytest.mark.parametrize("name", ["llava", "phi4_multimodal", "got_ocr2"])
def test_only_the_language_part_attends_as_a_pack_and_only_while_it_runs(name: str) -> None:
    model = ZOO[name].build().model
    parts = [model.config.get_text_config(decoder=True), model.config.vision_config]
    parts[1]._attn_implementation = "eager"
    layout = Layout(
        segments=[Segment(start=0, stop=1, parent=None)], wanted=torch.tensor([0]), block=torch.zeros(1).long()
    )

    def implementations() -> list[str]:
        return [part._attn_implementation for part in parts]

    def fail_inside() -> None:
        with packed(model, layout):
            assert implementations() == [attention_module.PACKED, "eager"]
            raise KeyError

    before = implementations()
    with pytest.raises(KeyError):
        fail_inside()
    assert implementations() == before
    assert attention_module._active is None


# ---------------------------------------------------------------- what is shared

IMAGE = 9


def row(ids: list[int], answers: list[bool]) -> Encoded:
    n = sum(answers)
    return Encoded(
        input_ids=np.asarray(ids, np.int64),
        is_answer=np.asarray(answers, bool),
        turn=np.zeros(n, np.int32),
        chars=np.zeros((n, 2), np.int32),
        n_image_tokens=ids.count(IMAGE),
    )


@st.composite
def talks(draw: st.DrawFn, most: int = 5) -> list[Encoded]:
    """Conversations of few different tokens, so that they often begin alike, with a picture of two somewhere."""
    rows = []
    for _ in range(draw(st.integers(1, most))):
        size = draw(st.integers(2, 9))
        ids = [1, *draw(st.lists(st.sampled_from([2, 3]), min_size=size, max_size=size))]
        at = draw(st.integers(0, 2) | st.integers(0, len(ids)))
        ids[at:at] = [IMAGE, IMAGE]
        answers = [token != IMAGE and draw(st.booleans()) for token in ids]
        answers[0] = False
        if ids[-1] == IMAGE:
            ids, answers = [*ids, 2], [*answers, True]
        answers[-1] = True
        rows.append(row(ids, answers))
    return rows


@given(rows=talks())
def test_what_is_shared_is_all_that_can_be(rows: list[Encoded]) -> None:
    columns = zip(*(one.input_ids.tolist() for one in rows), strict=False)
    common = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    predicting = min(one.is_answer.tolist().index(True) for one in rows) - 1
    expected = min(common, predicting)
    if any(IMAGE in one.input_ids[expected:] for one in rows):
        expected = 0
    assert shared_prefix(rows, IMAGE) == expected
    found = branches(rows, IMAGE)
    assert [id(one) for branch in found for one in branch.rows] == [id(one) for one in rows]
    if len(rows) > 1 and expected:
        assert [branch.n_shared for branch in found] == [expected]
        assert found[0].n_tokens == sum(len(one.input_ids) - expected for one in rows) + expected
    else:
        assert [branch.n_shared for branch in found] == [0] * len(rows)
        assert sum(branch.n_tokens for branch in found) == sum(len(one.input_ids) for one in rows)


# ---------------------------------------------------------------- the pack


@settings(deadline=None, max_examples=150)
@given(units=st.lists(talks(3), min_size=1, max_size=4))
def test_along_each_way_from_the_beginning_stands_one_conversation(units: list[list[Encoded]]) -> None:
    model = built("llava").model
    parts = [branch for rows in units for branch in branches(rows, IMAGE)]
    made = pack(model, parts, IMAGE)
    layout, ids = made.layout, made.inputs["input_ids"][0]
    rows = [one for branch in parts for one in branch.rows]
    parents = {segment.parent for segment in layout.segments}
    leaves = [number for number in range(len(layout.segments)) if number not in parents]
    assert len(leaves) == len(rows)
    assert list(made.counts) == [int(one.is_answer.sum()) for one in rows]
    assert sum(segment.stop - segment.start for segment in layout.segments) == len(ids) == layout.length
    wanted, targets = iter(layout.wanted.tolist()), iter(made.targets.tolist())
    for leaf, one in zip(leaves, rows, strict=True):
        tokens = chain(layout, layout.segments[leaf].stop - 1)
        assert ids[tokens].tolist() == one.input_ids.tolist()
        assert made.inputs["position_ids"][0, tokens].tolist() == list(range(len(tokens)))
        for position in one.is_answer.nonzero()[0]:
            assert next(wanted) == tokens[position - 1]
            assert next(targets) == one.input_ids[position]
    assert next(wanted, None) is None
    assert layout.wanted.tolist() == sorted(layout.wanted.tolist())


@given(rows=talks(4))
def test_conversations_about_several_pictures_share_the_text_before_them(rows: list[Encoded]) -> None:
    model = built("llava").model
    made = pack(model, [Branch(rows=[one], n_shared=0) for one in rows], IMAGE)
    before = [min(one.input_ids.tolist().index(IMAGE), one.is_answer.tolist().index(True) - 1) for one in rows]
    columns = zip(*(one.input_ids.tolist()[:limit] for one, limit in zip(rows, before, strict=True)), strict=False)
    head = len(list(takewhile(lambda column: len(set(column)) == 1, columns))) if len(rows) > 1 else 0
    assert made.layout.length == sum(len(one.input_ids) for one in rows) - head * (len(rows) - 1)
    assert len(made.layout.segments) == len(rows) + (head > 0)


@given(units=st.lists(talks(3), min_size=1, max_size=3))
def test_image_tokens_side_by_side_are_one_picture_and_those_of_other_conversations_another(
    units: list[list[Encoded]],
) -> None:
    parts = [branch for rows in units for branch in branches(rows, IMAGE)]
    made = pack(built("llava").model, parts, IMAGE)
    ids, block = made.inputs["input_ids"][0].tolist(), made.layout.block.tolist()
    assert [number > 0 for number in block] == [token == IMAGE for token in ids]
    numbers = [number for number in block if number]
    assert numbers == [1 + k // 2 for k in range(len(numbers))], "each run of two image tokens is a picture"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v", "paddleocr_vl"])
def test_tokens_have_the_positions_in_space_that_the_model_gives_their_conversation_alone(name: str) -> None:
    vlm = built(name)
    talk = (("<image>\nWhat is this?", "A", "And", "no"), ("<image>\nWhat is", "A red cup."))
    rows = [one for seed in (0, 1) for one in encoded(name, About(seeds=(seed,), size=SIZES[seed], talks=talk))]
    parts = [branch for pair in (rows[:2], rows[2:]) for branch in branches(pair, vlm.image_token_id)]
    made = pack(vlm.model, parts, vlm.image_token_id)
    assert len(made.layout.segments) == 7
    for leaf, one in zip((2, 3, 5, 6), rows, strict=True):
        tokens = chain(made.layout, made.layout.segments[leaf].stop - 1)
        assert torch.equal(made.inputs["position_ids"][..., tokens], own_positions(vlm, one))
        assert own_positions(vlm, one).max() < len(one.input_ids) - 1, "a picture takes fewer positions than tokens"


def own_positions(vlm: VLM, one: Encoded) -> Tensor:
    """What reaches the rotary embedding when the model runs on `one` as it is."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple, options: dict) -> None:
        found.append(options.get("position_ids", args[-1]))

    hook = vlm.model.get_decoder().rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.from_numpy(one.input_ids)[None]
    vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **one.model_inputs)
    hook.remove()
    return found[0]


# ---------------------------------------------------------------- no work for what nobody asks

TALKS = (("<image>\nWhat is this?", "A red cup.", "And", "Yes, there is."), ("<image>\nWhat is", "no"))


def made(name: str, *, mutual: bool = False):
    vlm = built(name)
    units = [encoded(name, About(seeds=(seed,), size=SIZES[0], talks=TALKS)) for seed in (0, 1)]
    parts = [branch for rows in units for branch in branches(rows, vlm.image_token_id)]
    return vlm.model, pack(vlm.model, parts, vlm.image_token_id, mutual=mutual)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "internvl", "gemma3"])
def test_the_last_layer_and_the_head_work_on_wanted_tokens_alone(name: str) -> None:
    model, pack_ = made(name, mutual=name == "gemma3")
    n, length, sizes = len(pack_.layout.wanted), pack_.layout.length, {}

    def note(part: str):
        return lambda module, args: sizes.setdefault(part, []).append(args[0].shape[1])

    layers = model.get_decoder().layers
    assert last_attention(model) is layers[-1].self_attn
    parts = {"first": layers[0].mlp.gate_proj, "last": layers[-1].mlp.gate_proj, "head": model.get_output_embeddings()}
    hooks = [part.register_forward_pre_hook(note(known)) for known, part in parts.items()]
    pack_nll(model, pack_)
    for hook in hooks:
        hook.remove()
    assert sizes == {"first": [length], "last": [n], "head": [n]}
    assert n == sum(pack_.counts) < length / 2


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
@pytest.mark.parametrize("name", ["llava", "gemma3", "cohere2_vision"])  # plain, soft-capped, scaled
def test_logits_in_chunks_are_the_same_numbers(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pack_ = made(name)
    whole = pack_nll(model, pack_)
    sizes: list[int] = []
    monkeypatch.setattr(forward_module, "CHUNK_LOGITS", chunk)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    pieces = pack_nll(model, pack_)
    hook.remove()
    assert len(sizes) > 1
    assert sum(sizes) == sum(pack_.counts)
    assert [len(nll) for nll in pieces] == list(pack_.counts)
    assert np.allclose(np.concatenate(pieces), np.concatenate(whole), rtol=0, atol=1e-5)


def test_a_pack_leaves_the_model_as_it_was() -> None:
    model, pack_ = made("llava")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    pack_nll(model, pack_)
    with pytest.raises(ValueError, match="input_ids"):
        pack_nll(model, replace(pack_, inputs={}))
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
