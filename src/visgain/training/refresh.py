"""Scores that follow the model: `visgain train --refresh-every N`.

A selection says how to choose; which rows and tokens that is, is decided while the model learns. Always as many rows to
come as N steps take are scored with the weights of that moment, and the selection's rule (its percentage, its weights)
is applied to them alone. An epoch scores every row that the selection was chosen from once, as `visgain score` does:
that is the cost. It takes as many rows to train on as the selection has. Other rows of the dataset are never read: they
may have been held out to test on.

What was decided for a round lies in refresh/step-00000100/ as `score` and `select` write it, so `report` and `show`
look into it, and a resumed training finds its rounds there and decides none of them twice.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from tqdm import tqdm

from visgain.config import ScoreConfig, SelectConfig, TrainConfig
from visgain.counterfactuals import parse_condition
from visgain.data import Dataset
from visgain.errors import ConfigError, DataError
from visgain.scoring.claims import Rank
from visgain.scoring.engine import WAYS, Choice, Engine, Extent
from visgain.scoring.feed import Feed, feed
from visgain.scoring.plan import Plan, make_plan
from visgain.scoring.run import PACK_TOKENS, Scorer, checked_way, make_feed
from visgain.selection import run_select
from visgain.storage import (
    CANDIDATES,
    read_json,
    read_selection_table,
    score_table,
    write_json,
    write_part,
)
from visgain.training.collate import SelectedRows, TrainingRow
from visgain.training.steps import Steps
from visgain.types import Sample, Skipped
from visgain.vlm.encode import Encoder
from visgain.vlm.load import VLM
from visgain.vlm.threads import computing_with, n_threads

FOLDER = "refresh"
"""In a training's folder: its rounds."""

ROUND = "round.json"
"""In a round's folder, written last: its first step, how many rows were scored, and how long that took."""

RULES = ("sample+token", "sample", "token")
"""What can be decided for some rows apart from the others, from their gains alone."""


class Decided(NamedTuple):
    """A row to train on: its place in RefreshedRows, and its line of the round's selection."""

    place: int
    chosen: dict[str, Any]


class RefreshedRows(SelectedRows):
    """The rows that a selection was chosen from (`candidates`), those that it keeps first.

    Each comes with what was decided for it, or as it was selected.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        selection: pa.Table,
        candidates: Int64[np.ndarray, " n"],
        *,
        end_of_turn: str,
    ) -> None:
        super().__init__(dataset, encoder, selection, end_of_turn=end_of_turn)
        selected = set(self.rows)
        self.rows = [*self.rows, *(row for row in candidates.tolist() if row not in selected)]

    @property
    def n_selected(self) -> int:
        return len(self.selection)

    def __getitem__(self, index: int | Decided) -> TrainingRow:
        return self.as_chosen(*index) if isinstance(index, Decided) else super().__getitem__(index)


class Rounds(Steps):
    """Steps whose rows are decided in rounds, just before the first of them is needed.

    `choose(step, indices)` gives those of the rows to train on, in their order. An epoch takes `n_kept` rows, or all
    that were chosen if they are fewer. A batch is asked for one step before it is computed, and one more for every
    worker that prepares batches; so old is the model that a round is scored with. It is as old whenever one tries.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        *,
        every: int,
        n_kept: int,
        choose: Callable[[int, Sequence[int]], list[Decided]],
        estimate: Callable[[int], float],
        **deal: Any,
    ) -> None:
        super().__init__(n_rows, batch_size, estimate=lambda row: estimate(row.place), **deal)
        self.n_kept = n_kept
        self.round_rows = max(1, round(every * batch_size * n_rows / n_kept))
        self.choose = choose

    def __len__(self) -> int:
        return math.ceil(self.n_kept / self.batch_size)

    def steps(self) -> Iterator[list[Decided]]:
        self._step = int(self.sampler.epoch) * len(self)
        chosen = itertools.islice(self._chosen(), self.n_kept)
        while rows := list(itertools.islice(chosen, self.batch_size)):
            yield rows
            self._step += 1

    def _chosen(self) -> Iterator[Decided]:
        order = list(self.sampler)
        for start in range(0, len(order), self.round_rows):
            yield from self.choose(self._step, order[start : start + self.round_rows])


