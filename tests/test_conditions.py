"""Blind without another picture: pictures left out (`drop`), and pictures that no token attends to (`mask`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from naive import SIZES, About, abouts, built, encoded, fitting, naive_nll, picture, worst
from test_engine import EVERYTHING, EXACT, MANY, MANY_TOKENS, ONE, apart, score
from test_feed import Rows, Shown, about, plain, rows, source
from test_scoring import assert_same_scores, config
from tiny_models import make_sample
from visgain.config import ScoreConfig
from visgain.counterfactuals import COUNTERFACTUALS, Drop, Mask, parse_condition, parse_counterfactual
from visgain.data import open_dataset
from visgain.errors import ConfigError, ModelError
from visgain.scoring import engine as engine_module
from visgain.scoring import forward as forward_module
from visgain.scoring.engine import Engine, choose_way, halves, with_longest
from visgain.scoring.feed import Feed, feed
from visgain.scoring.forward import answer_nll
from visgain.scoring.run import blind_condition, run_score
from visgain.scoring.unit import Unit
from visgain.storage import read_json, read_scores
from visgain.types import Encoded, Sample, Skipped
from visgain.vlm import pack
from visgain.vlm.encode import PER_TOKEN_INPUTS
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.pack import row_positions
from visgain.vlm.template import make_encoder
from zoo import ZOO

CLOSE = 1e-5  # nats
QUICK = ("llava", "qwen2_vl", "idefics3", "pixtral", "gemma3", "qwen3_5", "mllama", "blip-2", "phi4_multimodal")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ZOO]


# ---------------------------------------------------------------- naive


def naive_masked(vlm: VLM, row: Encoded) -> np.ndarray:
    """The model's own eager forward with a mask [1, 1, T, T] that is 0 or -inf, as CAL's attention mask makes it."""
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    size = len(row.input_ids)
    seen = np.tril(np.ones((size, size), bool)) & (row.input_ids != vlm.image_token_id)
    mask = torch.zeros(1, 1, size, size).masked_fill(torch.from_numpy(~seen), float("-inf"))
    ids = torch.from_numpy(row.input_ids)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **row.model_inputs, use_cache=False).logits[0]
    return token_nlls(logits, row.input_ids, row.is_answer)


def naive_cut_out(vlm: VLM, row: Encoded) -> np.ndarray:
    """The model's own forward over the text alone, at the positions that it has beside the picture."""
    kept = row.input_ids != vlm.image_token_id
    ids, where = torch.from_numpy(row.input_ids[kept])[None], torch.from_numpy(kept)
    own = {name: value[:, where] for name, value in row.model_inputs.items() if name in PER_TOKEN_INPUTS}
    positions = row_positions(vlm.model, row)[..., where]
    with torch.no_grad():
        logits = vlm.model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), **own).logits[0]
    return token_nlls(logits, row.input_ids[kept], row.is_answer[kept])


def token_nlls(logits: torch.Tensor, ids: np.ndarray, is_answer: np.ndarray) -> np.ndarray:
    log_q = torch.log_softmax(logits.double(), dim=-1)
    where = is_answer.nonzero()[0]
    return -log_q[where - 1, ids[where]].numpy()


def bare(sample: Sample) -> Sample:
    """A sample without its pictures, whose marks stand before or after a text."""
    texts = (turn.text.replace("<image>\n", "").replace("<image>", "") for turn in sample.turns)
    return replace(
        sample, images=(), turns=tuple(replace(t, text=text) for t, text in zip(sample.turns, texts, strict=True))
    )


def without(name: str, drawn: About) -> list[Encoded]:
    return [ZOO[name].encode(built(name), bare(sample), []) for sample in drawn.samples]


def masked_units(name: str, drawn: Sequence[About]) -> list[Unit]:
    return [Unit.masked(encoded(name, one)) for one in drawn]


def dropped_units(name: str, drawn: Sequence[About]) -> list[Unit]:
    return [Unit.dropped(encoded(name, one), without(name, one)) for one in drawn]


def pairs(name: str, units: Sequence[Unit], way: str, pack_tokens: int = MANY_TOKENS) -> list[tuple[np.ndarray, ...]]:
    return score(Engine(vlm=built(name), way=way, pack_tokens=pack_tokens, tried=EVERYTHING), units)


