"""`visgain select`: a rule applied to the scores of a run, part by part, in memory that does not grow with them.

One pass over the parts reads what samples are ranked by, the rule finds its thresholds (rules.py), and another pass
decides, counts and sets the kept rows aside, which are then written in row order. Which rows lie in which part changes
nothing in the files that are written.

Only scored multimodal rows are ranked. Text-only rows are kept whole by every rule, save end-of-turn tokens (those of
zero width in the answer) under `--end-of-turn drop`; rows that were skipped when scoring are left out and counted. A
row without any active token is left out and counted (`rows_emptied`). The rows that were chosen from, kept or not, are
written too: all that are ranked or text-only.

Soft weights (weights.py) say how much the loss of a kept token counts: another column of the selection, 0 where a token
is not kept. They change nothing else, and without them there is no such column.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int64
from tqdm import tqdm

from visgain.columns import column_name, first_few, numeric_score_column, require_finite
from visgain.config import SelectConfig
from visgain.errors import DataError, StorageError
from visgain.rowset import RowSet
from visgain.rules import QUANTILE, Choice, Pool, Rule, find_rule, sum_by_row
from visgain.scramble import random_key, scrambled
from visgain.spill import Spill, window
from visgain.storage import (
    SELECTION_SCHEMA,
    SOFT_SELECTION_SCHEMA,
    flat_values,
    list_column,
    list_lengths,
    read_json,
    scan_scores,
    write_selection,
)
from visgain.weights import UNIT, Hard, Weighting, exact_sums, parse_weights

_REASONS_LISTED = 20


def run_select(config: SelectConfig, *, text_alone: bool = False) -> dict[str, Any]:
    """Decide, write the selection's files to `config.out`, and return what went to selection.json.

    `text_alone`: rows may all be text-only, and are kept whole as beside others. Raises ConfigError or UnknownName for
    an option that does not fit, DataError if there is nothing to rank or a `column:NAME` cannot be used, StorageError
    if the scores are missing, damaged or unfinished, or the selection cannot be written.
    """
    weighting = parse_weights(config.weights)
    schema = SELECTION_SCHEMA if isinstance(weighting, Hard) else SOFT_SELECTION_SCHEMA
    with ExitStack() as stack:

        def spill(schema: pa.Schema) -> Spill:
            return stack.enter_context(Spill(config.out, schema))

        scores = _Scores(config, _survey(config, spill(_RANKED), text_alone))
        rule = find_rule(scores, config) if scores.survey.n_ranked else _NOTHING_RANKED
        tally, kept = _Tally(skipped=spill(_SKIPPED)), spill(schema)
        candidates = RowSet(scores.survey.n_rows)
        for decided in _decisions(scores, rule, weighting):
            tally.add(decided)
            candidates.add(decided.row[decided.multimodal | decided.text_only])
            kept.add(_selection_table(decided, schema), window(decided.row[decided.kept]))
        record = _record(config, rule, weighting, tally)
        with tqdm(
            total=record["totals"]["rows_kept"], desc="writing", unit="row", delay=2, mininterval=0.5
        ) as progress:
            write_selection(config.out, _counted(kept.in_row_order(), progress), record, schema, candidates)
    return record


def _counted(tables: Iterable[pa.Table], progress: tqdm) -> Iterator[pa.Table]:
    for table in tables:
        yield table
        progress.update(len(table))


# ---------------------------------------------------------------- the scores


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What is known of the scores before their tokens are read."""

    n_rows: int  # no row of the scores is above n_rows - 1
    n_ranked: int
    ranked: Spill  # row and value of the scored multimodal rows, under key 0


_RANKED = pa.schema({"row": pa.int64(), "value": pa.float64()})


