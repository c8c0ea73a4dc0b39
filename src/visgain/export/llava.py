"""Export to LLaVA and the trainers that grew out of it: data.json as they read it, masks, and a launcher.

The rows lie in data.json in the order of the masks, so the launcher knows a row by its place; a number over its
pictures and turns (`record_key`) says whether the file is still the one that was written. What these trainers are and
do, and where that was read, is in docs/trainers/llava.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from visgain.data.images import ImageFile
from visgain.errors import ConfigError
from visgain.export.conversations import require_ends_of_turns
from visgain.export.masks import open_masks
from visgain.export.pictures import in_export, picture_paths
from visgain.export.rows import KeptRow, Selected
from visgain.export.shim import write_shim
from visgain.export.shims.llava_labels import record_key
from visgain.storage import atomic_path
from visgain.types import IMAGE_MARK, Sample

DATA = "data.json"
LAUNCHER = "visgain_launch.py"
GUIDE = "docs/trainers/llava.md"

_ROLES = {"user": "human", "assistant": "gpt"}
_BREAKS_COUNTING = ("</s>", " ASSISTANT: ")


@dataclass(frozen=True)
class Llava:
    """`--to llava`."""

    script: ClassVar[str] = "llava/train/train_mem.py"
    arguments: ClassVar[str] = "--data_path {data} --image_folder {images} ..."
    several_pictures: ClassVar[bool] = False  # whether a row may have more than one
    counts_rounds: ClassVar[bool] = True  # whether rows are left without labels where LLaVA's counting does not add up

    def export(self, selected: Selected, out: Path) -> Sequence[str]:
        require_hard(selected)
        require_ends_of_turns(selected, "LLaVA")
        uncounted = 0
        with open_masks(out, selected, ["key"]) as masks, open_json(out / DATA) as write:
            for kept in self._rows(selected):
                record = llava_record(kept, out)
                masks.add(kept, key=record_key(record))
                write(record)
                uncounted += self.counts_rounds and _breaks_counting(kept.sample)
        launcher = write_shim(out, "llava", LAUNCHER)
        arguments = self.arguments.format(data=(out / DATA).absolute(), images=selected.dataset.image_root.absolute())
        return [f"in place of `python {self.script}`: python {launcher} {self.script} {arguments}", *_notes(uncounted)]

    def _rows(self, selected: Selected) -> Iterator[KeptRow]:
        """The kept rows. Raises ConfigError for one that this trainer would misread."""
        for kept in selected:
            if len(kept.sample.images) > 1:
                self._require_readable(kept)
            yield kept

    def _require_readable(self, kept: KeptRow) -> None:
        if not self.several_pictures:
            raise ConfigError(
                f"row {kept.row} has {len(kept.sample.images)} pictures, and this trainer opens one a row; leave such "
                "rows out of the dataset, or use --to llava-next"
            )
        texts = [turn.text for turn in kept.sample.turns if IMAGE_MARK in turn.text]
        if any(text.count(IMAGE_MARK) > 1 and not text.startswith(IMAGE_MARK) for text in texts):
            raise ConfigError(
                f"row {kept.row}: LLaVA-NeXT makes one {IMAGE_MARK} of several in a turn that does not begin with one, "
                "and its pictures would go to other rows of the batch; put one first"
            )


@dataclass(frozen=True)
class LlavaNext(Llava):
    """`--to llava-next`."""

    several_pictures: ClassVar[bool] = True


@dataclass(frozen=True)
class ShareGPT4V(Llava):
    """`--to sharegpt4v`."""

    script: ClassVar[str] = "share4v/train/train_mem.py"


@dataclass(frozen=True)
class TinyLlava(Llava):
    """`--to tinyllava`."""

    script: ClassVar[str] = "tinyllava/train/train.py"


@dataclass(frozen=True)
class Prismatic(Llava):
    """`--to prismatic`."""

    script: ClassVar[str] = "scripts/pretrain.py"
    arguments: ClassVar[str] = '--stage finetune --dataset.finetune_stage_components \'["{data}","{images}"]\' ...'
    counts_rounds: ClassVar[bool] = False


@dataclass(frozen=True)
class OpenQwen2VL(Prismatic):
    """`--to open-qwen2vl`."""


@contextmanager
def open_json(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A writer of a list of rows, one a line, there when all are written. ASCII: who reads it may not say UTF-8."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="ascii") as file:
        before = "["

        def write(record: Mapping[str, Any]) -> None:
            nonlocal before
            file.write(f"{before}\n{json.dumps(record)}")
            before = ","

        yield write
        file.write("\n]\n")


def llava_record(kept: KeptRow, out: Path) -> dict[str, Any]:
    """A row as LLaVA has it. Pictures keep the dataset's path, but for those that are written to `out`."""
    sample = kept.sample
    pairs = zip(sample.images, picture_paths(kept, out), strict=True)
    names = [image.key if isinstance(image, ImageFile) and not in_export(path, out) else path for image, path in pairs]
    picture: dict[str, Any] = {"image": names[0] if len(names) == 1 else names} if names else {}
    turns = [{"from": _ROLES[turn.role], "value": turn.text} for turn in sample.turns]
    return {"id": sample.id, **picture, "conversations": turns}


def require_hard(selected: Selected) -> None:
    """Raises ConfigError for soft weights."""
    if selected.soft:
        raise ConfigError(
            "these trainers take the mean loss over all labels and cannot weigh tokens, which these weights "
            f"({selected.record.get('weights', 'soft')}) ask for; select with --weights hard"
        )


def _breaks_counting(sample: Sample) -> bool:
    """Whether LLaVA, which counts the tokens of each round apart, will not arrive at the number of the whole."""
    empty = any(turn.role == "user" and not turn.text for turn in sample.turns) or not sample.turns[-1].text
    return empty or any(text in turn.text for turn in sample.turns for text in _BREAKS_COUNTING)


def _notes(uncounted: int) -> list[str]:
    if not uncounted:
        return []
    return [
        f"{uncounted:,} rows have an empty question or last answer, an end token or a role in a text: in template v1 "
        f"these trainers give them no label at all, and {LAUNCHER} stops there unless it is told --allow-mismatch"
    ]
