"""For the Hugging Face Trainer and TRL's SFTTrainer: the user's own collator, with -100 on every label that is not to
carry loss, and a loss that knows weights and survives steps without any label.

    masks = Masks("export/masks.safetensors", decode=processor.tokenizer.decode)
    trainer = Trainer(..., data_collator=SelectiveCollator(collator, masks))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from visgain.export.shims.masks import IGNORED, Mask, MaskError, Masks, logger

ROW = "visgain_row"
"""The field of a row, or of any of its messages, by which a collator knows which row it sees."""

WEIGHT = "visgain_weight"
"""The field of a batch that holds the weights of its labels: float32 [B, T]. Soft selections have it alone."""

_ALIKE = "let all kept tokens count alike, with SelectiveCollator(..., weights=False)"


class SelectedRows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The kept rows of the dataset that was scored, each with its number: `dataset[row]` is any mapping."""

    def __init__(self, dataset: Any, masks: Masks) -> None:
        if len(masks) and int(masks.rows[-1]) >= len(dataset):
            raise MaskError(f"the selection has row {int(masks.rows[-1])}, this dataset has {len(dataset)} rows")
        self.dataset, self.masks = dataset, masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.masks.rows[index])
        return {**self.dataset[row], ROW: row}


class SelectiveCollator:
    """A collator round another one, whose `labels` [B, T] carry loss where the selection says so alone.

    Rows are recognised by the field ROW of the row or of its messages, which `collator` does not get to see.
    `weights`: for a soft selection, True adds WEIGHT to the batch, which the trainers below take, and False has all
    kept tokens count alike. `others`: rows without ROW, of data that was not scored, keep all of their labels, each
    with a weight of 1; else they stop. Raises MaskError where labels are not the tokens that were scored.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        masks: Masks,
        weights: bool | None = None,
        others: bool = False,
    ) -> None:
        if masks.soft and weights is None:
            raise MaskError(
                "this selection has soft weights: say weights=True, and let the trainer be a WeightedLoss "
                "(WeightedSFT with TRL), or weights=False to let all kept tokens count alike"
            )
        self.collator, self.masks, self.weights, self.others = collator, masks, bool(weights) and masks.soft, others
        self._told_other = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        masks = [self._mask(row) for row in rows]
        batch = self.collator([_without_number(row) for row in rows])
        labels = batch["labels"]
        if labels.dim() != 2 or len(labels) != len(rows):
            raise MaskError(
                f"the collator made labels of shape {list(labels.shape)} from {len(rows)} rows; it must give each row "
                "its own labels [T]: wrap a collator that neither packs nor drops rows"
            )
        ids = _ids(batch)
        weights = torch.stack(
            [self._weights(mask, labels[k], None if ids is None else ids[k]) for k, mask in enumerate(masks)]
        )
        batch["labels"] = labels.masked_fill(weights == 0, IGNORED)
        if self.weights:
            batch[WEIGHT] = weights
        return batch

    def _mask(self, row: dict[str, Any]) -> Mask | None:
        """The mask of a row, None if it is of other data."""
        number = _number(row)
        if number is not None:
            return self.masks.of(number)
        names = ", ".join(repr(name) for name in row if name != ROW) or "nothing"
        if not self.others:
            raise MaskError(
                f"a row has no {ROW!r}, only {names}: train on SelectedRows or on the exported file, with "
                "remove_unused_columns=False. To let rows of other data, as of an eval_dataset, keep all of their "
                "labels, say SelectiveCollator(..., others=True)"
            )
        if not self._told_other:
            self._told_other = True
            logger.warning(
                "a row has no %r, only %s, and keeps all of its labels (others=True); if it is one of the selection, "
                "set remove_unused_columns=False; further rows like it are not told",
                ROW,
                names,
            )
        return None

    def _weights(self, mask: Mask | None, labels: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        return (labels != IGNORED).float() if mask is None else self.masks.weights(mask, labels, ids)


def _ids(batch: Any) -> torch.Tensor | None:
    """What stands at each label, -100 for padding; None where the batch does not say."""
    ids: torch.Tensor | None = batch.get("input_ids")
    attended = batch.get("attention_mask")
    if ids is None or attended is None or not ids.shape == attended.shape == batch["labels"].shape:
        return None
    return ids.masked_fill(attended == 0, IGNORED)


def _number(row: dict[str, Any]) -> int | None:
    """`datasets` fills in None where a row or a message that somebody added has no such field."""
    places = (row, *(row.get("messages") or ()))
    return next((int(place[ROW]) for place in places if place.get(ROW) is not None), None)


def _without_number(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it was, less what `datasets` adds: a field that one part has becomes None in all others."""
    row = {name: value for name, value in row.items() if name != ROW}
    if row.get("messages"):
        row["messages"] = [_message(message) for message in row["messages"]]
    return row


