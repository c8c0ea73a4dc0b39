"""`visgain analyze`: means and intervals by hand, attention against full maps, benchmarks as data."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from visgain.analysis.categories import CLASSES, by_list, by_part_of_speech, class_of
from visgain.analysis.gain import END, gain_tables
from visgain.cli import main
from visgain.config import AnalyzeConfig, ScoreConfig, WorldConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError, DataError
from visgain.evaluation.attention import GROUPS, analyze_attention, attention_shares
from visgain.evaluation.benchmark import Question
from visgain.evaluation.need import right_answer, score_benchmarks
from visgain.scoring.run import run_score
from visgain.storage import read_scores
from visgain.tables import Line, Means, Table, as_text, bars
from visgain.types import Sample
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(WorldConfig(out=tmp_path_factory.mktemp("analyze") / "world", rows=30, seed=6))


@pytest.fixture(scope="module")
def scores(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    run_score(ScoreConfig(model="embedded", data=world, out=out, workers=0, part_rows=7))
    return out


# ---------------------------------------------------------------- tables


def test_a_mean_and_its_interval_by_hand() -> None:
    means = Means()
    for row in ([1.0, 3.0], [2.0], [6.0, 6.0, 0.0]):
        means.add_row([("a", value) for value in row])
    [line] = means.lines()
    assert (line.mean, line.n, line.rows) == (3.0, 6, 3)
    residuals = [4 - 3 * 2, 2 - 3 * 1, 12 - 3 * 3]
    half = 1.959964 * (sum(r * r for r in residuals) * 3 / 2) ** 0.5 / 6
    assert (line.low, line.high) == (pytest.approx(3 - half), pytest.approx(3 + half))


def test_intervals_cover_the_truth_where_rows_agree_within() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        means = Means()
        for _ in range(60):
            centre = rng.normal()
            means.add_row([("a", centre + 0.1 * rng.normal()) for _ in range(int(rng.integers(1, 8)))])
        [line] = means.lines()
        assert line.low is not None
        assert line.high is not None
        covered += line.low <= 0 <= line.high
    assert 178 <= covered <= 200  # 95% of 200 is 190; intervals that took tokens for independent would cover half


def test_one_row_has_no_interval() -> None:
    means = Means()
    means.add_row([("a", 1.0), ("a", 2.0)])
    assert (means.lines()[0].low, means.lines()[0].high) == (None, None)


def test_a_figure_is_a_drawing_whatever_the_labels_say() -> None:
    lines = [
        Line(label="<b>&\"'", mean=-1.0, low=-2.0, high=0.5, n=3, rows=2),
        Line(label="x" * 60, mean=2.0, low=None, high=None, n=1, rows=1),
    ]
    drawn = ET.fromstring(bars(Table(name="t", title="<t>", unit="nats & more", of="words", lines=lines)))
    widths = [float(one.get("width")) for one in drawn.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert ET.fromstring(bars(Table(name="t", title="", unit="", of="", lines=[]))) is not None


def test_the_terminal_shows_the_first_lines() -> None:
    lines = [Line(label=str(n), mean=0.0, low=None, high=None, n=1, rows=1) for n in range(40)]
    assert "and 10 more" in as_text(Table(name="t", title="t", unit="u", of="words", lines=lines))


# ---------------------------------------------------------------- gain


def test_gain_tables_against_a_loop(scores: Path, world: Path) -> None:
    rows = read_scores(scores).to_pylist()
    data = json.loads(world.read_text())
    by_source: dict[str, list[float]] = {}
    by_class: dict[str, list[float]] = {}
    by_place: dict[str, list[float]] = {}
    for row in rows:
        if not row["nll_seen"]:
            continue
        gain = [b - s for s, b in zip(row["nll_seen"], row["nll_blind"], strict=True)]
        by_source.setdefault(row["source"], []).append(sum(gain) / len(gain))
        answers = [turn["value"] for turn in data[row["row"]]["conversations"] if turn["from"] == "gpt"]
        for number, answer in enumerate(answers):
            tokens = [
                (start, end, g)
                for start, end, turn, g in zip(row["char_start"], row["char_end"], row["turn"], gain, strict=True)
                if turn == number
            ]
            for place, (start, end, g) in enumerate(tokens, start=1):
                bins = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127))
                low, high = next((low, high) for low, high in bins if low <= place <= high)
                name = END if start == end else "1" if high == 1 else f"{low}-{high}"
                by_place.setdefault(name, []).append(g)
                if start == end:
                    by_class.setdefault(END, []).append(g)
            position = 0
            for word in "".join(c if c.isalnum() else " " for c in answer).split():
                first = answer.index(word, position)
                position = first + len(word)
                value = sum(g for start, end, g in tokens if start < position and end > first)
                by_class.setdefault(class_of(word), []).append(value)
    for table, expected in zip(gain_tables(scores, open_dataset(world)), (by_source, by_place, by_class), strict=True):
        found = {line.label: (line.mean, line.n) for line in table.lines}
        assert found == {
            name: (pytest.approx(sum(values) / len(values), abs=1e-5), len(values)) for name, values in expected.items()
        }


def test_colours_gain_and_function_words_do_not(scores: Path, world: Path) -> None:
    table = gain_tables(scores, open_dataset(world))[2]
    gain = {line.label: line.mean for line in table.lines}
    assert gain["colour"] > 1
    assert abs(gain["function"]) < 0.2
    assert [line.label for line in table.lines] == [name for name in (*CLASSES, END) if name in gain]


def test_without_the_dataset_there_are_no_words(scores: Path) -> None:
    assert [table.name for table in gain_tables(scores, None)] == ["gain-by-source", "gain-by-position"]


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("Red", "colour"),
        ("orange", "colour"),
        ("Yes", "yes/no"),
        ("glass", "attribute"),
        ("THE", "function"),
        ("42", "number"),
        ("behind", "space"),
        ("zebra", "object"),
        ("sitting", "action"),
        ("quux", "other"),
        ("été", "other"),
    ],
)
def test_words_have_classes(word: str, kind: str) -> None:
    assert class_of(word) == kind
    assert by_list(f"“{word}”, she said")[0] == (1, 1 + len(word), kind)


def test_parts_of_speech_need_spacy_and_say_so() -> None:
    with pytest.raises(ConfigError, match=r"visgain\[spacy\]"):
        by_part_of_speech("no_such_pipeline")


# ---------------------------------------------------------------- attention


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return load_vlm("embedded", device="cpu")


def test_attention_shares_are_those_of_full_maps(embedded: VLM, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(world)
    sample = next(one for row in range(30) if isinstance(one := dataset[row], Sample) and len(one.answers) > 1)
    encoded = make_encoder(embedded).encode(sample, [image.open() for image in sample.images])
    found = attention_shares(embedded, encoded)
    maps: list[np.ndarray] = []

    def eager(module, query, key, value, attention_mask, scaling, **options):
        repeats = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
        causal = torch.ones(scores.shape[-2:]).tril().bool()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        maps.append(weights[0].mean(0).numpy())
        return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    monkeypatch.setattr(embedded.model.config.text_config, "_attn_implementation_internal", "eager")
    with torch.inference_mode():
        embedded.model(input_ids=torch.from_numpy(encoded.input_ids)[None], **encoded.model_inputs)
    image = encoded.input_ids == embedded.image_token_id
    for layer, weights in enumerate(maps):
        for number, token in enumerate(np.flatnonzero(encoded.is_answer)):
            row = weights[token - 1]
            expected = {
                "start": row[0],
                "picture": row[image].sum(),
                "answers": row[encoded.is_answer].sum(),
                "text": row[1:][~image[1:] & ~encoded.is_answer[1:]].sum(),
            }
            assert found[layer, number] == pytest.approx([expected[name] for name in GROUPS], abs=1e-5)
    assert found.sum(-1) == pytest.approx(1)
    assert found.shape[0] == len(maps) == 4


def test_the_attention_table_says_what_was_measured(world: Path, tmp_path: Path) -> None:
    table = analyze_attention(AnalyzeConfig(model="embedded", data=world, out=tmp_path, rows=10, device="cpu"))
    assert [line.label for line in table.lines] == [f"layer {n}" for n in range(4)]
    counts = table.notes["counts"]
    assert counts["rows"] == 10 == counts["measured"] + counts["without a picture"] + counts["skipped"]
    written = json.loads((tmp_path / "attention-on-picture.json").read_text())
    assert written["lines"][0]["mean"] == pytest.approx(table.lines[0].mean)
    assert sum(written["notes"]["groups"][name][2] for name in GROUPS) == pytest.approx(1)


# ---------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"label": "no"}, "No"),
        ({"answer": "B", "options": {}}, "B"),
        ({"reference": "a cup <AND> a plate<OR>crockery"}, "a cup ,  a plate"),
        ({"answers": ["12", "twelve"]}, "12"),
        ({"captions": ("A dog.",)}, "A dog."),
        ({"reference": None}, None),
        ({}, None),
    ],
)
def test_what_is_right_is_said_in_words(facts: dict, said: str | None) -> None:
    assert right_answer(Question(id="1", prompt="?", facts=facts)) == said


def test_a_benchmark_is_scored_by_its_own_answers(world: Path, tmp_path: Path) -> None:
    folder = world.parent
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    rows = [known["row"] for known in truth if known["things"]][:8]
    (tmp_path / "pope").mkdir()
    lines = [
        {
            "question_id": n,
            "image": f"{row:06d}.png",
            "text": "Is there a cup in the image?",
            "label": "yes" if n % 2 else "no",
        }
        for n, row in enumerate(rows, start=1)
    ]
    (tmp_path / "pope" / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = AnalyzeConfig(
        model="embedded",
        data=tmp_path,
        image_root=folder / "images",
        benchmarks="pope",
        out=tmp_path / "out",
        device="cpu",
    )
    scored = read_scores(score_benchmarks(config)).to_pylist()
    assert [row["source"] for row in scored] == ["pope/coco/random"] * 8
    assert all(row["nll_seen"] for row in scored)
    written = [json.loads(line) for line in (tmp_path / "out" / "questions" / "data.jsonl").read_text().splitlines()]
    assert [row["conversations"][1]["value"] for row in written] == ["Yes", "No"] * 4
    assert written[0]["conversations"][0]["value"].startswith("<image>\nIs there a cup in the image?")


# ---------------------------------------------------------------- the command line


def test_the_command_writes_tables_and_figures(
    scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["analyze", "--scores", str(scores), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Gain by class of word" in printed
    names = {"gain-by-source", "gain-by-position", "gain-by-word-class"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{end}" for name in names for end in ("json", "svg")}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "--scores"),
        ({"scores": Path("s"), "model": "m", "data": Path("d")}, "--scores"),
        ({"model": "m"}, "--data"),
        ({"scores": Path("s"), "benchmarks": "pope"}, "--model"),
        ({"scores": Path("s"), "rows": 0}, "--rows"),
    ],
)
def test_what_to_do_must_be_clear(options: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        AnalyzeConfig(out=tmp_path, **options)


def test_a_changed_dataset_is_told(scores: Path, world: Path, tmp_path: Path) -> None:
    changed = json.loads(world.read_text())
    for row in changed:
        row["conversations"][1]["value"] += " Indeed."
    other = tmp_path / "data.json"
    other.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="changed since"):
        gain_tables(scores, open_dataset(other, world.parent))
