"""Passes of a training step against the model's own loss on one row after the other: every NLL, every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from naive import SIZES, About, built, encoded, fitting
from visgain.errors import EncodingError, ModelError
from visgain.training import packing
from visgain.training.collate import Outline, Rows, TrainingRow
from visgain.training.known import KnownRows
from visgain.training.packing import (
    MUTUAL,
    PACKED,
    PADDED,
    WAYS,
    WHOLE,
    Choice,
    Way,
    body_nll,
    choose_way,
    cut,
    go_together,
    laid_out,
)
from visgain.training.prepare import recompute_activations
from visgain.types import Encoded
from visgain.vlm import forward as forward_module
from visgain.vlm.load import VLM
from visgain.vlm.logits import replaced_forward
from zoo import ZOO

ABOUT = (
    About(seeds=(0,), size=SIZES[0], talks=(("<image>\nWhat is this?", "A red cup.", "And", "Yes, there is."),)),
    About(seeds=(1,), size=SIZES[0], talks=(("<image>\nWhat is", "No, there is a dog."),)),
    About(seeds=(), size=SIZES[0], talks=(("Is there a dog?", "no, there is a cup"),)),
    About(seeds=(2,), size=SIZES[1], talks=(("<image>\nIs there a dog?", "Yes, a cup on a table. " * 3),)),
)
"""Different lengths and shapes of pictures, a row without any, several turns."""

NOT_APART = ("blip-2", "instructblip", "llama4")
"""Families whose body cannot be called without their head."""

SOME = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "cohere2_vision", "paligemma2", "lfm2_vl", "blip-2"]
"""One that packs, axes of positions, pictures in several layers, pictures that see ahead with a window, tiles, scaled
logits, soft-capped ones, a state from token to token, and a body that is not apart."""


def rows_of(name: str, *, seed: int = 0) -> list[TrainingRow]:
    """Rows of a family with uneven masks and weights; those without a picture where it takes them."""
    rng = np.random.default_rng(seed)
    found: list[Encoded] = []
    for about in ABOUT:
        try:
            found += encoded(name, fitting(name, about) if about.seeds else about)
        except EncodingError:
            assert not about.seeds
    return [TrainingRow(encoded=one, weight=weights(len(one.turn), rng)) for one in found]


def weights(n: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(0.5, 3, n) * (rng.random(n) < 0.6)).astype(np.float32)


Graded = tuple[float, list[Tensor]]
"""A loss and its gradients."""


def naive(model: PreTrainedModel, rows: Sequence[TrainingRow]) -> Graded:
    """Weighted mean of the NLLs and its gradients: full logits of one row after the other, torch's own loss."""
    total = sum(float(row.weight.sum()) for row in rows)

    def losses():
        for row in rows:
            ids = torch.from_numpy(row.encoded.input_ids)[None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **row.encoded.model_inputs}
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            answer = torch.from_numpy(row.encoded.is_answer[1:])
            nll = cross_entropy(logits[answer], ids[0, 1:][answer], reduction="none")
            yield (nll * torch.from_numpy(row.weight)).sum() / total

    return gradients(model, losses())


def ours(vlm: VLM, way: Way, rows: Sequence[TrainingRow], most: int) -> Graded:
    """The same in passes of at most `most` tokens, or rows of a padded batch."""
    model = vlm.model
    total = sum(float(row.weight.sum()) for row in rows)

    def losses():
        for numbers in cut(rows, side_by_side=way.side_by_side, most=most):
            one = way.make(model, [rows[number] for number in numbers], **ids_of(vlm))
            with laid_out(model, one):
                yield (way.nll(model, model.forward, one, one.inputs) * one.weight).sum() / total

    return gradients(model, losses())


def ids_of(vlm: VLM) -> dict[str, int]:
    return {"image_token_id": vlm.image_token_id, "pad_id": vlm.tokenizer.pad_token_id or 0}


def gradients(model: nn.Module, losses) -> Graded:
    """The sum of `losses` and its gradients; each is gone back through while what made it is still in force."""
    model.zero_grad()
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return total, found


