"""Exports to trainers that tokenise for themselves: what is written, and the shims with stand-ins for the trainers."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import tiny_run
from visgain import storage
from visgain.config import ExportConfig
from visgain.errors import ConfigError
from visgain.export.masks import MASKS, write_masks
from visgain.export.rows import open_selected
from visgain.export.run import run_export
from visgain.export.shims import llama_factory, swift
from visgain.export.shims.masks import IGNORED, MaskError, Masks

TRAINERS = ("llama-factory", "ms-swift")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ExportConfig:
    return tiny_run.to_export(tmp_path_factory.mktemp("export"), "llama-factory")


@pytest.fixture(scope="module")
def soft(made: ExportConfig, tmp_path_factory: pytest.TempPathFactory) -> ExportConfig:
    return tiny_run.softened(made, tmp_path_factory.mktemp("soft"))


def exported(config: ExportConfig, to: str, out: Path) -> list[dict[str, Any]]:
    """The rows of the table that is exported to a trainer, in the dataset's order."""
    run_export(replace(config, to=to, out=out))
    rows: list[dict[str, Any]] = pq.read_table(out / "train.parquet").to_pylist()
    return sorted(rows, key=lambda row: int(row.get("visgain", "row 0").split()[-1]))


def masks_of(config: ExportConfig, out: Path) -> Masks:
    write_masks(out, open_selected(config))
    return Masks(out / MASKS)


def identified(config: ExportConfig, out: Path, **identity: str) -> ExportConfig:
    """The same selection, of scores that were made in another way."""
    record = json.loads((config.selection / "selection.json").read_text())
    table = storage.read_selection_table(config.selection)
    record["identity"] = {**(record.get("identity") or {}), **identity}
    storage.write_selection(out, [table], record)
    return replace(config, selection=out)


def supervised(token_id: Sequence[int]) -> list[int]:
    """Labels of a row whose answer stands behind a prompt and before another."""
    return [IGNORED, IGNORED, *token_id, IGNORED]


def active(row: dict[str, Any]) -> list[int]:
    return [token if keep else IGNORED for token, keep in zip(row["token_id"], row["keep"], strict=True)]


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("to", TRAINERS)
def test_the_table_holds_the_kept_rows_with_their_turns_and_pictures(
    made: ExportConfig, tmp_path: Path, to: str
) -> None:
    data, rows = json.loads(made.data.read_text()), exported(made, to, tmp_path)
    assert len(rows) == len(tiny_run.selected(made))
    for row, kept in zip(rows, tiny_run.selected(made), strict=True):
        record = data[kept["row"]]
        images = record.get("image", [])
        names = [images] if isinstance(images, str) else images
        assert row["images"] == [str(made.data.parent / name) for name in names]
        assert all(Path(image).is_file() for image in row["images"])
        turns = [(message["role"], message["content"].replace("\n", "")) for message in row["messages"]]
        roles = {"human": "user", "gpt": "assistant"}
        said = [(roles[turn["from"]], turn["value"].replace("\n", "")) for turn in record["conversations"]]
        assert turns == said


@pytest.mark.parametrize("to", TRAINERS)
def test_column_types_do_not_depend_on_the_rows(made: ExportConfig, tmp_path: Path, to: str) -> None:
    table = storage.read_selection_table(made.selection)
    text_only = table.filter([json.loads(made.data.read_text())[row].get("image") is None for row in _rows(table)])
    record = json.loads((made.selection / "selection.json").read_text())
    storage.write_selection(tmp_path / "selection", [text_only], record)
    exported(made, to, tmp_path / "all")
    rows = exported(replace(made, selection=tmp_path / "selection"), to, tmp_path / "text")
    assert [row["images"] for row in rows] == [[]]
    schemas = [pq.read_schema(tmp_path / name / "train.parquet") for name in ("all", "text")]
    assert schemas[0] == schemas[1]


def _rows(table: Any) -> list[int]:
    return list(table.column("row").to_pylist())


@pytest.mark.parametrize(("template", "breaks"), [("chat", False), ("llava-1.5", True)])
def test_line_breaks_behind_pictures_are_the_templates_business(
    made: ExportConfig, tmp_path: Path, template: str, breaks: bool
) -> None:
    config = identified(made, tmp_path / "selection", template=template)
    first = exported(config, "llama-factory", tmp_path / "one")[0]["messages"][0]["content"]
    assert first == ("<image>\nWhat is it?" if breaks else "<image>What is it?")
    first = exported(config, "ms-swift", tmp_path / "other")[0]["messages"][0]["content"]
    assert first == "<image>What is it?"


