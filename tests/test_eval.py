"""`visgain eval`: generate, judge, score; apart, together, interrupted, with answers from elsewhere."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from visgain.cli import main
from visgain.config import EvalConfig, WorldConfig
from visgain.errors import ConfigError, DataError, StorageError, UnknownName
from visgain.evaluation.run import run_eval
from visgain.world.dataset import write_world


@pytest.fixture(scope="module")
def pope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE's format about pictures of the world: two splits whose ids begin at 1, two questions a picture."""
    folder = tmp_path_factory.mktemp("eval")
    write_world(WorldConfig(out=folder / "world", split="test", rows=10, seed=8))
    truth = [json.loads(line) for line in (folder / "world" / "truth.jsonl").read_text().splitlines()]
    for split in ("random", "popular"):
        lines = []
        for row, known in enumerate(truth):
            kinds = [thing["kind"] for thing in known["things"]]
            absent = next(kind for kind in ("cup", "book", "key", "ball", "leaf") if kind not in kinds)
            for kind, label in ((kinds[0], "yes"), (absent, "no")):
                text = f"Is there a {kind} in the image?"
                image = f"images/{row:06d}.png"
                lines.append({"question_id": len(lines) + 1, "image": image, "text": text, "label": label})
        path = folder / "world" / f"coco_pope_{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "world"


def config(pope: Path, out: Path, **options) -> EvalConfig:
    chosen = {"model": "embedded", "benchmarks": "pope", "image_root": pope, "batch_size": 4, "max_new_tokens": 6}
    return EvalConfig(data=pope, out=out, **{**chosen, **options})


@pytest.fixture(scope="module")
def whole(pope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_eval(config(pope, out))
    return out / "pope"


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("answers.jsonl", "metrics.json")}


def test_a_result_says_what_it_is(whole: Path) -> None:
    found = json.loads((whole / "metrics.json").read_text())
    assert (found["benchmark"], found["variant"], found["questions"]) == ("pope", "official", 40)
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert [(a["split"], a["id"]) for a in answers][:2] == [("coco/random", "1"), ("coco/random", "2")] or len(answers)
    assert {a["benchmark"] for a in answers} == {"pope"}
    assert len({(a["split"], a["id"]) for a in answers}) == 40
    # Independently: the share of right answers, averaged over the two splits.
    rights = {"random": [], "popular": []}
    for answer in answers:
        is_no = "no" in answer["prediction"].lower().replace(",", "").partition(".")[0].split()
        rights[answer["split"].rpartition("/")[2]].append(is_no == (int(answer["id"]) % 2 == 0))
    expected = 100 * sum(sum(right) / len(right) for right in rights.values()) / 2
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx(expected)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]


