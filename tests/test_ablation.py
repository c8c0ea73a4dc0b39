"""Ablations: the grid, the statistics, cells that resume, and a whole study on a tiny scale."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import tiny_run
from visgain.ablation import run as ablation_run
from visgain.ablation import trial
from visgain.ablation.arms import DEFAULT, KINDS, parse_arms
from visgain.ablation.bench import scores_name, steps_of
from visgain.ablation.figure import TOP, draw, panels
from visgain.ablation.metrics import WORLD, numbers, written
from visgain.ablation.on_data import divide, held_out_metrics, without_rows, write_tested
from visgain.ablation.result import Ablation, summarise
from visgain.ablation.run import run_ablation
from visgain.ablation.statistics import interval, paired, t_quantile
from visgain.ablation.table import as_markdown, grids, print_ablation
from visgain.config import AblateConfig, ReportConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError, DataError, StorageError
from visgain.report.found import read_ablation
from visgain.report.html import write_report
from visgain.scoring.claims import claim_named
from visgain.storage import read_scores
from visgain.training.recipe import load_recipe
from visgain.types import Sample

# ---------------------------------------------------------------- arms


def test_an_arm_is_read_from_its_name() -> None:
    vanilla, vig, usual, soft, pvi, cal = parse_arms("vanilla, vig@30,vig , soft@100,pvi@50,cal")
    assert (vanilla.name, vanilla.by, vanilla.keep, vanilla.weights) == ("vanilla", "sample", 100, "hard")
    assert (vig.name, vig.by, vig.keep, vig.counterfactual) == ("vig@30", "sample+token", 30, None)
    assert (usual.name, usual.keep) == ("vig@70", 70)
    assert (soft.by, soft.keep, soft.weights, soft.counterfactual) == ("sample", 100, "clamp", None)
    assert (pvi.by, pvi.keep, pvi.weights, pvi.counterfactual) == ("sample+token", 50, "hard", "drop")
    assert (cal.by, cal.keep, cal.weights, cal.counterfactual) == ("sample", 100, "clamp", "mask")


def test_the_usual_grid_has_every_kind_once_or_at_every_share() -> None:
    arms = parse_arms(DEFAULT)
    assert {arm.kind for arm in arms} == set(KINDS)
    assert sorted(arm.keep for arm in arms if arm.kind == "vig") == [30, 50, 70, 90]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vanila", "--arms: unknown arm 'vanila'; did you mean 'vanilla'"),
        ("vig@", "'vig@': what follows @ is a percentage to keep, above 0 and at most 100"),
        ("vig@0", "'vig@0': what follows @"),
        ("vig@101", "'vig@101': what follows @"),
        ("vig@nan", "'vig@nan': what follows @"),
        ("vanilla@50", "'vanilla@50': vanilla takes no percentage"),
        ("vig,vig@70", "--arms names vig@70 twice"),
        (" , ", "--arms names none"),
    ],
)
def test_a_wrong_grid_is_told(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_arms(spec)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "0,x"}, "--seeds is '0,x'; it must be whole numbers from 0 on"),
        ({"seeds": "0,-1"}, "--seeds is '0,-1'"),
        ({"seeds": ""}, "--seeds is ''"),
        ({"seeds": "1,1"}, "--seeds names a seed twice"),
        ({"steps": 9, "equal": "epochs"}, "--steps does not go with --equal epochs"),
        ({"eval_data": Path("x")}, "--eval-data and --image-root go with --data"),
        ({"benchmarks": "pope"}, "--benchmarks and --benchmark-data go together"),
    ],
)
def test_options_that_do_not_fit_are_told(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        AblateConfig(out=tmp_path, **options)
    assert message in str(error.value)


def test_a_grid_that_must_fail_fails_before_anything_is_begun(tmp_path: Path) -> None:
    for options, message in (
        ({"counterfactual": "blurr"}, "blurr"),
        ({"recipe": "embeded-tune"}, "embeded-tune"),
        ({"benchmarks": "mmvet", "benchmark_data": tmp_path}, "mmvet is graded by a judge"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_ablation(AblateConfig(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- statistics

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 19: 2.093, 30: 2.042, 120: 1.980}
"""Printed tables of Student's t, 97.5 %."""
T_995 = {1: 63.657, 2: 9.925, 3: 5.841, 10: 3.169, 30: 2.750}


