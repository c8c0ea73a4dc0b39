"""The HTML report: self-contained, escaped, deterministic, and right in its numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_run import EVIL, records, token_spans, write_dataset, write_scores, write_selection
from tiny_scores import mixed_records, patient
from visgain import spill, storage
from visgain.analysis import words
from visgain.config import ReportConfig, SelectConfig
from visgain.errors import DataError, StorageError
from visgain.report import figures, samples
from visgain.report.counts import count_rows, kept_by_source, summary
from visgain.report.html import compact, duration, percent, write_report
from visgain.report.overview import Rows, open_overview
from visgain.report.results import format_metric, read_results
from visgain.report.shade import colour_limit, strength
from visgain.scored import RowTokens, read_masks, read_rows
from visgain.selection import run_select
from visgain.types import Skipped, TokenScores

VOID = {"meta", "link", "img", "br", "path", "rect", "line"}


class Balance(HTMLParser):
    """Checks that tags nest, and collects the text and the attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path):
    data = write_dataset(tmp_path / "data")
    scored = write_scores(tmp_path / "scores", data)
    gains = [row.mean_gain for row in scored if len(row.nll_seen)]
    write_selection(tmp_path / "selection", scored, tau=float(np.quantile(gains, 0.3)))
    return tmp_path


def report(folder, name="report.html", **options):
    return write_report(ReportConfig(scores=folder / "scores", out=folder / name, **options))


def parsed(path):
    parser = Balance()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def text_of(path):
    return re.sub(r"\s+", " ", "".join(parsed(path).text))


# ---------------------------------------------------------------- the page


def test_the_report_needs_nothing_beside_it_and_escapes_the_dataset(run):
    html = report(run, selection=run / "selection").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\s\"'<]*", html) == []
    assert "<script>alert" not in html
    assert "<b>Q</b>" not in html
    assert "tiny &lt;model&gt;" in html
    page = parsed(run / "report.html")
    loads = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert all(value.startswith("data:") for value in loads)
    assert sum(value.startswith("data:image/") for value in loads) >= 20


def test_every_character_of_an_answer_is_shown(run):
    shown = text_of(report(run))
    for answer in ("A red ball on the grass.⏎", EVIL + "⏎", "Yes⏎"):
        assert answer in shown
    assert "[image 1] [image 2] Compare [bold]them[/bold]." in shown


def test_the_same_input_gives_the_same_bytes(run):
    options = {"selection": run / "selection"}
    assert report(run, "a.html", **options).read_bytes() == report(run, "b.html", **options).read_bytes()


def test_tau_is_drawn_and_dropped_tokens_are_marked_only_with_a_selection(run):
    tau = json.loads((run / "selection" / "selection.json").read_text())["tau"]
    with_selection = report(run, selection=run / "selection").read_text(encoding="utf-8")
    assert f"τ = {samples.signed(tau)}" in with_selection
    assert "(no loss)" in with_selection
    assert "not kept" in with_selection
    without = report(run).read_text(encoding="utf-8")
    assert "τ" not in without
    assert "(no loss)" not in without


def test_skipped_rows_are_reported_with_their_reason(run):
    assert "image coco/gone.png does not exist (row 11)" in text_of(report(run))


def test_a_dataset_that_is_gone_costs_words_and_samples_and_is_said(run):
    (run / "data").rename(run / "moved")
    shown = text_of(report(run))
    assert "--data" in shown
    assert "Gain by source" in shown
    assert "Highest gain" not in shown
    assert "Highest gain" in text_of(report(run, data=run / "moved" / "data.json"))
    with pytest.raises(DataError, match="--data"):
        report(run, data=run / "nowhere.json")


def test_a_picture_that_is_gone_is_said_in_its_place(run):
    (run / "data" / "coco" / "0.png").unlink()
    assert "This picture cannot be shown" in text_of(report(run))


def test_a_changed_dataset_is_refused(run):
    rows = records()
    rows[2]["conversations"][1]["value"] += " Really."
    (run / "data" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"changed since it was scored \(row 2\)"):
        report(run)
    (run / "data" / "data.json").write_text(json.dumps(records()[:2]))
    with pytest.raises(DataError, match="changed since it was scored"):
        report(run)


