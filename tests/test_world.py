"""The embedded world against the world itself: seeds, priors, whether what is said is true, and what needs the picture.

Scenes are tuples (kind, colour, size, cell) here, and `said_of` answers any question about one without a line of the
package, so that a reply, its marks and its key are each compared with something that was not made from them.
"""

from __future__ import annotations

import colorsys
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visgain.config import WorldConfig
from visgain.data import open_dataset
from visgain.errors import ConfigError
from visgain.types import Sample
from visgain.world import talk
from visgain.world.dataset import SPLITS, WorldRow, draw_row, write_world
from visgain.world.draw import SIDE, draw_picture
from visgain.world.evaluate import caption_kinds, evaluate_world, grade, is_right
from visgain.world.scene import (
    COLOURS,
    COMPANION,
    KINDS,
    MAX_OBJECTS,
    SIZES,
    USUAL_COLOUR,
    Scene,
    Thing,
    draw_scene,
)
from visgain.world.talk import Exchange

Fact = tuple[str, str, str, int]

NUMBER = ["zero", "one", "two", "three", "four"]
TRUTHFUL = [name for name, split in SPLITS.items() if split.has_truth]
PLACE = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]


def facts(scene: Scene) -> list[Fact]:
    return [astuple(thing) for thing in scene.things]


def scene_of(things: Sequence[Fact]) -> Scene:
    return Scene(
        things=tuple(Thing(kind=k, colour=c, size=s, cell=cell) for k, c, s, cell in sorted(things, key=lambda t: t[3]))
    )


def scenes(count: int, bias: float, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, bias) for _ in range(count)]


def rows(split: str, count: int, seed: int = 1) -> Iterator[WorldRow]:
    for row in range(count):
        yield draw_row(SPLITS[split], SPLITS[split].bias, seed, row)[0]


# ---------------------------------------------------------------- an answerer of our own


def only(things: Sequence[Fact], kind: str) -> Fact | None:
    found = [thing for thing in things if thing[0] == kind]
    return found[0] if len(found) == 1 else None


def singular(word: str) -> str:
    return {"fish": "fish", "leaves": "leaf"}.get(word, word.removesuffix("s"))


def content_of(things: Sequence[Fact], place: str) -> str | None:
    there = [thing for thing in things if PLACE[thing[3]] == place]
    return f"There is a {there[0][2]} {there[0][1]} {there[0][0]}." if there else None


def count_of(things: Sequence[Fact], plural: str) -> str:
    return f"I count {NUMBER[sum(thing[0] == singular(plural) for thing in things)]}."


def existence_of(things: Sequence[Fact], kind: str) -> str:
    return f"Yes, there is a {kind}." if any(t[0] == kind for t in things) else f"No, there is no {kind}."


def about_one(tell: Callable[[Fact], str]) -> Callable[[Sequence[Fact], str], str | None]:
    def answer(things: Sequence[Fact], kind: str) -> str | None:
        thing = only(things, kind)
        return None if thing is None else tell(thing)

    return answer


def sideways_of(things: Sequence[Fact], kind: str, other: str) -> str | None:
    one, two = only(things, kind), only(things, other)
    if one is None or two is None or one[3] % 3 == two[3] % 3:
        return None
    return f"The {kind} is to the {'left' if one[3] % 3 < two[3] % 3 else 'right'} of the {other}."


def upwards_of(things: Sequence[Fact], kind: str, other: str) -> str | None:
    one, two = only(things, kind), only(things, other)
    if one is None or two is None or one[3] // 3 == two[3] // 3:
        return None
    return f"The {kind} is {'above' if one[3] // 3 < two[3] // 3 else 'below'} the {other}."


colour_of = about_one(lambda thing: f"The {thing[0]} is {thing[1]}.")
size_of = about_one(lambda thing: f"The {thing[0]} is {thing[2]}.")
place_of = about_one(lambda thing: f"The {thing[0]} is in the {PLACE[thing[3]]}.")

QUESTIONS: dict[str, Callable[..., str | None]] = {
    r"What colour is the (\w+)\?": colour_of,
    r"Which colour does the (\w+) have\?": colour_of,
    r"Is the (\w+) small or large\?": size_of,
    r"How big is the (\w+)\?": size_of,
    r"Where is the (\w+)\?": place_of,
    r"In which place do you see the (\w+)\?": place_of,
    r"What is in the (\w+ \w+)\?": content_of,
    r"Which object do you see in the (\w+ \w+)\?": content_of,
    r"How many (\w+) are there\?": count_of,
    r"Count the (\w+)\.": count_of,
    r"Is there a (\w+) in the picture\?": existence_of,
    r"Do you see a (\w+)\?": existence_of,
    r"Is the (\w+) to the left or to the right of the (\w+)\?": sideways_of,
    r"Is the (\w+) above or below the (\w+)\?": upwards_of,
}


