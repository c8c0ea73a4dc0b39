"""From rows to units: what is shared, what is skipped, and worker processes that change nothing and leave nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from naive import built, naive_nll, picture
from tiny_models import llava_vicuna, make_sample
from visgain.counterfactuals import Condition, Counterfactual, parse_condition
from visgain.errors import EncodingError, ImageError, VisgainError
from visgain.scoring.engine import Engine
from visgain.scoring.feed import Fed, Feed, deaths_told, feed
from visgain.scoring.plan import make_plan
from visgain.types import Encoded, Sample, Skipped, TokenScores, Turn
from visgain.vlm.encode import Encoder, error_as_value
from visgain.vlm.template import make_encoder
from zoo import ZOO

QUESTION, ANSWER = "<image>\nWhat is this?", "A red cup."


@dataclass(frozen=True)
class Shown:
    """A picture of a dataset by its name, and what it shows; None if it cannot be read."""

    key: str
    seed: int | None
    size: tuple[int, int] = (40, 30)

    def hint(self) -> str | None:
        return None if self.seed is None else f"content {self.seed}"

    def open(self) -> Image.Image:
        if self.seed is None:
            raise ImageError(f"image not found: {self.key}")
        return picture(self.seed, self.size)


class Rows(list[Sample]):
    """A dataset in memory."""

    path, image_root, fingerprint = Path("data.json"), Path(), "fingerprint"


def rows(*described: tuple[tuple[str, ...], tuple[Shown, ...]]) -> Rows:
    return Rows(
        replace(make_sample(*texts, images=0), row=number, id=f"id {number}", images=shown, source="coco")
        for number, (texts, shown) in enumerate(described)
    )


def about(*shown: Shown, answer: str = ANSWER) -> tuple[tuple[str, ...], tuple[Shown, ...]]:
    return ("<image>\n" * len(shown) + "What is this?", answer), shown


@dataclass(frozen=True)
class ZooEncoder:
    """Any family of the zoo, those without a processor included."""

    name: str
    processor: Any = None
    max_length: int = 2048

    def prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Encoded:
        raise NotImplementedError

    def encode(self, sample: Sample, images: Sequence[Image.Image]) -> Encoded:
        return ZOO[self.name].encode(built(self.name), sample, images)

    def encode_all(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Encoded | EncodingError]:
        return [error_as_value(self.encode, sample, images) for sample in samples]


def source(dataset: Rows, name: str = "llava", counterfactual: str | Condition = "blur", **options: Any) -> Feed:
    if isinstance(counterfactual, str):
        counterfactual = parse_condition(counterfactual)
    encoder = make_encoder(built(name), **options) if ZOO[name].processor else ZooEncoder(name)
    return Feed(dataset=dataset, encoder=encoder, counterfactual=counterfactual, seed=7)


def plain(value: Any) -> Any:
    """`value` with nothing inside that does not compare."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return type(value).__name__, str(value.dtype), tuple(value.shape), value.tolist()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def pixels(fed: Fed) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(unit.seen["pixel_values"], unit.blind["pixel_values"]) for unit in fed.units]


# ---------------------------------------------------------------- what is shared


def test_a_unit_holds_the_conversations_about_what_a_picture_shows_whatever_its_name() -> None:
    one, copy, other = Shown("a.png", 1), Shown("copy/a.png", 1), Shown("b.png", 2)
    dataset = rows(about(one), about(other), about(copy, answer="no"), about(one, other), about(copy, other))
    plan = make_plan(dataset, 5, 100)
    assert sorted(plan.units(0)) == [[0, 2], [1], [3, 4]]
    fed = source(dataset)[0, [0, 1, 2, 3, 4]]
    assert [[record.row for record in records] for records in fed.records] == [[0, 2], [1], [3, 4]]
    assert [len(unit.rows) for unit in fed.units] == [2, 1, 2]
    assert fed.done == []


