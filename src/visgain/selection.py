"""Which samples and which of their answer tokens to train on, decided from the scores.

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
inside S, or of all samples. Only scored multimodal rows are ranked. Text-only rows are kept whole by every rule; rows
that were skipped when scoring are left out and counted. End-of-turn tokens (those of zero width in the answer) count in
every gain and quantile; `end_of_turn` then forces them active in kept rows, or inactive in all rows, text-only ones
included. A row without any active token is left out and counted (`rows_emptied`).

Flat arrays throughout: the tokens of all rows one after another, and the length of each row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Float32, Float64, Int64

from visgain.columns import column_name, first_few, numeric_score_column, read_column
from visgain.config import SelectConfig
from visgain.errors import ConfigError, DataError, StorageError
from visgain.storage import (
    SELECTION_SCHEMA,
    flat_values,
    list_column,
    list_lengths,
    read_json,
    read_scores,
    write_selection,
)

QUANTILE = "tau is the k-th largest of n values, k = ceil(percent / 100 * n); values >= tau are kept, ties included"

_REASONS_LISTED = 20


def run_select(config: SelectConfig) -> dict[str, Any]:
    """Decide, write selection.parquet and selection.json to `config.out`, and return what went to selection.json.

    Raises ConfigError for an option that does not fit, DataError if there is nothing to rank or a `column:NAME` cannot
    be used, StorageError if the scores are missing, damaged or unfinished, or the selection cannot be written.
    """
    scores = _read(config)
    if config.skipped == "error":
        _refuse_skipped(scores)
    choice = choose(scores.pool(), config, _ranking(config, scores))
    active = _on_all_tokens(scores, choice, config.end_of_turn)
    kept = _sum_by_row(active, scores.length) > 0
    record = _record(config, scores, choice, active, kept)
    write_selection(config.out, _selection_table(scores, active, kept), record)
    return record


# ---------------------------------------------------------------- the quantile rule


def kept_count(n: int, keep_percent: float) -> int:
    """ceil(keep_percent / 100 * n), exact for the decimal number that was asked for: 70% of 10 is 7."""
    return -(-Fraction(str(keep_percent)) * n // 100)


def threshold(values: Float[np.ndarray, " n"], keep_percent: float) -> float:
    """tau: the smallest of the `kept_count` largest values (see the module's definition).

    Raises DataError if there are no values or one of them is not finite, ConfigError if the percentage is not above 0
    and at most 100.
    """
    if not 0 < keep_percent <= 100:
        raise ConfigError(f"cannot keep {keep_percent} percent; it must be above 0 and at most 100")
    if len(values) == 0:
        raise DataError("nothing to rank: there are no values to take a threshold of")
    if not np.isfinite(values).all():
        raise DataError(f"cannot rank values that are not finite, at {first_few(np.flatnonzero(~np.isfinite(values)))}")
    place = len(values) - kept_count(len(values), keep_percent)
    return float(np.partition(values, place)[place])


def _at_least(values: Float[np.ndarray, " n"], tau: float) -> Bool[np.ndarray, " n"]:
    """Compare in float64: beside a plain float, numpy would round tau to the float32 of the values first."""
    return np.asarray(values >= np.float64(tau))


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The scored multimodal samples, which the rules choose from: n samples with t answer tokens in all."""

    gain: Float64[np.ndarray, " n"]  # nats, finite
    length: Int64[np.ndarray, " n"]  # answer tokens, at least 1
    token_gain: Float32[np.ndarray, " t"]  # nats, finite
    end_of_turn: Bool[np.ndarray, " t"]  # all False where the option is `select`


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a rule makes of a pool. A threshold is nan where the rule has none."""

    chosen: Bool[np.ndarray, " n"]  # samples that the rule takes, even if none of their tokens is active
    active: Bool[np.ndarray, " t"]
    tau: float = float("nan")  # on the samples' gains
    token_tau: float = float("nan")  # on the tokens' gains
    column_tau: float = float("nan")  # on the values of column:NAME
    tokens_wanted: int | None = None  # random: how many active tokens sample+token has


def choose(pool: Pool, config: SelectConfig, ranking: Float64[np.ndarray, " n"] | None = None) -> Choice:
    """Apply the rule `config.by` and the end-of-turn option. `ranking`: the values of column:NAME."""
    if ranking is not None:
        tau = threshold(ranking, config.keep)
        choice = replace(_whole(pool, ranking >= tau), column_tau=tau)
    elif config.by == "sample":
        choice = _by_sample(pool, config.keep)
    elif config.by == "token":
        choice = _by_token(pool, config.keep, config.keep_tokens)
    else:
        choice = _by_sample_and_token(pool, config.keep, config.keep_tokens)
    choice = _settled(pool, choice, config.end_of_turn)
    return _at_random(pool, choice, config) if config.by == "random" else choice


def _whole(pool: Pool, chosen: Bool[np.ndarray, " n"]) -> Choice:
    return Choice(chosen=chosen, active=np.repeat(chosen, pool.length))


def _by_sample(pool: Pool, keep: float) -> Choice:
    tau = threshold(pool.gain, keep)
    return replace(_whole(pool, pool.gain >= tau), tau=tau)


def _by_sample_and_token(pool: Pool, keep: float, keep_tokens: float | None) -> Choice:
    sample = _by_sample(pool, keep)
    token_tau = sample.tau if keep_tokens is None else threshold(pool.token_gain[sample.active], keep_tokens)
    return replace(sample, active=sample.active & _at_least(pool.token_gain, token_tau), token_tau=token_tau)


def _by_token(pool: Pool, keep: float, keep_tokens: float | None) -> Choice:
    tau = threshold(pool.gain, keep) if keep_tokens is None else float("nan")
    token_tau = tau if keep_tokens is None else threshold(pool.token_gain, keep_tokens)
    chosen = np.ones(len(pool.gain), bool)
    return Choice(chosen=chosen, active=_at_least(pool.token_gain, token_tau), tau=tau, token_tau=token_tau)


def _settled(pool: Pool, choice: Choice, end_of_turn: str) -> Choice:
    """The choice after the end-of-turn option. `keep` does not bring back a row that has no other active token."""
    if end_of_turn == "keep":
        alive = np.repeat(_sum_by_row(choice.active, pool.length) > 0, pool.length)
        return replace(choice, active=choice.active | (alive & pool.end_of_turn))
    return replace(choice, active=choice.active & ~pool.end_of_turn) if end_of_turn == "drop" else choice


def _at_random(pool: Pool, paper: Choice, config: SelectConfig) -> Choice:
    """As many rows as `paper` has active ones, drawn uniformly, and as many active tokens in them, drawn uniformly.

    Every row gets a token first, if there are enough for that. Where the drawn rows hold too few tokens all are taken;
    where the end-of-turn tokens that are always kept are more than enough, none is added.
    """
    rng = np.random.default_rng(config.seed)
    forced = pool.end_of_turn if config.end_of_turn == "keep" else np.zeros(len(pool.token_gain), bool)
    free = ~pool.end_of_turn
    usable = np.flatnonzero(_sum_by_row(free | forced, pool.length) > 0)
    n_rows = int((_sum_by_row(paper.active, pool.length) > 0).sum())
    wanted = int(paper.active.sum())

    chosen = np.zeros(len(pool.gain), bool)
    chosen[rng.choice(usable, n_rows, replace=False, shuffle=False)] = True
    inside = np.repeat(chosen, pool.length)
    active = inside & forced
    candidates = inside & free
    needy = _sum_by_row(active, pool.length) == 0
    lengths = _sum_by_row(candidates, pool.length)
    active[candidates] = _draw(lengths[chosen], needy[chosen], wanted - int(active.sum()), rng)
    return Choice(chosen=chosen, active=active, tokens_wanted=wanted)


def _draw(
    lengths: Int64[np.ndarray, " n"], needy: Bool[np.ndarray, " n"], wanted: int, rng: np.random.Generator
) -> Bool[np.ndarray, " t"]:
    """Mask of `wanted` of the tokens of n rows, uniformly without replacement after one for each needy row.

    All of them if there are fewer than `wanted`; one for each needy row if those alone are more.
    """
    first = (np.cumsum(lengths) - lengths)[needy]
    drawn = np.zeros(lengths.sum(), bool)
    drawn[first + rng.integers(lengths[needy])] = True
    others = np.zeros(len(drawn) - len(first), bool)
    others[: max(0, wanted - len(first))] = True
    rng.shuffle(others)
    drawn[~drawn] = others
    return drawn


# ---------------------------------------------------------------- the scores


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """All rows of the scores: N rows with A answer tokens, of which t belong to the n scored multimodal ones."""

    table: pa.Table  # the columns that are not lists
    identity: Any  # of the run that wrote the scores
    digest: str
    multimodal: Bool[np.ndarray, " N"]
    text_only: Bool[np.ndarray, " N"]  # neither: skipped
    length: Int64[np.ndarray, " N"]
    token_id: np.ndarray  # int32 [A]
    end_of_turn: Bool[np.ndarray, " A"]  # all False where the option is `select`
    gain: Float64[np.ndarray, " N"]  # nan for text-only and skipped rows
    token_gain: Float32[np.ndarray, " t"]

    def pool(self) -> Pool:
        return Pool(
            gain=self.gain[self.multimodal],
            length=self.length[self.multimodal],
            token_gain=self.token_gain,
            end_of_turn=self.end_of_turn[np.repeat(self.multimodal, self.length)],
        )


def _read(config: SelectConfig) -> _Scores:
    """The scores, checked. Raises StorageError with the first rows that are wrong, DataError if none can be ranked."""
    columns = ["row", "id", "fingerprint", "source", "skip_reason", "n_images", "gain"]
    if config.table is None and (name := column_name(config.by)) is not None:
        columns = list(dict.fromkeys([*columns, numeric_score_column(name)]))
    spans = [] if config.end_of_turn == "select" else ["char_start", "char_end"]
    table = read_scores(config.scores, [*columns, "token_id", *spans, "nll_seen", "nll_blind"])
    scored = table.column("skip_reason").is_null().to_numpy()
    multimodal = scored & (table.column("n_images").to_numpy() > 0)
    if not multimodal.any():
        raise DataError(f"{config.scores}: nothing to rank, none of the {len(table)} rows is scored and has an image")
    _check_lists(table, multimodal, spans)
    length = list_lengths(table.column("token_id"))
    with np.errstate(invalid="ignore"):  # inf - inf, which the check finds
        token_gain = flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))
        _check_gains(table.select(["row", "gain"]).filter(pa.array(multimodal)), token_gain, length[multimodal])
    return _Scores(
        table=table.select(columns),
        identity=read_json(config.scores / "run.json", "scores").get("identity"),
        digest=_digest(table),
        multimodal=multimodal,
        text_only=scored & ~multimodal,
        length=length,
        token_id=flat_values(table.column("token_id")),
        end_of_turn=_zero_width(table) if spans else np.zeros(length.sum(), bool),
        gain=table.column("gain").to_numpy(),
        token_gain=token_gain,
    )


def _check_lists(table: pa.Table, multimodal: Bool[np.ndarray, " N"], spans: list[str]) -> None:
    row, length = table.column("row").to_numpy(), list_lengths(table.column("token_id"))
    _forbid(row[1:], row[1:] == row[:-1], "occurs more than once")
    _forbid(row, multimodal & (length == 0), "is multimodal and has no answer tokens")
    for name in spans:
        _forbid(row, list_lengths(table.column(name)) != length, f"has another number of {name} than of answer tokens")
    for name in ("nll_seen", "nll_blind"):
        wrong = list_lengths(table.column(name)) != np.where(multimodal, length, 0)
        _forbid(row, wrong, f"has another number of {name} than of answer tokens (none are due without an image)")


def _check_gains(rows: pa.Table, token_gain: Float32[np.ndarray, " t"], length: Int64[np.ndarray, " n"]) -> None:
    """Each gain is finite and the mean of its tokens' gains: without that a kept sample might not keep a token."""
    row, gain = rows.column("row").to_numpy(), rows.column("gain").to_numpy()
    _forbid(row, ~np.isfinite(gain), "has a gain that is not finite")
    mean = _sum_by_row(token_gain, length, np.float64) / length
    wrong = ~np.isclose(mean, gain, rtol=1e-6, atol=1e-6)  # not nan; the order of summation may differ
    _forbid(row, wrong, "has a gain that is not the mean of its tokens' gains")


def _forbid(row: Int64[np.ndarray, " k"], wrong: Bool[np.ndarray, " k"], what: str) -> None:
    if wrong.any():
        raise StorageError(f"the scores are damaged, score again: row {first_few(row[wrong])} {what}")


def _zero_width(table: pa.Table) -> Bool[np.ndarray, " A"]:
    return np.asarray(flat_values(table.column("char_start")) == flat_values(table.column("char_end")))


def _digest(table: pa.Table) -> str:
    """Hash of the measurement itself, whatever number of parts it lies in."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("row", "fingerprint", "gain"):
        digest.update(table.column(name).to_numpy().tobytes())
    for name in ("nll_seen", "nll_blind"):
        for chunk in table.column(name).chunks:
            digest.update(chunk.flatten().to_numpy().tobytes())
    return f"blake2b:{digest.hexdigest()}"


def _refuse_skipped(scores: _Scores) -> None:
    skipped = scores.table.filter(scores.table.column("skip_reason").is_valid())
    if len(skipped):
        first = "; ".join(f"row {row['row']}: {row['skip_reason']}" for row in skipped.slice(0, 3).to_pylist())
        raise DataError(
            f"{len(skipped)} rows could not be scored ({first}); mend them and score again, or use --skipped drop"
        )


def _sum_by_row(values: np.ndarray, length: Int64[np.ndarray, " n"], dtype: type[np.generic] = np.int64) -> np.ndarray:
    """Sum of each row's values, 0 for a row without any: dtype [n]."""
    sums = np.zeros(len(length), dtype)
    filled = length > 0
    if filled.any():  # reduceat needs rows that are not empty; those follow one another without a gap
        sums[filled] = np.add.reduceat(values, (np.cumsum(length) - length)[filled], dtype=dtype)
    return sums


def _ranking(config: SelectConfig, scores: _Scores) -> Float64[np.ndarray, " n"] | None:
    """The values of column:NAME for the scored multimodal rows; None if the rule is another."""
    name = column_name(config.by)
    if name is None:
        return None
    row = scores.table.column("row").to_numpy()[scores.multimodal]
    if config.table is not None:
        values = read_column(config.table, name, row)
    else:
        values = scores.table.column(name).to_numpy()[scores.multimodal].astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(f"--by column:{name}: no finite value for row {first_few(row[bad])}")
    return np.asarray(values)


# ---------------------------------------------------------------- what is written


def _on_all_tokens(scores: _Scores, choice: Choice, end_of_turn: str) -> Bool[np.ndarray, " A"]:
    """The active tokens of all rows: the choice for multimodal ones, all of text-only and none of skipped ones."""
    active = np.repeat(scores.text_only, scores.length)
    if end_of_turn == "drop":
        active &= ~scores.end_of_turn
    active[np.repeat(scores.multimodal, scores.length)] = choice.active
    return active


def _selection_table(scores: _Scores, active: Bool[np.ndarray, " A"], kept: Bool[np.ndarray, " N"]) -> pa.Table:
    """The kept rows in SELECTION_SCHEMA."""
    inside = np.repeat(kept, scores.length)
    rows = scores.table.select(["row", "id", "fingerprint"]).filter(pa.array(kept))
    lists = [list_column(values[inside], scores.length[kept]) for values in (scores.token_id, active)]
    return pa.table([*rows.columns, *lists], schema=SELECTION_SCHEMA)


def _record(
    config: SelectConfig, scores: _Scores, choice: Choice, active: Bool[np.ndarray, " A"], kept: Bool[np.ndarray, " N"]
) -> dict[str, Any]:
    """What selection.json holds: plain JSON values, null where a rule has no such number."""
    taken = scores.text_only.copy()
    taken[scores.multimodal] = choice.chosen
    by_source = dict(_counts_by_source(scores, taken, kept, _sum_by_row(active, scores.length)))
    totals = {key: sum(counts[key] for counts in by_source.values()) for key in next(iter(by_source.values()))}
    wanted = choice.tokens_wanted
    return {
        "rule": config.by,
        "keep_percent": config.keep,
        "keep_tokens_percent": config.keep_tokens,
        "tau": _number(choice.tau),
        "token_tau": _number(choice.token_tau),
        "column_tau": _number(choice.column_tau),
        "table": None if config.table is None else str(config.table),
        "end_of_turn": config.end_of_turn,
        "seed": config.seed,
        "quantile": QUANTILE,
        "scores_hash": scores.digest,
        "identity": scores.identity,
        "totals": totals,
        "percent_saved": 100 * (1 - totals["active_tokens"] / totals["tokens_total"]),
        "random_token_difference": None if wanted is None else int(choice.active.sum()) - wanted,
        "by_source": by_source,
        "skipped_reasons": _skipped_reasons(scores),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _counts_by_source(
    scores: _Scores, taken: Bool[np.ndarray, " N"], kept: Bool[np.ndarray, " N"], active: Int64[np.ndarray, " N"]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Each source, sorted by name, with its counts of rows and tokens. Tokens of skipped rows are unknown: 0."""
    encoded = pc.dictionary_encode(scores.table.column("source").combine_chunks())
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    everything = np.ones(len(codes), bool)
    columns = {
        "rows_total": everything,
        "rows_kept": kept,
        "rows_emptied": taken & ~kept,
        "text_only": scores.text_only,
        "skipped": ~scores.multimodal & ~scores.text_only,
        "tokens_total": scores.length,
        "active_tokens": active,
    }
    sums = {key: np.bincount(codes, weights=values, minlength=len(names)) for key, values in columns.items()}
    for code in sorted(range(len(names)), key=names.__getitem__):
        yield names[code], {key: int(values[code]) for key, values in sums.items()}


def _skipped_reasons(scores: _Scores) -> dict[str, int]:
    """How often each reason occurs, most frequent first; rare ones are one entry (skipped.jsonl has them all)."""
    reasons = Counter(scores.table.column("skip_reason").drop_null().to_pylist()).most_common()
    listed = dict(reasons[:_REASONS_LISTED])
    if rest := reasons[_REASONS_LISTED:]:
        listed[f"{len(rest)} other reasons"] = sum(count for _, count in rest)
    return listed


# ---------------------------------------------------------------- what is shown


def selection_report(record: Mapping[str, Any]) -> str:
    """A selection's record as text: rows and active tokens by source, before and after, thresholds, what is left out.

    Sources are lines of an aligned table; a source of skipped rows alone has no tokens, hence no percentage.
    """
    heads = ["source", "rows", "kept", "%", "tokens", "active", "%"]
    lines = [_report_cells(name or "(none)", counts) for name, counts in record["by_source"].items()]
    table = [heads, *lines, _report_cells("total", record["totals"])]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
    text = [
        "  ".join([cells[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(cells[1:], widths[1:], strict=True))])
        for cells in table
    ]
    return "\n".join([*text, "", *_report_notes(record)])


def _report_cells(name: str, counts: Mapping[str, int]) -> list[str]:
    pairs = [(counts["rows_total"], counts["rows_kept"]), (counts["tokens_total"], counts["active_tokens"])]
    cells = [[f"{total:,}", f"{part:,}", f"{100 * part / total:.1f}" if total else "-"] for total, part in pairs]
    return [name, *cells[0], *cells[1]]


def _report_notes(record: Mapping[str, Any]) -> Iterator[str]:
    totals = record["totals"]
    keep = f"keep {record['keep_percent']:g}%"
    if record["keep_tokens_percent"] is not None:
        keep += f", {record['keep_tokens_percent']:g}% of tokens"
    yield f"rule {record['rule']}, {keep}: {_report_taus(record)}"
    yield f"{record['percent_saved']:.1f}% of the answer tokens saved"
    if totals["text_only"]:
        yield f"{totals['text_only']:,} text-only rows kept whole"
    if totals["rows_emptied"]:
        yield f"{totals['rows_emptied']:,} rows left out because none of their tokens is active"
    if record["random_token_difference"]:
        yield f"active tokens differ by {record['random_token_difference']:+,} from sample+token's"
    if totals["skipped"]:
        yield f"{totals['skipped']:,} rows left out because they could not be scored:"
        yield from (f"  {count:,} x {reason}" for reason, count in record["skipped_reasons"].items())


def _report_taus(record: Mapping[str, Any]) -> str:
    taus = [
        f"{label} {record[key]:.6g}{unit}"
        for key, label, unit in [
            ("tau", "tau", " nats"),
            ("token_tau", "token tau", " nats"),
            ("column_tau", "column tau", ""),
        ]
        if record[key] is not None
    ]
    return ", ".join(taus) or f"no tau, seed {record['seed']}"