def said_of(things: Sequence[Fact], question: str) -> str | None:
    """The only true reply, or None where the question takes something for granted that is not so."""
    for pattern, answer in QUESTIONS.items():
        if match := re.fullmatch(pattern, question):
            return answer(things, *match.groups())
    raise AssertionError(f"a question that nobody knows: {question}")


def caption_of(things: Sequence[Fact]) -> str:
    listed = [f"a {size} {colour} {kind} in the {PLACE[cell]}" for kind, colour, size, cell in things]
    head = f"{NUMBER[len(things)].capitalize()} object{'s' if len(things) > 1 else ''}: "
    return head + " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed) + "."


def notes_of(things: Sequence[Fact]) -> set[str]:
    alone = [thing for thing in things if only(things, thing[0])]
    return {f"{kind} {colour} {size} {PLACE[cell]}" for kind, colour, size, cell in alone}


def neighbours(things: list[Fact]) -> Iterator[list[Fact]]:
    """Scenes that differ from this one in one respect."""
    taken = {thing[3] for thing in things}
    for i, (kind, colour, size, cell) in enumerate(things):
        others = things[:i] + things[i + 1 :]
        yield from ([*others, (kind, new, size, cell)] for new in COLOURS)
        yield from ([*others, (kind, colour, new, cell)] for new in SIZES)
        yield from ([*others, (new, colour, size, cell)] for new in KINDS)
        yield from ([*others, (kind, colour, size, new)] for new in range(9) if new not in taken)
        for j in range(i):
            swapped = [*things]
            swapped[i], swapped[j] = (*things[i][:3], things[j][3]), (*things[j][:3], cell)
            yield swapped
        if others:
            yield others
    for old in {thing[0] for thing in things}:
        for new in KINDS:
            yield [(new if thing[0] == old else thing[0], *thing[1:]) for thing in things]
    if len(things) < MAX_OBJECTS:
        yield from ([*things, (kind, "red", "small", cell)] for kind in KINDS for cell in range(9) if cell not in taken)


def words_of(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\w+", text)]


def marked_words(said: Exchange) -> set[tuple[int, int]]:
    """The words inside the visual spans, as spans; fails if a span does not begin and end with a word."""
    words = words_of(said.answer)
    inside = {(a, b) for a, b in words for start, end in said.visual if start <= a and b <= end}
    for start, end in said.visual:
        assert {start, end} <= {edge for a, b in inside for edge in (a, b)}, said
    return inside


# ---------------------------------------------------------------- the same seed, the same world


def test_a_row_is_the_same_bytes_however_many_rows_are_drawn(tmp_path: Path) -> None:
    for count in (6, 25):
        write_world(WorldConfig(out=tmp_path / str(count), split="align", rows=count, seed=4))
    few, many = tmp_path / "6", tmp_path / "25"
    assert json.loads((few / "data.json").read_text()) == json.loads((many / "data.json").read_text())[:6]
    assert (few / "truth.jsonl").read_text().splitlines() == (many / "truth.jsonl").read_text().splitlines()[:6]
    pictures = sorted((few / "images").iterdir())
    assert len(pictures) >= 5
    for picture in pictures:
        assert picture.read_bytes() == (many / "images" / picture.name).read_bytes()


def test_another_seed_another_split_or_another_row_is_another_picture(tmp_path: Path) -> None:
    seen = []
    for name, split, seed in (("a", "train", 0), ("b", "train", 1), ("c", "test", 0), ("d", "align", 0)):
        write_world(WorldConfig(out=tmp_path / name, split=split, rows=8, seed=seed, bias=0.0))  # type: ignore[arg-type]
        lines = (tmp_path / name / "truth.jsonl").read_text().splitlines()
        seen += [tuple(map(str, things)) for line in lines if len(things := json.loads(line)["things"]) > 1]
    assert len(seen) > 15
    assert len(set(seen)) == len(seen)


# ---------------------------------------------------------------- the dial of language bias


def two_objects(bias: float, count: int) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [scene for _ in range(count) if len((scene := draw_scene(rng, bias, most=2)).things) == 2]


@pytest.mark.parametrize(
    ("bias", "expected"), [(1.0, 1.0), (0.5, 0.5 + 0.5 / 7), (0.0, 1 / 7), (-0.5, 0.5 / 7), (-1.0, 0.0)]
)
def test_the_dial_sets_the_share_of_usual_colours(bias: float, expected: float) -> None:
    things = [thing for scene in scenes(1200, bias) for thing in scene.things]
    share = mean(thing.colour == USUAL_COLOUR[thing.kind] for thing in things)
    if expected in (0.0, 1.0):
        assert share == expected
    else:
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(things)) ** 0.5)