@pytest.mark.parametrize("to", TRAINERS)
def test_scores_without_ends_of_turns_are_refused(made: ExportConfig, tmp_path: Path, to: str) -> None:
    config = identified(made, tmp_path / "selection", end_of_turn="ignore")
    with pytest.raises(ConfigError, match="score without --end-of-turn ignore"):
        exported(config, to, tmp_path / "out")


def test_llama_factory_refuses_soft_weights(soft: ExportConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights hard"):
        exported(soft, "llama-factory", tmp_path)


def test_the_lines_for_llama_factory_name_what_is_there(made: ExportConfig, tmp_path: Path) -> None:
    rows = exported(made, "llama-factory", tmp_path)
    lines = yaml.safe_load((tmp_path / "selection.yaml").read_text())
    info = json.loads((Path(lines["dataset_dir"]) / "dataset_info.json").read_text())[lines["dataset"]]
    assert (tmp_path / info["file_name"]).is_file()
    assert set(info["columns"].values()) == set(rows[0])
    assert not Path(lines["tokenized_path"]).exists()


def test_tokens_of_a_former_export_are_not_taken_for_new_ones(made: ExportConfig, tmp_path: Path) -> None:
    exported(made, "llama-factory", tmp_path)
    (tmp_path / "tokenized" / "train").mkdir(parents=True)
    exported(made, "llama-factory", tmp_path)
    assert not (tmp_path / "tokenized").exists()


# ---------------------------------------------------------------- LLaMA-Factory


def tokenised(tools: str, labels: list[int], masks: Masks, cutoff_len: int = 999) -> tuple[list[int], list[int], str]:
    """What the shim makes of LLaMA-Factory's own result, and the tools that LLaMA-Factory saw."""
    processor = SimpleNamespace(data_args=SimpleNamespace(cutoff_len=cutoff_len))
    seen = []

    def encode(processor: Any, *, tools: str, **row: Any) -> tuple[list[int], list[int]]:
        seen.append(tools)
        return [7] * len(labels), labels

    ids, held = llama_factory.selective(encode, masks)(processor, tools=tools, prompt=[], response=[])
    return ids, held, seen[0]


def test_llama_factorys_labels_are_held_to_the_row_that_its_tools_name(made: ExportConfig, tmp_path: Path) -> None:
    rows = exported(made, "llama-factory", tmp_path)
    masks = Masks(tmp_path / MASKS)
    for row, kept in zip(rows, tiny_run.selected(made), strict=True):
        ids, labels, tools = tokenised(row["visgain"], supervised(kept["token_id"]), masks)
        assert labels == supervised(active(kept))
        assert (ids, tools) == ([7] * len(labels), "")


def test_llama_factory_cannot_take_a_rows_number_for_tools(made: ExportConfig, tmp_path: Path) -> None:
    for row in exported(made, "llama-factory", tmp_path):
        with pytest.raises(json.JSONDecodeError):
            json.loads(row["visgain"])


def test_rows_of_other_datasets_keep_labels_and_tools(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    for tools in ("", '[{"name": "search"}]'):
        assert tokenised(tools, [IGNORED, 3, 4], masks) == ([7, 7, 7], [IGNORED, 3, 4], tools)


def test_another_template_stops_llama_factory(made: ExportConfig, tmp_path: Path) -> None:
    kept = tiny_run.selected(made)[1]
    drifted = [kept["token_id"][0] + 1, *kept["token_id"][1:]]
    with pytest.raises(MaskError, match=f"row {kept['row']}: supervised label 0 "):
        tokenised(llama_factory.row_text(kept["row"]), supervised(drifted), masks_of(made, tmp_path))


def test_a_row_is_shorter_only_where_llama_factory_cuts_it(made: ExportConfig, tmp_path: Path) -> None:
    kept, masks = tiny_run.selected(made)[0], masks_of(made, tmp_path)
    tools, labels = llama_factory.row_text(kept["row"]), supervised(kept["token_id"])[:-2]
    assert tokenised(tools, labels, masks, cutoff_len=len(labels))[1] == [IGNORED, IGNORED, *active(kept)[:-1]]
    with pytest.raises(MaskError, match=r"the first missing is .*, and the row is not cut there"):
        tokenised(tools, labels, masks, cutoff_len=len(labels) + 1)


def test_answers_that_llama_factory_keeps_and_the_scores_do_not_carry_no_loss(
    made: ExportConfig, tmp_path: Path
) -> None:
    """It cuts questions first, so a row of the same maximal length holds more of its answer."""
    kept, masks = tiny_run.selected(made)[0], masks_of(made, tmp_path)
    tools, labels = llama_factory.row_text(kept["row"]), [IGNORED, *kept["token_id"], 5, 5]
    masks.about["max_length"] = "2048"
    assert tokenised(tools, labels, masks, cutoff_len=len(labels))[1] == [IGNORED, *active(kept), IGNORED, IGNORED]
    with pytest.raises(MaskError, match=r"the first too many is 5\. If the row was cut at --max-length 2048 when"):
        tokenised(tools, labels, masks)


def test_tokenisation_takes_its_own_options_alone_and_never_a_cache() -> None:
    options = {"template": "llava", "cutoff_len": 9, "seed": 3, "deepspeed": "z3.json", "bf16": True, "stage": "dpo"}
    kept = llama_factory.tokenising(options, {"template", "cutoff_len", "overwrite_cache"}, "scratch")
    assert {name: kept[name] for name in options if name in kept} == {
        "template": "llava",
        "cutoff_len": 9,
        "seed": 3,
        "stage": "sft",
    }
    assert kept["overwrite_cache"] is True
    assert kept["output_dir"] == "scratch"


def test_what_did_not_arrive_is_counted(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    total = sum(sum(row["keep"]) for row in tiny_run.selected(made))
    assert llama_factory.summary(masks, len(masks), total) == (
        f"{total} of {total} selected tokens carry loss, in {len(masks)} of {len(masks)} rows"
    )
    assert "left the others out" in llama_factory.summary(masks, None, total - 1)


# ---------------------------------------------------------------- ms-swift


class Template:
    """What the plugin needs of ms-swift's class: rows are encoded as `result` says, and what they hold is noted."""

    tokenizer = SimpleNamespace(decode=str)
    max_length = 999

    def __init__(self, result: Any, loss_scale: str = "default", truncation_strategy: str = "raise") -> None:
        self.loss_scale = SimpleNamespace(base_strategy=loss_scale)
        self.truncation_strategy = truncation_strategy
        if isinstance(result, dict) and result.get("labels") is not None:
            result["input_ids"] = [7] * len(result["labels"])
        self.result, self.seen = result, []

    def _encode_truncated(self, inputs: Any) -> Any:
        self.seen.append(inputs.messages)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def template_class(masks: Masks) -> type[Template]:
    """The class with the plugin in it."""
    kind = type("Held", (Template,), {"_encode_truncated": Template._encode_truncated})
    swift.install(kind, swift.Labels(masks))
    return kind


def messages(row: int | None) -> SimpleNamespace:
    answer = {"role": "assistant", "content": "a"} | ({} if row is None else {"loss_scale": swift.row_text(row)})
    return SimpleNamespace(messages=[{"role": "user", "content": "q", "loss_scale": None}, answer])


def test_the_plugin_holds_labels_to_the_row_that_an_answer_names(made: ExportConfig, tmp_path: Path) -> None:
    rows = exported(made, "ms-swift", tmp_path)
    kind = template_class(Masks(tmp_path / MASKS))
    for row, kept in zip(rows, tiny_run.selected(made), strict=True):
        template = kind({"labels": supervised(kept["token_id"]), "loss_scale": None})
        encoded = template._encode_truncated(SimpleNamespace(messages=row["messages"]))
        labels = supervised(active(kept))
        assert encoded == {"labels": labels, "loss_scale": None, "input_ids": [7] * len(labels)}
        assert not any(message.get("loss_scale") for message in template.seen[0])


def test_ms_swift_cannot_take_a_rows_number_for_a_weight(made: ExportConfig, tmp_path: Path) -> None:
    for row in exported(made, "ms-swift", tmp_path):
        [scale] = [message["loss_scale"] for message in row["messages"] if message["loss_scale"] is not None]
        with pytest.raises(TypeError):
            bool(scale > 0.0)


def test_soft_weights_are_told_in_units_of_their_mean(soft: ExportConfig, tmp_path: Path) -> None:
    masks, rows = masks_of(soft, tmp_path), tiny_run.selected(soft)
    kind = template_class(masks)
    weights = [weight for row in rows for weight in row["weight"] if weight]
    mean = sum(weights) / len(weights)
    for kept in rows:
        encoded = kind({"labels": supervised(kept["token_id"])})._encode_truncated(messages(kept["row"]))
        assert encoded["labels"] == supervised(active(kept))
        assert encoded["loss_scale"] == pytest.approx([0, 0, *(weight / mean for weight in kept["weight"]), 0])


@pytest.mark.parametrize("kind", ["made", "soft"])
def test_rows_of_other_datasets_weigh_one(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    template = template_class(masks_of(request.getfixturevalue(kind), tmp_path))
    encoded = template({"labels": [IGNORED, 3, 4]})._encode_truncated(messages(None))
    assert encoded["labels"] == [IGNORED, 3, 4]
    # Where one row of a batch has weights, ms-swift expects them of every row.
    assert encoded.get("loss_scale") == ([0.0, 1.0, 1.0] if kind == "soft" else None)


def test_what_is_not_trained_on_is_left_alone(made: ExportConfig, tmp_path: Path) -> None:
    template = template_class(masks_of(made, tmp_path))
    assert template({"labels": None})._encode_truncated(messages(tiny_run.selected(made)[0]["row"])) == {"labels": None}


def test_no_exception_of_ours_can_be_caught_by_ms_swift(made: ExportConfig, tmp_path: Path) -> None:
    kept = tiny_run.selected(made)[0]
    template = template_class(masks_of(made, tmp_path))
    with pytest.raises(SystemExit, match=f"visgain: row {kept['row']}: supervised label 1 "):
        template({"labels": [*kept["token_id"][:1], 10**6]})._encode_truncated(messages(kept["row"]))
    with pytest.raises(SystemExit, match="split"):
        template([{"labels": kept["token_id"]}])._encode_truncated(messages(kept["row"]))


@pytest.mark.parametrize(
    "option", [{"loss_scale": "last_round"}, {"truncation_strategy": "left"}], ids=lambda option: next(iter(option))
)
def test_ms_swift_may_not_leave_first_turns_out(made: ExportConfig, tmp_path: Path, option: dict[str, str]) -> None:
    """What is left may begin as they do, and would get their masks."""
    kept = tiny_run.selected(made)[0]
    [(name, value)] = option.items()
    template = template_class(masks_of(made, tmp_path))({"labels": kept["token_id"]}, **option)
    with pytest.raises(SystemExit, match=f"visgain: --{name} {value} .*; use --{name} (default|right)"):
        template._encode_truncated(messages(kept["row"]))
    other = template_class(masks_of(made, tmp_path))({"labels": [3]}, **option)
    assert other._encode_truncated(messages(None))["labels"] == [3]


def test_a_row_is_shorter_only_where_ms_swift_cuts_it(
    made: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, labels = tiny_run.selected(made)[0], tiny_run.selected(made)[0]["token_id"][:-1]
    kind = template_class(masks_of(made, tmp_path))
    with pytest.raises(SystemExit, match="and the row is not cut there"):
        kind({"labels": labels})._encode_truncated(messages(kept["row"]))
    monkeypatch.setattr(kind, "max_length", len(labels))
    assert kind({"labels": labels})._encode_truncated(messages(kept["row"]))["labels"] == active(kept)[:-1]


def test_a_row_that_ms_swift_leaves_out_is_told_once(
    made: ExportConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = template_class(masks_of(made, tmp_path))(ValueError("too long"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(ValueError, match="too long"):
                template._encode_truncated(messages(2))
    assert [record.getMessage() for record in caplog.records] == [
        "row 2 is left out by ms-swift, which may take another in its place: too long"
    ]


def test_a_plugin_that_is_read_again_changes_nothing(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    kind = template_class(masks)
    once = kind._encode_truncated
    swift.install(kind, swift.Labels(masks))
    assert kind._encode_truncated is once


def test_the_plugin_takes_effect_by_being_imported(
    made: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(made, "ms-swift", tmp_path)
    kind = type("Held", (Template,), {"_encode_truncated": Template._encode_truncated})
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    theirs = ModuleType("swift.template")
    theirs.Template = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift.template", theirs)
    spec = importlib.util.spec_from_file_location("_plugin", tmp_path / "visgain_swift.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    kept = tiny_run.selected(made)[0]
    encoded = kind({"labels": supervised(kept["token_id"])})._encode_truncated(messages(kept["row"]))
    assert encoded["labels"] == supervised(active(kept))
