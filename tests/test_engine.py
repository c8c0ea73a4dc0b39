"""The ways of scoring against a naive loop, and the check that decides between them: no wrong way may pass it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from naive import SIZES, About, abouts, built, encoded, fitting, naive_nll, naive_pairs, picture, unit, worst
from tiny_models import make_sample
from visgain.errors import ModelError
from visgain.scoring import engine as engine_module
from visgain.scoring.engine import (
    TOLERANCE,
    WAYS,
    Choice,
    Engine,
    Extent,
    PerCondition,
    choose_way,
    scored,
    with_longest,
)
from visgain.scoring.unit import Rows, Unit, taken_alike
from visgain.vlm.attention import PACKED, packed_attention
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.load import VLM
from zoo import ZOO
from zoo.base import randomise

EXACT = 1e-4  # nats
MANY_TOKENS = 1 << 30
EVERYTHING = Extent(tokens=MANY_TOKENS, shared=MANY_TOKENS, pictures=MANY_TOKENS)

ONE = About(seeds=(0,), size=SIZES[0], talks=(("<image>\nWhat is this?", "A red cup."), ("<image>\nWhat is", "no")))
OTHER = About(
    seeds=(1,),
    size=SIZES[0],
    talks=(("<image>\nWhat is this?", "A dog.", "Is there a cup?", "No, there is a dog."), ("<image>\nAnd", "A")),
)
THIRD = About(seeds=(2,), size=SIZES[0], talks=(("<image>\nWhat is", "A red dog."),))
LONG = About(seeds=(3,), size=SIZES[0], talks=(("<image>\nWhat is this?", "Yes, a cup on a table. " * 12),))
MANY = (ONE, OTHER, THIRD)


def probes(name: str) -> list[Unit]:
    first, *others = (unit(name, about) for about in MANY)
    return [with_longest(first, 200), *others]


@cache
def choice(name: str) -> Choice:
    return choose_way(built(name), probes(name))


def score(engine: Engine, units: Sequence[Unit]) -> list[PerCondition]:
    """Pairs of all rows in the order of the units."""
    found = {id(one): pairs for one, pairs in scored(engine, units)}
    assert len(found) == len(units)
    return [pair for one in units for pair in found[id(one)]]


def scores(name: str, way: str, drawn: Sequence[About], pack_tokens: int = MANY_TOKENS) -> list[PerCondition]:
    engine = Engine(vlm=built(name), way=way, pack_tokens=pack_tokens, tried=EVERYTHING)
    return score(engine, [unit(name, about) for about in drawn])


def naive(name: str, drawn: Sequence[About]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [pair for about in drawn for pair in naive_pairs(name, about)]


# ---------------------------------------------------------------- exactness

packs = st.lists(abouts(), min_size=1, max_size=4)
pack_sizes = st.sampled_from([1, 150, 400, MANY_TOKENS])


@settings(deadline=None, max_examples=15)
@given(drawn=packs, pack_tokens=pack_sizes)
def test_every_way_scores_any_conversations_as_the_naive_loop_does(drawn: list[About], pack_tokens: int) -> None:
    expected = naive("llava", drawn)
    for way in ("shared", "cached", "packed", "single"):
        assert worst(scores("llava", way, drawn, pack_tokens), expected) < EXACT, way


@pytest.mark.parametrize("name", ZOO)
@settings(deadline=None, max_examples=2)
@given(drawn=packs, pack_tokens=pack_sizes)
def test_a_family_is_scored_in_its_way_as_the_naive_loop_does(name: str, drawn: list[About], pack_tokens: int) -> None:
    assert choice(name).way == ZOO[name].way, choice(name).rejected
    drawn = [part for about in drawn for part in apart(name, fitting(name, about))]
    assert worst(scores(name, choice(name).way, drawn, pack_tokens), naive(name, drawn)) < EXACT


def apart(name: str, about: About) -> list[About]:
    """`about` as units that a model takes the pictures of alike."""
    first = encoded(name, about)[0]
    alike = [taken_alike(first, row) for row in encoded(name, about)]
    return [about] if all(alike) else [replace(about, talks=(talk,)) for talk in about.talks]


def test_a_picture_that_is_taken_by_the_question_is_not_taken_alike_by_another_question() -> None:
    what, what_again, and_you = encoded(
        "instructblip", replace(ONE, talks=(("<image>What", "A"), ("<image>What", "no"), ("<image>And", "A")))
    )
    assert taken_alike(what, what_again)
    assert not taken_alike(what, and_you)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "pixtral", "ovis2", "gemma3", "lfm2_vl"])
def test_pictures_of_different_size_and_number_go_side_by_side_or_apart(name: str) -> None:
    drawn = [
        About(seeds=(seed,) * n_pictures, size=size, talks=(("<image>" * n_pictures + "What?", "A red cup."),))
        for seed, (size, n_pictures) in enumerate([(SIZES[0], 1), (SIZES[1], 1), (SIZES[0], 2), (SIZES[1], 2)])
    ]
    assert worst(scores(name, choice(name).way, drawn), naive(name, drawn)) < EXACT


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mistral3"])
def test_an_answer_before_any_picture_is_predicted_in_its_own_conversation(name: str) -> None:
    drawn = [
        About(seeds=(seed,), size=SIZES[0], talks=(("And", "no", "<image>\nWhat is this?", answer),))
        for seed, answer in enumerate(["A", "A red cup.", "yes"])
    ]
    assert worst(scores(name, choice(name).way, drawn), naive(name, drawn)) < EXACT


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_no_counterfactual_is_a_gain_of_exactly_zero_in_every_way(name: str) -> None:
    units = [replace(one, blind=one.seen) for one in (unit(name, about) for about in MANY)]
    for way in ("shared", "mutual", "cached", "packed", "single"):
        for pack_tokens in (1, MANY_TOKENS):
            engine = Engine(vlm=built(name), way=way, pack_tokens=pack_tokens, tried=EVERYTHING)
            for seen, blind in score(engine, units):
                assert np.array_equal(seen, blind)


@pytest.mark.parametrize("name", ZOO)
def test_no_counterfactual_is_a_gain_of_exactly_zero_in_every_family(name: str) -> None:
    units = [replace(one, blind=one.seen) for one in (unit(name, fitting(name, about)) for about in (OTHER, THIRD))]
    engine = Engine(vlm=built(name), way=ZOO[name].way, pack_tokens=MANY_TOKENS, tried=EVERYTHING)
    assert all(np.array_equal(seen, blind) for seen, blind in score(engine, units))


# ---------------------------------------------------------------- neighbours

NEIGHBOURS = ["llava", "llava_next", "qwen2_5_vl", "idefics3", "ovis2", "gemma3", "phi4_multimodal", "fuyu", "molmo2"]


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_another_conversation_in_the_pack_changes_no_number(name: str) -> None:
    way = choice(name).way
    before = scores(name, way, MANY)
    longer = (*OTHER.talks[0], "And", "Yes, a cup on a table.")
    for changed in (
        replace(OTHER, seeds=(7,)),  # another picture
        replace(OTHER, talks=(longer, OTHER.talks[1])),
        replace(OTHER, talks=OTHER.talks[:1]),
    ):
        after = scores(name, way, (ONE, changed, THIRD))
        assert worst(before[:2] + before[-1:], after[:2] + after[-1:]) < 1e-5
        assert worst(before[2:3], [after[2]]) > 1e-3 if changed.seeds != OTHER.seeds else True


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_the_order_in_a_pack_changes_no_number(name: str) -> None:
    way = choice(name).way
    one, two, three, four, five = scores(name, way, MANY)
    turned = [THIRD, replace(OTHER, talks=OTHER.talks[::-1]), ONE]
    assert worst(scores(name, way, turned), [five, four, three, one, two]) < 1e-5


def test_packs_hold_units_of_one_kind_and_no_more_tokens_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [replace(about, seeds=(seed,), size=SIZES[seed % 2]) for seed, about in enumerate(MANY * 4)]
    units = [unit("llava_next", about) for about in drawn]
    run: list[Sequence[Unit]] = []
    real = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, units: run.append(units) or real(self, units))
    engine = Engine(vlm=built("llava_next"), way="shared", pack_tokens=250, tried=EVERYTHING)
    assert len(score(engine, units)) == sum(len(one.rows) for one in units)
    assert sorted(id(one) for pack in run for one in pack) == sorted(map(id, units))
    for pack in run:
        assert len({one.kind for one in pack}) == 1
        assert len(pack) == 1 or sum(map(engine.n_tokens, pack)) <= 250
    assert 4 < len(run) < len(units)


# ---------------------------------------------------------------- no wrong way passes the check

Way = Callable[[VLM, Sequence[Rows]], list[np.ndarray]]


def with_pictures_of(one: Rows, other: Rows) -> Rows:
    pictures = {name: value for name, value in other[0].model_inputs.items() if name not in PER_TOKEN_INPUTS}
    return [replace(row, model_inputs={**row.model_inputs, **pictures}) for row in one]


def swapping(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
    """Gives each unit of a pack the pictures of the next."""
    turned = [*groups[1:], groups[0]]
    return engine_module.shared(vlm, [with_pictures_of(one, other) for one, other in zip(groups, turned, strict=True)])


def ignoring(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
    """Sees black wherever a picture is."""
    black = [
        [
            replace(row, model_inputs={name: torch.zeros_like(value) for name, value in row.model_inputs.items()})
            for row in rows
        ]
        for rows in groups
    ]
    return engine_module.shared(vlm, black)


def late(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
    """Gives each token the NLL of the one after it."""
    return [np.roll(nll, -1) for nll in engine_module.shared(vlm, groups)]


def not_a_number(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
    return [nll * np.float32("nan") for nll in engine_module.shared(vlm, groups)]


def failing(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
    raise KeyError("a layer that is not there")


@pytest.mark.parametrize("n_probes", [1, 3])
@pytest.mark.parametrize("wrong", [swapping, ignoring, late, not_a_number, failing])
def test_a_wrong_way_is_rejected_for_the_next_one(wrong: Way, n_probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "shared", wrong)
    found = choose_way(built("llava"), probes("llava")[:n_probes], ["shared", "cached"])
    assert found.way == "cached"
    assert found.rejected["shared"]
    with pytest.raises(ModelError, match="no way of scoring agrees"):
        choose_way(built("llava"), probes("llava")[:n_probes], ["shared"])


def test_pictures_that_are_mixed_up_are_noticed_though_no_two_probes_fit_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = [unit("llava_next", replace(ONE, size=size)) for size in SIZES]
    assert apart[0].kind != apart[1].kind
    monkeypatch.setitem(WAYS, "shared", swapping)
    assert choose_way(built("llava_next"), apart, ["shared", "cached"]).way == "cached"


@pytest.fixture
def blind_to_windows() -> None:
    """An attention for packs that forgets a model's windows."""
    AttentionInterface.register(
        PACKED, lambda *args, sliding_window=None, **options: packed_attention(*args, **options)
    )
    yield
    AttentionInterface.register(PACKED, packed_attention)