@pytest.mark.parametrize(
    # Without bias the second object repeats the first's kind one time in four, else it is one of the ten kinds.
    ("bias", "expected"),
    [(1.0, 1.0), (0.5, 0.5 + 0.5 * 0.075), (0.0, 0.075), (-0.5, 0.5 * 0.075), (-1.0, 0.0)],
)
def test_the_dial_sets_the_share_of_companions(bias: float, expected: float) -> None:
    pairs = two_objects(bias, 3000)
    share = mean(COMPANION[pair.things[0].kind] == pair.things[1].kind for pair in pairs)
    if expected in (0.0, 1.0):
        assert share == expected
    else:
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / len(pairs)) ** 0.5)


def test_at_minus_one_companions_never_meet_in_a_scene_of_any_size() -> None:
    drawn = scenes(3000, -1.0)
    assert Counter(len(scene.things) for scene in drawn).keys() == {1, 2, 3, 4}
    assert not [scene for scene in drawn if {COMPANION[kind] for kind in scene.kinds} & scene.kinds]


def test_at_minus_one_people_ask_for_the_companion_that_is_not_there() -> None:
    rng = np.random.default_rng(0)
    asked = [(scene, talk.existence(rng, scene, -1.0)) for scene in scenes(600, -1.0)]
    yes = [said.key == "yes" for _, said in asked]
    assert mean(yes) == pytest.approx(0.5, abs=0.08)
    for scene, said in asked:
        if said.key == "no":
            (kind,) = said.mentions
            assert COMPANION[kind] in scene.kinds


def test_companions_go_in_pairs_and_every_kind_has_one_usual_colour() -> None:
    assert set(COMPANION) == set(KINDS) == set(USUAL_COLOUR)
    assert all(COMPANION[COMPANION[kind]] == kind != COMPANION[kind] for kind in KINDS)
    assert set(USUAL_COLOUR.values()) <= set(COLOURS)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 0.9])
def test_a_scene_has_one_to_four_objects_in_reading_order_in_cells_of_their_own(bias: float) -> None:
    for scene in scenes(300, bias):
        cells = [thing.cell for thing in scene.things]
        assert 1 <= len(cells) <= MAX_OBJECTS
        assert cells == sorted(set(cells))
        assert set(cells) <= set(range(9))


def test_the_easy_split_shows_one_object_at_a_time() -> None:
    assert {len(row.scene.things) for row in rows("easy", 60) if row.scene} == {1}


# ---------------------------------------------------------------- what is said is true


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_every_reply_about_a_picture_is_true_of_its_scene(split: str) -> None:
    topics = Counter()
    for row in rows(split, 700):
        for said in row.exchanges:
            topics[said.topic] += 1
            if not said.mentions or said.topic in ("usual colour", "companion"):
                continue
            assert row.scene is not None
            things = facts(row.scene)
            if said.topic == "notes":
                assert set(said.answer.removesuffix(".").split("; ")) == notes_of(things)
                continue
            expected = caption_of(things) if said.topic == "caption" else said_of(things, said.question)
            assert said.answer == expected, said
    talk_of = SPLITS[split]
    assert sum(topics.values()) >= 690  # some rows may have nothing that fits
    notes = talk_of.listed if talk_of.lister is talk.notes else 0
    assert (topics["caption"] + topics["notes"] > 50) == (talk_of.captions + notes > 0)
    assert (topics["existence"] > 5) == (talk_of.existence > 0 or talk.existence in talk_of.visual)


@pytest.mark.parametrize(("split", "apart"), [("relate", {0, 1, 2}), ("far", {2})])
def test_relations_are_asked_once_of_every_two_objects_or_of_the_far_ones(split: str, apart: set[int]) -> None:
    seen = set()
    for row in rows(split, 300):
        related = [said for said in row.exchanges if said.topic == "relation"]
        if len(related) != len(row.exchanges) or not related:
            continue
        assert row.scene is not None
        pairs = {
            frozenset({one.kind, two.kind}): abs(one.column - two.column)
            for one, two in combinations(row.scene.unique, 2)
            if abs(one.column - two.column) in apart
        }
        assert Counter(frozenset(said.mentions) for said in related) == dict.fromkeys(pairs, 1)
        assert split != "far" or {said.key for said in related} <= {"left", "right"}
        seen |= set(pairs.values())
    assert seen == apart


