"""`visgain show`: one sample in the terminal, its answers coloured by token gain.

Colours go through rich, which drops them where the output is no terminal or NO_COLOR is set; the table of tokens below
says the same in numbers. Texts of the dataset are appended as plain text, so nothing in them is read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from visgain.analysis.words import END_OF_TURN, visible
from visgain.config import ShowConfig
from visgain.errors import DataError
from visgain.report.samples import Piece, answer_pieces, number_images, signed
from visgain.report.shade import colour_limit, strength
from visgain.scored import (
    UNNAMED,
    RowTokens,
    data_path,
    open_scored,
    read_rows,
    read_run,
    row_tokens,
    scored_sample,
)
from visgain.storage import score_schema
from visgain.types import Sample

TABLE_ROWS = 8
"""Tokens listed from each end; an answer of up to twice as many is listed whole."""

# From faint to full, dark text on the first two. Readable on light and on dark terminals, as both colours are set.
_UP = (("#fbe3d3", "#1d1c1a"), ("#f2a67c", "#1d1c1a"), ("#d9622b", "#ffffff"), ("#a83a08", "#ffffff"))
_DOWN = (("#dbe7f6", "#1d1c1a"), ("#94b9e6", "#1d1c1a"), ("#3f7cc8", "#ffffff"), ("#1c4f96", "#ffffff"))


def show(row: int, config: ShowConfig, console: Console | None = None) -> None:
    """Print row `row` of the scores: its turns, and its answers coloured by gain. The run may be unfinished.

    Raises DataError if the scores do not hold the row, or if the dataset is gone or changed since.
    """
    console = console or Console()
    run = read_run(config.scores)
    there = 0 <= row < run.get("n_rows", row + 1)
    table = read_rows(config.scores, np.array([row]), score_schema(run).names) if there else None
    if table is None or len(table) == 0:
        raise DataError(_unknown_row(row, run))
    score = table.to_pylist()[0]
    console.print(header(score))
    if score["skip_reason"] is not None:
        console.print(Text(printable(f"skipped, so it has no scores: {score['skip_reason']}")))
        return
    sample = _sample(config, run, row, score["fingerprint"])
    tokens = next(row_tokens(table), None)
    if tokens is None:
        console.print(Text("text-only: without an image there is nothing to compare, so it has no scores"))
        _print_turns(console, sample, _bare(table), limit=1.0)
        return
    if len(tokens.image_gain) > 1:
        console.print(image_gains(tokens.image_gain))
    limit = colour_limit(tokens.gain)
    _print_turns(console, sample, tokens, limit)
    if console.color_system is not None and not console.no_color:
        console.print(legend(limit))
        console.print()
    console.print(token_table(sample.answers, tokens))


def _unknown_row(row: int, run: Mapping[str, Any]) -> str:
    n_rows = run.get("n_rows")
    if isinstance(n_rows, int) and 0 <= row < n_rows:
        return f"row {row} has no scores yet: the run is unfinished; run `visgain score` again to go on"
    held = f"rows 0 to {n_rows - 1}" if isinstance(n_rows, int) and n_rows > 0 else "no such row"
    return f"row {row} does not exist: the scores hold {held}"


def _sample(config: ShowConfig, run: Mapping[str, Any], row: int, fingerprint: int) -> Sample:
    path = data_path(run, config.data)
    if path is None:
        raise DataError(f"the dataset {run.get('data')} is not there any more; say where it is now with --data")
    return scored_sample(open_scored(run, path, None), row, fingerprint)


def _bare(table: pa.Table) -> RowTokens:
    """No tokens at all: turns are printed plain."""
    nothing = np.zeros(0, dtype=np.float32)
    return RowTokens(
        row=table.column("row")[0].as_py(),
        fingerprint=table.column("fingerprint")[0].as_py(),
        truncated=False,
        turn=np.zeros(0, dtype=np.int32),
        chars=np.zeros((0, 2), dtype=np.int32),
        seen=nothing,
        blind=nothing,
    )


def header(score: Mapping[str, Any]) -> Text:
    """One line: which row this is, its gain, and how much there is of it."""
    n_tokens, n_images = len(score["token_id"]), score["n_images"]
    facts = [
        score["source"] or UNNAMED,
        f"id {score['id']}",
        f"{n_images} image{'s' if n_images != 1 else ''}",
        f"{n_tokens} answer token{'s' if n_tokens != 1 else ''}",
    ]
    if score["truncated"]:
        facts.append("cut at the end")
    gain = "" if score["gain"] is None else f"  gain {signed(score['gain'], 3)} nats"
    return Text.assemble((f"row {score['row']}{gain}", "bold"), "  ", (printable(" · ".join(facts)), "dim"))


def image_gains(gains: Sequence[float]) -> Text:
    """One line: the gain of each image, numbered as in the text below."""
    shown = " · ".join(f"image {number} {signed(gain, 3)}" for number, gain in enumerate(gains, start=1))
    return Text(f"gain per image  {shown} nats")


def _print_turns(console: Console, sample: Sample, tokens: RowTokens, limit: float) -> None:
    answer = n_images = 0
    for turn in sample.turns:
        if turn.role == "assistant":
            console.print(_coloured(answer_pieces(turn.text, tokens, answer, None, limit)))
            answer += 1
            continue
        text, n_images = number_images(turn.text, n_images, len(sample.images))
        console.print()
        console.print(Text(printable(text), style="dim"))
    console.print()


def _coloured(pieces: Iterator[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(printable(piece.lead))
        text.append(printable(piece.text), style=_style(piece))
        text.append(printable(piece.tail))
    return text


def _style(piece: Piece) -> Style | None:
    if not piece.tone:
        return Style(dim=True) if piece.kind in ("blank", "end") else None
    return shade(piece.alpha if piece.tone == "up" else -piece.alpha)


def shade(share: float) -> Style:
    """Background and text colour of a signed share of the scale, in four steps each way."""
    steps = _UP if share > 0 else _DOWN
    background, ink = steps[min(len(steps) - 1, int(abs(share) * len(steps)))]
    return Style(color=ink, bgcolor=background)


def printable(text: str) -> str:
    """The text without control characters, which could move the cursor or recolour the terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or (c.isspace() and ord(c) > 0x9F) else "�" for c in text)