def windowed(window: int) -> VLM:
    """A Mistral 3 with windows of another size."""
    vlm = ZOO["mistral3"].build()
    vlm.model.config.text_config.sliding_window = window
    for layer in vlm.model.get_decoder().layers:
        layer.self_attn.sliding_window = window
    return vlm


def test_a_window_longer_than_the_probes_and_shorter_than_the_rows_is_noticed(blind_to_windows: None) -> None:
    vlm = windowed(100)
    short = [unit("mistral3", about) for about in MANY]
    assert max(len(row.input_ids) for one in short for row in one.rows) < 100
    assert choose_way(vlm, short).way == "shared"
    assert choose_way(vlm, [with_longest(short[0], 300), *short[1:]], ["shared", "single"]).way == "single"


def test_a_conversation_longer_than_any_tried_is_scored_right_whatever_the_way(blind_to_windows: None) -> None:
    vlm = windowed(100)
    drawn = [ONE, LONG, THIRD]
    chosen = choose_way(vlm, [unit("mistral3", about) for about in MANY])
    expected = [
        tuple(naive_nll(vlm, row) for row in both)
        for about in drawn
        for both in zip(encoded("mistral3", about), encoded("mistral3", about, blind=True), strict=True)
    ]
    assert max(len(row.input_ids) for row in encoded("mistral3", LONG)) > 100 > chosen.tried.tokens
    trusting = Engine(vlm=vlm, way="shared", pack_tokens=MANY_TOKENS, tried=EVERYTHING)
    assert worst(score(trusting, [unit("mistral3", about) for about in drawn]), expected) > 0.01
    engine = Engine(vlm=vlm, way="shared", pack_tokens=MANY_TOKENS, tried=chosen.tried)
    for _ in range(2):
        assert worst(score(engine, [unit("mistral3", about) for about in drawn]), expected) < EXACT