def test_replies_from_the_text_alone_are_true_of_the_world_and_marked_nowhere() -> None:
    rng = np.random.default_rng(3)
    scene = scenes(1, 0.0)[0]
    for _ in range(100):
        usual, beside = talk.usual_colour(rng, scene, 0.0), talk.companion(rng, scene, 0.0)
        more, named = talk.arithmetic(rng, scene, 0.0), talk.named_colour(rng, scene, 0.0)
        (kind,) = usual.mentions
        assert usual.answer == f"A {kind} is usually {USUAL_COLOUR[kind]}."
        assert kind in usual.question
        one, other = re.fullmatch(r"A (\w+) is often found beside a (\w+)\.", beside.answer).groups()  # type: ignore[union-attr]
        assert COMPANION[one] == other
        assert re.search(rf"\b{one}\?$", beside.question)
        a, b = re.fullmatch(r"Which is more, (\w+) or (\w+)\?", more.question).groups()  # type: ignore[union-attr]
        larger, smaller = sorted((a, b), key=NUMBER.index, reverse=True)
        assert more.answer == f"{larger.capitalize()} is more than {smaller}."
        avoided, chosen = named.question.split()[-1].rstrip("."), named.answer.split()[-1].rstrip(".")
        assert avoided != chosen
        assert {avoided, chosen} <= set(COLOURS)
        assert usual.visual == beside.visual == more.visual == named.visual == ()


def test_a_key_is_what_the_marked_words_say() -> None:
    for row in rows("align", 600):
        for said in row.exchanges:
            spoken = [said.answer[a:b].lower() for a, b in sorted(marked_words(said))]
            if said.topic == "content":
                assert said.key == spoken[-1]
            elif said.topic not in ("caption", "usual colour", "companion", "arithmetic", "named colour") and spoken:
                assert " ".join(said.key.split()[: len(spoken)]) == " ".join(spoken)


# ---------------------------------------------------------------- what needs the picture


def test_in_a_reply_the_marked_words_are_exactly_those_that_vary_after_the_same_question_and_beginning() -> None:
    """Thousands of replies as one tree of words for each question: a word is visual where its tree branches."""
    rng = np.random.default_rng(11)
    follows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    replies: list[Exchange] = []
    speakers = dict.fromkeys(talk.VISUAL, 2) | {talk.content: 8, talk.relation: 6}
    for scene in scenes(1500, 0.0, seed=5):
        for speak, times in speakers.items():
            replies += [said for _ in range(times) if (said := speak(rng, scene, 0.0)) is not None]
    for said in replies:
        for start, end in words_of(said.answer):
            follows[said.question, said.answer[:start]][said.answer[start:end]] += 1
    checked: Counter[tuple[str, bool]] = Counter()
    for said in replies:
        marked = marked_words(said)
        for word in words_of(said.answer):
            values = follows[said.question, said.answer[: word[0]]]
            varies = len(values) > 1
            # Where few replies share the beginning, chance may hide that a word varies, but never make one vary.
            if varies or values.total() >= 20:
                assert varies == (word in marked), (said, said.answer[slice(*word)])
                checked[said.topic, varies] += 1
    for topic in ("colour", "size", "place", "content", "count", "existence", "relation"):
        assert checked[topic, True] > 1000, topic
        assert checked[topic, False] > 1000, topic


def test_in_a_caption_the_marked_words_are_exactly_those_that_vary_after_the_same_beginning() -> None:
    """Every choice of cells, with one object of another size, colour or kind: all the branches there are."""
    same = ("cup", "red", "small")
    others = [("cup", "red", "large"), ("cup", "blue", "small"), ("star", "red", "small")]
    captions: list[Exchange] = []
    rng = np.random.default_rng(0)
    for number in range(1, MAX_OBJECTS + 1):
        looks = [[same] * number]
        looks += [[*[same] * i, other, *[same] * (number - i - 1)] for i in range(number) for other in others]
        for cells in combinations(range(9), number):
            things = [[(*what, cell) for what, cell in zip(look, cells, strict=True)] for look in looks]
            captions += [talk.caption(rng, scene_of(scene), 0.0) for scene in things]
    follows = defaultdict(set)
    for said in captions:
        for start, end in words_of(said.answer):
            follows[said.answer[:start]].add(said.answer[start:end])
    plain = [said for said in captions if not re.search("large|blue|star", said.answer)]
    assert len(plain) == 9 + 36 + 84 + 126
    for said in plain:
        marked = marked_words(said)
        for word in words_of(said.answer):
            assert (len(follows[said.answer[: word[0]]]) > 1) == (word in marked), (said, said.answer[slice(*word)])


