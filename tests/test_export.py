"""A selection as files for other trainers: kept rows joined to their dataset, masks, shims as single files."""

from __future__ import annotations

import ast
import importlib.util
import json
import pickle
import subprocess
import sys
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from visgain import storage
from visgain.config import ExportConfig
from visgain.data import open_dataset
from visgain.errors import DataError, StorageError, UnknownName
from visgain.export import EXPORTERS, Exporter
from visgain.export.masks import MASKS, open_masks, write_masks
from visgain.export.rows import Selected, open_selected
from visgain.export.run import RECORD, run_export
from visgain.export.shim import shim_source
from visgain.export.shims.hf import ROW, SelectiveCollator
from visgain.export.shims.masks import IGNORED, MaskError, Masks, content_key


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ExportConfig:
    return tiny_run.to_export(tmp_path_factory.mktemp("export"), "hf")


@pytest.fixture(scope="module")
def soft(made: ExportConfig, tmp_path_factory: pytest.TempPathFactory) -> ExportConfig:
    return tiny_run.softened(made, tmp_path_factory.mktemp("soft"))


def masks_of(config: ExportConfig, out: Path) -> Masks:
    write_masks(out, open_selected(config))
    return Masks(out / MASKS)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def supervised(token_id: list[int], before: int = 3, after: int = 2) -> torch.Tensor:
    """Labels of a row whose answer stands behind a prompt and before padding."""
    return torch.tensor([IGNORED] * before + token_id + [IGNORED] * after)


# ---------------------------------------------------------------- rows


def test_rows_come_in_order_with_their_samples_and_masks(made: ExportConfig) -> None:
    rows = list(open_selected(made))
    assert [kept.row for kept in rows] == [row["row"] for row in tiny_run.selected(made)]
    assert [kept.index for kept in rows] == list(range(len(rows)))
    for kept, row in zip(rows, tiny_run.selected(made), strict=True):
        assert kept.sample.id == row["id"]
        assert kept.token_id.tolist() == row["token_id"]
        assert kept.keep.tolist() == row["keep"]
        assert kept.weight.tolist() == [float(keep) for keep in row["keep"]]


def test_soft_weights_come_along(soft: ExportConfig) -> None:
    rows = tiny_run.selected(soft)
    assert len({weight for row in rows for weight in row["weight"]}) > 3
    assert [kept.weight.tolist() for kept in open_selected(soft)] == [row["weight"] for row in rows]


def test_a_row_that_changed_since_it_was_scored_stops_the_export(made: ExportConfig, tmp_path: Path) -> None:
    rows = json.loads(made.data.read_text())
    rows[3]["conversations"][1]["value"] += " Really."
    (tmp_path / "data.json").write_text(json.dumps(rows))
    changed = replace(made, data=tmp_path / "data.json", image_root=made.data.parent, out=tmp_path / "out")
    with pytest.raises(DataError, match=r"data.json changed since it was scored \(row 3\)"):
        list(open_selected(changed))


def test_another_dataset_is_told_before_its_rows_are_read(made: ExportConfig, tmp_path: Path) -> None:
    folder = tmp_path / "selection"
    table = storage.read_selection_table(made.selection)
    record = json.loads((made.selection / "selection.json").read_text())
    storage.write_selection(folder, [table], {**record, "identity": {"data_fingerprint": "of another"}})
    with pytest.raises(DataError, match="is another dataset"):
        open_selected(replace(made, selection=folder))


def test_an_empty_selection_is_refused(made: ExportConfig, tmp_path: Path) -> None:
    storage.write_selection(tmp_path / "selection", [], {"rule": "sample"})
    with pytest.raises(DataError, match="keeps no rows"):
        open_selected(replace(made, selection=tmp_path / "selection"))


# ---------------------------------------------------------------- masks


def test_masks_read_back_as_the_selection_has_them(made: ExportConfig, tmp_path: Path) -> None:
    masks, rows = masks_of(made, tmp_path), tiny_run.selected(made)
    assert len(masks) == len(rows)
    for index, row in enumerate(rows):
        for mask in (masks.at(index), masks.of(row["row"])):
            assert mask.row == row["row"]
            assert mask.token_id.tolist() == row["token_id"]
            assert mask.keep.tolist() == row["keep"]
            assert mask.weight.tolist() == [float(keep) for keep in row["keep"]]