# ---------------------------------------------------------------- exactness

packs = st.lists(abouts(), min_size=1, max_size=4)
pack_sizes = st.sampled_from([1, 150, 400, MANY_TOKENS])
LLAVA_WAYS = ("shared", "cached", "packed", "single")


@settings(deadline=None, max_examples=6)
@given(drawn=packs, pack_tokens=pack_sizes)
def test_masked_any_conversations_are_scored_as_by_an_eager_forward_with_a_mask(
    drawn: list[About], pack_tokens: int
) -> None:
    rows = [row for one in drawn for row in encoded("llava", one)]
    expected = [(naive_nll(built("llava"), row), naive_masked(built("llava"), row)) for row in rows]
    for way in LLAVA_WAYS:
        assert worst(pairs("llava", masked_units("llava", drawn), way, pack_tokens), expected) < CLOSE, way


@settings(deadline=None, max_examples=6)
@given(drawn=packs, pack_tokens=pack_sizes)
def test_dropped_any_conversations_are_scored_as_by_a_forward_over_the_text_alone(
    drawn: list[About], pack_tokens: int
) -> None:
    both = [pair for one in drawn for pair in zip(encoded("llava", one), without("llava", one), strict=True)]
    expected = [(naive_nll(built("llava"), seen), naive_nll(built("llava"), text)) for seen, text in both]
    for way in LLAVA_WAYS:
        assert worst(pairs("llava", dropped_units("llava", drawn), way, pack_tokens), expected) < CLOSE, way


def drawn_for(name: str) -> list[About]:
    return [part for one in MANY for part in apart(name, fitting(name, one))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_masked_exactly_in_its_way_or_refused(name: str) -> None:
    vlm, units = built(name), masked_units(name, drawn_for(name))
    if "mask" not in ZOO[name].blind:
        with pytest.raises(ModelError, match="in other ways than by attention to their tokens"):
            choose_way(vlm, units)
        return
    chosen = choose_way(vlm, units)
    assert chosen.way == ZOO[name].way or (name, chosen.way) == ("instructblip", "cached"), chosen.rejected
    rows = [row for unit in units for row in unit.rows_with(unit.seen)]
    found = pairs(name, units, chosen.way)
    alone = [answer_nll(vlm, [replace(row, masked=True)])[0] for unit in units for row in unit.rows_with(unit.seen)]
    for (seen, blind), reference, row in zip(found, alone, rows, strict=True):
        assert np.abs(blind - reference).max() < EXACT
        assert np.abs(blind - seen).max() > 1e-3
        if ZOO[name].cuttable:
            assert np.abs(blind - naive_cut_out(vlm, row)).max() < CLOSE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_without_its_pictures_exactly_in_its_way_or_says_why_not(name: str) -> None:
    data = rows(*((("<image>\nWhat is this?", f"A {colour} cup."), (Shown("a", 0),)) for colour in ("red", "blue")))
    if "drop" not in ZOO[name].blind:
        with pytest.raises(ModelError, match=r"without pictures cannot be read \(this model completes a question"):
            source(data, name, "drop").require_blind()
        return
    source(data, name, "drop").require_blind()
    drawn = drawn_for(name)
    chosen = choose_way(built(name), dropped_units(name, drawn))
    assert chosen.way == ZOO[name].way, chosen.rejected
    expected = [
        (naive_nll(built(name), seen), naive_nll(built(name), text))
        for one in drawn
        for seen, text in zip(encoded(name, one), without(name, one), strict=True)
    ]
    assert worst(pairs(name, dropped_units(name, drawn), chosen.way), expected) < EXACT


def test_pictures_that_are_masked_tell_nothing_to_any_token_but_the_one_after_them() -> None:
    vlm, encoder = built("llava"), make_encoder(built("llava"), "llava-1.5-align")
    sample = make_sample("<image>\nDescribe it.", "A red cup on a table.")
    one, other = (replace(encoder.encode(sample, [picture(seed)]), masked=True) for seed in (0, 1))
    assert one.input_ids[one.is_answer.argmax() - 1] == vlm.image_token_id
    blind, again = (answer_nll(vlm, [row])[0] for row in (one, other))
    assert abs(blind[0] - again[0]) > 1e-3, "predicted at the picture's last token, which holds its own patch"
    assert np.array_equal(blind[1:], again[1:])
    assert np.abs(blind - naive_masked(vlm, one)).max() < CLOSE
    units = [Unit.masked([replace(row, masked=False)]) for row in (one, other)]
    assert choose_way(vlm, units).way == "shared", "the check leaves that token out"


def test_a_caption_is_scored_without_the_picture_that_is_all_it_is_asked_about() -> None:
    data = rows((("<image>\nDescribe it.", "A red cup."), (Shown("a", 0),)))
    encoder = make_encoder(built("llava"), "llava-1.5-align")
    [unit] = replace(source(data, counterfactual="drop"), encoder=encoder)[0, [0]].units
    [text] = unit.blind_rows
    assert np.array_equal(text.token_id, unit.rows[0].token_id)
    assert text.n_prompt_tokens == 1
    assert np.abs(pairs("llava", [unit], "single")[0][1] - naive_nll(built("llava"), text)).max() < CLOSE


# ---------------------------------------------------------------- broken on purpose


def test_a_mask_that_is_left_out_of_packs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_hidden", lambda *_: None)
    assert choose_way(built("llava"), masked_units("llava", MANY)).way == "cached"


def test_a_mask_that_is_left_out_of_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pack, forward_module, engine_module):
        monkeypatch.setattr(module, "is_hidden", lambda row, _: np.zeros(len(row.input_ids), bool))
    with pytest.raises(ModelError, match="in other ways than by attention"):
        choose_way(built("llava"), masked_units("llava", MANY))