def test_pictures_that_only_seem_to_be_the_same_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shown, "hint", lambda self: "the same")
    dataset = rows(about(Shown("a.png", 1)), about(Shown("b.png", 2)), about(Shown("c.png", 1, size=(24, 40))))
    assert make_plan(dataset, 3, 100).units(0) == [[0, 1, 2]]
    fed = source(dataset)[0, [0, 1, 2]]
    assert [[record.row for record in records] for records in fed.records] == [[0], [1], [2]]
    alone = [source(dataset)[0, [row]] for row in range(3)]
    for unit, other in zip(fed.units, alone, strict=True):
        assert plain(unit) == plain(other.units[0])


def test_rows_whose_pictures_are_taken_by_the_question_are_units_by_question() -> None:
    shown = Shown("a.png", 1)
    texts = [("<image>What", "A"), ("<image>And", "no"), ("<image>What", "A red cup.")]
    dataset = rows(*((text, (shown,)) for text in texts))
    fed = source(dataset, "instructblip")[0, [0, 1, 2]]
    assert [[record.row for record in records] for records in fed.records] == [[0, 2], [1]]
    vlm, encoder = built("instructblip"), ZooEncoder("instructblip")
    engine = Engine(vlm=vlm, way="single", pack_tokens=1)
    found = dict(zip([0, 2, 1], engine.score(fed.units), strict=True))
    blind = parse_condition("blur")(shown.open(), rng=np.random.default_rng(0), other=pytest.fail)
    for row, (seen, unseen) in found.items():
        assert np.allclose(seen, naive_nll(vlm, encoder.encode(dataset[row], [shown.open()])), rtol=0, atol=1e-4)
        assert np.allclose(unseen, naive_nll(vlm, encoder.encode(dataset[row], [blind])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.processor])
def test_encoding_together_is_encoding_each_with_the_pictures_prepared_once(name: str) -> None:
    short = [
        make_sample("<image>\nWhat is this?", "A red cup.", "And?", "no", images=1),
        make_sample("What is<image>", "no", images=1),
        make_sample("<image>\nWhat is this?", "A red cup." * 30, images=1),
    ]
    length = max(len(make_encoder(built(name)).encode(sample, [picture(0)]).input_ids) for sample in short[:2])
    encoder = make_encoder(built(name), max_length=length)
    samples = [*short, make_sample("Is there anything to see at all? " * 30 + "<image>", "no")]
    images, calls = [picture(0)], []
    alone = [error_as_value(encoder.encode, sample, images) for sample in samples]
    with counted(encoder, calls):
        encoder.encode(samples[0], images)
    once = len(calls)
    calls.clear()
    with counted(encoder, calls):
        together = encoder.encode_all(samples, images)
    assert len(calls) == once > 0
    assert [type(one) for one in together] == [Encoded] * 3 + [EncodingError]
    assert together[2].truncated
    for one, other in zip(together, alone, strict=True):
        assert plain(one) == plain(other) if isinstance(one, Encoded) else str(one) == str(other)
    again = encoder.encode_all(samples[:1], [picture(1)])[0]
    assert plain(again) == plain(encoder.encode(samples[0], [picture(1)])) != plain(alone[0])


class counted:  # noqa: N801
    """Notes every call of the encoder's image processor in this block."""

    def __init__(self, encoder: Encoder, calls: list[int]) -> None:
        self.processor, self.calls = encoder.processor, calls

    def __enter__(self) -> None:
        self.real = self.processor.image_processor
        self.processor.image_processor = Counter(self.real, self.calls)

    def __exit__(self, *_: object) -> None:
        self.processor.image_processor = self.real


