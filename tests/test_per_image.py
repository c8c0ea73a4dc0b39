"""Gain per image against a naive loop: one picture gives way, two forwards, subtract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from naive import built, naive_nll, picture
from tiny_models import make_sample
from visgain.config import ScoreConfig
from visgain.counterfactuals import parse_counterfactual
from visgain.data import open_dataset
from visgain.errors import StorageError
from visgain.scoring import run as run_module
from visgain.scoring.engine import WAYS, Engine, Extent, PerCondition, scored
from visgain.scoring.plan import make_plan, read_plan
from visgain.scoring.run import run_score
from visgain.scoring.unit import Change, Unit
from visgain.storage import PER_IMAGE_SCHEMA, SCORE_SCHEMA, read_json, read_scores
from visgain.types import Encoded, Sample
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from zoo import ZOO

EXACT = 1e-4  # nats
MANY = 1 << 30
EVERYTHING = Extent(tokens=MANY, shared=MANY, pictures=MANY)

TALKS = {
    "in front": ("<image>\n<image>\nWhat is this?", "A red cup.", "And?", "A dog."),
    "between turns": ("<image>\nWhat is this?", "A red cup.", "And this?<image>", "A dog on a table."),
    "no picture first": ("And", "no", "<image>\nWhat is this?", "A red cup.", "<image>", "A dog."),
}
SIZES = ((40, 30), (24, 40))


# ---------------------------------------------------------------- the engine


def encode(name: str, talk: Sequence[str], images: Sequence[Image.Image]) -> Encoded:
    return ZOO[name].encode(built(name), make_sample(*talk, images=len(images)), images)


def shown(seeds: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [picture(seed, size) for seed, size in zip(seeds, sizes, strict=True)]


def conditions(images: list[Image.Image], blind: list[Image.Image]) -> list[list[Image.Image]]:
    """The pictures seen, blind, and with each one alone blind."""
    alone = [[blind[i] if i == k else image for i, image in enumerate(images)] for k in range(len(images))]
    return [images, blind, *alone]


def unit(name: str, talks: Sequence[Sequence[str]], seeds: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> Unit:
    pictures = conditions(shown(seeds, sizes), shown([seed + 100 for seed in seeds], sizes))
    _, blind, *alone = (encode(name, talks[0], images).model_inputs for images in pictures)
    return Unit.of([encode(name, talk, pictures[0]) for talk in talks], blind, alone)


def naive(name: str, talk: Sequence[str], seeds: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """One forward of the model for each condition."""
    pictures = conditions(shown(seeds, sizes), shown([seed + 100 for seed in seeds], sizes))
    return [naive_nll(built(name), encode(name, talk, images)) for images in pictures]


def score(name: str, way: str, units: Sequence[Unit], pack_tokens: int = MANY) -> list[PerCondition]:
    engine = Engine(vlm=built(name), way=way, pack_tokens=pack_tokens, tried=EVERYTHING)
    found = {id(one): nlls for one, nlls in scored(engine, units)}
    return [nlls for one in units for nlls in found[id(one)]]


def assert_near(found: PerCondition, expected: Sequence[np.ndarray], within: float = EXACT) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < within


ALL_WAYS = [
    *(("llava", way) for way in ("shared", "cached", "packed", "single")),
    ("gemma3", "mutual"),
    ("qwen2_vl", "shared"),
    ("idefics3", "shared"),
    ("internvl", "shared"),
    pytest.param("mllama", "cached", marks=pytest.mark.slow),
    ("molmo2", "cached"),
]


@pytest.mark.parametrize(("name", "way"), ALL_WAYS)
def test_every_way_blinds_each_picture_as_the_naive_loop_does(name: str, way: str) -> None:
    several, turns = [TALKS["in front"], ("<image>\n<image>\nAnd", "no")], [TALKS["between turns"]]
    drawn = [
        (several, (0, 1), SIZES),
        (turns, (2, 0), SIZES),
        (turns, (3, 3), (SIZES[0],) * 2),  # the same picture twice: each place on its own
        ([("<image>\nWhat is this?", "A red cup.")], (0,), SIZES[:1]),
    ]
    for pack_tokens in (1, MANY):
        units = [unit(name, *about) if len(about[1]) > 1 else alone(unit(name, *about)) for about in drawn]
        found = iter(score(name, way, units, pack_tokens))
        for talks, seeds, sizes in drawn:
            for talk in talks:
                expected = naive(name, talk, seeds, sizes)
                assert_near(next(found), expected if len(seeds) > 1 else expected[:2])


def alone(one: Unit) -> Unit:
    """`one` without conditions of single pictures."""
    return replace(one, blind_to=())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "internvl", "gemma3"])
@pytest.mark.parametrize("talk", ["between turns", "no picture first"])
def test_no_token_before_a_picture_gains_by_it(name: str, talk: str) -> None:
    way = "mutual" if name == "gemma3" else "shared"
    [(seen, _, first, second)] = score(name, way, [unit(name, [TALKS[talk]], (0, 1), SIZES)])
    turn = encode(name, TALKS[talk], shown((0, 1), SIZES)).turn
    before_first, before_second = {"between turns": (-1, 0), "no picture first": (0, 1)}[talk]
    for nll, before in ((first, before_first), (second, before_second)):
        assert np.abs(nll - seen)[turn <= before].max(initial=0) < 1e-5
        assert np.abs(nll - seen)[turn > before].max() > 1e-3


def test_a_picture_that_is_seen_together_with_all_others_is_computed_and_not_taken_for_nothing() -> None:
    [(seen, _, _, second)] = score("molmo2", "cached", [unit("molmo2", [TALKS["between turns"]], (0, 1), SIZES)])
    turn = encode("molmo2", TALKS["between turns"], shown((0, 1), SIZES)).turn
    assert np.abs(second - seen)[turn == 0].max() > 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_what_runs_beside_it_changes_no_gain_of_a_picture(name: str) -> None:
    way = "mutual" if name == "gemma3" else "shared"
    mine = unit(name, [TALKS["between turns"]], (0, 1), SIZES)
    reference = score(name, way, [mine])[0]
    for beside in (
        unit(name, [TALKS["in front"]], (0, 1), SIZES),
        unit(name, [TALKS["in front"], TALKS["between turns"]], (4, 5), SIZES),
        alone(unit(name, [TALKS["in front"]], (6, 1), SIZES)),
        unit(name, [("<image>" * 3, "A red cup.")], (1, 2, 3), (*SIZES, SIZES[0])),
    ):
        assert_near(score(name, way, [beside, mine])[len(beside.rows)], reference, within=1e-5)


def test_a_way_that_fails_further_on_is_left_for_the_plain_one_in_every_condition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = WAYS["shared"]
    monkeypatch.setitem(WAYS, "shared", lambda vlm, groups: [nll + 1 for nll in shared(vlm, groups)])
    mine = unit("llava", [TALKS["in front"]], (0, 1), SIZES)
    engine = Engine(vlm=built("llava"), way="shared", pack_tokens=MANY)
    assert_near(engine.score([mine])[0], naive("llava", TALKS["in front"], (0, 1), SIZES))
    monkeypatch.setitem(WAYS, "shared", shared)
    assert_near(engine.score([mine])[0], naive("llava", TALKS["in front"], (0, 1), SIZES))
    assert engine.tried.pictures == 2


# ---------------------------------------------------------------- what is kept of each condition

numbers = st.lists(st.sampled_from([0.0, 1.0, 2.0, float("inf")]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(one=numbers, seed=st.integers(0, 1000))
def test_a_change_makes_the_other_input_and_leaves_the_first_as_it_was(one: list[float], seed: int) -> None:
    value = torch.tensor(one).reshape(1, -1)
    other = torch.where(torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) < 0.3, 7.0, value)
    before = value.clone()
    assert torch.equal(Change.between(value, other).made(value), other)
    assert torch.equal(value, before)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "idefics3", "pixtral", "minicpmv4_6"])
def test_one_picture_blind_is_kept_in_the_room_of_one_picture(name: str) -> None:
    seeds, sizes = (0, 1, 2, 3), ((40, 30),) * 4
    talk = ("<image>" * 4, "A red cup.")
    pictures = conditions(shown(seeds, sizes), shown([seed + 100 for seed in seeds], sizes))
    _, blind, *alone = (encode(name, talk, images).model_inputs for images in pictures)
    one = Unit.of([encode(name, talk, pictures[0])], blind, alone)
    for inputs, made in zip(alone, list(one.pictures())[2:], strict=True):
        assert inputs.keys() >= made.keys()
        for key, value in made.items():
            assert torch.equal(value, inputs[key]) if isinstance(value, torch.Tensor) else value == inputs[key]
    if name != "minicpmv4_6":  # whose pictures lie side by side in one row, and so interleaved in memory
        kept = sum(change.values.numel() for changes in one.blind_to for change in changes.values())
        assert kept <= 1.01 * sum(value.numel() for value in one.seen.values())


# ---------------------------------------------------------------- a run


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def row(*texts: str, images: Sequence[str] = ()) -> dict[str, Any]:
    turns = [(human, gpt)[k % 2](text) for k, text in enumerate(texts)]
    return {"conversations": turns, **({"image": list(images)} if images else {})}


ROWS = [
    row("<image>\nWhat is this?", "A red cup.", images=["a.png"]),
    row("<image>\n<image>\nWhich is red?", "The first.", images=["a.png", "b.png"]),
    row("<image>\n<image>\nWhich is blue?", "The second one.", images=["a.png", "b.png"]),  # shared pictures
    row("<image>\nWhat?", "A cup.", "<image>\nAnd this?", "A dog.", "Sure?", "yes", images=["b.png", "c.png"]),
    row("<image><image>\nSame?", "yes", images=["a.png", "a.png"]),
    row("<image>\nOne", "A", "And <image> with <image>?", "B", images=["c.png", "a.png", "b.png"]),
    row("Capital of France?", "Paris."),
    row("<image><image>\nWhat?", "A cup.", images=["a.png", "gone.png"]),
    row("<image>\n<image>\nWhich is red?", "The second.", images=["b.png", "a.png"]),
]


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of rows about one, two and three pictures of unequal size."""
    folder = tmp_path_factory.mktemp("album")
    for seed, (name, size) in enumerate({"a.png": (40, 30), "b.png": (24, 40), "c.png": (72, 72)}.items()):
        picture(seed, size).save(folder / name)
    (folder / "data.json").write_text(json.dumps(ROWS))
    return folder / "data.json"


