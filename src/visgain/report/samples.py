"""Which samples to show, and each as the page draws it: pictures, turns, and answers cut into coloured tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64
from PIL import Image

from visgain.analysis.words import visible
from visgain.counterfactuals import Condition, Counterfactual, parse_condition
from visgain.data import Dataset
from visgain.errors import ImageError
from visgain.report.overview import Rows
from visgain.report.shade import strength
from visgain.scored import RowTokens
from visgain.types import IMAGE_MARK, Sample

THUMBNAIL = 260  # pixels on the longer side
MOST_PICTURES = 6  # of one sample
OPEN_ANSWERS = 4  # of one sample; the rest folds away


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples that were chosen for one reason, by row."""

    title: str
    note: str
    chosen: tuple[int, ...]


class Shortlist:
    """The scored rows that `choose` may pick, of all rows that are added; a few of each source.

    For every order that `choose` goes by, each source's first `count` rows are enough: it takes no more, and takes the
    first rows of a source first.
    """

    def __init__(self, count: int, middle: float, medians: Float64[np.ndarray, " S"]) -> None:
        self.count = count
        self.middle = middle  # nats
        self.medians = medians  # of each source, in nats
        self.row = np.zeros(0, np.int64)
        self.gain = np.zeros(0, np.float64)
        self.source = np.zeros(0, np.int32)

    def add(self, rows: Rows) -> None:
        """Take rows into account; those of lower rows must have been added before."""
        self.row = np.concatenate([self.row, rows.row[rows.scored]])
        self.gain = np.concatenate([self.gain, rows.gain[rows.scored]])
        self.source = np.concatenate([self.source, rows.source[rows.scored]])
        rising = _ranks(self.gain, self.source)
        falling = _ranks(-self.gain[::-1], self.source[::-1])[::-1]  # of equal gains the last row is first
        ranks = [rising, falling, _ranks(self.to_middle, self.source), _ranks(self.to_median, self.source)]
        first = np.min(ranks, axis=0) < self.count
        self.row, self.gain, self.source = self.row[first], self.gain[first], self.source[first]

    @property
    def to_middle(self) -> Float64[np.ndarray, " R"]:
        return np.asarray(np.abs(self.gain - self.middle))

    @property
    def to_median(self) -> Float64[np.ndarray, " R"]:
        return np.asarray(np.abs(self.gain - self.medians[self.source]))


def _ranks(values: Float64[np.ndarray, " R"], source: Int32[np.ndarray, " R"]) -> Int64[np.ndarray, " R"]:
    """The rank of each value among those of its source, from 0; equal values are ranked as they come."""
    order = np.lexsort((values, source))
    start = np.searchsorted(source[order], source[order])
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - start
    return ranks


