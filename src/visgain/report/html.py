"""`visgain report`: a finished measurement as one HTML file that needs nothing beside it.

The page is readable without JavaScript and without a network, and the same input gives the same bytes. Texts of the
dataset are untrusted: every template escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from visgain import storage
from visgain.analysis import words
from visgain.analysis.truth import auroc, read_truth, roc_curve, token_truth
from visgain.config import ReportConfig
from visgain.data import Dataset
from visgain.errors import DataError
from visgain.quantile import median
from visgain.report import figures, samples
from visgain.report.counts import Counts, count_rows, kept_by_source, summary
from visgain.report.found import read_ablation, read_analyses, read_evaluations
from visgain.report.overview import Overview, open_overview
from visgain.report.results import read_results
from visgain.report.shade import colour_limit
from visgain.scored import (
    data_path,
    open_scored,
    read_masks,
    read_rows,
    read_run,
    row_tokens,
    scored_sample,
)

WORD_ROWS = 20_000
"""Rows that the tables of words read at most: means of frequent words need no more."""

WORDS_SHOWN = 16


def write_report(config: ReportConfig) -> Path:
    """Write the report of `config.scores` to `config.out` and return that path.

    Memory does not grow with the scores, only with the dataset's index and with the ground truth. A dataset that is
    gone costs the samples and the words, and the page says so. Raises DataError if the dataset changed since it was
    scored, or if the selection or the ground truth belongs to other scores.
    """
    run = read_run(config.scores)
    data = data_path(run, config.data)
    dataset = open_scored(run, data, config.image_root) if data else None
    with open_overview(config.scores, config.selection, config.out.parent) as overview:
        counts = count_rows(overview)
        groups = _gains_by_source(overview, counts)
        page = {
            "run": run,
            "title": _title(run),
            "summary": summary(counts, overview),
            "results": read_results(config.results) if config.results else None,
            "evaluations": read_evaluations(config.evals) if config.evals else [],
            "analyses": read_analyses(config.analyses) if config.analyses else [],
            "ablation": read_ablation(config.ablation) if config.ablation else None,
            "selection": overview.record,
            "tau": _gain_tau(overview.record),
            "distribution": _distribution(groups, _gain_tau(overview.record)),
            "kept": None if overview.record is None else list(kept_by_source(counts, overview.sources)),
            "truth": _truth(config, data, dataset),
            "words": _words(config.scores, overview, dataset) if dataset is not None else None,
            "groups": _samples(config, run, overview, groups, dataset) if dataset is not None else None,
            "missing": None if dataset is not None else str(run.get("data", "")),
        }
    with storage.atomic_path(config.out) as temporary:
        temporary.write_bytes(render(page).encode("utf-8", "replace"))
    return config.out


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    environment = Environment(
        loader=PackageLoader("visgain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=lambda value: f"{value:,}",
        signed=samples.signed,
        percent=percent,
        compact=compact,
        duration=duration,
    )
    return environment.get_template("report.html.j2").render(page)


def percent(share: float) -> str:
    """A share as a whole percentage, with a digit more near the ends, where it matters."""
    digits = 1 if 0 < share < 0.0995 or 0.9 < share < 1 else 0
    return f"{100 * share:.{digits}f}%"


def compact(value: int) -> str:
    """A count, from a million on with three significant digits: 4,720 or 58.6M."""
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value:,}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def _title(run: Mapping[str, Any]) -> str:
    """What the dataset is called: its file's name, with the folder's where the file's is generic."""
    path = Path(str(run.get("data") or "dataset"))
    generic = path.stem in {"data", "train", "dataset", "annotations"}
    return f"{path.parent.name}/{path.name}" if generic and path.parent.name else path.name


def _gain_tau(selection: Mapping[str, Any] | None) -> float | None:
    """The threshold on sample gain; None where the rule has none, or keeps samples for another reason."""
    if selection is None or selection.get("rule") not in ("sample+token", "sample"):
        return None
    tau = selection.get("tau")
    return None if tau is None else float(tau)