def _survey(config: SelectConfig, ranked: Spill, text_alone: bool) -> _Survey:
    """Raises DataError if no row can be ranked (`text_alone`: and some were skipped), or if --skipped refuses some;
    StorageError for a gain that is none.
    """
    ranked_by = _ranked_by(config)
    columns = list(dict.fromkeys(["row", "skip_reason", "n_images", "gain", ranked_by]))
    limit = read_json(config.scores / "run.json", "scores").get("n_rows", 1 << 40)
    n_rows = n_all = n_ranked = n_skipped = 0
    first_skipped: list[tuple[int, str]] = []
    for table in scan_scores(config.scores, columns, description="ranking samples"):
        samples = table.filter(pa.array(_multimodal(table)))
        all_rows = table.column("row").to_numpy()
        _forbid(all_rows, (all_rows < 0) | (all_rows >= limit), "is no row of the dataset")
        row, value = samples.column("row").to_numpy(), samples.column(ranked_by).to_numpy().astype(np.float64)
        _forbid(row, ~np.isfinite(samples.column("gain").to_numpy()), "has a gain that is not finite")
        require_finite(ranked_by, row, value)
        ranked.add(pa.table([row, value], schema=_RANKED), 0)
        skipped = table.select(["row", "skip_reason"]).filter(table.column("skip_reason").is_valid())
        first_skipped = heapq.nsmallest(3, [*first_skipped, *_pairs(skipped.sort_by("row").slice(0, 3))])
        n_rows = max(n_rows, int(all_rows.max()) + 1)
        n_all, n_ranked, n_skipped = n_all + len(table), n_ranked + len(row), n_skipped + len(skipped)
    if n_ranked == 0 and not (text_alone and n_skipped == 0):
        why = f"; row {first_skipped[0][0]}: {first_skipped[0][1]}" if first_skipped else ""
        raise DataError(f"{config.scores}: nothing to rank, none of the {n_all} rows is scored and has an image{why}")
    if n_skipped and config.skipped == "error":
        first = "; ".join(f"row {row}: {reason}" for row, reason in first_skipped)
        raise DataError(
            f"{n_skipped} rows could not be scored ({first}); mend them and score again, or use --skipped drop"
        )
    return _Survey(n_rows=n_rows, n_ranked=n_ranked, ranked=ranked)


def _ranked_by(config: SelectConfig) -> str:
    """The column of the scores that samples are ranked by."""
    name = column_name(config.by)
    return "gain" if name is None or config.table is not None else numeric_score_column(name)


def _multimodal(table: pa.Table) -> Bool[np.ndarray, " N"]:
    """Rows that were scored with an image."""
    return np.asarray(table.column("skip_reason").is_null().to_numpy() & (table.column("n_images").to_numpy() > 0))