def test_a_selection_of_other_scores_is_refused(run, tmp_path):
    other = write_scores(tmp_path / "other", run / "data" / "data.json")
    foreign = [row for row in other if row.row != 3]
    object.__setattr__(foreign[0], "fingerprint", 77)
    write_selection(tmp_path / "foreign", foreign, tau=-9.0)
    with pytest.raises(DataError, match=r"not made from these scores \(row 0\)"):
        report(run, selection=tmp_path / "foreign")


def test_a_gain_that_is_not_finite_is_refused(run):
    path = storage.part_path(run / "scores", 0, 2)
    table = pq.read_table(path)
    gain = [float("nan"), *table.column("gain").to_pylist()[1:]]
    storage.write_part(run / "scores", 0, 2, table.set_column(9, storage.SCORE_SCHEMA.field("gain"), pa.array(gain)))
    with pytest.raises(StorageError, match="row 0"):
        report(run)


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(StorageError, match="scores"):
        report(tmp_path)


@pytest.mark.parametrize("counterfactual", ["swap", "noise", "none"])
def test_every_kind_of_counterfactual_can_be_drawn_again(tmp_path, counterfactual):
    data = write_dataset(tmp_path / "data")
    write_scores(tmp_path / "scores", data, counterfactual)
    first = report(tmp_path, "a.html", samples=4).read_bytes()
    assert first.count(b"<figcaption>blind") >= 3
    assert first == report(tmp_path, "b.html", samples=4).read_bytes()


@pytest.mark.parametrize(("condition", "told"), [("drop", "left out"), ("mask", "cut attention")])
def test_a_condition_without_another_picture_shows_none_and_says_what_became_of_the_real_one(tmp_path, condition, told):
    data = write_dataset(tmp_path / "data")
    write_scores(tmp_path / "scores", data, condition)
    page = report(tmp_path, samples=4)
    assert b"<figcaption>seen" in page.read_bytes()
    assert b"blind</figcaption>" not in page.read_bytes()
    assert f"the blind condition {told}" in text_of(page)


def test_soft_weights_are_told_with_what_an_active_token_weighs(tmp_path):
    write_scores(tmp_path / "scores", write_dataset(tmp_path / "data"))
    for weights in ("hard", "clamp:low=0.01,high=0.5"):
        out = tmp_path / weights
        record = run_select(SelectConfig(scores=tmp_path / "scores", out=out, weights=weights))
        text = text_of(report(tmp_path, f"{weights[:4]}.html", selection=out))
        assert ("Its loss weighs as" in text) == (weights != "hard")
    mean = record["totals"]["weight"] / record["totals"]["active_tokens"]
    assert f"weighs as clamp:low=0.01,high=0.5,window=3 says, {mean:.3f} on average" in text


def test_each_of_several_pictures_says_what_the_answer_gains_by_it(run, tmp_path):
    write_scores(tmp_path / "each" / "scores", run / "data" / "data.json", per_image=True)
    shown = text_of(report(tmp_path / "each"))
    assert "1 +0.101 blind 2 +0.202 blind" in shown
    assert " 1 +0.10" not in shown.replace("1 +0.101 blind", ""), "of one picture its sample's gain is enough"
    assert "gains by it alone" in shown
    assert "gains by it alone" not in text_of(report(run))
    assert "1 blind" in text_of(report(run))


def test_no_samples_asked_none_shown(run):
    assert "Highest gain" not in text_of(report(run, samples=0))


def test_truth_beside_the_dataset_draws_the_roc_curve(run):
    assert "area under the curve" not in text_of(report(run))
    lines = []
    for row, record in enumerate(records()):
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        spans = [[list(match.span()) for match in re.finditer("red|blue|green", answer)] for answer in answers]
        lines.append(json.dumps({"row": row, "answers": spans}))
    (run / "data" / "truth.jsonl").write_text("\n".join(lines))
    assert "area under the curve" in text_of(report(run))
    with pytest.raises(DataError, match="elsewhere"):
        report(run, truth=run / "elsewhere.jsonl")


