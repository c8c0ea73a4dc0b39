"""For ms-swift (`--external_plugins`): its own templates, with loss on the tokens of the selection alone.

Rows of other datasets, without our mark, are left as they are. Whatever is wrong ends the training: ms-swift would
catch an exception, and put another row in the place of the one that is not what was scored.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch

from visgain.export.shims.masks import IGNORED, MaskError, Masks

_MARK = "--external_plugins visgain_swift.py knows the tokens of row "

_logger = logging.getLogger("visgain")


def row_text(row: int) -> str:
    """What stands in place of an answer's `loss_scale` to say which row it is."""
    return f"{_MARK}{row}"


def take_row(messages: list[dict[str, Any]]) -> int | None:
    """The number of the row that these messages are, of which they keep no trace; None if they are not ours."""
    for message in messages:
        text = message.get("loss_scale")
        if isinstance(text, str) and text.startswith(_MARK):
            del message["loss_scale"]
            return int(text[len(_MARK) :])
    return None


class Labels:
    """Holds what ms-swift made of a row to the masks."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        active = self.masks.columns["keep"].sum().item()
        # ms-swift divides by the number of active tokens, so weights are told in units of their mean.
        self.unit = self.masks.columns["weight"].sum(dtype=torch.float64).item() / active if masks.soft else 1.0

    def hold(self, row: int | None, encoded: Any, longest: int | None) -> None:
        """Change `labels` [T] (and `loss_scale` [T], if the selection is soft) of an encoded row in place.

        `row`: None for a row of another dataset, whose every label weighs 1. `longest`: --max_length. Raises MaskError.
        """
        if isinstance(encoded, list):
            raise MaskError("--truncation_strategy split cuts rows in pieces, whose tokens cannot be told apart")
        labels = None if encoded is None else encoded.get("labels")
        if labels is None:  # not training
            return
        labels = torch.as_tensor(labels)
        if row is None:
            weights = (labels != IGNORED).float()
        else:
            ids = torch.as_tensor(encoded["input_ids"])
            weights = self.masks.weights(self.masks.of(row), labels, ids, longest) / self.unit
            encoded["labels"] = labels.masked_fill(weights == 0, IGNORED).tolist()
        if self.masks.soft:
            encoded["loss_scale"] = weights.tolist()


def install(template: Any, labels: Labels) -> None:
    """Let `template`, ms-swift's class, hold what it encodes to the masks."""
    encode = template._encode_truncated
    told: set[int] = set()
    if getattr(encode, "visgain", False):  # ms-swift reads plugins again in its loader's processes
        return

    @functools.wraps(encode)
    def held(self: Any, inputs: Any) -> Any:
        row = take_row(inputs.messages)
        if row is not None:
            _require_all_turns(self)
        try:
            encoded = encode(self, inputs)
        except ValueError as error:
            if row is not None and row not in told:  # ms-swift tries several times
                told.add(row)
                _logger.warning("row %d is left out by ms-swift, which may take another in its place: %s", row, error)
            raise
        labels.masks.decode = self.tokenizer.decode
        try:
            labels.hold(row, encoded, self.max_length)
        except MaskError as error:
            raise SystemExit(f"visgain: {error}") from error
        return encoded

    held.visgain = True  # type: ignore[attr-defined]
    template._encode_truncated = held


def _require_all_turns(template: Any) -> None:
    """Ends the training if ms-swift was told to leave first turns out: what is left may begin as they do."""
    if template.loss_scale.base_strategy == "last_round":
        option, does = "--loss_scale last_round", "trains on the last turn of each row alone"
    elif template.truncation_strategy == "left":
        option, does = "--truncation_strategy left", "cuts rows where they begin"
    else:
        return
    raise SystemExit(
        f"visgain: {option} {does}, and the selection is of the tokens of all turns, from the first on; use "
        f"{'--loss_scale default' if option.endswith('round') else '--truncation_strategy right'}"
    )


def main() -> None:
    from swift.template import Template

    install(Template, Labels(Masks(Path(__file__).with_name("masks.safetensors"))))


if not __package__:  # a plugin takes effect by being imported
    main()