def test_quantiles_of_t_are_those_of_the_printed_tables() -> None:
    for p, table in ((0.975, T_975), (0.995, T_995)):
        for dof, value in table.items():
            assert t_quantile(p, dof) == pytest.approx(value, abs=6e-4), dof


def test_an_interval_is_students() -> None:
    values = [93.4, 95.3, 94.1]
    found = interval(values)
    half = 4.303 * np.std(values, ddof=1) / math.sqrt(3)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=1e-3)
    assert found.n == 3


def test_intervals_over_three_seeds_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = [
        found.low <= 5.0 <= found.high
        for found in (interval(rng.normal(5.0, 2.0, 3).tolist()) for _ in range(4000))
        if found.low is not None and found.high is not None
    ]
    assert len(held) == 4000
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_one_seed_claims_no_interval() -> None:
    found = interval([1.5])
    assert (found.mean, found.low, found.high, found.half, found.n) == (1.5, None, None, None, 1)
    assert not found.excludes_zero


def test_paired_differences_forget_what_a_seed_does_to_all_arms() -> None:
    vanilla = {0: 10.0, 1: 50.0, 2: 90.0}
    arm = {0: 11.0, 1: 51.5, 2: 92.0, 3: 7.0}
    difference = paired(arm, vanilla)
    assert difference is not None
    assert (difference.mean, difference.n) == (1.5, 3)
    assert difference.half == pytest.approx(4.303 * 0.5 / math.sqrt(3), abs=1e-3)
    assert difference.excludes_zero
    assert paired({7: 1.0}, vanilla) is None


# ---------------------------------------------------------------- results


def cell(name: str, seed: int, accuracy: float, tokens: int = 100) -> dict[str, Any]:
    kind = name.partition("@")[0]
    metrics = {metric["key"]: accuracy for metric in WORLD} | {"true_yes_rate": 0.5, "accuracy_by_topic": {"size": 1.0}}
    counts = {"rows": 10, "active_tokens": tokens, "steps": 5, "train_seconds": 2.0}
    return {"name": name, "seed": seed, "arm": {"kind": kind, "keep": 70.0}, "metrics": metrics, **counts}


def invented(seeds: tuple[int, ...] = (0, 1, 2)) -> Ablation:
    cells = [cell("vanilla", seed, 0.5 + 0.1 * seed, 1000) for seed in seeds]
    cells += [cell("vig@70", seed, 0.52 + 0.1 * seed, 400 + seed) for seed in seeds]
    cells += [cell("vig@30", seed, 0.4 + 0.1 * seed, 100) for seed in seeds[:1]]
    arms = ["vanilla", "vig@70", "vig@30"]
    return summarise(cells, arms=arms, seeds=seeds, metrics=WORLD, study={}, failures={"seed 1, vig@30": "no\nroom"})


def test_a_result_has_means_and_differences_from_vanilla_at_the_same_seed() -> None:
    vanilla, vig, few = invented().arms
    assert vanilla.metrics["accuracy"].mean == pytest.approx(0.6)
    assert vanilla.versus == {}
    assert vig.versus["accuracy"].mean == pytest.approx(0.02)
    assert vig.versus["accuracy"].half == pytest.approx(0.0, abs=1e-12)
    assert vig.counts["active_tokens"] == 401
    assert vig.metrics["accuracy_by_topic.size"].mean == 1.0
    assert (few.n, few.metrics["accuracy"].low) == (1, None)
    assert few.versus["accuracy"].mean == pytest.approx(-0.1)


