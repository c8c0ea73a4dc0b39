"""The findings in a terminal: conversations as the model reads them, counts, what the whole takes, what to mend.

Labels are green and underlined, and stand in ⟦brackets⟧ so that they show without colour too. Texts of the dataset are
appended as plain text, so nothing in them is read as markup.
"""

from __future__ import annotations

import math
import re

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from visgain.check.checked import Checked
from visgain.check.estimate import Estimate
from visgain.check.findings import SEVERITIES, SHOWN_ROWS, Finding, Severity, count, in_bytes, listed, share
from visgain.check.label_checks import marks
from visgain.check.measure import Measured
from visgain.check.reading import Read, Reading, pieces
from visgain.check.scan import Scan
from visgain.report.terminal import printable

LABEL, PROMPT, SPECIAL, PICTURE = "green underline", "", "magenta", "cyan"
STYLE: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold blue"}

PIECE, CONVERSATION = 360, 2400
"""Characters shown of one piece of text, and of a conversation."""


# ---------------------------------------------------------------- conversations


def conversation(reading: Reading, read: Read) -> Panel:
    """One row as the model reads it, from the first token to the last."""
    text = Text()
    if read.whole is not None:
        written = position = 0
        known = {*reading.tokenizer.all_special_tokens, *reading.tokenizer.get_added_vocab()}
        is_image = reading.is_image(read.whole)
        for kind, piece, n_tokens in pieces(reading.tokenizer, read.whole, is_image, cut=reading.max_length):
            if position == reading.max_length:
                text.append(f" ✂ cut at --max-length {reading.max_length:,} ", style="bold red")
            if written > CONVERSATION:
                text.append(f" … {len(read.whole.input_ids) - position:,} more tokens", style="dim")
                break
            _append(text, kind, piece, n_tokens, known)
            written += min(len(piece), PIECE)
            position += n_tokens
    sample = read.sample
    title = f"row {sample.row} · {sample.source or 'no source'} · id {sample.id}"
    note = read.crash or read.reason or _size(reading, read)
    return Panel(
        text, title=Text(printable(title)), subtitle=Text(printable(note)), title_align="left", subtitle_align="left"
    )


def _append(text: Text, kind: str, piece: str, n_tokens: int, known: set[str]) -> None:
    if kind == "image":
        text.append(f"[image × {n_tokens:,}]", style=PICTURE)
        return
    style = LABEL if kind == "answer" else PROMPT
    text.append("⟦" if kind == "answer" else "", style=style)
    for part in _parts(_shortened(piece), known):
        text.append(printable(part), style=f"{style} {SPECIAL}" if part in known or marks(part) == [part] else style)
    text.append("⟧" if kind == "answer" else "", style=style)


def _parts(text: str, known: set[str]) -> list[str]:
    """`text` cut at the special tokens in it."""
    names = sorted({*(name for name in known if name.strip() and name in text), *marks(text)}, key=len, reverse=True)
    return [text] if not names else re.split(f"({'|'.join(map(re.escape, names))})", text)


def _shortened(text: str) -> str:
    half = PIECE // 2
    return text if len(text) <= PIECE else f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def _size(reading: Reading, read: Read) -> str:
    if read.whole is None:
        return ""
    facts = [
        count(len(read.whole.input_ids), "token"),
        f"{read.whole.n_image_tokens:,} of pictures" if read.sizes else "no picture",
        f"{len(read.whole.turn):,} supervised",
        *(f"{width} × {height}" for width, height in read.sizes[:4]),
    ]
    return " · ".join(facts)