def test_truth_without_any_visual_token_is_refused_only_when_asked_for(run):
    path = run / "data" / "truth.jsonl"
    path.write_text("\n".join(json.dumps({"row": row, "answers": [[]]}) for row in range(8)))
    assert "area under the curve" not in text_of(report(run))
    with pytest.raises(DataError, match="--truth"):
        report(run, truth=path)


# ---------------------------------------------------------------- results of a demo


def test_the_best_cell_of_each_column_is_marked_whichever_arm_it_is(tmp_path):
    path = tmp_path / "demo.json"
    arms = [
        {"name": "aligned", "metrics": {"a": 0.5, "h": 0.1}, "active_tokens": 0},
        {"name": "all", "metrics": {"a": 0.7004, "h": 0.3}, "active_tokens": 90},
        {"name": "gain", "metrics": {"a": 0.7001, "h": None}, "active_tokens": 60, "rows": 7},
    ]
    metrics = [
        {"key": "a", "label": "accuracy", "better": "higher", "format": ".1%"},
        {"key": "h", "label": "hallucinated", "better": "lower"},
    ]
    path.write_text(json.dumps({"arms": arms, "metrics": metrics}))
    results = read_results(path)
    assert [[cell.best for cell in arm.cells] for arm in results.arms] == [[False, True], [True, False], [True, False]]
    assert [cell.text for cell in results.arms[2].cells] == ["70.0%", "–"]
    assert results.arms[2].active_share == pytest.approx(2 / 3)
    assert results.has("rows")
    assert not results.has("steps")


def test_results_appear_in_the_report_and_tolerate_missing_keys(run):
    path = run / "demo.json"
    path.write_text(json.dumps({"arms": [{"name": "<i>arm</i>", "metrics": {"acc": 0.25}}]}))
    shown = text_of(report(run, results=path))
    assert "<i>arm</i>" in shown
    assert "0.25" in shown


@pytest.mark.parametrize("content", ["[]", '{"arms": [{}]}', '{"arms": 3}'])
def test_results_of_another_shape_are_refused(tmp_path, content):
    path = tmp_path / "demo.json"
    path.write_text(content)
    with pytest.raises(DataError, match="--results"):
        read_results(path)


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.1234, ".1%", "12.3%"),
        (0.1234, "{:.2f}", "0.12"),
        (0.5, "percent", "50.0%"),
        (-1.5, ".1f", "−1.5"),
        (12.0, ",d", "12"),
        (0.123456, "99999999f", "0.123"),
        (None, ".1f", "–"),
    ],
)
def test_metric_formats(value, spec, text):
    assert format_metric(value, spec) == text


# ---------------------------------------------------------------- counts


@pytest.fixture
def small_windows(monkeypatch):
    """So small that even a few rows fill several windows, batches and flushes."""
    monkeypatch.setattr(spill, "WINDOW_ROWS", 5)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 300)
    monkeypatch.setattr(storage, "_CHUNK_ROWS", 3)


@pytest.mark.usefixtures("small_windows")
def test_counts_add_up(run):
    with open_overview(run / "scores", run / "selection", run) as overview:
        counts = count_rows(overview)
        head = summary(counts, overview)
        total, *sources = kept_by_source(counts, overview.sources)
    assert (head.n_rows, head.n_scored, head.n_text, head.n_skipped) == (12, 10, 1, 1)
    kept = storage.read_selection(run / "selection")
    assert (head.kept_rows, head.kept_tokens) == (len(kept.rows), sum(int(mask.sum()) for mask in kept.keep))
    for name in ("rows_before", "rows_after", "tokens_before", "tokens_after"):
        assert getattr(total, name) == sum(getattr(source, name) for source in sources)
    assert (total.rows_after, total.tokens_after) == (head.kept_rows, head.kept_tokens)
    text = next(source for source in sources if source.text_only)
    assert (text.rows_after, text.tokens_after) == (text.rows_before, text.tokens_before)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("n_parts", [1, 3, 15])
