"""Tokenise a selection as LLaMA-Factory does, with loss on the selected tokens alone:

    python visgain_labels.py train.yaml [key=value ...]

The configuration is the one to train with afterwards; `tokenized_path` says where the tokens go, and LLaMA-Factory
takes them from there. Runs without a GPU. Rows of other datasets in `dataset` are left as they are.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from visgain.export.shims.masks import IGNORED, MaskError, Masks

DATASET = "visgain"
"""Our name in dataset_info.json."""

TOKENIZED = "tokenized"
"""Where tokens go in the export's folder."""

_MARK = "tokenise this dataset with visgain_labels.py before training; row "


def row_text(row: int) -> str:
    """What stands in place of a row's tools to say which row it is; no JSON, so that LLaMA-Factory alone stops."""
    return f"{_MARK}{row}"


def selective(encode: Callable[..., Any], masks: Masks) -> Callable[..., Any]:
    """LLaMA-Factory's method that turns a row into input ids and labels, with labels held to the masks."""

    def encode_selected(processor: Any, *, tools: str | None = None, **row: Any) -> tuple[list[int], list[int]]:
        if not tools or not tools.startswith(_MARK):
            return encode(processor, tools=tools, **row)  # type: ignore[no-any-return]
        input_ids, labels = encode(processor, tools="", **row)
        mask = masks.of(int(tools[len(_MARK) :]))
        longest = processor.data_args.cutoff_len
        return input_ids, masks.labels(mask, torch.tensor(labels), torch.tensor(input_ids), longest).tolist()

    return encode_selected


def tokenising(options: dict[str, Any], known: set[str], scratch: str) -> dict[str, Any]:
    """Of a configuration, what tokenisation needs: the same tokens on a machine without a GPU or its libraries."""
    kept = {name: value for name, value in options.items() if name in known or name == "seed"}
    # A cache does not know our labels from others.
    ours = {"stage": "sft", "do_train": True, "use_cpu": True, "report_to": "none", "overwrite_cache": True}
    return {**kept, **ours, "output_dir": scratch}


def summary(masks: Masks, rows: int | None, active: int) -> str:
    """What arrived of the selection; `rows` is None where several rows were packed into one."""
    selected = int(masks.columns["keep"].sum())
    said = f"{active} of {selected} selected tokens carry loss"
    if rows is not None:
        said += f", in {rows} of {len(masks)} rows"
    if active < selected:
        said += "; LLaMA-Factory left the others out, as its options say (cutoff_len, max_samples)"
    return said


def tokenise(options: dict[str, Any], masks: Masks, scratch: str) -> Path:
    """Run LLaMA-Factory's own tokenisation into `tokenized_path`, which is returned. Raises MaskError."""
    from dataclasses import fields

    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments, get_train_args
    from llamafactory.hparams.model_args import BaseModelArguments, ProcessorArguments
    from llamafactory.model import load_tokenizer

    known = {field.name for kind in (DataArguments, BaseModelArguments, ProcessorArguments) for field in fields(kind)}
    model, data, training, _, _ = get_train_args(tokenising(options, known, scratch))
    if data.mask_history:
        raise MaskError(
            "mask_history has LLaMA-Factory train on the last turn of each row alone, and the selection is of the "
            "tokens of all turns; leave it out of the configuration"
        )
    tokenizer = load_tokenizer(model)
    masks.decode = tokenizer["tokenizer"].decode
    SupervisedDatasetProcessor._encode_data_example = selective(SupervisedDatasetProcessor._encode_data_example, masks)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    get_dataset(template, model, data, training, stage="sft", **tokenizer)
    return Path(data.tokenized_path)


def count(path: Path) -> tuple[int, int]:
    """Rows in a tokenised dataset, and labels that carry loss."""
    from datasets import load_from_disk

    rows = active = 0
    for split in load_from_disk(str(path)).values():
        for batch in split.with_format("numpy", columns=["labels"]).iter(batch_size=1000):
            rows += len(batch["labels"])
            active += sum(int((labels != IGNORED).sum()) for labels in batch["labels"])
    return rows, active


def main() -> None:
    """The command. Ends with a message, and without `tokenized_path`, where something is not as it was scored."""
    from llamafactory.hparams import read_args

    options = read_args()
    if not isinstance(options, dict):
        sys.exit("visgain: give the configuration that you train with: python visgain_labels.py train.yaml")
    path = options.get("tokenized_path")
    if not path:
        sys.exit("visgain: the configuration has no tokenized_path; the lines that it needs are in selection.yaml")
    if Path(path).is_dir() and any(Path(path).iterdir()):
        sys.exit(f"visgain: {path} is there already; remove it to tokenise again, or train with it")
    masks = Masks(Path(__file__).with_name("masks.safetensors"))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            done = tokenise(options, masks, scratch)
    except Exception as error:
        if type(error).__name__ != MaskError.__name__:  # from another process it comes as a class of its own
            raise
        sys.exit(f"visgain: {error}")
    rows, active = count(done)
    alone = options.get("dataset") == DATASET
    packed = bool(options.get("packing") or options.get("neat_packing"))
    print(f"{done}: {summary(masks, None if packed else rows, active) if alone else f'{rows} rows, {active} labels'}")


if __name__ == "__main__":
    main()