def _message(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if name != ROW and value is not None}
    if isinstance(message.get("content"), list):
        message["content"] = [{k: v for k, v in part.items() if v is not None} for part in message["content"]]
    return message


class WeightedLoss:
    """`class MyTrainer(WeightedLoss, Trainer)`: the loss is sum(weight * nll) / sum(weight) over an optimiser step.

    Without WEIGHT in the batch every label counts as one. A step without any label is a loss of 0 and not nan.
    `label_smoothing_factor` smooths each nll over the vocabulary, as Trainer's own loss does.
    """

    loss_is_scaled_for_ga = True  # by get_batch_samples, which sees the whole step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # what versions before `loss_is_scaled_for_ga` ask

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one step, and the sum of their weights over all devices."""
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return batches, _total(self, batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        if num_items_in_batch is not None and not model.training:  # not of get_batch_samples: it counts labels here
            num_items_in_batch = _total(self, [inputs])
        labels, weight = inputs.pop("labels"), inputs.pop(WEIGHT, None)
        outputs = model(**inputs)
        weight = _shifted(labels, weight)
        nll = cross_entropy(
            outputs.logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.args.label_smoothing_factor,  # type: ignore[attr-defined]
        )
        total = weight.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (nll.view_as(weight) * weight).sum() / _not_zero(total)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
            loss = loss * self.accelerator.num_processes  # type: ignore[attr-defined] # gradients are averaged over devices
        return (loss, outputs) if return_outputs else loss


class WeightedSFT:
    """`class MyTrainer(WeightedSFT, SFTTrainer)`: the same for TRL's trainer, whose fused head it keeps.

    It multiplies the log-probabilities that the head returns. TRL guards steps without labels itself. Raises MaskError
    where TRL makes its loss of anything else. Without WEIGHT in the batch the loss is TRL's own.
    """

    _per_label = 1.0
    """What turns TRL's division by the number of labels of a step into one by the sum of their weights."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if count is not None:
            self._per_label = count / _not_zero(_total(self, batches))
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if WEIGHT not in inputs:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._need_log_probs()
        inputs = dict(inputs)
        weight = _shifted(inputs["labels"], inputs.pop(WEIGHT))
        per_label = self._per_label
        if num_items_in_batch is None:
            per_label = (inputs["labels"][:, 1:] != IGNORED).sum() / _not_zero(weight.sum())

        weighed = False

        def weigh(_module: Any, _inputs: Any, outputs: Any) -> None:
            nonlocal weighed
            if getattr(outputs, "log_probs", None) is not None:
                outputs.log_probs = outputs.log_probs * weight * per_label
                weighed = True

        hook = model.register_forward_hook(weigh)
        try:
            loss = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        finally:
            hook.remove()
        if not weighed:
            raise MaskError(f"this version of TRL has no head whose log-probabilities could be weighed: {_ALIKE}")
        return loss

    def _need_log_probs(self) -> None:
        """With these settings the weights would change nothing, or the wrong thing, and nobody would see it."""
        smoothing = self.args.label_smoothing_factor  # type: ignore[attr-defined]
        kind = getattr(self.args, "loss_type", "nll")  # type: ignore[attr-defined]
        for what, there in (
            (f"loss_type={kind!r}", kind != "nll"),
            (f"label_smoothing_factor={smoothing}", smoothing != 0),
            ("compute_loss_func", getattr(self, "compute_loss_func", None) is not None),
        ):
            if there:
                raise MaskError(f"WeightedSFT cannot weigh SFTTrainer's loss with {what}: leave it out, or {_ALIKE}")


def _shifted(labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Weights of what positions 0 to T - 2 predict: float32 [B, T - 1]."""
    return ((labels != IGNORED).float() if weight is None else weight.to(labels.device))[:, 1:]


def _total(trainer: Any, batches: Sequence[Any]) -> Any:
    """Sum of the weights of several batches, over all devices where Trainer counts labels over all of them."""
    total = sum((_shifted(batch["labels"], batch.get(WEIGHT)).sum() for batch in batches), torch.zeros(()))
    if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
        total = trainer.accelerator.gather(total.to(trainer.args.device)).sum()
    return total.to(trainer.args.device)


def _not_zero(total: Any) -> Any:
    total = torch.as_tensor(total)
    return total + (total == 0)
