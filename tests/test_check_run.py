"""The whole of a check: what it says of scoring is what scoring does, bad input is a finding, and the command line."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from test_check import rows, write
from visgain.check import estimate as estimates
from visgain.check import measure as measuring
from visgain.check.checked import Checked
from visgain.check.estimate import parameters
from visgain.check.findings import Finding
from visgain.check.run import run_check
from visgain.check.run_checks import CHECKS as RUN_CHECKS
from visgain.check.run_checks import Trial
from visgain.check.view import duration, print_checked
from visgain.cli import main
from visgain.config import CheckConfig, ScoreConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError, EncodingError
from visgain.scoring.run import run_score
from visgain.storage import read_scores
from visgain.types import Sample
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.model import CHAT_TEMPLATE


def named(checked: Checked) -> dict[str, Finding]:
    return {one.check: one for one in checked.findings}


def printed(checked: Checked) -> str:
    out = io.StringIO()
    print_checked(checked, Console(file=out, width=160))
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("healthy"), rows())


@pytest.fixture(scope="module")
def world(small_world: Path) -> Checked:
    """The embedded model on its own world, half of whose rows are sampled."""
    return run_check(CheckConfig(model="embedded", data=small_world / "data.json", sample=30))


@pytest.fixture
def folder(blank_model: Path, tmp_path: Path) -> Path:
    """A model folder of one's own to plant faults in."""
    return Path(shutil.copytree(blank_model, tmp_path / "model"))


# ---------------------------------------------------------------- what it says is what scoring does


def test_a_trained_model_on_its_own_data_has_nothing_to_mend(world: Checked) -> None:
    assert not world.has_errors
    assert not [one for one in world.findings if one.severity == "warning"]


def test_estimated_tokens_are_those_of_all_rows_encoded(world: Checked, small_world: Path) -> None:
    encoder = make_encoder(load_vlm("embedded"))
    dataset = open_dataset(small_world / "data.json")
    samples = [sample for row in range(len(dataset)) if isinstance(sample := dataset[row], Sample)]
    encoded = [encoder.encode(sample, [image.open() for image in sample.images]) for sample in samples]
    whole = world.estimate
    assert whole is not None
    tokens = sum(len(one.input_ids) for one in encoded)
    assert abs(whole.tokens - tokens) <= whole.margin * tokens
    assert 0 < whole.margin < 0.1
    assert whole.image_tokens == pytest.approx(sum(one.n_image_tokens for one in encoded))
    assert whole.answer_tokens == pytest.approx(sum(len(one.turn) for one in encoded), rel=0.1)
    assert whole.scored_rows == sum(bool(sample.images) for sample in samples)


def test_answer_tokens_beyond_the_limit_are_not_counted(small_world: Path) -> None:
    data, limit = small_world / "data.json", 70
    vlm = load_vlm("embedded")
    encoder, uncut = make_encoder(vlm, max_length=limit), make_encoder(vlm)
    dataset = open_dataset(data)
    samples = [sample for row in range(len(dataset)) if isinstance(sample := dataset[row], Sample)]
    left = whole = 0
    for sample in samples:
        images = [image.open() for image in sample.images]
        whole += len(uncut.encode(sample, images).turn)
        with suppress(EncodingError):
            left += len(encoder.encode(sample, images).turn)
    assert left < 0.8 * whole, "the limit cuts"
    found = run_check(CheckConfig(model="embedded", data=data, sample=30, max_length=limit)).estimate
    assert found is not None
    assert found.answer_tokens == pytest.approx(left, rel=0.15)


def test_measured_scores_and_disk_are_those_of_score(world: Checked, small_world: Path, tmp_path: Path) -> None:
    run_score(ScoreConfig(model="embedded", data=small_world / "data.json", out=tmp_path, workers=0))
    scored = {row["row"]: row for row in read_scores(tmp_path).to_pylist()}
    measured, whole = world.measured, world.estimate
    assert measured is not None
    assert len(measured.scores) >= 20
    assert world.reading is not None
    assert {score.row for score in measured.scores} <= {one.sample.row for one in world.reading.rows}
    assert max(score.row for score in measured.scores) > 50, "spread over all sixty"
    for score in measured.scores:
        assert score.token_id.tolist() == scored[score.row]["token_id"]
        assert np.allclose(score.nll_seen, scored[score.row]["nll_seen"], rtol=0, atol=1e-4)
        assert np.allclose(score.nll_blind, scored[score.row]["nll_blind"], rtol=0, atol=1e-4)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("part-*.parquet"))
    assert whole is not None
    assert whole.disk_bytes == pytest.approx(on_disk, rel=0.25)
    assert whole.seconds is not None
    low, likely, high = whole.seconds
    assert 0 < low <= likely <= high