def test_positions_that_move_up_behind_a_masked_picture_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(vlm: VLM, samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        inputs = hidden(vlm, samples)
        if inputs:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs

    hidden = forward_module._without_masked
    monkeypatch.setattr(forward_module, "_without_masked", moved)
    assert choose_way(built("llava"), masked_units("llava", MANY)).way == "single"
    row = replace(encoded("llava", ONE)[0], masked=True)
    assert np.abs(answer_nll(built("llava"), [row])[0] - naive_masked(built("llava"), row)).max() > 1e-3


def test_a_branch_of_text_parts_where_its_own_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = (("<image>\nWhat is this?", "A red cup."), ("<image>\nWhat are these?", "no"))
    drawn = [About(seeds=(seed,), size=SIZES[0], talks=talks[: 2 - seed]) for seed in (0, 1)]
    units = dropped_units("llava", drawn)
    expected = [
        (naive_nll(built("llava"), seen), naive_nll(built("llava"), text))
        for one in drawn
        for seen, text in zip(encoded("llava", one), without("llava", one), strict=True)
    ]
    assert worst(pairs("llava", units, "shared"), expected) < CLOSE


# ---------------------------------------------------------------- units


def test_the_rows_of_a_unit_and_their_blind_side_stay_together() -> None:
    for unit in (masked_units("llava", [ONE])[0], dropped_units("llava", [ONE])[0]):
        longer = with_longest(unit, 200)
        assert [len(longer.rows), len(longer.blind_rows)] == [3, 3]
        assert np.array_equal(longer.rows[2].token_id, longer.blind_rows[2].token_id)
        assert len(longer.rows[2].input_ids) == 200
        [left], [right] = halves([unit]) or pytest.fail("one row is no half")
        whole = pairs("llava", [unit], "single")
        assert worst(pairs("llava", [left, right], "single"), whole) < CLOSE
        assert halves([left]) is None


def test_masked_rows_go_side_by_side_as_alone() -> None:
    rows_ = [replace(row, masked=masked) for row, masked in zip(encoded("llava", ONE), (True, False), strict=True)]
    together = answer_nll(built("llava"), rows_)
    for row, nll in zip(rows_, together, strict=True):
        assert np.abs(answer_nll(built("llava"), [row])[0] - nll).max() < CLOSE


@pytest.mark.parametrize("spec", ["drop", "mask"])
def test_workers_hand_over_the_same_units(spec: str) -> None:
    data = rows(about(Shown("a", 0)), about(Shown("b", 1), answer="no"), about(Shown("a", 0), answer="A dog."))
    items = [(0, [0, 2]), (1, [1])]
    here = list(feed(source(data, counterfactual=parse_condition(spec)), items, workers=0))
    there = list(feed(source(data, counterfactual=parse_condition(spec)), items, workers=2))
    assert plain(here) == plain(there)
    assert [len(unit.blind_rows) for fed in there for unit in fed.units] == [2, 1]


# ---------------------------------------------------------------- dropping: what stands in the text


def dropped(data: Rows, name: str = "llava", **options: Any) -> tuple[list[Encoded], list[Skipped]]:
    made = source(data, name, "drop", **options)
    fed = made[0, list(range(len(data)))]
    skips = [one for one in fed.done if isinstance(one, Skipped)]
    return [row for unit in fed.units for row in unit.blind_rows], skips


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("<image>What?", "What?"),
        ("What is <image> this?", "What is  this?"),
        ("One\n<image>\nTwo", "One\nTwo"),
        ("<image>\n<image>\nTwo", "Two"),
        ("One\n<image>\n<image>\nTwo", "One\nTwo"),
        ("<image>", ""),
        ("\n\n<image>\n\nWhat?", "\n\n\nWhat?"),
    ],
)
def test_a_picture_goes_with_its_line_break_and_every_word_stays(text: str, left: str) -> None:
    n = text.count("<image>")
    data = rows(((text, "A red cup."), tuple(Shown(f"{k}", k) for k in range(n))))
    [row], _ = dropped(data)
    expected = make_encoder(built("llava")).encode(make_sample(left, "A red cup.", images=0), [])
    assert np.array_equal(row.input_ids, expected.input_ids)
    assert row.n_image_tokens == 0
    assert not row.model_inputs.keys() - set(PER_TOKEN_INPUTS)