def test_the_table_shows_intervals_where_there_are_some_and_what_is_missing() -> None:
    text = as_markdown(invented())
    half = 4.303 * 10 / math.sqrt(3)
    assert f"| vanilla | 60.0 ± {half:.1f} |" in text
    assert "| vig@30 | 40.0 |" in text
    assert "| vig@30 | −10.0 |" in text
    assert "| vig@70 | 3 | 10 | 401 | 5 | 2 |" in text
    assert "2 of 9 cells are missing." in text
    assert "mean over each arm's n of the seeds 0, 1, 2" in text
    assert "seed 1, vig@30 failed: no room" in text


def test_a_metric_is_written_as_it_is_told() -> None:
    percent, nats = {"format": "percent"}, {"format": ".4f"}
    assert (written(percent, 0.9534), written(percent, -0.02, signed=True)) == ("95.3", "−2.0")
    assert written(nats, 1.23456, signed=True) == "+1.2346"
    assert (written(percent, -0.0001, signed=True), written(percent, 0.0, signed=True)) == ("0.0", "0.0")
    assert (written(percent, 0.1, signed=True), written(percent, 1.0)) == ("+10.0", "100.0")


def test_the_figure_is_whole_svg_with_every_arm_and_its_whiskers() -> None:
    result = invented()
    text = draw(panels(result))
    tree = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    names = [title.text for circle in tree.iter(f"{space}circle") for title in circle.iter(f"{space}title")]
    assert sorted(names) == sorted(["vanilla", "vig@70", "vig@30"] * len(WORLD))
    whiskers = [path for path in tree.iter(f"{space}path") if path.get("stroke-opacity") == "0.45"]
    assert len(whiskers) == 2 * len(WORLD)  # one seed has none
    assert "nan" not in text
    assert text == draw(panels(result))


def test_the_figure_of_one_seed_and_of_equal_numbers_can_be_drawn() -> None:
    one = summarise([cell("vanilla", 0, 0.5, 0)], arms=["vanilla"], seeds=[0], metrics=WORLD, study={}, failures={})
    assert "nan" not in draw(panels(one))
    ET.fromstring(draw([]))


def test_on_a_narrow_terminal_no_number_is_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_ablation(invented())
    printed = capsys.readouterr().out
    assert "…" not in printed
    for grid in grids(invented()):
        assert all(any(all(cell in shown for cell in line) for shown in printed.splitlines()) for line in grid.lines)


def test_every_kind_of_arm_has_a_colour_of_its_own_in_the_figure() -> None:
    kinds = [*KINDS, "mine", "yours"]
    cells = [cell(kind, 0, 0.5, 10 * k) for k, kind in enumerate(kinds)]
    study = summarise(cells, arms=kinds, seeds=[0], metrics=WORLD[:1], study={}, failures={})
    circles = ET.fromstring(draw(panels(study))).iter("{http://www.w3.org/2000/svg}circle")
    key = [circle.get("fill") for circle in circles if circle.get("r") == "5"]
    assert len(key) == len(set(key)) == len(kinds)