def test_a_pictures_tokens_count_once_where_rows_share_it(world: Checked) -> None:
    assert world.scan is not None
    assert world.measured is not None
    assert world.measured.way == "shared"
    one = world.scan.rows[0]
    rates = {one.source: estimates.Rates(text=0.5, image=36.0, answer=0.5, error=0.0, n=1)}
    text = 3 * 0.5 * one.text
    assert estimates._work([one] * 3, rates, sharing=True) == text + 36 * len(one.images)
    assert estimates._work([one] * 3, rates, sharing=False) == text + 3 * 36 * len(one.images)


def test_the_terminal_shows_labels_without_colour_and_every_count(world: Checked) -> None:
    text = printed(world)
    assert "[image × 36]" in text
    assert "</s>⟧" in text
    assert "⟦ " in text
    assert "<s>USER:" in text
    for word in ("unusable", "ids that collide", "image tokens", "without labels", "answer tokens", "disk", "memory"):
        assert word in text
    assert " nan" not in text


def test_the_numbers_behind_it_are_json(world: Checked) -> None:
    values = json.loads(json.dumps(world.as_json(), allow_nan=False))
    assert values["dataset"]["rows"] == 60
    assert values["errors"] is False
    assert values["estimate"]["tokens"] > 0
    row = values["sample"]["rows"][0]
    assert sum(n for _, _, n in row["pieces"]) == row["tokens"]
    assert sum(n for kind, _, n in row["pieces"] if kind == "answer") == row["labels"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.24, "4.2 s"), (75, "75 s"), (600, "10 min"), (20000, "5.6 h"), (300000, "3.5 days")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_gain_per_image_is_measured_too(blank_model: Path, tmp_path: Path) -> None:
    several = [{**row, "image": [f"pics/{k}.png", "pics/0.png"]} for k, row in enumerate(rows(3))]
    several[1:] = [
        {**row, "conversations": [{**row["conversations"][0], "value": "Same?"}, row["conversations"][1]]}
        for row in several[1:]
    ]
    data = write(tmp_path, several)
    checked = run_check(CheckConfig(model=str(blank_model), data=data, sample=3, per_image=True))
    assert checked.measured is not None
    assert checked.measured.failure == ""
    assert all(len(score.nll_blind_image) == 2 for score in checked.measured.scores)
    assert "unusable-rows" in named(checked), "the first row has two pictures and one mark"


# ---------------------------------------------------------------- scoring a few rows


def test_a_model_that_knows_nothing_is_told(blank_model: Path, data: Path, world: Checked) -> None:
    finding = named(run_check(CheckConfig(model=str(blank_model), data=data, sample=4)))["untrained"]
    assert "6.2" in finding.seen
    assert "untrained" not in named(world)


def test_pictures_that_do_not_reach_the_model_are_an_error(folder: Path, data: Path) -> None:
    vlm = load_vlm(str(folder))
    with torch.no_grad():
        for weight in vlm.model.model.multi_modal_projector.parameters():
            weight.zero_()
    vlm.model.save_pretrained(folder)
    finding = named(run_check(CheckConfig(model=str(folder), data=data, sample=4)))["scoring-fails"]
    assert finding.severity == "error"
    assert "does not see its pictures" in finding.what


def test_a_processor_that_counts_patches_otherwise_is_an_error(folder: Path, data: Path) -> None:
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 24}))
    finding = named(run_check(CheckConfig(model=str(folder), data=data, sample=4)))["scoring-fails"]
    assert "patch_size" in finding.mend
    assert "tokens: 9" in finding.seen


def test_numbers_that_are_none_are_found(folder: Path, data: Path) -> None:
    vlm = load_vlm(str(folder))
    with torch.no_grad():
        vlm.model.lm_head.weight[3] = float("nan")
    vlm.model.save_pretrained(folder)
    names = named(run_check(CheckConfig(model=str(folder), data=data, sample=4)))
    assert names["not-finite"].severity == "error"
    assert "--dtype" in names["not-finite"].mend


def test_a_counterfactual_that_changes_nothing_is_told(world: Checked) -> None:
    assert world.measured is not None
    assert world.estimate is not None
    equal = replace(world.measured, scores=[replace(one, nll_blind=one.nll_seen) for one in world.measured.scores])

    def told(measured: measuring.Measured) -> set[str]:
        assert world.estimate is not None
        facts = Trial(measured=measured, estimate=world.estimate)
        return {one.check for check in RUN_CHECKS if (one := check(facts))}

    assert "ignores-pictures" in told(equal)
    assert "ignores-pictures" not in told(world.measured)
    assert "ignores-pictures" not in told(replace(equal, counterfactual="none"))


def test_a_disk_that_is_too_small_is_told(world: Checked) -> None:
    assert world.estimate is not None
    assert world.measured is not None
    for free, wanted in ((10, True), (10**12, False)):
        facts = Trial(measured=world.measured, estimate=replace(world.estimate, free_bytes=free))
        assert ("disk-full" in {one.check for check in RUN_CHECKS if (one := check(facts))}) == wanted