def test_a_longer_conversation_is_tried_once_and_trusted_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("shared", "single"):
        way = WAYS[name]
        monkeypatch.setitem(WAYS, name, lambda *args, name=name, way=way: calls.append(name) or way(*args))
    engine = Engine(vlm=built("llava"), way="shared", pack_tokens=MANY_TOKENS, tried=choice("llava").tried)
    two = About(seeds=(0, 1), size=SIZES[0], talks=(("<image><image>\nWhat", "A"),))
    shared, trial = {"shared"}, {"single", "shared"}
    for about, expected in ((ONE, shared), (LONG, trial), (LONG, shared), (two, trial), (two, shared), (ONE, shared)):
        calls.clear()
        engine.score([unit("llava", about)])
        assert set(calls) == expected
    assert engine.tried == (len(encoded("llava", LONG)[0].input_ids), 200, 2)


def test_a_way_that_was_tried_on_nothing_that_shares_is_tried_again_when_something_does() -> None:
    alone = replace(ONE, talks=ONE.talks[:1])
    chosen = choose_way(built("instructblip"), [unit("instructblip", alone)])
    assert (chosen.way, chosen.tried.shared) == ("cached", 0), "it is the same as one by one where nothing is shared"
    engine = Engine(vlm=built("instructblip"), way="cached", pack_tokens=MANY_TOKENS, tried=chosen.tried)
    alike = replace(ONE, talks=(("<image>What", "A red cup."), ("<image>What", "no")))
    assert worst(score(engine, [unit("instructblip", alike)]), naive("instructblip", [alike])) < EXACT