def _pairs(skipped: pa.Table) -> list[tuple[int, str]]:
    """Row and reason."""
    return list(zip(*(skipped.column(name).to_pylist() for name in ("row", "skip_reason")), strict=True))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Some rows of the scores: N rows with A answer tokens, of which t belong to the n scored multimodal ones."""

    table: pa.Table
    multimodal: Bool[np.ndarray, " N"]
    text_only: Bool[np.ndarray, " N"]  # neither: skipped
    length: Int64[np.ndarray, " N"]
    end_of_turn: Bool[np.ndarray, " A"]  # all False where the option is `select`
    token_gain: Float32[np.ndarray, " t"]

    @property
    def row(self) -> Int64[np.ndarray, " N"]:
        return np.asarray(self.table.column("row").to_numpy())


class _Scores:
    """The scores as rules read them. Every batch is checked before it is used."""

    def __init__(self, config: SelectConfig, survey: _Survey) -> None:
        self.config = config
        self.survey = survey
        self._ranked_by = _ranked_by(config)

    def values(self) -> Iterable[Float64[np.ndarray, " _"]]:
        return self.survey.ranked.column("value")

    def rows(self) -> RowSet:
        rows = RowSet(self.survey.n_rows)
        for row in self.survey.ranked.column("row"):
            rows.add(row)
        return rows

    def pools(self, purpose: str) -> Iterator[Pool]:
        return map(self.pool, self.batches(purpose))

    def pool(self, batch: _Batch) -> Pool:
        """The samples of a batch that rules decide about."""
        value = batch.table.column(self._ranked_by).to_numpy()[batch.multimodal]
        return Pool(
            row=batch.row[batch.multimodal],
            value=value.astype(np.float64),
            length=batch.length[batch.multimodal],
            token_gain=batch.token_gain,
            end_of_turn=batch.end_of_turn[np.repeat(batch.multimodal, batch.length)],
        )

    def batches(self, purpose: str, more: Sequence[str] = ()) -> Iterator[_Batch]:
        """All rows, with `more` columns than rules need. Raises StorageError with the first rows that are wrong."""
        spans = [] if self.config.end_of_turn == "select" else ["char_start", "char_end"]
        columns = ["row", "skip_reason", "n_images", "gain", self._ranked_by, *more, *spans, "nll_seen", "nll_blind"]
        for table in scan_scores(self.config.scores, list(dict.fromkeys(columns)), description=purpose):
            yield _batch(table)


def _batch(table: pa.Table) -> _Batch:
    multimodal = _multimodal(table)
    lists = [name for name in ("token_id", "char_start", "char_end", "turn") if name in table.column_names]
    # Without any of these only the tokens of multimodal rows are known, and nobody asks for others.
    length = list_lengths(table.column(lists[0] if lists else "nll_seen"))
    _check_lists(table, multimodal, lists, length)
    with np.errstate(invalid="ignore"):  # inf - inf, which the check finds
        token_gain = flat_values(table.column("nll_blind")) - flat_values(table.column("nll_seen"))
        _check_gains(table.select(["row", "gain"]).filter(pa.array(multimodal)), token_gain, length[multimodal])
    return _Batch(
        table=table,
        multimodal=multimodal,
        text_only=table.column("skip_reason").is_null().to_numpy() & ~multimodal,
        length=length,
        end_of_turn=_zero_width(table) if "char_end" in lists else np.zeros(length.sum(), bool),
        token_gain=token_gain,
    )


def _check_lists(
    table: pa.Table, multimodal: Bool[np.ndarray, " N"], lists: list[str], length: Int64[np.ndarray, " N"]
) -> None:
    """`lists` must have `length` values in every row, NLLs in multimodal rows alone."""
    row = table.column("row").to_numpy()
    _forbid(row, multimodal & (length == 0), "is multimodal and has no answer tokens")
    for name in lists:
        _forbid(row, list_lengths(table.column(name)) != length, f"has another number of {name} than of answer tokens")
    for name in ("nll_seen", "nll_blind"):
        wrong = list_lengths(table.column(name)) != np.where(multimodal, length, 0)
        _forbid(row, wrong, f"has another number of {name} than of answer tokens (none are due without an image)")


def _check_gains(rows: pa.Table, token_gain: Float32[np.ndarray, " t"], length: Int64[np.ndarray, " n"]) -> None:
    """Each gain is the mean of its tokens' gains: without that a kept sample might not keep a token."""
    row, gain = rows.column("row").to_numpy(), rows.column("gain").to_numpy()
    mean = sum_by_row(token_gain, length, np.float64) / length
    wrong = ~np.isclose(mean, gain, rtol=1e-6, atol=1e-6)  # not nan; the order of summation may differ
    _forbid(row, wrong, "has a gain that is not the mean of its tokens' gains")


def _forbid(row: Int64[np.ndarray, " k"], wrong: Bool[np.ndarray, " k"], what: str) -> None:
    if wrong.any():
        raise StorageError(f"the scores are damaged, score again: row {first_few(row[wrong])} {what}")


def _zero_width(table: pa.Table) -> Bool[np.ndarray, " A"]:
    return np.asarray(flat_values(table.column("char_start")) == flat_values(table.column("char_end")))


# ---------------------------------------------------------------- what is decided