def test_an_overview_is_every_row_in_order_whatever_the_parts_and_the_order_of_the_selection(tmp_path, n_parts):
    rng = np.random.default_rng(n_parts)
    records = mixed_records()
    storage.claim_run(tmp_path, {}, {"n_parts": n_parts})
    part = rng.integers(n_parts, size=len(records))
    for index in range(n_parts):
        rows = [record for record, where in zip(records, part, strict=True) if where == index]
        storage.write_part(tmp_path, index, n_parts, storage.score_table(rows))
    keep = {
        record.row: rng.random(len(record.token_id)) < 0.5
        for record in rng.permutation(np.array(records, dtype=object))
        if isinstance(record, TokenScores) and rng.random() < 0.6
    }
    chosen = [{**vars(records[row]), "keep": mask} for row, mask in keep.items()]
    table = pa.Table.from_pylist(chosen, schema=storage.SELECTION_SCHEMA)
    storage.write_selection(tmp_path / "selection", [table], {"rule": "sample+token"})
    with open_overview(tmp_path, tmp_path / "selection", tmp_path) as overview:
        windows = list(overview.windows())
        rows = [row for window in windows for row in window.row.tolist()]
        gains = {overview.sources[key]: overview.gains.read(key).column("gain").to_pylist() for key in overview.gains}
        measured = [record.row for record in records if isinstance(record, TokenScores) and record.n_images]
        assert overview.scored_at(np.array([0, 7, 8, 30])).tolist() == [measured[k] for k in (0, 7, 8, 30)]
        assert list(overview.scored_after(17)) == [r for r in measured if r > 17] + [r for r in measured if r <= 17]
    assert rows == list(range(len(records)))
    assert len(windows) == 12
    for record, window, at in ((records[row], windows[row // 5], row % 5) for row in rows):
        is_skipped = isinstance(record, Skipped)
        assert window.fingerprint[at] == record.fingerprint
        assert overview.sources[window.source[at]] == record.source
        assert window.reason[at] == (record.reason if is_skipped else "")
        assert (window.skipped[at], window.scored[at]) == (is_skipped, not is_skipped and record.n_images > 0)
        assert window.n_tokens[at] == (0 if is_skipped else len(record.token_id))
        assert window.active[at] == keep.get(record.row, np.zeros(0)).sum()
        assert not window.scored[at] or window.gain[at] == record.mean_gain
    for source in ("coco", "gqa"):
        assert gains[source] == [records[row].mean_gain for row in measured if records[row].source == source]


@pytest.mark.parametrize("rows", [[5], [12], [70_000], [3, 70_000]])
def test_a_selected_row_that_was_not_scored_is_refused(run, rows):
    token = {"id": "x", "fingerprint": 1, "token_id": [1], "keep": [True]}
    table = pa.Table.from_pylist([{**token, "row": row} for row in rows], schema=storage.SELECTION_SCHEMA)
    storage.write_selection(run / "foreign", [table], {"rule": "sample+token", "tau": 0.0, "token_tau": 0.0})
    with pytest.raises(DataError, match=rf"not made from these scores \(row {rows[0]}\)"):
        report(run, selection=run / "foreign")


def test_which_rows_lie_in_which_part_changes_no_byte(run, request):
    expected = report(run, selection=run / "selection", samples=7).read_bytes()
    rows = storage.read_scores(run / "scores").to_pylist()
    for path in (run / "scores").glob("part-*"):
        path.unlink()
    record = storage.read_json(run / "scores" / "run.json", "run")
    storage.write_json(run / "scores" / "run.json", {**record, "n_parts": 4})
    for index in range(4):
        own = [row for k, row in enumerate(rows) if k * 7 % 5 % 4 == index]
        storage.write_part(run / "scores", index, 4, pa.Table.from_pylist(own, schema=storage.SCORE_SCHEMA))
    request.getfixturevalue("small_windows")
    assert report(run, selection=run / "selection", samples=7).read_bytes() == expected


@pytest.mark.usefixtures("small_windows")
def test_chosen_rows_and_masks_are_found_in_whatever_part_or_row_group(tmp_path):
    records = mixed_records()
    part = np.random.default_rng(0).integers(3, size=len(records))
    storage.claim_run(tmp_path, {}, {"n_parts": 4})  # of which one is missing
    for index in range(3):
        rows = [record for record, where in zip(records, part, strict=True) if where == index]
        storage.write_part(tmp_path, index, 4, storage.score_table(rows))
    wanted = [0, 3, 7, 31, 59, 60, -1]
    found = read_rows(tmp_path, np.array(wanted), ["row", "id", "nll_seen"])
    expected = storage.score_table([records[row] for row in wanted[:5]]).select(["row", "id", "nll_seen"])
    assert found.to_pylist() == expected.to_pylist()
    assert len(read_rows(tmp_path, np.array([99]))) == 0

    everything = {"id": "x", "fingerprint": 0, "token_id": [1, 2, 3]}
    kept = [{**everything, "row": row, "keep": [row % 2 == 0, True, False]} for row in range(0, 40, 3)]
    tables = [pa.Table.from_pylist(kept[k : k + 4], schema=storage.SELECTION_SCHEMA) for k in range(0, 14, 4)]
    storage.write_selection(tmp_path, tables, {})
    masks = read_masks(tmp_path, np.array([3, 4, 36, 77]))
    assert {row: mask.tolist() for row, mask in masks.items()} == {3: [False, True, False], 36: [True, True, False]}


def test_mean_gain_per_token_weighs_samples_by_length(tmp_path):
    scored = write_scores(tmp_path / "scores", write_dataset(tmp_path / "data"))
    with open_overview(tmp_path / "scores", None, tmp_path) as overview:
        head = summary(count_rows(overview), overview)
    gains = [row.gain for row in scored if len(row.nll_seen)]
    assert head.token_gain == pytest.approx(np.concatenate(gains).mean(), abs=1e-6)
    assert head.sample_gain == pytest.approx(np.mean([gain.mean() for gain in gains]), abs=1e-6)


# ---------------------------------------------------------------- words


def naive_words(text, spans, gains):
    """Every maximal run of ink without the signs at its ends, with the gains of all tokens that share a letter."""
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        while start < end and not (text[start].isalnum() or text[start] == "_"):
            start += 1
        while end > start and not (text[end - 1].isalnum() or text[end - 1] == "_"):
            end -= 1
        if start < end:
            own = [gain for (s, e), gain in zip(spans, gains, strict=True) if s < end and e > start]
            yield text[start:end].lower(), sum(own)


@given(st.text(alphabet="abC 9.,-_'\n", max_size=30))
def test_word_gains_equal_the_naive_sums(text):
    spans = token_spans(text)
    gains = np.arange(1, len(spans) + 1, dtype=np.float32)
    chars = np.array(spans, dtype=np.int32)
    assert list(words.word_gains(text, chars, gains)) == list(naive_words(text, spans, gains.tolist()))


def test_words_beyond_the_cut_are_left_out():
    chars = np.array([[0, 3], [3, 6]], dtype=np.int32)
    assert list(words.word_gains("red balloon", chars, np.array([1, 2], dtype=np.float32))) == [("red", 1.0)]


def test_token_gains_name_the_end_of_turn_and_show_blanks():
    chars = np.array([[0, 3], [3, 4], [4, 8], [6, 6], [8, 8]], dtype=np.int32)
    gains = np.ones(5, dtype=np.float32)
    labels = [label for label, _ in words.token_gains("red\n box", chars, gains)]
    assert labels == ["red", "↵", "box", words.END_OF_TURN]


def test_tally_counts_means_and_applies_the_threshold():
    tally = words.Tally()
    tally.add([("a", 1.0), ("b", -2.0), ("a", 3.0), ("c", 9.0)])
    assert [(item.label, item.mean, item.count) for item in tally.means(2)] == [("a", 2.0, 2)]
    assert [item.label for item in tally.means(1)] == ["c", "a", "b"]
    assert words.min_count(10) == 1 < words.min_count(20_000) == 11


@given(st.integers(0, 9), st.integers(1, 6))
def test_extremes_never_show_a_label_twice(n_labels, count):
    means = [words.Mean(label=str(k), mean=-float(k), count=1) for k in range(n_labels)]
    highest, lowest = words.extremes(means, count)
    labels = [item.label for item in (*highest, *lowest)]
    assert len(labels) == len(set(labels)) == min(n_labels, 2 * count)
    assert highest == means[: len(highest)]


# ---------------------------------------------------------------- answers in pieces


@given(
    st.text(alphabet="ab \n🎈", max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
def test_pieces_spell_the_answer_whatever_the_spans(text, pairs):
    spans = sorted((min(s, e, len(text)), min(max(s, e), len(text))) for s, e in pairs)
    n = len(spans)
    tokens = RowTokens(
        row=0,
        fingerprint=0,
        truncated=False,
        turn=np.zeros(n, dtype=np.int32),
        chars=np.array(spans, dtype=np.int32).reshape(-1, 2),
        seen=np.zeros(n, dtype=np.float32),
        blind=np.ones(n, dtype=np.float32),
    )
    pieces = list(samples.answer_pieces(text, tokens, 0, None, 1.0))
    spelled = [
        piece.lead + (piece.text if piece.kind in ("gap", "token") or not piece.text.strip() else "") + piece.tail
        for piece in pieces
    ]
    assert "".join(spelled) == text
    assert sum(piece.kind != "gap" for piece in pieces) == n


# ---------------------------------------------------------------- choosing and drawing


@patient
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5) | st.just(float("nan"))), max_size=40),
    st.integers(0, 30),
)
def test_choice_of_samples_is_as_many_as_asked_and_none_twice(rows, count):
    source = np.array(["abc".index(name) for name, _ in rows], dtype=np.int32)
    gain = np.array([value for _, value in rows], dtype=np.float64)
    chosen = [row for group in choose(gain, source, count) for row in group.chosen]
    assert len(chosen) == len(set(chosen)) == min(count, int((~np.isnan(gain)).sum()))
    assert not np.isnan(gain[chosen]).any()


@patient
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("nan")]) | st.floats(-5, 5)),
        max_size=60,
    ),
    st.integers(1, 12),
    st.integers(1, 20),
)
def test_the_shortlist_holds_every_row_that_would_be_chosen_of_all(rows, count, per_window):
    source = np.array([number for number, _ in rows], dtype=np.int32)
    gain = np.array([value for _, value in rows], dtype=np.float64)
    assert choose(gain, source, count, per_window) == choose(gain, source, count, unpruned=True)