def test_interrupted_anywhere_it_resumes_to_the_same_files(whole: Path, pope: Path, tmp_path: Path) -> None:
    text = (whole / "answers.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    for n, (kept, cut) in enumerate(((0, b""), (7, b""), (8, lines[8][:20]), (39, lines[39][:-1]))):
        folder = tmp_path / str(n) / "pope"
        folder.mkdir(parents=True)
        (folder / "run.json").write_bytes((whole / "run.json").read_bytes())
        (folder / "answers.jsonl").write_bytes(b"".join(lines[:kept]) + cut)
        run_eval(config(pope, folder.parent))
        assert files(folder) == files(whole)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes(whole: Path, pope: Path, tmp_path: Path, how: int) -> None:
    command = [sys.executable, "-m", "visgain", "eval", "--benchmarks", "pope", "--model", "embedded"]
    command += ["--data", str(pope), "--image-root", str(pope), "--out", str(tmp_path)]
    command += ["--batch-size", "4", "--max-new-tokens", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    path = tmp_path / "pope" / "answers.jsonl"
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(how)
    message = process.communicate()[1].decode()
    assert process.returncode != 0
    assert "Traceback" not in message
    run_eval(config(pope, tmp_path))
    assert files(tmp_path / "pope") == files(whole)


def test_stages_run_alone(whole: Path, pope: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the stage `generate` first"):
        run_eval(config(pope, tmp_path, model=None, stages="score"))
    assert run_eval(config(pope, tmp_path, stages="generate")) == []
    assert not (tmp_path / "pope" / "metrics.json").exists()
    [result] = run_eval(config(pope, tmp_path, model=None, stages="score"))
    assert files(tmp_path / "pope") == files(whole)
    [other] = run_eval(config(pope, tmp_path, model=None, stages="score", variant="lmms-eval"))
    assert (result.variant, other.variant) == ("official", "lmms-eval")


def test_answers_from_elsewhere_are_scored_without_a_model(whole: Path, pope: Path, tmp_path: Path) -> None:
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    given = tmp_path / "given.jsonl"
    rows = [
        {"question_id": int(a["id"]), "text": a["prediction"], "category": a["split"].partition("/")[2]}
        for a in answers
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    run_eval(config(pope, tmp_path / "out", model=None, answers=given))
    assert (tmp_path / "out" / "pope" / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    given.write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    with pytest.raises(DataError, match="2 missing"):
        run_eval(config(pope, tmp_path / "short", model=None, answers=given))


def test_a_folder_belongs_to_one_run(whole: Path, pope: Path) -> None:
    with pytest.raises(StorageError, match="max_new_tokens"):
        run_eval(config(pope, whole.parent, max_new_tokens=7))
    with pytest.raises(StorageError, match="decoding"):
        run_eval(config(pope, whole.parent, decoding="vcd"))


def test_data_that_changed_is_noticed(whole: Path, pope: Path, tmp_path: Path) -> None:
    changed = tmp_path / "data"
    changed.mkdir()
    for path in pope.glob("*.jsonl"):
        (changed / path.name).write_text(path.read_text().replace('"no"', '"yes"', 1))
    with pytest.raises(StorageError, match="questions"):
        run_eval(
            config(pope, whole.parent).__class__(
                benchmarks="pope",
                data=changed,
                image_root=pope,
                out=whole.parent,
                model="embedded",
                batch_size=4,
                max_new_tokens=6,
            )
        )


def test_a_limited_run_says_so(pope: Path, tmp_path: Path) -> None:
    [result] = run_eval(config(pope, tmp_path, limit=6))
    assert (result.questions, result.limited) == (6, True)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"benchmarks": "pop"}, UnknownName, "pope"),
        ({"benchmarks": " , "}, ConfigError, "names none"),
        ({"stages": "generate,scores"}, ConfigError, "scores"),
        ({"variant": "oper"}, ConfigError, "opera"),
        ({"variant": "chair=wordnet"}, ConfigError, "--variant"),
        ({"decoding": "vcd:beta=2"}, ConfigError, "vcd:beta"),
        ({"decoding": "gredy"}, UnknownName, "greedy"),
        ({"model": None}, ConfigError, "--model"),
        ({"batch_size": 0}, ConfigError, "--batch-size"),
    ],
)
def test_a_wrong_option_is_one_message(pope: Path, tmp_path: Path, options, error, told: str) -> None:
    with pytest.raises(error, match=told):
        run_eval(config(pope, tmp_path, **options))
    assert not list(tmp_path.rglob("answers.jsonl"))


def test_a_seed_is_another_draw(pope: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in (1, 2):
        out = tmp_path / str(seed)
        run_eval(config(pope, out, decoding="sample:temperature=9", seed=seed, limit=2, stages="generate"))
        drawn.append((out / "pope/answers.jsonl").read_text())
    assert drawn[0] != drawn[1]


def test_a_missing_picture_is_told_before_anything_is_asked(pope: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"10 of pope's 10 picture files are missing, .*000000.png; --image-root"):
        run_eval(config(pope, tmp_path, image_root=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_the_table(pope: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--benchmarks", "pope", "--data", str(pope), "--image-root", str(pope)]
    main([*command, "--model", "embedded", "--out", str(tmp_path), "--limit", "4", "--max-new-tokens", "4"])
    printed = capsys.readouterr()
    assert "pope (official): 4 questions, the first ones only" in printed.out
    assert "accuracy" in printed.out
    assert "asking pope" in printed.err


def test_answers_are_exported_for_other_scorers(whole: Path, pope: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    answers = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    answers[0]["prediction"] = 'No,\t"none"\nof it \u2028 \u00e9'
    odd.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    run_eval(config(pope, tmp_path, model=None, answers=odd, export="llava, vlmevalkit,rrc"))
    said = [answer["prediction"] for answer in answers]
    lines = (tmp_path / "pope" / "answers-llava.jsonl").read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == said
    assert [row["category"] for row in rows] == [answer["split"] for answer in answers]
    assert len({row["answer_id"] for row in rows}) == 40
    with (tmp_path / "pope" / "answers-vlmevalkit.tsv").open(newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [row["prediction"] for row in table] == said
    assert [row["index"] for row in table] == [answer["id"] for answer in answers]
    served = json.loads((tmp_path / "pope" / "answers-rrc.json").read_text())
    assert [row["answer"] for row in served] == said
    # What is exported reads back: answers in LLaVA's form give the same metrics.
    again = config(pope, tmp_path / "again", model=None, answers=tmp_path / "pope" / "answers-llava.jsonl")
    assert run_eval(again)[0].metrics == run_eval(config(pope, tmp_path, model=None, stages="score"))[0].metrics


def test_an_unknown_export_is_told_before_anything_is_asked(pope: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="llava"):
        run_eval(config(pope, tmp_path, export="lava"))
    assert not list(tmp_path.iterdir())