def test_positions_that_are_scaled_by_the_longest_conversation_of_a_pack_are_noticed() -> None:
    entry = ZOO["llava"]
    config = copy.deepcopy(built("llava").model.config)
    half = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
    config.text_config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 100,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(built("llava").model)(config)
        randomise(model)
    vlm = replace(built("llava"), model=model.eval())
    short = [unit("llava", about) for about in MANY]
    chosen = choose_way(vlm, short)
    assert (chosen.way, chosen.tried.tokens < 100) == ("shared", True)
    assert choose_way(vlm, [with_longest(short[0], 300), *short[1:]]).way == "single"
    drawn = [ONE, LONG, THIRD]
    rows = [row for about in drawn for row in encoded(entry.name, about)]
    engine = Engine(vlm=vlm, way="shared", pack_tokens=MANY_TOKENS, tried=chosen.tried)
    found = score(engine, [unit("llava", about) for about in drawn])
    assert worst(found, [(naive_nll(vlm, row), pair[1]) for row, pair in zip(rows, found, strict=True)]) < EXACT


def test_the_longest_probe_is_as_long_as_asked_for_and_repeats_answers_alone() -> None:
    row = ZOO["llava"].encode(
        built("llava"),
        make_sample("<image>\nWhat is this?", "A", "<image>And?", "A red cup.", images=2),
        [picture(0), picture(1)],
    )
    one = Unit.of([row], row.model_inputs)
    for length in (10, len(row.input_ids), len(row.input_ids) + 1, 500):
        longest = with_longest(one, length).rows[-1]
        size = len(row.input_ids)
        assert len(longest.input_ids) == max(length, size)
        assert np.array_equal(longest.input_ids[:size], row.input_ids)
        assert np.array_equal(longest.is_answer[:size], row.is_answer)
        assert longest.is_answer[size:].all()
        assert set(longest.input_ids[size:].tolist()) <= set(row.token_id.tolist())
        assert len(longest.turn) == len(longest.chars) == longest.is_answer.sum()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "mllama", "molmo2"])