def test_where_the_longest_sequence_cuts_an_answer_the_text_alone_is_scored_on_as_many_tokens() -> None:
    data = rows(about(Shown("a", 0), answer="Yes, a cup on a table. " * 8))
    whole = source(data)[0, [0]].units[0].rows[0]
    short = source(data, counterfactual=Drop(), max_length=len(whole.input_ids) - 5)
    [unit] = short[0, [0]].units
    seen, text = unit.rows[0], unit.blind_rows[0]
    assert seen.truncated
    assert len(text.turn) == len(seen.turn) == len(whole.turn) - 5
    assert np.array_equal(text.token_id, seen.token_id)
    _, blind_nll = pairs("llava", [unit], "shared")[0]
    assert np.abs(blind_nll - naive_nll(built("llava"), text)).max() < CLOSE


def changing(made: Feed, change: Callable[[Encoded], Encoded]) -> Feed:
    """`made` with an encoder that changes what it makes of row 0 without its picture."""

    class Changing:
        def encode_all(self, samples: Sequence[Sample], images: Any) -> list[Any]:
            read = made.encoder.encode_all(samples, images)
            return [
                change(one) if not images and sample.row == 0 else one
                for sample, one in zip(samples, read, strict=True)
            ]

        def __getattr__(self, name: str) -> Any:
            return getattr(made.encoder, name)

    changed = copy.copy(made)
    object.__setattr__(changed, "encoder", Changing())
    return changed


def another_token(encoded: Encoded) -> Encoded:
    ids = encoded.input_ids.copy()
    ids[encoded.is_answer.nonzero()[0][2]] += 1
    return replace(encoded, input_ids=ids)


def one_token_less(encoded: Encoded) -> Encoded:
    return replace(
        encoded,
        input_ids=encoded.input_ids[:-1],
        is_answer=np.append(encoded.is_answer[:-2], True),
        turn=encoded.turn[:-1],
        chars=encoded.chars[:-1],
    )


def another_place(encoded: Encoded) -> Encoded:
    return replace(encoded, chars=encoded.chars + 1)