def choose(rows: Shortlist, sources: Sequence[str], sizes: Int64[np.ndarray, " S"], middle_name: str) -> list[Group]:
    """About `rows.count` scored rows that tell most: both ends, around the middle, and the typical one of each source.

    `sizes`: scored rows of each source. Deterministic, no row twice. The ends take at most a third of their samples
    from one source, if others are left: they would otherwise show the one source with the shortest answers.
    """
    count, gain, source = rows.count, rows.gain, rows.source
    taken: set[int] = set()

    def take(order: np.ndarray, n: int, per_source: int) -> tuple[int, ...]:
        chosen = _first(order, source, n, per_source, taken)
        taken.update(chosen)
        return tuple(chosen)

    quarter = -(-count // 4)
    rising = np.argsort(gain, kind="stable")
    nearest = np.argsort(rows.to_middle, kind="stable")
    most = max(1, -(-quarter // 3))
    highest = take(rising[::-1], min(quarter, count), most)
    lowest = take(rising, min(quarter, count - len(taken)), most)
    around = take(nearest, min(quarter, count - len(taken)), most)
    typical = take(_typical(rows, sources, sizes), count - len(taken), count)
    around = tuple(sorted(around, key=lambda index: (-gain[index], index)))
    near = f"Nearest to a gain of {signed(rows.middle)}."
    groups = [
        ("Highest gain", "The image told the model most.", highest),
        (f"Around {middle_name}", near, around),
        ("Lowest gain", "The answer was as likely, or likelier, without the image.", lowest),
        ("Typical of their source", "Nearest to the median gain of each source.", typical),
    ]
    return [
        Group(title=title, note=note, chosen=tuple(rows.row[list(chosen)].tolist()))
        for title, note, chosen in groups
        if chosen
    ]


def _first(order: np.ndarray, source: Int32[np.ndarray, " R"], n: int, per_source: int, taken: set[int]) -> list[int]:
    """The first `n` of `order` that are not taken, with at most `per_source` of one source unless that is too few."""
    free = [index for index in order.tolist() if index not in taken]
    used: dict[int, int] = {}
    chosen: list[int] = []
    for index in free:
        if len(chosen) == n:
            break
        if used.get(source[index], 0) < per_source:
            used[source[index]] = used.get(source[index], 0) + 1
            chosen.append(index)
    rest = (index for index in free if index not in set(chosen))
    filled = {*chosen, *(index for index, _ in zip(rest, range(n - len(chosen)), strict=False))}
    return [index for index in free if index in filled]


def _typical(rows: Shortlist, sources: Sequence[str], sizes: Int64[np.ndarray, " S"]) -> Int64[np.ndarray, " R"]:
    """Places of rows by closeness to their source's median, one of each source in turn, large sources first."""
    by_name = np.argsort(np.argsort(np.array(sources)))  # sources of one size by name
    rank = _ranks(rows.to_median, rows.source)
    return np.lexsort((rows.row, by_name[rows.source], -sizes[rows.source], rank))


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a text: a scored token, or characters that no token covers."""

    text: str
    kind: str  # gap, token, blank (`text` is a mark for characters without ink) or end (of the turn)
    title: str = ""
    tone: str = ""  # up, down or "" (uncoloured)
    alpha: float = 0.0
    dropped: bool = False  # carries no loss under the selection
    lead: str = ""  # blanks in front, left uncoloured
    tail: str = ""  # the same behind


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the user said, and the answer."""

    asked: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    seen: str  # data URI; "" where it could not be made
    blind: str  # "" too where the blind condition shows no picture
    problem: str = ""
    aspect: float = 1.0  # width over height
    gain: float | None = None  # nats, of this picture among several


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample as the page shows it."""

    row: int
    id: str
    source: str
    gain: float
    n_tokens: int
    n_active: int | None  # None without a selection
    truncated: bool
    pictures: tuple[Picture, ...]
    n_more_pictures: int
    exchanges: tuple[Exchange, ...]
    more: tuple[Exchange, ...]  # folded away

    @property
    def wide(self) -> bool:
        """Whether the picture and its counterfactual stand better below each other."""
        return len(self.pictures) == 1 and self.pictures[0].aspect > 2


@dataclass(frozen=True, kw_only=True)
class Blinder:
    """Makes again the blind picture of a sample, or for a random counterfactual one like it."""

    change: Condition
    seed: int
    dataset: Dataset
    rows_after: Callable[[int], Iterator[int]]  # the other rows with images, to borrow from

    @staticmethod
    def of(spec: str, seed: int, dataset: Dataset, rows_after: Callable[[int], Iterator[int]]) -> Blinder:
        return Blinder(change=parse_condition(spec), seed=seed, dataset=dataset, rows_after=rows_after)

    def blind(self, image: Image.Image, row: int) -> Image.Image | None:
        """None if the blind condition shows no picture."""
        if not isinstance(self.change, Counterfactual):
            return None
        return self.change(image, rng=np.random.default_rng([self.seed, row]), other=lambda: self._other(row, image))

    def _other(self, row: int, image: Image.Image) -> Image.Image:
        """The first image of the next row that has a readable one; without any, the image itself."""
        for other in islice(self.rows_after(row), 20):
            sample = self.dataset[other]
            if other == row or not isinstance(sample, Sample) or not sample.images:
                continue
            try:
                return sample.images[0].open()
            except ImageError:
                continue
        return image


def draw_card(
    sample: Sample, tokens: RowTokens, mask: Bool[np.ndarray, " A"] | None, limit: float, blinder: Blinder
) -> Card:
    """`mask`: the tokens that keep their loss, None without a selection. `limit`: the gain that takes full colour."""
    exchanges = tuple(_exchanges(sample, tokens, mask, limit))
    return Card(
        row=sample.row,
        id=sample.id,
        source=sample.source,
        gain=float(tokens.gain.mean(dtype=np.float64)),
        n_tokens=len(tokens.gain),
        n_active=None if mask is None else int(mask.sum()),
        truncated=tokens.truncated,
        pictures=tuple(_pictures(sample, blinder, tokens.image_gain)),
        n_more_pictures=max(0, len(sample.images) - MOST_PICTURES),
        exchanges=exchanges[:OPEN_ANSWERS],
        more=exchanges[OPEN_ANSWERS:],
    )


def _pictures(sample: Sample, blinder: Blinder, image_gain: Sequence[float]) -> Iterator[Picture]:
    """The first ones; `image_gain`: of each picture, or of none."""
    for number, reference in enumerate(sample.images[:MOST_PICTURES]):
        try:
            image = reference.open()
            blind = blinder.blind(image, sample.row)
            yield Picture(
                seen=data_uri(image),
                blind="" if blind is None else data_uri(blind),
                aspect=image.width / image.height,
                gain=image_gain[number] if len(image_gain) > 1 else None,
            )
        except ImageError as error:
            yield Picture(seen="", blind="", problem=str(error))


def data_uri(image: Image.Image) -> str:
    """A thumbnail of the image as a data URI: PNG where that is smaller (drawings), else JPEG."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=82)
    kind, data = min(("png", png.getvalue()), ("jpeg", jpeg.getvalue()), key=lambda choice: len(choice[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _exchanges(sample: Sample, tokens: RowTokens, mask: np.ndarray | None, limit: float) -> Iterator[Exchange]:
    """Every answer with what was said before it."""
    asked: list[str] = []
    answer = n_images = 0
    for turn in sample.turns:
        if turn.role != "assistant":
            text, n_images = number_images(turn.text, n_images, len(sample.images))
            asked.append(text)
            continue
        pieces = answer_pieces(turn.text, tokens, answer, mask, limit)
        yield Exchange(asked="\n".join(asked), pieces=tuple(pieces))
        asked, answer = [], answer + 1


def number_images(text: str, before: int, total: int) -> tuple[str, int]:
    """The text with its image marks numbered (left out where the sample has one image), and the marks up to here."""
    parts = text.split(IMAGE_MARK)
    count = before + len(parts) - 1
    if total <= 1:
        return " ".join(part.strip() for part in parts if part.strip()), count
    marked = [f"[image {before + k}]{part}" for k, part in enumerate(parts[1:], start=1)]
    return (parts[0] + "".join(marked)).strip(), count


def answer_pieces(
    text: str, tokens: RowTokens, answer: int, mask: Bool[np.ndarray, " A"] | None, limit: float
) -> Iterator[Piece]:
    """The row's answer `answer`, which reads `text`, as tokens and gaps in order; no character is lost or repeated."""
    here = tokens.of_answer(answer)
    keep = np.ones(len(here), dtype=bool) if mask is None else mask
    columns = (column[here].tolist() for column in (tokens.chars, tokens.seen, tokens.blind, keep))
    cursor = 0
    for (start, end), seen, blind, kept in zip(*columns, strict=True):
        if start > cursor:
            yield Piece(text=text[cursor:start], kind="gap")
            cursor = start
        own = text[cursor:end]
        cursor = max(cursor, end)
        yield _token_piece(own, is_end=start >= len(text), seen=seen, blind=blind, kept=kept, limit=limit)
    if cursor < len(text):
        yield Piece(text=text[cursor:], kind="gap")


def _token_piece(own: str, *, is_end: bool, seen: float, blind: float, kept: bool, limit: float) -> Piece:
    """`own`: the characters that are this token's and no earlier one's."""
    share = strength(blind - seen, limit)
    kind, lead, ink, tail = _inked(own, is_end)
    return Piece(
        text=ink,
        kind=kind,
        title=describe(seen=seen, blind=blind),
        tone="up" if share > 0 else "down" if share < 0 else "",
        alpha=round(abs(share), 2),
        dropped=not kept,
        lead=lead,
        tail=tail,
    )


def _inked(own: str, is_end: bool) -> tuple[str, str, str, str]:
    """Kind of piece, and its text cut into blanks in front, what takes the colour, and blanks behind."""
    if is_end:
        return "end", "", "⏎", ""
    core = own.strip()
    if core:
        lead = own[: len(own) - len(own.lstrip())]
        return "token", lead, core, own[len(lead) + len(core) :]
    if own.strip(" "):
        return "blank", "", visible(own), own  # a mark, then the line break itself
    return ("blank", "", own, "") if own else ("blank", "", "·", "")  # part of a character already shown


def describe(*, seen: float, blind: float) -> str:
    """The three numbers of a token in one line."""
    return f"gain {signed(blind - seen)} · blind {blind:.2f} · seen {seen:.2f}"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, and no sign at zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")