def rows_of(first, gain, source):
    """Rows from `first` on of which nothing but gain and source matters."""
    zeros = np.zeros(len(gain), np.int64)
    return Rows(
        row=first + np.arange(len(gain)),
        fingerprint=zeros,
        source=source.astype(np.int32),
        reason=np.array([""] * len(gain), dtype=object),
        gain=gain,
        n_tokens=zeros,
        truncated=zeros.astype(bool),
        active=zeros,
    )


def choose(gain, source, count, per_window=1000, unpruned=False):
    """The groups that samples.choose makes of these rows, added some at a time; the middle is a gain of 0.5."""
    scored = ~np.isnan(gain)
    medians = np.array(
        [np.median(gain[scored & (source == k)]) if (scored & (source == k)).any() else 9.0 for k in range(3)]
    )
    shortlist = samples.Shortlist(len(gain) if unpruned else count, 0.5, medians)
    for start in range(0, len(gain), per_window):
        here = slice(start, start + per_window)
        shortlist.add(rows_of(start, gain[here], source[here]))
    shortlist.count = count
    sizes = np.bincount(source[scored], minlength=3)
    return samples.choose(shortlist, ["b", "c", "a"], sizes, "tau")


def test_the_ends_are_not_all_of_one_source():
    source = np.repeat(np.arange(3, dtype=np.int32), 50)
    gain = np.concatenate([np.linspace(5, 9, 50), np.linspace(0, 1, 50), np.linspace(-1, 0, 50)])
    highest = choose(gain, source, 24)[0]
    assert len({source[row] for row in highest.chosen}) == 3
    assert gain[highest.chosen[0]] == 9