@dataclass(frozen=True, kw_only=True)
class _Decided(_Batch):
    """A batch and what the rule made of it."""

    chosen: Bool[np.ndarray, " N"]  # rows that the rule takes, text-only ones included
    active: Bool[np.ndarray, " A"]
    n_active: Int64[np.ndarray, " N"]
    weight: Float32[np.ndarray, " A"] | None  # 0 where not active; None: 1 where active

    @property
    def kept(self) -> Bool[np.ndarray, " N"]:
        return np.asarray(self.n_active > 0)


def _none(pool: Pool) -> Choice:
    return Choice(chosen=np.zeros(len(pool.row), bool), active=np.zeros(len(pool.token_gain), bool))


_NOTHING_RANKED = Rule(decide=_none)
"""Of scores without a row to rank: there are no thresholds to find."""


def _decisions(scores: _Scores, rule: Rule, weighting: Weighting) -> Iterator[_Decided]:
    """Every row of the scores, decided. Raises StorageError if a row comes twice."""
    seen = RowSet(scores.survey.n_rows)
    soft = not isinstance(weighting, Hard)
    for batch in scores.batches("selecting", ["id", "fingerprint", "source", "token_id", *["turn"] * soft]):
        twice = seen.add(batch.row)
        _forbid(twice, np.ones(len(twice), bool), "occurs more than once")
        weight = _weights(batch, weighting) if soft else None
        yield _decided(batch, rule.decide(scores.pool(batch)), scores.config.end_of_turn, weight)


def _weights(batch: _Batch, weighting: Weighting) -> Float32[np.ndarray, " A"]:
    """What each answer token weighs before the rule has its say: 1 in rows without a picture, which have no gain."""
    inside = np.repeat(batch.multimodal, batch.length)
    turn = flat_values(batch.table.column("turn")).astype(np.int64)
    # Tokens of another row or turn are of another answer: 2**32 is more than a turn's number.
    answer = (np.repeat(np.arange(len(batch.length)), batch.length) << 32) + turn
    weight = np.ones(len(inside), np.float32)
    weight[inside] = weighting(batch.token_gain, answer[inside])
    return weight


def _decided(batch: _Batch, choice: Choice, end_of_turn: str, weight: Float32[np.ndarray, " A"] | None) -> _Decided:
    """The choice for multimodal rows, all tokens of text-only ones, none of skipped ones."""
    chosen = batch.text_only.copy()
    chosen[batch.multimodal] = choice.chosen
    active = np.repeat(batch.text_only, batch.length)
    if end_of_turn == "drop":
        active &= ~batch.end_of_turn
    active[np.repeat(batch.multimodal, batch.length)] = choice.active
    n_active = sum_by_row(active, batch.length)
    weight = None if weight is None else np.where(active, weight, np.float32(0))
    return _Decided(**vars(batch), chosen=chosen, active=active, n_active=n_active, weight=weight)


def _selection_table(decided: _Decided, schema: pa.Schema) -> pa.Table:
    """The kept rows in `schema`, which has a column of weights if there are any."""
    inside, length = np.repeat(decided.kept, decided.length), decided.length[decided.kept]
    rows = decided.table.select(["row", "id", "fingerprint"]).filter(pa.array(decided.kept))
    token_id = flat_values(decided.table.column("token_id"))
    values = [token_id, decided.active, *([] if decided.weight is None else [decided.weight])]
    return pa.table([*rows.columns, *(list_column(each[inside], length) for each in values)], schema=schema)


# ---------------------------------------------------------------- what is counted


_SKIPPED = pa.schema({"row": pa.int64(), "skip_reason": pa.string()})

_COUNTS = ("rows_total", "rows_kept", "rows_emptied", "text_only", "skipped", "tokens_total", "active_tokens")