def assert_same(found: Graded, expected: Graded, tolerance: float = 5e-6) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    size = sum(float(b.double().square().sum()) for b in expected[1]) ** 0.5
    error = sum(float((a - b).double().square().sum()) for a, b in zip(found[1], expected[1], strict=True)) ** 0.5
    assert size > 0
    assert error <= tolerance * size, f"gradients are off by {error / size:.1e} of their size"


@cache
def choice(name: str) -> Choice:
    vlm = built(name)
    return choose_way(vlm.model, rows_of(name), **ids_of(vlm))


# ---------------------------------------------------------------- every family


def fastest(name: str) -> Way:
    if name in NOT_APART:
        return WHOLE
    return {"shared": PACKED, "mutual": MUTUAL}.get(ZOO[name].way, PADDED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow]) for name in sorted(ZOO)]
)
def test_a_family_is_trained_the_fastest_exact_way_with_the_gradients_of_the_naive_loss(name: str) -> None:
    assert choice(name).way is fastest(name), choice(name).rejected
    vlm, rows = built(name), rows_of(name)
    expected = naive(vlm.model, rows)
    for most in (1, 1 << 30):
        assert_same(ours(vlm, choice(name).way, rows, most), expected)


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 99),
    order=st.permutations(range(len(ABOUT))),
    most=st.sampled_from([1, 60, 100, 150, 1 << 30]),
    way=st.sampled_from([PACKED, PADDED, WHOLE]),
)
def test_no_order_mask_or_budget_changes_loss_or_gradients(seed: int, order: list[int], most: int, way: Way) -> None:
    vlm, rows = built("llava"), rows_of("llava", seed=seed)
    rows[0] = TrainingRow(encoded=rows[0].encoded, weight=np.maximum(rows[0].weight, np.float32(0.5)))  # one is active
    assert_same(ours(vlm, way, [rows[k] for k in order], most), naive(vlm.model, rows))


# ---------------------------------------------------------------- what a training may do to a model


def test_a_model_that_computes_activations_again_finds_its_pack_in_the_backward_pass() -> None:
    vlm, rows = ZOO["llava"].build(), rows_of("llava")
    expected = naive(vlm.model, rows)
    recompute_activations(vlm.model)
    vlm.model.train()
    calls: list[int] = []
    inside = vlm.model.get_decoder().layers[0].mlp  # hooks of the layer itself stay outside of what is computed again
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(ours(vlm, PACKED, rows, 1 << 30), expected)
    assert len(calls) == 2 * len(cut(rows, side_by_side=True, most=1 << 30)), "each pass ran twice"


@pytest.mark.parametrize("name", ["llava", "cohere2_vision"])  # tied there
def test_a_frozen_head_has_no_gradient_and_what_is_below_it_the_right_one(name: str) -> None:
    vlm, rows = ZOO[name].build(), rows_of(name)
    for p in vlm.model.get_output_embeddings().parameters():
        p.requires_grad_(False)
    assert_same(ours(vlm, PACKED, rows, 150), naive(vlm.model, rows))


def test_adapters_get_the_gradients_of_the_naive_loss() -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    vlm, rows = ZOO["llava"].build(), rows_of("llava")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(vlm.model, config)
    assert adapted.get_base_model() is vlm.model
    # Such adapters are as large as the weights that they stand beside, and so are the roundings.
    assert_same(ours(vlm, PACKED, rows, 150), naive(vlm.model, rows), tolerance=3e-5)