def test_places_in_a_caption_are_marked_where_counting_all_arrangements_finds_a_choice() -> None:
    for number in range(1, MAX_OBJECTS + 1):
        arrangements = list(combinations(range(9), number))
        for cells in arrangements:
            for i, marked in enumerate(talk._marked_places(list(cells))):
                could_be = [PLACE[other[i]].split() for other in arrangements if other[:i] == cells[:i]]
                vertical, horizontal = PLACE[cells[i]].split()
                rows_left = {place[0] for place in could_be}
                columns_left = {place[1] for place in could_be if place[0] == vertical}
                vertical = f"[{vertical}]" if len(rows_left) > 1 else vertical
                horizontal = f"[{horizontal}]" if len(columns_left) > 1 else horizontal
                assert marked == f"{vertical} {horizontal}", cells


def visual_history(row: WorldRow) -> Iterator[tuple[list[Fact], list[Exchange], Exchange]]:
    """(facts, turns before, reply) for each reply of a conversation about a picture."""
    if row.scene and row.exchanges[0].topic not in ("caption", "usual colour", "companion"):
        for number, said in enumerate(row.exchanges):
            yield facts(row.scene), list(row.exchanges[:number]), said


def another_scene_says_another_word(
    things: list[Fact], before: list[Exchange], said: Exchange, word: tuple[int, int]
) -> bool:
    """Whether some scene agrees with all that was said up to this word, and not with the word."""

    def is_witness(other: list[Fact]) -> bool:
        answer = said_of(other, said.question)
        start, end = word
        return (
            answer is not None
            and answer[:start] == said.answer[:start]
            and re.match(r"\w+", answer[start:])[0] != said.answer[start:end]  # type: ignore[index]
            and all(said_of(other, turn.question) == turn.answer for turn in before)
        )

    return any(map(is_witness, neighbours(things))) or any(
        is_witness(two) for one in neighbours(things) for two in neighbours(one)
    )


@pytest.mark.parametrize("split", ["align", "train", "test"])
def test_for_every_marked_word_some_scene_agrees_with_the_conversation_so_far_and_not_with_the_word(split: str) -> None:
    checked: Counter[int] = Counter()
    for row in rows(split, 1500, seed=2):
        for things, before, said in visual_history(row):
            for word in marked_words(said):
                assert another_scene_says_another_word(things, before, said, word), (before, said, word)
                checked[len(before)] += 1
    assert checked[0] > 500
    assert split == "test" or checked[2] > 100


def test_words_that_earlier_turns_settle_are_not_marked() -> None:
    settled: Counter[str] = Counter()
    usual_marks = {"existence": 1, "count": 1, "place": 2}
    for row in rows("align", 4000, seed=7):
        for things, before, said in visual_history(row):
            if len(marked_words(said)) == usual_marks.get(said.topic, len(marked_words(said))):
                continue
            settled[said.topic] += 1
            if settled[said.topic] <= 3:  # the search for what is not there takes a second
                for word in set(words_of(said.answer)) - marked_words(said):
                    assert not another_scene_says_another_word(things, before, said, word), (before, said, word)
    assert settled["existence"] >= 3
    assert settled["count"] >= 3


def test_two_known_places_of_a_row_settle_the_third() -> None:
    scene = scene_of([("cup", "red", "small", 0), ("star", "red", "small", 1), ("tree", "red", "small", 2)])
    rng = np.random.default_rng(0)

    def where(kind: str) -> Exchange:
        return next(s for _ in range(100) if (s := talk.place(rng, scene, 0.0)) is not None and kind in s.mentions)

    first = talk._without_settled(where("cup"), [], scene)
    second = talk._without_settled(where("star"), [first], scene)
    third = talk._without_settled(where("tree"), [first, second], scene)
    assert [[said.answer[a:b] for a, b in said.visual] for said in (first, second, third)] == [
        ["top left"],
        ["top centre"],
        ["top"],
    ]


def test_no_kind_of_object_is_spoken_of_in_two_turns() -> None:
    names = {kind: kind for kind in KINDS} | {f"{kind}s": kind for kind in KINDS} | {"leaves": "leaf"}
    longest = 0
    for split in ("align", "train", "questions"):
        for row in rows(split, 800, seed=3):
            kinds = [
                {names[word] for word in re.findall("[a-z]+", said.question + " " + said.answer) if word in names}
                for said in row.exchanges
            ]
            assert sum(map(len, kinds)) == len(set().union(*kinds)), row.exchanges
            longest = max(longest, len(kinds))
    assert longest == SPLITS["align"].turns[1] == 4


