"""Scores against a naive computation, and every way of running that must not change them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import Picture, make_sample
from visgain.config import ScoreConfig
from visgain.counterfactuals import parse_counterfactual
from visgain.data import open_dataset
from visgain.errors import DataError, ModelError, StorageError, VisgainError
from visgain.scoring import run
from visgain.scoring.engine import WAYS
from visgain.scoring.forward import answer_nll
from visgain.scoring.plan import make_plan, probe_units, read_plan, write_plan
from visgain.scoring.run import open_run, run_score
from visgain.scoring.unit import Unit
from visgain.storage import read_json, read_scores
from visgain.types import Sample
from visgain.vlm.batch import pad_batch
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.logits import answer_logits
from visgain.vlm.template import make_encoder


def config(model: Path, world: Path, out: Path, **options) -> ScoreConfig:
    return ScoreConfig(model=str(model), data=world / "data.json", out=out, **options)


def assert_same_scores(one: Path, other: Path, tolerance: float = 0.0) -> None:
    a, b = read_scores(one).to_pylist(), read_scores(other).to_pylist()
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        for name in left:
            if name in ("nll_seen", "nll_blind", "gain"):
                assert np.allclose(left[name] or 0, right[name] or 0, rtol=0, atol=tolerance), (name, left["row"])
            else:
                assert left[name] == right[name]


# ---------------------------------------------------------------- exactness


def naive_nll(vlm: VLM, sample: Sample, images: list[Image.Image]) -> list[float]:
    """Batch 1, full logits, the token before predicts the token: nothing of our head, batching or planning."""
    encoded = make_encoder(vlm).encode(sample, images)
    ids = torch.from_numpy(encoded.input_ids)[None]
    with torch.no_grad():
        logits = vlm.model(input_ids=ids, **encoded.model_inputs).logits[0]
    log_q = torch.log_softmax(logits.double(), dim=-1)
    return [-log_q[t - 1, ids[0, t]].item() for t in range(ids.shape[1]) if encoded.is_answer[t]]


def test_every_family_scores_as_the_naive_loop_does(family: VLM) -> None:
    samples = [
        make_sample("<image>\nWhat is this?", "A red cup."),
        make_sample("<image>\nWhat is this?", "A red cup on a table.", "And?", "No, there is a dog."),
        make_sample("<image>\nWhat?", "yes"),
    ]
    images = [[Image.new("RGB", (40, 30), (k * 80, 20, 200 - k * 60))] for k in range(len(samples))]
    encoder = make_encoder(family)
    encoded = [encoder.encode(sample, image) for sample, image in zip(samples, images, strict=True)]
    together = answer_nll(family, encoded)
    for sample, image, nll in zip(samples, images, together, strict=True):
        assert nll.dtype == np.float32
        assert np.allclose(nll, naive_nll(family, sample, image), rtol=0, atol=2e-5)


def test_scores_on_disk_equal_the_naive_loop_seen_and_blind(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path, counterfactual="mean"))
    vlm, mean = load_vlm(str(blank_model)), parse_counterfactual("mean")
    dataset = open_dataset(small_world / "data.json")
    scored = 0
    for row in read_scores(tmp_path).to_pylist():
        sample = dataset[row["row"]]
        assert isinstance(sample, Sample)
        if not sample.images:
            assert row["gain"] is None
            assert row["nll_seen"] == row["nll_blind"] == []
            assert len(row["token_id"]) > 0
            continue
        picture = sample.images[0].open()
        blind = mean(picture, rng=np.random.default_rng(0), other=lambda: pytest.fail("mean asks for no other picture"))
        assert np.allclose(row["nll_seen"], naive_nll(vlm, sample, [picture]), rtol=0, atol=2e-5)
        assert np.allclose(row["nll_blind"], naive_nll(vlm, sample, [blind]), rtol=0, atol=2e-5)
        gains = np.asarray(row["nll_blind"], np.float32) - np.asarray(row["nll_seen"], np.float32)
        assert row["gain"] == pytest.approx(gains.mean(dtype=np.float64), abs=1e-12)
        scored += 1
    assert scored > 40


def test_no_counterfactual_gives_a_gain_of_exactly_zero(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_score(config(blank_model, small_world, tmp_path, counterfactual="none"))
    scores = read_scores(tmp_path)
    assert scores.column("gain").drop_null().to_pylist()
    assert set(scores.column("gain").drop_null().to_pylist()) == {0.0}
    assert scores.column("nll_seen").to_pylist() == scores.column("nll_blind").to_pylist()


def test_the_image_reaches_the_model(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_score(config(blank_model, small_world, tmp_path, counterfactual="swap"))
    gain = read_scores(tmp_path).column("gain").drop_null().to_numpy()
    assert np.abs(gain).max() > 1e-3


@pytest.mark.parametrize("options", [{"batch_tokens": 1}, {"part_rows": 7}, {"batch_tokens": 700, "part_rows": 23}])
def test_batch_size_and_parts_change_no_number(
    options: dict[str, int], blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path / "reference"))
    run_score(config(blank_model, small_world, tmp_path / "other", **options))
    assert_same_scores(tmp_path / "reference", tmp_path / "other", tolerance=1e-5)


def test_random_counterfactuals_do_not_depend_on_the_order_of_rows(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path / "one", counterfactual="noise", part_rows=60))
    run_score(config(blank_model, small_world, tmp_path / "other", counterfactual="noise", part_rows=11))
    assert_same_scores(tmp_path / "one", tmp_path / "other", tolerance=1e-5)


def test_bfloat16_weights_still_give_float32_log_probabilities(embedded: VLM) -> None:
    encoded = make_encoder(embedded).encode(
        sample := make_sample("<image>\nWhat is this?", "A red cup."), [image.open() for image in sample.images]
    )
    reference = answer_nll(embedded, [encoded])[0]
    half = load_vlm(embedded.name, dtype="bfloat16")
    images = {k: v.to(torch.bfloat16) for k, v in encoded.model_inputs.items()}
    rounded = answer_nll(half, [replace(encoded, model_inputs=images)])[0]
    assert np.allclose(rounded, reference, atol=0.2)
    batch = pad_batch([replace(encoded, model_inputs=images)], 0)
    logits = answer_logits(half.model, batch.inputs, batch.is_answer)
    assert not torch.equal(logits, logits.to(torch.bfloat16).float()), "the head rounded its logits to bfloat16"


def test_ignoring_end_of_turn_changes_only_which_tokens_count(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path / "with"))
    run_score(config(blank_model, small_world, tmp_path / "without", end_of_turn="ignore"))
    for a, b in zip(
        read_scores(tmp_path / "with").to_pylist(), read_scores(tmp_path / "without").to_pylist(), strict=True
    ):
        words = [k for k, (start, end) in enumerate(zip(a["char_start"], a["char_end"], strict=True)) if end > start]
        assert [a["token_id"][k] for k in words] == b["token_id"]
        if a["nll_seen"]:
            assert np.allclose([a["nll_seen"][k] for k in words], b["nll_seen"], atol=1e-5)


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_equals_an_uninterrupted_one(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_score(config(blank_model, small_world, tmp_path / "whole", part_rows=10))
    part = config(blank_model, small_world, tmp_path / "resumed", part_rows=10)
    run_score(part)
    parts = sorted((tmp_path / "resumed").glob("part-*.parquet"))
    kept = parts[0].stat().st_mtime_ns
    for path in parts[2:]:
        path.unlink()
    run_score(part)
    assert parts[0].stat().st_mtime_ns == kept
    assert_same_scores(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bytes(
    how: signal.Signals, blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "visgain", "score", "--model", str(blank_model), "--part-rows", "5"]
    command += ["--data", str(small_world / "data.json"), "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    while not list((tmp_path / "killed").glob("part-*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    message = process.communicate()[1].decode()
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "the same command resumes" in message
        assert "Traceback" not in message
    assert len(list((tmp_path / "killed").glob("part-*.parquet"))) < 12
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert not list((tmp_path / "killed").glob("*.tmp*"))
    subprocess.run([*command[:-1], str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    assert_same_scores(tmp_path / "killed", tmp_path / "whole")


def test_another_configuration_in_the_same_folder_stops_and_prints_the_difference(
    blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    run_score(config(blank_model, small_world, tmp_path))
    with pytest.raises(StorageError, match=r"counterfactual: 'blur.*' there, 'mean' now"):
        run_score(config(blank_model, small_world, tmp_path, counterfactual="mean"))


def test_a_dataset_that_changed_stops_a_resumed_run(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    rows = json.loads((small_world / "data.json").read_text())
    data.write_text(json.dumps(rows))
    options = ScoreConfig(model=str(blank_model), data=data, image_root=small_world, out=tmp_path / "out", limit=8)
    run_score(options)
    rows[0]["conversations"][1]["value"] += " changed"
    data.write_text(json.dumps(rows))
    with pytest.raises(StorageError, match="data_fingerprint"):
        run_score(options)


# ---------------------------------------------------------------- numbers that leave the range of 16 bits


@pytest.fixture
def overflowing(blank_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that float16 holds but for one letter, Z; --dtype auto is float16, as on a GPU."""
    vlm = load_vlm(str(blank_model))
    [letter] = vlm.tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        vlm.model.get_input_embeddings().weight[letter] *= 1e6
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    real = run.run_dtype
    monkeypatch.setattr(run, "run_dtype", lambda config: "float16" if real(config) == "float32" else real(config))
    return tmp_path / "model"