class _Tally:
    """Counts of rows and tokens by source, reasons for skipping, and the checksum of the scores."""

    def __init__(self, skipped: Spill) -> None:
        self._by_source: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(_COUNTS), np.int64))
        self._skipped = skipped  # under keys that depend on the reason alone
        self._checksum = 0
        self._weights: defaultdict[str, int] = defaultdict(int)  # by source, in units of 2**-UNIT
        self.multimodal_active = 0  # active tokens of the rows that the rule decided about

    def add(self, decided: _Decided) -> None:
        self.multimodal_active += int(decided.n_active[decided.multimodal].sum())
        self._checksum = (self._checksum + _checksum(decided)) % (1 << 64)
        for source, counts in _counts_by_source(decided):
            self._by_source[source] += counts
        for source, weight in _weight_by_source(decided):
            self._weights[source] += weight
        skipped = decided.table.select(_SKIPPED.names).filter(decided.table.column("skip_reason").is_valid())
        keys = [zlib.crc32(reason.encode()) % 256 for reason in skipped.column("skip_reason").to_pylist()]
        self._skipped.add(skipped, np.array(keys, np.int64))

    def checksum(self) -> str:
        """Hash of the measurement itself, whatever its order and the number of parts that it lies in."""
        return f"sum64:{self._checksum:016x}"

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Each source, sorted by name, with its counts. Tokens of skipped rows are unknown: 0."""
        return {
            name: {**dict(zip(_COUNTS, self._by_source[name].tolist(), strict=True)), **self.weight(name)}
            for name in sorted(self._by_source)
        }

    def weight(self, source: str | None = None) -> dict[str, float]:
        """The sum of the weights of a source's tokens or of all, as another count; none where weights are not soft."""
        if not self._weights:
            return {}
        total = sum(self._weights.values()) if source is None else self._weights[source]
        return {"weight": float(Fraction(total, 1 << UNIT))}

    def skipped_reasons(self) -> dict[str, int]:
        """How often each reason occurs, most frequent first; rare ones are one entry (skipped.jsonl has them all)."""
        first: list[tuple[int, int, str]] = []  # minus the count, the first row, the reason
        n_reasons = n_skipped = 0
        for key in self._skipped:
            rows: defaultdict[str, list[int]] = defaultdict(list)
            for row, reason in _pairs(self._skipped.read(key)):
                rows[reason].append(row)
            n_reasons, n_skipped = n_reasons + len(rows), n_skipped + sum(map(len, rows.values()))
            entries = [(-len(where), min(where), reason) for reason, where in rows.items()]
            first = heapq.nsmallest(_REASONS_LISTED, [*first, *entries])
        listed = {reason: -count for count, _, reason in first}
        if n_reasons > len(first):
            listed[f"{n_reasons - len(first)} other reasons"] = n_skipped - sum(listed.values())
        return listed


def _counts_by_source(decided: _Decided) -> Iterator[tuple[str, np.ndarray]]:
    """Each source with its _COUNTS, int64."""
    encoded = pc.dictionary_encode(decided.table.column("source").combine_chunks())
    codes = encoded.indices.to_numpy()
    columns = (
        np.ones(len(codes), np.int64),
        decided.kept,
        decided.chosen & ~decided.kept,
        decided.text_only,
        ~decided.multimodal & ~decided.text_only,
        decided.length,
        decided.n_active,
    )
    counts = np.stack([np.bincount(codes, weights=column) for column in columns], axis=1).astype(np.int64)
    return zip(encoded.dictionary.to_pylist(), counts, strict=True)


def _weight_by_source(decided: _Decided) -> Iterator[tuple[str, int]]:
    """Each source with the sum of its tokens' weights in units of 2**-UNIT, where weights are soft."""
    if decided.weight is None:
        return
    encoded = pc.dictionary_encode(decided.table.column("source").combine_chunks())
    source = np.repeat(encoded.indices.to_numpy().astype(np.int64), decided.length)
    sums = exact_sums(decided.weight, source)
    for number, name in enumerate(encoded.dictionary.to_pylist()):
        yield name, sums.get(number, 0)


