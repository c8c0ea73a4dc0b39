"""What a check has to say, in the words of whoever has to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""error: scores would be wrong, or there would be none; warning: something is lost; note: worth knowing."""

SHOWN_ROWS = 5
"""Rows named as examples of a finding."""

Facts = TypeVar("Facts")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found. `check` names it for scripts and stays the same from version to version."""

    check: str
    severity: Severity
    what: str  # is wrong, and how much of it there is
    seen: str = ""  # the value that says so
    rows: tuple[int, ...] = ()  # some rows where it shows
    mend: str = ""  # the flag or the step that helps

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"rows": list(self.rows)}


def findings(checks: Iterable[Callable[[Facts], Finding | None]], facts: Facts) -> list[Finding]:
    """What `checks` find in `facts`."""
    return [finding for check in checks if (finding := check(facts)) is not None]


def some(rows: Iterable[int]) -> tuple[int, ...]:
    """The first few of `rows`."""
    return tuple(sorted(set(rows))[:SHOWN_ROWS])


def count(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share(part: int, whole: int) -> str:
    """`3 of 64 (4.7 %)`."""
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.2g} %)" if part < whole else f"all {whole:,}"


def shortened(text: str, length: int = 60) -> str:
    """`text` on one line, its middle left out if it is longer."""
    line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    half = (length - 3) // 2
    return line if len(line) <= length else f"{line[:half]} … {line[-half:]}"


def listed(items: Sequence[str], most: int = 3) -> str:
    """The first of `items`, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def in_bytes(n_bytes: float) -> str:
    """`1.25 GB`."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= length:
            return f"{n_bytes / length:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"
