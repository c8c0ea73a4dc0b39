"""Every JSON, JSONL and CSV file of the real data: as many rows, images and answers as a naive reader counts."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visgain.config import ScoreConfig
from visgain.data import open_dataset
from visgain.errors import DataError
from visgain.scoring.run import run_score
from visgain.types import Sample, Skipped

READ = {
    "celeba_dialog/llava.json": 90,
    "coco/llava_captions.json": 1044,
    "daquar/llava.json": 1157,
    "daquar/qa.jsonl": 9677,
    "llava_bench_wild/context.jsonl": 24,
    "llava_bench_wild/llava.json": 60,
    "mantis_chat/llava.json": 80,
    "mantis_chat/messages.json": 80,
    "mix.json": 4720,
    "mmvet/questions.jsonl": 174,
    "nlvr/llava.json": 500,
    "sroie/llava.json": 40,
    "text_only/alpaca_en_300.json": 300,
    "formats/llamafactory/mllm_demo.json": 6,
    "formats/llava_instruct_100/llava_instruct_100.json": 100,
    "formats/lmms_finetune/multi_images.json": 2,
    "formats/lmms_finetune/single_image.json": 2,
    "formats/lmms_finetune/single_image_has_text_only.json": 4,
    "formats/ms_swift/alpaca.csv": 3,
    "formats/ms_swift/alpaca.jsonl": 3,
    "formats/ms_swift/alpaca2.csv": 3,
    "formats/ms_swift/chatml.jsonl": 3,
    "formats/ms_swift/conversations.jsonl": 3,
    "formats/ms_swift/multi_modal_1.jsonl": 3,
    "formats/ms_swift/multi_modal_2.jsonl": 3,
    "formats/ms_swift/multi_modal_3.jsonl": 3,
    "formats/ms_swift/sharegpt.jsonl": 3,
    "formats/ms_swift/swift_multi.json": 3,
    "formats/ms_swift/swift_multi.jsonl": 3,
    "formats/ms_swift/swift_single.csv": 3,
    "formats/ms_swift/swift_single.jsonl": 3,
    "formats/qwen_vl_finetune/demo/single_images.json": 3,
    "formats/scienceqa_llava/llava_test_CQM-A.json": 4241,
    "formats/xcomposer/data/multi_turn_multi_images_example.json": 2,
    "formats/xcomposer/data/only_text_example.json": 2,
    "formats/xcomposer/data/single_turn_single_image_example.json": 2,
    "formats/xtuner/resource/mllm_sft_multi_image_example_data.jsonl": 11,
    "formats/xtuner/resource/mllm_sft_multi_image_example_data2.jsonl": 10,
    "formats/xtuner/resource/mllm_sft_multi_image_example_data_new.jsonl": 11,
    "formats/xtuner/resource/mllm_sft_single_image_example_data.jsonl": 22,
    "formats/xtuner/resource/mllm_sft_single_image_example_data_new.jsonl": 22,
    "formats/xtuner/resource/openai_sft.jsonl": 128,
}
"""Files of which every row is a sample, and how many rows there are."""

SKIPPED = {
    "flickr8k/captions.jsonl": (3000, "the row has 5 captions; a conversation has one; write a row for each"),
    "formats/ms_swift/swift_pre.csv": (3, "the row has an answer but no question and no image"),
    "formats/ms_swift/swift_pre.jsonl": (3, "the row has an answer but no question and no image"),
    "formats/xtuner/resource/mllm_pretrain_image_example_data.jsonl": (
        12,
        "text to pre-train on, in which nobody answers",
    ),
    "formats/xtuner/resource/mllm_pretrain_image_example_data_new.jsonl": (
        12,
        "text to pre-train on, in which nobody answers",
    ),
}
"""Files whose rows hold nothing that could be scored, with the reason."""

REFUSED = {
    "MANIFEST.jsonl": "in no known layout .*'blob', 'bytes'",
    "coco/captions.json": "one JSON object, not a list of rows",
    "coco/instances.json": "one JSON object, not a list of rows",
    "coco/objects.json": "one JSON object, not a list of rows",
    "coco/pope_official_subset.jsonl": "in no known layout .*'label', 'question_id'",
    "coco/vsr.jsonl": "in no known layout .*'statement'",
    "flickr8k/match_nomatch.jsonl": "in no known layout .*'label', 'split'",
    "llava_bench_wild/answers_gpt4.jsonl": "in no known layout .*'model_id', 'prompt'",
    "llava_bench_wild/questions.jsonl": "in no known layout .*'question_id', 'text'",
}
"""Files that are no conversations: annotations, questions without answers, captions that may be wrong."""

SLOW = {"flickr8k/llava_align.json": 15000}


def test_the_tables_above_name_every_file(shared_data: Path) -> None:
    files = (path for kind in ("json", "jsonl", "csv") for path in shared_data.rglob(f"*.{kind}"))
    named = {*READ, *SKIPPED, *REFUSED, *SLOW}
    assert {path.relative_to(shared_data).as_posix() for path in files} == named


# ---------------------------------------------------------------- the naive reader


def naive_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    assert isinstance(whole, list)
    return whole


def inside(value: Any) -> Iterator[Any]:
    """The value and everything in it."""
    yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from inside(each)


def naive_answers(row: Any) -> int:
    """Turns of a role that answers, fields that are answers, pairs of a history."""
    found = [each for each in inside(row) if isinstance(each, dict)]
    by_role = sum(1 for each in found if {each.get("role"), each.get("from")} & {"gpt", "assistant", "bot"})
    fields = sum(
        1 for each in found for name in ("response", "output", "answer", "assistant", "caption") if name in each
    )
    return by_role + fields + sum(len(each.get("history") or ()) for each in found)


def naive_images(row: Any) -> Counter[str]:
    """What stands in fields of images, and between tags in what was said."""
    found: Counter[str] = Counter()
    for each in inside(row):
        if isinstance(each, str):
            found.update(re.findall("<img>(.*?)</img>", each))
        if isinstance(each, dict):
            for name in ("image", "images", "url"):
                value = each.get(name)
                found.update([value] if isinstance(value, str) else value if isinstance(value, list) else [])
    return found


def check(path: Path, n_rows: int, looked_at: int) -> None:
    """Compare about `looked_at` rows, evenly spaced."""
    rows, dataset = naive_rows(path), open_dataset(path)
    assert len(dataset) == len(rows) == n_rows
    for number in range(0, n_rows, max(1, n_rows // looked_at)):
        read, row = dataset[number], rows[number]
        assert isinstance(read, Sample), read
        assert read.row == number
        assert len(read.answers) == naive_answers(row), row
        assert Counter(image.key.replace(":/", "://") for image in read.images) == naive_images(row), row
        if isinstance(row, dict) and "id" in row:
            assert read.id == str(row["id"])


@pytest.mark.parametrize("name", READ)
def test_every_row_of_a_real_file_is_read_in_full(shared_data: Path, name: str) -> None:
    check(shared_data / name, READ[name], looked_at=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, n_rows in (READ | SLOW).items() if n_rows > 100])
def test_every_row_of_a_large_real_file_is_read_in_full(shared_data: Path, name: str) -> None:
    check(shared_data / name, (READ | SLOW)[name], looked_at=1 << 20)


@pytest.mark.parametrize("name", SKIPPED)
def test_real_rows_that_cannot_be_scored_say_why(shared_data: Path, name: str) -> None:
    n_rows, expected = SKIPPED[name]
    dataset = open_dataset(shared_data / name)
    assert len(dataset) == len(naive_rows(shared_data / name)) == n_rows
    rows = [dataset[row] for row in range(0, n_rows, max(1, n_rows // 100))]
    assert Counter(row.reason for row in rows if isinstance(row, Skipped)) == {expected: len(rows)}


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_file_that_is_no_dataset_is_refused_with_what_it_holds(shared_data: Path, name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        open_dataset(shared_data / name)


def test_questions_with_answers_are_read_when_the_user_names_them(shared_data: Path) -> None:
    path = shared_data / "coco" / "pope_official_subset.jsonl"
    dataset = open_dataset(path, shared_data, columns="prompt=text,response=label,id=question_id")
    for number, row in list(enumerate(naive_rows(path)))[::7]:
        read = dataset[number]
        assert isinstance(read, Sample)
        assert [turn.text for turn in read.turns] == [f"<image>\n{row['text']}", row["label"]]
        assert read.id == str(row["question_id"])


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize(
    ("name", "root", "scored", "text_only", "skipped"),
    [
        pytest.param("llamafactory/mllm_demo.json", "llamafactory", 6, 0, {}, marks=pytest.mark.slow),
        pytest.param(
            "xcomposer/data/single_turn_single_image_example.json", "xcomposer", 2, 0, {}, marks=pytest.mark.slow
        ),
        pytest.param(
            "xtuner/resource/mllm_sft_multi_image_example_data2.jsonl", "xtuner", 10, 0, {}, marks=pytest.mark.slow
        ),
        ("qwen_vl_finetune/demo/single_images.json", "qwen_vl_finetune", 3, 0, {}),
        ("ms_swift/alpaca.csv", "ms_swift", 0, 3, {}),
        ("ms_swift/multi_modal_1.jsonl", "ms_swift", 0, 1, {"is a URL; download it": 2}),
    ],
)
def test_real_files_are_scored(
    shared_data: Path, tmp_path: Path, name: str, root: str, scored: int, text_only: int, skipped: dict[str, int]
) -> None:
    formats = shared_data / "formats"
    config = ScoreConfig(model="embedded", data=formats / name, image_root=formats / root, out=tmp_path, workers=0)
    done = run_score(config)
    assert (done.multimodal, done.text_only, done.skipped) == (scored, text_only, sum(skipped.values()))
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == done.skipped
    assert all(any(reason in line for reason in skipped) for line in lines)