def test_a_probe_with_a_picture_between_its_answers_can_be_made_long(name: str) -> None:
    row = About(seeds=(0, 1), size=SIZES[0], talks=(("<image>\nWhat is this?", "A", "<image>And?", "A red cup."),))
    found = choose_way(built(name), [with_longest(unit(name, row), 400), unit(name, replace(row, seeds=(2, 3)))])
    assert found.way == ZOO[name].way, found.rejected
    assert found.tried.tokens == 400


# ---------------------------------------------------------------- the canary


def seeing_nothing() -> VLM:
    """A LLaVA whose projector gives the same for every picture."""
    vlm = ZOO["llava"].build()
    with torch.no_grad():
        vlm.model.model.multi_modal_projector.linear_2.weight.zero_()
    return vlm


def test_a_model_that_ignores_its_picture_is_refused() -> None:
    with pytest.raises(ModelError, match="llava answers the same with the picture and with the counterfactual"):
        choose_way(seeing_nothing(), probes("llava"))


def test_a_model_that_ignores_its_picture_is_refused_without_a_counterfactual_too() -> None:
    units = [replace(one, blind=one.seen) for one in probes("llava")]
    with pytest.raises(ModelError, match="llava answers the same about another picture"):
        choose_way(seeing_nothing(), units)
    assert choose_way(built("llava"), units).way == "shared"


def test_one_picture_without_a_counterfactual_is_nothing_to_complain_of() -> None:
    one = probes("llava")[0]
    assert choose_way(built("llava"), [replace(one, blind=one.seen)]).way == "shared"


# ---------------------------------------------------------------- memory


