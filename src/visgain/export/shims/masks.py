"""Which answer tokens of which rows carry loss: reads masks.safetensors and holds a trainer's labels to it.

Needs torch (1.10 or newer) and the standard library (Python 3.9 or newer).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label that carries no loss."""

logger = logging.getLogger("visgain")

_NEARLY = 0.9
"""The part of --max-length from which on a row may have been cut there: its prompt may be shorter in the trainer, as it
is without a system prompt."""

_TYPES = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32, "BOOL": torch.bool}


class MaskError(ValueError):
    """What a trainer makes of a row is not what was scored."""


class Mask(NamedTuple):
    """One row: its answer tokens as they were scored, and what each is worth."""

    row: int
    token_id: Tensor  # int32 [A]
    keep: Tensor  # bool [A]
    weight: Tensor  # float32 [A], 0 where keep is false


def content_key(*texts: str) -> int:
    """A 64-bit signed number for texts that both sides see, such as image paths: a column of masks.safetensors."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class Masks:
    """The masks of all kept rows, mapped and not read: loader processes share them, and opening takes no time.

    `decode`: turns a list of ids into text, to make messages readable; a tokenizer's `decode` will do.
    """

    def __init__(self, path: Any, decode: Callable[[list[int]], str] | None = None) -> None:
        self.path = str(path)
        self.decode = decode
        self.told: dict[str, int] = {}  # "cut": rows whose scores end early
        self._told_short = False
        self._open()

    def _open(self) -> None:
        if sys.byteorder != "little":
            raise MaskError("masks.safetensors is little endian, this machine is not")
        with Path(self.path).open("rb") as file:
            # Private, because torch wants memory that may be written to.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        self.about: dict[str, str] = header.pop("__metadata__", {})
        if self.about.get("format") != "visgain-masks-1":
            raise MaskError(f"{self.path} holds no masks of this version; run `visgain export` again")
        self.columns: dict[str, Tensor] = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            kind, count = _TYPES[entry["dtype"]], entry["shape"][0]
            there = torch.frombuffer(content, dtype=kind, count=count, offset=8 + size + start) if end > start else None
            self.columns[name] = torch.empty(0, dtype=kind) if there is None else there
        self.rows = self.columns["row"]
        self._by_key: dict[int, list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "decode": self.decode, "told": self.told, "_told_short": self._told_short}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def soft(self) -> bool:
        """Whether active tokens have weights other than 1."""
        return "weight" in self.columns

    def at(self, index: int) -> Mask:
        """The index-th kept row, from 0: the order of every file that the exporter wrote."""
        if not 0 <= index < len(self):
            raise MaskError(f"there is no kept row {index}, {self.path} holds {len(self)}: is the data file its own?")
        first, last = self.columns["first"][index : index + 2].tolist()
        keep = self.columns["keep"][first:last]
        weight = self.columns["weight"][first:last] if self.soft else keep.float()
        return Mask(int(self.rows[index]), self.columns["token_id"][first:last], keep, weight)

    def of(self, row: int) -> Mask:
        """The mask of a row of the dataset that was scored."""
        index = int(torch.searchsorted(self.rows, row))
        if index == len(self) or int(self.rows[index]) != row:
            raise MaskError(f"row {row} is not in the selection; train on the rows that it keeps (Masks.rows)")
        return self.at(index)

    def matching(self, key: int, labels: Tensor) -> list[int]:
        """Indices (as `at` takes them) of the rows whose column `key` is this and whose answer tokens begin with the
        supervised ones of `labels`, ascending: none, one, or several that only `keep` may tell apart.
        """
        if self._by_key is None:
            self._by_key = {}
            for index, value in enumerate(self.columns["key"].tolist()):
                self._by_key.setdefault(value, []).append(index)
        found = labels[labels != IGNORED]
        return [index for index in self._by_key.get(key, ()) if _begins(self.at(index).token_id, found)]

    def labels(self, mask: Mask, labels: Tensor, ids: Tensor | None = None, longest: int | None = None) -> Tensor:
        """`labels` [T] with -100 on every supervised token that is not to carry loss. Otherwise as `weights`."""
        return labels.masked_fill(self.weights(mask, labels, ids, longest) == 0, IGNORED)

    def weights(self, mask: Mask, labels: Tensor, ids: Tensor | None = None, longest: int | None = None) -> Tensor:
        """The weight of each position of `labels` [T], float32: 0 where it is -100 or not to carry loss.

        The k-th label other than -100 must be the k-th token that was scored. A row that ends early (cut at the
        trainer's own maximal length) keeps the mask of what is left, and of one whose scores end early (cut at
        --max-length) nothing behind them carries loss. Raises MaskError at the first difference.

        `ids` [T]: the row's input ids, -100 for padding; without them every row may have ended early, and no scores.
        `longest`: the trainer's maximal length, where it is known: shorter rows cannot have been cut.
        """
        n_scored = len(mask.token_id)
        if ids is not None and self._may_be_cut(int((ids != IGNORED).sum()), longest):
            labels = self.without_excess(mask, labels)
        supervised = labels != IGNORED
        found = labels[supervised].to(device="cpu")
        if not _begins(mask.token_id, found) or (
            ids is not None and len(found) < n_scored and _goes_on(mask, labels, ids, longest)
        ):
            raise MaskError(self._difference(mask, found))
        if len(found) < n_scored and not self._told_short:
            self._told_short = True
            logger.warning(
                "row %d: %d of %d answer tokens that were scored are supervised, as if cut at a maximal length; "
                "further rows like it are not told",
                mask.row,
                len(found),
                n_scored,
            )
        weights = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        weights[supervised] = mask.weight[: len(found)].to(labels.device)
        return weights

    def without_excess(self, mask: Mask, labels: Tensor) -> Tensor:
        """`labels` [T] without those behind the last scored token, for a row that may have been cut when scored."""
        supervised = (labels != IGNORED).nonzero()[:, 0]
        n_scored = len(mask.token_id)
        scored = labels[supervised[:n_scored]].to(device="cpu")
        if len(supervised) <= n_scored or "max_length" not in self.about or not _begins(mask.token_id, scored):
            return labels
        if "cut" not in self.told:
            logger.warning(
                "row %d: %d of %d labels were scored, as if the scores were cut at --max-length %s; the others carry "
                "no loss; further rows like it are not told",
                mask.row,
                n_scored,
                len(supervised),
                self.about["max_length"],
            )
        self.told["cut"] = self.told.get("cut", 0) + 1
        labels = labels.clone()
        labels[supervised[n_scored:]] = IGNORED
        return labels

    def _may_be_cut(self, length: int, longest: int | None) -> bool:
        """Whether a row of this length in the trainer may have been longer than --max-length when it was scored."""
        if "max_length" not in self.about:
            return False
        # What the trainer has cut was longer, and LLaMA-Factory cuts questions to keep answers.
        return length >= _NEARLY * int(self.about["max_length"]) or (longest is not None and length >= longest)

    def _difference(self, mask: Mask, found: Tensor) -> str:
        """What differs first, and what to do about it."""
        scored, here = mask.token_id.tolist(), found.tolist()
        n_same = min(len(scored), len(here))
        at = next((k for k in range(n_same) if scored[k] != here[k]), n_same)
        counts = f"{len(here)} labels are supervised, and {len(scored)} were scored"
        if at < n_same:
            what = f"supervised label {at} is {self._name(here[at])}, and {self._name(scored[at])} was scored"
        elif len(here) > len(scored):
            what = f"{counts}; the first too many is {self._name(here[at])}"
        else:
            what = f"{counts}; the first missing is {self._name(scored[at])}, and the row is not cut there"
        said = [f"{name} {self.about[name]}" for name in ("model", "template", "max_length") if name in self.about]
        hint = ""
        if self.about.get("end_of_turn") == "ignore":
            hint = "; the scores leave out the ends of turns, so the trainer must too, or score without --end-of-turn"
        return (
            f"row {mask.row}: {what}. {self._reason(scored, here, at)}Tokenizer, chat template or the trainer's choice "
            f"of supervised tokens differ from what was scored ({', '.join(said) or 'nothing is known of it'}){hint}. "
            "Train with those, or score and select again with a model folder that holds this trainer's tokenizer and "
            "chat template"
        )

    def _reason(self, scored: list[int], here: list[int], at: int) -> str:
        """What else than another template may have made the difference at `at`."""
        # Two ends of turns in a row, or one before anything else: an answer without a token.
        if at < len(here) and here[at] == here[-1] and (at == 0 or here[at - 1] == here[at]):
            return (
                "If one of its answers is empty, that is why: the trainer supervises the end of such a turn, and none "
                "was scored; leave such rows out of the dataset and score again. Otherwise: "
            )
        if at == len(scored) and "max_length" in self.about:
            return (
                f"If the row was cut at --max-length {self.about['max_length']} when it was scored, score and select "
                "again with a larger one, and larger than the trainer's. Otherwise: "
            )
        return ""

    def _name(self, token: int) -> str:
        return str(token) if self.decode is None else f"{token} ({self.decode([token])!r})"


def _begins(scored: Tensor, found: Tensor) -> bool:
    """Whether the ids `found` [a] are the first of `scored` [A]."""
    return len(found) <= len(scored) and bool(torch.equal(scored[: len(found)].to(found.dtype), found))


def _goes_on(mask: Mask, labels: Tensor, ids: Tensor, longest: int | None) -> bool:
    """Whether a row with fewer labels than scored tokens is not cut, but has the next one without a label."""
    if longest is not None:
        return int((ids != IGNORED).sum()) < longest
    supervised = (labels != IGNORED).nonzero()[:, 0].tolist()
    # A row may be cut in a question: it ends behind its last label, but not with the token that comes next.
    behind = ids[supervised[-1] + 1 :] if supervised else ids[:0]
    return len(behind) > 0 and int(behind[0]) == int(mask.token_id[len(supervised)])
