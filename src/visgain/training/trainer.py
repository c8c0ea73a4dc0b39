"""Hugging Face's Trainer with our step: the rows of a step in as few passes as there is room for, one loss over all.

Trainer's own unit is a micro-batch, of which a step accumulates several. Here its unit is the whole step: the data
loader gives each rank its share of the step's rows, and the step cuts the share into passes (visgain.training.packing).
Everything around the step is Trainer's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import DistributedType
from jaxtyping import Float32
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel

from visgain.errors import ConfigError, TrainingError
from visgain.scoring.claims import Rank
from visgain.training.checkpoint import CheckpointedTrainer
from visgain.training.collate import TrainingRow
from visgain.training.known import KnownRows
from visgain.training.logs import Pace
from visgain.training.loss import averaged_by_micro_batch, summed_weight, weighed
from visgain.training.optimiser import divide_by_rate
from visgain.training.packing import PADDED, WAYS, Choice, Way, choose_way, coarsest, cut, go_together, laid_out
from visgain.training.ranks import from_first
from visgain.training.recipe import Recipe
from visgain.training.refresh import Decided, Refresh, Rounds
from visgain.training.steps import Steps
from visgain.vlm.families import in_no_part, part_of
from visgain.vlm.logits import replaced_forward

PACK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of a pack by default, by device."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Ids of tokens that batches are made with."""

    image: int
    pad: int


class Tally(NamedTuple):
    """What the ranks tell each other about a step."""

    weight: float  # of the active tokens
    active_tokens: float
    micro_batches: float
    passes: float