@dataclass(kw_only=True)
class Refresh:
    """Scores rows with the model as it is, and selects among them. `vlm.model` is the model that is trained."""

    config: TrainConfig
    vlm: VLM
    rows: RefreshedRows
    every: int
    _choice: Choice | None = field(default=None, init=False)

    def __call__(self, step: int, indices: Sequence[int], rank: Rank, wait: Callable[[], None]) -> list[Decided]:
        """Those of the rows `indices` that the rule keeps, in their order.

        Every rank calls this with the same arguments and scores its share; `wait` returns when all have called it.
        """
        folder = self.config.out / FOLDER / f"step-{step:08d}"
        if not (folder / ROUND).exists():
            start = time.perf_counter()
            chosen = [self.rows.rows[index] for index in indices]
            if rank.number == 0:  # an interrupted round may have parts for another number of ranks
                shutil.rmtree(folder, ignore_errors=True)
            wait()
            self._score(folder / "scores", step, chosen, rank)
            wait()
            if rank.number == 0:
                self._select(folder)
                seconds = time.perf_counter() - start
                write_json(folder / ROUND, {"step": step, "rows": len(chosen), "seconds": seconds})
        wait()
        kept = {line["row"]: line for line in read_selection_table(folder / "selection").to_pylist()}
        return [Decided(index, kept[row]) for index in indices if (row := self.rows.rows[index]) in kept]

    def _score(self, folder: Path, step: int, rows: Sequence[int], rank: Rank) -> None:
        """Write the rank's parts of the scores of `rows`."""
        some = _Some(self.rows.dataset, rows)
        source = replace(self._source, dataset=some)
        plan = make_plan(some, len(rows), math.ceil(len(rows) / rank.world))
        with computing_with(n_threads(self.vlm)):
            scorer = Scorer(engine=self._engine(source, plan), source=source, config=self._scoring, workers=0)
            if rank.number == 0:
                dataset = self.rows.dataset
                record = {"n_rows": len(dataset), "n_parts": plan.n_parts, "data": str(dataset.path.resolve())}
                record |= {"image_root": str(dataset.image_root.resolve())}
                model = {"model": f"{self.config.out}, as it was before step {step}", "model_fingerprint": None}
                write_json(folder / "run.json", {"identity": self._selected["identity"] | model, **record})
            with tqdm(total=len(rows), desc="refreshing", unit="row", leave=False, disable=rank.number != 0) as bar:
                for part in range(rank.number, plan.n_parts, rank.world):
                    fed = feed(source, ((part, unit) for unit in plan.units(part)), workers=0)
                    write_part(folder, part, plan.n_parts, score_table(scorer.score_part(fed, bar.update)))

    def _select(self, folder: Path) -> None:
        said = self._selected
        config = SelectConfig(
            scores=folder / "scores",
            out=folder / "selection",
            by=said["rule"],
            keep=said["keep_percent"],
            keep_tokens=said["keep_tokens_percent"],
            end_of_turn=said["end_of_turn"],
            weights=said.get("weights", "hard"),
            seed=said["seed"],
        )
        try:
            run_select(config, text_alone=True)  # the last round of an epoch may be a few rows, and all of them text
        except DataError as error:
            raise DataError(f"cannot select among the rows to come: {error}") from error

    def _engine(self, source: Feed, plan: Plan) -> Engine:
        """In the way that agreed with the model's own forward when the first round with pictures was scored."""
        choice = self._choice or checked_way(self._scoring, source, self.vlm, plan, list(WAYS))[1]
        if choice.tried != Extent():  # a round of text alone tries nothing
            self._choice = choice
        pack_tokens = PACK_TOKENS.get(self.vlm.device.type, PACK_TOKENS["cpu"])
        return Engine(vlm=self.vlm, way=choice.way, pack_tokens=pack_tokens, tried=choice.tried)

    @cached_property
    def _selected(self) -> dict[str, Any]:
        return selection_record(self.config)

    @cached_property
    def _scoring(self) -> ScoreConfig:
        """The options that the selection's scores were measured with."""
        identity, config = self._selected["identity"], self.config
        return ScoreConfig(
            model=config.model,
            data=config.data,
            out=config.out / FOLDER,
            counterfactual=identity["counterfactual"],
            end_of_turn=identity["end_of_turn"],
            seed=identity["seed"],
            dtype="float32",
        )

    @cached_property
    def _source(self) -> Feed:
        source = make_feed(self._scoring, self.rows.dataset, parse_condition(self._scoring.counterfactual), self.vlm)
        return replace(source, encoder=self.rows.encoder)


def selection_record(config: TrainConfig) -> dict[str, Any]:
    """What the selection says of itself. Raises ConfigError if its rule cannot follow the model."""
    if config.selection is None:
        raise ConfigError("--refresh-every needs --selection, whose rule says what to keep of the rows to come")
    if config.parallel != "ddp":
        raise ConfigError("--refresh-every needs the whole model on every rank; use --parallel ddp")
    record: dict[str, Any] = read_json(config.selection / "selection.json", "selection")
    if record["rule"] not in RULES:
        raise ConfigError(f"--refresh-every does not go with a selection by {record['rule']}; by {', '.join(RULES)}")
    if not (config.selection / CANDIDATES).is_file():
        raise ConfigError(
            f"--refresh-every needs to know which rows {config.selection} was chosen from, and it has no {CANDIDATES}; "
            "run `visgain select` again"
        )
    return record


def cost(out: Path) -> dict[str, Any]:
    """What the rounds of the training in `out` cost, in the words of TrainSummary; seconds are those of rank 0."""
    rounds = [read_json(path, "round") for path in sorted(out.glob(f"{FOLDER}/step-*/{ROUND}"))]
    return {
        "refreshed_rows": sum(one["rows"] for one in rounds),
        "refresh_seconds": sum(one["seconds"] for one in rounds),
    }


class _Some(Dataset):
    """Some rows of a dataset. They know where they stand in the whole."""

    def __init__(self, dataset: Dataset, rows: Sequence[int]) -> None:
        self.dataset = dataset
        self.chosen = rows
        self.path, self.image_root = dataset.path, dataset.image_root

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample | Skipped:
        return self.dataset[self.chosen[index]]