def test_attention_dropout_drops_in_a_pack_too() -> None:
    vlm, rows = ZOO["llava"].build(), rows_of("llava")
    for layer in vlm.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    vlm.model.train()
    assert ours(vlm, PACKED, rows, 1 << 30)[0] != ours(vlm, PACKED, rows, 1 << 30)[0]
    assert choose_way(vlm.model, rows, **ids_of(vlm)).way is PACKED, "what is tried is tried without dropout"
    assert vlm.model.training


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("name", ["llava", "gemma3", "cohere2_vision", "paligemma2"])
def test_the_head_sees_active_tokens_alone_and_some_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, rows, way = built(name), rows_of(name), choice(name).way
    expected = naive(vlm.model, rows)
    size = vlm.model.config.get_text_config(decoder=True).vocab_size
    monkeypatch.setattr(forward_module, "CHUNK_LOGITS", 4 * size)
    seen: list[int] = []
    hook = vlm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    found = ours(vlm, way, rows, 1 << 30)
    hook.remove()
    assert_same(found, expected)
    n_active = sum(int(row.active.sum()) for row in rows)
    assert max(seen) == 4 < n_active
    # Going back, all chunks of a pass but its last are computed once more.
    passes = cut(rows, side_by_side=way.side_by_side, most=1 << 30)
    last = [(sum(int(rows[k].active.sum()) for k in numbers) - 1) % 4 + 1 for numbers in passes]
    assert sum(seen) == 2 * n_active - sum(last)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_pass_without_active_tokens_has_a_loss_of_zero_and_gradients_of_zero_for_all_parts(way: Way) -> None:
    vlm = built("llava")
    rows = [TrainingRow(encoded=row.encoded, weight=np.zeros_like(row.weight)) for row in rows_of("llava")[:3]]
    vlm.model.zero_grad()
    _backward(vlm, WHOLE, rows_of("llava")[:3])
    used = {name for name, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad()
    assert _backward(vlm, way, rows) == 0
    assert {name for name, p in vlm.model.named_parameters() if p.grad is not None} == used
    assert not any(p.grad.any() for p in vlm.model.parameters() if p.grad is not None)
    vlm.model.zero_grad()


def _backward(vlm: VLM, way: Way, rows: Sequence[TrainingRow]) -> float:
    one = way.make(vlm.model, rows, **ids_of(vlm))
    with laid_out(vlm.model, one):
        loss = (way.nll(vlm.model, vlm.model.forward, one, one.inputs) * one.weight).sum()
        loss.backward()
    return float(loss.item())


# ---------------------------------------------------------------- the choice


def test_a_way_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, rows = built("llava"), rows_of("llava")
    monkeypatch.setattr("visgain.vlm.pack.row_positions", lambda _, row: 2 * torch.arange(len(row.input_ids))[None])
    found = choose_way(vlm.model, rows, **ids_of(vlm))
    assert found.way is PADDED
    assert found.rejected["packed"].startswith("off by ")


def test_a_model_that_demands_something_in_training_alone_is_tried_in_training() -> None:
    vlm, rows = ZOO["llava"].build(), rows_of("llava")
    inner = vlm.model.model
    forward = inner.forward

    def demanding(*args, attention_mask=None, **inputs):
        if inner.training and attention_mask is None:
            raise ValueError("attention_mask is needed in training")
        return forward(*args, attention_mask=attention_mask, **inputs)

    with replaced_forward(inner, demanding):
        found = choose_way(vlm.model, rows, **ids_of(vlm))
    assert found.way is PADDED
    assert found.rejected["packed"] == "attention_mask is needed in training"


def test_a_model_that_no_way_agrees_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, rows = built("llava"), rows_of("llava")
    monkeypatch.setattr(packing, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(ModelError, match=r"no way of training agrees .*packed: off by .*whole: off by"):
        choose_way(vlm.model, rows, **ids_of(vlm))


def test_a_way_that_gives_no_numbers_is_not_taken() -> None:
    vlm, rows = built("llava"), rows_of("llava")

    def lost(*args) -> Tensor:
        return body_nll(*args) * torch.nan

    found = choose_way(vlm.model, rows, [replace(PACKED, nll=lost), PADDED], **ids_of(vlm))
    assert found.way is PADDED
    assert found.rejected["packed"] == "off by inf nats"


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    vlm, rows = ZOO["llava"].build(), rows_of("llava")
    vlm.model.model.language_model.norm.weight.data[:] = torch.nan
    with pytest.raises(ModelError, match="gives no answer token that was tried a finite loss; are its weights damaged"):
        choose_way(vlm.model, rows, **ids_of(vlm))


class Drawn(Rows):
    """Rows whose number is their length and of which some have a picture."""

    def __init__(self, n: int, pictures: set[int]) -> None:
        self.n, self.pictures = n, pictures

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> TrainingRow:
        return row_of(index + 2, (3, 4, 4) if index in self.pictures else None)

    def outline(self, index: int) -> Outline:
        return Outline(int(index in self.pictures), index)


@pytest.mark.parametrize(
    ("n", "pictures", "expected"),
    [
        (1, set(), [0, 0]),
        (10, set(), [0, 9, 0]),
        (10, {7}, [7, 0, 9, 7]),
        (10, {3, 4, 8}, [3, 4, 8, 0, 9, 3]),
        (5_000, {4_999}, [4999, 0, 4980, 4999]),
        (5_000, set(range(300, 5_000)), [312, 2656, 4980, 0, 292, 312]),
    ],
    ids=["one", "text", "one picture", "some", "the last alone", "text first"],
)
def test_rows_with_and_without_pictures_are_tried_wherever_they_are(
    n: int, pictures: set[int], expected: list[int]
) -> None:
    """And at least two of a kind, side by side."""
    known = KnownRows(Drawn(n, pictures))
    assert [len(row.encoded.input_ids) - 2 for row in known.probes()] == expected
    assert bool(known.silent.encoded.n_image_tokens) == bool(pictures)
    assert not known.silent.weight.any()


# ---------------------------------------------------------------- cutting

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=20)


def row_of(n_tokens: int, picture: tuple[int, ...] | None, *, crossed: bool = False) -> TrainingRow:
    inputs = {} if picture is None else {"pixel_values": torch.zeros(1, *picture)}
    if crossed:
        inputs["cross_attention_mask"] = torch.zeros(1, n_tokens, 1, 1)
    ids = np.arange(n_tokens, dtype=np.int64)
    one = Encoded(
        input_ids=ids,
        is_answer=ids == n_tokens - 1,
        turn=np.zeros(1, np.int32),
        chars=np.zeros((1, 2), np.int32),
        n_image_tokens=int(picture is not None),
        model_inputs=inputs,
    )
    return TrainingRow(encoded=one, weight=np.ones(1, np.float32))


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    pictures=st.lists(st.sampled_from([None, (3, 4, 4), (3, 8, 8)]), min_size=20, max_size=20),
    side_by_side=st.booleans(),
    most=st.integers(1, 80),
)
def test_every_row_is_in_one_pass_that_has_room_and_takes_its_pictures(
    lengths: list[int], pictures: list[tuple[int, ...] | None], side_by_side: bool, most: int
) -> None:
    rows = [row_of(n, picture) for n, picture in zip(lengths, pictures, strict=False)]
    passes = cut(rows, side_by_side=side_by_side, most=most)
    assert sorted(number for numbers in passes for number in numbers) == list(range(len(rows)))
    for numbers in passes:
        assert numbers == sorted(numbers)
        assert len({pictures[number] for number in numbers} - {None}) <= 1
        size = sum(lengths[number] for number in numbers) if side_by_side else len(numbers)
        assert size <= most or len(numbers) == 1