def _gains_by_source(overview: Overview, counts: Counts) -> list[figures.Group]:
    """The gains of the scored rows of each source, sources by name."""
    return [
        figures.Group(
            label=overview.sources[source],
            gains=overview.gains.column("gain", [source]),
            n=counts.scored[source].rows_before,
        )
        for source in sorted(counts.scored, key=lambda source: overview.sources[source])
    ]


# ---------------------------------------------------------------- sections


@dataclass(frozen=True, kw_only=True)
class Distribution:
    axis: figures.Axis
    ridges: tuple[figures.Ridge, ...]
    zero: float  # percent
    tau: float | None  # percent
    beyond: float  # share of samples that lie outside of the axis


def _distribution(groups: Sequence[figures.Group], tau: float | None) -> Distribution | None:
    if not groups:
        return None
    everything = figures.together("all", groups).gains
    axis = figures.make_axis(everything, (0.0,) if tau is None else (0.0, tau))
    return Distribution(
        axis=axis,
        ridges=tuple(figures.ridges(groups, axis, tau)),
        zero=axis.at(0.0),
        tau=None if tau is None else axis.at(tau),
        beyond=axis.beyond(everything),
    )


@dataclass(frozen=True, kw_only=True)
class TruthView:
    auroc: float
    path: str  # of the ROC curve
    distribution: Distribution


def _truth(config: ReportConfig, data: Path | None, dataset: Dataset | None) -> TruthView | None:
    """How well gain finds the visual tokens; None without ground truth, or where it has tokens of one kind only."""
    path = config.truth or (data.with_name("truth.jsonl") if data else None)
    if path is None or (config.truth is None and not path.is_file()):
        return None
    truth = read_truth(path)
    scores = read_rows(config.scores, np.fromiter(truth, dtype=np.int64, count=len(truth)))
    gain, is_visual = token_truth(scores, truth, None if dataset is None else _answers_of(scores, dataset))
    if not is_visual.any() or is_visual.all():
        if config.truth is None:
            return None
        n_visual = int(is_visual.sum())
        raise DataError(f"{path} marks {n_visual} of {len(gain)} scored tokens as visual; check --truth")
    axis = figures.make_axis([gain])
    groups = (("visual tokens", gain[is_visual]), ("all other tokens", gain[~is_visual]))
    return TruthView(
        auroc=auroc(gain, is_visual),
        path=figures.curve_path(*roc_curve(gain, is_visual)),
        distribution=Distribution(
            axis=axis,
            ridges=tuple(
                figures.ridge(figures.Group(label=label, gains=[gains], n=len(gains)), axis, None)
                for label, gains in groups
            ),
            zero=axis.at(0.0),
            tau=None,
            beyond=axis.beyond([gain]),
        ),
    )