def test_brackets_mark_spans_and_leave_the_text() -> None:
    said = talk.exchange("topic", "question", "A [red] cup and [two] [stars].")
    assert said.answer == "A red cup and two stars."
    assert [said.answer[a:b] for a, b in said.visual] == ["red", "two", "stars"]


# ---------------------------------------------------------------- the dataset on disk


@pytest.fixture(scope="module")
def every_split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("splits")
    for split in SPLITS:
        write_world(WorldConfig(out=folder / split, split=split, rows=60, seed=9))  # type: ignore[arg-type]
    return {split: folder / split for split in SPLITS}


@pytest.mark.parametrize("split", TRUTHFUL)
def test_a_split_opens_as_a_llava_dataset_without_a_row_to_skip(every_split: dict[str, Path], split: str) -> None:
    folder = every_split[split]
    dataset = open_dataset(folder / "data.json")
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    assert len(dataset) == len(truth) == 60
    used = set()
    for row, known in enumerate(truth):
        sample = dataset[row]
        assert isinstance(sample, Sample)
        assert (known["row"], sample.id) == (row, f"{split}-{row:06d}")
        assert len(sample.answers) == len(known["answers"]) == len(known["topics"]) == len(known["keys"])
        assert len(sample.images) == int(bool(known["things"]))
        for image in sample.images:
            assert image.open().size == (SIDE, SIDE)
            used.add(folder / image.key)
        if not sample.images:
            assert sample.source == "text"
        else:
            topics = set(known["topics"])
            assert sample.source == (known["topics"][0] if len(topics) == 1 else "conversation")
    assert used == set((folder / "images").iterdir())


@pytest.mark.parametrize("split", TRUTHFUL)
def test_truth_on_disk_indexes_the_answers_on_disk(every_split: dict[str, Path], split: str) -> None:
    folder = every_split[split]
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
    data = json.loads((folder / "data.json").read_text())
    spans_seen = 0
    for known, record in zip(truth, data, strict=True):
        questions = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"][::2]]
        answers = [turn["value"] for turn in record["conversations"][1::2]]
        things = [(t["kind"], t["colour"], t["size"], t["cell"]) for t in known["things"]]
        vocabulary = {str(value) for thing in things for value in thing[:3]} | set(" ".join(PLACE).split())
        vocabulary |= {*NUMBER, "yes", "no", "above", "below"}
        for topic, question, answer, spans in zip(known["topics"], questions, answers, known["answers"], strict=True):
            for start, end in spans:
                assert set(answer[start:end].lower().split()) <= vocabulary
                spans_seen += 1
            if topic == "caption":
                assert answer == caption_of(things)
            elif spans:
                assert answer == said_of(things, question)
    assert spans_seen > 60


def test_a_split_without_marks_has_no_truth_and_opens_all_the_same(every_split: dict[str, Path]) -> None:
    folder = every_split["questions"]
    dataset = open_dataset(folder / "data.json")
    samples = [dataset[row] for row in range(len(dataset))]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert any(sample.source == "notes" for sample in samples)
    assert not (folder / "truth.jsonl").exists()


def test_a_text_only_row_has_no_picture_and_no_truth(every_split: dict[str, Path]) -> None:
    data = json.loads((every_split["train"] / "data.json").read_text())
    truth = [json.loads(line) for line in (every_split["train"] / "truth.jsonl").read_text().splitlines()]
    texts = [(record, known) for record, known in zip(data, truth, strict=True) if "image" not in record]
    assert texts
    for record, known in texts:
        assert record["source"] == "text"
        assert "<image>" not in json.dumps(record)
        assert known["things"] == []
        assert known["answers"] == [[] for _ in known["answers"]]


def test_the_shares_of_a_split_are_those_it_states() -> None:
    split = SPLITS["train"]
    drawn = list(rows("train", 1500))
    pictured = [row for row in drawn if row.scene]
    assert 1 - len(pictured) / len(drawn) == pytest.approx(split.text_only, abs=0.03)
    topics = [row.exchanges[0].topic for row in pictured]
    assert mean(topic == "caption" for topic in topics) == pytest.approx(split.captions, abs=0.04)
    common_sense = mean(topic in ("usual colour", "companion") for topic in topics)
    assert common_sense == pytest.approx(split.common_sense, abs=0.05)


def test_every_split_can_be_asked_for() -> None:
    assert set(get_args(get_type_hints(WorldConfig)["split"])) == set(SPLITS)