def test_an_interval_beyond_a_hundred_percent_is_not_drawn_there() -> None:
    cells = [cell("vanilla", seed, accuracy) for seed, accuracy in enumerate((0.8, 0.99, 0.9))]
    study = summarise(cells, arms=["vanilla"], seeds=[0, 1, 2], metrics=WORLD[:1], study={}, failures={})
    assert study.arms[0].metrics["accuracy"].high > 1
    text = draw(panels(study))
    assert "100.0<" in text
    assert max(float(number) for number in re.findall(r">(\d+\.\d)</text>", text)) == 100.0
    (whisker,) = re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)" stroke="[^"]*" stroke-width="1.5"', text)
    assert float(whisker[1]) == TOP


# ---------------------------------------------------------------- the user's data


def write_rows(folder: Path, images: list[list[str]]) -> Path:
    """A dataset with these pictures in its rows."""
    rng = np.random.default_rng(0)
    for name in {name for row in images for name in row}:
        Image.fromarray(rng.integers(0, 255, (12, 12, 3)).astype(np.uint8)).save(folder / name)
    rows = [
        {
            "id": f"r{k}",
            **({"image": row} if row else {}),
            "conversations": tiny_run.conversation("<image>\n" * len(row) + f"What is {k}?", f"A ball, {k}."),
        }
        for k, row in enumerate(images)
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_no_picture_that_is_tested_is_trained_on(tmp_path: Path) -> None:
    images = [[f"{k % 30}.png"] for k in range(60)] + [["0.png", "1.png"], ["2.png", "17.png"], []]
    dataset = open_dataset(write_rows(tmp_path, images))
    divisions = [divide(dataset, 12, seed) for seed in (0, 0, 1)]
    for division in divisions:
        tested = {name for row in division.tested for name in images[row]}
        trained = {name for row in range(len(images)) if row not in division.withheld for name in images[row]}
        assert not tested & trained
        assert set(division.tested) <= set(division.withheld)
        assert 12 <= len(division.tested) <= 15
        assert 62 not in division.withheld  # without pictures
    assert divisions[0].tested.tolist() == divisions[1].tested.tolist() != divisions[2].tested.tolist()


def test_holding_out_more_than_half_is_refused(tmp_path: Path) -> None:
    dataset = open_dataset(write_rows(tmp_path, [[f"{k}.png"] for k in range(10)]))
    assert len(divide(dataset, None, 0).tested) == 1
    with pytest.raises(ConfigError, match="--test-rows is 6, more than half of the 10 rows with pictures"):
        divide(dataset, 6, 0)


def test_rows_that_are_tested_read_as_they_were(tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path / "data")
    dataset = open_dataset(data)
    rows = [row for row in range(len(dataset)) if isinstance(dataset[row], Sample)]
    place = json.loads((write_tested(dataset, rows, tmp_path / "tested") / "place.json").read_text())
    again = open_dataset(tmp_path / "tested/data.jsonl", Path(place["image_root"]))
    before = [dataset[row] for row in rows if dataset[row].id != "gone"]
    assert place["rows"] == len(again) == len(before) < len(rows)
    for old, new in zip(before, (again[row] for row in range(len(again))), strict=True):
        assert isinstance(old, Sample)
        assert isinstance(new, Sample)
        assert (old.turns, old.source, str(old.row)) == (new.turns, new.source, new.id)
        assert [image.open().tobytes() for image in old.images] == [image.open().tobytes() for image in new.images]


def test_pictures_inside_of_tables_are_written_beside_the_rows_that_are_tested(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, "PNG")
    messages = [{"role": "user", "content": "What?<image>"}, {"role": "assistant", "content": "A ball."}]
    rows = [{"messages": messages, "images": [{"bytes": buffer.getvalue(), "path": f"{k}.png"}]} for k in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    dataset = open_dataset(tmp_path / "data.parquet")
    folder = write_tested(dataset, [0, 2], tmp_path / "tested")
    assert json.loads((folder / "place.json").read_text()) == {"image_root": None, "rows": 2}
    again = open_dataset(folder / "data.jsonl", folder)
    for old, new in ((dataset[0], again[0]), (dataset[2], again[1])):
        assert isinstance(old, Sample)
        assert isinstance(new, Sample)
        assert old.turns == new.turns
        assert old.images[0].open().tobytes() == new.images[0].open().tobytes()


def test_scores_without_rows_are_a_finished_run_of_the_others(tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path)
    tiny_run.write_scores(tmp_path / "scores", data)
    whole = read_scores(tmp_path / "scores")
    rest = read_scores(without_rows(tmp_path / "scores", np.array([0, 3]), tmp_path / "rest"))
    assert rest.column("row").to_pylist() == [row for row in whole.column("row").to_pylist() if row not in (0, 3)]
    assert rest.slice(0, 1).equals(whole.slice(1, 1))


def test_the_measure_of_held_out_rows_is_the_mean_over_their_tokens(tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path)
    scored = [one for one in tiny_run.write_scores(tmp_path / "scores", data) if len(one.nll_seen)]
    found = held_out_metrics(tmp_path / "scores", tmp_path / "scores")
    seen, blind = (np.concatenate([getattr(one, name) for one in scored]) for name in ("nll_seen", "nll_blind"))
    assert found["nll_seen"] == pytest.approx(float(seen.mean(dtype=np.float64)), abs=1e-6)
    assert found["nll_blind"] == pytest.approx(float(blind.mean(dtype=np.float64)), abs=1e-6)
    assert found["gain"] == pytest.approx(float((blind - seen).mean(dtype=np.float64)), abs=1e-6)
    assert (found["test_rows"], found["test_tokens"]) == (len(scored), len(seen))
    needing = [nll for nll, without in zip(seen.tolist(), blind.tolist(), strict=True) if without - nll >= 1]
    assert 0 < len(needing) < len(seen)
    assert found["needing_tokens"] == len(needing)
    assert found["nll_needing"] == pytest.approx(sum(needing) / len(needing), abs=1e-6)


def test_which_tokens_need_the_picture_is_said_by_the_starting_model(tmp_path: Path) -> None:
    data = tiny_run.write_dataset(tmp_path)
    tiny_run.write_scores(tmp_path / "start", data)
    (tmp_path / "trained").mkdir()
    for path in (tmp_path / "start").glob("*.json*"):
        (tmp_path / "trained" / path.name).write_bytes(path.read_bytes())
    for path in (tmp_path / "start").glob("part-*"):
        table = pq.read_table(path)
        blind = table.column_names.index("nll_blind")
        shut = table.set_column(blind, table.field(blind), table.column("nll_seen"))  # looks at nothing any more
        pq.write_table(shut, tmp_path / "trained" / path.name)
    before, after = (held_out_metrics(tmp_path / name, tmp_path / "start") for name in ("start", "trained"))
    assert after["gain"] == 0
    assert (after["nll_needing"], after["needing_tokens"]) == (before["nll_needing"], before["needing_tokens"])


def test_equal_steps_by_default_are_those_of_all_rows() -> None:
    recipe = replace(load_recipe("embedded-tune"), batch_size=32, epochs=2.0)
    assert (steps_of(recipe, 64), steps_of(recipe, 65)) == (4, 6)


def test_scores_lie_in_folders_named_after_their_counterfactual() -> None:
    assert scores_name("blur:sigma=0.2") == "scores-blur-sigma-0.2"


def test_numbers_are_found_at_any_depth() -> None:
    assert numbers({"a": 1, "b": {"c": 0.5, "d": "x"}, "e": True}) == {"a": 1.0, "b.c": 0.5}


# ---------------------------------------------------------------- a whole study

TINY = {"rows": 24, "test_rows": 8, "steps": 2, "device": "cpu"}


def study(out: Path, **options: Any) -> AblateConfig:
    return AblateConfig(out=out, **{"arms": "vanilla,vig@50", "seeds": "0,1", **TINY, **options})


def measured(result: Ablation) -> dict[tuple[str, int], Any]:
    """Everything of the cells but their times."""
    return {
        (one["name"], one["seed"]): {
            key: one[key] for key in ("metrics", "rows", "active_tokens", "steps", "selection")
        }
        for one in result.cells
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ablation]:
    out = tmp_path_factory.mktemp("study") / "out"
    return out, run_ablation(study(out))


def test_a_study_has_every_cell_and_says_what_each_trained_on(whole: tuple[Path, Ablation]) -> None:
    out, result = whole
    assert set(measured(result)) == {(arm, seed) for arm in ("vanilla", "vig@50") for seed in (0, 1)}
    for one in result.cells:
        assert one["steps"] == 2
        assert one["rows"] == one["selection"]["rows_kept"]
        assert one["training"]["active_tokens"] == one["active_tokens"]
        assert set(one["seconds"]) == {"score", "select", "train", "evaluate"}
    vanilla, vig = result.arms
    assert vig.counts["active_tokens"] < vanilla.counts["active_tokens"]
    assert vig.metrics["accuracy"].n == vig.versus["accuracy"].n == 2
    record = json.loads((out / "ablation.json").read_text())
    assert record["cells"] == json.loads(json.dumps(result.cells))
    assert "± " in (out / "table.md").read_text()
    ET.fromstring((out / "figure.svg").read_text())


def test_a_report_shows_the_tables_and_the_figure_of_a_study(whole: tuple[Path, Ablation], tmp_path: Path) -> None:
    out, result = whole
    scores = out / "seed-0/scores-blur"
    page = write_report(ReportConfig(scores=scores, ablation=out, out=tmp_path / "report.html", samples=0)).read_text()
    for grid in grids(result):
        assert grid.title in page
        assert all(f"<td>{cell}</td>" in page for line in grid.lines for cell in line)
    assert base64.b64encode((out / "figure.svg").read_bytes()).decode() in page
    with pytest.raises(StorageError, match=r"ablation\.json does not exist"):
        read_ablation(tmp_path)
    (tmp_path / "ablation.json").write_text('{"tables": []}')
    (tmp_path / "figure.svg").write_text("")
    with pytest.raises(DataError, match="is no result of `visgain ablate`: 'notes'"):
        read_ablation(tmp_path)


def test_models_are_deleted_when_they_were_tested(whole: tuple[Path, Ablation]) -> None:
    assert not list(whole[0].glob("**/*.safetensors"))
    assert len(list(whole[0].glob("seed-*/*/selection/selection.parquet"))) == 4


def test_more_arms_and_seeds_join_a_study_and_another_study_is_refused(
    whole: tuple[Path, Ablation], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = whole
    assert set(measured(before)) == {(arm, seed) for arm in ("vanilla", "vig@50") for seed in (0, 1)}
    done: list[str] = []
    original = ablation_run.run_cell

    def noted(one: ablation_run.Cell, *rest: Any) -> Any:
        done.append(one.name)
        return original(one, *rest)

    monkeypatch.setattr(ablation_run, "run_cell", noted)
    grown = run_ablation(study(out, arms="aligned", seeds="0"))
    assert done == ["seed 0, aligned"]
    aligned, vanilla, vig = grown.arms
    assert aligned.counts == {"rows": 0, "active_tokens": 0, "steps": 0, "train_seconds": 0}
    # What was finished before is in the result too, with the new arm beside it.
    assert (aligned.name, vanilla, vig) == ("aligned", *before.arms)
    assert (aligned.n, aligned.versus["accuracy"].n, grown.seeds) == (1, 1, (0, 1))
    assert measured(before).items() < measured(grown).items()
    told = (out / "table.md").read_text()
    assert all(f"| {name} |" in told for name in ("aligned", "vanilla", "vig@50"))
    assert "1 of 6 cells are missing." in told
    again = run_ablation(study(out))
    assert [arm.name for arm in again.arms] == ["vanilla", "vig@50", "aligned"]
    assert measured(again) == measured(grown)
    with pytest.raises(StorageError, match="rows: 24 there, 25 now"):
        run_ablation(study(out, rows=25))
    values = asdict(load_recipe("embedded-tune"))
    for name, value in {"save_steps": 7, "learning_rate": 0.5}.items():
        path = out.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump({**values, "parts": list(values["parts"]), name: value}))
    assert measured(run_ablation(study(out, recipe=str(out.with_name("save_steps.yaml"))))) == measured(grown)
    with pytest.raises(StorageError, match=r"learning_rate: .* there, 0.5 now"):
        run_ablation(study(out, recipe=str(out.with_name("learning_rate.yaml"))))


def test_a_cell_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = trial.run_train

    def breaks(config: Any) -> Any:
        if "vanilla" in str(config.out):
            raise DataError("row 3 cannot be trained on")
        return original(config)

    monkeypatch.setattr(trial, "run_train", breaks)
    result = run_ablation(study(tmp_path, seeds="0"))
    assert result.failures == {"seed 0, vanilla": "row 3 cannot be trained on"}
    assert [arm.name for arm in result.arms] == ["vig@50"]
    assert "seed 0, vanilla failed, the others go on: row 3 cannot be trained on" in capsys.readouterr().err
    assert "Traceback" in (tmp_path / "seed-0/vanilla/error.txt").read_text()
    monkeypatch.setattr(trial, "run_train", original)
    mended = run_ablation(study(tmp_path, seeds="0"))
    assert (mended.failures, len(mended.cells)) == ({}, 2)
    assert not (tmp_path / "seed-0/vanilla/error.txt").exists()


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".locks").mkdir()
    held = claim_named(tmp_path, "seed-0-vanilla")
    assert held is not None
    begun: list[str] = []

    def invented_cell(one: ablation_run.Cell, *_: Any) -> dict[str, Any]:
        begun.append(one.arm.name)
        return cell(one.arm.name, one.seed, 0.5)

    monkeypatch.setattr(ablation_run, "run_cell", invented_cell)
    monkeypatch.setattr(time, "sleep", lambda _: held.release())  # the other process dies
    result = run_ablation(study(tmp_path, seeds="0"))
    assert begun == ["vig@50", "vanilla"]
    assert len(result.cells) == 2


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        run_ablation(study(tmp_path))


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_study_that_was_killed_resumes_to_the_same_numbers(tmp_path: Path, whole: tuple[Path, Ablation]) -> None:
    arguments = ["--arms", "vanilla,vig@50", "--seeds", "0,1", "--rows", "24", "--test-rows", "8", "--steps", "2"]
    command = [sys.executable, "-m", "visgain", "ablate", "--out", str(tmp_path), "--device", "cpu", *arguments]
    for stage in ("seed-0/vanilla/model/run.json", "seed-1/scores-blur/run.json"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until(lambda path=tmp_path / stage: path.exists())
            process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob("seed-*/*/cell.json"))) < 4
    assert measured(run_ablation(study(tmp_path))) == measured(whole[1])


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path, whole: tuple[Path, Ablation]) -> None:
    arguments = ["--arms", "vanilla,vig@50", "--seeds", "0,1", "--rows", "24", "--test-rows", "8", "--steps", "2"]
    command = [sys.executable, "-m", "visgain", "ablate", "--out", str(tmp_path), "--device", "cpu", *arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(text.count("visgain: cell ") for text in told) == 4
    record = json.loads((tmp_path / "ablation.json").read_text())
    assert {(one["name"], one["seed"]): one["metrics"] for one in record["cells"]} == {
        key: json.loads(json.dumps(one["metrics"])) for key, one in measured(whole[1]).items()
    }


def test_the_users_data_is_divided_scored_once_and_measured_where_nobody_trained(
    tmp_path: Path, small_world: Path
) -> None:
    config = AblateConfig(
        out=tmp_path,
        arms="aligned,vig@50",
        seeds="0,1",
        data=small_world / "data.json",
        recipe="embedded-tune",
        test_rows=6,
        device="cpu",
    )
    result = run_ablation(config)
    assert len(result.cells) == 4
    assert not result.failures
    assert [path.name for path in sorted(tmp_path.glob("scores*"))] == ["scores-blur"]
    for seed in (0, 1):
        withheld = divide(open_dataset(small_world / "data.json"), 6, seed).withheld
        trained = read_scores(tmp_path / f"seed-{seed}/scores-blur").column("row").to_pylist()
        assert sorted([*trained, *withheld]) == list(range(60))
    for one in result.cells:
        assert one["steps"] == (0 if one["name"] == "aligned" else 2)  # one pass of vanilla: 50-odd rows by 32
        assert one["metrics"]["gain"] == pytest.approx(one["metrics"]["nll_blind"] - one["metrics"]["nll_seen"])
    # The starting model's numbers on held-out rows are those that the whole dataset's scores hold for the same rows.
    scores = read_scores(tmp_path / "scores-blur").to_pylist()
    tested = divide(open_dataset(small_world / "data.json"), 6, 0).tested.tolist()
    seen = np.concatenate([scores[row]["nll_seen"] for row in tested])
    start = next(one for one in result.cells if one["name"] == "aligned" and one["seed"] == 0)
    assert start["metrics"]["nll_seen"] == pytest.approx(float(seen.mean()), abs=1e-5)


def test_what_follows_the_model_never_reads_a_row_that_is_held_out(tmp_path: Path, small_world: Path) -> None:
    data = small_world / "data.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**asdict(load_recipe("embedded-tune")), "batch_size": 2, "micro_batch": 2}))
    config = AblateConfig(
        out=tmp_path / "out",
        arms="refresh@50",
        seeds="0",
        data=data,
        recipe=str(recipe),
        test_rows=6,
        device="cpu",
        equal="epochs",
        keep_models=True,
    )
    assert not run_ablation(config).failures
    rounds = sorted((config.out / "seed-0/refresh@50/model/refresh").iterdir())
    read = [row for folder in rounds for row in read_scores(folder / "scores").column("row").to_pylist()]
    withheld = divide(open_dataset(data), 6, 0).withheld.tolist()
    assert sorted([*read, *withheld]) == list(range(60))


def test_too_few_rows_to_hold_out_are_one_message_for_all_cells(tmp_path: Path, small_world: Path) -> None:
    config = AblateConfig(out=tmp_path, data=small_world / "data.json", recipe="embedded-tune", test_rows=50)
    with pytest.raises(ConfigError, match="--test-rows is 50, more than half of the"):
        run_ablation(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "lost", "message"),
    [
        ([[], []], [], r"data\.json has no rows with pictures, and no others are tested; name another one"),
        ([[], ["a.png"], ["b.png"]], ["a.png", "b.png"], r"can be read \(row 1: .*a\.png.*\); check --image-root"),
    ],
)
def test_another_dataset_without_pictures_is_told_before_anything_is_trained(
    tmp_path: Path, small_world: Path, images: list[list[str]], lost: list[str], message: str
) -> None:
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other", images)
    for name in lost:
        (tmp_path / "other" / name).unlink()
    config = AblateConfig(out=tmp_path / "out", data=small_world / "data.json", eval_data=other, recipe="embedded-tune")
    with pytest.raises(DataError, match=message):
        run_ablation(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_equal_epochs_pass_over_each_arms_own_rows(tmp_path: Path) -> None:
    result = run_ablation(study(tmp_path, seeds="0", rows=100, steps=None, equal="epochs", arms="vanilla,vig@30"))
    vanilla, vig = result.cells
    assert vanilla["steps"] == 4
    assert vig["steps"] == math.ceil(vig["rows"] / 32) < 4
    assert vig["active_tokens"] == vig["selection"]["active_tokens"]


def test_data_to_test_on_may_be_another_dataset(tmp_path: Path, small_world: Path) -> None:
    config = AblateConfig(
        out=tmp_path,
        arms="aligned",
        seeds="0",
        data=small_world / "data.json",
        eval_data=small_world / "data.json",
        recipe="embedded-tune",
        device="cpu",
    )
    (one,) = run_ablation(config).cells
    rows = [json.loads(line) for line in (small_world / "truth.jsonl").read_text().splitlines()]
    assert one["metrics"]["test_rows"] == sum(bool(row["things"]) for row in rows)