def test_the_shortlist_stays_short():
    gain = np.random.default_rng(0).normal(size=5000)
    shortlist = samples.Shortlist(6, 0.0, np.zeros(3))
    for start in range(0, 5000, 500):
        shortlist.add(rows_of(start, gain[start : start + 500], np.arange(500) % 3))
        assert len(shortlist.row) <= 3 * 4 * 6


def group_of(label, gains):
    return figures.Group(label=label, gains=np.array_split(gains, 3), n=len(gains))


def test_a_ridge_is_that_of_all_its_gains_together():
    gains = np.random.default_rng(1).normal(0.3, 1, 1000)
    axis = figures.make_axis([gains])
    assert (axis.low < np.quantile(gains, 0.0025), axis.high > np.quantile(gains, 0.9975)) == (True, True)
    whole, cut = (
        figures.ridge(figures.Group(label="x", gains=np.split(gains, cuts), n=1000), axis, 0.5)
        for cuts in ([], [1, 600])
    )
    assert whole == cut
    assert whole.mean == pytest.approx(gains.mean(), abs=1e-12)
    assert (whole.median, whole.share_above) == (np.median(gains), (gains >= 0.5).mean())
    assert axis.beyond([gains[:10], gains[10:]]) == ((gains < axis.low) | (gains > axis.high)).mean()
    naive = np.histogram(gains, figures.BINS, (axis.low, axis.high))[0]
    weights = figures._kernel(group_of("x", gains), float(gains.mean()), (axis.high - axis.low) / figures.BINS)
    q1, q3 = np.quantile(gains, [0.25, 0.75])
    width = 0.9 * min(gains.std(), (q3 - q1) / 1.34) * 1000**-0.2 / ((axis.high - axis.low) / figures.BINS)
    offsets = np.arange(len(weights)) - len(weights) // 2
    expected = np.exp(-0.5 * (offsets / width) ** 2)
    assert weights == pytest.approx(expected / expected.sum())
    heights = np.convolve(naive, weights, mode="same")
    drawn = [float(y) for path in (cut.below, cut.above) for y in re.findall(r" ([0-9.]+)(?=L)", path)]
    assert min(drawn) == pytest.approx(100 - 96 * heights.max() / heights.max(), abs=0.06)