@settings(deadline=None)
@given(lengths=LENGTHS, most=st.integers(30, 90))
def test_two_passes_are_never_so_empty_that_they_could_be_one(lengths: list[int], most: int) -> None:
    passes = cut([row_of(n, None) for n in lengths], side_by_side=True, most=most)
    sizes = [sum(lengths[k] for k in one) for one in passes]
    assert all(a + b > most for k, a in enumerate(sizes) for b in sizes[:k])


def test_a_model_that_sees_by_cross_attention_has_rows_without_pictures_apart() -> None:
    seeing, blind = row_of(9, (3, 4, 4), crossed=True), row_of(9, None)
    assert go_together([seeing, seeing])
    assert go_together([blind, blind])
    assert not go_together([seeing, blind])


def test_a_row_without_a_picture_has_zeros_where_those_beside_it_say_what_a_token_is() -> None:
    vlm = built("gemma3")
    seeing, *_, blind = (row.encoded for row in rows_of("gemma3")[:3])
    bare = replace(blind, model_inputs={})
    rows = [TrainingRow(encoded=one, weight=np.ones(len(one.turn), np.float32)) for one in (seeing, bare)]
    types = MUTUAL.make(vlm.model, rows, **ids_of(vlm)).inputs["token_type_ids"]
    assert types.shape == (1, len(seeing.input_ids) + len(blind.input_ids))
    assert types[0, : len(seeing.input_ids)].any()
    assert not types[0, len(seeing.input_ids) :].any()