def shown(reading: Reading, n: int) -> list[Read]:
    """Rows worth showing: the middle one of the seen, then one with several turns, then one that is cut or refused."""
    seeing = [read for read in reading.rows if read.whole is not None and read.sample.images]
    seeing.sort(key=lambda read: (0 if read.whole is None else len(read.whole.input_ids), read.sample.row))
    wanted = seeing[len(seeing) // 2 : len(seeing) // 2 + 1]
    wanted += sorted(
        (read for read in seeing if len(read.sample.answers) > 1), key=lambda read: len(read.sample.turns)
    )[:1]
    wanted += [read for read in reading.rows if read.whole is not None and (read.cut is None or read.cut.truncated)][:1]
    wanted += [*seeing, *reading.readable]
    return list({read.sample.row: read for read in wanted}.values())[:n]


# ---------------------------------------------------------------- counts


def counts(scan: Scan, reading: Reading | None) -> Table:
    """What there is, zeros too."""
    table = _table()
    pictures = scan.pictures
    about = "" if scan.complete else f" (from {scan.n_looked_at:,} looked at)"
    table.add_row("rows", f"{scan.n_rows:,}{about}")
    table.add_row("with pictures", share(sum(bool(one.images) for one in scan.rows), scan.n_looked_at))
    table.add_row("text-only", share(sum(not one.images for one in scan.rows), scan.n_looked_at))
    table.add_row("unusable", share(len(scan.skipped), scan.n_looked_at))
    table.add_row("ids that collide", f"{len(scan.colliding):,}")
    table.add_row("rows that repeat", f"{len(scan.repeated):,}")
    copies = len(pictures.content) - len(set(pictures.content.values()))
    table.add_row(
        "pictures", f"{pictures.n_names:,}; {len(pictures.unusable):,} missing or unusable; {copies:,} probably copies"
    )
    if reading is not None and reading.readable:
        _sampled(table, reading)
    return table


def _sampled(table: Table, reading: Reading) -> None:
    wholes = [read.whole for read in reading.readable if read.whole is not None]
    lengths = [len(whole.input_ids) for whole in wholes]
    images = [whole.n_image_tokens for read in reading.readable if read.sample.images and (whole := read.whole)]
    table.add_row("rows read", f"{len(reading.rows):,}, of which {sum(r.cut is None for r in reading.rows):,} refused")
    table.add_row("tokens a row", _spread(lengths))
    table.add_row("image tokens", _spread(images) if images else "none")
    table.add_row("labels a row", _spread([len(whole.turn) for whole in wholes]))
    table.add_row(f"over {reading.max_length:,}", share(sum(n > reading.max_length for n in lengths), len(lengths)))
    empty = sum(not whole.is_answer[1 : reading.max_length].any() for whole in wholes)
    table.add_row("without labels", share(empty, len(wholes)))


def _spread(values: list[int]) -> str:
    return f"{min(values):,} to {max(values):,}, {int(np.median(values)):,} in the middle"


# ---------------------------------------------------------------- the whole


def whole(estimate: Estimate, measured: Measured | None) -> Table:
    """What scoring everything would take."""
    table = _table()
    table.add_row(
        "tokens",
        f"{_big(estimate.tokens)} ± {math.ceil(100 * estimate.margin)} %, of which {_big(estimate.image_tokens)} image",
    )
    table.add_row("answer tokens", _big(estimate.answer_tokens))
    if estimate.seconds is not None and measured is not None:
        low, likely, high = estimate.seconds
        each = f"{measured.way}, {measured.dtype}, {count(measured.workers, 'worker')}"
        table.add_row("score", f"{duration(likely)} ({duration(low)} to {duration(high)}) in one process here ({each})")
        if likely > 600:
            table.add_row(
                "", f"{duration(likely / 8)} on 8 such machines or GPUs; processes on one CPU share its cores"
            )
    if estimate.disk_bytes is not None:
        table.add_row("disk", f"{in_bytes(estimate.disk_bytes)}; {in_bytes(estimate.free_bytes)} free")
    if measured is not None and measured.n_tokens:
        gain = measured.blind - measured.seen
        table.add_row(
            "measured",
            f"{count(len(measured.scores), 'row')}: {measured.seen.mean():.2f} nats a token seen, "
            f"{measured.blind.mean():.2f} blind, gain {gain.mean():+.3f}",
        )
    table.add_row("memory", f"weights {in_bytes(estimate.weights_bytes)} of {in_bytes(estimate.memory_bytes)}")
    table.add_row(
        "train",
        f"{_big(estimate.tokens)} tokens an epoch; {in_bytes(estimate.train_bytes)} for all weights with Adam, "
        "and activations",
    )
    return table


def duration(seconds: float) -> str:
    for limit, unit, length in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.2g} {unit}" if seconds / length < 10 else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _big(number: float) -> str:
    for unit, length in (("G", 1e9), ("M", 1e6)):
        if number >= length:
            return f"{number / length:.3g} {unit}"
    return f"{number:,.0f}"


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


# ---------------------------------------------------------------- findings


def told(found: list[Finding]) -> Table:
    """The findings, the gravest first, each with what mends it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)):
        text = Text.assemble((f"{finding.check}: ", "bold"), printable(finding.what))
        table.add_row(Text(finding.severity, style=STYLE[finding.severity]), text)
        rows = listed([str(row) for row in finding.rows], SHOWN_ROWS)
        for label, line in (("seen", finding.seen), ("rows", rows), ("mend", finding.mend)):
            if line:
                table.add_row(
                    Text(f"   {label}", style="dim"), Text(printable(line), style="" if label == "mend" else "dim")
                )
    return table


def print_checked(checked: Checked, console: Console | None = None) -> None:
    """Everything that was found, for people."""
    console = console or Console()
    if checked.reading is not None:
        _heading(console, f"as {checked.config.model} reads it, template {checked.reading.encoder.name}")
        for read in shown(checked.reading, checked.config.show):
            console.print(conversation(checked.reading, read))
        if checked.config.show:
            console.print(Text.assemble("labels are ", ("⟦so⟧", LABEL), ", the rest is context"))
    if checked.scan is not None:
        _heading(console, f"{checked.config.data.name}")
        console.print(counts(checked.scan, checked.reading))
    if checked.estimate is not None:
        _heading(console, "the whole of it")
        console.print(whole(checked.estimate, checked.measured))
    _heading(console, "findings")
    console.print(told(checked.findings))
    console.print(verdict(checked.findings))


def verdict(found: list[Finding]) -> Text:
    numbers = {severity: sum(finding.severity == severity for finding in found) for severity in SEVERITIES}
    worst = next((severity for severity in SEVERITIES if numbers[severity]), None)
    text = ", ".join(count(number, severity) for severity, number in numbers.items() if number)
    return Text(text or "nothing to mend", style="bold green" if worst in (None, "note") else STYLE[worst])


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))