class SelectiveTrainer(CheckpointedTrainer):
    """Trainer whose loss is the weighted cross-entropy of the active tokens alone.

    `train_dataset` is Rows; an optimiser step takes `recipe.batch_size` of them, on all ranks together. `refresh`, with
    RefreshedRows, decides while training which those are.
    """

    def __init__(self, *, recipe: Recipe, tokens: Tokens, refresh: Refresh | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.refresh = refresh
        self.tokens = tokens
        self.known = KnownRows(self.train_dataset)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.way = self._choose_way()
        self.pace = Pace(self.active_tokens)
        self.pictures_matter = trains_more_than_language(self._inner(self.model))
        if self.is_world_process_zero() and (strays := in_no_part(self._inner(self.model))):
            tqdm.write(f"visgain: stays frozen, being in no part that is known: {', '.join(strays)}", sys.stderr)
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        is_new = self.optimizer is None
        optimizer: Optimizer = super().create_optimizer(model)
        if is_new:
            divide_by_rate(optimizer, self._inner(self.model), self.recipe.learning_rates)
        return optimizer

    def get_train_dataloader(self) -> DataLoaderShard:
        """Shares of steps, as `_share` makes them."""
        args = self.args
        return DataLoaderShard(
            self.train_dataset,
            device=args.device,
            batch_sampler=self._steps(),
            collate_fn=_share,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=1 if args.dataloader_num_workers else None,  # a batch is a whole step
        )

    def _steps(self) -> Steps:
        args, recipe, rows = self.args, self.recipe, self.train_dataset
        deal: dict[str, Any] = {
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "rank": Rank(number=args.process_index, world=args.world_size),
            "bunch": recipe.micro_batch if recipe.loss_reduction == "micro-batch" else 1,
            "estimate": self.known.estimate,
        }
        if self.refresh is None:
            return Steps(len(rows), recipe.batch_size, **deal)
        kept = {"every": self.refresh.every, "n_kept": rows.n_selected}
        return Rounds(len(rows), recipe.batch_size, choose=self._decided, **kept, **deal)

    def _decided(self, step: int, indices: Sequence[int]) -> list[Decided]:
        """Those of the rows that the model as it is now says to train on."""
        if self.refresh is None:
            raise ValueError("nothing decides while training")
        inner = self._inner(self.model)
        training = inner.training
        inner.eval()
        try:
            with nullcontext() if coarsest(inner) == torch.float32 else self.accelerator.autocast():
                rank = Rank(number=self.args.process_index, world=self.args.world_size)
                return self.refresh(step, indices, rank, self.accelerator.wait_for_everyone)
        finally:
            inner.train(training)

    # ---------------------------------------------------------------- the step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Float32[Tensor, ""]:
        """Forward and backward of this rank's share of a step; its part of the loss times the number of ranks.

        Trainer, and whoever averages gradients over ranks, divides by that number.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        rows = inputs["rows"]
        n_micro_batches = -(-len(rows) // self.recipe.micro_batch)
        if self.recipe.loss_reduction == "micro-batch":
            rows = averaged_by_micro_batch(rows, self.recipe.micro_batch)
        passes = self._cut(rows)
        n_active = sum(int(row.active.sum()) for row in rows)
        all_ranks = self._tallied(Tally(summed_weight(rows), n_active, n_micro_batches, len(passes)))
        self.active_tokens += int(sum(tally.active_tokens for tally in all_ranks))
        divisor = sum(
            tally.weight if self.recipe.loss_reduction == "global" else tally.micro_batches for tally in all_ranks
        )
        if self._is_sharded:
            passes = [[self.known.silent]] * (int(max(tally.passes for tally in all_ranks)) - len(passes)) + passes
        losses = [
            self._forward_backward(model, weighed(some, divisor / self.args.world_size), is_last=some is passes[-1])
            for some in passes
        ]
        return torch.stack(losses).sum()

    def _forward_backward(self, model: nn.Module, rows: Sequence[TrainingRow], *, is_last: bool) -> Float32[Tensor, ""]:
        """The weighted sum of the NLLs of `rows`, with its gradients added to those that are there."""
        inner = self._inner(model)
        one = self.way.make(inner, rows, image_token_id=self.tokens.image, pad_id=self.tokens.pad)
        one = one.to(self.args.device)
        found: list[Tensor] = []
        forward = inner.forward

        def loss_of(**inputs: Any) -> Tensor:
            loss = (self.way.nll(inner, forward, one, inputs) * one.weight).sum()
            found.append(loss.detach())  # as it is, whatever precision the wrapper gives it
            return loss

        # All that wraps the model, of DDP, FSDP, peft ..., runs as ever, round a forward that ends with the loss.
        with self._synchronised(model, is_last=is_last), laid_out(inner, one), replaced_forward(inner, loss_of):
            with self.accelerator.autocast():
                loss = model(**one.inputs)
            deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))
        return found[0]

    def _synchronised(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over ranks once in a step, with the last pass."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        if is_last or each or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return nullcontext()
        waiting: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return waiting

    def _cut(self, rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """The rows of each pass; those with pictures last, and with a silent row wherever a picture must be there.

        Ranks that sum gradients wait for those of every part that is trained, and sum them with the last pass: without
        a picture there, vision and projector would have none. A step without any picture then has gradients of 0 for
        them, whatever the number of ranks. Where weights are sharded, every pass must gather the same ones.
        """
        most = self._pack_tokens if self.way.side_by_side else self.recipe.micro_batch
        passes = [[rows[k] for k in some] for some in cut(rows, side_by_side=self.way.side_by_side, most=most)]
        passes.sort(key=_has_picture)
        silent = self.known.silent
        if not passes:
            return [[silent]]
        if not _has_picture([silent]):
            return passes
        if self._is_sharded:
            passes = [one for some in passes for one in _with_picture(some, silent)]
        elif self.pictures_matter:
            passes[-1:] = _with_picture(passes[-1], silent)
        return passes

    def _tallied(self, mine: Tally) -> list[Tally]:
        """Of all ranks."""
        if self.args.world_size == 1:
            return [mine]
        numbers = self.accelerator.gather(torch.tensor([mine], dtype=torch.float32, device=self.args.device))
        return [Tally(*one) for one in numbers.tolist()]

    @property
    def _pack_tokens(self) -> int:
        return self.recipe.pack_tokens or PACK_TOKENS["cpu" if self.args.device.type == "cpu" else "cuda"]

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _inner(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model inside of whatever wraps it."""
        unwrapped = self.accelerator.unwrap_model(model)
        return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped

    # ---------------------------------------------------------------- the way

    def _choose_way(self) -> Way:
        """The fastest way that the recipe allows and the model can take."""
        ways = [way for way in WAYS if self.recipe.packing != "off" or not way.side_by_side]
        inner = self._inner(self.model)
        with _weights_gathered(inner):
            choice = from_first(
                lambda: choose_way(
                    inner,
                    self.known.probes(),
                    ways,
                    image_token_id=self.tokens.image,
                    pad_id=self.tokens.pad,
                    precision=self.accelerator.autocast,
                ),
                # In its first forward transformers hangs hooks onto a model. DeepSpeed hangs its own up later, and
                # compares the order in which all ranks run them.
                everywhere=self.is_deepspeed_enabled,
            )
        self._tell(choice)
        return choice.way

    def _tell(self, choice: Choice) -> None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.rejected.items())
        if choice.way.side_by_side or (self.recipe.packing == "off" and choice.way is PADDED):
            return
        if self.recipe.packing == "on":
            raise ConfigError(f"--packing on, but this model cannot be trained in packs ({reasons}); leave it out")
        if self.is_world_process_zero():
            tqdm.write(f"visgain: trains on padded batches of {self.recipe.micro_batch} rows ({reasons})", sys.stderr)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Raises TrainingError, on all ranks, if loss or gradients are not finite: the weights are lost by then."""
        lost = [f"{name} {logs[name]}" for name in ("loss", "grad_norm") if not isfinite(logs.get(name, 0.0))]
        if lost:
            raise TrainingError(
                f"the training diverged: {' and '.join(lost)} at step {self.state.global_step}; no model was saved. "
                f"Lower --learning-rate (now {self.recipe.learning_rate:g}), or look at the rows of that step; "
                "what was logged before is in log.jsonl"
            )
        tokens = self.active_tokens
        super().log({**logs, "active_tokens": tokens, "active_tokens_per_second": self.pace(tokens)}, *args, **kwargs)


def _share(rows: list[TrainingRow]) -> dict[str, Any]:
    """What a step gets: `rows`, and `input_ids` for Trainer's own count of tokens."""
    ids = [row.encoded.input_ids for row in rows]
    return {"rows": rows, "input_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *ids]))}


def _has_picture(rows: Sequence[TrainingRow]) -> bool:
    return any(row.encoded.n_image_tokens for row in rows)


def _with_picture(rows: list[TrainingRow], silent: TrainingRow) -> list[list[TrainingRow]]:
    """`rows` with a silent row if none of them has a picture; after them where the model takes them apart only."""
    if _has_picture(rows):
        return [rows]
    return [[*rows, silent]] if go_together([*rows, silent]) else [rows, [silent]]


def trains_more_than_language(model: PreTrainedModel) -> bool:
    """Whether any part is trained whose gradients come through pictures."""
    part = part_of(model)  # not get_decoder(), which is all of the body in Phi-4
    return any(p.requires_grad and part.get(id(p)) != "language" for p in model.parameters())


@contextmanager
def _weights_gathered(model: nn.Module) -> Iterator[None]:
    """Let every rank have all weights, which ZeRO-3 cuts up while they are loaded."""
    with ExitStack() as stack:
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(model.parameters())))
        yield
