"""Tables of analyses and results of benchmarks in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_run import write_dataset, write_scores
from visgain.config import ReportConfig
from visgain.errors import DataError
from visgain.report.found import read_analyses, read_evaluations
from visgain.report.html import write_report
from visgain.tables import Line, Table, write_table

METRICS = {
    "benchmark": "pope",
    "variant": "official",
    "questions": 40,
    "unparsed": 2,
    "limited": True,
    "notes": {"release": "x"},
    "metrics": {
        "f1": {"value": 87.14, "low": 85.0, "high": 89.0},
        "precision": {"value": None, "low": None, "high": None},
    },
    "judge": None,
}


def table(*means: float) -> Table:
    lines = [Line(label=f"<{n}>", mean=mean, low=mean - 1, high=mean + 1, n=10, rows=5) for n, mean in enumerate(means)]
    return Table(name="gain-by-x", title="Gain by <x>", unit="nats", of="words", lines=lines)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_bars_lie_inside_of_the_plot(tmp_path_factory: pytest.TempPathFactory, means: list[float]) -> None:
    folder = tmp_path_factory.mktemp("bars")
    write_table(folder, table(*means))
    [found] = read_analyses(folder)
    assert len(found.bars) + found.n_hidden == len(means)
    for bar, mean in zip(found.bars, means, strict=False):
        assert bar.low is not None
        assert bar.high is not None
        assert -0.02 <= bar.left <= bar.left + bar.width <= 100.02
        assert -0.02 <= bar.low <= bar.high <= 100.02
        end = bar.left if mean < 0 else bar.left + bar.width
        assert bar.low - 0.02 <= end <= bar.high + 0.02
        assert abs((bar.left + bar.width if mean < 0 else bar.left) - found.zero) < 0.05


def test_the_report_shows_both(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", write_dataset(tmp_path / "data"))
    write_table(tmp_path / "analyses", table(2.0, -1.0))
    (tmp_path / "evals" / "pope").mkdir(parents=True)
    (tmp_path / "evals" / "pope" / "metrics.json").write_text(json.dumps(METRICS))
    out = tmp_path / "report.html"
    write_report(
        ReportConfig(
            scores=tmp_path / "scores", out=out, samples=0, evals=tmp_path / "evals", analyses=tmp_path / "analyses"
        )
    )
    page = out.read_text()
    assert "Gain by &lt;x&gt;" in page
    assert "87.14" in page
    assert "85.00 to 89.00" in page
    assert "undefined" in page
    assert "the first ones only" in page


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="visgain analyze"):
        read_analyses(tmp_path)
    with pytest.raises(DataError, match="visgain eval"):
        read_evaluations(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"lines": [{"label": "a"}]}', '{"lines": 3}'])
def test_a_damaged_table_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    (tmp_path / "t.svg").write_text("<svg/>")
    with pytest.raises(DataError, match=r"t\.json"):
        read_analyses(tmp_path)


@pytest.mark.parametrize("change", [{"metrics": 3}, {"questions": "x"}, {"metrics": {"f1": {"value": "x"}}}])
def test_a_damaged_result_is_named(tmp_path: Path, change: dict) -> None:
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "metrics.json").write_text(json.dumps({**METRICS, **change}))
    with pytest.raises(DataError, match=r"metrics\.json"):
        read_evaluations(tmp_path)