def test_a_blank_model_knows_rows_from_columns_and_how_far_they_are(blank_model: Path) -> None:
    weights = load_file(blank_model / "model.safetensors")
    [weight] = [weight for name, weight in weights.items() if name.endswith("position_embedding.weight")]
    grid = weight[1:].reshape(6, 6, -1)
    rows, columns = grid.chunk(2, dim=2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert grid.std().item() == pytest.approx(2.0, rel=0.01)
    apart = (columns[0] - columns[0, 0]).norm(dim=1)
    assert torch.all(apart[1:4] > apart[0:3]), "patches further right are further off"


def test_a_bias_outside_of_the_dial_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--bias is 1\.5"):
        WorldConfig(out=Path("out"), bias=1.5)


# ---------------------------------------------------------------- pictures


def picture_of(*things: Fact, seed: int = 0) -> np.ndarray:
    return np.asarray(draw_picture(scene_of(things), np.random.default_rng(seed)), dtype=np.int16)


def painted(*things: Fact, seed: int = 0) -> np.ndarray:
    """Where objects cover the background."""
    return (np.abs(picture_of(*things, seed=seed) - picture_of(seed=seed)) > 12).any(axis=2)


def colour_name(rgb: np.ndarray) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.25:
        return "white" if value > 0.85 else "black" if value < 0.25 else "grey"
    hues = {0: "red", 50: "yellow", 140: "green", 220: "blue", 280: "purple", 360: "red"}
    return hues[min(hues, key=lambda degrees: abs(degrees - 360 * hue))]


def test_a_picture_is_a_small_rgb_square() -> None:
    picture = draw_picture(scenes(1, 0.0)[0], np.random.default_rng(0))
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))


def test_any_two_kinds_and_colours_of_large_objects_are_told_apart_by_a_hundred_pixels() -> None:
    drawn = {(kind, colour): picture_of((kind, colour, "large", 4)) for kind in KINDS for colour in COLOURS}
    for (one, a), (other, b) in combinations(drawn.items(), 2):
        differing = (np.abs(a - b).max(axis=2) > 60).sum()
        assert differing > 100, (one, other, differing)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("size", SIZES)
def test_most_of_an_object_has_the_colour_it_is_said_to_have(colour: str, size: str) -> None:
    for kind in KINDS:
        thing = (kind, colour, size, 4)
        pixels = picture_of(thing)[painted(thing)]
        # Outlines are thin and darker; the median pixel is the filling.
        assert colour_name(np.median(pixels, axis=0)) == colour, kind


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_painted_in_its_cell_and_a_large_one_larger(kind: str) -> None:
    side = SIDE // 3
    for cell in range(9):
        for seed in range(3):
            small = painted((kind, "red", "small", cell), seed=seed)
            large = painted((kind, "red", "large", cell), seed=seed)
            inside = np.zeros_like(large)
            inside[cell // 3 * side : (cell // 3 + 1) * side, cell % 3 * side : (cell % 3 + 1) * side] = True
            assert (large & ~inside).sum() <= 0.02 * large.sum()
            assert large.sum() > 1.6 * small.sum() > 0


def test_the_background_is_never_taken_for_an_object() -> None:
    for seed in range(40):
        background = picture_of(seed=seed)
        assert {colour_name(pixel) for pixel in background[:, 0]} <= {"grey"}


# ---------------------------------------------------------------- grading


def question(topic: str, key: str) -> dict[str, Any]:
    return {"topics": [topic], "keys": [key], "things": [{"kind": "cup"}]}


def captioned(*kinds: str) -> dict[str, Any]:
    return {"topics": ["caption"], "keys": [""], "things": [{"kind": kind} for kind in kinds]}


def test_the_answers_of_the_dataset_are_graded_as_perfect(every_split: dict[str, Path]) -> None:
    for split in TRUTHFUL:
        folder = every_split[split]
        truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]
        data = json.loads((folder / "data.json").read_text())
        pairs = [(t, d["conversations"][1]["value"]) for t, d in zip(truth, data, strict=True) if t["things"]]
        metrics = grade(*zip(*pairs, strict=True))
        assert metrics.accuracy == 1.0
        assert metrics.caption_recall == float(SPLITS[split].captions > 0)
        assert metrics.hallucinated_objects == metrics.captions_with_hallucination == 0.0
        assert metrics.yes_rate == metrics.true_yes_rate
        assert set(metrics.accuracy_by_topic.values()) == {1.0}