class Counter:
    def __init__(self, real: Any, calls: list[int]) -> None:
        self._real, self._calls = real, calls

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        self._calls.append(1)
        return self._real(images, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("template", ["llava-1.5", "llava-1.5-align"])
def test_llavas_own_templates_prepare_the_pictures_once_too(template: str, blank_model: Path) -> None:
    encoder = make_encoder(llava_vicuna(blank_model), template)
    samples = [make_sample("<image>\nWhat?", answer) for answer in ("A red cup.", "no", "A dog.")]
    calls: list[int] = []
    with counted(encoder, calls):
        together = encoder.encode_all(samples, [picture(0)])
    assert len(calls) == 1
    assert [plain(one) for one in together] == [plain(encoder.encode(one, [picture(0)])) for one in samples]


# ---------------------------------------------------------------- the blind side


@pytest.mark.parametrize("spec", ["noise", "shuffle"])
def test_what_is_drawn_at_random_depends_on_the_picture_alone(spec: str) -> None:
    one, copy, other, third = Shown("a.png", 1), Shown("z.png", 1), Shown("b.png", 2), Shown("c.png", 3)
    dataset = rows(about(one), about(other), about(copy), about(third, one))
    whole = source(dataset, counterfactual=spec)
    first, second, both = pixels(whole[0, [0, 1, 3]])
    for order in ([1, 2], [3, 2, 1], [2]):
        fed = whole[5, order]
        for (seen, blind), records in zip(pixels(fed), fed.records, strict=True):
            expected = {1: second, 2: first, 3: both}[records[0].row]
            assert torch.equal(seen, expected[0])
            assert torch.equal(blind, expected[1])
    assert torch.equal(both[1][1:], first[1]), "the same picture as one of two"
    assert not torch.equal(first[0], first[1])
    reseeded = replace(whole, seed=8)[0, [0]]
    assert torch.equal(pixels(reseeded)[0][0], first[0])
    assert not torch.equal(pixels(reseeded)[0][1], first[1])


def test_a_swapped_picture_shows_something_else_whatever_its_name() -> None:
    one, copy, other, broken = Shown("a.png", 1), Shown("z.png", 1), Shown("b.png", 2), Shown("c.png", None)
    alike, different = (
        source(rows(*map(about, shown)), counterfactual="swap")
        for shown in ([one, copy, broken], [one, copy, broken, other])
    )
    fed = alike[0, [0, 1]]
    assert (fed.units, [type(record) for record in fed.done]) == ([], [Skipped, Skipped])
    assert "no other picture" in fed.done[0].reason
    [(seen, blind)] = pixels(different[0, [0, 1]])
    [(swapped, _)] = pixels(different[0, [3]])
    assert torch.equal(blind, swapped)
    assert not torch.equal(seen, blind)


@dataclass(frozen=True)
class Halved(Counterfactual):
    """Of another size than it should be."""

    name: ClassVar[str] = "halved"

    def __call__(self, image: Image.Image, *, rng: Any, other: Callable[[], Image.Image]) -> Image.Image:
        return image.resize((image.height // 2, image.width // 2))


def test_a_counterfactual_that_takes_other_tokens_is_a_reason_and_not_a_number() -> None:
    fed = source(rows(about(Shown("a.png", 1)), about(Shown("a.png", 1))), "qwen2_vl", Halved())[0, [0, 1]]
    assert fed.units == []
    assert [(record.row, record.reason) for record in fed.done] == [
        (row, "the counterfactual changed the number of image tokens") for row in (0, 1)
    ]


# ---------------------------------------------------------------- what cannot be scored


def test_a_row_that_cannot_be_read_takes_no_other_with_it() -> None:
    good, gone = Shown("a.png", 1), Shown("gone.png", None)
    long = ("<image>\n" + "What is this? " * 60, ANSWER), (good,)
    text_only = ("What is this?", ANSWER), ()
    dataset = rows(about(good), about(gone), about(good, gone), long, text_only, about(good, answer="no"))
    dataset[4:4] = [Skipped(row=9, id="nine", reason="no conversations")]
    fed = source(dataset, max_length=80)[3, [0, 1, 2, 3, 4, 5, 6]]
    assert fed.part == 3
    [unit], [records] = fed.units, fed.records
    assert [record.row for record in records] == [0, 5]
    assert [len(record.nll_seen) for record in records] == [0, 0]
    assert [np.array_equal(record.token_id, row.token_id) for record, row in zip(records, unit.rows, strict=True)]
    assert {(record.id, record.source, record.n_images) for record in records} == {
        ("id 0", "coco", 1),
        ("id 5", "coco", 1),
    }
    reasons = {record.row: record.reason for record in fed.done if isinstance(record, Skipped)}
    assert reasons == {
        1: "image not found: gone.png",
        2: "image not found: gone.png",
        3: "no answer token fits into --max-length 80",
        9: "no conversations",
    }
    [text] = [record for record in fed.done if isinstance(record, TokenScores)]
    assert (text.row, text.n_images, len(text.token_id) > 0, len(text.nll_seen)) == (4, 0, True, 0)


def test_an_answer_of_nothing_but_its_end_is_skipped_where_ends_are_ignored() -> None:
    dataset = rows(about(Shown("a.png", 1)), (("<image>\nWhat?", "no", "And?", " "), (Shown("a.png", 1),)))
    fed = replace(source(dataset), end_of_turn="ignore")[0, [0, 1]]
    [unit] = fed.units
    for row in unit.rows:
        assert (row.chars[:, 1] > row.chars[:, 0]).all()
    assert len(fed.done) + sum(map(len, fed.records)) == 2


# ---------------------------------------------------------------- worker processes


def some(n: int = 12) -> Rows:
    described = [about(*[Shown(f"{k // 2}.png", k // 2)] * (1 + (k % 5 == 4))) for k in range(n)]
    described[3] = about(Shown("gone.png", None))
    described[7] = ("What is this?", ANSWER), ()
    return rows(*described)


ITEMS = [(k // 3, [2 * k, 2 * k + 1]) for k in range(6)]


def test_any_number_of_workers_gives_the_same_units_in_the_same_order() -> None:
    alone, *others = ([plain(fed) for fed in feed(source(some()), ITEMS, workers)] for workers in (0, 1, 2))
    assert len(alone) == len(ITEMS)
    assert all(other == alone for other in others)


@pytest.mark.parametrize("workers", [0, 1])
def test_items_are_taken_up_as_they_are_needed(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[tuple[int, Sequence[int]]]:
        for part in range(100):
            taken.append(part)
            yield part, [0]

    stream = feed(source(some()), items(), workers)
    for part in range(20):
        assert next(stream).part == part
        assert part < len(taken) <= part + 1 + 9 * workers
    stream.close()


class Dying(Rows):
    """Ends the process that reads row 5, unless that is the one that the user started."""

    how: Callable[[], None] = staticmethod(lambda: os._exit(3))

    def __getitem__(self, row: int) -> Sample:
        if row == 5 and get_worker_info() is not None:
            self.how()
        return super().__getitem__(row)


@pytest.mark.parametrize("how", [lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_worker_that_dies_is_an_error_and_no_endless_wait(
    how: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dying, "how", staticmethod(how))
    begun = time.monotonic()
    with pytest.raises(VisgainError, match="a process that prepares rows died"), deaths_told():
        list(feed(source(Dying(some())), ITEMS, 2))
    assert time.monotonic() - begun < 60


class Failing(Rows):
    def __getitem__(self, row: int) -> Sample:
        raise RuntimeError("a defect of ours")


def test_a_defect_in_a_worker_is_told_as_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a defect of ours"), deaths_told():
        list(feed(source(Failing(some())), ITEMS, 1))


class Slow(Rows):
    def __getitem__(self, row: int) -> Sample:
        time.sleep(0.05)
        return super().__getitem__(row % len(self))


def feed_for_ever(pipe: Connection) -> None:
    """A process with two workers that tells their numbers when they work."""
    endless = ((0, [number]) for number in range(1 << 30))
    for number, _ in enumerate(feed(source(Slow(some())), endless, 2)):
        if number == 2:
            pipe.send([child.pid for child in multiprocessing.active_children()])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def parent_and_workers() -> Iterator[tuple[multiprocessing.Process, list[int]]]:
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=feed_for_ever, args=(theirs,))
    parent.start()
    assert ours.poll(60)
    workers = ours.recv()
    yield parent, workers
    for pid in (parent.pid, *workers):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    parent.join()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_workers_end_soon_after_their_parent_was_killed(
    parent_and_workers: tuple[multiprocessing.Process, list[int]],
) -> None:
    parent, workers = parent_and_workers
    assert len(workers) == 2
    assert all(map(is_alive, workers))
    parent.kill()
    end = time.monotonic() + 2 + 8 * (os.getloadavg()[0] > 1.5)  # a busy machine may be slow to let them notice
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_an_interruption_leaves_the_workers_to_their_parent(
    parent_and_workers: tuple[multiprocessing.Process, list[int]],
) -> None:
    parent, workers = parent_and_workers
    for pid in workers:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert all(map(is_alive, workers))
    assert parent.is_alive()