def test_a_slow_model_is_measured_in_the_plainest_way(
    data: Path, blank_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SLOW", 0.0)
    monkeypatch.setattr(measuring, "SLOW_SECONDS", 0.0)
    checked = run_check(CheckConfig(model=str(blank_model), data=data, sample=6))
    assert "slow-model" in named(checked)
    assert checked.measured is not None
    assert checked.measured.way == "single"
    assert len(checked.measured.scores) == 2
    assert checked.estimate is not None
    assert checked.estimate.seconds is not None


def test_a_model_larger_than_the_memory_is_not_loaded(
    blank_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = sum(weight.numel() for weight in load_vlm(str(blank_model)).model.state_dict().values())
    assert parameters(str(blank_model)) == n
    monkeypatch.setattr("visgain.check.run.device_bytes", lambda device: 4 * n - 1)
    checked = run_check(CheckConfig(model=str(blank_model), data=data))
    assert checked.vlm is None
    assert "--dtype" in named(checked)["model"].what
    monkeypatch.setattr("visgain.check.run.device_bytes", lambda device: 4 * n)
    assert "model" not in named(run_check(CheckConfig(model=str(blank_model), data=data, sample=2)))


# ---------------------------------------------------------------- bad input is a finding


def bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "data.json"
    if kind == "cut":
        whole = json.dumps(rows())
        path.write_text(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_text("")
    elif kind == "no rows":
        path.write_text("[]")
    elif kind == "all bad":
        path.write_text(json.dumps([{"id": k, "conversations": []} for k in range(3)]))
    return path


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        ("missing", "data", "does not exist"),
        ("cut", "data", "not valid JSON"),
        ("empty", "data", "holds no rows"),
        ("no rows", "data", "holds no rows"),
        ("all bad", "nothing-to-score", "all 3 are unusable"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_a_finding(
    kind: str, check: str, says: str, blank_model: Path, tmp_path: Path
) -> None:
    checked = run_check(CheckConfig(model=str(blank_model), data=bad(tmp_path, kind)))
    finding = named(checked)[check]
    assert finding.severity == "error"
    assert says in finding.what
    assert says in printed(checked)
    assert json.loads(json.dumps(checked.as_json()))["errors"] is True


def test_an_image_root_that_is_not_there_is_told_with_the_one_that_works(blank_model: Path, data: Path) -> None:
    checked = run_check(CheckConfig(model=str(blank_model), data=data, image_root=Path("/nowhere/at/all")))
    assert "/nowhere/at/all" in named(checked)["data"].what
    assert named(checked)["data"].mend.endswith(f"--image-root {data.parent}")


def test_a_model_that_is_not_there_leaves_what_the_dataset_tells(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "set")
    (tmp_path / "set/pics/1.png").unlink()
    checked = run_check(CheckConfig(model=str(tmp_path / "nowhere"), data=tmp_path / "set/data.json"))
    assert {"model", "missing-pictures"} <= set(named(checked))
    assert checked.reading is None
    assert "rows" in printed(checked)


def test_weights_that_are_no_weights_are_a_finding(folder: Path, data: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    assert named(run_check(CheckConfig(model=str(folder), data=data)))["model"].severity == "error"


def test_an_unknown_template_or_counterfactual_is_wrong_usage(data: Path) -> None:
    for options in ({"template": "lava"}, {"counterfactual": "blurr"}):
        with pytest.raises(ConfigError, match="did you mean"):
            run_check(CheckConfig(model="embedded", data=data, **options))


def test_every_planted_fault_reaches_the_exit_code(folder: Path, data: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token * 2 }}"))
    checked = run_check(CheckConfig(model=str(folder), data=data, sample=4))
    assert named(checked)["doubled-bos"].severity == "error"
    assert checked.has_errors


# ---------------------------------------------------------------- the command line


def visgain(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_says_what_it_found_and_exits_with_it(
    data: Path, blank_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    check = ("check", "--model", blank_model, "--sample", 4)
    code, out, _ = visgain(capsys, *check, "--data", data, "--json", tmp_path / "found.json")
    assert code == 0
    assert "⟦ A red cup on a table.</s>⟧" in out
    assert "untrained" in out
    assert json.loads((tmp_path / "found.json").read_text())["errors"] is False
    code, out, err = visgain(capsys, *check, "--data", data, "--max-length", 30, "--json", "-")
    assert code == 1
    assert "cut-image" in {one["check"] for one in json.loads(out)["findings"]}
    assert "Traceback" not in err
    code, out, err = visgain(capsys, *check, "--data", tmp_path / "nothing.json")
    assert code == 1
    assert "does not exist" in out
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_real_data_is_checked_in_seconds(shared_data: Path) -> None:
    arguments = ("check", "--model", "embedded", "--data", shared_data / "mix.json", "--image-root", shared_data)
    done = subprocess.run(
        [sys.executable, "-m", "visgain", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "4,720" in done.stdout