def test_wide_runs_of_sources_are_merged_and_few_samples_are_drawn_one_by_one():
    rng = np.random.default_rng(0)
    groups = [group_of(f"s{k}", rng.normal(k / 10, 1, 30 + k)) for k in range(40)]
    groups.append(group_of("tiny", np.array([0.5, 1.5])))
    axis = figures.make_axis(figures.together("all", groups).gains)
    drawn = figures.ridges(groups, axis, 0.25, most=10)
    assert drawn[0].whole
    assert len(drawn) == 11
    assert sum(ridge.n for ridge in drawn[1:]) == drawn[0].n
    tiny = figures.ridge(groups[-1], axis, 1.0)
    assert (tiny.below, tiny.above, len(tiny.rug), tiny.share_above) == ("", "", 2, 0.5)


@pytest.mark.parametrize("gains", [np.zeros(50), np.full(50, 3.0), np.array([1e-9]), np.array([-1e6, 1e6] * 20)])
def test_degenerate_gains_can_be_drawn(gains):
    axis = figures.make_axis([gains])
    ridge = figures.ridge(group_of("x", gains), axis, 0.0)
    assert "nan" not in ridge.below + ridge.above
    assert 0 <= axis.at(ridge.median) <= 100
    assert len(axis.ticks) >= 2


def test_axis_shows_zero_and_tau():
    axis = figures.make_axis([np.linspace(5, 6, 100)], include=(0.0, 9.0))
    assert axis.low < 0 < 9 < axis.high
    assert "0" in [tick.label for tick in axis.ticks]


def test_colour_strength_is_symmetric_and_faint_gains_stay_uncoloured():
    assert strength(1.0, 2.0) == -strength(-1.0, 2.0) == 0.5
    assert strength(9.0, 2.0) == 1.0
    assert strength(0.01, 2.0) == 0.0
    assert colour_limit(np.zeros(0, dtype=np.float32)) == 0.5
    assert colour_limit(np.full(9, -2.2, dtype=np.float32)) == 2.5


def test_numbers_as_people_read_them():
    assert [percent(share) for share in (0.0, 0.042, 0.42, 0.974, 1.0)] == ["0%", "4.2%", "42%", "97.4%", "100%"]
    assert [compact(value) for value in (999_999, 58_610_000, 999_999_999)] == ["999,999", "58.6M", "999,999,999"]
    assert [duration(s) for s in (0.25, 59.2, 80, 3600, 7500)] == ["0.25 s", "59.2 s", "1 min 20 s", "1 h", "2 h 5 min"]
    assert [samples.signed(value) for value in (-0.001, 1.5, -2.0)] == ["0.00", "+1.50", "−2.00"]