def nothing_before(encoded: Encoded) -> Encoded:
    first = int(encoded.is_answer.argmax())
    return replace(encoded, input_ids=encoded.input_ids[first:], is_answer=encoded.is_answer[first:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_token, "without its picture the answer is other tokens, from token 2 on"),
        (one_token_less, "without its picture the answer is other tokens, from token"),
        (another_place, "without its picture the answer is other tokens, from token 0 on"),
        (nothing_before, "without its picture nothing stands before the answer"),
    ],
)
def test_an_answer_that_is_not_the_same_without_its_picture_is_skipped_with_the_reason(
    change: Callable[[Encoded], Encoded], reason: str
) -> None:
    data = rows(about(Shown("a", 0)), about(Shown("a", 0), answer="no"))
    fed = changing(source(data, counterfactual="drop"), change)[0, [0, 1]]
    [skip] = [one for one in fed.done if isinstance(one, Skipped)]
    assert skip.row == 0
    assert reason in skip.reason
    assert [[record.row for record in group] for group in fed.records] == [[1]]


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("spec", ["drop", "mask"])
def test_scores_on_disk_equal_the_naive_loop(spec: str, blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_score(config(blank_model, small_world, tmp_path, counterfactual=spec, limit=40))
    vlm, dataset = load_vlm(str(blank_model)), open_dataset(small_world / "data.json")
    encoder, scored = make_encoder(vlm), 0
    for row in read_scores(tmp_path).to_pylist():
        sample = dataset[row["row"]]
        assert isinstance(sample, Sample)
        if not sample.images:
            assert (row["gain"], row["nll_blind"]) == (None, [])
            continue
        seen = encoder.encode(sample, [image.open() for image in sample.images])
        blind = naive_nll(vlm, encoder.encode(bare(sample), [])) if spec == "drop" else naive_masked(vlm, seen)
        assert np.allclose(row["nll_seen"], naive_nll(vlm, seen), rtol=0, atol=CLOSE)
        assert np.allclose(row["nll_blind"], blind, rtol=0, atol=CLOSE)
        scored += 1
    assert scored > 20
    assert read_json(tmp_path / "run.json", "scores")["identity"]["counterfactual"] == spec
    assert read_json(tmp_path / "run.json", "scores")["way"] == "shared"


@pytest.mark.parametrize("spec", ["drop", "mask"])
def test_batch_size_parts_and_resumption_change_no_number(
    spec: str, blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    run_score(config(blank_model, small_world, whole, counterfactual=spec, limit=60, part_rows=20))
    run_score(config(blank_model, small_world, other, counterfactual=spec, limit=60, part_rows=7, batch_tokens=1))
    assert_same_scores(whole, other, tolerance=CLOSE)
    before = {path.name: path.read_bytes() for path in whole.glob("part-*")}
    (whole / min(before)).unlink()
    run_score(config(blank_model, small_world, whole, counterfactual=spec, limit=60, workers=1))
    assert {path.name: path.read_bytes() for path in whole.glob("part-*")} == before


def test_another_condition_in_the_same_folder_stops_with_the_difference(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path, counterfactual="drop", limit=4))
    with pytest.raises(Exception, match=r"counterfactual.*drop.*mask|counterfactual.*mask.*drop"):
        run_score(config(blank_model, small_world, tmp_path, counterfactual="mask", limit=4))


# ---------------------------------------------------------------- what is asked for


def test_conditions_have_names_and_are_no_pictures() -> None:
    assert {"drop", "mask"} <= set(COUNTERFACTUALS.names())
    assert [parse_condition(name) for name in ("drop", "mask")] == [Drop(), Mask()]
    assert [Drop().spec, Mask().spec] == ["drop", "mask"]
    for name in ("drop", "mask"):
        with pytest.raises(ConfigError, match="puts no picture in the image's place"):
            parse_counterfactual(name)
    with pytest.raises(ConfigError, match="takes no options"):
        parse_condition("drop:sigma=1")


@pytest.mark.parametrize("spec", ["drop", "mask"])
def test_gains_per_image_are_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--per-image does not go with --counterfactual {spec}"):
        blind_condition(
            ScoreConfig(model="embedded", data=tmp_path / "x", out=tmp_path, counterfactual=spec, per_image=True)
        )


def test_a_model_that_needs_pictures_says_so_at_the_start() -> None:
    data = rows(about(Shown("a", 0)))
    assert isinstance(source(data, "paligemma", "drop"), Feed)
    with pytest.raises(ModelError, match="use another --counterfactual"):
        source(data, "paligemma", "drop").require_blind()