def test_masks_are_what_safetensors_reads(soft: ExportConfig, tmp_path: Path) -> None:
    masks_of(soft, tmp_path)
    columns, rows = load_file(tmp_path / MASKS), tiny_run.selected(soft)
    assert columns["row"].tolist() == [row["row"] for row in rows]
    assert columns["token_id"].tolist() == [token for row in rows for token in row["token_id"]]
    assert columns["keep"].tolist() == [keep for row in rows for keep in row["keep"]]
    assert columns["weight"].tolist() == [weight for row in rows for weight in row["weight"]]
    assert columns["first"].tolist() == [0, *np.cumsum([len(row["keep"]) for row in rows]).tolist()]


def test_masks_do_not_depend_on_how_many_rows_are_written_at_a_time(
    soft: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks_of(soft, tmp_path / "one")
    monkeypatch.setattr("visgain.export.masks._BUFFER_ROWS", 3)
    masks_of(soft, tmp_path / "other")
    assert (tmp_path / "one" / MASKS).read_bytes() == (tmp_path / "other" / MASKS).read_bytes()


def test_further_columns_find_rows_by_what_both_sides_see(made: ExportConfig, tmp_path: Path) -> None:
    selected = open_selected(made)
    with open_masks(tmp_path, selected, columns=["key"]) as writer:
        for kept in selected:
            writer.add(kept, key=content_key(*(image.key for image in kept.sample.images)))
    masks, rows = Masks(tmp_path / MASKS), list(selected)
    for kept in rows:
        key = content_key(*(image.key for image in kept.sample.images))
        found = masks.matching(key, supervised(kept.token_id.tolist()))
        assert kept.index in found
        assert all(rows[index].token_id.tolist() == kept.token_id.tolist() for index in found)
    assert masks.matching(content_key("nowhere.png"), supervised(rows[0].token_id.tolist())) == []


def test_masks_that_lack_rows_are_not_written(made: ExportConfig, tmp_path: Path) -> None:
    selected = open_selected(made)
    with pytest.raises(StorageError, match=r"1 of \d+ kept rows"), open_masks(tmp_path, selected) as writer:
        writer.add(next(iter(selected)))
    assert not list(tmp_path.iterdir())


def test_masks_travel_to_loader_processes(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    there = pickle.loads(pickle.dumps(masks))
    assert len(pickle.dumps(masks)) < 1000
    assert there.at(2).token_id.tolist() == masks.at(2).token_id.tolist()


# ---------------------------------------------------------------- the rule


def test_exactly_the_kept_tokens_keep_their_label(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    for index, row in enumerate(tiny_run.selected(made)):
        labels = masks.labels(masks.at(index), supervised(row["token_id"]))
        active = [token if keep else IGNORED for token, keep in zip(row["token_id"], row["keep"], strict=True)]
        assert labels.tolist() == supervised(active).tolist()


def test_it_does_not_matter_where_the_labels_stand(made: ExportConfig, tmp_path: Path) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    spread = torch.full((4 * len(row["token_id"]),), IGNORED)
    spread[1::4] = torch.tensor(row["token_id"])
    labels = masks.labels(masks.at(0), spread)
    assert labels[1::4].tolist() == [t if k else IGNORED for t, k in zip(row["token_id"], row["keep"], strict=True)]
    assert (labels != IGNORED).sum() == sum(row["keep"])


def test_a_row_that_is_cut_keeps_the_mask_of_what_is_left(
    made: ExportConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    for _ in range(2):
        labels = masks.labels(masks.at(0), supervised(row["token_id"][:4]))
        assert (labels != IGNORED).tolist() == [False] * 3 + row["keep"][:4] + [False] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"row 0: 4 of {len(row['keep'])} answer tokens that were scored are supervised, as if cut at a maximal length; "
        "further rows like it are not told"
    ]


def test_the_first_difference_stops_and_says_row_place_both_ids_and_what_to_do(
    made: ExportConfig, tmp_path: Path
) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[1]
    other = list(row["token_id"])
    other[2], other[4] = 7, 8
    masks.decode = lambda ids: f"word{ids[0]}"
    scored = row["token_id"][2]
    told = rf"row {row['row']}: supervised label 2 is 7 \('word7'\), and {scored} \('word{scored}'\) was scored"
    with pytest.raises(MaskError, match=told) as error:
        masks.labels(masks.at(1), supervised(other))
    assert "model tiny <model>, template auto" in str(error.value)
    assert "score and select again" in str(error.value)


def test_more_labels_than_were_scored_stop(made: ExportConfig, tmp_path: Path) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    n = len(row["token_id"])
    with pytest.raises(MaskError, match=f"{n + 1} labels are supervised, and {n} were scored; the first too many is 5"):
        masks.labels(masks.at(0), supervised([*row["token_id"], 5]))


def test_what_the_scores_have_cut_carries_no_loss(
    made: ExportConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    labels = supervised([*row["token_id"], 5, 6])
    ids = labels.masked_fill(labels == IGNORED, 7)
    expected = supervised([t if k else IGNORED for t, k in zip(row["token_id"], row["keep"], strict=True)], after=4)
    for length in (len(ids), len(ids) + 1):
        masks.about["max_length"] = str(length)
        for _ in range(2):
            assert masks.labels(masks.at(0), labels, ids).tolist() == expected.tolist()
    assert masks.told == {"cut": 4}
    assert pickle.loads(pickle.dumps(masks)).told == {"cut": 4}
    assert [record.getMessage() for record in caplog.records] == [
        f"row 0: {len(row['keep'])} of {len(row['keep']) + 2} labels were scored, as if the scores were cut at "
        f"--max-length {len(ids)}; the others carry no loss; further rows like it are not told"
    ]


def test_labels_too_many_stop_in_a_row_that_the_scores_cannot_have_cut(made: ExportConfig, tmp_path: Path) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    labels = supervised([*row["token_id"], 5])
    masks.about["max_length"] = str(2 * len(labels))
    told = f"If the row was cut at --max-length {2 * len(labels)} when it was scored, score and select again with a lar"
    with pytest.raises(MaskError, match=told):
        masks.labels(masks.at(0), labels, labels)
    padded = torch.cat([labels, torch.full((2 * len(labels),), IGNORED)])  # padding is no part of a row
    with pytest.raises(MaskError, match=told):
        masks.labels(masks.at(0), padded, padded)
    masks.about["max_length"] = str(len(labels))
    other = supervised([row["token_id"][0] + 1, *row["token_id"], 5])
    with pytest.raises(MaskError, match="supervised label 0 is"):
        masks.labels(masks.at(0), other, other)


def test_a_row_that_goes_on_behind_its_last_label_is_not_cut(made: ExportConfig, tmp_path: Path) -> None:
    """A template whose end of turn carries no loss looks like a cut, but for the token that is there."""
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    labels = supervised([*row["token_id"][:-1], IGNORED])
    ids = supervised(row["token_id"])
    with pytest.raises(MaskError, match=f"the first missing is {row['token_id'][-1]}, and the row is not cut there"):
        masks.labels(masks.at(0), labels, ids)
    for behind in (IGNORED, row["token_id"][-1] + 1):  # padding, and a question
        ids[-3] = behind
        assert (masks.labels(masks.at(0), labels, ids) != IGNORED).sum() == sum(row["keep"][:-1])


def test_a_row_is_cut_only_at_the_trainers_own_length(made: ExportConfig, tmp_path: Path) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    labels = supervised(row["token_id"][:-1], after=0)
    ids = labels.masked_fill(labels == IGNORED, 7)
    assert (masks.labels(masks.at(0), labels, ids, len(ids)) != IGNORED).sum() == sum(row["keep"][:-1])
    with pytest.raises(MaskError, match="and the row is not cut there"):
        masks.labels(masks.at(0), labels, ids, len(ids) + 1)


def test_a_collators_batch_says_where_its_rows_end(made: ExportConfig, tmp_path: Path) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    labels = supervised([*row["token_id"][:-1], IGNORED])[None]
    ids = supervised(row["token_id"])[None]
    for attended, stops in ((torch.ones_like(ids), True), ((labels != IGNORED).long(), False)):  # or it is padding
        batch = {"input_ids": ids, "attention_mask": attended, "labels": labels}
        collator = SelectiveCollator(lambda rows, batch=batch: dict(batch), masks)
        with pytest.raises(MaskError, match="the row is not cut there") if stops else nullcontext():
            assert (collator([{ROW: row["row"]}])["labels"] != IGNORED).sum() == sum(row["keep"][:-1])


@pytest.mark.parametrize("first", [False, True])
def test_an_empty_answer_is_told_where_it_may_be_the_reason(made: ExportConfig, tmp_path: Path, first: bool) -> None:
    masks, row = masks_of(made, tmp_path), tiny_run.selected(made)[0]
    end = row["token_id"][-1]
    answers = [end, *row["token_id"]] if first else [*row["token_id"], end]
    with pytest.raises(MaskError, match="If one of its answers is empty, that is why"):
        masks.labels(masks.at(0), supervised(answers))
    with pytest.raises(MaskError) as error:
        masks.labels(masks.at(0), supervised([end + 1, *row["token_id"][1:]]))
    assert "empty" not in str(error.value)


def test_a_row_that_is_not_kept_is_told(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    left_out = next(row for row in range(100) if row not in masks.rows.tolist())
    with pytest.raises(MaskError, match=f"row {left_out} is not in the selection"):
        masks.of(left_out)
    with pytest.raises(MaskError, match="there is no kept row 99"):
        masks.at(99)


def test_scores_without_ends_of_turns_are_told_where_they_may_be_the_reason(made: ExportConfig, tmp_path: Path) -> None:
    masks = masks_of(made, tmp_path)
    masks.about["end_of_turn"] = "ignore"
    with pytest.raises(MaskError, match="the scores leave out the ends of turns"):
        masks.labels(masks.at(0), supervised([7]))


# ---------------------------------------------------------------- shims


def test_a_shim_is_one_file_that_needs_torch_and_the_standard_library_alone(made: ExportConfig, tmp_path: Path) -> None:
    run_export(replace(made, out=tmp_path / "out"))
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'visgain', 'transformers', 'pyarrow', 'safetensors'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from visgain_collator import Masks, SelectiveCollator\n"
        "masks = Masks('masks.safetensors')\n"
        "print(len(masks), masks.at(0).token_id.tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = tiny_run.selected(made)
    assert done.stdout.strip() == f"{len(rows)} {rows[0]['token_id']}"


def test_every_shim_stands_alone() -> None:
    folder = Path(shim_source.__code__.co_filename).parent / "shims"
    for path in folder.glob("*.py"):
        if path.stem != "__init__":
            source = shim_source(path.stem)
            defined = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
            assert len(defined) == len(set(defined)), "another shim is there twice"
            assert "visgain.export" not in source
            assert source.count("from __future__") == 1


# ---------------------------------------------------------------- the verb


def test_every_exporter_follows_the_protocol() -> None:
    for name in EXPORTERS.names():
        assert isinstance(EXPORTERS.make(name), Exporter)


def test_the_record_says_what_was_exported_and_is_complete_at_the_end(made: ExportConfig, tmp_path: Path) -> None:
    done = run_export(replace(made, out=tmp_path / "out"))
    record, rows = json.loads((tmp_path / "out" / RECORD).read_text()), tiny_run.selected(made)
    assert record["complete"] is True
    assert record["to"] == "hf"
    assert record["rows"] == done.rows == len(rows)
    assert record["tokens"] == done.tokens == sum(len(row["keep"]) for row in rows)
    assert record["active_tokens"] == done.active_tokens == sum(sum(row["keep"]) for row in rows)
    assert record["selection"] == storage.file_hash(made.selection / "selection.parquet")


def test_an_export_that_fails_is_not_complete(
    made: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Selected) -> Any:
        raise DataError("row 1 is gone")

    config = replace(made, out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Selected, "__iter__", stop)
        with pytest.raises(DataError, match="is gone"):
            run_export(config)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["complete"] is False
    run_export(config)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["complete"] is True


def test_a_folder_with_other_files_is_left_alone(made: ExportConfig, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("mine")
    with pytest.raises(StorageError, match="holds files that are not of an export; use another --out"):
        run_export(replace(made, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_an_unknown_trainer_is_told_with_the_nearest(made: ExportConfig, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'trl'"):
        run_export(replace(made, to="trll", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visgain.export.masks._BUFFER_ROWS", 4)
    monkeypatch.setattr("visgain.storage._CHUNK_ROWS", 4)

    def peak(n: int) -> int:
        folder = tmp_path / str(n)
        folder.mkdir()
        rows = [{"id": str(k), "conversations": tiny_run.conversation("Q?", f"Answer {k}.")} for k in range(n)]
        (folder / "data.json").write_text(json.dumps(rows))
        samples = map(open_dataset(folder / "data.json").__getitem__, range(n))
        table = pa.Table.from_pydict(
            {
                "row": range(n),
                "id": map(str, range(n)),
                "fingerprint": [sample.fingerprint for sample in samples],
                "token_id": [[1] * 20_000] * n,
                "keep": [[True] * 20_000] * n,
            },
            schema=storage.SELECTION_SCHEMA,
        )
        storage.write_selection(folder / "selection", [table.slice(k, 10) for k in range(0, n, 10)], {"rule": "x"})
        config = ExportConfig(selection=folder / "selection", data=folder / "data.json", to="hf", out=folder / "out")
        selected = open_selected(config)
        tracemalloc.start()
        write_masks(folder / "out", selected)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)  # what is imported and cached once
    assert peak(80) < 1.3 * peak(20)