def options(model: Path, data: Path, out: Path, **more: Any) -> ScoreConfig:
    settings = {"per_image": True, "counterfactual": "mean", "workers": 0, **more}
    return ScoreConfig(model=str(model), data=data, out=out, **settings)


@pytest.fixture(scope="module")
def reference(blank_model: Path, album: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("reference")
    run_score(options(blank_model, album, out))
    return list(read_scores(out).to_pylist())


def loop(vlm: VLM, sample: Sample, images: list[Image.Image]) -> np.ndarray:
    return naive_nll(vlm, make_encoder(vlm).encode(sample, images))


def test_a_run_holds_the_gain_of_each_image_as_a_loop_over_images_measures_it(
    blank_model: Path, album: Path, reference: list[dict[str, Any]]
) -> None:
    vlm, mean, dataset = load_vlm(str(blank_model)), parse_counterfactual("mean"), open_dataset(album)
    scored = [score for score in reference if score["n_images"] and score["skip_reason"] is None]
    assert [score["row"] for score in scored] == [0, 1, 2, 3, 4, 5, 8]
    for score in scored:
        sample = dataset[score["row"]]
        assert isinstance(sample, Sample)
        images = [image.open() for image in sample.images]
        blind = [mean(image, rng=np.random.default_rng(0), other=pytest.fail) for image in images]
        seen = loop(vlm, sample, images)
        assert len(score["nll_blind_image"]) == len(score["image_gain"]) == len(images)
        for k, nll in enumerate(score["nll_blind_image"]):
            gone = loop(vlm, sample, [*images[:k], blind[k], *images[k + 1 :]])
            assert np.allclose(nll, gone, rtol=0, atol=2e-5)
            assert score["image_gain"][k] == pytest.approx((gone - seen).mean(), abs=2e-5)
            assert np.abs(np.asarray(nll) - score["nll_seen"]).max() > 1e-4, "the picture matters"
        assert np.allclose(score["nll_blind"], loop(vlm, sample, blind), rtol=0, atol=2e-5)


def test_one_image_is_the_blind_side_and_no_image_has_no_gain(reference: list[dict[str, Any]]) -> None:
    one, text, gone = reference[0], reference[6], reference[7]
    assert one["nll_blind_image"] == [one["nll_blind"]]
    assert one["image_gain"] == [one["gain"]]
    for score in (text, gone):
        assert score["image_gain"] == score["nll_blind_image"] == score["nll_seen"] == []
    assert "gone.png" in gone["skip_reason"]


def test_the_same_picture_twice_is_two_images(reference: list[dict[str, Any]]) -> None:
    first, second = reference[4]["nll_blind_image"]
    assert not np.allclose(first, second, rtol=0, atol=1e-5)


def test_an_answer_before_an_image_does_not_gain_by_it(reference: list[dict[str, Any]]) -> None:
    for number in (3, 5):
        score = reference[number]
        first_turn = np.asarray(score["turn"]) == 0
        for nll in score["nll_blind_image"][1:]:
            change = np.abs(np.asarray(nll, np.float32) - np.asarray(score["nll_seen"], np.float32))
            assert change[first_turn].max() < 1e-5 < 1e-3 < change[~first_turn].max()


def test_the_other_columns_are_those_of_a_run_without(
    blank_model: Path, album: Path, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    run_score(options(blank_model, album, tmp_path, per_image=False))
    assert "per_image" not in read_json(tmp_path / "run.json", "scores")["identity"]
    [part] = tmp_path.glob("part-*.parquet")
    assert pq.read_schema(part).names == SCORE_SCHEMA.names
    assert_same([{name: score[name] for name in SCORE_SCHEMA.names} for score in reference], tmp_path)


def assert_same(expected: list[dict[str, Any]], folder: Path, tolerance: float = 1e-5) -> None:
    found = read_scores(folder).to_pylist()
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name in ("gain", "nll_seen", "nll_blind", "image_gain", "nll_blind_image"):
                assert np.allclose(value or 0, other[name] or 0, rtol=0, atol=tolerance), (name, one["row"])
            else:
                assert value == other[name]


def test_no_counterfactual_gives_each_image_a_gain_of_exactly_zero(
    blank_model: Path, album: Path, tmp_path: Path
) -> None:
    run_score(options(blank_model, album, tmp_path, counterfactual="none"))
    gains = [gain for score in read_scores(tmp_path).to_pylist() for gain in score["image_gain"]]
    assert gains == [0.0] * 14


@pytest.mark.parametrize(
    "more",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 4000, "part_rows": 2},
        pytest.param({"way": "cached"}, marks=pytest.mark.slow),
        {"way": "packed", "part_rows": 4},
        pytest.param({"way": "single"}, marks=pytest.mark.slow),
        {"workers": 1},
    ],
    ids=str,
)
def test_no_way_of_running_changes_a_number(
    more: dict[str, Any], blank_model: Path, album: Path, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    run_score(options(blank_model, album, tmp_path, **more))
    assert_same(reference, tmp_path)


def test_a_resumed_run_equals_an_uninterrupted_one(blank_model: Path, album: Path, tmp_path: Path) -> None:
    config = options(blank_model, album, tmp_path, part_rows=3)
    run_score(config)
    whole = read_scores(tmp_path).to_pylist()
    first, *others = sorted(tmp_path.glob("part-*.parquet"))
    kept = first.stat().st_mtime_ns
    for part in others:
        part.unlink()
    run_score(config)
    assert first.stat().st_mtime_ns == kept
    assert read_scores(tmp_path).to_pylist() == whole


def test_a_run_with_gains_per_image_and_one_without_do_not_mix(blank_model: Path, album: Path, tmp_path: Path) -> None:
    run_score(options(blank_model, album, tmp_path / "with"))
    run_score(options(blank_model, album, tmp_path / "without", per_image=False))
    for there, now, name in ((True, None, "with"), (None, True, "without")):
        with pytest.raises(StorageError, match=f"per_image: {there} there, {now} now"):
            run_score(options(blank_model, album, tmp_path / name, per_image=bool(now)))


def test_a_gain_of_an_image_that_is_not_finite_is_a_reason_and_not_a_number(
    blank_model: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, plan = run_module.open_run(options(blank_model, album, tmp_path))
    real = WAYS["shared"]
    calls: list[int] = []

    def broken(vlm: VLM, groups: list[Any]) -> list[np.ndarray]:
        calls.append(len(groups))
        return [nll * np.float32("nan") if len(calls) == 3 else nll for nll in real(vlm, groups)]

    monkeypatch.setitem(WAYS, "shared", broken)
    [rows] = [rows for rows in plan.units(0) if rows == [1, 2]]
    records = scorer.score_part([scorer.source[0, rows]], done=lambda n: None)
    assert len(calls) == 4, "seen, blind, blind to the first, blind to the second"
    assert ["non-finite" in getattr(record, "reason", "") for record in records] == [True, True]


# ---------------------------------------------------------------- another sample's image


def test_a_swapped_image_is_none_of_the_rows_own(blank_model: Path, album: Path, tmp_path: Path) -> None:
    scorer, _ = run_module.open_run(options(blank_model, album, tmp_path, counterfactual="swap"))
    dataset = scorer.source.dataset
    pictures = {name: Image.open(album.parent / name).convert("RGB") for name in ("a.png", "b.png", "c.png")}
    for number, own in ((1, ["a.png", "b.png"]), (3, ["b.png", "c.png"]), (4, ["a.png", "a.png"])):
        sample = dataset[number]
        assert isinstance(sample, Sample)
        fed = scorer.source[0, [number]]
        [unit] = fed.units
        seen, blind, *alone = unit.pictures()
        foreign = [image for name, image in pictures.items() if name not in own]
        for k in range(len(own)):
            image = pictures[own[k]]
            allowed = [
                make_encoder(scorer.engine.vlm)
                .encode(sample, [other.resize(image.size, Image.Resampling.BICUBIC)] * len(own))
                .model_inputs["pixel_values"][k]
                for other in foreign
            ]
            assert any(torch.equal(blind["pixel_values"][k], other) for other in allowed)
            for place in range(len(own)):
                expected = blind if place == k else seen
                assert torch.equal(alone[k]["pixel_values"][place], expected["pixel_values"][place])


def test_a_row_about_all_pictures_of_a_dataset_has_nothing_to_swap_in(blank_model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    rows = [row("<image><image>\nWhich?", "A", images=["a.png", "b.png"]), row("<image>", "A cup.", images=["a.png"])]
    (tmp_path / "data.json").write_text(json.dumps([*rows, row("<image>", "A cup.", images=["b.png"])]))
    done = run_score(options(blank_model, tmp_path / "data.json", tmp_path / "out", counterfactual="swap"))
    assert (done.multimodal, done.skipped) == (2, 1)
    assert '"row": 0' in (tmp_path / "out/skipped.jsonl").read_text()


# ---------------------------------------------------------------- what it costs


class Rows(list[Sample]):
    path, image_root, fingerprint = Path("data.json"), Path(), "fingerprint"


def test_a_plan_says_how_much_more_there_is_to_compute(tmp_path: Path) -> None:
    def cost(*n_images: int) -> float:
        rows = Rows(replace(make_sample("What?", "A", images=n), row=k) for k, n in enumerate(n_images))
        return make_plan(rows, len(rows), 100).per_image_cost

    assert cost(1, 1, 0) == cost(0) == 1.0
    assert cost(2) == cost(2, 0, 2) == 2.0
    assert cost(4) == 3.0
    assert 1.5 < cost(1, 2) < 2.0


def test_the_cost_is_told_when_a_run_starts_and_only_then(
    blank_model: Path, album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_score(options(blank_model, album, tmp_path / "with"))
    told = capsys.readouterr().err
    plan = read_plan(tmp_path / "with", 1)
    assert f"--per-image computes {plan.per_image_cost:.1f} times as much" in told
    assert 2.0 < plan.per_image_cost < 2.2
    run_score(options(blank_model, album, tmp_path / "without", per_image=False))
    assert "--per-image" not in capsys.readouterr().err


def test_the_columns_are_those_of_the_schema(blank_model: Path, album: Path, tmp_path: Path) -> None:
    run_score(options(blank_model, album, tmp_path, part_rows=4))
    for part in tmp_path.glob("part-*.parquet"):
        assert pq.read_schema(part).equals(PER_IMAGE_SCHEMA)
    table = read_scores(tmp_path, ["nll_blind_image", "row"])
    assert table.column_names == ["nll_blind_image", "row"]
    assert table.column("row").to_pylist() == list(range(len(ROWS)))
