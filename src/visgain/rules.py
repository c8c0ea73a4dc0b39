"""The rules of selection: which samples and which of their answer tokens carry loss. Numbers only, no files.

The quantile rule, here and nowhere else: of n values and p percent to keep, k = ceil(p / 100 * n) in exact decimal
arithmetic, tau is the k-th largest value, and a value is kept if it is >= tau. So at least one is kept, ties at tau are
kept too, and a larger p keeps a superset.

    sample+token   the paper: one tau from the samples' gains for both, S = {i: gain_i >= tau} and, inside S,
                   T_i = {t: gain_it >= tau}. A sample's gain is the mean of its token gains, so each keeps a token.
    sample         S, with all its tokens
    token          all samples, tokens with gain >= the samples' tau
    random         as many rows and active tokens as sample+token keeps, drawn with a seed
    column:NAME    the same quantile of another number, kept samples with all their tokens

`keep_tokens` gives sample+token and token a threshold of their own for tokens: the quantile rule over the token gains
inside S, or of all samples. End-of-turn tokens count in every gain and quantile; `end_of_turn` then forces them active
in kept rows, or inactive.

A rule is found in a few passes over all samples and then decides any of them apart from the others. Memory therefore
holds one pool of samples at a time, and which samples lie in which pool changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt64

from visgain.columns import column_name, read_column
from visgain.config import SelectConfig
from visgain.errors import ConfigError, DataError
from visgain.quantile import Passes, order_statistics
from visgain.rowset import RowSet
from visgain.scramble import random_key, scrambled
from visgain.spill import Spill
from visgain.storage import flat_values, list_column, list_lengths, read_json

QUANTILE = "tau is the k-th largest of n values, k = ceil(percent / 100 * n); values >= tau are kept, ties included"


# ---------------------------------------------------------------- the quantile rule


def kept_count(n: int, keep_percent: float) -> int:
    """ceil(keep_percent / 100 * n), exact for the decimal number that was asked for: 70% of 10 is 7."""
    return -(-Fraction(str(keep_percent)) * n // 100)


def threshold(values: Iterable[Float[np.ndarray, " _"]], keep_percent: float) -> float:
    """tau: the smallest of the `kept_count` largest of all values (see the module's definition).

    `values` are chunks that can be iterated several times. Raises DataError if there are no values or one of them is
    not finite, ConfigError if the percentage is not above 0 and at most 100.
    """
    if not 0 < keep_percent <= 100:
        raise ConfigError(f"cannot keep {keep_percent} percent; it must be above 0 and at most 100")
    found = order_statistics(values, lambda n: [0, n - kept_count(n, keep_percent), n - 1])
    if len(found) == 0:
        raise DataError("nothing to rank: there are no values to take a threshold of")
    low, tau, high = found.tolist()
    if not np.isfinite([low, high]).all():
        raise DataError(f"cannot rank values that are not finite; they go from {low} to {high}")
    return float(tau)


def _at_least(values: Float[np.ndarray, " n"], tau: float) -> Bool[np.ndarray, " n"]:
    """Compare in float64: beside a plain float, numpy would round tau to the float32 of the values first."""
    return np.asarray(values >= np.float64(tau))


# ---------------------------------------------------------------- what rules read and decide


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answer tokens of n scored multimodal samples, t in all, one sample after another."""

    row: Int64[np.ndarray, " n"]  # of the dataset
    length: Int64[np.ndarray, " n"]  # answer tokens, at least 1
    end_of_turn: Bool[np.ndarray, " t"]  # all False where the option is `select`


@dataclass(frozen=True, kw_only=True)
class Pool(Answers):
    """Samples that a rule decides about, with what it looks at."""

    value: Float64[np.ndarray, " n"]  # what samples are ranked by: their gain in nats, or a column of the scores
    token_gain: Float32[np.ndarray, " t"]  # nats, finite


@runtime_checkable
class Scores(Protocol):
    """The scored multimodal samples of a run, to be read several times."""

    def values(self) -> Iterable[Float64[np.ndarray, " _"]]:
        """`Pool.value` of all samples, in chunks: quicker than reading pools."""
        ...

    def rows(self) -> RowSet:
        """The rows of all samples."""
        ...

    def pools(self, purpose: str) -> Iterator[Pool]:
        """All samples. `purpose`: what for, to be shown with the progress."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a rule decides about a pool."""

    chosen: Bool[np.ndarray, " n"]  # samples that the rule takes, even if none of their tokens is active
    active: Bool[np.ndarray, " t"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule whose thresholds are found; nan where it has none."""

    decide: Callable[[Pool], Choice]
    tau: float = float("nan")  # on the samples' gains
    token_tau: float = float("nan")  # on the tokens' gains
    column_tau: float = float("nan")  # on the values of column:NAME
    tokens_wanted: int | None = None  # random: how many active tokens sample+token has


def find_rule(scores: Scores, config: SelectConfig) -> Rule:
    """The rule `config.by` with its thresholds and the end-of-turn option.

    Raises DataError if there is nothing to rank or a table cannot be used.
    """
    name = column_name(config.by)
    if name is not None and config.table is not None:
        rule = _by_table(scores, config.table, name, config)
    else:
        rule = _by_threshold(scores, config)
    rule = replace(rule, decide=_settled(rule.decide, config.end_of_turn))
    return _at_random(scores, rule, config) if config.by == "random" else rule


def sum_by_row(values: np.ndarray, length: Int64[np.ndarray, " n"], dtype: type[np.generic] = np.int64) -> np.ndarray:
    """Sum of each row's values, 0 for a row without any: dtype [n]."""
    sums = np.zeros(len(length), dtype)
    filled = length > 0
    if filled.any():  # reduceat needs rows that are not empty; those follow one another without a gap
        sums[filled] = np.add.reduceat(values, (np.cumsum(length) - length)[filled], dtype=dtype)
    return sums


# ---------------------------------------------------------------- thresholds


def _by_threshold(scores: Scores, config: SelectConfig) -> Rule:
    by, keep, keep_tokens = config.by, config.keep, config.keep_tokens
    if by == "token" and keep_tokens is not None:
        token_tau = threshold(_token_gains(scores, -np.inf), keep_tokens)
        return Rule(decide=_ranked(-np.inf, token_tau), token_tau=token_tau)
    tau = threshold(scores.values(), keep)
    if column_name(by) is not None:
        return Rule(decide=_ranked(tau, -np.inf), column_tau=tau)
    if by == "sample":
        return Rule(decide=_ranked(tau, -np.inf), tau=tau)
    token_tau = tau if keep_tokens is None else threshold(_token_gains(scores, tau), keep_tokens)
    return Rule(decide=_ranked(-np.inf if by == "token" else tau, token_tau), tau=tau, token_tau=token_tau)


def _ranked(tau: float, token_tau: float) -> Callable[[Pool], Choice]:
    """Samples whose value reaches `tau`, with those of their tokens whose gain reaches `token_tau`."""

    def decide(pool: Pool) -> Choice:
        chosen = pool.value >= tau
        return Choice(chosen=chosen, active=np.repeat(chosen, pool.length) & _at_least(pool.token_gain, token_tau))

    return decide


def _token_gains(scores: Scores, tau: float) -> Iterable[Float32[np.ndarray, " _"]]:
    """The token gains of the samples whose value reaches `tau`."""

    def gains() -> Iterator[Float32[np.ndarray, " _"]]:
        for pool in scores.pools("ranking tokens"):
            yield pool.token_gain[np.repeat(pool.value >= tau, pool.length)]

    return Passes(gains)


def _by_table(scores: Scores, table: Path, name: str, config: SelectConfig) -> Rule:
    """Ranked by a column of a file, whose lines may have any order: which rows it takes is held as one bit a row."""
    rows = scores.rows()
    with Spill(config.out, pa.schema({"row": pa.int64(), "value": pa.float64()})) as lines:
        for row, value in read_column(table, name, rows, _scored(config)):
            lines.add(pa.table([row, value], schema=lines.schema), 0)
        tau = threshold(lines.column("value"), config.keep)
        taken = RowSet(rows.n_rows)
        for piece in lines.pieces(0):
            taken.add(piece.column("row").to_numpy()[piece.column("value").to_numpy() >= tau])

    def decide(pool: Pool) -> Choice:
        chosen = taken.holds(pool.row)
        return Choice(chosen=chosen, active=np.repeat(chosen, pool.length))

    return Rule(decide=decide, column_tau=tau)


def _scored(config: SelectConfig) -> str | None:
    """The fingerprint of the dataset that was scored."""
    identity = read_json(config.scores / "run.json", "scores").get("identity")
    return identity.get("data_fingerprint") if isinstance(identity, dict) else None


def _settled(decide: Callable[[Pool], Choice], end_of_turn: str) -> Callable[[Pool], Choice]:
    """The rule with the end-of-turn option. `keep` does not bring back a row that has no other active token."""

    def kept(pool: Pool) -> Choice:
        choice = decide(pool)
        alive = np.repeat(sum_by_row(choice.active, pool.length) > 0, pool.length)
        return replace(choice, active=choice.active | (alive & pool.end_of_turn))

    def dropped(pool: Pool) -> Choice:
        choice = decide(pool)
        return replace(choice, active=choice.active & ~pool.end_of_turn)

    return {"keep": kept, "drop": dropped}.get(end_of_turn, decide)


# ---------------------------------------------------------------- random


def _at_random(scores: Scores, paper: Rule, config: SelectConfig) -> Rule:
    """As many rows as `paper` has active ones, drawn uniformly, and as many active tokens in them, drawn uniformly.

    Every row gets a token first, if there are enough for that. Where the drawn rows hold too few tokens all are taken;
    where the end-of-turn tokens that are always kept are more than enough, none is added.
    """
    lottery = _Lottery(seed=config.seed, keeps_ends=config.end_of_turn == "keep")
    with Spill(config.out, _ANSWERS) as spilled:
        n_rows = n_tokens = 0
        for pool in scores.pools("counting for random"):
            active = paper.decide(pool).active
            n_rows += int((sum_by_row(active, pool.length) > 0).sum())
            n_tokens += int(active.sum())
            spilled.add(pa.table([pool.row, list_column(pool.end_of_turn, pool.length)], schema=_ANSWERS), 0)
        answers = Passes(lambda: map(_answers, spilled.pieces(0)))
        lottery = replace(lottery, last_row=_smallest(Passes(lambda: map(lottery.row_tickets, answers)), n_rows))
        drawn = lottery
        rest = n_tokens - sum(int(drawn.draw(some).active.sum()) for some in answers)
        lottery = replace(drawn, last_token=_smallest(Passes(lambda: map(drawn.token_tickets, answers)), rest))
    return Rule(decide=lottery.decide, tokens_wanted=n_tokens)


_ANSWERS = pa.schema({"row": pa.int64(), "end_of_turn": pa.list_(pa.bool_())})


def _answers(table: pa.Table) -> Answers:
    column = table.column("end_of_turn")
    return Answers(
        row=table.column("row").to_numpy(), length=list_lengths(column), end_of_turn=flat_values(column).astype(bool)
    )


def _smallest(tickets: Iterable[UInt64[np.ndarray, " _"]], count: int) -> np.uint64 | None:
    """The largest of the `count` smallest tickets, or of all if there are fewer; None without any."""
    if count <= 0:
        return None
    return next(iter(order_statistics(tickets, lambda n: [min(count, n) - 1])), None)


@dataclass(frozen=True, kw_only=True)
class _Draw:
    chosen: Bool[np.ndarray, " n"]
    active: Bool[np.ndarray, " t"]  # tokens that are kept without a ticket: ends of turns, or one of each row
    others: Bool[np.ndarray, " t"]  # the other tokens of the chosen rows that may be drawn


@dataclass(frozen=True, kw_only=True)
class _Lottery:
    """Every row and every token has a ticket, a random number that no other has; the smallest ones are drawn.

    A ticket depends on the seed and on the place in the dataset alone, so a part can be drawn without the others.
    """

    seed: int
    keeps_ends: bool  # of turns
    last_row: np.uint64 | None = None  # the largest ticket that is drawn
    last_token: np.uint64 | None = None

    def decide(self, pool: Pool) -> Choice:
        draw = self.draw(pool)
        active = draw.active.copy()
        if self.last_token is not None:
            active[draw.others] = self._tickets_of_tokens(pool, draw.others) <= self.last_token
        return Choice(chosen=draw.chosen, active=active)

    def row_tickets(self, answers: Answers) -> UInt64[np.ndarray, " _"]:
        """The tickets of the rows that can be drawn."""
        return np.asarray(self._tickets_of_rows(answers)[self._usable(answers)])

    def token_tickets(self, answers: Answers) -> UInt64[np.ndarray, " _"]:
        """The tickets of the tokens that can be drawn besides those that are kept without."""
        return self._tickets_of_tokens(answers, self.draw(answers).others)

    def draw(self, answers: Answers) -> _Draw:
        """The rows that are drawn, their tokens that need no ticket, and the others."""
        length = answers.length
        chosen = self._usable(answers)
        chosen &= (self._tickets_of_rows(answers) <= self.last_row) if self.last_row is not None else False
        inside = np.repeat(chosen, length)
        active = inside & answers.end_of_turn & self.keeps_ends
        others = inside & ~answers.end_of_turn
        needy = chosen & (sum_by_row(active, length) == 0)
        first = self._one_of_each(answers.row, others, sum_by_row(others, length), needy)
        active[first], others[first] = True, False
        return _Draw(chosen=chosen, active=active, others=others)

    def _usable(self, answers: Answers) -> Bool[np.ndarray, " n"]:
        """Rows that have a token to keep."""
        if self.keeps_ends:
            return np.ones(len(answers.row), bool)
        return np.asarray(sum_by_row(~answers.end_of_turn, answers.length) > 0)

    def _one_of_each(
        self,
        row: Int64[np.ndarray, " n"],
        tokens: Bool[np.ndarray, " t"],
        count: Int64[np.ndarray, " n"],
        needy: Bool[np.ndarray, " n"],
    ) -> Int64[np.ndarray, " k"]:
        """The place of one of the `tokens` of each needy row, drawn uniformly from the row's `count`."""
        share = (scrambled(row[needy].astype(np.uint64), random_key(self.seed, 1)) >> np.uint64(11)) * 2.0**-53
        number = (share * count[needy]).astype(np.int64)
        return np.asarray(np.flatnonzero(tokens)[(np.cumsum(count) - count)[needy] + number])

    def _tickets_of_rows(self, answers: Answers) -> UInt64[np.ndarray, " n"]:
        return scrambled(answers.row.astype(np.uint64), random_key(self.seed, 0))

    def _tickets_of_tokens(self, answers: Answers, which: Bool[np.ndarray, " t"]) -> UInt64[np.ndarray, " _"]:
        """A token is known by its row (below 2**40) and its position in the row (below 2**24)."""
        first = (answers.row << 24) - (np.cumsum(answers.length) - answers.length)
        place = np.repeat(first, answers.length) + np.arange(len(which))
        return scrambled(place[which].astype(np.uint64), random_key(self.seed, 2))