def _answers_of(scores: pa.Table, dataset: Dataset) -> Callable[[int], Sequence[str]]:
    """Row -> its answers, of the rows in `scores`; refuses a row that changed since it was scored."""
    columns = (scores.column(name).to_pylist() for name in ("row", "fingerprint"))
    fingerprint = dict(zip(*columns, strict=True))
    return lambda row: scored_sample(dataset, row, fingerprint[row]).answers


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Labels of highest and of lowest mean gain, on one axis."""

    title: str
    highest: tuple[words.Mean, ...]
    lowest: tuple[words.Mean, ...]
    n_labels: int  # that occur often enough
    min_count: int
    low: float
    high: float

    def left(self, mean: float) -> float:
        """Where the bar of `mean` begins, in percent of the axis."""
        return round(100 * (min(mean, 0.0) - self.low) / (self.high - self.low), 2)

    def width(self, mean: float) -> float:
        return round(100 * abs(mean) / (self.high - self.low), 2)


@dataclass(frozen=True, kw_only=True)
class WordsView:
    rankings: tuple[Ranking, ...]
    n_rows: int  # rows read
    capped: bool


def _words(scores: Path, overview: Overview, dataset: Dataset) -> WordsView | None:
    n_scored = sum(map(len, overview.gains.column("gain")))
    if n_scored == 0:
        return None
    places = np.unique(np.linspace(0, n_scored - 1, min(WORD_ROWS, n_scored)).astype(np.int64))
    by_word, by_token = words.Tally(), words.Tally()
    for tokens in row_tokens(read_rows(scores, overview.scored_at(places))):
        sample = scored_sample(dataset, tokens.row, tokens.fingerprint)
        for index, answer in enumerate(sample.answers):
            here = tokens.of_answer(index)
            by_word.add(words.word_gains(answer, tokens.chars[here], tokens.gain[here]))
            by_token.add(words.token_gains(answer, tokens.chars[here], tokens.gain[here]))
    return WordsView(
        rankings=tuple(_ranking(title, tally) for title, tally in (("Words", by_word), ("Tokens", by_token))),
        n_rows=len(places),
        capped=len(places) < n_scored,
    )


def _ranking(title: str, tally: words.Tally) -> Ranking:
    least = words.min_count(tally.n_occurrences)
    means = tally.means(least)
    highest, lowest = words.extremes(means, WORDS_SHOWN)
    shown = [item.mean for item in (*highest, *lowest)] or [1.0]
    low, high = min(0.0, *shown), max(0.0, *shown)
    return Ranking(
        title=title,
        highest=tuple(highest),
        lowest=tuple(lowest),
        n_labels=len(means),
        min_count=least,
        low=low,
        high=high if high > low else low + 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class CardGroup:
    title: str
    note: str
    cards: tuple[samples.Card, ...]


@dataclass(frozen=True, kw_only=True)
class SamplesView:
    groups: tuple[CardGroup, ...]
    limit: float  # gain of full colour
    n_cards: int


def _samples(
    config: ReportConfig,
    run: Mapping[str, Any],
    overview: Overview,
    gains: Sequence[figures.Group],
    dataset: Dataset,
) -> SamplesView | None:
    if not gains or config.samples == 0:
        return None
    groups = _chosen(config.samples, overview, gains)
    chosen = np.array([row for group in groups for row in group.chosen])
    tokens = {item.row: item for item in row_tokens(read_rows(config.scores, chosen))}
    masks = read_masks(config.selection, chosen) if config.selection else None
    identity = run["identity"]
    blinder = samples.Blinder.of(
        identity["counterfactual"], int(identity.get("seed", 0)), dataset, overview.scored_after
    )
    limit = colour_limit(np.concatenate([item.gain for item in tokens.values()]))

    def card(row: int) -> samples.Card:
        score = tokens[row]
        mask = None if masks is None else masks.get(row, np.zeros(len(score.turn), dtype=bool))
        sample = scored_sample(dataset, row, score.fingerprint)
        return samples.draw_card(sample, score, mask, limit, blinder)

    drawn = tuple(
        CardGroup(title=group.title, note=group.note, cards=tuple(card(row) for row in group.chosen))
        for group in groups
    )
    return SamplesView(groups=drawn, limit=limit, n_cards=len(chosen))


def _chosen(count: int, overview: Overview, gains: Sequence[figures.Group]) -> list[samples.Group]:
    """The samples to show, about `count`."""
    medians = np.full(len(overview.sources), np.nan)
    sizes = np.zeros(len(overview.sources), np.int64)
    for group in gains:
        number = overview.sources.index(group.label)
        medians[number], sizes[number] = median(group.gains), group.n
    tau = _gain_tau(overview.record)
    middle = median(figures.together("all", gains).gains) if tau is None else tau
    shortlist = samples.Shortlist(count, middle, medians)
    for rows in overview.windows():
        shortlist.add(rows)
    return samples.choose(shortlist, overview.sources, sizes, "the median" if tau is None else "the threshold")