def legend(limit: float) -> Text:
    """What the colours say, in nats."""
    steps = [*(-(k + 0.5) / 4 for k in reversed(range(4))), 0.0, *((k + 0.5) / 4 for k in range(4))]
    text = Text(f"−{limit:g} ", style="dim")
    for share in steps:
        text.append("   ", style=shade(share) if share else None)
    return text.append(f" +{limit:g} nats of gain and beyond; ⏎ end of turn", style="dim")


def token_table(answers: Sequence[str], tokens: RowTokens) -> Table:
    """The tokens of highest and of lowest gain, or all of a short answer, by falling gain."""
    order = np.argsort(-tokens.gain, kind="stable")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("token", overflow="fold")
    for name in ("seen", "blind", "gain"):
        table.add_column(name, justify="right")
    limit = colour_limit(tokens.gain)
    whole = len(order) <= 2 * TABLE_ROWS
    for place, k in enumerate(order.tolist()):
        if not whole and TABLE_ROWS <= place < len(order) - TABLE_ROWS:
            if place == TABLE_ROWS:
                table.add_row(Text(f"… {len(order) - 2 * TABLE_ROWS} more", style="dim"), "", "", "")
            continue
        gain = float(tokens.gain[k])
        share = strength(gain, limit)
        table.add_row(
            Text(_label(answers, tokens, k)),
            f"{tokens.seen[k]:.2f}",
            f"{tokens.blind[k]:.2f}",
            Text(signed(gain), style=shade(share) if share else ""),
        )
    return table


def _label(answers: Sequence[str], tokens: RowTokens, k: int) -> str:
    text = answers[int(tokens.turn[k])]
    start, end = tokens.chars[k].tolist()
    if start < end:
        return printable(visible(text[start:end]))
    return f"⏎ {END_OF_TURN}" if start >= len(text) else "·"