def talk_about(tmp_path: Path, questions: list[str]) -> Path:
    """A dataset of one question about each of as many pictures."""
    for number, _ in enumerate(questions):
        Image.new("RGB", (40, 30), (number * 20, 60, 200 - number * 20)).save(tmp_path / f"{number}.png")
    rows = [
        {"image": f"{number}.png", "conversations": [human(f"<image>\n{question}"), gpt("A red cup.")]}
        for number, question in enumerate(questions)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


QUESTIONS = ["What is this?"] * 8 + ["What is Z?", "Is this Z?"]


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes that the model is loaded in from now on."""
    dtypes: list[str] = []
    real = run.load_model
    monkeypatch.setattr(run, "load_model", lambda config, dtype: dtypes.append(dtype) or real(config, dtype))
    return dtypes


def test_rows_that_overflow_float16_are_scored_in_bfloat16_and_no_others(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rows about Z are neither the longest nor the shortest, so that no probe is one of them.
    data = talk_about(tmp_path, ["What is it?" * (2 + k % 7) for k in range(12)] + ["What is Z to Z? " * 3] * 2)
    options = ScoreConfig(model=str(overflowing), data=data, out=tmp_path / "auto", part_rows=7, workers=0)
    dtypes = loads(monkeypatch)
    run_score(options)
    assert dtypes == ["float16", "bfloat16"], "for both parts together"
    assert read_json(tmp_path / "auto/run.json", "scores")["identity"]["dtype"] == "float16"
    for dtype in ("float16", "bfloat16", "float32"):
        run_score(replace(options, out=tmp_path / dtype, dtype=dtype))
    found, *others = (read_scores(tmp_path / name).to_pylist() for name in ("auto", "float16", "bfloat16", "float32"))
    for row, half, brain, full in zip(found, *others, strict=True):
        if row["row"] < 12:
            assert row == half
            assert np.allclose(row["nll_seen"], full["nll_seen"], rtol=0, atol=0.02)
        else:
            assert "non-finite" in half["skip_reason"]
            assert row["skip_reason"] is None
            assert np.allclose(row["nll_seen"], brain["nll_seen"], rtol=0, atol=0.1)
            assert np.allclose(row["nll_blind"], brain["nll_blind"], rtol=0, atol=0.1)


def test_a_row_that_overflows_on_one_side_is_scored_again_on_both(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = talk_about(tmp_path, ["What is this?"])
    scorer, plan = open_run(ScoreConfig(model=str(overflowing), data=data, out=tmp_path / "out", workers=0))
    fed = scorer.source[0, plan.units(0)[0]]
    [(seen, blind)] = scorer._wider.score(fed.units)
    calls: list[torch.dtype] = []
    real = WAYS["shared"]

    def overflow_seen(vlm: VLM, groups: list) -> list[np.ndarray]:
        calls.append(vlm.model.dtype)
        nlls = real(vlm, groups)
        return [nll * np.float32("nan") for nll in nlls] if len(calls) == 1 else nlls

    monkeypatch.setitem(WAYS, "shared", overflow_seen)
    [record] = scorer.score_part([fed], done=lambda n: None)
    assert calls == [torch.float16] * 2 + [torch.bfloat16] * 2
    assert np.array_equal(record.nll_seen, seen)
    assert np.array_equal(record.nll_blind, blind)


def test_a_model_that_overflows_float16_at_the_start_is_scored_in_bfloat16(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = talk_about(tmp_path, ["What is Z?"] * 3)
    options = ScoreConfig(model=str(overflowing), data=data, out=tmp_path / "out", workers=0, part_rows=1)
    dtypes = loads(monkeypatch)
    assert run_score(options).multimodal == 3
    assert read_json(tmp_path / "out/run.json", "scores")["identity"]["dtype"] == "bfloat16"
    (tmp_path / "out/part-00001-of-00003.parquet").unlink()
    assert run_score(options).multimodal == 3
    assert dtypes == ["float16", "bfloat16", "bfloat16"]


# ---------------------------------------------------------------- what cannot be scored


def test_rows_that_cannot_be_scored_are_listed_with_their_reason_and_nothing_takes_their_place(
    blank_model: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")

    def row(**fields):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
        return {"conversations": turns, **fields}

    rows = [
        row(image="good.png"),
        row(image="missing.jpg"),
        row(image="corrupt.jpg"),
        row(image="../outside.png"),
        row(image="large.png"),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
        {"id": 7},
        row(image="good.png"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    done = run_score(
        ScoreConfig(model=str(blank_model), data=tmp_path / "data.json", out=tmp_path / "out", max_pixels=1000)
    )
    assert (done.rows, done.multimodal, done.skipped) == (8, 2, 6)
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in skipped] == [1, 2, 3, 4, 5, 6]
    reasons = {entry["row"]: entry["reason"] for entry in skipped}
    assert "not found" in reasons[1]
    assert "--max-pixels" in reasons[4]
    assert all(reasons.values())
    scores = read_scores(tmp_path / "out").to_pylist()
    assert [score["row"] for score in scores] == list(range(8))
    assert scores[0]["nll_seen"] == pytest.approx(scores[7]["nll_seen"], abs=1e-5)


def test_a_swap_without_any_other_picture_is_a_reason_and_not_a_gain_of_zero(blank_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "only.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "only.png", "conversations": turns}] * 2))
    done = run_score(
        ScoreConfig(model=str(blank_model), data=tmp_path / "data.json", out=tmp_path / "out", counterfactual="swap")
    )
    assert done.skipped == 2
    assert "no other picture" in (tmp_path / "out/skipped.jsonl").read_text()


def test_a_non_finite_log_probability_is_a_reason_and_not_a_number(
    blank_model: Path, small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, plan = open_run(config(blank_model, small_world, tmp_path))
    with torch.no_grad():
        scorer.engine.vlm.model.model.multi_modal_projector.linear_2.weight.fill_(float("inf"))
    records = scorer.score_part((scorer.source[0, rows] for rows in plan.units(0)[:6]), done=lambda n: None)
    assert any("non-finite" in getattr(record, "reason", "") for record in records)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "no/such/model/here"}, ModelError, "neither a model folder nor a hub name"),
        ({"model": "/no/such/folder"}, ModelError, "neither a model folder nor a hub name"),
        ({"data": Path("/no/such/data.json")}, DataError, "data.json"),
        ({"image_root": Path("/no/such/images")}, DataError, "images"),
        ({"counterfactual": "blurr"}, VisgainError, "did you mean 'blur'"),
        ({"counterfactual": "blur:sigmaa=1"}, VisgainError, "sigma"),
        ({"device": "cuda:99"}, ModelError, "--device cuda:99"),
    ],
)
def test_a_mistake_is_one_clear_message(
    options: dict, error: type[Exception], message: str, blank_model: Path, small_world: Path, tmp_path: Path
) -> None:
    base = {"model": str(blank_model), "data": small_world / "data.json", "out": tmp_path / "out"}
    with pytest.raises(error, match=message) as caught:
        run_score(ScoreConfig(**{**base, **options}))
    assert "\n" not in str(caught.value)


def test_the_run_records_what_its_numbers_depend_on(blank_model: Path, small_world: Path, tmp_path: Path) -> None:
    run_score(config(blank_model, small_world, tmp_path, limit=10))
    run = read_json(tmp_path / "run.json", "scores")
    assert run["identity"]["counterfactual"].startswith("blur:sigma=")
    assert run["identity"]["limit"] == run["n_rows"] == 10
    assert Path(run["data"]) == small_world / "data.json"
    assert set(run["versions"]) == {"visgain", "torch", "transformers", "python"}


# ---------------------------------------------------------------- the plan


class Rows(list):
    """A dataset of samples in memory."""

    path, image_root, fingerprint = Path("data.json"), Path(), "fingerprint"


def rows_about(pictures: list[str | None], sources: list[str]) -> Rows:
    return Rows(
        replace(
            make_sample("<image>\nWhat?" if key else "What?", "x" * row, images=0),
            row=row,
            source=source,
            images=(Picture(key=key),) if key else (),
        )
        for row, (key, source) in enumerate(zip(pictures, sources, strict=True))
    )


def test_a_plan_holds_every_row_once_and_rows_about_one_picture_together() -> None:
    rng = np.random.default_rng(0)
    pictures = [None if k == 0 else f"p{k}" for k in rng.integers(0, 200, 1003)]
    plan = make_plan(rows_about(pictures, ["coco"] * 1003), 1003, 100)
    assert sorted(plan.row.tolist()) == list(range(1003))
    assert plan.n_parts == 11
    for part in range(plan.n_parts):
        units = plan.units(part)
        assert sum(map(len, units)) == plan.n_rows(part)
        for rows in units:
            assert len({pictures[row] for row in rows}) == 1
            assert len(rows) == 1 or pictures[rows[0]] is not None
    n_units = sum(len(plan.units(part)) for part in range(plan.n_parts))
    assert n_units == len(set(pictures)) - 1 + pictures.count(None)


def test_every_part_is_a_fair_share_of_every_source_and_begins_with_its_largest_units() -> None:
    sources = ["vqa"] * 500 + ["captions"] * 300 + ["text"] * 200
    pictures = [None if source == "text" else f"p{row // 2}" for row, source in enumerate(sources)]
    plan = make_plan(rows_about(pictures, sources), 1000, 100)
    for part in range(plan.n_parts):
        rows = [row for unit in plan.units(part) for row in unit]
        counts = [sum(sources[row] == source for row in rows) for source in ("vqa", "captions", "text")]
        assert np.allclose(counts, [50, 30, 20], atol=2)
        first = plan.units(part)[0]
        assert sum(first) >= sum(plan.units(part)[5]) or len(first) >= len(plan.units(part)[5])


@pytest.mark.parametrize(("n_rows", "part_rows"), [(100, 1), (100, 7), (33, 5), (1, 1), (5, 1000)])
def test_no_part_is_without_rows_however_small_the_parts(n_rows: int, part_rows: int) -> None:
    plan = make_plan(rows_about(["one"] * n_rows, ["coco"] * n_rows), n_rows, part_rows)
    assert all(plan.n_rows(part) for part in range(plan.n_parts))
    assert sorted(plan.row.tolist()) == list(range(n_rows))


def test_a_run_of_many_small_parts_about_one_picture_ends(blank_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "one.png")
    row = {"image": "one.png", "conversations": [human("<image>\nWhat?"), gpt("A cup.")]}
    (tmp_path / "data.json").write_text(json.dumps([row] * 40))
    options = ScoreConfig(model=str(blank_model), data=tmp_path / "data.json", out=tmp_path / "out", part_rows=2)
    assert run_score(options).multimodal == 40


def test_probes_are_taken_from_large_and_small_units_until_there_are_enough(
    blank_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(rows_about(["a", "b", "a", "c", None, "a", "b"], ["x"] * 7), 7, 100)
    assert probe_units(plan, 2) == [[0, 2], [4], [1, 6], [3]]
    data = talk_about(tmp_path, ["What is this?"] * 10)
    for number in range(0, 10, 2):
        (tmp_path / f"{number}.png").unlink()
    probes: list[Unit] = []
    real = run.choose_way
    monkeypatch.setattr(run, "choose_way", lambda vlm, units, ways: probes.extend(units) or real(vlm, units, ways))
    scorer, _ = open_run(ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "out", workers=0))
    assert len(probes) == run.PROBE_UNITS
    assert scorer.engine.way == "shared"


def test_where_nothing_can_be_tried_nothing_is_trusted(blank_model: Path, tmp_path: Path) -> None:
    data = talk_about(tmp_path, ["What is this?"] * 4)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    options = ScoreConfig(model=str(blank_model), data=data, out=tmp_path / "out", workers=0, way="shared")
    scorer, _ = open_run(options)
    assert (scorer.engine.way, scorer.engine.tried) == ("single", (0, 0, 0))
    assert run_score(options).skipped == 4


def test_more_conversations_about_a_picture_than_a_unit_holds_are_several_units() -> None:
    plan = make_plan(rows_about(["one"] * 100, ["coco"] * 100), 100, 512)
    assert [len(rows) for rows in plan.units(0)] == [32, 32, 32, 4]


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    plan = make_plan(rows_about(["a", "b", "a", None], ["x"] * 4), 4, 2)
    write_plan(tmp_path, plan)
    again = read_plan(tmp_path, plan.n_parts)
    assert [again.units(part) for part in range(2)] == [plan.units(part) for part in range(2)]
    (tmp_path / "plan.parquet").write_bytes(b"junk")
    with pytest.raises(StorageError, match=r"plan\.parquet"):
        read_plan(tmp_path, plan.n_parts)
