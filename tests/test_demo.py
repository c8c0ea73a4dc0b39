"""The demo from end to end on a tiny scale, and what it claims to have measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visgain.ablation.demo import ARMS, METRICS, run_demo, token_auroc
from visgain.config import DemoConfig
from visgain.errors import StorageError
from visgain.storage import read_selection_table


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(DemoConfig(out=out, rows=64, test_rows=40, steps=8))


def test_the_demo_trains_every_arm_for_equally_many_steps(demo: tuple[Path, dict]) -> None:
    arms = {arm["name"]: arm for arm in demo[1]["arms"]}
    assert set(arms) == {"aligned", *(arm.name for arm in ARMS)}
    assert {arms[arm.name]["steps"] for arm in ARMS} == {8}


def test_random_and_vig_train_on_equally_many_rows_and_tokens(demo: tuple[Path, dict]) -> None:
    out, _ = demo
    random, vig = (read_selection_table(out / f"selection-{name}") for name in ("random", "VIG"))
    assert len(random) == len(vig)
    assert sum(map(sum, random.column("keep").to_pylist())) == pytest.approx(
        sum(map(sum, vig.column("keep").to_pylist())), abs=len(vig)
    )


def test_demo_json_holds_every_number_of_the_table(demo: tuple[Path, dict]) -> None:
    out, result = demo
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))
    for arm in result["arms"]:
        assert all(0 <= arm["metrics"][metric["key"]] <= 1 for metric in METRICS)
    assert result["auroc"] == token_auroc(out / "scores", out / "world/train/truth.jsonl")
    assert set(result["seconds"]) == {"draw", "score", "select", "train", "evaluate"}


def test_the_report_shows_the_arms_and_the_roc_curve(demo: tuple[Path, dict]) -> None:
    html = (demo[0] / "report.html").read_text()
    assert all(arm.name in html for arm in ARMS)
    assert f"{demo[1]['auroc']:.3f}" in html


def test_the_demo_finds_the_tokens_that_need_the_picture(demo: tuple[Path, dict]) -> None:
    assert demo[1]["auroc"] > 0.8


def test_the_demo_resumes_and_refuses_another_size(demo: tuple[Path, dict]) -> None:
    out, result = demo
    with pytest.raises(StorageError, match="rows: 64 there, 65 now"):
        run_demo(DemoConfig(out=out, rows=65, test_rows=40, steps=8))
    again = run_demo(DemoConfig(out=out, rows=64, test_rows=40, steps=8))
    assert [arm["metrics"] for arm in again["arms"]] == [arm["metrics"] for arm in result["arms"]]
    assert again["auroc"] == result["auroc"]