def limited(way: Way, most: int) -> Way:
    """`way` on a device that holds `most` tokens."""

    def on_small_device(vlm: VLM, groups: Sequence[Rows]) -> list[np.ndarray]:
        if sum(len(row.input_ids) for rows in groups for row in rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return way(vlm, groups)

    return on_small_device


@pytest.mark.parametrize("most", [400, 150, 90])
def test_packs_shrink_to_the_memory_there_is_and_no_number_changes(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [replace(about, seeds=(seed,)) for seed, about in enumerate(MANY * 3)]
    expected = scores("llava", "shared", drawn)
    monkeypatch.setitem(WAYS, "shared", limited(WAYS["shared"], most))
    engine = Engine(vlm=built("llava"), way="shared", pack_tokens=10_000, tried=EVERYTHING)
    units = [unit("llava", about) for about in drawn]
    assert worst(engine.score(units), expected) < 1e-5
    assert 1 <= engine.pack_tokens < 10_000
    assert worst(score(engine, units), expected) < 1e-5


def test_running_out_of_memory_once_halves_the_packs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit("llava", about) for about in MANY]
    size = sum(len(row.input_ids) for one in units for row in one.rows)
    monkeypatch.setitem(WAYS, "shared", limited(WAYS["shared"], size - 1))
    engine = Engine(vlm=built("llava"), way="shared", pack_tokens=size, tried=EVERYTHING)
    engine.score(units)
    assert engine.pack_tokens == size // 2


@pytest.mark.parametrize("way", ["shared", "cached", "packed", "single"])
def test_one_conversation_that_is_too_large_is_one_clear_message(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(encoded("llava", LONG)[0].input_ids)
    forward = type(built("llava").model.base_model).forward

    def on_small_device(self: torch.nn.Module, input_ids: torch.Tensor, **inputs: object) -> object:
        if input_ids.shape[1] >= length // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(built("llava").model.base_model), "forward", on_small_device)
    engine = Engine(vlm=built("llava"), way=way, pack_tokens=MANY_TOKENS, tried=EVERYTHING)
    with pytest.raises(ModelError, match=f"out of memory on cpu with one conversation of {length} tokens"):
        engine.score([unit("llava", about) for about in (ONE, LONG)])


# ---------------------------------------------------------------- 16 bits


@cache
def rounded(name: str, dtype: torch.dtype) -> VLM:
    """The model as it is loaded in `dtype`: its buffers keep their precision."""
    vlm = ZOO[name].build()
    for parameter in vlm.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return vlm


def half(name: str, dtype: str, *marks: pytest.MarkDecorator) -> object:
    return pytest.param(name, getattr(torch, dtype), id=f"{name}-{dtype}", marks=marks)


HALVES = [
    ("llava", "float16"),
    ("gemma3", "bfloat16"),
    ("aria", "float16"),
    ("fuyu", "bfloat16"),
    ("llama4", "float16"),
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [half(*known) for known in HALVES]
    + [half(name, dtype, pytest.mark.slow) for name in ZOO for dtype in ("float16", "bfloat16")],
)
def test_in_16_bits_a_way_is_as_near_to_float32_as_the_models_own_forward(name: str, dtype: torch.dtype) -> None:
    way = ZOO[name].way
    expected, errors = scores(name, "single", MANY), {}
    for each in {way, "single"}:
        engine = Engine(vlm=rounded(name, dtype), way=each, pack_tokens=MANY_TOKENS, tried=EVERYTHING)
        found = score(engine, [unit(name, about) for about in MANY])
        assert all(nll.dtype == np.float32 for pair in found for nll in pair)
        errors[each] = mean_error(found, expected)
        assert worst(found, expected) < TOLERANCE[dtype] * (2 if name == "gemma4" else 1)
    assert errors[way] < 1.3 * errors["single"] + 1e-4


def mean_error(found: Sequence[PerCondition], expected: Sequence[PerCondition]) -> float:
    pairs = zip(found, expected, strict=True)
    return float(np.concatenate([np.abs(np.stack(one) - np.stack(other)) for one, other in pairs], axis=1).mean())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [half("minicpmv4_6", "bfloat16"), half("paligemma", "bfloat16"), half("gemma3", "float16")]
    + [half(name, dtype, pytest.mark.slow) for name in ZOO for dtype in ("float16", "bfloat16")],
)
def test_no_wrong_way_hides_in_the_rounding_of_16_bits(name: str, dtype: torch.dtype) -> None:
    vlm = rounded(name, dtype)
    before = {known: value.clone() for known, value in vlm.model.state_dict().items()}
    assert choose_way(vlm, probes(name)).way == ZOO[name].way
    for known, value in vlm.model.state_dict().items():
        assert value.dtype == before[known].dtype
        assert torch.equal(value, before[known])


def test_where_memory_does_not_allow_float32_the_check_is_done_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = rounded("llava", torch.bfloat16)
    monkeypatch.setattr("visgain.vlm.precision._free_bytes", lambda device: 10_000)
    monkeypatch.setattr(engine_module, "widened", lambda model: pytest.fail("no room"))
    assert choose_way(vlm, probes("llava")).way == "shared"
    monkeypatch.setitem(WAYS, "shared", late)
    assert choose_way(vlm, probes("llava"), ["shared", "cached"]).way == "cached"