def _checksum(batch: _Batch) -> int:
    """Sum over the rows of a hash of row, fingerprint, gain and token NLLs: rows may be added up in any order.

    64 bits tell measurements apart that differ by accident; they do not withstand somebody who looks for a collision.
    """
    key = random_key(0)[:1]
    hashed = np.zeros(len(batch.row), np.uint64)
    for name in ("row", "fingerprint", "gain"):
        hashed = scrambled(hashed ^ np.ascontiguousarray(batch.table.column(name).to_numpy()).view(np.uint64), key)
    seen, blind = (flat_values(batch.table.column(name)).view(np.uint32) for name in ("nll_seen", "nll_blind"))
    length = np.where(batch.multimodal, batch.length, 0)
    place = np.arange(len(seen)) - np.repeat(np.cumsum(length) - length, length)
    tokens = scrambled(
        (seen.astype(np.uint64) << 32 | blind) ^ (np.repeat(hashed, length) + place.view(np.uint64)), key
    )
    return int(scrambled(hashed + sum_by_row(tokens, length, np.uint64), key).sum(dtype=np.uint64))


def _record(config: SelectConfig, rule: Rule, weighting: Weighting, tally: _Tally) -> dict[str, Any]:
    """What selection.json holds: plain JSON values, null where a rule has no such number."""
    by_source = tally.by_source()
    totals = {key: sum(counts[key] for counts in by_source.values()) for key in _COUNTS}
    totals |= tally.weight()
    wanted = rule.tokens_wanted
    return {
        "rule": config.by,
        "keep_percent": config.keep,
        "keep_tokens_percent": config.keep_tokens,
        "tau": _number(rule.tau),
        "token_tau": _number(rule.token_tau),
        "column_tau": _number(rule.column_tau),
        "table": None if config.table is None else str(config.table),
        "end_of_turn": config.end_of_turn,
        "weights": weighting.spec,
        "seed": config.seed,
        "quantile": QUANTILE,
        "scores_hash": tally.checksum(),
        "identity": read_json(config.scores / "run.json", "scores").get("identity"),
        "totals": totals,
        "percent_saved": 100 * (1 - totals["active_tokens"] / totals["tokens_total"]),
        "random_token_difference": None if wanted is None else tally.multimodal_active - wanted,
        "by_source": by_source,
        "skipped_reasons": tally.skipped_reasons(),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


# ---------------------------------------------------------------- what is shown


def selection_report(record: Mapping[str, Any]) -> str:
    """A selection's record as text: rows and active tokens by source, before and after, thresholds, what is left out.

    Sources are lines of an aligned table; a source of skipped rows alone has no tokens, hence no percentage.
    """
    heads = ["source", "rows", "kept", "%", "tokens", "active", "%"]
    heads += ["weight"] * ("weight" in record["totals"])
    lines = [_report_cells(name or "(none)", counts) for name, counts in record["by_source"].items()]
    table = [heads, *lines, _report_cells("total", record["totals"])]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
    text = [
        "  ".join([cells[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(cells[1:], widths[1:], strict=True))])
        for cells in table
    ]
    return "\n".join([*text, "", *_report_notes(record)])


def _report_cells(name: str, counts: Mapping[str, Any]) -> list[str]:
    pairs = [(counts["rows_total"], counts["rows_kept"]), (counts["tokens_total"], counts["active_tokens"])]
    cells = [[f"{total:,}", f"{part:,}", f"{100 * part / total:.1f}" if total else "-"] for total, part in pairs]
    if "weight" in counts:  # of an active token, on average
        cells.append([f"{counts['weight'] / counts['active_tokens']:.3f}" if counts["active_tokens"] else "-"])
    return [name, *itertools.chain.from_iterable(cells)]


def _report_notes(record: Mapping[str, Any]) -> Iterator[str]:
    totals = record["totals"]
    keep = f"keep {record['keep_percent']:g}%"
    if record["keep_tokens_percent"] is not None:
        keep += f", {record['keep_tokens_percent']:g}% of tokens"
    yield f"rule {record['rule']}, {keep}: {_report_taus(record)}"
    yield f"{record['percent_saved']:.1f}% of the answer tokens saved"
    if "weight" in totals:
        yield f"weights {record['weights']}; the column is what an active token weighs on average"
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