def test_answers_by_hand_get_the_metrics_by_hand() -> None:
    truth = [
        question("colour", "red"),
        question("colour", "blue"),
        question("existence", "yes"),
        question("existence", "no"),
        question("existence", "no"),
        question("existence", "no"),
        question("existence", "no"),
        captioned("cup", "star"),
        captioned("fish"),
        captioned("leaf", "leaf"),
        question("usual colour", "red"),  # asks nothing of the picture: not graded
    ]
    answers = [
        "The cup is red.",
        "The cup is green.",
        "Yes, there is a cup.",
        "Yes, there is a star.",
        "Yes.",
        "No, there is no tree.",
        "I would say yes.",  # neither yes nor no
        "Two objects: a cup and a ball.",  # one of two invented, one of two found
        "Three fish.",  # plural and singular are one word
        "Two leaves, a house and a tree.",  # two of three invented
        "blue",
    ]
    metrics = grade(truth, answers)
    assert metrics.accuracy == pytest.approx(3 / 7)
    assert metrics.accuracy_by_topic == {"colour": 0.5, "existence": 0.4}
    assert metrics.existence_accuracy == 0.4
    assert metrics.yes_rate == 0.6
    assert metrics.true_yes_rate == 0.2
    assert metrics.hallucinated_objects == pytest.approx(3 / 6)
    assert metrics.captions_with_hallucination == pytest.approx(2 / 3)
    assert metrics.caption_recall == pytest.approx(3 / 4)
    assert (metrics.questions, metrics.captions) == (7, 3)


def test_a_model_that_always_says_yes_is_given_away_by_its_yes_rate() -> None:
    truth = [question("existence", key) for key in ("yes", "no", "no", "no")]
    metrics = grade(truth, ["Yes, there is."] * 4)
    assert (metrics.accuracy, metrics.yes_rate, metrics.true_yes_rate) == (0.25, 1.0, 0.25)


@pytest.mark.parametrize("answer", ["", "   ", "%&/ 12 \u4e09 \n\n", "USER: USER: <image>"])
def test_garbage_is_wrong_and_invents_nothing(answer: str) -> None:
    truth = [question("count", "two"), question("existence", "no"), captioned("cup")]
    metrics = grade(truth, [answer] * 3)
    assert metrics.accuracy == metrics.yes_rate == metrics.hallucinated_objects == metrics.caption_recall == 0.0


def test_nothing_to_grade_is_no_division_by_zero() -> None:
    metrics = grade([], [])
    assert (metrics.accuracy, metrics.questions, metrics.captions) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("topic", "key", "answer", "right"),
    [
        ("colour", "red", "It is RED!", True),
        ("colour", "red", "It is red or blue.", False),
        ("colour", "red", "It is reddish.", False),
        ("place", "top left", "The cup is in the top left.", True),
        ("place", "top left", "The cup is in the left top.", False),
        ("place", "top left", "The cup is in the top.", False),
        ("relation", "left", "The cup is to the left of the star.", True),
        ("relation", "left", "The cup is to the left and above.", False),
        ("count", "two", "I count two.", True),
        ("count", "two", "I count 2.", False),
        ("content", "star", "There is a small red star.", True),
        ("content", "star", "There is a star and a cup.", False),
        ("existence", "yes", "yes", True),
        ("existence", "yes", "There is, yes.", False),
        ("existence", "no", "Not that I see.", False),
        ("size", "small", "small small", False),
    ],
)
def test_a_reply_is_right_if_it_says_the_word_and_no_other_of_its_sort(
    topic: str, key: str, answer: str, right: bool
) -> None:
    assert is_right(topic, key, answer) is right


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_in_singular_and_plural(kind: str) -> None:
    plural = {"fish": "fish", "leaf": "leaves"}.get(kind, kind + "s")
    assert caption_kinds(f"A {kind.upper()}, two {plural} and a {kind}like thing.") == [kind, kind]


def test_the_length_of_a_malformed_answer_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        grade([captioned("cup")], [])


def test_evaluating_asks_the_model_about_every_picture_and_grades_what_it_says(
    blank_model: Path, tmp_path: Path
) -> None:
    write_world(WorldConfig(out=tmp_path, split="test", rows=8, seed=1))
    truth = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    topics = [known["topics"][0] for known in truth]
    metrics = evaluate_world(str(blank_model), tmp_path)
    assert metrics.captions == topics.count("caption") > 0
    assert metrics.questions == len(topics) - metrics.captions
    assert metrics.accuracy < 0.5  # random weights know nothing
    exists = [known["keys"][0] == "yes" for known in truth if known["topics"][0] == "existence"]
    assert metrics.true_yes_rate == pytest.approx(mean(exists))
